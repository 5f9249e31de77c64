//! What a mount needs of the tree that it shows: entries found by their paths.
//!
//! A path has neither a leading nor a trailing slash; the root's is empty. Names come from the
//! kernel: they are UTF-8, without slashes, and may be anything else. Every method is called from
//! several threads at once.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use crate::device::{BlockDevice, DeviceResult};

/// A tree of folders and files. What changes the tree is refused unless it is provided.
pub trait Tree: Send + Sync + 'static {
    /// What lies at a path.
    fn entry(&self, path: &str) -> TreeResult<Entry>;

    /// Tells what lies in a folder, in any order.
    fn list(&self, path: &str, visit: &mut dyn FnMut(Item<'_>)) -> TreeResult<()>;

    /// Opens a file. It is closed when what is returned is dropped; opens of one file at the same
    /// time share it, whatever their access.
    fn open(&self, path: &str, access: Access) -> TreeResult<Opened>;

    /// Makes a file and opens it for writing.
    fn create(&self, path: &str, creation: Creation) -> TreeResult<Opened> {
        let _ = (path, creation);
        Err(TreeErrorKind::ReadOnly.into())
    }

    /// Makes a folder.
    fn make_folder(&self, path: &str) -> TreeResult<()> {
        let _ = path;
        Err(TreeErrorKind::ReadOnly.into())
    }

    /// Removes a file or an empty folder.
    fn remove(&self, path: &str, kind: Kind) -> TreeResult<()> {
        let _ = (path, kind);
        Err(TreeErrorKind::ReadOnly.into())
    }
}

/// A folder or a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A folder.
    Folder,

    /// A regular file.
    File,
}

/// An entry's attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// A folder or a file.
    pub kind: Kind,

    /// Tells it from others that had or will have its path; they must differ where the kernel could
    /// keep the one's pages and show them as the other's.
    pub identity: u64,

    /// Length of a file.
    pub size_bytes: u64,

    /// Bytes that are stored for a file, for `st_blocks`.
    pub allocated_bytes: u64,

    /// When it was last changed.
    pub modified: SystemTime,

    /// Permission bits; files belong to whoever mounts.
    pub permissions: u16,

    /// Whether it stays as it is for as long as the folder above it is there.
    pub is_fixed: bool,
}

/// An entry as it is listed.
#[derive(Clone, Copy, Debug)]
pub struct Item<'a> {
    /// Its name.
    pub name: &'a str,

    /// A folder or a file.
    pub kind: Kind,

    /// As in [`Entry`].
    pub identity: u64,
}

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,

    /// Writing, perhaps reading, too.
    Write,
}

/// What becomes of a file that is there already when it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Creation {
    /// It is opened as it is.
    OrOpen,

    /// It is an error (`O_EXCL`).
    Only,
}

/// An open file.
#[derive(Clone)]
pub enum Opened {
    /// An image that never changes.
    Image(Arc<dyn BlockDevice>),

    /// A disk that is written to.
    Disk(Arc<dyn BlockDevice>),

    /// A memory that is written to, and mapped by who writes to it.
    Memory(Arc<dyn BlockDevice>),

    /// A file that only takes bytes.
    Sink(Arc<dyn Sink>),
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Opened::Image(_) => "Image",
            Opened::Disk(_) => "Disk",
            Opened::Memory(_) => "Memory",
            Opened::Sink(_) => "Sink",
        })
    }
}

/// A file that swallows what a VMM writes, as a stream with few steps back.
pub trait Sink: Send + Sync {
    /// Its length: the end of what was written, or what was set.
    fn size_bytes(&self) -> u64;

    /// Takes bytes at an offset.
    fn write_at(&self, data: &[u8], offset: u64) -> DeviceResult<()>;

    /// Makes a range zero, which is not the same as never having been written.
    fn zero(&self, range: std::ops::Range<u64>) -> DeviceResult<()>;

    /// Sets the length.
    fn set_size(&self, size_bytes: u64) -> DeviceResult<()>;

    /// Returns when all that was written has been taken, or tells why some of it was not.
    fn flush(&self) -> DeviceResult<()>;

    /// Fills `buffer` with what was taken and tells how much there was. Most sinks give nothing back.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<usize> {
        let _ = (buffer, offset);
        Err(crate::device::DeviceErrorKind::Invalid.into())
    }

    /// Whether it takes as long as whatever takes the bytes on: then other files of the mount are
    /// not kept waiting for it.
    fn is_patient(&self) -> bool {
        false
    }

    /// Whether a write would probably wait just now. Asked of those that are patient.
    fn write_will_wait(&self) -> bool {
        true
    }
}

/// A `Result` of a tree.
pub type TreeResult<T> = Result<T, TreeError>;

/// Why a tree refused or failed; decides the error number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TreeErrorKind {
    /// There is nothing at that path (`ENOENT`).
    NotFound,

    /// There is something already (`EEXIST`).
    AlreadyExists,

    /// Another process has it, or it is in use (`EBUSY`).
    Busy,

    /// It cannot be changed (`EROFS`).
    ReadOnly,

    /// It must not be done (`EPERM`).
    NotPermitted,

    /// A folder that is not empty (`ENOTEMPTY`).
    NotEmpty,

    /// A name or combination that is not allowed (`EINVAL`).
    Invalid,

    /// No room (`ENOSPC`).
    NoSpace,

    /// Reading, writing, or what was read (`EIO`).
    Io,
}

/// A failed request to a tree.
#[derive(Debug)]
pub struct TreeError {
    kind: TreeErrorKind,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl TreeError {
    /// A failure with its cause, which goes to the log.
    pub fn new(
        kind: TreeErrorKind,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> TreeError {
        TreeError { kind, source: Some(source.into()) }
    }

    /// The kind of failure.
    pub fn kind(&self) -> TreeErrorKind {
        self.kind
    }
}

impl From<TreeErrorKind> for TreeError {
    fn from(kind: TreeErrorKind) -> TreeError {
        TreeError { kind, source: None }
    }
}

impl fmt::Display for TreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            TreeErrorKind::NotFound => "there is nothing at that path",
            TreeErrorKind::AlreadyExists => "there is something already",
            TreeErrorKind::Busy => "it is in use",
            TreeErrorKind::ReadOnly => "it cannot be changed",
            TreeErrorKind::NotPermitted => "that must not be done",
            TreeErrorKind::NotEmpty => "the folder is not empty",
            TreeErrorKind::Invalid => "that is not allowed",
            TreeErrorKind::NoSpace => "there is no room",
            TreeErrorKind::Io => "it could not be read or written",
        })
    }
}

impl StdError for TreeError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn StdError + 'static))
    }
}
