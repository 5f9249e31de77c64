//! The store against the simplest possible one: a list of snapshots, each a map of byte vectors.
//!
//! Random commits, removals, prunes, collections, compactions and reopenings; after each step every
//! snapshot must read as the model says, and no number may come twice.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use dormouse_store::commit::{CommitRequest, Parent};
use dormouse_store::disk::Disk;
use dormouse_store::gc::{CompactOptions, GcOptions, KeepRules};
use dormouse_store::name::{ImageName, Name, SnapRef};
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};
use dormouse_testkit::sim_disk::SimDisk;

use crate::commit::{blocks, name};

/// A small, repeatable source of chance.
#[derive(Clone)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Chance {
        Chance(seed)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    pub(crate) fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        if items.is_empty() { None } else { items.get(self.below(items.len() as u64) as usize) }
    }
}

pub(crate) type Images = BTreeMap<ImageName, Vec<u8>>;

pub(crate) struct Model {
    pub(crate) chance: Chance,
    pub(crate) snapshots: BTreeMap<(Name, u64), Images>,
    given: HashMap<Name, HashSet<u64>>,
}

pub(crate) fn small_config() -> Config {
    Config { frame_cache_bytes: 1 << 20, node_cache_bytes: 1 << 20, threads: 1, ..Config::STANDARD }
}

/// Compacts whatever can be compacted, into small bundles.
pub(crate) const EAGER: CompactOptions = CompactOptions {
    dead_ratio: 0.05,
    small_bytes: 1 << 20,
    bundle_bytes: 200 << 10,
    dry_run: false,
};

impl Model {
    pub(crate) fn new(seed: u64) -> Model {
        Model { chance: Chance::new(seed), snapshots: BTreeMap::new(), given: HashMap::new() }
    }

    fn some_snapshot(&mut self) -> Option<(Name, u64)> {
        let all: Vec<_> = self.snapshots.keys().cloned().collect();
        self.chance.pick(&all).cloned()
    }

    /// An image that has to do with the one before: changed, moved, grown and cut here and there.
    fn next_image(&mut self, old: Option<&Vec<u8>>) -> Vec<u8> {
        let mut bytes = old.cloned().unwrap_or_default();
        let len = self.chance.below(60) as usize * 4096
            + [0, 0, 0, 1, 4095][self.chance.below(5) as usize];
        if bytes.is_empty() || self.chance.below(4) == 0 {
            bytes.resize(len, 0);
        }
        for _ in 0..self.chance.below(12) {
            let count = 1 + self.chance.below(20);
            let first = self.chance.below(400) as u32;
            let run: Vec<u32> = (0..count as u32)
                .map(|at| if self.chance.below(5) == 0 { 0 } else { first + at })
                .collect();
            let run = blocks(&run);
            let at = self.chance.below(bytes.len() as u64 / 4096 + 1) as usize * 4096;
            let end = bytes.len().min(at + run.len());
            bytes[at..end].copy_from_slice(&run[..end - at]);
        }
        bytes
    }

    /// A commit: the request, and what the snapshot will hold.
    pub(crate) fn commit(&mut self) -> (CommitRequest, Images) {
        let name = name(["a", "b", "c"][self.chance.below(3) as usize]);
        let newest = self.snapshots.keys().filter(|(n, _)| *n == name).max().cloned();
        let (parent, over) = match self.chance.below(4) {
            0 => (Parent::None, None),
            1 => match self.some_snapshot() {
                Some(key) => {
                    let snap = SnapRef { name: key.0.clone(), number: Some(key.1) };
                    (Parent::Snapshot(snap), Some(key))
                }
                None => (Parent::None, None),
            },
            _ => (Parent::Auto, newest),
        };
        let mut images = over.map(|key| self.snapshots[&key].clone()).unwrap_or_default();
        let mut request = CommitRequest { parent, ..CommitRequest::new(name) };
        let mut add = |model: &mut Model, image: ImageName| {
            let bytes = model.next_image(images.get(&image));
            request.images.push(dormouse_store::commit::NewImage {
                image: image.clone(),
                source: Source::Bytes(bytes.clone().into()),
                holes: dormouse_image::block::HoleMeaning::Zero,
            });
            images.insert(image, bytes);
        };
        add(self, ImageName::Disk(crate::commit::name("root")));
        if self.chance.below(2) == 0 {
            add(self, ImageName::Memory);
            add(self, ImageName::State(crate::commit::name("vmstate")));
        } else {
            // They remember the disk of before.
            images.retain(|image, _| image.is_disk());
        }
        (request, images)
    }

    pub(crate) fn committed(&mut self, name: Name, number: u64, images: Images) {
        assert!(
            self.given.entry(name.clone()).or_default().insert(number),
            "{name}@{number} was given out before"
        );
        self.snapshots.insert((name, number), images);
    }

    pub(crate) fn check(&self, store: &Store) {
        let listing = store.list(None).unwrap();
        assert!(listing.damaged.is_empty(), "{:?}", listing.damaged);
        let listed: Vec<_> = listing.snapshots.iter().map(|m| (m.name.clone(), m.number)).collect();
        assert_eq!(listed, self.snapshots.keys().cloned().collect::<Vec<_>>());
        for ((name, number), images) in &self.snapshots {
            check_snapshot(store, name, *number, images);
        }
    }

    fn step(&mut self, store: &mut Store, disk: &SimDisk) {
        match self.chance.below(20) {
            0..=9 => {
                let (request, images) = self.commit();
                let name = request.name.clone();
                let report = store.commit(request, Job::quiet()).unwrap();
                self.committed(name, report.manifest.number, images);
            }
            10..=12 => {
                if let Some((name, number)) = self.some_snapshot() {
                    store.remove(&SnapRef { name: name.clone(), number: Some(number) }).unwrap();
                    self.snapshots.remove(&(name, number));
                }
            }
            13 => {
                if let Some((name, _)) = self.some_snapshot() {
                    let keep = KeepRules { last: 2, ..KeepRules::default() };
                    store.prune(&name, &keep, false).unwrap();
                    let numbers: Vec<u64> = self
                        .snapshots
                        .keys()
                        .filter(|(n, _)| *n == name)
                        .map(|(_, n)| *n)
                        .collect();
                    for number in &numbers[..numbers.len().saturating_sub(2)] {
                        self.snapshots.remove(&(name.clone(), *number));
                    }
                }
            }
            14..=15 => drop(store.gc(&GcOptions::default(), Job::quiet()).unwrap()),
            16..=17 => drop(store.compact(&EAGER, Job::quiet()).unwrap()),
            18 => *store = Store::open_on(Arc::new(disk.clone()), small_config()).unwrap(),
            _ => {
                // The index is derived: without it the store must do as well.
                for path in disk.paths().iter().filter(|path| path.ends_with(".run")) {
                    disk.remove(path).unwrap();
                }
            }
        }
    }
}

pub(crate) fn check_snapshot(store: &Store, name: &Name, number: u64, images: &Images) {
    let snapshot = store.snapshot(&SnapRef { name: name.clone(), number: Some(number) }).unwrap();
    let listed: Vec<_> = snapshot.manifest().images.iter().map(|e| e.image.clone()).collect();
    assert_eq!(listed, images.keys().cloned().collect::<Vec<_>>());
    for (image, bytes) in images {
        let reader = snapshot.image(image).unwrap();
        let mut read = vec![0xaa; bytes.len()];
        assert_eq!(reader.size_bytes(), bytes.len() as u64, "{name}@{number}:{image}");
        reader.read_at(&mut read, 0).unwrap();
        assert!(read == *bytes, "{name}@{number}:{image} differs");
    }
}

#[test]
fn the_store_does_what_the_model_does() {
    for seed in 0..12 {
        let disk = SimDisk::new(seed);
        let mut store = Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
        let mut model = Model::new(seed);
        for _ in 0..60 {
            model.step(&mut store, &disk);
            model.check(&store);
        }
        // With everything removed nothing is left.
        for (name, number) in model.snapshots.keys() {
            store.remove(&SnapRef { name: name.clone(), number: Some(*number) }).unwrap();
        }
        store.gc(&GcOptions::default(), Job::quiet()).unwrap();
        let left: Vec<_> = disk
            .paths()
            .into_iter()
            .filter(|path| ["packs/", "tmp/", "pins/"].iter().any(|kind| path.starts_with(kind)))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
