//! A disk in memory that forgets, reorders and tears what was not synced.
//!
//! What a power cut may leave, exactly as little as [`Disk`] promises:
//!
//! - of a file, every byte and the length as of the last good [`DiskWriter::sync`]. Of what was
//!   appended since, each sector of 512 bytes survives or not by itself, as any of the pending
//!   writes left it, and so does the length: it may grow over sectors that read as zeroes;
//! - of a folder, the names as of the last [`Disk::sync_dir`], and any subset of the changes
//!   since, in their order. A rename within a folder is one change. Across folders it is two
//!   that know nothing of each other: afterwards the file may have both names, or neither;
//! - folders made by [`Disk::create_dir_all`], always. It settles those names alone.
//!
//! Two habits of real disks that are easily forgotten: a failed sync loses its pages (no later
//! sync of the file writes them out, as on Linux), and a failed write may have written a part.
//!
//! ```
//! use dormouse_store::disk::Disk;
//! use dormouse_testkit::sim_disk::{SimDisk, Survive};
//!
//! let disk = SimDisk::new(1);
//! let mut file = disk.create("footer")?;
//! file.write_all(b"whole")?;
//! file.sync()?;
//! assert!(disk.after_power_cut(Survive::Nothing).paths().is_empty(), "its name was not synced");
//!
//! disk.sync_dir("")?;
//! assert_eq!(disk.after_power_cut(Survive::Nothing).read("footer")?, b"whole");
//! # Ok::<(), std::io::Error>(())
//! ```

pub(crate) mod faults;
mod inode;
pub(crate) mod random;
mod tree;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use dormouse_store::disk::{DirEntry, Disk, DiskFile, DiskLock, DiskWriter, LockKind, LockWait};

use faults::{Effect, Faults, StepKind};
use inode::{Content, Inode};
use random::SplitMix64;
use tree::{Entry, Tree};

/// What becomes of the pending changes in a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survive {
    /// None reached the medium: only what was synced is there.
    Nothing,

    /// All reached it. This is also what the death of a process without a power cut leaves.
    Everything,

    /// Some did; the same seed chooses the same ones.
    Random(u64),
}

/// What becomes of the operation during which the power goes; it fails in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastStep {
    /// It never began.
    Undone,

    /// It got half way: a prefix of a write, some of the folders made, some names synced. A
    /// single name cannot be torn, so its change is pending as if it had been done.
    Torn,

    /// It was done, and only its answer got lost. A sync has then made things durable.
    Done,
}

/// A simulated disk. Clones are further handles to the same one.
///
/// Operations are counted to say when a fault happens: each call of a method of [`Disk`] or
/// [`DiskWriter`] that may change something, whether it succeeds or not, and a [`Disk::lock`]
/// that makes its file. Reading, listing and the methods of this type itself do not count.
#[derive(Clone)]
pub struct SimDisk {
    machine: Arc<Machine>,
}

impl SimDisk {
    /// An empty disk; the seed decides how far torn and failed writes get.
    pub fn new(seed: u64) -> SimDisk {
        SimDisk::with_tree(Tree::new(), SplitMix64::new(seed))
    }

    /// The operations so far, including the one that a power cut interrupted.
    pub fn operations(&self) -> u64 {
        self.machine.state().faults.operations()
    }

    /// Cuts the power during the `n`-th operation from now, before it has done anything: it and
    /// everything after it fail. The next operation is 1, and 0 cuts the power at once.
    pub fn cut_after(&self, n: u64) {
        self.cut_after_with(n, LastStep::Undone);
    }

    /// As [`SimDisk::cut_after`], and says what becomes of the `n`-th operation.
    pub fn cut_after_with(&self, n: u64, last: LastStep) {
        let mut state = self.machine.state();
        state.faults.cut_after(n, last);
        self.machine.tell_of_power(&state);
    }

    /// Whether the power is off.
    pub fn is_off(&self) -> bool {
        self.machine.state().faults.is_off()
    }

    /// A disk holding one of the states in which a power cut now could leave this medium, with
    /// no locks held and no faults to come but broken ranges. This disk stays as it is.
    pub fn after_power_cut(&self, survive: Survive) -> SimDisk {
        let state = self.machine.state();
        let seed = match survive {
            Survive::Nothing | Survive::Everything => 0,
            Survive::Random(seed) => seed,
        };
        let mut random = SplitMix64::new(seed);
        let tree = state.tree.after_power_cut(survive, &mut random);
        SimDisk::with_tree(tree, random)
    }

    /// Lets the `n`-th operation from now fail with `kind`, and only that one; the next is 1.
    /// A write may have written a part, a sync loses its pages, all else is undone.
    pub fn fail_at(&self, n: u64, kind: io::ErrorKind) {
        self.machine.state().faults.fail_at(n, kind);
    }

    /// Lets every operation from the `n`-th on fail with `kind`; the next is 1. If that is
    /// `StorageFull`, syncing and removing go on working, as they do on a full file system.
    pub fn fail_from(&self, n: u64, kind: io::ErrorKind) {
        self.machine.state().faults.fail_from(n, kind);
    }

    /// Takes back every fault to come: cuts and failures, not broken ranges.
    pub fn clear_faults(&self) {
        self.machine.state().faults.clear();
    }

    /// Lets every read that touches these bytes of a file fail with `EIO`, until
    /// [`SimDisk::write_raw`] replaces them. It goes with the file, not with the path.
    pub fn break_range(&self, path: &str, range: Range<u64>) -> io::Result<()> {
        self.machine.state().tree.file(path)?.content().break_range(range);
        Ok(())
    }

    /// Flips one bit of a file, counted from the lowest of its first byte.
    pub fn flip_bit(&self, path: &str, bit: u64) -> io::Result<()> {
        self.machine.state().tree.file(path)?.content().flip_bit(bit)
    }

    /// Shortens a file to `len` bytes.
    pub fn truncate(&self, path: &str, len: u64) -> io::Result<()> {
        self.machine.state().tree.file(path)?.content().truncate(len)
    }

    /// The whole of a file as the running system sees it, in spite of any fault.
    pub fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        Ok(self.machine.state().tree.file(path)?.content().bytes().to_vec())
    }

    /// Puts `bytes` on the medium as the content of a file, durable at once. A file that is
    /// missing is made, with its folders and with a durable name.
    pub fn write_raw(&self, path: &str, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.machine.state();
        match state.tree.file(path) {
            Ok(inode) => inode.content().replace(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some((folder, _)) = path.rsplit_once('/') {
                    state.tree.make_folders(folder, usize::MAX)?;
                }
                let place = state.tree.place(path)?;
                let inode = state.tree.make_inode(Content::settled(bytes.to_vec()));
                state.tree.set_settled(place, Entry::File(inode));
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// The paths of all files as the running system sees them, sorted.
    pub fn paths(&self) -> Vec<String> {
        self.machine.state().tree.paths()
    }

    fn with_tree(tree: Tree, random: SplitMix64) -> SimDisk {
        let state = State { tree, random, faults: Faults::default() };
        SimDisk { machine: Arc::new(Machine { state: Mutex::new(state), changed: Condvar::new() }) }
    }
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.machine.fmt(f)
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &str) -> io::Result<Arc<dyn DiskFile>> {
        let inode = self.machine.look()?.tree.file(path)?;
        let len = inode.content().bytes().len() as u64;
        Ok(Arc::new(SimFile { machine: Arc::clone(&self.machine), inode, len }))
    }

    fn create(&self, path: &str) -> io::Result<Box<dyn DiskWriter>> {
        let inode = self.machine.step(StepKind::Make, |state, _| state.create(path))?;
        Ok(Box::new(SimWriter { machine: Arc::clone(&self.machine), inode }))
    }

    fn append(&self, path: &str) -> io::Result<Box<dyn DiskWriter>> {
        let inode = self.machine.look()?.tree.file(path)?;
        Ok(Box::new(SimWriter { machine: Arc::clone(&self.machine), inode }))
    }

    fn list(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        let state = self.machine.look()?;
        let folder = state.tree.folder(path)?;
        let entry = |(name, entry): (&String, &Entry)| DirEntry {
            name: name.clone(),
            is_dir: matches!(entry, Entry::Folder(_)),
        };
        Ok(state.tree.list(folder).map(entry).collect())
    }

    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        self.machine.step(StepKind::Make, |state, effect| {
            let limit = match effect {
                Effect::Part => state.random.up_to(path.split('/').count()),
                Effect::Nothing | Effect::Whole => usize::MAX,
            };
            state.tree.make_folders(path, limit)
        })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.machine.step(StepKind::Make, |state, _| {
            let (from, to) = (state.tree.place(from)?, state.tree.place(to)?);
            let inode = match state.tree.entry(&from) {
                Some(Entry::File(inode)) => Arc::clone(inode),
                Some(Entry::Folder(_)) => {
                    let message = "only files are moved";
                    return Err(io::Error::new(io::ErrorKind::Unsupported, message));
                }
                None => return Err(io::ErrorKind::NotFound.into()),
            };
            match state.tree.entry(&to) {
                // POSIX: two names of one file both stay.
                Some(Entry::File(there)) if there.id == inode.id => return Ok(()),
                Some(Entry::Folder(_)) => return Err(io::ErrorKind::IsADirectory.into()),
                Some(Entry::File(_)) | None => {}
            }
            state.tree.rename(from, to, inode);
            Ok(())
        })
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.machine.step(StepKind::Make, |state, _| {
            let inode = state.tree.file(from).map_err(|error| match error.kind() {
                io::ErrorKind::IsADirectory => io::ErrorKind::PermissionDenied.into(),
                _ => error,
            })?;
            let to = state.tree.place(to)?;
            if state.tree.entry(&to).is_some() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            state.tree.set(to, Some(Entry::File(inode)));
            Ok(())
        })
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.machine.step(StepKind::Roomless, |state, _| {
            let place = state.tree.place(path)?;
            state.tree.file_at(&place)?;
            state.tree.set(place, None);
            Ok(())
        })
    }

    fn remove_dir(&self, path: &str) -> io::Result<()> {
        self.machine.step(StepKind::Roomless, |state, _| {
            let place = state.tree.place(path)?;
            let folder = state.tree.folder(path)?;
            if state.tree.list(folder).next().is_some() {
                return Err(io::ErrorKind::DirectoryNotEmpty.into());
            }
            state.tree.set(place, None);
            Ok(())
        })
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.machine.step(StepKind::Roomless, |state, effect| {
            let folder = state.tree.folder(path)?;
            let pending = state.tree.pending(folder);
            let limit = match effect {
                Effect::Part => state.random.up_to(pending),
                Effect::Nothing | Effect::Whole => pending,
            };
            state.tree.sync(folder, limit);
            Ok(())
        })
    }

    fn allocated_bytes(&self, path: &str) -> io::Result<u64> {
        Ok(self.machine.look()?.tree.file(path)?.content().allocated_bytes())
    }

    fn lock(
        &self,
        path: &str,
        kind: LockKind,
        wait: LockWait,
        create: bool,
    ) -> io::Result<Option<Box<dyn DiskLock>>> {
        let mut state = self.machine.look()?;
        loop {
            // Looked up anew after every wait: the path may name another file by then.
            let inode = match state.tree.file(path) {
                Err(error) if create && error.kind() == io::ErrorKind::NotFound => {
                    let made = state.step(StepKind::Make, |state, _| state.create(path));
                    self.machine.tell_of_power(&state);
                    made?
                }
                found => found?,
            };
            if inode.content().try_lock(kind) {
                let machine = Arc::clone(&self.machine);
                return Ok(Some(Box::new(SimLock { machine, inode, kind })));
            }
            if wait == LockWait::Try {
                return Ok(None);
            }
            state = self.machine.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.faults.power()?;
        }
    }
}

/// The machine that the disk is in: what its handles share.
struct Machine {
    /// Guards everything, and is taken before the content of an inode.
    state: Mutex<State>,

    /// A lock was released, or the power went.
    changed: Condvar,
}

impl Machine {
    fn state(&self) -> MutexGuard<'_, State> {
        // A test thread that panicked has shown its fault already.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, for an operation that changes nothing.
    fn look(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.state();
        state.faults.power()?;
        Ok(state)
    }

    /// Runs an operation that is counted and may fail.
    fn step<T>(
        &self,
        kind: StepKind,
        run: impl FnOnce(&mut State, Effect) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = self.state();
        let result = state.step(kind, run);
        self.tell_of_power(&state);
        result
    }

    /// Wakes those who wait for a lock if the power is off.
    fn tell_of_power(&self, state: &State) {
        if state.faults.is_off() {
            self.changed.notify_all();
        }
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDisk").finish_non_exhaustive()
    }
}

struct State {
    tree: Tree,
    random: SplitMix64,
    faults: Faults,
}

impl State {
    fn step<T>(
        &mut self,
        kind: StepKind,
        run: impl FnOnce(&mut State, Effect) -> io::Result<T>,
    ) -> io::Result<T> {
        let admission = self.faults.admit(kind);
        match (admission.effect, admission.error) {
            (Effect::Nothing, Some(error)) => Err(error),
            (effect, Some(error)) => {
                // The fault hides whatever the operation would have answered.
                let _ = run(self, effect);
                Err(error)
            }
            (effect, None) => run(self, effect),
        }
    }

    fn create(&mut self, path: &str) -> io::Result<Arc<Inode>> {
        let place = self.tree.place(path)?;
        if self.tree.entry(&place).is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let inode = self.tree.make_inode(Content::default());
        self.tree.set(place, Some(Entry::File(Arc::clone(&inode))));
        Ok(inode)
    }
}

#[derive(Debug)]
struct SimFile {
    machine: Arc<Machine>,
    inode: Arc<Inode>,
    len: u64,
}

impl DiskFile for SimFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        // Not held while copying: readers of different files do not wait for each other.
        drop(self.machine.look()?);
        self.inode.content().read_exact_at(buf, offset)
    }

    fn len(&self) -> u64 {
        self.len
    }
}

#[derive(Debug)]
struct SimWriter {
    machine: Arc<Machine>,
    inode: Arc<Inode>,
}

impl DiskWriter for SimWriter {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.machine.step(StepKind::Write, |state, effect| {
            let count = match effect {
                Effect::Part => state.random.up_to(bytes.len()),
                Effect::Nothing | Effect::Whole => bytes.len(),
            };
            self.inode.content().append(&bytes[..count]);
            Ok(())
        })
    }

    fn sync(&mut self) -> io::Result<()> {
        self.machine.step(StepKind::Sync, |_, effect| {
            match effect {
                Effect::Part => self.inode.content().fail_sync(),
                Effect::Nothing | Effect::Whole => self.inode.content().sync(),
            }
            Ok(())
        })
    }
}

/// A held lock; it stays with the inode, whatever becomes of the path.
#[derive(Debug)]
struct SimLock {
    machine: Arc<Machine>,
    inode: Arc<Inode>,
    kind: LockKind,
}

impl DiskLock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        let _state = self.machine.state();
        self.inode.content().unlock(self.kind);
        self.machine.changed.notify_all();
    }
}
