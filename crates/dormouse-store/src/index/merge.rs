//! Merging runs, so that a question asks few of them.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use dormouse_image::pack::PackId;

use super::Index;
use super::run::{IndexHit, IndexRun, RunWriter};
use crate::disk::{Disk, LockKind, LockWait};
use crate::error::{Context, Error, Result};
use crate::layout::MERGE_LOCK;
use crate::pin::Pin;

/// Runs of like size that are merged together.
const FAN_IN: usize = 8;

/// What a commit may spend on merging: a million entries are 16 MiB.
const COMMIT_ENTRIES_MAX: u64 = 1 << 20;

/// The largest run that is merged with others: writing it takes 96 MiB for its filter. Beyond it
/// a store has several, each a question more.
const MERGED_ENTRIES_MAX: u64 = 64 << 20;

/// How much to merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MergeScope {
    /// A little, so that a thousand small commits do not leave a thousand runs.
    Tier,

    /// As much as is worth it, forgetting packs that are gone.
    All,
}

impl Index {
    /// Merges runs unless somebody else is at it. With `All`, entries of packs for which `keep` is
    /// false are left out. Returns whether anything was merged.
    pub(crate) fn merge(
        &self,
        pin: &Pin,
        scope: MergeScope,
        keep: &dyn Fn(PackId) -> bool,
    ) -> Result<bool> {
        let lock = self
            .disk
            .lock(MERGE_LOCK, LockKind::Exclusive, LockWait::Try, true)
            .context(|| format!("cannot lock {MERGE_LOCK}"))?;
        let Some(_lock) = lock else { return Ok(false) };
        let mut changed = false;
        loop {
            for path in self.refresh()? {
                // What is in it cannot be known; its packs are no longer covered, and `gc` makes a
                // new run for them.
                self.remove_run(&path)?;
                changed = true;
            }
            let runs = self.runs();
            let chosen = match scope {
                MergeScope::Tier => choose_tier(&runs),
                MergeScope::All => choose_all(runs, keep),
            };
            if chosen.is_empty() {
                return Ok(changed);
            }
            let tmp = pin.tmp_path("merge");
            match write_merged(&*self.disk, &tmp, &chosen, keep) {
                Ok(()) => {
                    self.publish(&tmp)?;
                    chosen.iter().try_for_each(|run| self.remove_run(run.path()))?;
                    self.refresh()?;
                    return Ok(true);
                }
                Err(error) => {
                    let _ = self.disk.remove(&tmp); // it may not have been made
                    let damaged: Vec<_> = chosen.iter().filter(|run| run.is_damaged()).collect();
                    // What cannot be read is as good as damaged: the index can be made again.
                    if damaged.is_empty() {
                        return Err(error);
                    }
                    damaged.iter().try_for_each(|run| self.remove_run(run.path()))?;
                    changed = true;
                }
            }
        }
    }

    fn remove_run(&self, path: &str) -> Result<()> {
        match self.disk.remove(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io(format!("cannot remove {path}"), error))
            }
            _ => Ok(()),
        }
    }
}

impl IndexRun {
    fn is_damaged(&self) -> bool {
        self.for_each(&mut |_, _| Ok(())).is_err()
    }
}

/// All runs if one names a pack that is gone; else those that are not much smaller together than
/// the largest one, so that a collection does not write a large index again for a small commit.
fn choose_all(mut runs: Vec<Arc<IndexRun>>, keep: &dyn Fn(PackId) -> bool) -> Vec<Arc<IndexRun>> {
    let is_stale = |run: &Arc<IndexRun>| run.packs().iter().any(|&pack| !keep(pack));
    runs.sort_by_key(|run| run.entries());
    if let Some(stale) = runs.iter().position(is_stale) {
        // A run over the limit is written again alone, the others with one another.
        let total: u64 = runs.iter().map(|run| run.entries()).sum();
        return if total <= MERGED_ENTRIES_MAX { runs } else { vec![runs.swap_remove(stale)] };
    }
    let mut total: u64 = runs.iter().map(|run| run.entries()).sum();
    while total > MERGED_ENTRIES_MAX
        && let Some(largest) = runs.pop()
    {
        total -= largest.entries();
    }
    if let Some(largest) = runs.last()
        && largest.entries() > total / 8 * 7
        && largest.entries() > COMMIT_ENTRIES_MAX
    {
        runs.pop();
    }
    if runs.len() > 1 { runs } else { Vec::new() }
}

/// The smallest runs of like size, if there are enough of them to be worth it.
fn choose_tier(runs: &[Arc<IndexRun>]) -> Vec<Arc<IndexRun>> {
    let mut by_size = runs.to_vec();
    by_size.sort_by_key(|run| run.entries());
    let mut total = 0;
    let mut chosen = Vec::new();
    for run in by_size {
        let alike = chosen.len() < FAN_IN || run.entries() <= 2 * total / chosen.len() as u64;
        if total + run.entries() > COMMIT_ENTRIES_MAX || !alike {
            break;
        }
        total += run.entries();
        chosen.push(run);
    }
    if chosen.len() >= FAN_IN { chosen } else { Vec::new() }
}

fn write_merged(
    disk: &dyn Disk,
    path: &str,
    runs: &[Arc<IndexRun>],
    keep: &dyn Fn(PackId) -> bool,
) -> Result<()> {
    let packs: HashSet<PackId> =
        runs.iter().flat_map(|run| run.packs().to_vec()).filter(|&pack| keep(pack)).collect();
    let mut packs: Vec<PackId> = packs.into_iter().collect();
    packs.sort_unstable();
    let entries = runs.iter().map(|run| run.entries()).sum();
    let mut writer = RunWriter::create(disk, path, entries, &packs)?;
    for_each_merged(runs, &mut |prefix, hit| {
        if packs.binary_search(&hit.pack).is_ok() { writer.push(prefix, hit) } else { Ok(()) }
    })?;
    writer.finish_durably().map(drop)
}

/// Calls `visit` with the entries of several runs in order, each once.
pub(crate) fn for_each_merged(
    runs: &[Arc<IndexRun>],
    visit: &mut dyn FnMut(u64, IndexHit) -> Result<()>,
) -> Result<()> {
    let mut scans: Vec<_> = runs.iter().map(|run| run.scan()).collect();
    let mut heads = scans.iter_mut().map(|scan| scan.next()).collect::<Result<Vec<_>>>()?;
    let mut last: Option<(u64, IndexHit)> = None;
    loop {
        let least = heads
            .iter()
            .enumerate()
            .filter_map(|(number, head)| head.map(|entry| (entry, number)))
            .min();
        let Some((entry, number)) = least else { return Ok(()) };
        heads[number] = scans[number].next()?;
        if last != Some(entry) {
            visit(entry.0, entry.1)?;
        }
        last = Some(entry);
    }
}
