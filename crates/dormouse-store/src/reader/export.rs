//! Writing an image to a file: sparse, checked, on all cores, published whole.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use dormouse_image::block::BLOCK_BYTES_U64;
use dormouse_image::map::{LEAF_BYTES, Leaf, LeafDiff, Source};
use dormouse_sys::publish::{Existing, NewFile};

use super::ImageReader;
use crate::error::{Context, Error, Result};
use crate::progress::Job;

/// Bytes written at once: a whole number of frames, read out of the cache while they are warm.
const WRITE_BYTES: u64 = 1 << 20;

/// Who may read what is written out of a store: its owner. Memory has keys and passwords in it, states have
/// registers, disks what the guest keeps from its own users.
pub const EXPORT_MODE: u32 = 0o600;

/// How an image is written to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportTarget {
    /// A new file; one that is there already is an error.
    New,

    /// A file that takes the place of the one that is there, if any, at once.
    Replace,
}

/// What an export wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExportReport {
    /// Length of the file.
    pub size_bytes: u64,

    /// Bytes that were written; the rest is holes.
    pub written_bytes: u64,
}

/// Writes what belongs to a leaf with the given number, through a buffer kept from leaf to leaf.
type WriteLeaf<'a> = dyn Fn(&Exporter<'_>, u64, &mut Vec<u8>) -> Result<()> + Sync + 'a;

impl ImageReader {
    /// Writes the image to a sparse file, published under its name after it is durable. Every block
    /// is checked against its digest on the way; after an error nothing is left. The file is
    /// its owner's alone.
    pub fn export(&self, path: &Path, target: ExportTarget, job: Job<'_>) -> Result<ExportReport> {
        self.export_leaves(path, target, job, &|exporter, number, buf| {
            let Some(leaf) = self.leaf(number)? else { return Ok(()) };
            let base = number * LEAF_BYTES;
            for run in stored_runs(&leaf) {
                exporter.copy(base + run.0, base + run.1, buf)?;
            }
            Ok(())
        })
    }

    /// Writes what differs from `base` to a sparse file with Firecracker's meaning: a hole is
    /// unchanged, a zero that was data is written as data. Blocks that are stored in two places
    /// but equal do not differ. What is past the end of `base` is written if it is not zero.
    pub fn export_diff(
        &self,
        base: &ImageReader,
        path: &Path,
        target: ExportTarget,
        job: Job<'_>,
    ) -> Result<ExportReport> {
        self.export_leaves(path, target, job, &|exporter, number, buf| {
            for range in self.changes_of_leaf(base, number)? {
                exporter.copy(range.start, range.end, buf)?;
            }
            Ok(())
        })
    }

    /// Calls `visit` with the runs of bytes in which this image differs from `base`, in order, cut
    /// to this image's length. Blocks that are stored in two places but equal do not differ; what is
    /// past the end of `base` differs if it is not zero.
    pub fn for_each_change(
        &self,
        base: &ImageReader,
        visit: &mut dyn FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        for number in 0..self.leaves() {
            for range in self.changes_of_leaf(base, number)? {
                let end = range.end.min(self.size_bytes);
                if range.start < end {
                    visit(range.start..end)?;
                }
            }
        }
        Ok(())
    }

    /// The bytes in a leaf in which this image differs from `base`.
    fn changes_of_leaf(&self, base: &ImageReader, number: u64) -> Result<Vec<Range<u64>>> {
        let new = self.leaf(number)?;
        let old = if number < base.leaves() { base.leaf(number)? } else { None };
        let zero = Leaf::zero();
        let (old, new) = (old.as_deref().unwrap_or(&zero), new.as_deref().unwrap_or(&zero));
        let start = number * LEAF_BYTES;
        let mut changes = Vec::new();
        for diff in old.diff(new) {
            let parts = self.really_different(&diff)?;
            changes.extend(parts.into_iter().map(|(from, to)| start + from..start + to));
        }
        Ok(changes)
    }

    /// The parts of a run in which the contents differ, as bytes of the leaf.
    fn really_different(&self, diff: &LeafDiff) -> Result<Vec<(u64, u64)>> {
        let mut parts: Vec<(u64, u64)> = Vec::new();
        for block in 0..diff.len {
            let differs = match (diff.old.advance(block), diff.new.advance(block)) {
                (
                    Source::Stored { pack: old, slot: old_slot },
                    Source::Stored { pack: new, slot: new_slot },
                ) => {
                    let digest = |pack, slot| {
                        self.packs.digest(pack, slot).context(|| "cannot compare blocks".to_owned())
                    };
                    digest(old, old_slot)? != digest(new, new_slot)?
                }
                _ => true,
            };
            if differs {
                let from = u64::from(diff.start + block) * BLOCK_BYTES_U64;
                match parts.last_mut() {
                    Some(last) if last.1 == from => last.1 += BLOCK_BYTES_U64,
                    _ => parts.push((from, from + BLOCK_BYTES_U64)),
                }
            }
        }
        Ok(parts)
    }

    /// Runs `write_leaf` for every leaf, on several threads, and publishes the file.
    fn export_leaves(
        &self,
        path: &Path,
        target: ExportTarget,
        job: Job<'_>,
        write_leaf: &WriteLeaf<'_>,
    ) -> Result<ExportReport> {
        job.progress.begin("export", Some(self.size_bytes));
        let existing = match target {
            ExportTarget::New => Existing::Refuse,
            ExportTarget::Replace => Existing::Replace,
        };
        let cannot = || format!("cannot write {}", path.display());
        let file =
            NewFile::create(path, existing, EXPORT_MODE).map_err(|error| already(path, error))?;
        file.file().set_len(self.size_bytes).context(cannot)?;
        let exporter = Exporter {
            image: self,
            file: file.file(),
            path,
            written: AtomicU64::new(0),
            failed: AtomicBool::new(false),
        };
        let next = AtomicU64::new(0);
        let failure = Mutex::new(None);
        let work = || {
            let mut buf = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= self.leaves() || exporter.failed.load(Ordering::Relaxed) {
                    return;
                }
                let result = job.check().and_then(|()| write_leaf(&exporter, number, &mut buf));
                if let Err(error) = result {
                    exporter.failed.store(true, Ordering::Relaxed);
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    return;
                }
                job.progress.advance(LEAF_BYTES.min(self.size_bytes - number * LEAF_BYTES));
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.threads {
                scope.spawn(work);
            }
            work();
        });
        let written_bytes = exporter.written.load(Ordering::Relaxed);
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        file.publish().map_err(|error| already(path, error))?;
        Ok(ExportReport { size_bytes: self.size_bytes, written_bytes })
    }
}

struct Exporter<'a> {
    image: &'a ImageReader,
    file: &'a std::fs::File,
    path: &'a Path,
    written: AtomicU64,
    failed: AtomicBool,
}

impl Exporter<'_> {
    /// Copies bytes of the image, cut to its length, to their place in the file.
    fn copy(&self, from: u64, to: u64, buf: &mut Vec<u8>) -> Result<()> {
        let to = to.min(self.image.size_bytes);
        let mut at = from;
        while at < to {
            let len = WRITE_BYTES.min(to - at);
            buf.resize(usize::try_from(len).unwrap_or(0), 0);
            self.image.read_at(buf, at)?;
            self.file
                .write_all_at(buf, at)
                .context(|| format!("cannot write {}", self.path.display()))?;
            self.written.fetch_add(len, Ordering::Relaxed);
            at += len;
        }
        Ok(())
    }
}

/// The runs of a leaf that are not zero, joined, as bytes of the leaf.
fn stored_runs(leaf: &Leaf) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for extent in leaf.iter().filter(|extent| extent.source != Source::Zero) {
        let from = u64::from(extent.start) * BLOCK_BYTES_U64;
        let to = u64::from(extent.end()) * BLOCK_BYTES_U64;
        match runs.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            _ => runs.push((from, to)),
        }
    }
    runs
}

fn already(path: &Path, error: std::io::Error) -> Error {
    let taken = error.kind() == std::io::ErrorKind::AlreadyExists;
    let error = Error::io(format!("cannot write {}", path.display()), error);
    if taken { error.into_kind(crate::error::ErrorKind::AlreadyExists) } else { error }
}
