//! What live VMs hold: their bases survive removal and collection until their folder is gone.

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
