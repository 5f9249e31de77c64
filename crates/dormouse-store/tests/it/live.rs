//! What live VMs hold: their bases survive removal and collection until their folder is gone.

use std::io::ErrorKind;
use std::sync::Arc;

use dormouse_store::commit::CommitRequest;
use dormouse_store::disk::Disk;
use dormouse_store::gc::GcOptions;
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::Store;
use dormouse_testkit::sim_disk::{SimDisk, Survive};

use crate::commit::{blocks, name};
use crate::model::small_config;

#[test]
fn a_live_vm_keeps_its_base_until_its_folder_is_gone() {
    let disk = SimDisk::new(1);
    let store = Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
    let image = ImageName::Disk(name("root"));
    let content = blocks(&[1, 2, 3]);
    let source = Source::Bytes(content.clone().into());
    store
        .commit(CommitRequest::new(name("vm")).image(image.clone(), source), Job::quiet())
        .unwrap();
    let snap = "vm@1".parse().unwrap();
    let base = store.snapshot(&snap).unwrap().image(&image).unwrap();
    let (root, size) = (base.root(), base.size_bytes());
    store.hold_for_live(&name("box"), &[&base]).unwrap();
    store.remove(&snap).unwrap();
    drop((base, store));
    // The machine dies; nobody serves the VM; somebody collects.
    let disk = disk.after_power_cut(Survive::Nothing);
    let store = Store::open_on(Arc::new(disk.clone()), small_config()).unwrap();
    store.gc(&GcOptions::default(), Job::quiet()).unwrap();
    let held = store.held_image("box/root", root.as_ref(), size).unwrap();
    let mut read = vec![0; content.len()];
    held.read_at(&mut read, 0).unwrap();
    assert_eq!(read, content);
    drop(held);
    disk.remove("live/box/pin").unwrap();
    store.gc(&GcOptions::default(), Job::quiet()).unwrap();
    assert!(!disk.paths().iter().any(|path| path.ends_with(".pack")), "{:?}", disk.paths());
}

/// On a full disk each attempt to hold something left its half of a pin beside the pin, for ever.
#[test]
fn what_could_not_be_held_leaves_nothing() {
    let disk = SimDisk::new(2);
    let store = Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
    let image = ImageName::Disk(name("root"));
    let source = Source::Bytes(blocks(&[1, 2, 3]).into());
    store
        .commit(CommitRequest::new(name("vm")).image(image.clone(), source), Job::quiet())
        .unwrap();
    let base = store.snapshot(&"vm@1".parse().unwrap()).unwrap().image(&image).unwrap();
    let live = name("box");
    store.hold_for_live(&live, &[&base]).unwrap();
    let pins = || -> Vec<String> {
        disk.paths().into_iter().filter(|path| path.starts_with("live/box/pin")).collect()
    };
    let before = disk.operations();
    store.hold_for_live(&live, &[&base]).unwrap();
    let steps = disk.operations() - before;
    let mut failed = 0;
    for step in 1..=steps {
        disk.fail_at(step, ErrorKind::StorageFull);
        failed += u64::from(store.hold_for_live(&live, &[&base]).is_err());
        disk.clear_faults();
        assert_eq!(pins(), ["live/box/pin"], "step {step} of {steps}");
    }
    assert!(failed >= 4, "{failed} of {steps} steps can fail");
    // Of a process that was killed.
    disk.write_raw("live/box/pin.2f1c5c9e-3d0f-4d53-9b0e-7a6d1d1f0f55", b"half").unwrap();
    disk.write_raw("live/box/pin.lock", b"").unwrap();
    let report = store.gc(&GcOptions::default(), Job::quiet()).unwrap();
    assert_eq!(report.swept, 1);
    assert_eq!(pins(), ["live/box/pin", "live/box/pin.lock"]);
}
