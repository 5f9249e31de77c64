//! Makes runs again from the segments of packs, for packs that no run covers.
//!
//! Memory is bounded: entries are sorted [`CHUNK_ENTRIES`] at a time, written to temporary runs and
//! merged.

use std::collections::HashSet;
use std::sync::Arc;

use dormouse_image::error::Result as ImageResult;
use dormouse_image::pack::{PackId, PackReader, SEGMENT_SLOTS};

use super::run::{IndexHit, IndexRun, RunWriter};
use super::{Index, for_each_merged};
use crate::disk::Disk;
use crate::error::{Context, Error, Result};
use crate::pin::Pin;
use crate::progress::Job;
use crate::store::Store;

/// Entries that are sorted in memory: 40 MiB.
const CHUNK_ENTRIES: usize = 1 << 20;

/// What became of indexing some packs.
#[derive(Debug, Default)]
pub(crate) struct Indexed {
    /// Entries of the run that was published.
    pub(crate) entries: u64,

    /// Packs that could not be read and are still not covered.
    pub(crate) skipped: Vec<PackId>,
}

/// Publishes a run that covers `packs`, made from their segments.
pub(crate) fn index_packs(
    store: &Store,
    pin: &Pin,
    packs: &[PackId],
    job: Job<'_>,
) -> Result<Indexed> {
    let mut chunks = Chunks::new(&**store.disk(), pin);
    let mut indexed = Indexed::default();
    for &pack in packs {
        job.check()?;
        let reader = match store.packs().reader(pack) {
            Ok(reader) => reader,
            Err(error) => {
                tracing::warn!(%pack, %error, "a pack that cannot be opened is not indexed");
                indexed.skipped.push(pack);
                continue;
            }
        };
        let mut failed = None;
        let read = read_pack(&reader, &mut |digest, slot| {
            chunks
                .push(digest, IndexHit { pack, slot })
                .map_err(|error| failed = Some(error))
                .is_ok()
        });
        if let Some(error) = failed {
            return Err(error);
        }
        if let Err(error) = read {
            tracing::warn!(%pack, %error, "a pack that cannot be read is not indexed");
            indexed.skipped.push(pack);
        }
    }
    let skipped: HashSet<PackId> = indexed.skipped.iter().copied().collect();
    let covered: Vec<PackId> =
        packs.iter().copied().filter(|pack| !skipped.contains(pack)).collect();
    if covered.is_empty() {
        return Ok(indexed);
    }
    let tmp = pin.tmp_path("run");
    indexed.entries = chunks.write(&tmp, &covered, &|pack| !skipped.contains(&pack))?;
    store.index().publish(&tmp)?;
    store.index().refresh()?;
    Ok(indexed)
}

/// Calls `visit` with the digest prefix of each slot whose block is there, until it says no.
fn read_pack(reader: &PackReader, visit: &mut dyn FnMut(u64, u32) -> bool) -> ImageResult<()> {
    for (number, entry) in reader.toc().segments.iter().enumerate() {
        if entry.offset == 0 {
            continue;
        }
        let segment = reader.segment(number)?;
        let base = u32::try_from(number).unwrap_or(u32::MAX) * SEGMENT_SLOTS;
        for slot in (0..segment.slots()).filter(|&slot| segment.is_present(slot)) {
            if let Some(digest) = segment.digest(slot)
                && !visit(digest.prefix(), base + slot)
            {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Entries on their way into one run.
struct Chunks<'a> {
    disk: &'a dyn Disk,
    pin: &'a Pin,
    rows: Vec<(u64, IndexHit)>,
    spilled: Vec<Arc<IndexRun>>,
}

impl<'a> Chunks<'a> {
    fn new(disk: &'a dyn Disk, pin: &'a Pin) -> Chunks<'a> {
        Chunks { disk, pin, rows: Vec::new(), spilled: Vec::new() }
    }

    fn push(&mut self, prefix: u64, hit: IndexHit) -> Result<()> {
        self.rows.push((prefix, hit));
        if self.rows.len() < CHUNK_ENTRIES {
            return Ok(());
        }
        let path = self.pin.tmp_path(&format!("chunk{}", self.spilled.len()));
        self.rows.sort_unstable();
        let mut writer = RunWriter::create(self.disk, &path, self.rows.len() as u64, &[])?;
        self.rows.drain(..).try_for_each(|(prefix, hit)| writer.push(prefix, hit))?;
        writer.finish()?;
        self.spilled.push(Arc::new(IndexRun::open(self.disk, &path, 0)?));
        Ok(())
    }

    /// Writes the entries of packs that are kept and returns their number.
    fn write(
        &mut self,
        path: &str,
        packs: &[PackId],
        keep: &dyn Fn(PackId) -> bool,
    ) -> Result<u64> {
        self.rows.sort_unstable();
        let spilled: u64 = self.spilled.iter().map(|run| run.entries()).sum();
        let limit = spilled + self.rows.len() as u64;
        let mut writer = RunWriter::create(self.disk, path, limit, packs)?;
        let mut entries = 0;
        let mut push = |prefix, hit: IndexHit| {
            if keep(hit.pack) {
                entries += 1;
                writer.push(prefix, hit)
            } else {
                Ok(())
            }
        };
        let mut rows = self.rows.drain(..).peekable();
        for_each_merged(&self.spilled, &mut |prefix, hit| {
            while let Some((prefix, hit)) = rows.next_if(|row| *row <= (prefix, hit)) {
                push(prefix, hit)?;
            }
            push(prefix, hit)
        })?;
        rows.try_for_each(|(prefix, hit)| push(prefix, hit))?;
        writer.finish()?;
        Ok(entries)
    }
}

impl Drop for Chunks<'_> {
    fn drop(&mut self) {
        for run in &self.spilled {
            // What cannot be removed now is swept by the next collection.
            if let Err(error) = self.disk.remove(run.path()) {
                tracing::debug!(path = run.path(), %error, "temporary file left");
            }
        }
    }
}

/// What `verify` finds in the index.
#[derive(Debug, Default)]
pub(crate) struct IndexCheck {
    /// Damaged runs and what is wrong with each.
    pub(crate) damaged: Vec<(String, Error)>,

    /// Packs that sound runs cover.
    pub(crate) covered: HashSet<PackId>,

    /// Bytes that were read.
    pub(crate) read_bytes: u64,
}

impl Index {
    /// Reads every run whole, past what is open already.
    pub(crate) fn check(&self, job: Job<'_>) -> Result<IndexCheck> {
        let mut found = IndexCheck::default();
        for path in self.paths()? {
            job.check()?;
            let read = IndexRun::open(&*self.disk, &path, 0).and_then(|run| {
                let mut scan = run.scan();
                while scan.next()?.is_some() {}
                Ok(run)
            });
            match read {
                Ok(run) => {
                    found.covered.extend(run.packs());
                    found.read_bytes += run.file_bytes();
                }
                // Merged away between the listing and now.
                Err(error) if error.kind() == crate::error::ErrorKind::NotFound => {}
                Err(error) => found.damaged.push((path, error)),
            }
        }
        Ok(found)
    }

    /// Removes runs that are damaged.
    pub(crate) fn remove_runs(&self, paths: &[String]) -> Result<()> {
        for path in paths {
            match self.disk.remove(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("cannot remove {path}"), error));
                }
                _ => {}
            }
        }
        self.disk.sync_dir(crate::layout::INDEX).context(|| "cannot sync the index".to_owned())?;
        self.refresh().map(drop)
    }
}
