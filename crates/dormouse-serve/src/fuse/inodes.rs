//! The inodes that the kernel knows, by numbers that are made from what they stand for.
//!
//! A number is a hash of path and identity, so that a successor of this process gives the same
//! numbers, and finds an inode that it was never asked to look up by walking the tree. Two paths with
//! one number are as likely as a flipped bit that no checksum notices; the one that came later is
//! refused, so that nobody is given another's bytes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use twox_hash::XxHash3_64;

use super::open_file::OpenFile;

/// The root, by the protocol.
pub(super) const ROOT: u64 = 1;

/// An inode that the kernel knows or has open.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) number: u64,
    pub(super) path: Box<str>,

    /// How often it was told to the kernel, less what the kernel forgot. Changed under the table's
    /// lock.
    lookups: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How often it is open.
    opens: u64,
    file: Option<Arc<OpenFile>>,

    /// Where its line is in the handover.
    slot: Option<u32>,
}

impl State {
    fn is_closed(&self) -> bool {
        self.opens == 0 && self.file.is_none()
    }
}

/// What is open of an inode while it is being opened or closed; no other open or close of this
/// inode happens meanwhile.
#[derive(Debug)]
pub(super) struct Opening<'a>(MutexGuard<'a, State>);

/// The table of inodes.
#[derive(Debug, Default)]
pub(super) struct Inodes {
    /// Taken before an inode's own lock, which only an inode that nobody knows any more has waiting.
    table: RwLock<HashMap<u64, Arc<Inode>>>,
}

/// The number of an entry.
pub(super) fn number_of(path: &str, identity: u64) -> u64 {
    if path.is_empty() {
        return ROOT;
    }
    let number = XxHash3_64::oneshot_with_seed(identity, path.as_bytes());
    // Zero is no inode, one is the root, and some tools take all ones for an error.
    if number <= ROOT || number == u64::MAX { number ^ 0x5ca1_ab1e } else { number }
}

/// The path of an entry of a folder.
pub(super) fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

impl Inodes {
    /// An inode that is known.
    pub(super) fn get(&self, number: u64) -> Option<Arc<Inode>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).get(&number).cloned()
    }

    /// The inode of a path, counting `lookups`; none if another path has its number.
    pub(super) fn enter(&self, number: u64, path: &str, lookups: u64) -> Option<Arc<Inode>> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let inode = table.entry(number).or_insert_with(|| {
            let (lookups, state) = (AtomicU64::new(0), Mutex::default());
            Arc::new(Inode { number, path: path.into(), lookups, state })
        });
        if &*inode.path != path {
            tracing::error!(number, path, other = &*inode.path, "two paths share an inode number");
            return None;
        }
        inode.lookups.fetch_add(lookups, Ordering::Relaxed);
        Some(Arc::clone(inode))
    }

    /// The kernel forgot `lookups` of those it was told.
    pub(super) fn forget(&self, number: u64, lookups: u64) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let Some(inode) = table.get(&number) else { return };
        let left = inode.lookups.load(Ordering::Relaxed).saturating_sub(lookups);
        inode.lookups.store(left, Ordering::Relaxed);
        // What the kernel does not know is not being opened: the lock is free.
        if left == 0 && inode.state().is_closed() {
            table.remove(&number);
        }
    }
}

impl Inode {
    /// What is open of it.
    pub(super) fn file(&self) -> Option<Arc<OpenFile>> {
        self.state().file.clone()
    }

    /// Begins to open or close it.
    pub(super) fn opening(&self) -> Opening<'_> {
        Opening(self.state())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Counters and an Arc, none of which is ever half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Opening<'_> {
    pub(super) fn file(&self) -> Option<&Arc<OpenFile>> {
        self.0.file.as_ref()
    }

    /// Puts in what was opened, without counting it.
    pub(super) fn set_file(&mut self, file: Arc<OpenFile>) {
        self.0.file = Some(file);
    }

    pub(super) fn opens(&self) -> u64 {
        self.0.opens
    }

    pub(super) fn set_opens(&mut self, opens: u64) {
        self.0.opens = opens;
    }

    pub(super) fn slot(&self) -> Option<u32> {
        self.0.slot
    }

    pub(super) fn set_slot(&mut self, slot: Option<u32>) {
        self.0.slot = slot;
    }

    /// Takes the file out after its last close; dropping it may take its time.
    pub(super) fn take_file(&mut self) -> Option<Arc<OpenFile>> {
        self.0.file.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_depend_on_path_and_identity_alone() {
        assert_eq!(number_of("", 7), ROOT);
        assert_eq!(number_of("vm/1/memory", 0), number_of("vm/1/memory", 0));
        assert_ne!(number_of("vm/1/memory", 0), number_of("vm/1/memory", 1));
        assert_ne!(number_of("vm/1/memory", 0), number_of("vm/2/memory", 0));
    }

    #[test]
    fn an_inode_lives_until_it_is_forgotten_as_often_as_it_was_told() {
        let inodes = Inodes::default();
        inodes.enter(5, "a", 1).unwrap();
        inodes.enter(5, "a", 1).unwrap();
        assert!(inodes.enter(5, "b", 1).is_none(), "a collision is refused");
        inodes.forget(5, 1);
        assert!(inodes.get(5).is_some());
        inodes.forget(5, 1);
        assert!(inodes.get(5).is_none());
        inodes.enter(5, "b", 1).unwrap();
        inodes.get(5).unwrap().opening().set_opens(1);
        inodes.forget(5, 1);
        assert!(inodes.get(5).is_some(), "what is open stays");
    }
}
