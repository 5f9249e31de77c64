//! Files of this machine.

use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_sys::block_device::kernel_name;
use dormouse_sys::{page_cache, sparse};

use super::{BlockFile, BootId, Folder, FolderLock};

/// Held by the owner of an overlay; only its lock counts, the file stays empty.
const LOCK_NAME: &str = "owner.lock";

/// Which life of the kernel this is, as a UUID.
const BOOT_ID_PATH: &str = "/proc/sys/kernel/random/boot_id";

/// File systems that have a folder for each mounted device in sysfs.
const MOUNTS_IN_SYSFS: [&str; 3] = ["ext4", "xfs", "f2fs"];

/// Bytes that are written at once. The page cache keeps what one call wrote in folios as large as
/// the call allows, and ext4 looks at every block of a folio whenever 4 KiB of it are written:
/// over a mebibyte that was written at once, random writes take three times as long.
const WRITE_BYTES_MAX: usize = 64 << 10;

/// A folder of this machine, which must be there.
#[derive(Clone, Debug)]
pub struct RealFolder {
    path: PathBuf,
}

impl RealFolder {
    /// The folder at `path`.
    pub fn new(path: impl Into<PathBuf>) -> RealFolder {
        RealFolder { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Folder for RealFolder {
    fn create(&self, name: &str) -> io::Result<Arc<dyn BlockFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        Ok(Arc::new(RealFile { file: options.open(self.path.join(name))? }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn BlockFile>> {
        let file = OpenOptions::new().read(true).write(true).open(self.path.join(name))?;
        Ok(Arc::new(RealFile { file }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            // Names that are not UTF-8 are not ours.
            if let Ok(name) = entry.file_name().into_string()
                && entry.file_type()?.is_file()
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn boot_id(&self) -> io::Result<BootId> {
        let text = fs::read_to_string(BOOT_ID_PATH)?;
        let no_uuid = || io::Error::other(format!("{BOOT_ID_PATH} has no UUID"));
        let boot = parse_boot_id(&text).ok_or_else(no_uuid)?;
        Ok(with_mount(boot, mounted_as(fs::metadata(&self.path)?.dev())))
    }

    fn lock(&self) -> io::Result<Option<Box<dyn FolderLock>>> {
        let path = self.path.join(LOCK_NAME);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        loop {
            let file = options.open(&path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error),
            }
            // Who had the lock before may have removed the folder; its file counts no more.
            match fs::metadata(&path) {
                Ok(named) if is_same(&named, &file.metadata()?) => {
                    return Ok(Some(Box::new(RealLock { _file: file })));
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
}

fn parse_boot_id(text: &str) -> Option<BootId> {
    let digits: String = text.trim_end().chars().filter(|it| *it != '-').collect();
    let is_uuid = digits.len() == 32 && digits.bytes().all(|it| it.is_ascii_hexdigit());
    let number = is_uuid.then(|| u128::from_str_radix(&digits, 16).ok())??;
    Some(BootId(number.to_be_bytes()))
}

/// What tells one mounting of a file system from the next, for those that have a folder in sysfs as
/// long as they are mounted: its inode, which sysfs counts up. One that was shut down after errors and
/// mounted again has lost what was not synced. 0 where nothing tells.
fn mounted_as(device: u64) -> u64 {
    let Some(name) = kernel_name(device) else { return 0 };
    let folders = MOUNTS_IN_SYSFS.iter().map(|kind| Path::new("/sys/fs").join(kind).join(&name));
    folders.filter_map(|folder| fs::metadata(folder).ok()).map(|it| it.ino()).next().unwrap_or(0)
}

fn with_mount(boot: BootId, mount: u64) -> BootId {
    let number = u128::from_be_bytes(boot.0) ^ u128::from(mount);
    BootId(number.to_be_bytes())
}

fn is_same(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// The lock lives as long as the open file does.
#[derive(Debug)]
struct RealLock {
    _file: File,
}

impl FolderLock for RealLock {}

#[derive(Debug)]
struct RealFile {
    file: File,
}

impl BlockFile for RealFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for piece in bytes.chunks(WRITE_BYTES_MAX) {
            self.file.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        sparse::punch_hole(&self.file, range.start, range.end.saturating_sub(range.start))
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn forget_clean_pages(&self) -> io::Result<()> {
        page_cache::forget_clean(&self.file)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        sparse::data_extents(&self.file, range).next().transpose()
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        sparse::allocated_bytes(&self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_id_is_a_uuid() {
        let id = parse_boot_id("01234567-89ab-cdef-0123-456789abcdef\n").unwrap();
        assert_eq!(id.0[..4], [0x01, 0x23, 0x45, 0x67]);
        assert_eq!(id.0[15], 0xef);
        for bad in ["", "01234567", "+1234567-89ab-cdef-0123-456789abcdef"] {
            assert_eq!(parse_boot_id(bad), None, "{bad}");
        }
        let folder = RealFolder::new("/");
        assert_eq!(folder.boot_id().unwrap(), folder.boot_id().unwrap());
    }

    #[test]
    fn a_write_of_several_pieces_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let file = RealFolder::new(dir.path()).create("file").unwrap();
        let bytes: Vec<u8> =
            (0..3 * WRITE_BYTES_MAX + 1000).map(|at| (at * 7 / 5).to_le_bytes()[0]).collect();
        file.write_all_at(&bytes, 12_345).unwrap();
        let mut read = vec![0; bytes.len()];
        file.read_exact_at(&mut read, 12_345).unwrap();
        assert!(read == bytes);
        assert_eq!(file.len().unwrap(), 12_345 + bytes.len() as u64);
    }
}
