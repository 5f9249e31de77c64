//! Damage of every kind: found, named exactly, never handed out, and mended where it can be.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use dormouse_store::commit::{CommitRequest, Parent};
use dormouse_store::disk::{DirEntry, Disk, DiskFile, DiskLock, DiskWriter, LockKind, LockWait};
use dormouse_store::error::ErrorKind;
use dormouse_store::gc::CompactOptions;
use dormouse_store::name::{ImageName, SnapRef};
use dormouse_store::progress::{Job, Quiet};
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};
use dormouse_store::verify::{VerifyOptions, VerifyReport};
use dormouse_testkit::sim_disk::{SimDisk, Survive};

use crate::commit::{blocks, name};
use crate::usage::{forget_index, noise};

const DEEP: VerifyOptions = VerifyOptions { snap: None, deep: true, repair: false };
const STRUCTURE: VerifyOptions = VerifyOptions { snap: None, deep: false, repair: false };
const REPAIR: VerifyOptions = VerifyOptions { snap: None, deep: true, repair: true };

/// Everything that is read from a small store: a cache would hide what lies on the disk.
const CONFIG: Config = Config {
    frame_cache_bytes: 1 << 20,
    node_cache_bytes: 1 << 20,
    index_filter_bytes: 1 << 20,
    threads: 1,
};

/// The content of each image of each snapshot.
type Contents = BTreeMap<(String, String), Vec<u8>>;

/// The blocks of images: snapshot, image, number.
type Blocks = BTreeSet<(String, String, u64)>;

fn open(disk: &SimDisk) -> Store {
    Store::open_on(Arc::new(disk.clone()), CONFIG).unwrap()
}

fn verify(store: &Store, options: &VerifyOptions) -> VerifyReport {
    store.verify(options, Job::quiet()).unwrap()
}

fn root() -> ImageName {
    ImageName::Disk(name("root"))
}

struct World {
    disk: SimDisk,
    contents: Contents,
}

impl World {
    fn new() -> World {
        let disk = SimDisk::new(7);
        Store::init_on(Arc::new(disk.clone()), CONFIG).unwrap();
        World { disk, contents: Contents::new() }
    }

    /// Three generations and a fork, with blocks that compress and blocks that do not.
    fn small() -> World {
        let mut world = World::new();
        let run = |range: std::ops::Range<u32>| range.collect::<Vec<_>>();
        let mixed = |numbers: &[u32]| {
            numbers
                .iter()
                .flat_map(
                    |&number| if number % 8 == 1 { noise(&[number]) } else { blocks(&[number]) },
                )
                .collect::<Vec<u8>>()
        };
        let mut disk = run(1..40);
        let mut memory = [run(20..30), vec![0; 5], run(100..120)].concat();
        world.commit(
            "vm",
            Parent::Auto,
            &[(root(), mixed(&disk)), (ImageName::Memory, mixed(&memory))],
        );
        disk[3] = 200;
        disk[20..30].fill(0);
        memory.splice(5..12, run(300..320));
        world.commit(
            "vm",
            Parent::Auto,
            &[(root(), mixed(&disk)), (ImageName::Memory, mixed(&memory))],
        );
        let state = (ImageName::State(name("s")), b"state".to_vec());
        world.commit("vm", Parent::Auto, &[(ImageName::Memory, mixed(&run(90..130))), state]);
        let parent = Parent::Snapshot("vm@1".parse().unwrap());
        world.commit("fork", parent, &[(root(), mixed(&run(5..60)))]);
        world
    }

    fn commit(&mut self, snapshot: &str, parent: Parent, images: &[(ImageName, Vec<u8>)]) {
        let store = open(&self.disk);
        let mut request = CommitRequest { parent, ..CommitRequest::new(name(snapshot)) };
        for (image, content) in images {
            request = request.image(image.clone(), Source::Bytes(content.clone().into()));
        }
        let manifest = store.commit(request, Job::quiet()).unwrap().manifest;
        let snapshot = manifest.display_name();
        for entry in &manifest.images {
            let content = match images.iter().find(|(image, _)| *image == entry.image) {
                Some((_, content)) => content.clone(),
                None => {
                    let parent = manifest.parent.as_ref().unwrap();
                    let parent = format!("{}@{}", parent.name, parent.number);
                    self.contents[&(parent, entry.image.to_string())].clone()
                }
            };
            self.contents.insert((snapshot.clone(), entry.image.to_string()), content);
        }
    }

    /// The world again, to be broken.
    fn copy(&self) -> World {
        World {
            disk: self.disk.after_power_cut(Survive::Everything),
            contents: self.contents.clone(),
        }
    }

    fn packs(&self) -> Vec<String> {
        let is_pack = |path: &String| path.ends_with(".pack") || path.ends_with(".bundle");
        self.disk.paths().into_iter().filter(is_pack).collect()
    }

    /// The blocks that cannot be read. Whatever can be read must be right.
    fn unreadable(&self) -> Blocks {
        let store = open(&self.disk);
        let mut unreadable = Blocks::new();
        for ((snapshot, image), content) in &self.contents {
            let mut all = |from: u64, to: u64| {
                unreadable.extend((from..to).map(|at| (snapshot.clone(), image.clone(), at)));
            };
            let blocks = content.len().div_ceil(4096) as u64;
            let Ok(opened) = store.snapshot(&snapshot.parse().unwrap()) else {
                all(0, blocks);
                continue;
            };
            let reader = opened.image(&image.parse().unwrap()).unwrap();
            let mut bytes = vec![0xaa; content.len()];
            if reader.read_at(&mut bytes, 0).is_ok() {
                assert!(bytes == *content, "{snapshot}:{image} has other bytes");
                continue;
            }
            for block in 0..blocks {
                let from = usize::try_from(block).unwrap() * 4096;
                let to = content.len().min(from + 4096);
                let part = &mut bytes[from..to];
                match reader.read_at(part, from as u64) {
                    Ok(()) => assert!(*part == content[from..to], "{snapshot}:{image} {block}"),
                    Err(_) => all(block, block + 1),
                }
            }
        }
        unreadable
    }
}

/// The blocks that problems touch.
fn touched(report: &VerifyReport, repaired: bool) -> Blocks {
    let mut touched = Blocks::new();
    for problem in report.problems.iter().filter(|problem| problem.repaired == repaired) {
        for damage in &problem.touches {
            assert!(damage.length > 0 && damage.offset % 4096 == 0);
            let blocks = damage.offset / 4096..(damage.offset + damage.length).div_ceil(4096);
            touched
                .extend(blocks.map(|at| (damage.snapshot.clone(), damage.image.to_string(), at)));
        }
    }
    touched
}

#[test]
fn a_sound_store_has_no_problems() {
    let world = World::small();
    let store = open(&world.disk);
    for options in [&STRUCTURE, &DEEP, &REPAIR] {
        let report = verify(&store, options);
        assert_eq!((&report.problems, &report.notes), (&vec![], &vec![]));
        assert_eq!((report.snapshots, report.packs), (4, 4));
        assert_eq!(report.frames > 0, options.deep);
        assert!(report.read_bytes > 0);
    }
    let one = VerifyOptions { snap: Some("vm@1".parse().unwrap()), ..DEEP };
    let report = verify(&store, &one);
    assert_eq!((report.snapshots, report.packs, report.problems.len()), (1, 1, 0));
    let none = VerifyOptions { snap: Some("vm@9".parse().unwrap()), ..DEEP };
    assert_eq!(store.verify(&none, Job::quiet()).unwrap_err().kind(), ErrorKind::NotFound);
    let cancelled = AtomicBool::new(true);
    let job = Job { progress: &Quiet, cancel: &cancelled };
    assert_eq!(store.verify(&DEEP, job).unwrap_err().kind(), ErrorKind::Cancelled);
}

/// A bit of every few bytes of every pack is flipped. Nothing wrong is ever read, what cannot be
/// read is named block by block, and mending makes nothing worse.
fn flip_through(world: &World, step: usize, mend_each: u64) -> (u64, u64, u64) {
    let (mut flips, mut harmful, mut mended) = (0_u64, 0, 0);
    for path in world.packs() {
        let len = world.disk.read(&path).unwrap().len();
        for byte in (0..len).step_by(step) {
            flips += 1;
            let bit = byte as u64 * 8 + flips % 8;
            world.disk.flip_bit(&path, bit).unwrap();
            let unreadable = world.unreadable();
            let report = verify(&open(&world.disk), &DEEP);
            let what = format!("bit {bit} of {path}: {:?}", report.problems);
            assert_eq!(touched(&report, false), unreadable, "{what}");
            assert!(!report.problems.is_empty(), "nothing found: {what}");
            harmful += u64::from(!unreadable.is_empty());
            if flips % mend_each == 0 {
                let broken = world.copy();
                let report = verify(&open(&broken.disk), &REPAIR);
                let left = broken.unreadable();
                assert_eq!(touched(&report, false), left, "{what} became {:?}", report.problems);
                assert!(left.is_subset(&unreadable), "{what}");
                let again = verify(&open(&broken.disk), &DEEP);
                assert_eq!(touched(&again, false), left, "{what} became {:?}", again.problems);
                assert_eq!(
                    again.problems.len(),
                    report.problems.iter().filter(|problem| !problem.repaired).count(),
                    "{what}"
                );
                mended += u64::from(again.problems.is_empty());
            }
            world.disk.flip_bit(&path, bit).unwrap();
        }
    }
    assert_eq!(verify(&open(&world.disk), &DEEP).problems, []);
    (flips, harmful, mended)
}

#[test]
fn every_flipped_bit_is_found_and_named() {
    let world = World::small();
    let (flips, harmful, mended) = flip_through(&world, 29, 5);
    assert!(flips > 1_500 && harmful > 1_000 && mended > 20, "{flips} {harmful} {mended}");
}

#[test]
fn every_flipped_bit_of_a_bundle_is_found_and_named() {
    let world = World::small();
    let all = CompactOptions { small_bytes: 1 << 30, ..CompactOptions::STANDARD };
    open(&world.disk).compact(&all, Job::quiet()).unwrap();
    assert_eq!(world.packs().len(), 1);
    flip_through(&world, 67, 3);
    // Directory and footer: everything in the bundle is taken out of it.
    let path = &world.packs()[0];
    let len = world.disk.read(path).unwrap().len() as u64;
    for byte in (len - 64 - 4 * 32..len).step_by(3) {
        let broken = world.copy();
        broken.disk.flip_bit(path, byte * 8).unwrap();
        assert!(!broken.unreadable().is_empty());
        let report = verify(&open(&broken.disk), &REPAIR);
        assert!(report.problems.iter().all(|problem| problem.repaired), "{:?}", report.problems);
        assert_eq!(broken.unreadable(), Blocks::new());
        assert_eq!(broken.packs().len(), 4, "four packs of their own, and no bundle");
    }
}

/// What is stored twice is taken from the other place: every frame, whatever its blocks.
#[test]
fn damaged_blocks_are_taken_from_equal_ones() {
    let mut world = World::new();
    let content: Vec<u32> = (1..60).collect();
    world.commit("a", Parent::None, &[(root(), noise(&content))]);
    forget_index(&world.disk);
    // Not in the same order, or it would be the same pack.
    let turned: Vec<u32> = content.iter().rev().copied().collect();
    world.commit("b", Parent::None, &[(root(), noise(&turned))]);
    assert_eq!(world.packs().len(), 2);
    let path = world.packs()[0].clone();
    let bytes = world.disk.read(&path).unwrap();
    let mut mended = 0;
    for byte in (0..bytes.len() - 600).step_by(3_001) {
        let broken = world.copy();
        broken.disk.flip_bit(&path, byte as u64 * 8 + 3).unwrap();
        if byte % 2 == 0 {
            forget_index(&broken.disk);
        }
        let before = broken.unreadable();
        let report = verify(&open(&broken.disk), &REPAIR);
        assert!(report.problems.iter().all(|problem| problem.repaired), "{:?}", report.problems);
        assert_eq!(touched(&report, true), before);
        assert_eq!(broken.unreadable(), Blocks::new());
        mended += u64::from(!before.is_empty());
    }
    assert!(mended > 50, "{mended}");
    // A place that cannot be read at all, over two frames.
    let broken = world.copy();
    broken.disk.break_range(&path, 60_000..80_000).unwrap();
    assert_eq!(touched(&verify(&open(&broken.disk), &DEEP), false).len(), 2 * 16);
    let report = verify(&open(&broken.disk), &REPAIR);
    assert!(report.problems.iter().all(|problem| problem.repaired), "{:?}", report.problems);
    assert_eq!(broken.unreadable(), Blocks::new());
    // Damaged in both places: what is the same is lost, and said so, to the block.
    let broken = world.copy();
    for path in broken.packs() {
        broken.disk.flip_bit(&path, 40_000).unwrap();
    }
    let report = verify(&open(&broken.disk), &REPAIR);
    assert_eq!(touched(&report, false), broken.unreadable());
}

/// The power goes at every write and sync of mending a table and a frame: what could be read before
/// can be read afterwards, and mending again ends it.
#[test]
fn mending_survives_power_cuts() {
    let mut world = World::new();
    let content: Vec<u32> = (1..40).collect();
    world.commit("a", Parent::None, &[(root(), noise(&content))]);
    forget_index(&world.disk);
    let turned: Vec<u32> = content.iter().rev().copied().collect();
    world.commit("b", Parent::None, &[(root(), noise(&turned))]);
    let packs = world.packs();
    let len = world.disk.read(&packs[0]).unwrap().len() as u64;
    world.disk.flip_bit(&packs[0], (len - 20) * 8).unwrap();
    world.disk.flip_bit(&packs[1], 40_000).unwrap();
    let before = world.unreadable();
    let whole = world.copy();
    verify(&open(&whole.disk), &REPAIR);
    assert_eq!(whole.unreadable(), Blocks::new());
    let mut cuts = 0;
    for cut in 1.. {
        let broken = world.copy();
        let store = open(&broken.disk);
        broken.disk.cut_after(cut);
        let done = store.verify(&REPAIR, Job::quiet()).is_ok();
        for survive in
            [Survive::Nothing, Survive::Everything, Survive::Random(cut), Survive::Random(!cut)]
        {
            let after = World {
                disk: broken.disk.after_power_cut(survive),
                contents: world.contents.clone(),
            };
            assert!(after.unreadable().is_subset(&before), "cut {cut}, {survive:?}");
            verify(&open(&after.disk), &REPAIR);
            assert_eq!(after.unreadable(), Blocks::new(), "cut {cut}, {survive:?}");
        }
        cuts = cut;
        if done {
            break;
        }
    }
    assert!(cuts > 30, "{cuts}");
}

#[test]
fn lost_cut_and_swapped_packs_are_named() {
    let world = World::small();
    for path in world.packs() {
        let broken = world.copy();
        broken.disk.remove(&path).unwrap();
        let unreadable = broken.unreadable();
        assert!(!unreadable.is_empty());
        for options in [&STRUCTURE, &DEEP, &REPAIR] {
            let report = verify(&open(&broken.disk), options);
            assert_eq!(touched(&report, false), unreadable);
            assert_eq!(report.problems.len(), 1);
            assert_eq!((&report.problems[0].path, report.problems[0].repaired), (&path, false));
        }
        let len = world.disk.read(&path).unwrap().len() as u64;
        for len in (0..len).step_by(997).chain([len - 1, len - 64, len - 65]) {
            let broken = world.copy();
            broken.disk.truncate(&path, len).unwrap();
            let unreadable = broken.unreadable();
            let report = verify(&open(&broken.disk), &STRUCTURE);
            assert_eq!(touched(&report, false), unreadable);
            assert!(!unreadable.is_empty());
            let report = verify(&open(&broken.disk), &REPAIR);
            assert_eq!(touched(&report, false), broken.unreadable());
        }
        // Without its footer a pack is as good as new.
        let broken = world.copy();
        broken.disk.truncate(&path, len - 30).unwrap();
        let report = verify(&open(&broken.disk), &REPAIR);
        assert!(report.problems.iter().all(|problem| problem.repaired), "{:?}", report.problems);
        assert_eq!(broken.unreadable(), Blocks::new());
        let left = |world: &World| {
            let mut paths = world.disk.paths();
            paths.retain(|path| !path.ends_with(".lock"));
            paths
        };
        assert_eq!(left(&broken), left(&world), "nothing is left behind");
    }
    let packs = world.packs();
    let broken = world.copy();
    let (a, b) = (world.disk.read(&packs[0]).unwrap(), world.disk.read(&packs[1]).unwrap());
    broken.disk.write_raw(&packs[0], &b).unwrap();
    broken.disk.write_raw(&packs[1], &a).unwrap();
    let report = verify(&open(&broken.disk), &STRUCTURE);
    assert_eq!(report.problems.len(), 2);
    assert_eq!(touched(&report, false), broken.unreadable());
}

#[test]
fn manifests_are_checked() {
    let world = World::small();
    let path = "snapshots/vm/2.json";
    let len = world.disk.read(path).unwrap().len() as u64;
    for bit in (0..len * 8).step_by(13) {
        world.disk.flip_bit(path, bit).unwrap();
        let report = verify(&open(&world.disk), &STRUCTURE);
        assert_eq!(report.snapshots, 3, "bit {bit}");
        assert_eq!(report.problems.len(), 1);
        assert_eq!(report.problems[0].path, path);
        let one = VerifyOptions { snap: Some("vm@2".parse().unwrap()), ..STRUCTURE };
        assert_eq!(verify(&open(&world.disk), &one).problems.len(), 1);
        world.disk.flip_bit(path, bit).unwrap();
    }
}

#[test]
fn the_index_is_checked_and_made_again() {
    let world = World::small();
    let runs: Vec<String> =
        world.disk.paths().into_iter().filter(|path| path.ends_with(".run")).collect();
    assert_eq!(runs.len(), 4);
    let len = world.disk.read(&runs[0]).unwrap().len() as u64;
    for byte in (0..len).step_by(29) {
        let broken = world.copy();
        broken.disk.flip_bit(&runs[0], byte * 8 + byte % 8).unwrap();
        let report = verify(&open(&broken.disk), &STRUCTURE);
        assert_eq!(report.problems.len(), 1, "byte {byte}");
        assert_eq!(report.problems[0].path, runs[0]);
        assert_eq!(report.notes.len(), 1, "{:?}", report.notes);
        let report = verify(&open(&broken.disk), &REPAIR);
        assert!(report.problems.iter().all(|problem| problem.repaired));
        let report = verify(&open(&broken.disk), &STRUCTURE);
        assert_eq!((report.problems, report.notes), (vec![], vec![]));
    }
    // Without any index everything is stored again; once it is made again, nothing is.
    let mut lost = world.copy();
    forget_index(&lost.disk);
    let report = verify(&open(&lost.disk), &STRUCTURE);
    assert_eq!((report.problems.len(), report.notes.len()), (0, 1));
    verify(&open(&lost.disk), &REPAIR);
    let content = lost.contents[&("fork@1".to_owned(), "disk/root".to_owned())].clone();
    lost.commit("new", Parent::None, &[(root(), content)]);
    let manifest = open(&lost.disk).manifest(&"new@1".parse().unwrap()).unwrap();
    assert_eq!(manifest.figures.new_bytes, 0);
}

#[test]
fn a_lost_key_is_said() {
    let world = World::small();
    let key = world.disk.paths().into_iter().find(|path| path.starts_with("keys/")).unwrap();
    world.disk.remove(&key).unwrap();
    let store = open(&world.disk);
    for options in [&STRUCTURE, &DEEP] {
        let report = verify(&store, options);
        assert_eq!(report.problems.len(), 1);
        assert_eq!(report.problems[0].path, key);
        assert_eq!((report.packs, report.frames), (4, 0));
    }
    assert_eq!(store.verify(&REPAIR, Job::quiet()).unwrap_err().kind(), ErrorKind::Key);
}

/// A disk that nothing can be written to.
#[derive(Debug)]
pub(crate) struct ReadOnly(pub(crate) SimDisk);

fn refuse<T>() -> io::Result<T> {
    Err(io::ErrorKind::ReadOnlyFilesystem.into())
}

impl Disk for ReadOnly {
    fn open(&self, path: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.0.open(path)
    }

    fn create(&self, _: &str) -> io::Result<Box<dyn DiskWriter>> {
        refuse()
    }

    fn append(&self, _: &str) -> io::Result<Box<dyn DiskWriter>> {
        refuse()
    }

    fn list(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        self.0.list(path)
    }

    fn create_dir_all(&self, _: &str) -> io::Result<()> {
        refuse()
    }

    fn rename(&self, _: &str, _: &str) -> io::Result<()> {
        refuse()
    }

    fn link(&self, _: &str, _: &str) -> io::Result<()> {
        refuse()
    }

    fn remove(&self, _: &str) -> io::Result<()> {
        refuse()
    }

    fn remove_dir(&self, _: &str) -> io::Result<()> {
        refuse()
    }

    fn sync_dir(&self, _: &str) -> io::Result<()> {
        refuse()
    }

    fn allocated_bytes(&self, path: &str) -> io::Result<u64> {
        self.0.allocated_bytes(path)
    }

    fn lock(
        &self,
        path: &str,
        kind: LockKind,
        wait: LockWait,
        create: bool,
    ) -> io::Result<Option<Box<dyn DiskLock>>> {
        if create { refuse() } else { self.0.lock(path, kind, wait, create) }
    }
}

#[test]
fn a_store_that_cannot_be_written_to_can_be_checked() {
    let world = World::small();
    let path = &world.packs()[0];
    world.disk.flip_bit(path, 1_000).unwrap();
    let store = Store::open_on(Arc::new(ReadOnly(world.disk.clone())), CONFIG).unwrap();
    let report = verify(&store, &DEEP);
    assert_eq!(touched(&report, false), world.unreadable());
    assert_eq!(store.usage(Job::quiet()).unwrap().snapshots.len(), 4);
    store.verify(&REPAIR, Job::quiet()).unwrap_err();
}

/// The damage of one snapshot does not stop another from being checked, and is told of it alone.
#[test]
fn one_snapshot_is_checked_alone() {
    let world = World::small();
    let fork: SnapRef = "fork@1".parse().unwrap();
    let own = open(&world.disk).manifest(&fork).unwrap().pack.unwrap().id;
    let path = world.packs().into_iter().find(|path| path.contains(&own)).unwrap();
    world.disk.remove(&path).unwrap();
    let of = |snap: &str| {
        let options = VerifyOptions { snap: Some(snap.parse().unwrap()), ..DEEP };
        verify(&open(&world.disk), &options)
    };
    assert_eq!(of("vm@1").problems, []);
    let report = of("fork@1");
    assert_eq!(report.problems.len(), 1);
    assert!(report.problems[0].touches.iter().all(|damage| damage.snapshot == "fork@1"));
    assert_eq!(open(&world.disk).usage(Job::quiet()).unwrap().damaged, ["fork@1"]);
}
