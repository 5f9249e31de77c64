//! What an open file is and how many bytes it holds (`fstat(2)`, `lseek(2)`).
//!
//! `st_size` is the length of a regular file only: for a block device it is 0, and the length is
//! where `SEEK_END` lands. Streams and folders have no length at all.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FileType, SeekFrom};

/// What kind of file a descriptor refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FileKind {
    /// Bytes on a file system.
    Regular,

    /// A disk or a partition, a loop device, a device-mapper target.
    BlockDevice,

    /// A terminal, `/dev/null` and the like.
    CharacterDevice,

    /// A pipe, named or not.
    Fifo,

    /// A socket.
    Socket,

    /// A directory.
    Folder,

    /// Something the kernel calls none of these, such as an eventfd.
    Other,
}

impl FileKind {
    /// Whether bytes can be read at any offset of it and it ends somewhere.
    pub fn is_seekable(self) -> bool {
        matches!(self, FileKind::Regular | FileKind::BlockDevice)
    }

    /// The kind in words, with its article, for messages.
    pub fn describe(self) -> &'static str {
        match self {
            FileKind::Regular => "a regular file",
            FileKind::BlockDevice => "a block device",
            FileKind::CharacterDevice => "a character device",
            FileKind::Fifo => "a pipe",
            FileKind::Socket => "a socket",
            FileKind::Folder => "a folder",
            FileKind::Other => "not a file with bytes",
        }
    }
}

/// A file's kind, and its length if that kind has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSize {
    /// What it is.
    pub kind: FileKind,

    /// Its length in bytes: `Some` exactly for regular files and block devices.
    pub bytes: Option<u64>,
}

/// The kind and length of an open file.
///
/// The file position of a block device is moved to its end and back; do not call this while
/// another thread reads from the same description without an offset.
pub fn file_size(file: impl AsFd) -> io::Result<FileSize> {
    let file = file.as_fd();
    let stat = rustix::fs::fstat(file)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => FileKind::Regular,
        FileType::BlockDevice => FileKind::BlockDevice,
        FileType::CharacterDevice => FileKind::CharacterDevice,
        FileType::Fifo => FileKind::Fifo,
        FileType::Socket => FileKind::Socket,
        FileType::Directory => FileKind::Folder,
        _ => FileKind::Other,
    };
    let bytes = match kind {
        FileKind::Regular => Some(u64::try_from(stat.st_size).map_err(io::Error::other)?),
        FileKind::BlockDevice => {
            let position = rustix::fs::tell(file)?;
            let end = rustix::fs::seek(file, SeekFrom::End(0))?;
            rustix::fs::seek(file, SeekFrom::Start(position))?;
            Some(end)
        }
        _ => None,
    };
    Ok(FileSize { kind, bytes })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn kinds_and_lengths() {
        let regular = crate::temp_file::unnamed(&std::env::temp_dir()).unwrap();
        regular.set_len(12_345).unwrap();
        let (pipe, _writer) = std::io::pipe().unwrap();
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let cases: [(OwnedFd, FileKind, Option<u64>); 5] = [
            (regular.into(), FileKind::Regular, Some(12_345)),
            (File::open("/").unwrap().into(), FileKind::Folder, None),
            (File::open("/dev/null").unwrap().into(), FileKind::CharacterDevice, None),
            (pipe.into(), FileKind::Fifo, None),
            (socket.into(), FileKind::Socket, None),
        ];
        for (file, kind, bytes) in cases {
            assert_eq!(file_size(&file).unwrap(), FileSize { kind, bytes }, "{kind:?}");
            assert_eq!(kind.is_seekable(), bytes.is_some(), "{kind:?}");
        }
    }
}
