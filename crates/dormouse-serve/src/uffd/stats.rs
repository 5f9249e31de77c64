//! What was done for a guest, counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What was done for a guest so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmStats {
    /// Faults that were answered.
    pub faults: u64,
    /// Of them, first writes to pages that were there.
    pub first_writes: u64,
    /// Bytes installed for threads that waited.
    pub installed_bytes: u64,
    /// Bytes installed around them.
    pub around_bytes: u64,
    /// Bytes installed before anybody asked.
    pub prefetched_bytes: u64,
    /// Bytes that the guest gave back.
    pub removed_bytes: u64,
    /// Answers that had to be tried again, as the guest was giving memory back.
    pub retries: u64,
    /// Captures that came to nothing because pages were given back.
    pub captures_lost: u64,
    /// From reading a fault's message to its answer, all together.
    pub serving: Duration,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    faults: AtomicU64,
    first_writes: AtomicU64,
    installed: AtomicU64,
    around: AtomicU64,
    prefetched: AtomicU64,
    removed: AtomicU64,
    retries: AtomicU64,
    pub(super) captures_lost: AtomicU64,
    serving_nanos: AtomicU64,
}

impl Counters {
    pub(super) fn answered(&self, took: Duration) {
        self.faults.fetch_add(1, Ordering::Relaxed);
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.serving_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    pub(super) fn first_write(&self) {
        self.first_writes.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn installed(&self, bytes: u64) {
        self.installed.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn around(&self, bytes: u64) {
        self.around.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn prefetched(&self, bytes: u64) {
        self.prefetched.fetch_add(bytes, Ordering::Relaxed);
        // Installing counted them as neighbours.
        self.around.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(super) fn removed(&self, bytes: u64) {
        self.removed.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts a retry and tells how many there were before.
    pub(super) fn retried(&self) -> u64 {
        self.retries.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn read(&self) -> VmStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VmStats {
            faults: load(&self.faults),
            first_writes: load(&self.first_writes),
            installed_bytes: load(&self.installed),
            around_bytes: load(&self.around),
            prefetched_bytes: load(&self.prefetched),
            removed_bytes: load(&self.removed),
            retries: load(&self.retries),
            captures_lost: load(&self.captures_lost),
            serving: Duration::from_nanos(load(&self.serving_nanos)),
        }
    }
}
