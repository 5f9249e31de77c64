//! The space a folder takes on disk, for folders that are not stores.

use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// `st_blocks` counts these, whatever the file system's own blocks are (`inode(7)`).
const STAT_BLOCK_BYTES: u64 = 512;

/// What the files below a folder take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// Bytes allocated on disk, so that a sparse file counts what it holds.
    pub allocated_bytes: u64,

    /// Sum of the lengths.
    pub apparent_bytes: u64,

    /// Files counted: everything that is not a folder, a hard-linked one once.
    pub files: u64,
}

/// Adds up the files below `path`, or the one file that it names.
///
/// Links are followed for `path` itself only. Folders themselves are not counted, and files that
/// vanish while they are being counted are left out. The first file or folder that cannot be
/// read ends the count; the error names it.
pub fn disk_usage(path: &Path) -> io::Result<DiskUsage> {
    let mut usage = DiskUsage::default();
    let mut seen = HashSet::new();
    let metadata = fs::metadata(path).map_err(|error| named(path, &error))?;
    if !metadata.is_dir() {
        usage.add(&metadata, &mut seen);
        return Ok(usage);
    }
    let mut folders = vec![path.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if vanished(&error) && folder != path => continue,
            Err(error) => return Err(named(&folder, &error)),
        };
        for entry in entries {
            let entry = entry.map_err(|error| named(&folder, &error))?;
            match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => folders.push(entry.path()),
                Ok(metadata) => usage.add(&metadata, &mut seen),
                Err(error) if vanished(&error) => {}
                Err(error) => return Err(named(&entry.path(), &error)),
            }
        }
    }
    Ok(usage)
}

impl DiskUsage {
    fn add(&mut self, metadata: &Metadata, seen: &mut HashSet<(u64, u64)>) {
        if metadata.nlink() > 1 && !seen.insert((metadata.dev(), metadata.ino())) {
            return;
        }
        self.allocated_bytes += metadata.blocks() * STAT_BLOCK_BYTES;
        self.apparent_bytes += metadata.len();
        self.files += 1;
    }
}

fn vanished(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("count {}: {error}", path.display()))
}
