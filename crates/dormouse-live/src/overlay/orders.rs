//! Writers, readers, flushes, seals and power cuts in thousands of orders that shuttle chooses.
//!
//! What runs is the code of this crate itself, see `sync.rs`; another thread may go on at each
//! lock, atomic and operation of a file. All orders are those of sequential consistency: what
//! weaker orderings of atomics allow beyond them is left to `tests/it/threads.rs`.
//!
//! Each rule was broken once to see that it is noticed: a seal that does not wait for writers
//! (without [`Overlay::drain_stripes`]); a stack that is looked up before the stripes are locked;
//! a seal that does not ask whether there is another one; a state that is set before its bytes
//! are written; changed states that are taken after the data was synced; data that is called
//! pending before it is written; a flush that believes a round which began before it, or flushes
//! the top only; a rebase that changes the stack before the description, or removes files before
//! it; a new layer that is not described; and a fold that does not flush or drops the wrong layer.

mod medium;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, MaxSteps, Runner, thread};

use super::{NewOverlay, Overlay, OverlayConfig, Sealed, SealedRun, Zeroing};
use crate::base::{Base, BlankBase, RunKind};
use crate::description::LAYERS_MAX;
use crate::error::{ErrorKind, Result};
use crate::files::Folder;
use medium::MemFolder;

const BLOCK: usize = 4096;

/// Two stripes.
const BLOCKS: usize = 66;

/// Blocks that are looked at: two of one stripe, one of the next.
const PLACES: [usize; 3] = [0, 1, 65];

/// Logs are written anew as soon as they may be.
const CONFIG: OverlayConfig = OverlayConfig { log_bytes_min: 0, ..OverlayConfig::STANDARD };

/// Tries a scenario in `count` orders of each kind: any order, and few preemptions at odd places.
fn explore(count: usize, scenario: fn()) {
    let config = || {
        let mut config = Config::new();
        config.stack_size = 512 << 10;
        config.max_steps = MaxSteps::FailAfter(1_000_000);
        config.silence_warnings = true;
        config
    };
    let any = Runner::new(RandomScheduler::new_from_seed(7, count), config()).run(scenario);
    let few = Runner::new(PctScheduler::new_from_seed(7, 3, count), config()).run(scenario);
    assert_eq!((any, few), (count, count));
}

/// The bytes of a whole disk.
#[derive(Debug)]
struct BytesBase(Vec<u8>);

impl Base for BytesBase {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let offset = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.0[offset..offset + buf.len()]);
        Ok(())
    }

    fn for_each_run(
        &self,
        range: std::ops::Range<u64>,
        visit: &mut dyn FnMut(std::ops::Range<u64>, RunKind) -> Result<()>,
    ) -> Result<()> {
        visit(range, RunKind::Data)
    }
}

/// A disk, and what is known of the versions of its places. A block has its version in each byte.
struct Scene {
    folder: Arc<MemFolder>,
    disk: Overlay,
    /// The bases by their labels.
    bases: Mutex<Vec<Arc<BytesBase>>>,
    begun: [AtomicU64; 3],
    done: [AtomicU64; 3],
    flushed: [AtomicU64; 3],
}

impl Scene {
    fn new() -> Arc<Scene> {
        let folder = Arc::new(MemFolder::default());
        let new = NewOverlay {
            size_bytes: (BLOCKS * BLOCK) as u64,
            base: Arc::new(BlankBase),
            base_label: "0".to_owned(),
        };
        let files = Arc::clone(&folder);
        let disk = Overlay::create(files, new, CONFIG).unwrap();
        let slots = || [const { AtomicU64::new(0) }; 3];
        let bases = Mutex::new(vec![Arc::new(BytesBase(vec![0; BLOCKS * BLOCK]))]);
        let (begun, done, flushed) = (slots(), slots(), slots());
        Arc::new(Scene { folder, disk, bases, begun, done, flushed })
    }

    /// Writes a version to a place.
    fn write(&self, place: usize, version: u64) {
        self.begun[place].store(version, Ordering::SeqCst);
        let offset = (PLACES[place] * BLOCK) as u64;
        match is_zero(place, version) {
            true if version.is_multiple_of(2) => {
                self.disk.write_zeroes(offset, BLOCK as u64, Zeroing::Free).unwrap();
            }
            true => self.disk.write_at(&[0; BLOCK], offset).unwrap(),
            false => {
                let byte = u8::try_from(version).unwrap();
                self.disk.write_at(&[byte; BLOCK], offset).unwrap();
            }
        }
        self.done[place].store(version, Ordering::SeqCst);
    }

    fn flush(&self) {
        let done = load(&self.done);
        self.disk.flush().unwrap();
        for (flushed, version) in self.flushed.iter().zip(done) {
            flushed.fetch_max(version, Ordering::SeqCst);
        }
        self.cut();
    }

    /// Commits: seals, looks at what is sealed twice, and rebases.
    fn commit(&self) -> Vec<u8> {
        let content = self.seal_and_look(|sealed, content| self.rebase(sealed, content.to_vec()));
        let after = self.read();
        assert_versions(&after, versions(&content), load(&self.begun), "after a rebase");
        content
    }

    fn rebase(&self, sealed: Sealed, content: Vec<u8>) {
        let base = Arc::new(BytesBase(content));
        let mut bases = self.bases.lock().unwrap();
        let label = bases.len().to_string();
        bases.push(Arc::clone(&base));
        drop(bases);
        self.disk.rebase(sealed, base, &label).unwrap();
    }

    /// A commit that fails after a while.
    fn fail_commit(&self) {
        self.seal_and_look(|sealed, _| drop(sealed));
    }

    fn seal_and_look(&self, then: impl FnOnce(Sealed, &[u8])) -> Vec<u8> {
        let low = load(&self.done);
        let sealed = self.disk.seal().unwrap();
        let high = load(&self.begun);
        let below = Arc::clone(self.bases.lock().unwrap().last().unwrap());
        let content = content(&sealed, &below.0);
        assert_versions(&content, low, high, "a seal");
        for place in PLACES {
            let block = &content[place * BLOCK..][..BLOCK];
            assert!(block.iter().all(|byte| *byte == block[0]), "half a write in a seal");
        }
        assert!(self::content(&sealed, &below.0) == content, "a sealed layer changed");
        then(sealed, &content);
        content
    }

    fn read(&self) -> Vec<u8> {
        read(&self.disk)
    }

    /// What a power cut at this moment would leave has all that was flushed before it.
    fn cut(&self) {
        let low = load(&self.flushed);
        let left = self.folder.after_power_cut();
        let high = load(&self.begun);
        let bases = self.bases.lock().unwrap().clone();
        let disk = Overlay::open(Arc::new(left), CONFIG, |description| {
            let number: usize = description.base_label.parse().unwrap();
            Ok(Arc::clone(&bases[number]) as Arc<dyn Base>)
        })
        .unwrap();
        assert_versions(&read(&disk), low, high, "a power cut");
    }
}

/// The last place has zeros at times. In the others zeros are what was there before all versions.
fn is_zero(place: usize, version: u64) -> bool {
    version == 0 || place == 2 && version.is_multiple_of(3)
}

/// The whole disk, of which only the places are looked at.
fn read(disk: &Overlay) -> Vec<u8> {
    let mut content = vec![0xee; BLOCKS * BLOCK];
    for place in PLACES {
        disk.read_at(&mut content[place * BLOCK..][..BLOCK], (place * BLOCK) as u64).unwrap();
    }
    content
}

fn load(slots: &[AtomicU64; 3]) -> [u64; 3] {
    [0, 1, 2].map(|place| slots[place].load(Ordering::SeqCst))
}

fn content(sealed: &Sealed, below: &[u8]) -> Vec<u8> {
    let mut content = below.to_vec();
    let visit = &mut |range: std::ops::Range<u64>, run| {
        let bytes = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        match run {
            SealedRun::Zero => content[bytes].fill(0),
            SealedRun::Dirty => sealed.read_at(&mut content[bytes], range.start)?,
        }
        Ok(())
    };
    sealed.for_each_run(visit).unwrap();
    content
}

/// The versions that the places begin with; zeros are 0.
fn versions(content: &[u8]) -> [u64; 3] {
    PLACES.map(|place| u64::from(content[place * BLOCK]))
}

/// Each half of a place has a version that was written: the lowest, the highest or one between.
fn assert_versions(content: &[u8], low: [u64; 3], high: [u64; 3], what: &str) {
    for place in 0..3 {
        for half in content[PLACES[place] * BLOCK..][..BLOCK].chunks(BLOCK / 2) {
            assert!(half.iter().all(|byte| *byte == half[0]), "{what}: a torn sector");
            let seen = u64::from(half[0]);
            let (low, high) = (low[place], high[place]);
            let is_known = match seen {
                0 => (low..=high).any(|version| is_zero(place, version)),
                _ => (low..=high).contains(&seen),
            };
            assert!(is_known, "{what}: place {place} has {seen}, not {low} to {high}");
        }
    }
}

fn join(threads: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn spawn(scene: &Arc<Scene>, work: impl FnOnce(&Scene) + Send + 'static) -> thread::JoinHandle<()> {
    let scene = Arc::clone(scene);
    thread::spawn(move || work(&scene))
}

/// All that was acknowledged before a seal is in it, nothing of it changes, and of what is written
/// meanwhile nothing is without what the same writer wrote before.
#[test]
fn a_seal_is_of_one_moment() {
    explore(300, || {
        let scene = Scene::new();
        scene.write(0, 1);
        scene.write(2, 1);
        let writer = spawn(&scene, |scene| {
            for version in 2..5 {
                scene.write(0, version);
                scene.write(2, version);
            }
        });
        let neighbour = spawn(&scene, |scene| (1..4).for_each(|version| scene.write(1, version)));
        let sealer = spawn(&scene, |scene| {
            for round in 0..2 {
                let content = if round == 0 {
                    scene.commit()
                } else {
                    scene.seal_and_look(|sealed, _| drop(sealed))
                };
                let [first, _, second] = versions(&content);
                assert!(first >= second, "{second} without what came before");
            }
        });
        join([writer, neighbour, sealer]);
        let done = load(&scene.done);
        assert_versions(&scene.read(), done, done, "the end");
    });
}

/// A reader never sees an older version than it saw before, whatever is swapped below it.
#[test]
fn readers_see_no_older_versions() {
    explore(250, || {
        let scene = Scene::new();
        scene.write(0, 1);
        let writer = spawn(&scene, |scene| (2..8).for_each(|version| scene.write(0, version)));
        let sealer = spawn(&scene, |scene| {
            scene.commit();
            scene.fail_commit();
            scene.commit();
        });
        let reader = spawn(&scene, |scene| {
            for _ in 0..6 {
                let low = load(&scene.done);
                let seen = scene.read();
                assert_versions(&seen, low, load(&scene.begun), "a read");
            }
        });
        join([writer, sealer, reader]);
    });
}

/// Parts of one block by two writers, over a block that lies in a sealed layer or in the base.
#[test]
fn parts_of_a_block_come_together_over_a_seal() {
    explore(400, || {
        let scene = Scene::new();
        scene.disk.write_at(&[9; BLOCK], 0).unwrap();
        let parts = [0_u64, 2048].map(|at| {
            spawn(&scene, move |scene| {
                for byte in 1..4 {
                    scene.disk.write_at(&[byte; 1024], at).unwrap();
                }
            })
        });
        let sealer = spawn(&scene, |scene| {
            for _ in 0..2 {
                let sealed = scene.disk.seal().unwrap();
                let mut bytes = vec![0; BLOCK];
                sealed.read_at(&mut bytes, 0).unwrap();
                for quarter in bytes.chunks(1024) {
                    assert!(quarter.iter().all(|byte| *byte == quarter[0]), "half a write");
                }
                assert_eq!((bytes[1024], bytes[3072]), (9, 9), "a part that nobody wrote");
                let mut again = vec![0; BLOCK];
                sealed.read_at(&mut again, 0).unwrap();
                assert!(bytes == again, "a sealed layer changed");
                bytes.resize(BLOCKS * BLOCK, 0);
                scene.disk.rebase(sealed, Arc::new(BytesBase(bytes)), "1").unwrap();
            }
        });
        join(parts.into_iter().chain([sealer]));
        let mut bytes = vec![0; BLOCK];
        scene.disk.read_at(&mut bytes, 0).unwrap();
        let quarters: Vec<u8> = bytes.chunks(1024).map(|quarter| quarter[0]).collect();
        assert_eq!(quarters, [3, 9, 3, 9]);
    });
}

/// The power goes at any moment of writes, flushes and commits beside each other.
#[test]
fn what_is_flushed_survives_beside_commits() {
    explore(200, || {
        let scene = Scene::new();
        let writers = [0, 2].map(|place| {
            spawn(&scene, move |scene| {
                for version in 1..5 {
                    scene.write(place, version);
                    if version % 2 == 0 {
                        scene.flush();
                    }
                }
            })
        });
        let sealer = spawn(&scene, |scene| {
            scene.commit();
            scene.fail_commit();
            scene.commit();
        });
        let cutter = spawn(&scene, |scene| {
            for _ in 0..12 {
                scene.cut();
            }
        });
        join(writers.into_iter().chain([sealer, cutter]));
        scene.flush();
    });
}

/// A flush that no longer finds the sealed layers relies on the new base alone.
#[test]
fn a_flush_beside_a_rebase() {
    explore(800, || {
        let scene = Scene::new();
        scene.write(0, 1);
        let sealed = scene.disk.seal().unwrap();
        let sealer = spawn(&scene, |scene| {
            let mut content = vec![0; BLOCKS * BLOCK];
            content[..BLOCK].fill(1);
            scene.rebase(sealed, content);
        });
        let writer = spawn(&scene, |scene| {
            scene.write(1, 1);
            scene.flush();
        });
        join([sealer, writer]);
    });
}

/// No power cut finds a block that a log calls dirty, but whose bytes were not synced.
#[test]
fn a_state_is_never_ahead_of_its_bytes() {
    const BASE: u8 = 7;
    explore(1500, || {
        let folder = Arc::new(MemFolder::default());
        let base: Arc<dyn Base> = Arc::new(BytesBase(vec![BASE; BLOCKS * BLOCK]));
        let new = NewOverlay {
            size_bytes: (BLOCKS * BLOCK) as u64,
            base: Arc::clone(&base),
            base_label: String::new(),
        };
        let disk = Overlay::create(Arc::clone(&folder) as Arc<dyn Folder>, new, CONFIG).unwrap();
        let disk = Arc::new(disk);
        let writer = Arc::clone(&disk);
        let writer = thread::spawn(move || {
            for block in 0..2 {
                writer.write_at(&[1; BLOCK], block * BLOCK as u64).unwrap();
            }
        });
        let flush_and_cut = || {
            disk.flush().unwrap();
            let left = Arc::new(folder.after_power_cut());
            let left = Overlay::open(left, CONFIG, |_| Ok(Arc::clone(&base))).unwrap();
            let mut bytes = vec![0; 2 * BLOCK];
            left.read_at(&mut bytes, 0).unwrap();
            bytes
        };
        for _ in 0..3 {
            let bytes = flush_and_cut();
            assert!(bytes.iter().all(|byte| [BASE, 1].contains(byte)), "nobody wrote that");
        }
        writer.join().unwrap();
        assert!(flush_and_cut().iter().all(|byte| *byte == 1), "a flush missed a write");
    });
}

/// Layers that are too many are folded while they are read, written over and cut off.
#[test]
fn layers_are_folded_under_readers() {
    explore(80, || {
        let scene = Scene::new();
        for version in 1..LAYERS_MAX as u64 {
            scene.write(0, version);
            if version % 2 == 0 {
                scene.write(2, version);
            }
            drop(scene.disk.seal().unwrap());
        }
        scene.flush();
        let writer = spawn(&scene, |scene| {
            (8..12).for_each(|version| scene.write(2, version));
            scene.flush();
        });
        let sealer = spawn(&scene, |scene| {
            scene.fail_commit();
            scene.commit();
        });
        let reader = spawn(&scene, |scene| {
            for _ in 0..5 {
                let low = load(&scene.done);
                let seen = scene.read();
                assert_versions(&seen, low, load(&scene.begun), "a read");
                scene.cut();
            }
        });
        join([writer, sealer, reader]);
        let done = load(&scene.done);
        assert_versions(&scene.read(), done, done, "the end");
    });
}

/// Of two commits at once one is refused, or both come one after the other.
#[test]
fn one_commit_at_a_time() {
    explore(300, || {
        let scene = Scene::new();
        scene.write(0, 1);
        let at_once = Arc::new(AtomicU64::new(0));
        let sealers = [1, 2].map(|_| {
            let at_once = Arc::clone(&at_once);
            spawn(&scene, move |scene| match scene.disk.seal() {
                Ok(sealed) => {
                    assert_eq!(at_once.fetch_add(1, Ordering::SeqCst), 0, "two at once");
                    // As long as a seal takes.
                    (0..100).for_each(|_| thread::yield_now());
                    at_once.fetch_sub(1, Ordering::SeqCst);
                    drop(sealed);
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::Busy),
            })
        });
        let writer = spawn(&scene, |scene| scene.write(0, 2));
        join(sealers.into_iter().chain([writer]));
        drop(scene.disk.seal().unwrap());
    });
}
