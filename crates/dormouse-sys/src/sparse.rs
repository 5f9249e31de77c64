//! Holes of files: finding, making and measuring them (`lseek(2)` with `SEEK_DATA` and
//! `SEEK_HOLE`, `fallocate(2)` with `FALLOC_FL_PUNCH_HOLE`, `st_blocks` of `fstat(2)`).
//!
//! What the kernel promises about holes is little:
//!
//! - a hole reads as zeros, but zeros need not be a hole: a file system that knows no holes calls
//!   the whole file data, and one may report them coarser than they were made;
//! - space reserved by `fallocate` and not written yet is a hole to `SEEK_DATA` although it takes
//!   space on disk (ext4, XFS), so the sum of the data extents is not the allocated size;
//! - every call moves the file position of the description; use reads with an offset beside it.

use std::fs::File;
use std::io;
use std::iter::FusedIterator;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::temp_file;

/// The block size of guests' memory and disks, the finest granularity anybody asks for here.
const BLOCK_BYTES: u64 = 4096;

/// `st_blocks` counts these, whatever the file system's own blocks are (`inode(7)`).
const STAT_BLOCK_BYTES: u64 = 512;

/// Blocks written by the granularity probe, each with a hole of the same size after it.
const PROBE_BLOCKS: u64 = 16;

/// Length of the probe's file. Its second half holds a single block, so that granularities up to
/// a quarter of this are told exactly; tmpfs with huge pages has the coarsest known one, 2 MiB.
const PROBE_FILE_BYTES: u64 = 64 << 20;

/// The data ranges of a file within a range of offsets, in ascending order.
///
/// Made by [`data_extents`]. Ranges do not overlap and are never empty; after an error the
/// iterator ends. While somebody else changes the file each range was true when it was looked
/// up, and nothing more.
#[derive(Debug)]
pub struct DataExtents<'fd> {
    file: BorrowedFd<'fd>,
    at: u64,
    end: u64,
}

/// The data ranges of `file` that lie in `range`, clipped to it.
///
/// Ends at the end of the file if that comes before the end of `range`. Where holes are unknown
/// (`EINVAL`, `EOPNOTSUPP`) all of `range` is data, even beyond the end of the file.
pub fn data_extents<Fd: AsFd>(file: &Fd, range: Range<u64>) -> DataExtents<'_> {
    DataExtents { file: file.as_fd(), at: range.start, end: range.end }
}

impl DataExtents<'_> {
    fn find_next(&mut self) -> io::Result<Option<Range<u64>>> {
        if self.at >= self.end {
            return Ok(None);
        }
        let start = match rustix::fs::seek(self.file, SeekFrom::Data(self.at)) {
            Ok(start) if start >= self.at => start,
            // A character device that answers every seek with 0.
            Ok(_) => return Ok(Some(self.at..self.end)),
            // No data from here to the end of the file, or the file ends before here.
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(self.at..self.end)),
            Err(error) => return Err(error.into()),
        };
        if start >= self.end {
            return Ok(None);
        }
        let end = match rustix::fs::seek(self.file, SeekFrom::Hole(start)) {
            Ok(end) => end,
            // The file was cut since the first call.
            Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // A hole where data was a moment ago: somebody punched it between the calls. Calling a
        // block of it data is always right and always a step forward.
        let end = if end > start { end } else { start + BLOCK_BYTES };
        Ok(Some(start..end.min(self.end)))
    }
}

impl Iterator for DataExtents<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.find_next();
        self.at = match &found {
            Ok(Some(extent)) => extent.end,
            Ok(None) | Err(_) => self.end,
        };
        found.transpose()
    }
}

impl FusedIterator for DataExtents<'_> {}

/// Whether a hole begins anywhere in the first `len` bytes of `file`.
pub fn has_holes<Fd: AsFd>(file: &Fd, len: u64) -> io::Result<bool> {
    match data_extents(file, 0..len).next().transpose()? {
        Some(first) => Ok(first != (0..len)),
        None => Ok(len > 0),
    }
}

/// Frees the space under `len` bytes from `offset`; they read as zeros afterwards.
///
/// The length of the file does not change (`FALLOC_FL_KEEP_SIZE`). Blocks covered in part are
/// overwritten with zeros, not freed. A power cut leaves each block either as it was or as a
/// hole; use `fsync` to know which. A file system without holes answers `EOPNOTSUPP`
/// ([`io::ErrorKind::Unsupported`]), a sealed memfd or an immutable file `EPERM`.
pub fn punch_hole(file: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let file = file.as_fd();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, flags, offset, len))?)
}

/// The bytes a file takes on disk, its file system's own notes about it included.
///
/// Counts space reserved but not written, and on file systems that share or compress blocks it
/// is what the file would take alone.
pub fn allocated_bytes(file: impl AsFd) -> io::Result<u64> {
    let blocks = rustix::fs::fstat(file)?.st_blocks;
    Ok(u64::try_from(blocks).map_err(io::Error::other)? * STAT_BLOCK_BYTES)
}

/// The size in bytes at which the file system under `folder` reports holes, `None` if it reports
/// none at all.
///
/// Where holes mean something, as in the difference files of a VMM, a block beside written ones
/// must not be reported as data only because of its neighbours. The answer is measured: a file
/// without a name is made in `folder`, single 4 KiB blocks are written with holes of 4 KiB
/// between them, and the holes are looked up again. 4096 therefore stands for 4 KiB or finer,
/// and the answer is true for files that get their holes by not being written.
///
/// Needs the right to make files in `folder`.
pub fn hole_granularity(folder: &Path) -> io::Result<Option<u64>> {
    probe_granularity(&temp_file::unnamed(folder)?)
}

/// [`hole_granularity`] of the file system that `file` lies on, measured in the folder it is in.
///
/// A symbolic link is followed first. An error of kind [`io::ErrorKind::CrossesDevices`] says
/// that the file is mounted alone into a folder of another file system, about which nothing can
/// be learned there.
pub fn hole_granularity_beside(file: &Path) -> io::Result<Option<u64>> {
    let file = std::fs::canonicalize(file)?;
    let probe = temp_file::unnamed(file.parent().unwrap_or(&file))?;
    if probe.metadata()?.dev() != std::fs::metadata(&file)?.dev() {
        return Err(io::ErrorKind::CrossesDevices.into());
    }
    probe_granularity(&probe)
}

fn probe_granularity(file: &File) -> io::Result<Option<u64>> {
    // The length first: blocks written at the end of a file may have space reserved after them.
    file.set_len(PROBE_FILE_BYTES)?;
    let block = vec![0x5a; usize::try_from(BLOCK_BYTES).map_err(io::Error::other)?];
    for index in 0..PROBE_BLOCKS {
        file.write_all_at(&block, 2 * index * BLOCK_BYTES)?;
    }
    let single = PROBE_FILE_BYTES / 2;
    file.write_all_at(&block, single)?;

    let mut extents = Vec::new();
    for extent in data_extents(file, 0..PROBE_FILE_BYTES) {
        extents.push(extent?);
    }
    let fine = (0..PROBE_BLOCKS)
        .map(|index| 2 * index * BLOCK_BYTES)
        .chain([single])
        .map(|start| start..start + BLOCK_BYTES);
    if extents.iter().cloned().eq(fine) {
        return Ok(Some(BLOCK_BYTES));
    }
    let around = extents.iter().find(|extent| extent.contains(&single));
    Ok(match around {
        Some(around) if around.start > 0 => {
            // Single blocks are told apart and near ones are not: coarser than asked for, too.
            Some((around.end - around.start).max(2 * BLOCK_BYTES))
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1024;

    /// The folders tests run in: the file system of the build, and tmpfs.
    fn folders() -> Vec<std::path::PathBuf> {
        let folders = vec![std::env::temp_dir(), "/dev/shm".into()];
        assert!(folders.iter().all(|folder| folder.is_dir()), "these tests need /dev/shm");
        folders
    }

    fn extents(file: &File, range: Range<u64>) -> Vec<Range<u64>> {
        data_extents(file, range).map(Result::unwrap).collect()
    }

    #[test]
    fn extents_of_a_range() {
        for folder in folders() {
            let file = temp_file::unnamed(&folder).unwrap();
            file.set_len(256 * K).unwrap();
            for (at, len) in [(16 * K, 8 * K), (64 * K, 4 * K), (252 * K, 4 * K)] {
                file.write_all_at(&vec![1; usize::try_from(len).unwrap()], at).unwrap();
            }
            let cases = [
                (0..256 * K, vec![16 * K..24 * K, 64 * K..68 * K, 252 * K..256 * K]),
                (0..K << 20, vec![16 * K..24 * K, 64 * K..68 * K, 252 * K..256 * K]),
                (20 * K..66 * K, vec![20 * K..24 * K, 64 * K..66 * K]),
                (24 * K..64 * K, vec![]),
                (0..0, vec![]),
                (300 * K..400 * K, vec![]),
            ];
            for (range, expected) in cases {
                assert_eq!(extents(&file, range.clone()), expected, "{range:?} in {folder:?}");
            }
        }
    }

    #[test]
    fn unknown_holes_are_data() {
        let device = File::open("/dev/null").unwrap();
        let covered: u64 = extents(&device, 4 * K..12 * K).iter().map(|e| e.end - e.start).sum();
        assert_eq!(covered, 8 * K);
    }

    #[test]
    fn punching_frees_whole_blocks_and_keeps_the_length() {
        for folder in folders() {
            let file = temp_file::unnamed(&folder).unwrap();
            file.write_all_at(&vec![7; 64 << 10], 0).unwrap();
            assert!(!has_holes(&file, 64 * K).unwrap());
            let before = allocated_bytes(&file).unwrap();
            punch_hole(&file, 8 * K, 16 * K).unwrap();
            punch_hole(&file, 40 * K, 0).unwrap();
            assert!(has_holes(&file, 64 * K).unwrap());
            assert_eq!(allocated_bytes(&file).unwrap(), before - 16 * K, "{folder:?}");
            assert_eq!(file.metadata().unwrap().len(), 64 * K);
            assert_eq!(extents(&file, 0..64 * K), [0..8 * K, 24 * K..64 * K]);
        }
    }

    #[test]
    fn holes_of_4_kib_are_seen() {
        for folder in folders() {
            assert_eq!(hole_granularity(&folder).unwrap(), Some(4096), "{folder:?}");
            let file = folder.join(format!("granularity-{}", std::process::id()));
            std::fs::write(&file, b"x").unwrap();
            let beside = hole_granularity_beside(&file);
            std::fs::remove_file(&file).unwrap();
            assert_eq!(beside.unwrap(), Some(4096));
        }
        assert!(hole_granularity(Path::new("/nowhere")).is_err());
    }
}
