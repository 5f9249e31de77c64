//! Usage, the packs of a snapshot and differences, against the simplest possible count.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use dormouse_store::commit::{CommitRequest, Parent};
use dormouse_store::disk::Disk;
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};
use dormouse_store::usage::{ImageDiff, Usage};
use dormouse_testkit::sim_disk::SimDisk;

use crate::commit::{blocks, name, store};

fn disk() -> ImageName {
    ImageName::Disk(name("root"))
}

fn commit(store: &Store, snapshot: &str, parent: Parent, content: Vec<u8>) {
    let request = CommitRequest { parent, ..CommitRequest::new(name(snapshot)) };
    store.commit(request.image(disk(), Source::Bytes(content.into())), Job::quiet()).unwrap();
}

fn usage(store: &Store) -> Usage {
    store.usage(Job::quiet()).unwrap()
}

fn diff(store: &Store, old: &str, new: &str) -> Vec<ImageDiff> {
    let open = |snap: &str| store.snapshot(&snap.parse().unwrap()).unwrap();
    store.diff(&open(old), &open(new), Job::quiet()).unwrap()
}

/// A small generator: the tests want numbers that are spread, not random ones.
fn spread(seed: &mut u32, below: u32) -> u32 {
    *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    (*seed >> 8) % below
}

#[test]
fn what_only_one_snapshot_uses_is_its_own() {
    let store = store();
    commit(&store, "vm", Parent::None, blocks(&(1..=160).collect::<Vec<_>>()));
    let alone = usage(&store);
    assert_eq!(alone.snapshots.len(), 1);
    assert_eq!(alone.snapshots[0].shared_bytes, 0);
    assert_eq!(alone.snapshots[0].unique_bytes, alone.live_bytes);
    assert_eq!(alone.reclaimable_bytes, 0);
    assert_eq!((alone.pack_files, alone.snapshots[0].raw_bytes), (1, 160 * 4096));
    assert!(alone.index_bytes > 0 && alone.pack_bytes > 0);

    // The same content under another name has the same map: nothing is anybody's own now.
    commit(&store, "other", Parent::Snapshot("vm@1".parse().unwrap()), {
        blocks(&(1..=160).collect::<Vec<_>>())
    });
    let both = usage(&store);
    assert_eq!(both.live_bytes, alone.live_bytes);
    for snapshot in &both.snapshots {
        assert_eq!((snapshot.unique_bytes, snapshot.shared_bytes), (0, alone.live_bytes));
    }

    // Half of it is replaced; then the first two go, and half of the first pack is dead.
    let half: Vec<u32> = (1..=80).chain(1001..=1080).collect();
    commit(&store, "vm", Parent::Auto, blocks(&half));
    store.remove(&"vm@1".parse().unwrap()).unwrap();
    store.remove(&"other@1".parse().unwrap()).unwrap();
    let rest = usage(&store);
    assert_eq!(rest.snapshots.len(), 1);
    assert_eq!(rest.snapshots[0].unique_bytes, rest.live_bytes);
    assert!(rest.reclaimable_bytes > 0 && rest.reclaimable_bytes < alone.live_bytes);
    store.remove(&"vm@2".parse().unwrap()).unwrap();
    let nothing = usage(&store);
    assert_eq!((nothing.live_bytes, nothing.reclaimable_bytes), (0, nothing.pack_bytes));
}

/// A snapshot that is only open still holds what it needs.
#[test]
fn what_is_pinned_is_not_reclaimable() {
    let store = store();
    commit(&store, "vm", Parent::None, blocks(&[1, 2, 3]));
    let open = store.snapshot(&"vm@1".parse().unwrap()).unwrap();
    store.remove(&"vm@1".parse().unwrap()).unwrap();
    assert_eq!(usage(&store).reclaimable_bytes, 0);
    drop(open);
    assert!(usage(&store).reclaimable_bytes > 0);
}

/// Lineages and forks of random changes: who uses which blocks is counted again from the content.
/// Blocks are unlike each other and do not compress, so stored bytes follow from their number.
#[test]
fn usage_agrees_with_counting_blocks() {
    for seed in 1..=6 {
        let mut seed = seed;
        let store = store();
        let mut contents: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        let mut next = 1;
        for number in 0..24 {
            let from = contents.keys().nth(spread(&mut seed, 24) as usize).cloned();
            let mut content = match &from {
                Some(from) => contents[from].clone(),
                None => vec![0; 64],
            };
            for _ in 0..spread(&mut seed, 30) {
                let at = spread(&mut seed, 64) as usize;
                content[at] = match spread(&mut seed, 4) {
                    0 => 0,
                    1 => content[spread(&mut seed, 64) as usize],
                    _ => {
                        next += 1;
                        next
                    }
                };
            }
            let snapshot = format!("vm{number:02}");
            let parent = match from {
                Some(from) => Parent::Snapshot(from.parse().unwrap()),
                None => Parent::None,
            };
            commit(&store, &snapshot, parent, noise(&content));
            contents.insert(format!("{snapshot}@1"), content);
        }
        for gone in ["vm03@1", "vm11@1", "vm12@1"] {
            store.remove(&gone.parse().unwrap()).unwrap();
            contents.remove(gone);
        }
        let usage = usage(&store);
        let of = |snapshot: &str| -> BTreeSet<u32> {
            contents[snapshot].iter().copied().filter(|&number| number != 0).collect()
        };
        let all: BTreeSet<u32> = contents.keys().flat_map(|snapshot| of(snapshot)).collect();
        assert_near(usage.live_bytes, all.len(), contents.len());
        for row in &usage.snapshots {
            let own = of(&row.snapshot);
            let others: BTreeSet<u32> = contents
                .keys()
                .filter(|other| **other != row.snapshot)
                .flat_map(|other| of(other))
                .collect();
            let unique = own.difference(&others).count();
            assert_near(row.unique_bytes, unique, 1);
            assert_near(row.shared_bytes, own.len() - unique, 1);
        }
    }
}

/// Blocks that do not compress: 4,096 bytes each, and up to 32 for the header of their frame; maps
/// here take up to 500 bytes.
fn assert_near(bytes: u64, blocks: usize, maps: usize) {
    let blocks = blocks as u64;
    let range = blocks * 4096..=blocks * (4096 + 32) + maps as u64 * 500;
    assert!(range.contains(&bytes), "{bytes} is not in {range:?}");
}

/// Removes all index runs, so that the next commit without a parent stores everything again.
pub(crate) fn forget_index(medium: &SimDisk) {
    for path in medium.paths().iter().filter(|path| path.ends_with(".run")) {
        medium.remove(path).unwrap();
    }
}

/// As `blocks`, but nothing compresses.
pub(crate) fn noise(numbers: &[u32]) -> Vec<u8> {
    let mut bytes = blocks(numbers);
    for (block, &number) in bytes.chunks_exact_mut(4096).zip(numbers) {
        let mut state = u64::from(number);
        if number != 0 {
            for word in block.chunks_exact_mut(8) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                word.copy_from_slice(
                    &(state ^ state >> 29).wrapping_mul(0x94d0_49bb_1331_11eb).to_le_bytes(),
                );
            }
        }
    }
    bytes
}

#[test]
fn the_packs_of_a_snapshot_are_told() {
    let store = store();
    commit(&store, "vm", Parent::None, noise(&(1..=32).collect::<Vec<_>>()));
    commit(&store, "vm", Parent::Auto, noise(&(1..=24).chain(101..=108).collect::<Vec<_>>()));
    let packs =
        |snap: &str| store.snapshot(&snap.parse().unwrap()).unwrap().packs(Job::quiet()).unwrap();
    let (first, second) = (packs("vm@1"), packs("vm@2"));
    assert_eq!(first.len(), 1);
    assert_eq!((first[0].slots, first[0].used_slots), (32, 32));
    assert_eq!(first[0].written_by.as_deref(), Some("vm@1"));
    assert_eq!(second.len(), 2);
    let of =
        |writer: &str| second.iter().find(|row| row.written_by.as_deref() == Some(writer)).unwrap();
    assert_eq!((of("vm@1").used_slots, of("vm@2").used_slots), (24, 8));
    assert_eq!(of("vm@1").used_bytes, 24 * (4096 + 2));
    assert!(of("vm@2").file_bytes > 8 * 4096);
    store.remove(&"vm@1".parse().unwrap()).unwrap();
    assert!(packs("vm@2").iter().any(|row| row.written_by.is_none()));
}

#[test]
fn differences_go_by_content() {
    let medium = SimDisk::new(1);
    let store = Store::init_on(Arc::new(medium.clone()), Config::STANDARD).unwrap();
    let state = ImageName::State(name("s"));
    commit(&store, "vm", Parent::None, blocks(&[1, 2, 3, 4, 0, 6]));
    // Stored once more elsewhere: without the index nobody knows that these blocks are there.
    forget_index(&medium);
    commit(&store, "copy", Parent::None, blocks(&[1, 2, 9, 0, 5, 6, 0, 8]));
    let request = CommitRequest::new(name("copy"))
        .image(disk(), Source::Bytes(vec![7; 5000].into()))
        .image(state.clone(), Source::Bytes(b"abc"[..].into()));
    store.commit(request, Job::quiet()).unwrap();

    assert_eq!(store.manifest(&"copy@1".parse().unwrap()).unwrap().figures.elsewhere_bytes, 0);

    let rows = diff(&store, "vm@1", "copy@1");
    assert_eq!(rows.len(), 1);
    let row = &rows[0];
    assert_eq!((row.old_size_bytes, row.new_size_bytes), (Some(6 * 4096), Some(8 * 4096)));
    assert_eq!(row.regions, [(2 * 4096, 3 * 4096), (7 * 4096, 4096)]);
    assert_eq!(row.changed_bytes, 4 * 4096);
    assert_eq!((row.now_zero_bytes, row.was_zero_bytes), (4096, 2 * 4096));

    let rows = diff(&store, "copy@1", "copy@2");
    assert_eq!((rows[0].old_size_bytes, rows[0].new_size_bytes), (Some(8 * 4096), Some(5000)));
    assert_eq!(rows[0].changed_bytes, 6 * 4096, "blocks 3 and 6 were zero");
    assert_eq!(rows[1].image, state);
    assert_eq!((rows[1].old_size_bytes, rows[1].new_size_bytes), (None, Some(3)));
    assert_eq!((rows[1].changed_bytes, &rows[1].regions[..]), (3, &[(0, 3)][..]));
    for row in diff(&store, "copy@2", "copy@2") {
        assert_eq!((row.changed_bytes, row.regions.len()), (0, 0));
    }
}
