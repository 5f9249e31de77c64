//! The files of an overlay, as traits: random access, holes, and one folder of names.
//!
//! Everything an overlay keeps goes through a [`Folder`] and the [`BlockFile`]s in it, so that
//! tests can put a simulated medium underneath that loses and tears what was not synced.
//!
//! What these promise, and what the overlay therefore has to order itself:
//!
//! - bytes written, holes punched and lengths set are durable only after [`BlockFile::sync`] of
//!   that file; before it each sector of 512 bytes may or may not be, by itself;
//! - names are durable only after [`Folder::sync`];
//! - [`Folder::rename`] is atomic: a name stands for the old file or for the new one.

mod real;

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::Arc;

pub use real::RealFolder;

/// Which life of the kernel, and of the mounted file system, this is: bytes that were written and not
/// synced are there as long as both last, whichever processes die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

/// A file that is read, written and punched at any offset, by many threads at once.
pub trait BlockFile: Debug + Send + Sync {
    /// Fills `buf` from `offset`; a file that ends before is `UnexpectedEof`.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`; on an error some of them may have been written.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Frees the space under `range`, which reads as zeros afterwards. The length stays.
    /// `Unsupported` where files have no holes.
    fn punch(&self, range: Range<u64>) -> io::Result<()>;

    /// Makes everything written so far durable, lengths included (`fdatasync`).
    fn sync(&self) -> io::Result<()>;

    /// Lets go of what is cached of the file and not waiting to be written, so that it is read
    /// from the medium next. Bytes that a failed sync did not write are then seen as lost.
    fn forget_clean_pages(&self) -> io::Result<()>;

    /// The length in bytes, as it is now.
    fn len(&self) -> io::Result<u64>;

    /// Whether the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts the file, or extends it by a hole.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// The first range of data in `range`, cut to it. Where holes are unknown, all is data.
    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>>;

    /// The bytes the file takes on the medium.
    fn allocated_bytes(&self) -> io::Result<u64>;
}

/// Held while a process owns a folder; dropping it lets go, and so does the process's death.
pub trait FolderLock: Debug + Send + Sync {}

/// A folder of files, without folders in it. Names have no `/`.
pub trait Folder: Debug + Send + Sync {
    /// Makes a file that must not exist yet, for its owner's eyes only.
    fn create(&self, name: &str) -> io::Result<Arc<dyn BlockFile>>;

    /// Opens a file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Arc<dyn BlockFile>>;

    /// Gives a file another name, replacing what has it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a name; who has the file open keeps it.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes the names durable.
    fn sync(&self) -> io::Result<()>;

    /// The names of all files, in no order.
    fn list(&self) -> io::Result<Vec<String>>;

    /// The life of the kernel that has what was not synced. Never the same after a power cut.
    fn boot_id(&self) -> io::Result<BootId>;

    /// Takes the folder for this owner alone; `None` if another one has it.
    fn lock(&self) -> io::Result<Option<Box<dyn FolderLock>>>;
}
