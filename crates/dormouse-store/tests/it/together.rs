//! One process in the middle of a compaction or a reading, and another that takes away or moves
//! what it was about to touch.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use dormouse_store::commit::{CommitRequest, Parent};
use dormouse_store::disk::{DirEntry, Disk, DiskFile, DiskLock, DiskWriter, LockKind, LockWait};
use dormouse_store::gc::{CompactOptions, GcOptions};
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};
use dormouse_store::verify::VerifyOptions;
use dormouse_testkit::sim_disk::SimDisk;

use crate::commit::name;
use crate::usage::noise;

const CONFIG: Config = Config { threads: 1, ..Config::STANDARD };

/// What is done on a disk, for the one who waits for his moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// A file was opened.
    Opened,

    /// A bundle is begun.
    Bundle,

    /// Pins are about to be locked out.
    LockOut,

    /// The folder of bundles was listed.
    Listed,
}

type Interruption = Box<dyn FnOnce() + Send>;

/// A disk on which something happens in between, once.
struct Interrupted {
    disk: SimDisk,
    moment: Moment,
    what: Mutex<Option<Interruption>>,
}

impl fmt::Debug for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupted").field("moment", &self.moment).finish_non_exhaustive()
    }
}

impl Interrupted {
    fn at(&self, moment: Moment) {
        if moment == self.moment {
            let what = self.what.lock().unwrap().take();
            what.into_iter().for_each(|what| what());
        }
    }
}

impl Disk for Interrupted {
    fn open(&self, path: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.disk.open(path);
        if file.is_ok() && path.starts_with("packs/") {
            self.at(Moment::Opened);
        }
        file
    }

    fn create(&self, path: &str) -> io::Result<Box<dyn DiskWriter>> {
        if path.ends_with(".bundle") {
            self.at(Moment::Bundle);
        }
        self.disk.create(path)
    }

    fn append(&self, path: &str) -> io::Result<Box<dyn DiskWriter>> {
        self.disk.append(path)
    }

    fn list(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        let entries = self.disk.list(path);
        if path == "packs/bundle" {
            self.at(Moment::Listed);
        }
        entries
    }

    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        self.disk.create_dir_all(path)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.link(from, to)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.disk.remove(path)
    }

    fn remove_dir(&self, path: &str) -> io::Result<()> {
        self.disk.remove_dir(path)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.disk.sync_dir(path)
    }

    fn allocated_bytes(&self, path: &str) -> io::Result<u64> {
        self.disk.allocated_bytes(path)
    }

    fn lock(
        &self,
        path: &str,
        kind: LockKind,
        wait: LockWait,
        create: bool,
    ) -> io::Result<Option<Box<dyn DiskLock>>> {
        if path == "gc.lock" && kind == LockKind::Exclusive {
            self.at(Moment::LockOut);
        }
        self.disk.lock(path, kind, wait, create)
    }
}

/// Three snapshots without a parent, with a pack each.
fn three() -> SimDisk {
    let disk = SimDisk::new(3);
    let store = Store::init_on(Arc::new(disk.clone()), CONFIG).unwrap();
    for number in 0..3 {
        let mut request = CommitRequest::new(name("vm"))
            .image(ImageName::Memory, Source::Bytes(content(number).into()));
        request.parent = Parent::None;
        store.commit(request, Job::quiet()).unwrap();
    }
    disk
}

fn content(number: u32) -> Vec<u8> {
    noise(&[number * 10 + 1, number * 10 + 2, number * 10 + 3])
}

fn open(disk: &SimDisk) -> Store {
    Store::open_on(Arc::new(disk.clone()), CONFIG).unwrap()
}

fn interrupted(disk: &SimDisk, moment: Moment, what: fn(&Store)) -> (Store, Arc<Interrupted>) {
    let other = disk.clone();
    let what: Interruption = Box::new(move || what(&open(&other)));
    let what = Mutex::new(Some(what));
    let interrupted = Arc::new(Interrupted { disk: disk.clone(), moment, what });
    (Store::open_on(interrupted.clone(), CONFIG).unwrap(), interrupted)
}

fn forget_two(store: &Store) {
    store.remove(&"vm@1".parse().unwrap()).unwrap();
    store.remove(&"vm@2".parse().unwrap()).unwrap();
    store.gc(&GcOptions::default(), Job::quiet()).unwrap();
}

fn compact(store: &Store) {
    store.compact(&CompactOptions::STANDARD, Job::quiet()).unwrap();
}

fn read(store: &Store, snap: &str) -> Vec<u8> {
    let image = store.snapshot(&snap.parse().unwrap()).unwrap().image(&ImageName::Memory).unwrap();
    let mut bytes = Vec::new();
    image.write_to(&mut bytes, Job::quiet()).unwrap();
    bytes
}

fn assert_sound(disk: &SimDisk) {
    let store = open(disk);
    assert_eq!(read(&store, "vm@3"), content(2));
    let options = VerifyOptions { snap: None, deep: true, repair: false };
    assert_eq!(store.verify(&options, Job::quiet()).unwrap().problems, []);
}

/// Snapshots were removed and collected while a compaction wrote their packs again; it then failed
/// because the files that it wanted to delete were gone already.
#[test]
fn a_collection_in_the_middle_of_a_compaction() {
    for moment in [Moment::Opened, Moment::Bundle, Moment::LockOut] {
        let disk = three();
        let (store, interrupted) = interrupted(&disk, moment, forget_two);
        compact(&store);
        assert!(interrupted.what.lock().unwrap().is_none(), "{moment:?} came");
        assert_sound(&disk);
    }
}

/// Between finding a pack and opening it a compaction moved it.
#[test]
fn a_compaction_in_the_middle_of_a_reading() {
    for moment in [Moment::Opened, Moment::Listed] {
        let disk = three();
        if moment == Moment::Listed {
            // From bundle to bundle: the one that was listed is gone when it is opened.
            compact(&open(&disk));
            forget_two(&open(&disk));
        }
        let (store, interrupted) = interrupted(&disk, moment, compact);
        assert_eq!(read(&store, "vm@3"), content(2), "{moment:?}");
        assert!(interrupted.what.lock().unwrap().is_none(), "{moment:?} came");
        assert_sound(&disk);
    }
}

/// A collection walks maps before it locks anybody out, and another one may take them away.
#[test]
fn a_collection_in_the_middle_of_a_collection() {
    for moment in [Moment::Opened, Moment::LockOut] {
        let disk = three();
        let (store, interrupted) = interrupted(&disk, moment, forget_two);
        store.gc(&GcOptions::default(), Job::quiet()).unwrap();
        assert!(interrupted.what.lock().unwrap().is_none(), "{moment:?} came");
        assert_sound(&disk);
    }
}
