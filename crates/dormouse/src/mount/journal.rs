//! What was written to live disks and is not durable yet, in memory that outlives this process.
//!
//! A guest goes on when the process that serves its disks is killed, and relies on every write that
//! was answered; an overlay gives back what was flushed. So a mount that can be taken over notes each
//! write before it answers it, and a successor does them again, in their order, before it answers.
//!
//! ```text
//! 0   sequence   8   one more than that of the record before
//! 8   offset     8
//! 16  length     8   bytes that were written or made zero
//! 24  kind       4   1 write, 2 punch, 3 zeros, 4 let go of; 0 where no record is
//! 28  name       4   bytes of the name that follows, LIVE/ID, or LIVE for 4
//! 32  name, and the bytes of a write
//! ```
//!
//! There are two such files. When one is full the other is begun, all disks are flushed, and the full
//! one is emptied. A record's head is written last, so a killed writer leaves it whole or not at all.
//! The format is between processes of one build and has no other life.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{MemfdFlags, memfd_create};

/// Bytes of a file at which the other one is begun.
const HALF_BYTES: u64 = 64 << 20;

const HEAD_BYTES: usize = 32;

/// Longer names are none of ours.
const NAME_BYTES_MAX: usize = 512;

/// Longer writes are none of the kernel's.
const WRITE_BYTES_MAX: usize = 64 << 20;

/// A change of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change<'a> {
    Write {
        offset: u64,
        data: &'a [u8],
    },
    /// Made zero, and given back if that is wanted.
    Zero {
        offset: u64,
        length: u64,
        may_punch: bool,
    },
    /// All that was written to a live VM is durable, and another process may have it from now on.
    LetGo,
}

/// The notes of a mount.
pub(crate) struct Journal {
    files: [File; 2],
    state: Mutex<State>,
    /// Held while disks are flushed to empty a file. Taken before the state.
    settling: Mutex<()>,
    flush: OnceLock<Box<dyn Fn() -> io::Result<()> + Send + Sync>>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").field("state", &self.state).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct State {
    current: usize,
    ends: [u64; 2],
    next: u64,
}

/// A record's head.
#[derive(Clone, Copy, Debug)]
struct Head {
    sequence: u64,
    offset: u64,
    length: u64,
    kind: u32,
    name: usize,
}

impl Journal {
    /// An empty one.
    pub(super) fn new() -> io::Result<Journal> {
        let make = || memfd_create("dormouse-journal", MemfdFlags::CLOEXEC);
        Ok(Journal::of([File::from(make()?), File::from(make()?)]))
    }

    /// What a predecessor left.
    pub(super) fn adopt(files: [OwnedFd; 2]) -> Journal {
        Journal::of(files.map(File::from))
    }

    fn of(files: [File; 2]) -> Journal {
        let (state, settling, flush) = (Mutex::default(), Mutex::default(), OnceLock::new());
        Journal { files, state, settling, flush }
    }

    /// How all disks are made durable.
    pub(super) fn flush_by(&self, flush: impl Fn() -> io::Result<()> + Send + Sync + 'static) {
        // There is one way.
        let _ = self.flush.set(Box::new(flush));
    }

    /// The descriptors, for whoever keeps them.
    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.files[0].as_fd(), self.files[1].as_fd()]
    }

    /// Notes a change that was made to a disk, or that a VM was let go of.
    pub(super) fn note(&self, name: &str, change: Change<'_>) -> io::Result<()> {
        let (kind, offset, length, data) = match change {
            Change::Write { offset, data } => (1, offset, data.len() as u64, data),
            Change::Zero { offset, length, may_punch } => {
                (if may_punch { 2 } else { 3 }, offset, length, &[][..])
            }
            Change::LetGo => (4, 0, 0, &[][..]),
        };
        loop {
            let mut state = self.state();
            let current = state.current;
            // Whoever lets go holds what is locked to flush, and notes a few bytes.
            if state.ends[current] < HALF_BYTES || change == Change::LetGo {
                let head =
                    Head { sequence: state.next + 1, offset, length, kind, name: name.len() };
                let at = state.ends[current];
                let file = &self.files[current];
                let body = at + HEAD_BYTES as u64;
                file.write_all_at(name.as_bytes(), body)?;
                file.write_all_at(data, body + name.len() as u64)?;
                file.write_all_at(&head.encode(), at)?;
                state.ends[current] = body + (name.len() + data.len()) as u64;
                state.next += 1;
                return Ok(());
            }
            drop(state);
            self.settle()?;
        }
    }

    /// Begins the other file and empties the full one, as all in it is durable then.
    fn settle(&self) -> io::Result<()> {
        let _one = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let full = {
            let mut state = self.state();
            let (current, other) = (state.current, state.current ^ 1);
            if state.ends[current] < HALF_BYTES {
                // Somebody else did.
                return Ok(());
            }
            // If it is not empty, flushing failed the last time; then both are durable after this.
            if state.ends[other] == 0 {
                state.current = other;
            }
            current
        };
        let flush = self.flush.get().ok_or_else(|| io::Error::other("nobody flushes"))?;
        // What is noted in the full one was written before, so it is flushed now.
        let end = self.state().ends[full];
        flush()?;
        let mut state = self.state();
        if state.current == full && state.ends[full] != end {
            // More came while there was no other file; the next one settles that.
            state.current ^= 1;
            return self.empty(&mut state, full ^ 1);
        }
        self.empty(&mut state, full)
    }

    fn empty(&self, state: &mut State, half: usize) -> io::Result<()> {
        self.files[half].set_len(0)?;
        state.ends[half] = 0;
        Ok(())
    }

    /// Tells what must be done again, in its order; by the names of the disks.
    pub(super) fn replay(
        &self,
        apply: &mut dyn FnMut(&str, Change<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut records = Vec::new();
        for (number, file) in self.files.iter().enumerate() {
            let len = file.metadata()?.len();
            let mut at = 0;
            while let Some(head) = Head::read(file, at, len)? {
                records.push((head.sequence, number, at, head));
                at = head.end(at);
            }
        }
        records.sort_unstable_by_key(|(sequence, ..)| *sequence);
        let mut let_go = BTreeMap::new();
        for (sequence, number, at, head) in &records {
            if head.kind == 4 {
                let_go.insert(self.name(*number, *at, *head)?, *sequence);
            }
        }
        for (sequence, number, at, head) in records {
            let name = self.name(number, at, head)?;
            let live = name.split('/').next().unwrap_or_default();
            if head.kind == 4 || let_go.get(live).is_some_and(|since| sequence < *since) {
                continue;
            }
            let Head { offset, length, .. } = head;
            match head.kind {
                1 => {
                    let mut data = vec![0; usize::try_from(length)?];
                    let body = at + (HEAD_BYTES + head.name) as u64;
                    self.files[number].read_exact_at(&mut data, body)?;
                    apply(&name, Change::Write { offset, data: &data })?;
                }
                kind => {
                    apply(&name, Change::Zero { offset, length, may_punch: kind == 2 })?;
                }
            }
        }
        Ok(())
    }

    /// Forgets everything.
    pub(super) fn clear(&self) -> io::Result<()> {
        let mut state = self.state();
        self.empty(&mut state, 0)?;
        self.empty(&mut state, 1)
    }

    fn name(&self, number: usize, at: u64, head: Head) -> io::Result<String> {
        let mut name = vec![0; head.name];
        self.files[number].read_exact_at(&mut name, at + HEAD_BYTES as u64)?;
        String::from_utf8(name).map_err(io::Error::other)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // It is changed after what it speaks of.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Head {
    fn encode(self) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        bytes[..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.length.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.kind.to_le_bytes());
        let name = u32::try_from(self.name).unwrap_or(0);
        bytes[28..].copy_from_slice(&name.to_le_bytes());
        bytes
    }

    /// The head at `at`, if a record is there.
    fn read(file: &File, at: u64, len: u64) -> io::Result<Option<Head>> {
        if at + HEAD_BYTES as u64 > len {
            return Ok(None);
        }
        let mut bytes = [0; HEAD_BYTES];
        file.read_exact_at(&mut bytes, at)?;
        let number = |range: Range<usize>| {
            bytes[range].iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let kind = u32::try_from(number(24..28)).unwrap_or(u32::MAX);
        let name = usize::try_from(number(28..32)).unwrap_or(usize::MAX);
        let head = Head {
            sequence: number(0..8),
            offset: number(8..16),
            length: number(16..24),
            kind,
            name,
        };
        let is_sound = name <= NAME_BYTES_MAX
            && (kind != 1 || head.length <= WRITE_BYTES_MAX as u64)
            && head.end(at) <= len;
        match kind {
            0 => Ok(None),
            1..=4 if is_sound => Ok(Some(head)),
            _ => Err(io::Error::other(format!("the journal of a mount is damaged at byte {at}"))),
        }
    }

    fn end(&self, at: u64) -> u64 {
        let data = if self.kind == 1 { self.length } else { 0 };
        at + (HEAD_BYTES + self.name) as u64 + data
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// What a successor would do again.
    fn replayed(journal: &Journal) -> Vec<(String, u64, u64)> {
        let files = journal.descriptors().map(|file| file.try_clone_to_owned().unwrap());
        let mut seen = Vec::new();
        Journal::adopt(files)
            .replay(&mut |name, change| {
                seen.push(match change {
                    Change::Write { offset, data } => (name.to_owned(), offset, data.len() as u64),
                    Change::Zero { offset, length, .. } => (name.to_owned(), offset, length),
                    Change::LetGo => panic!("nothing to do"),
                });
                Ok(())
            })
            .unwrap();
        seen
    }

    #[test]
    fn a_successor_does_again_what_was_not_let_go_of() {
        let journal = Journal::new().unwrap();
        let write = |offset| Change::Write { offset, data: &[7; 100] };
        journal.note("a/root", write(1)).unwrap();
        journal.note("b/root", write(2)).unwrap();
        journal.note("a", Change::LetGo).unwrap();
        journal.note("a/data", Change::Zero { offset: 3, length: 9, may_punch: true }).unwrap();
        journal.note("b/root", write(4)).unwrap();
        let expected = [("b/root", 2, 100), ("a/data", 3, 9), ("b/root", 4, 100)];
        let expected = expected.map(|(name, offset, len)| (name.to_owned(), offset, len));
        assert_eq!(replayed(&journal), expected);
        // A writer that was killed before its head was there has noted nothing.
        let end = journal.state().ends[0];
        journal.files[0].write_all_at(&[1; 40], end + HEAD_BYTES as u64).unwrap();
        assert_eq!(replayed(&journal), expected);
        journal.clear().unwrap();
        assert_eq!(replayed(&journal), []);
    }

    /// Two files are filled many times over: what was noted after the last flush is always there.
    #[test]
    fn a_full_file_is_emptied_once_all_is_durable() {
        let journal = Arc::new(Journal::new().unwrap());
        let (noted, durable) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let fails = Arc::new(AtomicU64::new(0));
        {
            let (noted, durable) = (Arc::clone(&noted), Arc::clone(&durable));
            let fails = Arc::clone(&fails);
            journal.flush_by(move || {
                if fails.load(Ordering::SeqCst) > 0 {
                    fails.fetch_sub(1, Ordering::SeqCst);
                    return Err(io::ErrorKind::StorageFull.into());
                }
                durable.store(noted.load(Ordering::SeqCst), Ordering::SeqCst);
                Ok(())
            });
        }
        let data = vec![1; 1 << 20];
        for number in 1..=300_u64 {
            if number == 150 {
                fails.store(2, Ordering::SeqCst);
            }
            while journal.note("a/root", Change::Write { offset: number, data: &data }).is_err() {}
            noted.store(number, Ordering::SeqCst);
            let lens: u64 = journal.files.iter().map(|file| file.metadata().unwrap().len()).sum();
            assert!(lens < 3 * HALF_BYTES, "{lens}");
            if number % 50 == 0 {
                let seen: Vec<u64> = replayed(&journal).iter().map(|(_, at, _)| *at).collect();
                let first = durable.load(Ordering::SeqCst) + 1;
                assert!(seen.is_sorted() && seen.last() == Some(&number));
                assert!(seen[0] <= first, "{first} is missing");
            }
        }
        assert!(durable.load(Ordering::SeqCst) > 100);
    }

    #[test]
    fn what_is_damaged_is_not_done() {
        let journal = Journal::new().unwrap();
        journal.note("a/root", Change::Write { offset: 0, data: &[1; 10] }).unwrap();
        journal.files[0].write_all_at(&[9], 24).unwrap();
        let files = journal.descriptors().map(|file| file.try_clone_to_owned().unwrap());
        assert!(Journal::adopt(files).replay(&mut |_, _| Ok(())).is_err());
    }
}
