//! Single races and states that were found by thinking, each with its story.

use std::io;
use std::sync::Arc;

use dormouse_image::block::HoleMeaning;
use dormouse_store::commit::{CommitRequest, NewImage, Parent};
use dormouse_store::disk::Disk;
use dormouse_store::error::{ErrorKind, Result};
use dormouse_store::gc::{CompactOptions, GcOptions};
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::Store;
use dormouse_testkit::sim_disk::SimDisk;

use crate::commit::{blocks, name};
use crate::model::{EAGER, small_config};
use crate::usage::{forget_index, noise};

pub(crate) fn open(disk: &SimDisk) -> Store {
    Store::open_on(Arc::new(disk.clone()), small_config()).unwrap()
}

fn open_new(seed: u64) -> Store {
    Store::init_on(Arc::new(SimDisk::new(seed)), small_config()).unwrap()
}

fn root() -> ImageName {
    "disk/root".parse().unwrap()
}

fn commit(store: &Store, text: &str, parent: Parent, numbers: &[u32]) {
    let source = Source::Bytes(blocks(numbers).into());
    let request = CommitRequest { parent, ..CommitRequest::new(name(text)) }.image(root(), source);
    store.commit(request, Job::quiet()).unwrap();
}

fn remove(store: &Store, snap: &str) {
    store.remove(&snap.parse().unwrap()).unwrap();
}

fn read(store: &Store, snap: &str) -> Result<Vec<u8>> {
    let image = store.snapshot(&snap.parse().unwrap())?.image(&root())?;
    let mut bytes = vec![0xaa; usize::try_from(image.size_bytes()).unwrap()];
    image.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn bundles(disk: &SimDisk) -> Vec<String> {
    disk.paths().into_iter().filter(|path| path.ends_with(".bundle")).collect()
}

/// A reader that may not write to the store has no pin. Its snapshot was removed, and a compaction
/// dropped one slot out of a run. The reader took the run's first block out of the new frame and
/// those behind it for the rest of the run: from the gap on everybody got his neighbour's bytes.
#[test]
fn a_slot_dropped_out_of_a_run_is_an_error_and_not_its_neighbour() {
    let disk = SimDisk::new(1);
    Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
    let writer = open(&disk);
    let whole: Vec<u32> = (1..17).collect();
    commit(&writer, "base", Parent::None, &whole);
    commit(&writer, "other", Parent::None, &[&[77][..], &whole].concat());
    let kept: Vec<u32> = whole.iter().map(|&number| if number == 7 { 0 } else { number }).collect();
    commit(&writer, "kept", Parent::None, &kept);

    let reader = open(&disk);
    disk.fail_at(1, io::ErrorKind::PermissionDenied);
    let image = reader.snapshot(&"other".parse().unwrap()).unwrap().image(&root()).unwrap();
    assert!(!image.is_pinned());
    image.extent_at(0).unwrap(); // the map is loaded, no block is

    remove(&writer, "base@1");
    remove(&writer, "other@1");
    writer.compact(&EAGER, Job::quiet()).unwrap();
    assert_eq!(read(&writer, "kept").unwrap(), blocks(&kept));
    let mut run = blocks(&whole);
    let error = image.read_at(&mut run, 4096).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    let mut before = blocks(&[0; 6]);
    image.read_at(&mut before, 4096).unwrap();
    assert_eq!(before, blocks(&whole[..6]));
}

/// Bundles are named after the clock, and the one that is named last is read. After the clock had
/// gone back, a compaction moved a whole pack into a bundle that sorted before an old one with the
/// pack's remains: those were read, and the next collection deleted the whole one.
#[test]
fn a_clock_that_goes_back_does_not_bring_old_bundles_back() {
    let disk = SimDisk::new(2);
    Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
    let store = open(&disk);
    let all: Vec<u32> = (1..40).collect();
    commit(&store, "vm", Parent::None, &all);
    commit(&store, "kept", Parent::None, &all[..10]);
    let large = Source::Bytes(noise(&(1000..1200).collect::<Vec<_>>()).into());
    let request = CommitRequest::new(name("large")).image(root(), large);
    store.commit(request, Job::quiet()).unwrap();
    remove(&store, "vm@1");
    let gather = |small_bytes| CompactOptions { small_bytes, bundle_bytes: 1 << 30, ..EAGER };
    store.compact(&gather(1 << 30), Job::quiet()).unwrap();
    // What is left of the pack lies in a bundle that was written in the future.
    let [bundle] = &bundles(&disk)[..] else { panic!("{:?}", bundles(&disk)) };
    let future = "packs/bundle/0fffffff-0000-7000-8000-000000000000.bundle";
    let bytes = disk.read(bundle).unwrap();
    disk.write_raw(future, &bytes).unwrap();
    disk.remove(bundle).unwrap();
    // The same content once more is the same pack once more, now whole and in a file of its own.
    forget_index(&disk);
    let store = open(&disk);
    commit(&store, "again", Parent::None, &all);
    commit(&store, "tiny", Parent::None, &[600]);
    store.compact(&gather(100 << 10), Job::quiet()).unwrap();
    assert_eq!(bundles(&disk).len(), 2);
    for _ in 0..2 {
        let store = open(&disk);
        assert!(read(&store, "again").unwrap() == blocks(&all));
        assert!(read(&store, "kept").unwrap() == blocks(&all[..10]));
        store.gc(&GcOptions::default(), Job::quiet()).unwrap();
    }
}

/// A diff that was written to a block device, or held in memory, has no holes: what the guest did not
/// touch reads as zeros, and was taken for pages that it had zeroed.
#[test]
fn a_diff_without_holes_is_refused() {
    let store = open_new(3);
    commit(&store, "vm", Parent::None, &[1, 2, 3]);
    let diff = NewImage {
        image: root(),
        source: Source::Bytes(blocks(&[0, 9, 0]).into()),
        holes: HoleMeaning::Parent,
    };
    let request = CommitRequest {
        parent: Parent::Snapshot("vm@1".parse().unwrap()),
        images: vec![diff],
        ..CommitRequest::new(name("vm"))
    };
    assert_eq!(store.commit(request, Job::quiet()).unwrap_err().kind(), ErrorKind::Refused);
}

/// The number after the highest one there can be was 0, or a panic. It must not be the highest one
/// again either, whose manifest the failed commit would take away as its own.
#[test]
fn after_the_highest_number_there_is_none() {
    let disk = SimDisk::new(4);
    let store = Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
    commit(&store, "vm", Parent::None, &[1, 2, 3]);
    let highest = format!("snapshots/vm/{}.json", u64::MAX - 1);
    disk.write_raw(&highest, b"somebody's").unwrap();
    let request = CommitRequest { parent: Parent::None, ..CommitRequest::new(name("vm")) }
        .image(root(), Source::Bytes(blocks(&[4]).into()));
    store.commit(request, Job::quiet()).unwrap_err();
    assert_eq!(disk.read(&highest).unwrap(), b"somebody's");
    assert!(!disk.paths().iter().any(|path| path == "snapshots/vm/0.json"));
}
