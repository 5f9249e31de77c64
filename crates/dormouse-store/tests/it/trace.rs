//! Traces lie beside their snapshots, are replaced whole, and go with them.

use std::sync::Arc;

use dormouse_store::commit::CommitRequest;
use dormouse_store::disk::Disk;
use dormouse_store::error::ErrorKind;
use dormouse_store::gc::GcOptions;
use dormouse_store::name::{ImageName, SnapRef};
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::{Snapshot, Store};
use dormouse_store::trace::TRACE_BYTES_MAX;
use dormouse_store::verify::VerifyOptions;
use dormouse_testkit::sim_disk::SimDisk;

use crate::commit::{blocks, name};
use crate::crash::cut_everywhere;
use crate::model::small_config;

fn store(snapshots: u32) -> (SimDisk, Store) {
    let disk = SimDisk::new(1);
    let store = Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
    for number in 1..=snapshots {
        let source = Source::Bytes(blocks(&[number]).into());
        let request = CommitRequest::new(name("vm")).image(ImageName::Memory, source);
        store.commit(request, Job::quiet()).unwrap();
    }
    (disk, store)
}

fn snapshot(store: &Store, number: u64) -> Snapshot {
    store.snapshot(&SnapRef { name: name("vm"), number: Some(number) }).unwrap()
}

#[test]
fn a_trace_is_as_it_was_put_last() {
    let (disk, store) = store(2);
    let (one, two) = (snapshot(&store, 1), snapshot(&store, 2));
    assert_eq!(one.trace().unwrap(), None);
    one.put_trace(b"first").unwrap();
    assert_eq!(two.trace().unwrap(), None, "each has its own");
    two.put_trace(b"").unwrap();
    one.put_trace(b"second").unwrap();
    assert_eq!(one.trace().unwrap().unwrap(), b"second");
    assert_eq!(two.trace().unwrap().unwrap(), b"");
    assert!(!disk.paths().iter().any(|path| path.starts_with("tmp/")), "{:?}", disk.paths());
    let long = vec![0; usize::try_from(TRACE_BYTES_MAX).unwrap() + 1];
    assert_eq!(one.put_trace(&long).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(one.trace().unwrap().unwrap(), b"second");
}

#[test]
fn a_trace_goes_with_its_snapshot() {
    let (disk, store) = store(2);
    for number in [1, 2] {
        snapshot(&store, number).put_trace(b"advice").unwrap();
    }
    disk.write_raw("traces/README", b"not ours").unwrap();
    let traces = || disk.list("traces").unwrap().len();
    let dry_run = GcOptions { dry_run: true };
    assert_eq!(store.gc(&GcOptions::default(), Job::quiet()).unwrap().swept, 0);
    assert_eq!(traces(), 3);
    store.remove(&"vm@1".parse().unwrap()).unwrap();
    assert_eq!(store.gc(&dry_run, Job::quiet()).unwrap().swept, 1);
    assert_eq!(traces(), 3);
    assert_eq!(store.gc(&GcOptions::default(), Job::quiet()).unwrap().swept, 1);
    assert_eq!(traces(), 2);
    assert_eq!(snapshot(&store, 2).trace().unwrap().unwrap(), b"advice");
}

/// They are advice: neither damage nor their number makes a store unsound.
#[test]
fn verify_does_not_mind_traces() {
    let (disk, store) = store(1);
    snapshot(&store, 1).put_trace(b"advice").unwrap();
    let path = format!("traces/{}", snapshot(&store, 1).manifest().uuid);
    disk.flip_bit(&path, 3).unwrap();
    let options = VerifyOptions { deep: true, ..VerifyOptions::default() };
    let report = store.verify(&options, Job::quiet()).unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
}

/// After a power cut at any step there is the old trace or the new one, and after the last step the
/// new one.
#[test]
fn a_power_cut_leaves_a_whole_trace() {
    for before in [None, Some(b"the old one")] {
        let (disk, store) = store(1);
        if let Some(before) = before {
            snapshot(&store, 1).put_trace(before).unwrap();
        }
        drop(store);
        let put = |disk: &SimDisk| -> bool {
            let store = Store::open_on(Arc::new(disk.clone()), small_config());
            store.is_ok_and(|store| {
                let snap = "vm@1".parse().unwrap();
                store.snapshot(&snap).is_ok_and(|vm| vm.put_trace(b"the new one").is_ok())
            })
        };
        let done = std::cell::Cell::new(false);
        let cuts = cut_everywhere(&disk, &|disk| done.set(put(disk)), &|disk, what| {
            let store = Store::open_on(Arc::new(disk.clone()), small_config()).unwrap();
            let trace = snapshot(&store, 1).trace().unwrap();
            if done.get() {
                assert_eq!(trace.as_deref(), Some(&b"the new one"[..]), "{what}");
            } else if trace.as_deref() != Some(b"the new one") {
                assert_eq!(trace.as_deref(), before.map(|bytes| &bytes[..]), "{what}");
            }
            store.gc(&GcOptions::default(), Job::quiet()).unwrap();
            assert!(disk.list("tmp").unwrap().is_empty(), "{what}");
        });
        assert!(cuts > 5, "{cuts} cuts");
    }
}
