//! The collection: mark what manifests and pins reach, delete the rest.
//!
//! The long part, marking, is done without a lock. Then, with `gc.lock` held exclusively so that
//! nobody can pin, what appeared meanwhile is marked too, and what is unmarked is deleted.

use std::collections::HashSet;
use std::io;

use dormouse_image::error::ErrorKind as ImageErrorKind;
use dormouse_image::map::Map;
use dormouse_image::pack::PackId;
use uuid::Uuid;

use super::{GcOptions, GcReport};
use crate::disk::{DiskLock, LockKind, LockWait};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::index::MergeScope;
use crate::layout::{GC_LOCK, PACKS, TMP, pack_path};
use crate::manifest::Manifest;
use crate::name::SnapRef;
use crate::pin::{Pin, Pinned, read_pins};
use crate::progress::Job;
use crate::reach::Reach;
use crate::store::Store;
use crate::trace;

/// What is referred to, by manifests that were seen and by pins.
pub(super) struct Marks {
    pub(super) reach: Reach,
    /// Packs that somebody holds whole.
    pub(super) whole: HashSet<PackId>,
    seen: HashSet<Uuid>,
}

impl Marks {
    pub(super) fn new() -> Marks {
        Marks { reach: Reach::new(), whole: HashSet::new(), seen: HashSet::new() }
    }

    /// Marks all snapshots that were not seen yet. A manifest that cannot be read may refer to
    /// anything, so then nothing may be deleted.
    pub(super) fn add_snapshots(&mut self, store: &Store, job: Job<'_>) -> Result<Vec<Manifest>> {
        let listing = store.list(None)?;
        if let Some((name, error)) = listing.damaged.into_iter().next() {
            return Err(Error::with_source(
                ErrorKind::Corrupt,
                format!(
                    "{name} cannot be read, so nobody knows what it needs; `dormouse rm {name}` gives \
                     it up, or put its manifest back"
                ),
                error,
            ));
        }
        for manifest in &listing.snapshots {
            job.check()?;
            if self.seen.insert(manifest.uuid) {
                let marked = manifest.images.iter().try_for_each(|entry| {
                    self.add_map(store, &entry.map()?, &manifest.display_name())
                });
                match marked {
                    // Removed since it was listed, and its packs with it.
                    Err(_) if is_removed(store, manifest)? => {}
                    marked => marked?,
                }
            }
        }
        Ok(listing.snapshots)
    }

    pub(super) fn add_pins(&mut self, store: &Store, pinned: &Pinned) -> Result<()> {
        self.whole.extend(&pinned.packs);
        for map in &pinned.roots {
            self.add_map(store, map, "a pinned snapshot")?;
        }
        Ok(())
    }

    pub(super) fn is_live(&self, pack: PackId) -> bool {
        self.whole.contains(&pack) || self.reach.contains(pack)
    }

    fn add_map(&mut self, store: &Store, map: &Map, owner: &str) -> Result<()> {
        self.reach.add_map(store.packs(), map).map_err(|error| {
            Error::with_source(error.kind(), format!("cannot walk {owner}"), error)
        })
    }
}

fn is_removed(store: &Store, manifest: &Manifest) -> Result<bool> {
    let snap = SnapRef { name: manifest.name.clone(), number: Some(manifest.number) };
    match store.manifest(&snap) {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

/// Takes `gc.lock` exclusively: from now on nobody pins.
pub(super) fn lock_out_pins(store: &Store) -> Result<Box<dyn DiskLock>> {
    store
        .disk()
        .lock(GC_LOCK, LockKind::Exclusive, LockWait::Wait, true)
        .context(|| format!("cannot lock {GC_LOCK}"))?
        .ok_or_else(|| Error::new(ErrorKind::Busy, format!("{GC_LOCK} is taken")))
}

/// Deletes what nothing refers to; see [`Store::gc`].
pub(crate) fn gc(store: &Store, options: &GcOptions, job: Job<'_>) -> Result<GcReport> {
    let pin = Pin::new(store.disk(), "gc")?;
    let mut marks = Marks::new();
    let mut report = GcReport::default();
    job.progress.begin("mark", None);
    if let Err(error) = marks.add_snapshots(store, job) {
        job.check()?;
        // It may have been removed and collected while it was walked. What was marked by half says
        // nothing, so all is marked again under the lock.
        tracing::debug!(%error, "marking anew");
        marks = Marks::new();
    }
    {
        let _lock = lock_out_pins(store)?;
        // A temporary file's pin is older than the file: list the files first. A commit lets go of
        // its pin after it published, without a lock: read pins before manifests, so that it is seen
        // in one or the other.
        let temporary = list_or_nothing(store, TMP)?;
        let (pinned, living, swept) = read_pins(&**store.disk(), !options.dry_run)?;
        marks.add_pins(store, &pinned)?;
        let there = marks.add_snapshots(store, job)?.iter().map(|manifest| manifest.uuid).collect();
        report.swept += swept;
        report.swept += trace::sweep(&**store.disk(), &there, options.dry_run)?;
        job.progress.begin("delete", None);
        delete_packs(store, &marks, options, &mut report)?;
        for file in temporary {
            let owner = file.split('.').next().unwrap_or("");
            if !living.contains(owner) {
                report.swept += 1;
                if !options.dry_run {
                    remove(store, &format!("{TMP}/{file}"))?;
                }
            }
        }
    }
    report.dead_bytes = dead_bytes(store, &marks);
    store.index().refresh()?;
    report.index_runs_before = store.index().runs().len() as u64;
    if !options.dry_run {
        job.progress.begin("index", None);
        let (own, bundles) = store.packs().list().context(|| format!("cannot list {PACKS}"))?;
        let mut there: HashSet<PackId> = own.into_iter().collect();
        for path in &bundles {
            match store.packs().bundle(path) {
                Ok(bundle) => there.extend(bundle.entries.iter().map(|entry| entry.pack)),
                // Compacted away since it was listed.
                Err(error) if error.kind() == ImageErrorKind::Missing => {}
                Err(error) => return Err(Error::image(format!("cannot read {path}"), error)),
            }
        }
        store.index().merge(&pin, MergeScope::All, &|pack| {
            // One that a commit put there since the listing is kept, too.
            there.contains(&pack) || store.packs().exists(pack)
        })?;
        let covered = store.index().covered();
        let mut missing: Vec<PackId> = there.difference(&covered).copied().collect();
        missing.sort_unstable();
        if !missing.is_empty() {
            crate::index::index_packs(store, &pin, &missing, job)?;
        }
    }
    report.index_runs_after = store.index().runs().len() as u64;
    Ok(report)
}

/// Deletes the files of packs that are not live, and bundles of which no pack is read.
fn delete_packs(
    store: &Store,
    marks: &Marks,
    options: &GcOptions,
    report: &mut GcReport,
) -> Result<()> {
    let packs = store.packs();
    let (own, bundles) = packs.list().context(|| format!("cannot list {PACKS}"))?;
    let own: HashSet<PackId> = own.into_iter().collect();
    let mut live: HashSet<PackId> = HashSet::new();
    let mut doomed: Vec<(String, Vec<PackId>)> = Vec::new();
    for &pack in &own {
        if marks.is_live(pack) {
            live.insert(pack);
        } else {
            doomed.push((pack_path(pack), vec![pack]));
        }
    }
    // The newest bundle that has a pack is the one that is read; see `Packs::place`.
    for path in bundles.iter().rev() {
        let bundle = packs.bundle(path).context(|| format!("cannot read {path}"))?;
        let ids: Vec<PackId> = bundle.entries.iter().map(|entry| entry.pack).collect();
        let used = ids.iter().any(|&pack| marks.is_live(pack) && !live.contains(&pack));
        if used {
            live.extend(ids.iter().filter(|&&pack| marks.is_live(pack)));
        } else {
            doomed.push((path.clone(), ids));
        }
    }
    report.live_packs = live.len() as u64;
    for (path, ids) in doomed {
        report.deleted_files += 1;
        report.deleted_bytes +=
            store.disk().allocated_bytes(&path).context(|| format!("cannot look at {path}"))?;
        if !options.dry_run {
            remove(store, &path)?;
            ids.into_iter().for_each(|pack| packs.forget(pack));
        }
    }
    Ok(())
}

/// Bytes of live packs that belong to slots and nodes which nothing refers to.
fn dead_bytes(store: &Store, marks: &Marks) -> u64 {
    let mut dead = 0;
    for pack in marks.reach.packs().filter(|pack| !marks.whole.contains(pack)) {
        // A pack that cannot be read is `verify`'s business, one that is gone by now nobody's.
        if marks.reach.get(pack).is_some()
            && let Ok(bytes) = marks.reach.bytes(store.packs(), pack)
        {
            dead += bytes.dead;
        }
    }
    dead
}

fn remove(store: &Store, path: &str) -> Result<()> {
    match store.disk().remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove {path}"), error))
        }
        _ => Ok(()),
    }
}

fn list_or_nothing(store: &Store, folder: &str) -> Result<Vec<String>> {
    match store.disk().list(folder) {
        Ok(entries) => Ok(entries.into_iter().map(|entry| entry.name).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(Error::io(format!("cannot list {folder}"), error)),
    }
}
