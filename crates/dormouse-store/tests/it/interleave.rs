//! Two processes at once, one stopped at each of its steps until the other has come to each of its
//! own: a commit on one side, a collection or compaction on the other.
//!
//! Whatever the order, a commit that says it succeeded restores bit for bit, and so does everything
//! that was there before.

use std::fmt::Debug;
use std::io;
use std::sync::{Arc, Condvar, Mutex};

use dormouse_store::commit::{CommitReport, CommitRequest, Parent};
use dormouse_store::disk::{DirEntry, Disk, DiskFile, DiskLock, DiskWriter, LockKind, LockWait};
use dormouse_store::error::Result;
use dormouse_store::gc::{CompactOptions, GcOptions};
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::Store;
use dormouse_testkit::sim_disk::{SimDisk, Survive};

use crate::commit::{blocks, name};
use crate::model::{EAGER, small_config};
use crate::usage::forget_index;

/// What the other side is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// Stopped at the step that was asked for.
    Paused,
    /// Waits for `gc.lock`.
    Blocked,
    Done,
}

#[derive(Debug)]
struct Progress {
    phase: Phase,
    steps: u64,
    /// Where it stops: at so many steps, and before it publishes.
    pause_at: u64,
    pauses_to_publish: bool,
    /// How often it stopped, and how often it was sent on.
    stops: u64,
    sent_on: u64,
    holds_gc_lock: bool,
}

/// Where a process is stopped and sent on.
#[derive(Debug)]
struct Gate {
    progress: Mutex<Progress>,
    changed: Condvar,
}

impl Gate {
    fn new(pause_at: u64, pauses_to_publish: bool) -> Arc<Gate> {
        let progress = Progress {
            phase: Phase::Running,
            steps: 0,
            pause_at,
            pauses_to_publish,
            stops: 0,
            sent_on: 0,
            holds_gc_lock: false,
        };
        Arc::new(Gate { progress: Mutex::new(progress), changed: Condvar::new() })
    }

    /// Counts a step and stops where that was asked for. Who holds `gc.lock` is not stopped, as the
    /// other side could not go on.
    fn step(&self, publishes: bool) {
        let mut progress = self.progress.lock().unwrap();
        if progress.holds_gc_lock {
            return;
        }
        progress.steps += 1;
        if progress.steps == progress.pause_at || (publishes && progress.pauses_to_publish) {
            progress.phase = Phase::Paused;
            progress.stops += 1;
            self.changed.notify_all();
            while progress.sent_on < progress.stops {
                progress = self.changed.wait(progress).unwrap();
            }
            progress.phase = Phase::Running;
        }
    }

    fn set(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.progress.lock().unwrap());
        self.changed.notify_all();
    }

    /// Waits until the process stands still, and says how.
    fn wait(&self) -> Phase {
        let mut progress = self.progress.lock().unwrap();
        while progress.phase == Phase::Running
            || (progress.phase == Phase::Paused && progress.sent_on >= progress.stops)
        {
            progress = self.changed.wait(progress).unwrap();
        }
        progress.phase
    }

    /// Sends the process on until it stands still again.
    fn send_on(&self) {
        self.set(|progress| progress.sent_on += 1);
        self.wait();
    }
}

/// What is called before each operation, with whether it is the one that publishes a manifest.
type Before = Box<dyn Fn(bool) + Send + Sync>;

/// A disk on which something happens before each operation.
struct Watched {
    disk: SimDisk,
    before: Before,
    /// The gate of the process whose disk this is, if it can be stopped.
    gate: Option<Arc<Gate>>,
}

impl Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watched")
    }
}

/// Tells the gate when `gc.lock` is let go.
#[derive(Debug)]
struct WatchedLock {
    lock: Option<Box<dyn DiskLock>>,
    gate: Arc<Gate>,
}

impl DiskLock for WatchedLock {}

impl Drop for WatchedLock {
    fn drop(&mut self) {
        self.lock = None;
        self.gate.set(|progress| progress.holds_gc_lock = false);
    }
}

impl Disk for Watched {
    fn open(&self, path: &str) -> io::Result<Arc<dyn DiskFile>> {
        (self.before)(false);
        self.disk.open(path)
    }

    fn create(&self, path: &str) -> io::Result<Box<dyn DiskWriter>> {
        (self.before)(false);
        self.disk.create(path)
    }

    fn append(&self, path: &str) -> io::Result<Box<dyn DiskWriter>> {
        (self.before)(false);
        self.disk.append(path)
    }

    fn list(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        (self.before)(false);
        self.disk.list(path)
    }

    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        (self.before)(false);
        self.disk.create_dir_all(path)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        (self.before)(false);
        self.disk.rename(from, to)
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        (self.before)(true);
        self.disk.link(from, to)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        (self.before)(false);
        self.disk.remove(path)
    }

    fn remove_dir(&self, path: &str) -> io::Result<()> {
        (self.before)(false);
        self.disk.remove_dir(path)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        (self.before)(false);
        self.disk.sync_dir(path)
    }

    fn allocated_bytes(&self, path: &str) -> io::Result<u64> {
        (self.before)(false);
        self.disk.allocated_bytes(path)
    }

    fn lock(
        &self,
        path: &str,
        kind: LockKind,
        wait: LockWait,
        create: bool,
    ) -> io::Result<Option<Box<dyn DiskLock>>> {
        (self.before)(false);
        let Some(gate) = self.gate.as_ref().filter(|_| path == "gc.lock") else {
            return self.disk.lock(path, kind, wait, create);
        };
        let mut lock = self.disk.lock(path, kind, LockWait::Try, create)?;
        if lock.is_none() && wait == LockWait::Wait {
            gate.set(|progress| progress.phase = Phase::Blocked);
            lock = self.disk.lock(path, kind, wait, create)?;
            gate.set(|progress| progress.phase = Phase::Running);
        }
        Ok(lock.map(|lock| {
            gate.set(|progress| progress.holds_gc_lock = true);
            Box::new(WatchedLock { lock: Some(lock), gate: Arc::clone(gate) }) as Box<dyn DiskLock>
        }))
    }
}

fn numbers(range: std::ops::Range<u32>) -> Vec<u32> {
    range.collect()
}

fn request(text: &str, parent: Parent, numbers: &[u32]) -> CommitRequest {
    let source = Source::Bytes(blocks(numbers).into());
    CommitRequest { parent, ..CommitRequest::new(name(text)) }
        .image("disk/root".parse().unwrap(), source)
}

/// Snapshots `vm@2` and `old@1`, a pack that is dead and packs that are dead in part.
fn with_history() -> SimDisk {
    let disk = SimDisk::new(7);
    let store = Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
    let commit = |request| drop(store.commit(request, Job::quiet()).unwrap());
    commit(request("old", Parent::Auto, &numbers(300..340)));
    commit(request("gone", Parent::Auto, &numbers(100..140)));
    store.compact(&EAGER, Job::quiet()).unwrap();
    commit(request("vm", Parent::Auto, &numbers(1..41)));
    commit(request("vm", Parent::Auto, &[numbers(1..11), numbers(50..60)].concat()));
    for snap in ["gone@1", "vm@1"] {
        store.remove(&snap.parse().unwrap()).unwrap();
    }
    disk
}

fn read(store: &Store, snap: &str) -> Result<Vec<u8>> {
    let snapshot = store.snapshot(&snap.parse().unwrap())?;
    let image = snapshot.image(&"disk/root".parse::<ImageName>().unwrap())?;
    let mut bytes = vec![0xaa; usize::try_from(image.size_bytes()).unwrap()];
    image.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// A commit beside something else.
struct Race<'a> {
    history: SimDisk,
    commit: &'a (dyn Fn(&Store) -> Result<CommitReport> + Sync),
    /// What the commit's image must hold.
    expected: &'a [u32],
    other: &'a dyn Fn(&Store),
}

impl Race<'_> {
    /// Stops the commit at step `pause_at`, and if asked before it publishes, and sends it on when
    /// the other side has come to each step of `resume_at`. Returns how often it stopped, and how
    /// often it was sent on before the other side ended.
    fn run(&self, pause_at: u64, pauses_to_publish: bool, resume_at: &[u64]) -> (u64, u64) {
        let disk = self.history.after_power_cut(Survive::Everything);
        let gate = Gate::new(pause_at, pauses_to_publish);
        let at_gate = Arc::clone(&gate);
        let committer = Watched {
            disk: disk.clone(),
            before: Box::new(move |publishes| at_gate.step(publishes)),
            gate: Some(Arc::clone(&gate)),
        };
        let (steps, at_gate, resume) = (Mutex::new(0), Arc::clone(&gate), resume_at.to_vec());
        let watcher = Watched {
            disk: disk.clone(),
            before: Box::new(move |_| {
                let mut steps = steps.lock().unwrap();
                *steps += 1;
                if resume.contains(&*steps) {
                    at_gate.send_on();
                }
            }),
            gate: None,
        };
        let (report, sent_on) = std::thread::scope(|scope| {
            let committing = scope.spawn(|| {
                let store = Store::open_on(Arc::new(committer), small_config()).unwrap();
                let report = (self.commit)(&store);
                gate.set(|progress| progress.phase = Phase::Done);
                report
            });
            gate.wait();
            let store = Store::open_on(Arc::new(watcher), small_config()).unwrap();
            (self.other)(&store);
            let sent_on = gate.progress.lock().unwrap().sent_on;
            gate.set(|progress| progress.sent_on = u64::MAX);
            (committing.join().unwrap(), sent_on)
        });
        let what = format!("stopped at {pause_at}, sent on at {resume_at:?} of the other");
        let store = Store::open_on(Arc::new(disk), small_config()).unwrap();
        if let Ok(report) = report {
            let snap = report.manifest.display_name();
            let found = read(&store, &snap).unwrap_or_else(|error| {
                panic!("{what}: {error}: {:?}", std::error::Error::source(&error))
            });
            assert!(found == blocks(self.expected), "{what}: {snap} differs");
        }
        assert!(read(&store, "old@1").unwrap() == blocks(&numbers(300..340)), "{what}");
        let stops = gate.progress.lock().unwrap().stops;
        (stops, sent_on)
    }

    /// Stops the commit at each of its steps until each step of the other side. Returns how many
    /// orders there were.
    fn stop_everywhere(&self) -> u64 {
        let mut orders = 0;
        for pause_at in 1.. {
            for resume_at in 1.. {
                orders += 1;
                let (stops, sent_on) = self.run(pause_at, false, &[resume_at]);
                if stops == 0 {
                    return orders;
                }
                if sent_on == 0 {
                    break;
                }
            }
        }
        unreachable!("the commit ends")
    }

    /// Lets the commit capture at any step of the other side and publish at any later one.
    fn capture_and_publish_everywhere(&self) -> u64 {
        let mut orders = 0;
        for capture_at in 1.. {
            for publish_at in capture_at + 1.. {
                orders += 1;
                let (_, sent_on) = self.run(1, true, &[capture_at, publish_at]);
                if sent_on == 0 {
                    return orders;
                }
                if sent_on == 1 {
                    break;
                }
            }
        }
        unreachable!("the other side ends")
    }
}

/// A commit that relies on blocks which nothing else refers to any more, of packs that are dead or
/// dead in part, and on its own pack.
fn relying_commit(store: &Store) -> Result<CommitReport> {
    store.commit(request("new", Parent::None, &relying_blocks()), Job::quiet())
}

fn relying_blocks() -> Vec<u32> {
    [numbers(15..25), numbers(105..125), numbers(200..210), numbers(1..5)].concat()
}

/// The collector read the manifests first and the pins after them. A commit that published and let
/// go of its pin between the two was in neither, and its pack was deleted under a snapshot that had
/// just been said to stand.
#[test]
fn a_commit_and_a_collection_in_every_order() {
    let race = Race {
        history: with_history(),
        commit: &relying_commit,
        expected: &relying_blocks(),
        other: &|store| {
            store.gc(&GcOptions::default(), Job::quiet()).unwrap();
        },
    };
    assert!(race.stop_everywhere() > 1000);
    assert!(race.capture_and_publish_everywhere() > 1000);
}

/// As with the collector: before old files went, manifests were read, then pins, and slots that a
/// commit had come to rely on between the two were dropped.
#[test]
fn a_commit_and_a_compaction_in_every_order() {
    let race = Race {
        history: with_history(),
        commit: &relying_commit,
        expected: &relying_blocks(),
        other: &|store| {
            store.compact(&EAGER, Job::quiet()).unwrap();
        },
    };
    assert!(race.stop_everywhere() > 1000);
    assert!(race.capture_and_publish_everywhere() > 1000);
}

/// The parent goes away while a commit over it runs: what it inherits is held by the pin alone.
#[test]
fn a_parent_removed_and_collected_meanwhile() {
    let expected = [numbers(1..8), numbers(400..404), numbers(51..60)].concat();
    let race = Race {
        history: with_history(),
        commit: &|store| {
            let parent = Parent::Snapshot("vm@2".parse().unwrap());
            store.commit(request("new", parent, &expected), Job::quiet())
        },
        expected: &expected,
        other: &|store| {
            store.remove(&"vm@2".parse().unwrap()).unwrap();
            store.gc(&GcOptions::default(), Job::quiet()).unwrap();
            store.compact(&EAGER, Job::quiet()).unwrap();
        },
    };
    assert!(race.stop_everywhere() > 1000);
}

/// A pack that lies in a bundle and, as a commit of the same content found no index, in a file of its
/// own as well. The compaction deleted the file, since the pack was dead; a commit then found the
/// pack in the bundle and held it; and the compaction, which had not read it there, deleted that.
#[test]
fn a_pack_that_is_there_twice_and_comes_to_life() {
    let disk = SimDisk::new(9);
    let store = Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
    let commit = |store: &Store, request| drop(store.commit(request, Job::quiet()).unwrap());
    commit(&store, request("first", Parent::None, &numbers(300..340)));
    commit(&store, request("twice", Parent::None, &numbers(100..140)));
    store.compact(&EAGER, Job::quiet()).unwrap();
    // Nobody made the bundle's packs, so it is compacted late, after the dead file.
    commit(&store, request("old", Parent::None, &numbers(300..340)));
    forget_index(&disk);
    let store = Store::open_on(Arc::new(disk.clone()), small_config()).unwrap();
    commit(&store, request("again", Parent::None, &numbers(100..140)));
    for snap in ["first@1", "twice@1", "again@1"] {
        store.remove(&snap.parse().unwrap()).unwrap();
    }
    let expected = numbers(105..125);
    let race = Race {
        history: disk.after_power_cut(Survive::Everything),
        commit: &|store| store.commit(request("new", Parent::None, &expected), Job::quiet()),
        expected: &expected,
        other: &|store| {
            // A bundle for each file.
            let apart = CompactOptions { bundle_bytes: 1, ..EAGER };
            store.compact(&apart, Job::quiet()).unwrap();
        },
    };
    assert!(race.stop_everywhere() > 500);
    assert!(race.capture_and_publish_everywhere() > 500);
}
