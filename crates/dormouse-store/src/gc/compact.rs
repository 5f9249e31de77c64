//! Compaction: packs written again without what nothing refers to, small ones together.
//!
//! No map and no manifest changes, because a pack keeps its id. New files are written without a
//! lock; then, with `gc.lock` held exclusively, what is live is asked again. If something became
//! live meanwhile that was left out, the new file is given up. A pack is read from a file of its
//! own if there is one, else from the newest bundle that has it; compaction writes bundles only,
//! so a file of its own always holds at least what a bundle does.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, BufWriter};

use dormouse_image::codec::Codec;
use dormouse_image::pack::{
    BundleEntry, FinishedPack, Live, PackId, rewrite_pack, write_bundle_end,
};
use uuid::Uuid;

use super::collect::{Marks, lock_out_pins};
use super::{CompactOptions, CompactReport};
use crate::disk::{DiskSink, DiskWriter, LockKind, LockWait};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::layout::{BUNDLES, COMPACT_LOCK, PACKS, pack_path};
use crate::pin::{Pin, read_pins};
use crate::progress::Job;
use crate::store::Store;

/// Packs in one bundle; far under the limit of the format.
const BUNDLE_PACKS_MAX: usize = 100_000;

/// Bytes gathered before they are written.
const WRITE_BUFFER_BYTES: usize = 1 << 20;

/// A file with packs, as they are read.
struct PackFile {
    path: String,
    bytes: u64,
    /// The packs that are read from this file, and how many of their bytes are live.
    packs: Vec<(PackId, u64)>,
    /// Packs that it has, too, but that are read from another file.
    shadowed: Vec<PackId>,
}

/// What was written of a pack.
struct Kept {
    live: Live,
    /// That of the writing which was read.
    salt: u32,
}

/// Writes files again that are mostly dead, or too many and too small; see [`Store::compact`].
pub(crate) fn compact(
    store: &Store,
    options: &CompactOptions,
    job: Job<'_>,
) -> Result<CompactReport> {
    let _lock = store
        .disk()
        .lock(COMPACT_LOCK, LockKind::Exclusive, LockWait::Try, true)
        .context(|| format!("cannot lock {COMPACT_LOCK}"))?
        .ok_or_else(|| Error::new(ErrorKind::Busy, "another compaction is under way"))?;
    store.packs().key().context(|| "cannot compact".to_owned())?;
    let pin = Pin::new(store.disk(), "compact")?;
    let mut marks = Marks::new();
    job.progress.begin("mark", None);
    // Packs may have been moved and grown since they were opened here.
    store.packs().forget_all();
    let snapshots = marks.add_snapshots(store, job)?;
    let (pinned, _, _) = {
        // Nobody is in the middle of a line then.
        let _lock = lock_out_pins(store)?;
        read_pins(&**store.disk(), false)?
    };
    marks.add_pins(store, &pinned)?;
    let order: HashMap<PackId, usize> = snapshots
        .iter()
        .enumerate()
        .filter_map(|(at, manifest)| Some((PackId::parse(&manifest.pack.as_ref()?.id)?, at)))
        .collect();
    let files = read_files(store, &marks)?;
    let mut report = CompactReport {
        files_before: files.len() as u64,
        bytes_before: files.iter().map(|file| file.bytes).sum(),
        ..CompactReport::default()
    };
    let chosen = choose(files, options);
    let total = chosen.iter().map(|file| file.bytes).sum();
    job.progress.begin("compact", Some(total));
    for group in group(chosen, &order, options) {
        job.check()?;
        report.rewritten_packs += group.iter().map(|file| file.packs.len() as u64).sum::<u64>();
        if !options.dry_run {
            compact_group(store, &pin, &marks, &group, job)?;
        }
    }
    let after = read_files(store, &marks)?;
    report.files_after = after.len() as u64;
    report.bytes_after = after.iter().map(|file| file.bytes).sum();
    Ok(report)
}

/// All pack files, with the live part of the packs that are read from each.
fn read_files(store: &Store, marks: &Marks) -> Result<Vec<PackFile>> {
    let packs = store.packs();
    let (own, bundles) = packs.list().context(|| format!("cannot list {PACKS}"))?;
    let mut read: HashSet<PackId> = HashSet::new();
    let mut files = Vec::new();
    let live_bytes = |pack: PackId, bytes: u64| -> Result<u64> {
        // A pack that cannot be opened counts as live: its file is left alone.
        if marks.whole.contains(&pack) {
            return Ok(bytes);
        }
        if !marks.reach.contains(pack) {
            return Ok(0);
        }
        if marks.reach.get(pack).is_none() {
            return Ok(bytes);
        }
        Ok(bytes.saturating_sub(marks.reach.bytes(packs, pack)?.dead))
    };
    // None if a collection deleted it since it was listed.
    let size = |path: &str| match store.disk().open(path) {
        Ok(file) => Ok(Some(file.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("cannot open {path}"), error)),
    };
    for pack in own {
        let path = pack_path(pack);
        let Some(bytes) = size(&path)? else { continue };
        read.insert(pack);
        let packs = vec![(pack, live_bytes(pack, bytes)?)];
        files.push(PackFile { path, bytes, packs, shadowed: Vec::new() });
    }
    for path in bundles.into_iter().rev() {
        let Some(bytes) = size(&path)? else { continue };
        let bundle = packs.bundle(&path).context(|| format!("cannot read {path}"))?;
        let mut here = Vec::new();
        let mut shadowed = Vec::new();
        for entry in bundle.entries {
            if read.insert(entry.pack) {
                here.push((entry.pack, live_bytes(entry.pack, entry.bytes)?));
            } else {
                shadowed.push(entry.pack);
            }
        }
        files.push(PackFile { bytes, path, packs: here, shadowed });
    }
    Ok(files)
}

/// The files worth writing again: those with too much dead in them, and small ones if there are
/// at least two.
fn choose(files: Vec<PackFile>, options: &CompactOptions) -> Vec<PackFile> {
    let is_dead = |file: &PackFile| {
        let live: u64 = file.packs.iter().map(|(_, bytes)| bytes).sum();
        let dead = file.bytes.saturating_sub(live);
        // Ratios of file lengths need no more than a float's precision.
        dead > 0 && dead as f64 >= options.dead_ratio * file.bytes as f64
    };
    let is_small = |file: &PackFile| file.bytes < options.small_bytes;
    let small = files.iter().filter(|file| is_small(file) || is_dead(file)).count();
    files.into_iter().filter(|file| is_dead(file) || (small > 1 && is_small(file))).collect()
}

/// Gathers files, oldest snapshots first, so that what was written together is read together.
fn group(
    mut files: Vec<PackFile>,
    order: &HashMap<PackId, usize>,
    options: &CompactOptions,
) -> Vec<Vec<PackFile>> {
    files.sort_by_key(|file| {
        let first = file.packs.iter().filter_map(|(pack, _)| order.get(pack)).min();
        (first.copied().unwrap_or(usize::MAX), file.path.clone())
    });
    let mut groups: Vec<Vec<PackFile>> = Vec::new();
    let (mut bytes, mut packs) = (0, 0);
    for file in files {
        let live: u64 = file.packs.iter().map(|(_, bytes)| bytes).sum();
        let fits = bytes + live <= options.bundle_bytes
            && packs + file.packs.len() <= BUNDLE_PACKS_MAX
            && !groups.is_empty();
        if !fits {
            groups.push(Vec::new());
            (bytes, packs) = (0, 0);
        }
        bytes += live;
        packs += file.packs.len();
        if let Some(group) = groups.last_mut() {
            group.push(file);
        }
    }
    groups
}

/// Writes one bundle for the packs of `group` and deletes their files.
fn compact_group(
    store: &Store,
    pin: &Pin,
    marks: &Marks,
    group: &[PackFile],
    job: Job<'_>,
) -> Result<()> {
    let tmp = pin.tmp_path("bundle");
    let done = write_bundle(store, marks, group, &tmp, job).and_then(|written| match written {
        None => Ok(()),
        Some(mut bundle) => {
            if let Some(file) = &mut bundle.file {
                file.sync().context(|| format!("cannot sync {tmp}"))?;
            }
            replace(store, marks, group, &bundle, &tmp)
        }
    });
    match store.disk().remove(&tmp) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::debug!(tmp, %error, "temporary file left for gc");
        }
        _ => {}
    }
    done
}

/// A bundle that has no name yet.
struct NewBundle {
    /// What was kept of each pack.
    kept: BTreeMap<PackId, Kept>,

    /// The file, unless nothing was live.
    file: Option<Box<dyn DiskWriter>>,
}

/// Writes the live packs of `group` into `path`; `None` if one of them was collected meanwhile, so
/// that the group is no longer what it was.
fn write_bundle(
    store: &Store,
    marks: &Marks,
    group: &[PackFile],
    path: &str,
    job: Job<'_>,
) -> Result<Option<NewBundle>> {
    let packs = store.packs();
    let file = store.disk().create(path).context(|| format!("cannot make {path}"))?;
    let mut sink = BufWriter::with_capacity(WRITE_BUFFER_BYTES, DiskSink(file));
    let mut kept = BTreeMap::new();
    let mut entries: Vec<BundleEntry> = Vec::new();
    let mut offset = 0;
    for file in group {
        for &(pack, _) in file.packs.iter().filter(|(pack, _)| marks.is_live(*pack)) {
            job.check()?;
            let (one, finished, back) = match rewrite(store, marks, pack, sink) {
                Ok(rewritten) => rewritten,
                Err(_) if !packs.exists(pack) => {
                    tracing::info!(%pack, "was collected while it was compacted");
                    return Ok(None);
                }
                Err(error) => return Err(error),
            };
            sink = back;
            entries.push(BundleEntry { pack, offset, bytes: finished.bytes });
            offset += finished.bytes;
            kept.insert(pack, one);
        }
        job.progress.advance(file.bytes);
    }
    if entries.is_empty() {
        return Ok(Some(NewBundle { kept, file: None }));
    }
    let cannot = || format!("cannot write {path}");
    write_bundle_end(&mut sink, &entries, offset).context(cannot)?;
    let file = sink.into_inner().map_err(|error| Error::io(cannot(), error.into_error()))?.0;
    Ok(Some(NewBundle { kept, file: Some(file) }))
}

/// Writes what is live of one pack to the end of the bundle.
fn rewrite(
    store: &Store,
    marks: &Marks,
    pack: PackId,
    sink: BufWriter<DiskSink>,
) -> Result<(Kept, FinishedPack, BufWriter<DiskSink>)> {
    let packs = store.packs();
    let key = packs.key().context(|| "cannot compact".to_owned())?;
    let reader = packs.reader(pack).context(|| format!("cannot open pack {pack}"))?;
    let live = match marks.reach.get(pack) {
        Some(live) if !marks.whole.contains(&pack) => live.clone(),
        // Somebody holds it whole; what an earlier compaction dropped is gone already.
        _ => Live::present(&reader).context(|| format!("cannot read pack {pack}"))?,
    };
    let salt = Uuid::new_v4().as_fields().0;
    let (finished, sink) =
        rewrite_pack(&reader, &live, key, Codec::DEFAULT, salt, sink).context(|| {
            format!("cannot write pack {pack} again; `dormouse verify --deep` tells more")
        })?;
    Ok((Kept { live, salt: reader.params().salt }, finished, sink))
}

/// Puts the new bundle in the place of the old files, unless something became live meanwhile that
/// it does not have.
fn replace(
    store: &Store,
    marks: &Marks,
    group: &[PackFile],
    bundle: &NewBundle,
    tmp: &str,
) -> Result<()> {
    let disk = store.disk();
    let _lock = lock_out_pins(store)?;
    let mut now = Marks::new();
    // Pins before manifests, as a collection reads them.
    let (pinned, _, _) = read_pins(&**disk, false)?;
    now.add_pins(store, &pinned)?;
    now.add_snapshots(store, Job::quiet())?;
    for file in group {
        let lost =
            file.packs.iter().map(|(pack, _)| *pack).find(|&pack| match bundle.kept.get(&pack) {
                None => now.is_live(pack),
                Some(kept) => {
                    let held = now.whole.contains(&pack) && !marks.whole.contains(&pack);
                    // One that cannot be opened now may have grown, too.
                    let has_grown = now.reach.contains(pack)
                        && now.reach.get(pack).is_none_or(|live| !live.is_subset(&kept.live));
                    held || has_grown || is_another(store, file, pack, kept)
                }
            });
        // The file from which it was read may be gone.
        let lost = lost.or_else(|| {
            let needs = |&&pack: &&PackId| now.is_live(pack) && is_read_from(store, file, pack);
            file.shadowed.iter().find(needs).copied()
        });
        if let Some(pack) = lost {
            tracing::info!(%pack, "came to life while it was compacted; left as it is");
            return Ok(());
        }
    }
    if bundle.file.is_some() {
        let path = next_bundle_path(store)?;
        disk.rename(tmp, &path)
            .and_then(|()| disk.sync_dir(BUNDLES))
            .context(|| format!("cannot put {path} in place"))?;
    }
    for file in group {
        match disk.remove(&file.path) {
            // What is dead may have been collected meanwhile.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(format!("cannot remove {}", file.path), error));
            }
            _ => {}
        }
        file.packs.iter().for_each(|(pack, _)| store.packs().forget(*pack));
    }
    Ok(())
}

/// Whether a pack's own file is no longer the one that was read: a commit of the same content puts
/// a whole one in the place of one that may have lost slots.
fn is_another(store: &Store, file: &PackFile, pack: PackId, kept: &Kept) -> bool {
    file.path == pack_path(pack)
        && store.packs().open_afresh(pack).map_or(true, |now| now.params().salt != kept.salt)
}

/// Whether a pack is read from this file now, or cannot be found.
fn is_read_from(store: &Store, file: &PackFile, pack: PackId) -> bool {
    store.packs().forget(pack);
    store.packs().place(pack).map_or(true, |place| place.path == file.path)
}

/// A name behind those of all bundles, whatever the clock says: a pack is read from the last one.
fn next_bundle_path(store: &Store) -> Result<String> {
    let entries = store.disk().list(BUNDLES).context(|| format!("cannot list {BUNDLES}"))?;
    let last = entries
        .iter()
        .filter_map(|entry| Uuid::parse_str(entry.name.strip_suffix(".bundle")?).ok())
        .max();
    let now = Uuid::now_v7();
    let id = last.map_or(now, |last| now.max(Uuid::from_u128(last.as_u128().saturating_add(1))));
    Ok(format!("{BUNDLES}/{id}.bundle"))
}
