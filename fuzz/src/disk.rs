//! A disk of one file at a time in memory: all that an index run needs.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use dormouse_store::disk::{DirEntry, Disk, DiskFile, DiskLock, DiskWriter, LockKind, LockWait};

/// The file, by whatever name it is asked for.
#[derive(Clone, Debug)]
pub struct OneFile(Arc<Mutex<Vec<u8>>>);

impl OneFile {
    /// A disk with this file.
    pub fn new(bytes: &[u8]) -> OneFile {
        OneFile(Arc::new(Mutex::new(bytes.to_vec())))
    }
}

#[derive(Debug)]
struct Bytes(Vec<u8>);

impl DiskFile for Bytes {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = self.0.get(at..).and_then(|rest| rest.get(..buf.len()));
        buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }
}

impl DiskWriter for OneFile {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn unused<T>() -> io::Result<T> {
    Err(io::ErrorKind::Unsupported.into())
}

impl Disk for OneFile {
    fn open(&self, _: &str) -> io::Result<Arc<dyn DiskFile>> {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Arc::new(Bytes(bytes)))
    }

    fn create(&self, _: &str) -> io::Result<Box<dyn DiskWriter>> {
        Ok(Box::new(self.clone()))
    }

    fn append(&self, path: &str) -> io::Result<Box<dyn DiskWriter>> {
        self.create(path)
    }

    fn list(&self, _: &str) -> io::Result<Vec<DirEntry>> {
        unused()
    }

    fn create_dir_all(&self, _: &str) -> io::Result<()> {
        unused()
    }

    fn rename(&self, _: &str, _: &str) -> io::Result<()> {
        unused()
    }

    fn link(&self, _: &str, _: &str) -> io::Result<()> {
        unused()
    }

    fn remove(&self, _: &str) -> io::Result<()> {
        unused()
    }

    fn remove_dir(&self, _: &str) -> io::Result<()> {
        unused()
    }

    fn sync_dir(&self, _: &str) -> io::Result<()> {
        unused()
    }

    fn allocated_bytes(&self, _: &str) -> io::Result<u64> {
        unused()
    }

    fn lock(
        &self,
        _: &str,
        _: LockKind,
        _: LockWait,
        _: bool,
    ) -> io::Result<Option<Box<dyn DiskLock>>> {
        unused()
    }
}
