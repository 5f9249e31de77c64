//! Where the contents of files are until they are written.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Bytes that can be read anywhere.
pub trait ReadAt: Send + Sync {
    /// Fills `buf` from `offset`; an end before that is [`io::ErrorKind::UnexpectedEof`].
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, offset)
    }
}

impl ReadAt for [u8] {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let from = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let end = from.checked_add(buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(self.get(from..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.as_slice().read_exact_at(buf, offset)
    }
}

impl<R: ReadAt + ?Sized> ReadAt for Arc<R> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        R::read_exact_at(self, buf, offset)
    }
}

/// The contents of many files, by key.
pub trait Contents: fmt::Debug + Send + Sync {
    /// Opens a file's content.
    fn open(&self, key: u64) -> io::Result<Opened>;
}

/// An open content.
pub enum Opened {
    /// The bytes of a file from an offset on, which the kernel can copy or share by itself.
    File {
        /// The file.
        file: Arc<File>,
        /// Where the content begins in it.
        offset: u64,
    },

    /// Bytes that have to be read.
    Bytes(Box<dyn ReadAt>),
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Opened::File { .. } => "File",
            Opened::Bytes(_) => "Bytes",
        })
    }
}

impl ReadAt for Opened {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Opened::File { file, offset: begin } => {
                FileExt::read_exact_at(&**file, buf, begin + offset)
            }
            Opened::Bytes(bytes) => bytes.read_exact_at(buf, offset),
        }
    }
}

/// Where the content of one file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    pub(crate) source: u16,
    pub(crate) key: u64,
}

impl FileId {
    /// No content at all: the file is empty, or one hole.
    pub(crate) const EMPTY: u16 = u16::MAX;

    /// The content lies in the image already, from the block on that the key tells.
    pub(crate) const PLACED: u16 = u16::MAX - 1;

    /// The content of `source` with a key.
    pub fn new(source: u16, key: u64) -> FileId {
        FileId { source, key }
    }

    /// No content.
    pub fn empty() -> FileId {
        FileId { source: FileId::EMPTY, key: 0 }
    }

    pub(crate) fn placed(block: u64) -> FileId {
        FileId { source: FileId::PLACED, key: block }
    }
}

/// Contents that lie in memory, such as lists and files to inject.
#[derive(Debug, Default)]
pub struct InMemory {
    files: Vec<Arc<Vec<u8>>>,
}

impl InMemory {
    /// Keeps the content of one more file, and returns its key.
    pub fn push(&mut self, bytes: Vec<u8>) -> u64 {
        self.files.push(Arc::new(bytes));
        self.files.len() as u64 - 1
    }
}

impl Contents for InMemory {
    fn open(&self, key: u64) -> io::Result<Opened> {
        let file = usize::try_from(key).ok().and_then(|key| self.files.get(key));
        let file = file.ok_or(io::ErrorKind::NotFound)?;
        Ok(Opened::Bytes(Box::new(Arc::clone(file))))
    }
}
