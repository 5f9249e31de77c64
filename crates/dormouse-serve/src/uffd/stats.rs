//! What was done for a guest, counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What was done for a guest, or for several, so far.
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
    /// Of all these, zeros that the image does not store.
    pub zero_bytes: u64,
    /// Bytes that the guest gave back.
    pub removed_bytes: u64,
    /// Answers that had to be tried again, as the guest was giving memory back.
    pub retries: u64,
    /// Captures that came to nothing because pages were given back.
    pub captures_lost: u64,
    /// From reading a fault's message until a thread took it up, all together.
    pub waiting: Duration,
    /// From then on to its answer.
    pub serving: Duration,
}

impl VmStats {
    pub(super) fn add(&mut self, other: &VmStats) {
        for (sum, part) in [
            (&mut self.faults, other.faults),
            (&mut self.first_writes, other.first_writes),
            (&mut self.installed_bytes, other.installed_bytes),
            (&mut self.around_bytes, other.around_bytes),
            (&mut self.prefetched_bytes, other.prefetched_bytes),
            (&mut self.zero_bytes, other.zero_bytes),
            (&mut self.removed_bytes, other.removed_bytes),
            (&mut self.retries, other.retries),
            (&mut self.captures_lost, other.captures_lost),
        ] {
            *sum += part;
        }
        self.waiting += other.waiting;
        self.serving += other.serving;
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    faults: AtomicU64,
    first_writes: AtomicU64,
    installed: AtomicU64,
    around: AtomicU64,
    prefetched: AtomicU64,
    zeros: AtomicU64,
    removed: AtomicU64,
    retries: AtomicU64,
    pub(super) captures_lost: AtomicU64,
    waiting_nanos: AtomicU64,
    serving_nanos: AtomicU64,
}

impl Counters {
    pub(super) fn answered(&self, waited: Duration, took: Duration) {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.waiting_nanos.fetch_add(nanos(waited), Ordering::Relaxed);
        self.serving_nanos.fetch_add(nanos(took), Ordering::Relaxed);
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
    }

    pub(super) fn zeros(&self, bytes: u64) {
        self.zeros.fetch_add(bytes, Ordering::Relaxed);
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
            zero_bytes: load(&self.zeros),
            removed_bytes: load(&self.removed),
            retries: load(&self.retries),
            captures_lost: load(&self.captures_lost),
            waiting: Duration::from_nanos(load(&self.waiting_nanos)),
            serving: Duration::from_nanos(load(&self.serving_nanos)),
        }
    }
}
