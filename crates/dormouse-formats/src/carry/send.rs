//! Writing a carry.

use std::collections::BTreeSet;
use std::io::Write;
use std::ops::Range;

use dormouse_image::block::BLOCK_BYTES;
use dormouse_image::map::Source;
use dormouse_store::name::SnapRef;
use dormouse_store::progress::Job;
use dormouse_store::reader::ImageReader;
use dormouse_store::store::{Snapshot, Store};
use uuid::Uuid;

use super::ORIGIN_LABEL;
use super::content::content_digest;
use super::record::{CarriedImage, CarriedSnapshot, Header, RECORD_BLOCKS_MAX, Record, RecordBody};
use crate::error::{Error, ErrorKind, Result};
use crate::export::Line;

/// Ancestors that are looked at for one that the receiver has.
const ANCESTORS_MAX: usize = 4096;

/// The UUID that a snapshot had where it was made.
pub(super) fn origin_of(snapshot: &dormouse_store::manifest::Manifest) -> Uuid {
    let label = snapshot.labels.get(ORIGIN_LABEL).and_then(|text| text.parse().ok());
    label.unwrap_or(snapshot.uuid)
}

/// Writes the snapshots of a line, but for what a receiver has, and returns the bytes of blocks that
/// went along.
pub fn send(
    store: &Store,
    line: &Line,
    has: &BTreeSet<Uuid>,
    sink: &mut dyn Write,
    job: Job<'_>,
) -> Result<u64> {
    let mut before = None;
    let mut parts: Vec<(&Snapshot, Option<Snapshot>)> = Vec::new();
    for snapshot in line.snapshots() {
        if has.contains(&origin_of(snapshot.manifest())) {
            before = Some(snapshot.clone());
            continue;
        }
        let base = match before.take() {
            Some(before) => Some(before),
            None => known_ancestor(store, snapshot, has)?,
        };
        parts.push((snapshot, base));
        before = Some(snapshot.clone());
    }
    if parts.is_empty() {
        return Err(Error::new(
            ErrorKind::AlreadyExists,
            format!("the receiver has {} already", line.name()),
        ));
    }
    let mut snapshots: Vec<CarriedSnapshot> =
        parts.iter().map(|(snapshot, base)| describe(snapshot, base.as_ref())).collect();
    // Of what the receiver has already it is told the content, for names and labels can be forged.
    if let (Some(first), Some((_, Some(base)))) = (snapshots.first_mut(), parts.first()) {
        for image in first.images.iter_mut().filter(|image| image.is_changes) {
            image.base_digest = Some(content_digest(&base.image(&image.image)?, job)?);
        }
    }
    let header = Header { snapshots };
    header.write(sink)?;
    let mut sender = Sender { sink, records: 0, bytes: 0, job };
    for ((snapshot, base), carried) in parts.iter().zip(&header.snapshots) {
        for image in &carried.images {
            let reader = snapshot.image(&image.image)?;
            match base {
                Some(base) if image.is_changes => {
                    sender.changes(&reader, &base.image(&image.image)?)?;
                }
                _ => sender.range(&reader, 0..reader.size_bytes())?,
            }
            sender.record(&Record { offset: 0, body: RecordBody::ImageEnd })?;
        }
    }
    let end = RecordBody::End(sender.records);
    sender.record(&Record { offset: 0, body: end })?;
    Ok(sender.bytes)
}

fn describe(snapshot: &Snapshot, base: Option<&Snapshot>) -> CarriedSnapshot {
    let manifest = snapshot.manifest();
    CarriedSnapshot {
        uuid: origin_of(manifest),
        name: manifest.name.clone(),
        number: manifest.number,
        base: base.map(|base| origin_of(base.manifest())),
        images: manifest
            .images
            .iter()
            .map(|entry| CarriedImage {
                image: entry.image.clone(),
                size_bytes: entry.size_bytes,
                is_changes: base.is_some_and(|base| base.manifest().image(&entry.image).is_some()),
                base_digest: None,
            })
            .collect(),
        memory_layout: manifest.memory_layout.clone(),
        vmm: manifest.vmm.clone(),
        labels: manifest.labels.clone(),
    }
}

/// The nearest ancestor that both sides have.
fn known_ancestor(
    store: &Store,
    snapshot: &Snapshot,
    has: &BTreeSet<Uuid>,
) -> Result<Option<Snapshot>> {
    let mut parent = snapshot.manifest().parent.clone();
    for _ in 0..ANCESTORS_MAX {
        let Some(next) = parent else { break };
        let snap = SnapRef { name: next.name, number: Some(next.number) };
        // One that was removed ends the walk: what is before it cannot be known.
        let Ok(manifest) = store.manifest(&snap) else { break };
        if manifest.uuid != next.uuid {
            break;
        }
        if has.contains(&origin_of(&manifest)) {
            return Ok(Some(store.snapshot(&snap)?));
        }
        parent = manifest.parent;
    }
    Ok(None)
}

struct Sender<'a> {
    sink: &'a mut dyn Write,
    records: u64,
    bytes: u64,
    job: Job<'a>,
}

impl Sender<'_> {
    fn record(&mut self, record: &Record) -> Result<()> {
        record.write(self.sink)?;
        self.records += 1;
        Ok(())
    }

    fn changes(&mut self, image: &ImageReader, base: &ImageReader) -> Result<()> {
        let mut changes = Vec::new();
        image.for_each_change(base, &mut |range| {
            changes.push(range);
            Ok(())
        })?;
        changes.into_iter().try_for_each(|range| self.range(image, range))
    }

    /// All of a range, zeros and data.
    fn range(&mut self, image: &ImageReader, range: Range<u64>) -> Result<()> {
        self.job.progress.begin("send", Some(range.end - range.start));
        let mut runs: Vec<(Range<u64>, bool)> = Vec::new();
        image.for_each_extent(range, &mut |extent| {
            let zero = extent.source == Source::Zero;
            match runs.last_mut() {
                Some((last, was_zero)) if *was_zero == zero && last.end == extent.range.start => {
                    last.end = extent.range.end;
                }
                _ => runs.push((extent.range, zero)),
            }
            Ok(())
        })?;
        let piece_bytes = RECORD_BLOCKS_MAX as usize * BLOCK_BYTES;
        for (run, zero) in runs {
            self.job.check()?;
            if zero {
                let body = RecordBody::Zero(run.end - run.start);
                self.record(&Record { offset: run.start, body })?;
                continue;
            }
            let mut at = run.start;
            while at < run.end {
                let len = usize::try_from(run.end - at).unwrap_or(piece_bytes).min(piece_bytes);
                let mut bytes = vec![0; len];
                image.read_at(&mut bytes, at)?;
                bytes.resize(len.next_multiple_of(BLOCK_BYTES), 0);
                self.record(&Record { offset: at, body: RecordBody::Data(bytes) })?;
                self.bytes += len as u64;
                at += len as u64;
                self.job.progress.advance(len as u64);
            }
        }
        Ok(())
    }
}
