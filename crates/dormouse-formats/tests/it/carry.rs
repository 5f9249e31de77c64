//! Our own file.

use std::collections::BTreeSet;
use std::fs;

use dormouse_formats::error::ErrorKind;
use dormouse_formats::export::ExportRequest;
use dormouse_formats::format::Format;
use dormouse_formats::import::LookOptions;
use dormouse_store::commit::{CommitRequest, Parent};
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_testkit::foreign::random::Random;

use crate::world::{World, assert_same, chain};

/// Memory and disk.
type Moment = (Vec<u8>, Vec<u8>);

/// A guest at four moments, in a store.
fn sender() -> (World, Vec<Moment>) {
    let world = World::new();
    let mut random = Random::new(1);
    let (mut memory, mut disk) = (random.device(2000), random.device(900));
    disk.truncate(disk.len() - 777);
    let mut kept = Vec::new();
    for number in 0..4_u8 {
        world.commit(&[("memory", &memory), ("root", &disk), ("state/vmstate", &[number; 5000])]);
        kept.push((memory.clone(), disk.clone()));
        random.work(&mut memory, 100);
        random.work(&mut disk[..800 * 4096], 30);
    }
    (world, kept)
}

fn uuid(world: &World, snap: &str) -> uuid::Uuid {
    world.store.manifest(&snap.parse().unwrap()).unwrap().uuid
}

#[test]
fn snapshots_are_carried_and_only_what_the_receiver_lacks() {
    let (world, kept) = sender();
    let receiver = World::new();
    let request = ExportRequest { base: Some("vm@1".parse().unwrap()), ..ExportRequest::default() };
    world.export("vm@2", &world.path("first"), Format::Carry, &request).unwrap();
    let report = receiver.import(Format::Carry, &world.path("first")).unwrap();
    assert_eq!(report.snapshots.len(), 2);
    let label = &report.snapshots[1].commit.manifest.labels["carry.uuid"];
    assert_eq!(*label, uuid(&world, "vm@2").to_string());
    // The receiver says what it has; vm@4 goes as its changes over vm@2.
    let has = BTreeSet::from([uuid(&world, "vm@1"), uuid(&world, "vm@2")]);
    let request = ExportRequest { has, ..ExportRequest::default() };
    world.export("vm@4", &world.path("second"), Format::Carry, &request).unwrap();
    let [first, second] =
        ["first", "second"].map(|name| fs::metadata(world.path(name)).unwrap().len());
    assert!(second < first / 4, "{second} beside {first}");
    receiver.import(Format::Carry, &world.path("second")).unwrap();
    for (snap, number) in [("vm@1", 0), ("vm@2", 1), ("vm@3", 3)] {
        assert_same(&receiver.bytes(snap, "memory"), &kept[number].0, snap);
        assert_same(&receiver.bytes(snap, "root"), &kept[number].1, snap);
        assert_eq!(receiver.bytes(snap, "state/vmstate"), [number as u8; 5000]);
    }
    // Back again: the sender knows its own by where it was made.
    let has = BTreeSet::from([uuid(&world, "vm@4")]);
    let request = ExportRequest { has, ..ExportRequest::default() };
    let error = receiver.export("vm@3", &world.path("x"), Format::Carry, &request).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
}

#[test]
fn changes_of_what_is_not_there_are_refused() {
    let (world, _) = sender();
    let has = BTreeSet::from([uuid(&world, "vm@1")]);
    let request = ExportRequest { has, ..ExportRequest::default() };
    world.export("vm@2", &world.path("carry"), Format::Carry, &request).unwrap();
    let receiver = World::new();
    let error = receiver.import(Format::Carry, &world.path("carry")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(chain(&error).contains(&uuid(&world, "vm@1").to_string()));
}

#[test]
fn a_carry_has_no_key_and_no_digest() {
    let (world, _) = sender();
    world.export("vm@1", &world.path("carry"), Format::Carry, &ExportRequest::default()).unwrap();
    let carry = fs::read(world.path("carry")).unwrap();
    for entry in fs::read_dir(world.path("store").join("keys")).unwrap() {
        let key = fs::read(entry.unwrap().path()).unwrap();
        assert!(key.len() >= 32);
        assert!(!carry.windows(32).any(|window| window == &key[..32]), "the key is in the carry");
    }
}

#[test]
fn damage_and_an_early_end_are_noticed_before_the_snapshot_is_published() {
    let (world, _) = sender();
    world.export("vm@1", &world.path("carry"), Format::Carry, &ExportRequest::default()).unwrap();
    let good = fs::read(world.path("carry")).unwrap();
    let receiver = World::new();
    let mut random = Random::new(2);
    for round in 0..40 {
        let at = random.below(good.len());
        let bad = if round % 2 == 0 {
            let mut bad = good.clone();
            bad[at] ^= 1 << random.below(8);
            bad
        } else {
            // The very last record, too.
            good[..if round == 1 { good.len() - 1 } else { at }].to_vec()
        };
        fs::write(world.path("bad"), bad).unwrap();
        let error = receiver.import(Format::Carry, &world.path("bad")).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported),
            "byte {at}: {}",
            chain(&error)
        );
        assert!(receiver.store.list(None).unwrap().snapshots.is_empty(), "byte {at}");
    }
}

/// Whoever may commit may give any label, and a carry may say that its snapshot is any other one. The
/// next carry with changes of that one was laid over what the first had brought, and came out as a
/// mixture of both.
#[test]
fn a_forged_label_makes_no_snapshot_the_base_of_changes() {
    let (world, kept) = sender();
    let meant = uuid(&world, "vm@1");
    let has = BTreeSet::from([meant]);
    let request = ExportRequest { has, ..ExportRequest::default() };
    world.export("vm@2", &world.path("changes"), Format::Carry, &request).unwrap();
    world.export("vm@1", &world.path("first"), Format::Carry, &ExportRequest::default()).unwrap();
    let receiver = World::new();
    let forge = |memory: &[u8]| {
        let images: [(&str, &[u8]); 3] =
            [("memory", memory), ("root", &kept[0].1), ("state/vmstate", &[0; 5000])];
        let mut request = CommitRequest::new("forged".parse().unwrap());
        request.labels.insert("carry.uuid".to_owned(), meant.to_string());
        for (image, bytes) in images {
            request = request.image(image.parse().unwrap(), Source::Bytes(bytes.into()));
        }
        receiver.store.commit(request, Job::quiet()).unwrap();
    };
    let mut other = kept[0].0.clone();
    other[100_000] ^= 1;
    forge(&other);
    let error = receiver.import(Format::Carry, &world.path("changes")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    let text = chain(&error);
    assert!(text.contains("memory of forged@1 is another: got "), "{text}");
    // Nor if it is named.
    let options = LookOptions::default();
    let named = Parent::Snapshot("forged@1".parse().unwrap());
    let path = world.path("changes");
    let error = receiver.import_over(Format::Carry, &path, &options, named).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{}", chain(&error));
    assert_eq!(receiver.store.list(None).unwrap().snapshots.len(), 1, "nothing was published");
    // The right one is found, though a newer one says that it is it.
    receiver.import(Format::Carry, &world.path("first")).unwrap();
    forge(&other);
    let report = receiver.import(Format::Carry, &path).unwrap();
    let parent = report.snapshots[0].commit.manifest.parent.clone().unwrap();
    assert_eq!((parent.name.as_str(), parent.number), ("vm", 1));
    assert_same(&receiver.bytes("vm@2", "memory"), &kept[1].0, "memory");
    assert_same(&receiver.bytes("vm@2", "root"), &kept[1].1, "disk");
    // One that has the bytes is as good, whoever made it.
    let receiver = World::new();
    let mut request = CommitRequest::new("copy".parse().unwrap());
    request.labels.insert("carry.uuid".to_owned(), meant.to_string());
    for (image, bytes) in [("memory", &kept[0].0), ("root", &kept[0].1)] {
        request = request.image(image.parse().unwrap(), Source::Bytes((&bytes[..]).into()));
    }
    request =
        request.image("state/vmstate".parse().unwrap(), Source::Bytes((&[0; 5000][..]).into()));
    receiver.store.commit(request, Job::quiet()).unwrap();
    receiver.import(Format::Carry, &path).unwrap();
    assert_same(&receiver.bytes("vm", "memory"), &kept[1].0, "memory");
}
