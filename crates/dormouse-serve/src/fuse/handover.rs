//! What a successor needs to take a mount over: the descriptor of `/dev/fuse`, and a ledger of what
//! was negotiated and what is open, in memory that outlives a killed process as long as somebody
//! holds its descriptor.
//!
//! ```text
//! 0      magic, version, the kernel's protocol version and capabilities, place and options
//! 4096   one slot of 512 bytes for each open file: inode, opens, length of the path, path
//! ```
//!
//! A slot lies in one page and is written by one call, its count last, so a killed writer leaves
//! the old slot or the new one. The format is between processes of one build and has no other life.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use fuser::{Errno, InitFlags, Version};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::error::{Error, ErrorKind, Result};

const MAGIC: [u8; 8] = *b"DMmount\x01";
const HEADER_BYTES: usize = 4096;
const SLOT_BYTES: usize = 512;
const SLOT_FIXED_BYTES: usize = 18;

/// Files that a mount has open at once; far beyond what descriptors allow.
const SLOTS_MAX: u32 = 1 << 20;

/// Where the place begins in the header, and how long it may be.
const PLACE_AT: usize = 64;
const PLACE_BYTES_MAX: usize = 4096 - PLACE_AT;

/// A mount as it can be handed to another process, which then calls
/// [`Mount::resume`](super::Mount::resume). Somebody must hold both descriptors all the time: when
/// the last copy of the device is closed, the mount is dead.
///
/// Whoever starts a successor must have no file of the mount open: a new process closes its copies of
/// such files before it becomes another program, and that waits for the server that it is to be.
#[derive(Debug)]
pub struct Handover {
    /// The connection to the kernel.
    pub device: OwnedFd,

    /// The ledger.
    pub state: OwnedFd,
}

/// The ledger of a mount.
#[derive(Debug)]
pub(super) struct Ledger {
    file: File,
    place: PathBuf,
    /// What was negotiated with the kernel; set once.
    negotiated: OnceLock<Negotiated>,
    /// Slots that are free, the last one first, and how many there are.
    free: Mutex<(Vec<u32>, u32)>,
}

/// What the kernel said when the mount was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Negotiated {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) capabilities: u64,
}

/// A file that is open.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) slot: u32,
    pub(super) inode: u64,
    pub(super) opens: u64,
    pub(super) path: String,
}

impl Ledger {
    /// An empty ledger of a mount at `place`.
    pub(super) fn new(place: &Path) -> Result<Ledger> {
        let cannot = |error| Error::io("cannot make the ledger of a mount", error);
        let bytes = place.as_os_str().as_bytes();
        if bytes.len() > PLACE_BYTES_MAX {
            return Err(Error::new(ErrorKind::InvalidInput, "the path of the mount is too long"));
        }
        let file = memfd_create("dormouse-mount", MemfdFlags::CLOEXEC)
            .map_err(|error| cannot(error.into()))?;
        let file = File::from(file);
        let mut header = vec![0; PLACE_AT];
        header[..8].copy_from_slice(&MAGIC);
        header[32..36].copy_from_slice(&u32::try_from(bytes.len()).unwrap_or(0).to_le_bytes());
        header.extend_from_slice(bytes);
        file.write_all_at(&header, 0).map_err(cannot)?;
        let (negotiated, free) = (OnceLock::new(), Mutex::default());
        Ok(Ledger { file, place: place.to_owned(), negotiated, free })
    }

    /// The ledger that a predecessor left.
    pub(super) fn open(state: OwnedFd) -> Result<Ledger> {
        let file = File::from(state);
        let mut header = [0; HEADER_BYTES];
        let len = file.metadata().map_err(cannot_read)?.len();
        let header_len = usize::try_from(len).unwrap_or(HEADER_BYTES).min(HEADER_BYTES);
        file.read_exact_at(&mut header[..header_len], 0).map_err(cannot_read)?;
        if header[..8] != MAGIC {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "the ledger of the mount is not one, or of another version of dormouse",
            ));
        }
        let place_len = word(&header, 32) as usize;
        let place = header.get(PLACE_AT..PLACE_AT + place_len).ok_or_else(|| {
            Error::new(ErrorKind::InvalidInput, "the ledger of the mount is damaged")
        })?;
        let place = PathBuf::from(std::ffi::OsString::from_vec(place.to_vec()));
        let (low, high) = (word(&header, 16), word(&header, 20));
        let negotiated = Negotiated {
            major: word(&header, 8),
            minor: word(&header, 12),
            capabilities: u64::from(high) << 32 | u64::from(low),
        };
        let slots =
            u32::try_from(len.saturating_sub(HEADER_BYTES as u64).div_ceil(SLOT_BYTES as u64));
        let slots = slots.unwrap_or(0).min(SLOTS_MAX);
        let ledger = Ledger {
            file,
            place,
            negotiated: OnceLock::from(negotiated),
            free: Mutex::new((Vec::new(), slots)),
        };
        let used: Vec<u32> = ledger.open_files().iter().map(|line| line.slot).collect();
        ledger.free.lock().unwrap_or_else(PoisonError::into_inner).0 =
            (0..slots).filter(|slot| !used.contains(slot)).collect();
        Ok(ledger)
    }

    /// Where the mount is.
    pub(super) fn place(&self) -> &Path {
        &self.place
    }

    /// What the kernel said when the mount was made.
    pub(super) fn what_was_negotiated(&self) -> Option<Negotiated> {
        self.negotiated.get().copied()
    }

    /// Notes what the kernel said; a successor only repeats it to itself.
    pub(super) fn negotiated(&self, version: Version, capabilities: InitFlags) {
        let bits = capabilities.bits();
        let said = Negotiated { major: version.0, minor: version.1, capabilities: bits };
        if self.negotiated.set(said).is_err() {
            return;
        }
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&said.major.to_le_bytes());
        bytes[4..8].copy_from_slice(&said.minor.to_le_bytes());
        bytes[8..].copy_from_slice(&bits.to_le_bytes());
        if let Err(error) = self.file.write_all_at(&bytes, 8) {
            tracing::warn!(%error, "the mount cannot be taken over");
        }
    }

    /// Notes that a file is open `opens` times, and where that is noted.
    pub(super) fn opened(
        &self,
        slot: Option<u32>,
        inode: u64,
        path: &str,
        opens: u64,
    ) -> std::result::Result<u32, Errno> {
        if let Some(slot) = slot {
            self.closed(slot, opens);
            return Ok(slot);
        }
        if path.len() > SLOT_BYTES - SLOT_FIXED_BYTES {
            return Err(Errno::ENAMETOOLONG);
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = match free.0.pop() {
            Some(slot) => slot,
            None if free.1 == SLOTS_MAX => return Err(Errno::ENFILE),
            None => {
                free.1 += 1;
                free.1 - 1
            }
        };
        drop(free);
        let mut bytes = vec![0; SLOT_FIXED_BYTES];
        bytes[..8].copy_from_slice(&inode.to_le_bytes());
        let len = u16::try_from(path.len()).unwrap_or(0);
        bytes[16..18].copy_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(path.as_bytes());
        let at = slot_at(slot);
        if let Err(error) = self.file.write_all_at(&bytes, at) {
            tracing::warn!(%error, path, "cannot note an open file");
            return Err(Errno::EIO);
        }
        self.closed(slot, opens);
        Ok(slot)
    }

    /// Notes that a file is now open `opens` times; at zero the slot is free.
    pub(super) fn closed(&self, slot: u32, opens: u64) {
        let at = slot_at(slot) + 8;
        if let Err(error) = self.file.write_all_at(&opens.to_le_bytes(), at) {
            tracing::warn!(%error, "cannot note how often a file is open");
        }
        if opens == 0 {
            self.free.lock().unwrap_or_else(PoisonError::into_inner).0.push(slot);
        }
    }

    /// All files that are open.
    pub(super) fn open_files(&self) -> Vec<Line> {
        let slots = self.free.lock().unwrap_or_else(PoisonError::into_inner).1;
        (0..slots).filter_map(|slot| self.line(slot)).collect()
    }

    fn line(&self, slot: u32) -> Option<Line> {
        let at = slot_at(slot);
        let mut bytes = [0; SLOT_BYTES];
        let len = read_up_to(&self.file, &mut bytes, at).ok()?;
        let bytes = &bytes[..len];
        let inode = u64::from_le_bytes(*bytes.first_chunk()?);
        let opens = u64::from_le_bytes(*bytes.get(8..)?.first_chunk()?);
        let path_len = usize::from(u16::from_le_bytes(*bytes.get(16..)?.first_chunk()?));
        let path = bytes.get(SLOT_FIXED_BYTES..SLOT_FIXED_BYTES + path_len)?;
        let path = std::str::from_utf8(path).ok()?.to_owned();
        (opens > 0).then_some(Line { slot, inode, opens, path })
    }

    /// A copy of the ledger's descriptor.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }
}

fn slot_at(slot: u32) -> u64 {
    HEADER_BYTES as u64 + u64::from(slot) * SLOT_BYTES as u64
}

fn cannot_read(error: io::Error) -> Error {
    Error::io("cannot read the ledger of a mount", error)
}

fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read_at(&mut buffer[len..], offset + len as u64)? {
            0 => break,
            read => len += read,
        }
    }
    Ok(len)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_is_read_as_it_was_left() {
        let ledger = Ledger::new(Path::new("/mnt/store")).unwrap();
        let capabilities = InitFlags::FUSE_HAS_RESEND | InitFlags::FUSE_ASYNC_READ;
        ledger.negotiated(Version(7, 45), capabilities);
        let a = ledger.opened(None, 11, "vm/1/memory", 1).unwrap();
        let b = ledger.opened(None, 12, "vm/1/disk/root", 1).unwrap();
        ledger.opened(Some(a), 11, "vm/1/memory", 2).unwrap();
        ledger.closed(b, 0);
        let c = ledger.opened(None, 13, "live/box/disk/root", 1).unwrap();
        assert_eq!(b, c, "slots are used again");
        assert_eq!(ledger.opened(None, 14, &"x".repeat(600), 1), Err(Errno::ENAMETOOLONG));

        let ledger = Ledger::open(ledger.descriptor().unwrap()).unwrap();
        assert_eq!(ledger.place(), Path::new("/mnt/store"));
        let bits = capabilities.bits();
        let said = Negotiated { major: 7, minor: 45, capabilities: bits };
        assert_eq!(ledger.what_was_negotiated(), Some(said));
        let lines: Vec<_> = ledger
            .open_files()
            .into_iter()
            .map(|line| (line.inode, line.opens, line.path))
            .collect();
        let expected = [(11, 2, "vm/1/memory"), (13, 1, "live/box/disk/root")];
        assert_eq!(lines, expected.map(|(inode, opens, path)| (inode, opens, path.to_owned())));
        assert_eq!(ledger.opened(None, 15, "new", 1).unwrap(), 2, "no slot in use is taken");
    }

    #[test]
    fn what_is_no_ledger_is_refused() {
        let file = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(Ledger::open(file).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
