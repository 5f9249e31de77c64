//! A copy of a file that takes as little as the file system allows: shared blocks (`FICLONE` of
//! `ioctl_ficlone(2)`), else copied in the kernel (`copy_file_range(2)`), else read and written.
//!
//! Holes stay holes. The copy has its name only when it is whole and durable.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::io::Errno;

use crate::file_size::file_size;
use crate::publish::{Existing, NewFile};
use crate::sparse::data_extents;

/// Copied at once, between two looks at whether to stop.
const PIECE_BYTES: u64 = 16 << 20;

/// Read and written at once.
const BUFFER_BYTES: usize = 1 << 20;

/// Zeros of this length become a hole where a copy is read and written.
const BLOCK_BYTES: usize = 4096;

/// How a copy was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Both files have the same blocks.
    Shared,

    /// The kernel copied them.
    InKernel,

    /// They were read and written.
    ReadAndWritten,
}

impl Way {
    /// The way in a word.
    pub fn word(self) -> &'static str {
        match self {
            Way::Shared => "reflink",
            Way::InKernel => "copy_file_range",
            Way::ReadAndWritten => "copy",
        }
    }
}

/// Copies the file or block device at `source` to the new file `target`, with its permissions.
///
/// A target that is there is [`io::ErrorKind::AlreadyExists`]. When `is_cancelled` says so, the
/// copy ends with [`io::ErrorKind::Interrupted`]. After an error there is no target.
pub fn clone_file(
    source: &Path,
    target: &Path,
    is_cancelled: &dyn Fn() -> bool,
) -> io::Result<Way> {
    let from = File::open(source)?;
    let size = file_size(&from)?;
    let Some(bytes) = size.bytes else {
        let what = format!("{}; only files and disks can be copied", size.kind.describe());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    };
    let mode = from.metadata()?.mode() & 0o777;
    let new = NewFile::create(target, Existing::Refuse, 0o600)?;
    let way = copy(&from, new.file(), bytes, is_cancelled)?;
    new.file().set_permissions(std::fs::Permissions::from_mode(mode))?;
    new.publish()?;
    Ok(way)
}

fn copy(from: &File, to: &File, bytes: u64, is_cancelled: &dyn Fn() -> bool) -> io::Result<Way> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => return Ok(Way::Shared),
        // What cannot be shared is copied; what cannot be read says so then.
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::ISDIR) => {}
        Err(error) => return Err(error.into()),
    }
    to.set_len(bytes)?;
    let mut way = Way::InKernel;
    for extent in data_extents(from, 0..bytes) {
        let Range { mut start, end } = extent?;
        while start < end {
            if is_cancelled() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let piece = start..end.min(start + PIECE_BYTES);
            if way == Way::InKernel && !copy_in_kernel(from, to, piece.clone())? {
                way = Way::ReadAndWritten;
            }
            if way == Way::ReadAndWritten {
                read_and_write(from, to, piece.clone())?;
            }
            start = piece.end;
        }
    }
    Ok(way)
}

/// Copies a piece; says whether the kernel can between these files.
fn copy_in_kernel(from: &File, to: &File, piece: Range<u64>) -> io::Result<bool> {
    let (mut read_at, mut write_at) = (piece.start, piece.start);
    while read_at < piece.end {
        let left = usize::try_from(piece.end - read_at).map_err(io::Error::other)?;
        match rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(
                Errno::XDEV
                | Errno::INVAL
                | Errno::OPNOTSUPP
                | Errno::NOSYS
                | Errno::PERM
                | Errno::BADF,
            ) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

fn read_and_write(from: &File, to: &File, piece: Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut at = piece.start;
    while at < piece.end {
        let len = usize::try_from(piece.end - at).map_err(io::Error::other)?.min(BUFFER_BYTES);
        from.read_exact_at(&mut buffer[..len], at)?;
        for (index, block) in buffer[..len].chunks(BLOCK_BYTES).enumerate() {
            if block.iter().any(|&byte| byte != 0) {
                to.write_all_at(block, at + (index * BLOCK_BYTES) as u64)?;
            }
        }
        at += len as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::sparse::allocated_bytes;

    /// A file that is removed at the end.
    struct Gone(std::path::PathBuf);

    impl Drop for Gone {
        fn drop(&mut self) {
            // It may never have been made.
            let _ = fs::remove_file(&self.0);
        }
    }

    fn named(folder: &str, name: &str) -> Gone {
        Gone(Path::new(folder).join(format!("clone-{name}-{}", std::process::id())))
    }

    #[test]
    fn holes_content_and_permissions_are_kept_on_every_way() {
        let source = named("/tmp", "source");
        let file = File::create(&source.0).unwrap();
        file.set_len((64 << 20) + 5).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(&[7; 100_000], 20 << 20).unwrap();
        file.write_all_at(b"end", (64 << 20) + 2).unwrap();
        fs::set_permissions(&source.0, fs::Permissions::from_mode(0o640)).unwrap();
        let expected = fs::read(&source.0).unwrap();
        // The same file system, and another one.
        for folder in ["/tmp", "/dev/shm"] {
            let target = named(folder, "target");
            clone_file(&source.0, &target.0, &|| false).unwrap();
            assert!(fs::read(&target.0).unwrap() == expected);
            let copy = File::open(&target.0).unwrap();
            assert!(allocated_bytes(&copy).unwrap() < 1 << 20);
            assert_eq!(copy.metadata().unwrap().mode() & 0o7777, 0o640);
            let again = clone_file(&source.0, &target.0, &|| false).unwrap_err();
            assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        }
    }

    #[test]
    fn a_copy_that_is_stopped_leaves_nothing() {
        let (source, target) = (named("/tmp", "stop-source"), named("/dev/shm", "stop-target"));
        fs::write(&source.0, vec![1; 1 << 20]).unwrap();
        let error = clone_file(&source.0, &target.0, &|| true).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
        assert!(!target.0.exists());
        assert!(clone_file(Path::new("/dev/null"), &target.0, &|| false).is_err());
    }
}
