//! Mends packs: tables and segments from their records, blocks from equal ones elsewhere.
//!
//! A mended pack is written beside the old one, made durable, checked, and takes its place in one
//! step, as a file of its own even if it lay in a bundle: such a file comes first. Compaction is
//! kept out as long as this goes on, and pinning for the moment of the change. Damage that cannot
//! be mended is left as it is.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::{self, BufWriter};
use std::sync::Arc;

use dormouse_image::codec::Codec;
use dormouse_image::digest::{Digest, DomainKey};
use dormouse_image::error::{Error as ImageError, ErrorKind as ImageErrorKind};
use dormouse_image::pack::{
    Bundle, HEADER_BYTES, PackId, PackReader, ReadAt, rebuild_pack, repair_pack,
};
use uuid::Uuid;

use super::finding::{Finding, Findings, Part};
use crate::disk::{DiskLock, DiskSink, LockKind, LockWait};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::index::{Index, IndexHit, IndexRun, index_packs};
use crate::layout::{COMPACT_LOCK, GC_LOCK, pack_folder, pack_path};
use crate::packs::Packs;
use crate::pin::Pin;
use crate::progress::Job;
use crate::store::Store;

/// Bytes gathered before they are written.
const WRITE_BUFFER_BYTES: usize = 1 << 20;

/// What mends a store. While it lives nobody compacts.
pub(super) struct Mender<'a> {
    store: &'a Store,
    job: Job<'a>,
    key: DomainKey,
    pin: Pin,
    _lock: Box<dyn DiskLock>,
}

/// A pack's place and the header in it, whose salt is another in every writing.
#[derive(PartialEq, Eq)]
struct Seen {
    pack: PackId,
    place: Option<(String, u64, u64)>,
    header: Option<[u8; HEADER_BYTES]>,
}

/// A stretch of a file that should be a pack.
struct Region {
    path: String,
    offset: u64,
    bytes: u64,
    /// Whether it lies in a bundle whose directory is lost.
    is_hidden: bool,
}

impl<'a> Mender<'a> {
    pub(super) fn new(store: &'a Store, job: Job<'a>) -> Result<Mender<'a>> {
        let key = store.packs().key().context(|| "cannot repair".to_owned())?.clone();
        let lock = store
            .disk()
            .lock(COMPACT_LOCK, LockKind::Exclusive, LockWait::Try, true)
            .context(|| format!("cannot lock {COMPACT_LOCK}"))?
            .ok_or_else(|| Error::new(ErrorKind::Busy, "a compaction is under way; try later"))?;
        let pin = Pin::new(store.disk(), "verify --repair")?;
        Ok(Mender { store, job, key, pin, _lock: lock })
    }

    /// Rebuilds packs whose table, header, footer or segments are damaged, and takes packs out of
    /// bundles whose directory is.
    pub(super) fn mend_packs(&self, findings: &mut Findings) -> Result<()> {
        let damaged: BTreeSet<String> = findings
            .all
            .iter()
            .filter(|finding| finding.part == Part::Bundle)
            .map(|finding| finding.path.clone())
            .collect();
        let mut hidden: BTreeMap<PackId, Vec<Region>> = BTreeMap::new();
        for path in &damaged {
            for (pack, region) in self.search(path)? {
                hidden.entry(pack).or_default().push(region);
            }
        }
        let mut wanted: BTreeSet<PackId> = findings
            .all
            .iter()
            .filter(|finding| matches!(finding.part, Part::Whole | Part::Segments))
            .map(|finding| finding.pack)
            .collect();
        // Nobody may need them, but then it is the collector who takes them away.
        wanted.extend(hidden.keys().filter(|&&pack| !self.packs().exists(pack)));
        let mut lost = HashSet::new();
        for pack in wanted {
            self.job.check()?;
            let place = self.packs().place(pack).ok().map(|place| Region {
                path: place.path,
                offset: place.offset,
                bytes: place.bytes,
                is_hidden: false,
            });
            let regions = place.into_iter().chain(hidden.remove(&pack).unwrap_or_default());
            let mut is_mended = false;
            for region in regions {
                match self.rebuild(pack, &region)? {
                    Ok(()) => is_mended = true,
                    Err(error) => tracing::info!(%pack, %error, "cannot rebuild a pack"),
                }
                if is_mended {
                    break;
                }
            }
            if !is_mended {
                lost.insert(pack);
            }
        }
        for finding in &mut findings.all {
            if matches!(finding.part, Part::Whole | Part::Segments) {
                finding.repaired = !lost.contains(&finding.pack);
            }
        }
        // As long as anything is missing it may yet be dug out of the bundle.
        let is_complete = lost.is_empty();
        for finding in findings.all.iter_mut().filter(|finding| finding.part == Part::Bundle) {
            if is_complete {
                let _lock = self.lock_out_pins()?;
                self.store
                    .disk()
                    .remove(&finding.path)
                    .context(|| format!("cannot remove {}", finding.path))?;
                finding.repaired = true;
            }
        }
        self.packs().forget_all();
        Ok(())
    }

    /// Removes damaged runs and indexes packs that none covers. Returns how many could not be.
    pub(super) fn mend_index(&self, damaged: &[String], uncovered: &[PackId]) -> Result<usize> {
        self.store.index().remove_runs(damaged)?;
        if uncovered.is_empty() {
            return Ok(0);
        }
        Ok(index_packs(self.store, &self.pin, uncovered, self.job)?.skipped.len())
    }

    /// Puts equal blocks in the place of damaged ones. Findings about frames are divided into what
    /// was mended and what was not.
    pub(super) fn mend_blocks(&self, findings: &mut Findings) -> Result<()> {
        self.store.index().refresh()?;
        let runs = self.store.index().runs();
        let mut divided = Vec::new();
        for finding in std::mem::take(&mut findings.all) {
            if finding.part != Part::Frames {
                divided.push(finding);
                continue;
            }
            self.job.check()?;
            let mended = self.mend_frames(&finding, &runs)?;
            let is_mended = |slot: u32| mended.binary_search(&slot).is_ok();
            for repaired in [true, false] {
                let mut part = Finding { slots: Vec::new(), repaired, ..finding.clone() };
                for slot in
                    finding.slots.iter().flat_map(|&(first, len)| (first..).take(len as usize))
                {
                    if is_mended(slot) == repaired {
                        part.add_slots(slot, 1);
                    }
                }
                if !part.slots.is_empty() {
                    divided.push(part);
                }
            }
        }
        findings.all = divided;
        Ok(())
    }

    /// Mends what can be mended of a pack with damaged frames and returns the slots, ascending.
    fn mend_frames(&self, finding: &Finding, runs: &[Arc<IndexRun>]) -> Result<Vec<u32>> {
        let pack = finding.pack;
        let seen = self.seen(pack);
        let Ok(reader) = self.packs().reader(pack) else { return Ok(Vec::new()) };
        let mut find = |slot: u32, digest: &Digest| self.find_block(runs, pack, slot, digest);
        let salt = Uuid::new_v4().as_fields().0;
        let (tmp, sink) = self.create()?;
        let repaired = repair_pack(&reader, &self.key, Codec::DEFAULT, salt, &mut find, sink);
        let mended = match repaired {
            Ok((repaired, sink)) if !repaired.mended.is_empty() => {
                self.publish(&tmp, sink, &seen, &repaired.lost).map(|()| repaired.mended)
            }
            Ok(_) => Ok(Vec::new()),
            Err(error) if error.kind() == ImageErrorKind::Io => {
                Err(Error::image(format!("cannot write pack {pack} again"), error))
            }
            // The next round says what is wrong with it.
            Err(error) => {
                tracing::info!(%pack, %error, "cannot mend a pack");
                Ok(Vec::new())
            }
        };
        self.sweep(&tmp);
        mended
    }

    /// A sound block with this digest that lies anywhere but in the given slot.
    fn find_block(
        &self,
        runs: &[Arc<IndexRun>],
        pack: PackId,
        slot: u32,
        digest: &Digest,
    ) -> Option<Vec<u8>> {
        let mut hits = Vec::new();
        Index::lookup(runs, digest, &mut |hit| hits.push(hit));
        hits.retain(|&hit| hit != IndexHit { pack, slot });
        hits.into_iter().find_map(|hit| {
            let known = self.packs().digest(hit.pack, hit.slot).ok()?;
            if known != *digest {
                return None;
            }
            self.packs().with_blocks(hit.pack, hit.slot, 1, <[u8]>::to_vec).ok()
        })
    }

    /// Writes a sound copy of a pack in its place. The inner error says why that cannot be done.
    fn rebuild(
        &self,
        pack: PackId,
        region: &Region,
    ) -> Result<std::result::Result<(), ImageError>> {
        let seen = self.seen(pack);
        let file = match self.packs().raw_file(&region.path) {
            Ok(file) => file,
            Err(error) => return Ok(Err(error)),
        };
        let (tmp, sink) = self.create()?;
        let rebuilt = rebuild_pack(&file, region.offset, region.bytes, pack, &self.key, sink);
        let result = match rebuilt {
            Ok((_, sink)) => self.publish(&tmp, sink, &seen, &[]).map(Ok),
            Err(error) => Ok(Err(error)),
        };
        self.sweep(&tmp);
        match result {
            Ok(Err(error)) if region.is_hidden => self.take_out(&seen, region, file, error),
            result => result,
        }
    }

    /// Takes a pack out of a damaged bundle, with what is damaged in it. Its frames are mended in
    /// the next round.
    fn take_out(
        &self,
        seen: &Seen,
        region: &Region,
        file: Arc<dyn ReadAt>,
        error: ImageError,
    ) -> Result<std::result::Result<(), ImageError>> {
        let Ok(reader) = PackReader::open(file, region.offset, region.bytes) else {
            return Ok(Err(error));
        };
        let salt = Uuid::new_v4().as_fields().0;
        let (tmp, sink) = self.create()?;
        let copied = repair_pack(&reader, &self.key, Codec::DEFAULT, salt, &mut |_, _| None, sink);
        let result = match copied {
            Ok((copied, sink)) => self.publish(&tmp, sink, seen, &copied.lost).map(Ok),
            Err(_) => Ok(Err(error)),
        };
        self.sweep(&tmp);
        result
    }

    /// The packs that can be told in a bundle whose directory is lost.
    fn search(&self, path: &str) -> Result<Vec<(PackId, Region)>> {
        let cannot = || format!("cannot read {path}");
        let bytes = self.store.disk().open(path).context(cannot)?.len();
        let file: Arc<dyn ReadAt> = self.packs().raw_file(path).context(cannot)?;
        let found = Bundle::search(&*file, bytes);
        Ok(found
            .into_iter()
            .filter(|entry| {
                PackReader::open(Arc::clone(&file), entry.offset, entry.bytes)
                    .is_ok_and(|reader| reader.id() == entry.pack)
            })
            .map(|entry| {
                let region = Region {
                    path: path.to_owned(),
                    offset: entry.offset,
                    bytes: entry.bytes,
                    is_hidden: true,
                };
                (entry.pack, region)
            })
            .collect())
    }

    fn create(&self) -> Result<(String, BufWriter<DiskSink>)> {
        let tmp = self.pin.tmp_path("pack");
        self.sweep(&tmp);
        let file = self.store.disk().create(&tmp).context(|| format!("cannot make {tmp}"))?;
        Ok((tmp, BufWriter::with_capacity(WRITE_BUFFER_BYTES, DiskSink(file))))
    }

    /// Makes a written pack durable, checks it but for the slots that are known to be damaged, and
    /// puts it in place.
    fn publish(
        &self,
        tmp: &str,
        sink: BufWriter<DiskSink>,
        seen: &Seen,
        damaged: &[u32],
    ) -> Result<()> {
        let pack = seen.pack;
        let cannot = || format!("cannot write {tmp}");
        let mut file =
            sink.into_inner().map_err(|error| Error::io(cannot(), error.into_error()))?.0;
        file.sync().context(cannot)?;
        self.check(tmp, pack, damaged).context(|| format!("pack {pack} was not mended"))?;
        let (folder, path) = (pack_folder(pack), pack_path(pack));
        let disk = self.store.disk();
        disk.create_dir_all(&folder).context(|| format!("cannot make {folder}"))?;
        let _lock = self.lock_out_pins()?;
        if self.seen(pack) != *seen {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("somebody else wrote pack {pack} anew while it was mended; verify again"),
            ));
        }
        disk.rename(tmp, &path)
            .and_then(|()| disk.sync_dir(&folder))
            .context(|| format!("cannot put {path} in place"))?;
        self.packs().forget(pack);
        Ok(())
    }

    /// What lies in a pack's place now. Told before it is read: a commit of the same content may put
    /// a whole one there at any time, and what is made of the old one must not take its place.
    fn seen(&self, pack: PackId) -> Seen {
        self.packs().forget(pack);
        let place = self.packs().place(pack).ok();
        let header = place.as_ref().and_then(|place| {
            let mut header = [0; HEADER_BYTES];
            let file = self.packs().raw_file(&place.path).ok()?;
            file.read_exact_at(&mut header, place.offset).ok()?;
            Some(header)
        });
        Seen { pack, place: place.map(|place| (place.path, place.offset, place.bytes)), header }
    }

    /// Reads back what was written.
    fn check(
        &self,
        path: &str,
        pack: PackId,
        damaged: &[u32],
    ) -> dormouse_image::error::Result<()> {
        use dormouse_image::pack::SEGMENT_SLOTS;
        let file = self.packs().raw_file(path)?;
        let bytes =
            self.store.disk().open(path).map_err(|error| ImageError::io("pack", error))?.len();
        let reader = PackReader::open(file, 0, bytes)?;
        if reader.id() != pack {
            return Err(ImageError::corrupt("pack id", reader.id(), pack));
        }
        for (number, entry) in (0_u32..).zip(&reader.toc().segments) {
            if entry.offset == 0 {
                continue;
            }
            let segment = reader.segment(number as usize)?;
            for frame in 0..segment.frames() {
                let first = segment.frame_slots(frame).first().copied().unwrap_or(0);
                if damaged.binary_search(&(number * SEGMENT_SLOTS + first)).is_err() {
                    self.packs().decode(&reader, number, &segment, frame)?;
                }
            }
        }
        Ok(())
    }

    fn lock_out_pins(&self) -> Result<Box<dyn DiskLock>> {
        self.store
            .disk()
            .lock(GC_LOCK, LockKind::Exclusive, LockWait::Wait, true)
            .context(|| format!("cannot lock {GC_LOCK}"))?
            .ok_or_else(|| Error::new(ErrorKind::Busy, format!("{GC_LOCK} is taken")))
    }

    fn sweep(&self, tmp: &str) {
        match self.store.disk().remove(tmp) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::debug!(tmp, %error, "temporary file left for gc");
            }
            _ => {}
        }
    }

    fn packs(&self) -> &Packs {
        self.store.packs()
    }
}
