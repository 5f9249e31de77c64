//! One file: its bytes, how far they are on the medium, and who holds its lock.
//!
//! Files are only appended to, so one buffer serves for every version: a sector as it was after
//! an earlier write is a prefix of the sector as it is now. Per sector it is enough to know how
//! many of its bytes are surely on the medium, and where the pending writes ended.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dormouse_store::disk::LockKind;

use super::Survive;
use super::random::SplitMix64;

/// What the medium writes whole or not at all.
pub(super) const SECTOR_BYTES: usize = 512;

/// What the file system hands out; as ext4 and XFS do by default.
const ALLOCATION_BYTES: u64 = 4096;

/// `EIO` of Linux, which has no [`io::ErrorKind`].
const EIO: i32 = 5;

/// A file, shared by its names and the handles open on it.
pub(super) struct Inode {
    pub(super) id: u64,

    /// Guards the content and the lock holders. Taken after the machine's state.
    content: Mutex<Content>,
}

impl Inode {
    pub(super) fn new(id: u64, content: Content) -> Inode {
        Inode { id, content: Mutex::new(content) }
    }

    pub(super) fn content(&self) -> MutexGuard<'_, Content> {
        // A test thread that panicked has shown its fault already.
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Inode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inode").field("id", &self.id).finish_non_exhaustive()
    }
}

/// What a file holds.
#[derive(Default)]
pub(super) struct Content {
    bytes: Vec<u8>,

    /// For each sector, how many of its bytes are surely on the medium.
    settled: Vec<usize>,

    /// The length that is surely on the medium.
    settled_len: usize,

    /// The first sector that the next sync writes out.
    dirty_from: usize,

    /// The lengths after each write since the last sync.
    write_ends: Vec<usize>,

    /// Where reading fails.
    broken: Vec<Range<u64>>,

    shared_holders: usize,
    is_exclusive: bool,
}

impl Content {
    /// A file that is on the medium whole.
    pub(super) fn settled(bytes: Vec<u8>) -> Content {
        let mut content = Content { bytes, ..Content::default() };
        content.sync();
        content
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn allocated_bytes(&self) -> u64 {
        (self.bytes.len() as u64).next_multiple_of(ALLOCATION_BYTES)
    }

    pub(super) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let wanted = offset..offset.saturating_add(buf.len() as u64);
        if self.broken.iter().any(|bad| bad.start < wanted.end && wanted.start < bad.end) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        let found = usize::try_from(offset).ok().and_then(|start| {
            let end = start.checked_add(buf.len())?;
            self.bytes.get(start..end)
        });
        match found {
            Some(found) => buf.copy_from_slice(found),
            None if buf.is_empty() => {}
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }

    pub(super) fn append(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.dirty_from = self.dirty_from.min(self.bytes.len() / SECTOR_BYTES);
        self.bytes.extend_from_slice(bytes);
        self.settled.resize(self.bytes.len().div_ceil(SECTOR_BYTES), 0);
        self.write_ends.push(self.bytes.len());
    }

    pub(super) fn sync(&mut self) {
        let sectors = self.bytes.len().div_ceil(SECTOR_BYTES);
        self.settled.resize(sectors, 0);
        for sector in self.dirty_from..sectors {
            self.settled[sector] = self.sector_len(sector);
        }
        self.settled_len = self.bytes.len();
        self.dirty_from = sectors;
        self.write_ends.clear();
    }

    /// A failed sync: Linux marks the pages clean, so that no later sync writes them out.
    pub(super) fn fail_sync(&mut self) {
        self.dirty_from = self.bytes.len().div_ceil(SECTOR_BYTES);
    }

    pub(super) fn break_range(&mut self, range: Range<u64>) {
        self.broken.push(range);
    }

    pub(super) fn flip_bit(&mut self, bit: u64) -> io::Result<()> {
        let byte = usize::try_from(bit / 8).ok().and_then(|at| self.bytes.get_mut(at));
        *byte.ok_or_else(past_the_end)? ^= 1 << (bit % 8);
        Ok(())
    }

    pub(super) fn truncate(&mut self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| past_the_end())?;
        if len > self.bytes.len() {
            return Err(past_the_end());
        }
        self.bytes.truncate(len);
        self.settled.truncate(len.div_ceil(SECTOR_BYTES));
        if let Some(last) = self.settled.len().checked_sub(1) {
            self.settled[last] = self.settled[last].min(self.sector_len(last));
        }
        self.settled_len = self.settled_len.min(len);
        self.dirty_from = self.dirty_from.min(self.settled.len());
        self.write_ends.retain(|end| *end <= len);
        Ok(())
    }

    /// Puts other bytes on the medium, leaving the lock to its holders.
    pub(super) fn replace(&mut self, bytes: &[u8]) {
        *self = Content {
            shared_holders: self.shared_holders,
            is_exclusive: self.is_exclusive,
            ..Content::settled(bytes.to_vec())
        };
    }

    /// What a power cut leaves of the file.
    pub(super) fn after_power_cut(&self, survive: Survive, random: &mut SplitMix64) -> Content {
        let len = match survive {
            Survive::Nothing => self.settled_len,
            Survive::Everything => self.bytes.len(),
            Survive::Random(_) => self.random_len(random),
        };
        let mut bytes = vec![0; len];
        let quarters = random.up_to(4);
        for (sector, &settled) in self.settled.iter().enumerate() {
            let start = sector * SECTOR_BYTES;
            if start >= len {
                break;
            }
            let kept = match survive {
                Survive::Nothing => settled,
                Survive::Everything => self.sector_len(sector),
                Survive::Random(_) if settled == self.sector_len(sector) => settled,
                Survive::Random(_) if random.up_to(3) < quarters => {
                    self.random_version(sector, settled, random)
                }
                Survive::Random(_) => settled,
            };
            let end = len.min(start + kept);
            bytes[start..end].copy_from_slice(&self.bytes[start..end]);
        }
        Content { broken: self.broken.clone(), ..Content::settled(bytes) }
    }

    /// Takes the lock, or says that somebody else has it.
    pub(super) fn try_lock(&mut self, kind: LockKind) -> bool {
        let is_free = match kind {
            LockKind::Shared => !self.is_exclusive,
            LockKind::Exclusive => !self.is_exclusive && self.shared_holders == 0,
        };
        if is_free {
            match kind {
                LockKind::Shared => self.shared_holders += 1,
                LockKind::Exclusive => self.is_exclusive = true,
            }
        }
        is_free
    }

    pub(super) fn unlock(&mut self, kind: LockKind) {
        match kind {
            LockKind::Shared => self.shared_holders -= 1,
            LockKind::Exclusive => self.is_exclusive = false,
        }
    }

    fn sector_len(&self, sector: usize) -> usize {
        (self.bytes.len() - sector * SECTOR_BYTES).min(SECTOR_BYTES)
    }

    /// The old length, the new one, that after one of the writes, or a whole number of sectors.
    fn random_len(&self, random: &mut SplitMix64) -> usize {
        let (old, new) = (self.settled_len, self.bytes.len());
        match random.up_to(3) {
            0 => old,
            1 => match self.write_ends.len().checked_sub(1) {
                Some(last) => self.write_ends[random.up_to(last)].max(old),
                None => new,
            },
            2 => (old + random.up_to(new - old)).next_multiple_of(SECTOR_BYTES).min(new),
            _ => new,
        }
    }

    /// The bytes of the sector as one of the pending writes left it.
    fn random_version(&self, sector: usize, settled: usize, random: &mut SplitMix64) -> usize {
        let start = sector * SECTOR_BYTES;
        let end = start + self.sector_len(sector);
        let first = self.write_ends.partition_point(|at| *at <= start + settled);
        let past = self.write_ends.partition_point(|at| *at < end);
        let earlier = past.saturating_sub(first);
        match random.up_to(earlier) {
            version if version < earlier => self.write_ends[first + version] - start,
            _ => end - start,
        }
    }
}

fn past_the_end() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "past the end of the file")
}
