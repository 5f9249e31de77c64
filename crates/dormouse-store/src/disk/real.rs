//! A folder of the machine's own file system.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FlockOperation;

use super::{DirEntry, Disk, DiskFile, DiskLock, DiskWriter, LockKind, LockWait};

/// Who may use the files that a store makes, whatever the umask: their owner.
const FILE_MODE: u32 = 0o600;

/// The same of its folders.
const FOLDER_MODE: u32 = 0o700;

/// Folders above a store that is made are no part of it.
const FOLDER_ABOVE_MODE: u32 = 0o755;

/// Most manifests are shorter than this.
const SMALL_BYTES: usize = 8 << 10;

/// A store's folder on a real file system.
#[derive(Debug)]
pub struct RealDisk {
    root: PathBuf,
}

impl RealDisk {
    /// The folder at `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> RealDisk {
        RealDisk { root: root.into() }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Makes missing folders from the outermost inwards and syncs the parent of each. A folder that is
    /// there already may have been made by somebody who has not come to syncing it.
    fn create_dir_durably(&self, path: &Path) -> io::Result<()> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let is_of_store = path.starts_with(&self.root);
        let mode = if is_of_store { FOLDER_MODE } else { FOLDER_ABOVE_MODE };
        if let Err(error) = fs::DirBuilder::new().mode(mode).create(path) {
            match error.kind() {
                io::ErrorKind::AlreadyExists if path.is_dir() => {}
                io::ErrorKind::NotFound => {
                    let parent = parent.ok_or(error)?;
                    self.create_dir_durably(parent)?;
                    return self.create_dir_durably(path);
                }
                _ => return Err(error),
            }
        }
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }
}

#[derive(Debug)]
struct RealFile {
    file: File,
    len: u64,
}

impl DiskFile for RealFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn len(&self) -> u64 {
        self.len
    }
}

#[derive(Debug)]
struct RealWriter {
    file: File,
}

impl DiskWriter for RealWriter {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// The lock lives as long as the open file does.
#[derive(Debug)]
struct RealLock {
    _file: File,
}

impl DiskLock for RealLock {}

impl Disk for RealDisk {
    fn open(&self, path: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = File::open(self.path(path))?;
        let len = file.metadata()?.len();
        Ok(Arc::new(RealFile { file, len }))
    }

    /// A small file in three system calls, as listings are nothing but small files.
    fn read(&self, path: &str, limit: u64) -> io::Result<Vec<u8>> {
        let file = File::open(self.path(path))?;
        let mut bytes = vec![0; SMALL_BYTES];
        let len = file.read_at(&mut bytes, 0)?;
        bytes.truncate(len);
        // A regular file gives less than was asked for at its end only.
        if len == SMALL_BYTES {
            (&file).seek(SeekFrom::Start(SMALL_BYTES as u64))?;
            (&file).take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
        }
        if bytes.len() as u64 > limit {
            return Err(super::too_long(path, limit));
        }
        Ok(bytes)
    }

    fn create(&self, path: &str) -> io::Result<Box<dyn DiskWriter>> {
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(FILE_MODE).open(self.path(path))?;
        Ok(Box::new(RealWriter { file }))
    }

    fn append(&self, path: &str) -> io::Result<Box<dyn DiskWriter>> {
        let file = OpenOptions::new().append(true).open(self.path(path))?;
        Ok(Box::new(RealWriter { file }))
    }

    fn list(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(self.path(path))? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            entries.push(DirEntry { name, is_dir: entry.file_type()?.is_dir() });
        }
        Ok(entries)
    }

    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        self.create_dir_durably(&self.path(path))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        fs::hard_link(self.path(from), self.path(to))
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        fs::remove_file(self.path(path))
    }

    fn remove_dir(&self, path: &str) -> io::Result<()> {
        fs::remove_dir(self.path(path))
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        File::open(self.path(path))?.sync_all()
    }

    fn allocated_bytes(&self, path: &str) -> io::Result<u64> {
        Ok(fs::metadata(self.path(path))?.blocks() * 512)
    }

    fn lock(
        &self,
        path: &str,
        kind: LockKind,
        wait: LockWait,
        create: bool,
    ) -> io::Result<Option<Box<dyn DiskLock>>> {
        let path = self.path(path);
        loop {
            let file = if create {
                OpenOptions::new().append(true).create(true).mode(FILE_MODE).open(&path)?
            } else {
                File::open(&path)?
            };
            let operation = match (kind, wait) {
                (LockKind::Shared, LockWait::Wait) => FlockOperation::LockShared,
                (LockKind::Shared, LockWait::Try) => FlockOperation::NonBlockingLockShared,
                (LockKind::Exclusive, LockWait::Wait) => FlockOperation::LockExclusive,
                (LockKind::Exclusive, LockWait::Try) => FlockOperation::NonBlockingLockExclusive,
            };
            match rustix::fs::flock(&file, operation) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            // Somebody may have removed the file between our open and our lock.
            let held = file.metadata()?;
            match fs::metadata(&path) {
                Ok(named) if named.ino() == held.ino() && named.dev() == held.dev() => {
                    return Ok(Some(Box::new(RealLock { _file: file })));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
}
