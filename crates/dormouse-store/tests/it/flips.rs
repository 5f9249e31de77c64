//! Flipped bits, cut ends and unreadable sectors in the small files of a store: an error or the
//! same meaning, never wrong data.

use std::sync::Arc;

use dormouse_image::digest::checksum;
use dormouse_store::commit::{CommitRequest, Parent};
use dormouse_store::error::ErrorKind;
use dormouse_store::gc::GcOptions;
use dormouse_store::manifest::Manifest;
use dormouse_store::name::SnapRef;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::Store;
use dormouse_testkit::sim_disk::{SimDisk, Survive};

use crate::commit::name;
use crate::model::{Chance, Images, Model, check_snapshot, small_config};

/// A store with some snapshots, bundles, packs of their own and index runs.
fn with_snapshots(seed: u64) -> (SimDisk, Model) {
    let disk = SimDisk::new(seed);
    let store = Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
    let mut model = Model::new(seed);
    for step in 0..6 {
        let (request, images) = model.commit();
        let name = request.name.clone();
        let report = store.commit(request, Job::quiet()).unwrap();
        model.committed(name, report.manifest.number, images);
        if step == 3 {
            store.compact(&crate::model::EAGER, Job::quiet()).unwrap();
        }
    }
    (disk, model)
}

/// The same disk once more, to be damaged.
fn copy(disk: &SimDisk) -> SimDisk {
    disk.after_power_cut(Survive::Everything)
}

fn open(disk: &SimDisk) -> dormouse_store::error::Result<Store> {
    Store::open_on(Arc::new(disk.clone()), small_config())
}

fn paths(disk: &SimDisk, end: &str) -> Vec<String> {
    disk.paths().into_iter().filter(|path| path.ends_with(end)).collect()
}

/// Some bits flipped, bytes scribbled over, repeated or missing, or the end cut off.
fn damage(chance: &mut Chance, bytes: &mut Vec<u8>) {
    let at = chance.below(bytes.len() as u64) as usize;
    let end = bytes.len().min(at + 1 + chance.below(40) as usize);
    match chance.below(12) {
        0 => bytes.truncate(at),
        1 => bytes.extend_from_within(at..end),
        2 => drop(bytes.drain(at..end)),
        3 => bytes[at..end].iter_mut().for_each(|byte| *byte = chance.below(256) as u8),
        4 => bytes[at..end].fill(0),
        _ => {
            for _ in 0..=chance.below(3) {
                let bit = chance.below(bytes.len() as u64 * 8);
                bytes[bit as usize / 8] ^= 1 << (bit % 8);
            }
        }
    }
}

#[test]
fn manifests_are_what_was_written_or_refused() {
    let (disk, _) = with_snapshots(1);
    let mut chance = Chance::new(1);
    let manifests = paths(&disk.clone(), ".json");
    let manifests = manifests.iter().filter(|path| path.starts_with("snapshots/"));
    let (mut tried, mut same) = (0, 0);
    for path in manifests {
        let sound = disk.read(path).unwrap();
        let manifest = Manifest::decode(&sound).unwrap();
        let mut check = |bytes: &[u8]| {
            tried += 1;
            match Manifest::decode(bytes) {
                Ok(read) => {
                    assert_eq!(read, manifest, "{}", String::from_utf8_lossy(bytes));
                    same += 1;
                }
                Err(error) => assert!(
                    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported),
                    "{error}"
                ),
            }
        };
        for bit in 0..sound.len() * 8 {
            let mut bytes = sound.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            check(&bytes);
        }
        (0..sound.len()).for_each(|len| check(&sound[..len]));
        for _ in 0..5000 {
            let mut bytes = sound.clone();
            damage(&mut chance, &mut bytes);
            check(&bytes);
        }
    }
    assert!(tried > 30_000, "{tried}");
    // White space at the end and between the outer fields has no meaning.
    assert!(same < tried / 50, "{same} of {tried} were taken for sound");
}

/// Whatever became of a manifest, the others read as ever, and nothing is collected that a
/// manifest which cannot be read may need.
#[test]
fn a_damaged_manifest_hurts_no_other() {
    let (disk, model) = with_snapshots(2);
    let mut chance = Chance::new(2);
    let packs = paths(&disk, ".pack").len() + paths(&disk, ".bundle").len();
    for _ in 0..300 {
        let disk = copy(&disk);
        let keys: Vec<_> = model.snapshots.keys().cloned().collect();
        let (hurt, number) = chance.pick(&keys).cloned().unwrap();
        let path = format!("snapshots/{hurt}/{number}.json");
        let sound = disk.read(&path).unwrap();
        let mut bytes = sound.clone();
        damage(&mut chance, &mut bytes);
        disk.write_raw(&path, &bytes).unwrap();
        let is_same = Manifest::decode(&bytes).is_ok();
        let store = open(&disk).unwrap();
        let listing = store.list(None).unwrap();
        assert_eq!(listing.damaged.len(), usize::from(!is_same));
        for ((name, at), images) in &model.snapshots {
            if is_same || (name, *at) != (&hurt, number) {
                check_snapshot(&store, name, *at, images);
            } else {
                let snap = SnapRef { name: name.clone(), number: Some(*at) };
                store.snapshot(&snap).unwrap_err();
            }
        }
        if !is_same {
            store.gc(&GcOptions::default(), Job::quiet()).unwrap_err();
            assert_eq!(paths(&disk, ".pack").len() + paths(&disk, ".bundle").len(), packs);
        }
    }
}

/// A manifest that is whole, but another's, was put in its place.
#[test]
fn a_manifest_under_another_name_is_refused() {
    let (disk, model) = with_snapshots(3);
    let mut keys = model.snapshots.keys();
    let (first, other) = (keys.next().unwrap(), keys.next().unwrap());
    let path = |(name, number): &(dormouse_store::name::Name, u64)| {
        format!("snapshots/{name}/{number}.json")
    };
    disk.write_raw(&path(first), &disk.read(&path(other)).unwrap()).unwrap();
    let snap = SnapRef { name: first.0.clone(), number: Some(first.1) };
    let error = open(&disk).unwrap().snapshot(&snap).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

/// The parameters had no checksum: a flipped bit gave a store another id or another key's name.
#[test]
fn parameters_are_what_was_written_or_refused() {
    let (disk, model) = with_snapshots(4);
    let id = open(&disk).unwrap().id();
    let sound = disk.read("dormouse.json").unwrap();
    let mut chance = Chance::new(4);
    let check = |bytes: &[u8]| {
        disk.write_raw("dormouse.json", bytes).unwrap();
        match open(&disk) {
            Ok(store) => {
                assert_eq!(store.id(), id);
                let ((name, number), images) = model.snapshots.iter().next().unwrap();
                check_snapshot(&store, name, *number, images);
                true
            }
            Err(error) => {
                let kind = error.kind();
                assert!(matches!(kind, ErrorKind::Corrupt | ErrorKind::Unsupported), "{error}");
                false
            }
        }
    };
    let mut same = 0;
    for bit in 0..sound.len() * 8 {
        let mut bytes = sound.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        same += usize::from(check(&bytes));
    }
    (0..sound.len() - 1).for_each(|len| assert!(!check(&sound[..len]), "cut at {len}"));
    for _ in 0..2000 {
        let mut bytes = sound.clone();
        damage(&mut chance, &mut bytes);
        same += usize::from(check(&bytes));
    }
    assert!(same < 40, "{same} were taken for sound");
    assert!(check(&sound));
}

/// A key with a flipped bit is another key: it must not be used.
#[test]
fn a_damaged_key_is_refused() {
    let (disk, _) = with_snapshots(5);
    let path = disk.paths().into_iter().find(|path| path.starts_with("keys/")).unwrap();
    let sound = disk.read(&path).unwrap();
    for bit in 0..sound.len() * 8 {
        let mut bytes = sound.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        disk.write_raw(&path, &bytes).unwrap();
        assert_eq!(open(&disk).unwrap_err().kind(), ErrorKind::Key);
    }
    for len in 0..sound.len() {
        disk.write_raw(&path, &sound[..len]).unwrap();
        open(&disk).unwrap_err();
    }
}

/// A commit of blocks that the store has, in another order, over no parent: every one of them is
/// asked for in the index.
fn commit_again(store: &Store, chance: &mut Chance, all: &[Vec<u8>]) {
    let mut bytes = Vec::new();
    for _ in 0..40 {
        bytes.extend_from_slice(chance.pick(all).unwrap());
    }
    let images = Images::from([("root".parse().unwrap(), bytes)]);
    let request = images.iter().fold(
        CommitRequest { parent: Parent::None, ..CommitRequest::new(name("again")) },
        |request, (image, bytes)| request.image(image.clone(), Source::Bytes(bytes.clone().into())),
    );
    let report = store.commit(request, Job::quiet()).unwrap();
    check_snapshot(store, &name("again"), report.manifest.number, &images);
}

/// Makes the checksums of a run match its bytes again, where its parts can still be found.
fn sign(run: &mut [u8]) {
    let Some(footer) = run.len().checked_sub(64) else { return };
    let number = |at: usize| u64::from_le_bytes(*run[at..].first_chunk().unwrap());
    let entries = number(footer + 16).saturating_mul(16).min(footer as u64) as usize;
    let sums = [checksum(&[&run[..entries]]), checksum(&[&run[entries..footer]])];
    run[footer + 32..footer + 40].copy_from_slice(&sums[0].to_le_bytes());
    run[footer + 40..footer + 48].copy_from_slice(&sums[1].to_le_bytes());
    let sum = checksum(&[&run[footer..footer + 56]]);
    run[footer + 56..].copy_from_slice(&sum.to_le_bytes());
}

/// What is damaged in the index costs deduplication, never data, and a commit does not fail for
/// it: not by chance, not with checksums that a hand made match, and not by a bad sector, which
/// ended every commit and every collection until the run was removed.
#[test]
fn a_damaged_index_costs_no_data() {
    let (disk, model) = with_snapshots(6);
    let all: Vec<Vec<u8>> = model
        .snapshots
        .values()
        .flat_map(|images| images.values())
        .flat_map(|bytes| bytes.chunks_exact(4096).map(<[u8]>::to_vec))
        .collect();
    let runs = paths(&disk, ".run");
    assert!(runs.len() > 3, "{runs:?}");
    let mut chance = Chance::new(6);
    for round in 0..1500 {
        let disk = copy(&disk);
        for path in &runs {
            if chance.below(2) == 0 {
                let mut bytes = disk.read(path).unwrap();
                damage(&mut chance, &mut bytes);
                if round % 3 != 0 {
                    sign(&mut bytes);
                }
                disk.write_raw(path, &bytes).unwrap();
            }
            if chance.below(8) == 0 {
                let at = chance.below(disk.read(path).unwrap().len() as u64 + 1);
                disk.break_range(path, at..at + 512).unwrap();
            }
        }
        let store = open(&disk).unwrap();
        commit_again(&store, &mut chance, &all);
        if round % 10 == 0 {
            for ((name, number), images) in &model.snapshots {
                check_snapshot(&store, name, *number, images);
            }
            store.gc(&GcOptions::default(), Job::quiet()).unwrap();
            commit_again(&store, &mut chance, &all);
        }
    }
}

/// `next` has one form; anything else must not let a number be given out twice.
#[test]
fn a_damaged_number_stops_commits() {
    let (disk, model) = with_snapshots(7);
    let store = open(&disk).unwrap();
    let (name, _) = model.snapshots.keys().next_back().unwrap().clone();
    store.remove(&SnapRef { name: name.clone(), number: None }).unwrap();
    let path = format!("snapshots/{name}/next");
    let request = || {
        CommitRequest { parent: Parent::None, ..CommitRequest::new(name.clone()) }
            .image("root".parse().unwrap(), Source::Bytes(b"x"[..].into()))
    };
    for damaged in ["", "\n", "7", "x\n", "-1\n", "18446744073709551616\n", "1 2\n"] {
        disk.write_raw(&path, damaged.as_bytes()).unwrap();
        let error = store.commit(request(), Job::quiet()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{damaged:?}: {error}");
    }
    disk.write_raw(&path, b"41\n").unwrap();
    assert_eq!(store.commit(request(), Job::quiet()).unwrap().manifest.number, 41);
}

/// The number after the last of all was computed with an overflow: 0 in a release build, and a
/// panic with `next.lock` held in others.
#[test]
fn numbers_end() {
    let (disk, model) = with_snapshots(8);
    let store = open(&disk).unwrap();
    let (name, _) = model.snapshots.keys().next().unwrap().clone();
    let request = || {
        CommitRequest { parent: Parent::None, ..CommitRequest::new(name.clone()) }
            .image("root".parse().unwrap(), Source::Bytes(b"x"[..].into()))
    };
    let path = |number: u64| format!("snapshots/{name}/{number}.json");
    disk.write_raw(&path(u64::MAX), b"no manifest").unwrap();
    store.commit(request(), Job::quiet()).unwrap();
    disk.write_raw(&path(u64::MAX - 1), b"no manifest").unwrap();
    let error = store.commit(request(), Job::quiet()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    store.remove(&SnapRef { name: name.clone(), number: Some(u64::MAX - 1) }).unwrap();
    let error = store.commit(request(), Job::quiet()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
}
