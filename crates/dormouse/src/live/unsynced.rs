//! Files of a disk that need not be durable yet: whoever makes them syncs all of them later, by
//! [`LiveFolder::settle`](super::LiveFolder::settle).
//!
//! What is written is there for every process at once. A power cut may leave any part of it, so that
//! nobody may be told of such a disk before it is settled.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use dormouse_live::files::{BlockFile, BootId, Folder, FolderLock, RealFolder};

/// A folder in which syncing does nothing.
#[derive(Debug)]
pub(super) struct UnsyncedFolder(RealFolder);

impl UnsyncedFolder {
    pub(super) fn new(path: impl Into<PathBuf>) -> UnsyncedFolder {
        UnsyncedFolder(RealFolder::new(path))
    }
}

impl Folder for UnsyncedFolder {
    fn create(&self, name: &str) -> io::Result<Arc<dyn BlockFile>> {
        Ok(Arc::new(UnsyncedFile(self.0.create(name)?)))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn BlockFile>> {
        Ok(Arc::new(UnsyncedFile(self.0.open(name)?)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.0.list()
    }

    fn boot_id(&self) -> io::Result<BootId> {
        self.0.boot_id()
    }

    fn lock(&self) -> io::Result<Option<Box<dyn FolderLock>>> {
        self.0.lock()
    }
}

#[derive(Debug)]
struct UnsyncedFile(Arc<dyn BlockFile>);

impl BlockFile for UnsyncedFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.0.punch(range)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn forget_clean_pages(&self) -> io::Result<()> {
        self.0.forget_clean_pages()
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        self.0.next_data(range)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.0.allocated_bytes()
    }
}
