//! Who uses how much: per snapshot, per pack, and between two snapshots.

mod diff;
mod tally;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io;

use dormouse_image::pack::PackId;
use serde::Serialize;

use crate::disk::Disk;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::layout::{INDEX, pack_path};
use crate::manifest::{ImageEntry, Manifest};
use crate::name::{ImageName, SnapRef};
use crate::pin::{self, Pinned};
use crate::progress::Job;
use crate::reach::{Reach, pack_bytes};
use crate::store::Store;

use tally::Tally;

pub(crate) use diff::diff;

/// How often the figures are made anew because snapshots were removed and collected meanwhile.
const ATTEMPTS_MAX: usize = 5;

/// What a store holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Bytes of all pack files on the disk.
    pub pack_bytes: u64,

    /// Pack files.
    pub pack_files: u64,

    /// Bytes of the index on the disk.
    pub index_bytes: u64,

    /// Stored bytes that at least one snapshot uses.
    pub live_bytes: u64,

    /// Bytes that `gc` and `compact` would free; 0 while something is damaged, because it is not
    /// known then what is needed.
    pub reclaimable_bytes: u64,

    /// By name, then number.
    pub snapshots: Vec<SnapshotUsage>,

    /// `NAME@N` of snapshots whose manifest or map cannot be read; `verify` tells what is wrong.
    pub damaged: Vec<String>,
}

/// What a snapshot holds, in stored (compressed) bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SnapshotUsage {
    /// `NAME@N`.
    pub snapshot: String,

    /// Length of its images.
    pub raw_bytes: u64,

    /// Stored bytes that no other snapshot uses: what removing it frees.
    pub unique_bytes: u64,

    /// Stored bytes that others use too.
    pub shared_bytes: u64,
}

/// How much of a pack a snapshot uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PackUse {
    /// The pack's id.
    pub pack: String,

    /// What `dormouse:source` tells of it to clients without extended headers: the upper half of
    /// [`PackId::source`](dormouse_image::pack::PackId::source).
    pub source: u32,

    /// The snapshot that wrote it, `NAME@N`, if it is still there.
    pub written_by: Option<String>,

    /// The pack's length in its file.
    pub file_bytes: u64,

    /// Its slots.
    pub slots: u64,

    /// Slots that the snapshot uses.
    pub used_slots: u64,

    /// Stored bytes of those, a frame's bytes shared evenly among its blocks.
    pub used_bytes: u64,

    /// Whether the pack cannot be read; the figures above are 0 then.
    pub is_lost: bool,
}

/// What differs in an image between two snapshots. Past the end of an image, and where a snapshot
/// has no such image, there are zeros; lengths are cut to the longer of the two.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageDiff {
    /// The image.
    pub image: ImageName,

    /// Length in the older snapshot; none if it has no such image.
    pub old_size_bytes: Option<u64>,

    /// Length in the newer snapshot.
    pub new_size_bytes: Option<u64>,

    /// Bytes of blocks whose content differs, by digest.
    pub changed_bytes: u64,

    /// Of those, blocks that are zero now.
    pub now_zero_bytes: u64,

    /// Of those, blocks that were zero before.
    pub was_zero_bytes: u64,

    /// Changed runs, joined: offset and length in bytes.
    pub regions: Vec<(u64, u64)>,
}

/// Who uses how much; see [`Store::usage`].
pub(crate) fn usage(store: &Store, job: Job<'_>) -> Result<Usage> {
    for _ in 1..ATTEMPTS_MAX {
        let usage = usage_once(store, job)?;
        let is_gone = |snap: &String| {
            snap.parse::<SnapRef>().is_ok_and(|snap| {
                store.manifest(&snap).is_err_and(|error| error.kind() == ErrorKind::NotFound)
            })
        };
        if !usage.damaged.iter().any(is_gone) {
            return Ok(usage);
        }
        store.packs().forget_all();
    }
    usage_once(store, job)
}

fn usage_once(store: &Store, job: Job<'_>) -> Result<Usage> {
    let listing = store.list(None)?;
    let total = listing
        .snapshots
        .iter()
        .flat_map(|manifest| &manifest.images)
        .map(|entry| entry.size_bytes)
        .sum();
    job.progress.begin("usage", Some(total));
    let mut usage = Usage::default();
    let mut tally = Tally::new(store.packs());
    for manifest in &listing.snapshots {
        job.check()?;
        let maps = manifest.images.iter().map(ImageEntry::map).collect::<Result<Vec<_>>>()?;
        let raw_bytes = manifest.images.iter().map(|entry| entry.size_bytes).sum();
        let held = tally.snapshot(&maps);
        if held.is_damaged {
            usage.damaged.push(manifest.display_name());
        }
        usage.snapshots.push(SnapshotUsage {
            snapshot: manifest.display_name(),
            raw_bytes,
            unique_bytes: 0,
            shared_bytes: held.bytes,
        });
        job.progress.advance(raw_bytes);
    }
    tally.snapshot(&[]);
    for (snapshot, unique) in usage.snapshots.iter_mut().zip(tally.unique_bytes()) {
        // Both were cut to whole bytes, the sum of all once and the unique ones by themselves.
        snapshot.unique_bytes = unique.min(snapshot.shared_bytes);
        snapshot.shared_bytes -= snapshot.unique_bytes;
    }
    usage.live_bytes = tally.live_bytes();
    // What is pinned is not anybody's, but is not given back either.
    let pinned = read_pins(store.disk().as_ref())?;
    tally.snapshot(&pinned.roots);
    pinned.packs.iter().for_each(|&pack| tally.keep(pack));
    usage.damaged.extend(listing.damaged.into_iter().map(|(snapshot, _)| snapshot));
    let files = PackFiles::list(store)?;
    usage.pack_bytes = files.bytes;
    usage.pack_files = files.files;
    usage.index_bytes = index_bytes(store.disk().as_ref())?;
    if usage.damaged.is_empty() && tally.is_complete() {
        let whole: u64 = files
            .packs
            .iter()
            .filter(|(pack, _)| !tally.contains(**pack))
            .map(|(_, bytes)| bytes)
            .sum();
        usage.reclaimable_bytes = files.shadowed_bytes + whole + tally.dead_bytes();
    }
    Ok(usage)
}

/// The packs that a snapshot uses; see [`crate::store::Snapshot::packs`].
pub(crate) fn packs_of(store: &Store, manifest: &Manifest, job: Job<'_>) -> Result<Vec<PackUse>> {
    job.progress.begin("packs", None);
    let packs = store.packs();
    let mut reach = Reach::new();
    reach.add_manifest(packs, manifest)?;
    let mut writers: HashMap<String, String> = HashMap::new();
    for manifest in store.list(None)?.snapshots {
        if let Some(pack) = &manifest.pack {
            writers.entry(pack.id.clone()).or_insert_with(|| manifest.display_name());
        }
    }
    let mut rows = Vec::new();
    for pack in reach.packs() {
        job.check()?;
        let written_by = writers.get(&pack.to_string()).cloned();
        let lost = PackUse {
            pack: pack.to_string(),
            source: u32::try_from(pack.source() >> 32).unwrap_or(0),
            written_by,
            file_bytes: 0,
            slots: 0,
            used_slots: 0,
            used_bytes: 0,
            is_lost: true,
        };
        rows.push(match reach.get(pack) {
            None => lost,
            Some(live) => {
                let cannot = || format!("cannot read pack {pack}");
                PackUse {
                    file_bytes: packs.place(pack).context(cannot)?.bytes,
                    slots: u64::from(packs.reader(pack).context(cannot)?.toc().slots),
                    used_slots: live.slots(),
                    used_bytes: pack_bytes(packs, pack, live).context(cannot)?.live_frames,
                    is_lost: false,
                    ..lost
                }
            }
        });
    }
    Ok(rows)
}

/// The files that packs lie in.
#[derive(Default)]
struct PackFiles {
    files: u64,
    bytes: u64,
    /// What each pack takes, where it is read from.
    packs: BTreeMap<PackId, u64>,
    /// Packs in bundles that also have a file of their own, or lie in a later bundle.
    shadowed_bytes: u64,
}

impl PackFiles {
    fn list(store: &Store) -> Result<PackFiles> {
        let (packs, bundles) = store.packs().list().context(|| "cannot list packs".to_owned())?;
        let mut found = PackFiles::default();
        for pack in packs {
            if let Some(bytes) = allocated(store.disk().as_ref(), &pack_path(pack))? {
                found.files += 1;
                found.bytes += bytes;
                found.packs.insert(pack, bytes);
            }
        }
        // The newest bundle that has a pack is the one that it is read from.
        for path in bundles.into_iter().rev() {
            let Some(bytes) = allocated(store.disk().as_ref(), &path)? else { continue };
            found.files += 1;
            found.bytes += bytes;
            // A damaged bundle is for `verify` to tell of; what it holds is not ours to count.
            let Ok(bundle) = store.packs().bundle(&path) else { continue };
            for entry in bundle.entries {
                match found.packs.entry(entry.pack) {
                    Entry::Occupied(_) => found.shadowed_bytes += entry.bytes,
                    Entry::Vacant(vacant) => {
                        vacant.insert(entry.bytes);
                    }
                }
            }
        }
        Ok(found)
    }
}

/// Bytes of index runs on the disk.
fn index_bytes(disk: &dyn Disk) -> Result<u64> {
    let entries = match disk.list(INDEX) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Error::io(format!("cannot list {INDEX}"), error)),
    };
    let mut sum = 0;
    for entry in entries.iter().filter(|entry| entry.name.ends_with(".run")) {
        sum += allocated(disk, &format!("{INDEX}/{}", entry.name))?.unwrap_or(0);
    }
    Ok(sum)
}

/// What a file takes on the disk; none if it went away since it was listed.
fn allocated(disk: &dyn Disk, path: &str) -> Result<Option<u64>> {
    match disk.allocated_bytes(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("cannot look at {path}"), error)),
    }
}

fn read_pins(disk: &dyn Disk) -> Result<Pinned> {
    match pin::read_pins(disk, false) {
        Ok((pinned, _, _)) => Ok(pinned),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Pinned::default()),
        Err(error) => Err(error),
    }
}
