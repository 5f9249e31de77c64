//! The index: is a block with this digest stored, and where?
//!
//! Sorted runs with filters, like an LSM tree that is only ever added to: a commit adds a run for
//! its pack, and runs of like size are merged. The index is derived and may be deleted at any time;
//! what it says is checked against the pack before it is believed, so a damaged, stale or lost run
//! costs deduplication, never data.

mod filter;
mod merge;
mod rebuild;
mod run;

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use dormouse_image::digest::Digest;
use dormouse_image::pack::PackId;
use uuid::Uuid;

pub use run::{IndexHit, IndexRun, RunWriter};

pub(crate) use merge::{MergeScope, for_each_merged};
pub(crate) use rebuild::index_packs;

use crate::disk::Disk;
use crate::error::{Context, Result};
use crate::layout::INDEX;

/// The runs of a store, opened as they are found.
#[derive(Debug)]
pub(crate) struct Index {
    disk: Arc<dyn Disk>,
    filter_bytes: u64,
    /// Sorted by name. Never held over I/O.
    runs: RwLock<Vec<Arc<IndexRun>>>,
}

impl Index {
    pub(crate) fn new(disk: Arc<dyn Disk>, filter_bytes: u64) -> Index {
        Index { disk, filter_bytes, runs: RwLock::new(Vec::new()) }
    }

    /// Opens runs that appeared and drops those that went, keeping the filters of the others.
    /// Returns the paths of runs that are damaged.
    pub(crate) fn refresh(&self) -> Result<Vec<String>> {
        let names = self.paths()?;
        let known = self.runs();
        let mut used: u64 = 0;
        let mut runs = Vec::with_capacity(names.len());
        let mut damaged = Vec::new();
        for name in names {
            let run = match known.iter().find(|run| run.path() == name) {
                Some(run) => Arc::clone(run),
                None => {
                    let room = self.filter_bytes.saturating_sub(used);
                    match IndexRun::open(&*self.disk, &name, room) {
                        Ok(run) => Arc::new(run),
                        // Merged away between the listing and now.
                        Err(error) if error.kind() == crate::error::ErrorKind::NotFound => continue,
                        Err(error) => {
                            tracing::warn!(path = %name, %error, "damaged index run");
                            damaged.push(name);
                            continue;
                        }
                    }
                }
            };
            used += run.resident_bytes();
            runs.push(run);
        }
        *self.runs.write().unwrap_or_else(PoisonError::into_inner) = runs;
        Ok(damaged)
    }

    /// The paths of all runs, sorted.
    fn paths(&self) -> Result<Vec<String>> {
        let entries = match self.disk.list(INDEX) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                return Err(crate::error::Error::io(format!("cannot list {INDEX}"), error));
            }
        };
        let mut names: Vec<String> = entries
            .into_iter()
            .filter(|entry| entry.name.ends_with(".run"))
            .map(|entry| format!("{INDEX}/{}", entry.name))
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    /// The runs as they are now.
    pub(crate) fn runs(&self) -> Vec<Arc<IndexRun>> {
        self.runs.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The packs that the runs cover.
    pub(crate) fn covered(&self) -> HashSet<PackId> {
        self.runs().iter().flat_map(|run| run.packs().to_vec()).collect()
    }

    /// Calls `visit` with every place where a block with this digest may be, newest run first. A
    /// run that cannot be read is stepped over, as its blocks can be stored again.
    pub(crate) fn lookup(runs: &[Arc<IndexRun>], digest: &Digest, visit: &mut dyn FnMut(IndexHit)) {
        for run in runs.iter().rev() {
            if let Err(error) = run.lookup(digest, visit)
                && run.is_first_failure()
            {
                tracing::warn!(path = run.path(), %error, "cannot look into an index run");
            }
        }
    }

    /// A fresh name for a run; later ones sort behind earlier ones.
    pub(crate) fn new_path() -> String {
        format!("{INDEX}/{}.run", Uuid::now_v7())
    }

    /// Publishes a run that was written under `tmp`.
    pub(crate) fn publish(&self, tmp: &str) -> Result<()> {
        let path = Index::new_path();
        self.disk.rename(tmp, &path).context(|| format!("cannot publish {path}"))
    }
}
