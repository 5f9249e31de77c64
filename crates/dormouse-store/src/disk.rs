//! The file system as the store sees it: the few operations a store needs, as traits.
//!
//! Everything the store keeps goes through a [`Disk`], so that tests can put a simulated one
//! underneath that loses, tears and reorders what was not synced. Paths are relative to the
//! store's folder, with `/` between parts.
//!
//! What a `Disk` promises, and what the store therefore has to order itself:
//!
//! - bytes written are durable only after [`DiskWriter::sync`] of that file;
//! - a name made, moved or removed is durable only after [`Disk::sync_dir`] of its folder (both
//!   folders for a move across folders);
//! - nothing else is ordered: without those calls any later step may survive a power cut that an
//!   earlier one did not;
//! - [`Disk::link`] and [`Disk::rename`] are atomic: a name is either there whole or not.

mod real;

use std::fmt::Debug;
use std::io::{self, Write};
use std::sync::Arc;

pub use real::RealDisk;

/// One entry of a folder.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DirEntry {
    /// The last part of the path. Names that are not UTF-8 are not ours and are left out.
    pub name: String,

    /// Whether it is a folder.
    pub is_dir: bool,
}

/// How a lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Any number of holders.
    Shared,

    /// One holder and no shared ones.
    Exclusive,
}

/// Whether to wait for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockWait {
    /// Block until it is free.
    Wait,

    /// Return `None` at once when it is taken.
    Try,
}

/// A held lock; dropping it releases it, and so does the death of the process.
pub trait DiskLock: Debug + Send + Sync {}

/// An open file that is only read. Reading a file that was removed meanwhile still works.
pub trait DiskFile: Debug + Send + Sync {
    /// Fills `buf` from `offset`; a file that ends before is `UnexpectedEof`.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// The file's length in bytes when it was opened.
    fn len(&self) -> u64;

    /// Whether the file holds no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A file being written front to back, unbuffered.
pub trait DiskWriter: Debug + Send {
    /// Appends `bytes`.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Makes everything appended so far durable.
    fn sync(&mut self) -> io::Result<()>;
}

/// The operations a store needs of a file system.
pub trait Disk: Debug + Send + Sync {
    /// Opens an existing file for reading.
    fn open(&self, path: &str) -> io::Result<Arc<dyn DiskFile>>;

    /// Reads a whole file of at most `limit` bytes; a longer one is `InvalidData`.
    fn read(&self, path: &str, limit: u64) -> io::Result<Vec<u8>> {
        let file = self.open(path)?;
        if file.len() > limit {
            return Err(too_long(path, limit));
        }
        let mut bytes = vec![0; usize::try_from(file.len()).map_err(io::Error::other)?];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// Creates a file that must not exist yet (`AlreadyExists` otherwise). It is its owner's alone, as
    /// all files of a store: guests' memory has keys and passwords in it.
    fn create(&self, path: &str) -> io::Result<Box<dyn DiskWriter>>;

    /// Opens an existing file for appending.
    fn append(&self, path: &str) -> io::Result<Box<dyn DiskWriter>>;

    /// The entries of a folder, in no order; a missing folder is `NotFound`.
    fn list(&self, path: &str) -> io::Result<Vec<DirEntry>>;

    /// Makes a folder and its parents; one that exists is fine. The new names are durable on
    /// return, because folders are made rarely and forgetting this once loses a whole store. Folders of
    /// the store are their owner's alone.
    fn create_dir_all(&self, path: &str) -> io::Result<()>;

    /// Moves a file, replacing what is at `to`.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Gives a file a second name; `AlreadyExists` if `to` is there.
    fn link(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, path: &str) -> io::Result<()>;

    /// Removes an empty folder.
    fn remove_dir(&self, path: &str) -> io::Result<()>;

    /// Makes the names in a folder durable.
    fn sync_dir(&self, path: &str) -> io::Result<()>;

    /// The bytes a file takes on the disk (`st_blocks` × 512).
    fn allocated_bytes(&self, path: &str) -> io::Result<u64>;

    /// Locks a file, making it (empty) first if `create` is set and it is missing. The lock is on
    /// the file that the path names when this returns, never on one that was removed meanwhile.
    /// `Ok(None)`: taken by somebody else and `wait` is `Try`. `NotFound`: missing, not `create`.
    fn lock(
        &self,
        path: &str,
        kind: LockKind,
        wait: LockWait,
        create: bool,
    ) -> io::Result<Option<Box<dyn DiskLock>>>;
}

/// A file being written, where something wants a [`Write`].
pub(crate) struct DiskSink(pub(crate) Box<dyn DiskWriter>);

impl Write for DiskSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a whole file of at most `limit` bytes; a longer one is `InvalidData`.
pub(crate) fn read_file(disk: &dyn Disk, path: &str, limit: u64) -> io::Result<Vec<u8>> {
    disk.read(path, limit)
}

/// The error for a file that is longer than such a file may be.
fn too_long(path: &str, limit: u64) -> io::Error {
    let what = format!("{path} is longer than the {limit} bytes that such a file may have");
    io::Error::new(io::ErrorKind::InvalidData, what)
}
