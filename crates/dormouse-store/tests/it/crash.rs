//! Power cuts at every write and sync of an init, a commit, a removal, a collection and a
//! compaction, on a disk that loses, tears and reorders whatever was not synced.
//!
//! Afterwards every snapshot that is listed restores bit for bit, nothing listed is broken, every
//! snapshot that was published before is there, and the store goes on working.

use std::sync::Arc;

use dormouse_store::commit::CommitRequest;
use dormouse_store::error::ErrorKind;
use dormouse_store::gc::GcOptions;
use dormouse_store::name::SnapRef;
use dormouse_store::progress::Job;
use dormouse_store::store::Store;
use dormouse_testkit::sim_disk::{LastStep, SimDisk, Survive};

use crate::commit::name;
use crate::model::{EAGER, Images, Model, check_snapshot, small_config};

/// A store with a history: commits, removals, garbage, packs in bundles and of their own.
fn with_history(seed: u64) -> (SimDisk, Model) {
    let disk = SimDisk::new(seed);
    let store = Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
    let mut model = Model::new(seed);
    for step in 0..14 {
        let (request, images) = model.commit();
        let name = request.name.clone();
        let report = store.commit(request, Job::quiet()).unwrap();
        model.committed(name, report.manifest.number, images);
        if step == 6 {
            store.compact(&EAGER, Job::quiet()).unwrap();
        }
        if step % 3 == 2 {
            let (name, number) = model.snapshots.keys().next().cloned().unwrap();
            store.remove(&SnapRef { name: name.clone(), number: Some(number) }).unwrap();
            model.snapshots.remove(&(name, number));
        }
    }
    (disk, model)
}

/// The states of the medium that are tried for each cut.
fn survivals(cut: u64) -> [Survive; 5] {
    let seed = cut * 7919;
    [
        Survive::Nothing,
        Survive::Everything,
        Survive::Random(seed),
        Survive::Random(seed + 1),
        Survive::Random(seed + 2),
    ]
}

/// Runs `operate` again and again on copies of `disk`, with the power cut at each operation in turn,
/// and `check` on what is left. Returns how many cuts there were.
pub(crate) fn cut_everywhere(
    disk: &SimDisk,
    operate: &dyn Fn(&SimDisk),
    check: &dyn Fn(SimDisk, &str),
) -> u64 {
    for cut in 0.. {
        let mut went_through = false;
        for last in [LastStep::Undone, LastStep::Torn, LastStep::Done] {
            let running = disk.after_power_cut(Survive::Everything);
            running.cut_after_with(cut + 1, last);
            operate(&running);
            went_through = !running.is_off();
            for survive in survivals(cut) {
                let what = format!("cut at {cut}, {last:?}, {survive:?}");
                check(running.after_power_cut(survive), &what);
            }
            if went_through {
                break;
            }
        }
        if went_through {
            return cut;
        }
    }
    unreachable!("the operation ends")
}

/// Checks what is left, knowing what must be there and what may be.
fn check_left(
    disk: SimDisk,
    what: &str,
    must: &Model,
    may: Option<(&dormouse_store::name::Name, u64, &Images)>,
) {
    let store = Store::open_on(Arc::new(disk.clone()), small_config())
        .unwrap_or_else(|error| panic!("{what}: {error}: {:?}", std::error::Error::source(&error)));
    let listing = store.list(None).unwrap();
    assert!(listing.damaged.is_empty(), "{what}: {:?}", listing.damaged);
    let mut found = 0;
    for manifest in &listing.snapshots {
        let key = (manifest.name.clone(), manifest.number);
        match (must.snapshots.get(&key), may) {
            (Some(images), _) => {
                found += 1;
                check_snapshot(&store, &key.0, key.1, images);
            }
            (None, Some((name, number, images))) if key == (name.clone(), number) => {
                check_snapshot(&store, name, number, images);
            }
            _ => panic!("{what}: {}@{} came out of nowhere", key.0, key.1),
        }
    }
    assert_eq!(found, must.snapshots.len(), "{what}: a snapshot is lost");
    // And the house still stands: it collects, compacts, commits and reads.
    store.gc(&GcOptions::default(), Job::quiet()).unwrap();
    let request = CommitRequest::new(name("after")).image(
        "root".parse().unwrap(),
        dormouse_store::source::Source::Bytes(vec![5; 9000].into()),
    );
    let report = store.commit(request, Job::quiet()).unwrap();
    store.compact(&EAGER, Job::quiet()).unwrap();
    let listing = store.list(None).unwrap();
    assert!(listing.snapshots.iter().any(|m| m.uuid == report.manifest.uuid));
    for ((name, number), images) in &must.snapshots {
        check_snapshot(&store, name, *number, images);
    }
    let strays: Vec<_> = disk.paths().into_iter().filter(|path| path.starts_with("tmp/")).collect();
    assert!(strays.is_empty(), "{what}: {strays:?}");
}

#[test]
fn a_power_cut_during_a_commit() {
    for seed in [1, 2] {
        let (disk, mut model) = with_history(seed);
        let snapshots = model.snapshots.clone();
        let chance_before = model.chance.clone();
        let (request, images) = model.commit();
        let name = request.name.clone();
        drop(request);
        let number = {
            let copy = disk.after_power_cut(Survive::Everything);
            let store = Store::open_on(Arc::new(copy), small_config()).unwrap();
            let (request, _) = replay(&snapshots, &chance_before);
            store.commit(request, Job::quiet()).unwrap().manifest.number
        };
        let cuts = cut_everywhere(
            &disk,
            &|disk| {
                let (request, _) = replay(&snapshots, &chance_before);
                if let Ok(store) = Store::open_on(Arc::new(disk.clone()), small_config()) {
                    let committed = store.commit(request, Job::quiet());
                    if disk.is_off() {
                        return;
                    }
                    committed.unwrap();
                }
            },
            &|disk, what| check_left(disk, what, &model, Some((&name, number, &images))),
        );
        assert!(cuts > 15, "{cuts} cuts are too few to be a commit");
    }
}

/// The same commit again: requests cannot be cloned, chance can.
fn replay(
    snapshots: &std::collections::BTreeMap<(dormouse_store::name::Name, u64), Images>,
    chance: &crate::model::Chance,
) -> (CommitRequest, Images) {
    let mut model = Model::new(0);
    model.snapshots = snapshots.clone();
    model.chance = chance.clone();
    model.commit()
}

/// A commit whose success was reported is there, however little of the rest survives.
#[test]
fn what_was_reported_durable_is_durable() {
    for seed in 0..20 {
        let disk = SimDisk::new(seed);
        let store = Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
        let mut model = Model::new(seed);
        for _ in 0..4 {
            let (request, images) = model.commit();
            let name = request.name.clone();
            let report = store.commit(request, Job::quiet()).unwrap();
            model.committed(name, report.manifest.number, images);
            for survive in survivals(seed) {
                check_left(disk.after_power_cut(survive), "after a commit", &model, None);
            }
        }
    }
}

#[test]
fn a_power_cut_during_a_collection() {
    let (disk, model) = with_history(3);
    let cuts = cut_everywhere(
        &disk,
        &|disk| {
            let Ok(store) = Store::open_on(Arc::new(disk.clone()), small_config()) else { return };
            let collected = store.gc(&GcOptions::default(), Job::quiet());
            assert!(disk.is_off() || collected.is_ok(), "{collected:?}");
        },
        &|disk, what| check_left(disk, what, &model, None),
    );
    assert!(cuts > 5, "{cuts} cuts are too few to be a collection");
}

#[test]
fn a_power_cut_during_a_compaction() {
    let (disk, model) = with_history(4);
    let cuts = cut_everywhere(
        &disk,
        &|disk| {
            let Ok(store) = Store::open_on(Arc::new(disk.clone()), small_config()) else { return };
            let compacted = store.compact(&EAGER, Job::quiet());
            assert!(disk.is_off() || compacted.is_ok(), "{compacted:?}");
        },
        &|disk, what| check_left(disk, what, &model, None),
    );
    assert!(cuts > 10, "{cuts} cuts are too few to be a compaction");
}

/// A removal either happened or did not, and the number is not given out again either way.
#[test]
fn a_power_cut_during_a_removal() {
    let (disk, mut model) = with_history(5);
    let (name, number) = model.snapshots.keys().next_back().cloned().unwrap();
    let snap = SnapRef { name: name.clone(), number: Some(number) };
    let images = model.snapshots.remove(&(name.clone(), number)).unwrap();
    cut_everywhere(
        &disk,
        &|disk| {
            let Ok(store) = Store::open_on(Arc::new(disk.clone()), small_config()) else { return };
            let removed = store.remove(&snap);
            assert!(disk.is_off() || removed.is_ok(), "{removed:?}");
        },
        &|disk, what| {
            check_left(disk.clone(), what, &model, Some((&name, number, &images)));
            let store = Store::open_on(Arc::new(disk), small_config()).unwrap();
            let request = CommitRequest {
                parent: dormouse_store::commit::Parent::None,
                ..CommitRequest::new(name.clone())
            };
            let request = request.image(
                "root".parse().unwrap(),
                dormouse_store::source::Source::Bytes(vec![6; 4096].into()),
            );
            let report = store.commit(request, Job::quiet()).unwrap();
            assert!(report.manifest.number > number, "{what}: a number came twice");
        },
    );
}

#[test]
fn a_power_cut_during_init_leaves_a_store_or_none() {
    let disk = SimDisk::new(6);
    cut_everywhere(
        &disk,
        &|disk| {
            let made = Store::init_on(Arc::new(disk.clone()), small_config());
            assert!(disk.is_off() || made.is_ok(), "{made:?}");
        },
        &|disk, what| match Store::open_on(Arc::new(disk.clone()), small_config()) {
            Ok(_) => check_left(disk, what, &Model::new(0), None),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotFound, "{what}: {error}");
                Store::init_on(Arc::new(disk.clone()), small_config())
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                check_left(disk, what, &Model::new(0), None);
            }
        },
    );
}

/// A full disk at every step: the commit fails, the store is as it was, and with room again the
/// same commit works.
#[test]
fn a_full_disk_at_every_step_of_a_commit() {
    let (disk, model) = with_history(7);
    for step in 1..60 {
        let full = disk.after_power_cut(Survive::Everything);
        let store = Store::open_on(Arc::new(full.clone()), small_config()).unwrap();
        full.fail_from(step, std::io::ErrorKind::StorageFull);
        let (request, _) = replay(&model.snapshots, &model.chance);
        let name = request.name.clone();
        let failed = store.commit(request, Job::quiet());
        full.clear_faults();
        if failed.is_ok() {
            // Only what comes after publishing failed, if anything.
            store.gc(&GcOptions::default(), Job::quiet()).unwrap();
            if step > 30 {
                return;
            }
            continue;
        }
        model.check(&store);
        let (request, images) = replay(&model.snapshots, &model.chance);
        let number = store.commit(request, Job::quiet()).unwrap().manifest.number;
        check_snapshot(&store, &name, number, &images);
    }
}
