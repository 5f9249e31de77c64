//! What went through a mount, counted since this process serves it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Figures of a mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Reads that came from the kernel: of memory these are page faults and what is read ahead of
    /// them; pages that it has are not seen.
    pub reads: u64,

    /// Bytes that were given.
    pub read_bytes: u64,

    /// Time that reads took, all together.
    pub read_nanoseconds: u64,

    /// Writes, punched holes and zeroed ranges not among them.
    pub writes: u64,

    /// Bytes that were taken.
    pub written_bytes: u64,

    /// Reads and writes that failed.
    pub failures: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    read_nanoseconds: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    failures: AtomicU64,
}

impl Counters {
    /// A read that began then has ended.
    pub(super) fn read<E>(&self, result: &Result<usize, E>, begun: Instant) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let took = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.read_nanoseconds.fetch_add(took, Ordering::Relaxed);
        self.moved(result, &self.read_bytes);
    }

    /// A write has ended.
    pub(super) fn written<E>(&self, result: &Result<usize, E>) {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.moved(result, &self.written_bytes);
    }

    fn moved<E>(&self, result: &Result<usize, E>, bytes: &AtomicU64) {
        match result {
            Ok(count) => bytes.fetch_add(*count as u64, Ordering::Relaxed),
            Err(_) => self.failures.fetch_add(1, Ordering::Relaxed),
        };
    }

    pub(super) fn traffic(&self) -> Traffic {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            reads: of(&self.reads),
            read_bytes: of(&self.read_bytes),
            read_nanoseconds: of(&self.read_nanoseconds),
            writes: of(&self.writes),
            written_bytes: of(&self.written_bytes),
            failures: of(&self.failures),
        }
    }
}
