//! Faults of all guests that were read and wait for a thread.
//!
//! The *backlog* is for whoever is free first; what is *deferred* is tried again a moment later, as its
//! guest is giving back memory. Both name guests by number, so that they hold on to none that has ended.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dormouse_live::pages::Wait;
use rustix::event::EventfdFlags;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::error::{Error, Result};

/// Wait between attempts to answer a fault of a guest that is giving back memory.
const RETRY_AFTER: Duration = Duration::from_millis(1);

/// A thread of a guest that waits for a page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    pub(super) address: u64,
    pub(super) wait: Wait,
    /// When its message was read.
    pub(super) read: Instant,
}

/// Faults with the numbers of their guests.
#[derive(Debug)]
pub(super) struct Faults {
    /// Counts up for each thread that is to look at the backlog.
    wakeup: OwnedFd,
    /// Runs out when what is deferred is to be tried again.
    retry: OwnedFd,
    backlog: Mutex<VecDeque<(u64, Fault)>>,
    deferred: Mutex<Vec<(u64, Fault)>>,
    /// How long the backlog is: prefetching waits for it.
    unattended: AtomicUsize,
}

impl Faults {
    pub(super) fn new() -> Result<Faults> {
        let cannot = |error: rustix::io::Errno| Error::io("cannot pass on faults", error.into());
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
        let clock = TimerfdClockId::Monotonic;
        Ok(Faults {
            wakeup: rustix::event::eventfd(0, flags).map_err(cannot)?,
            retry: timerfd_create(clock, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)
                .map_err(cannot)?,
            backlog: Mutex::default(),
            deferred: Mutex::default(),
            unattended: AtomicUsize::new(0),
        })
    }

    /// Readable as long as threads are to look at the backlog.
    pub(super) fn wakeup(&self) -> impl AsFd {
        &self.wakeup
    }

    /// Readable when what is deferred is to be tried again.
    pub(super) fn retry(&self) -> impl AsFd {
        &self.retry
    }

    /// Whether any waits for a thread.
    pub(super) fn is_backed_up(&self) -> bool {
        self.unattended.load(Ordering::Acquire) > 0
    }

    /// Leaves faults to whoever is free.
    pub(super) fn pass_on(&self, guest: u64, faults: impl ExactSizeIterator<Item = Fault>) {
        let count = faults.len();
        if count > 0 {
            let mut backlog = lock(&self.backlog);
            backlog.extend(faults.map(|fault| (guest, fault)));
            self.unattended.store(backlog.len(), Ordering::Release);
            drop(backlog);
            self.wake(count);
        }
    }

    /// The next one that nobody answers yet.
    pub(super) fn next(&self) -> Option<(u64, Fault)> {
        if !self.is_backed_up() {
            return None;
        }
        let mut backlog = lock(&self.backlog);
        let next = backlog.pop_front();
        self.unattended.store(backlog.len(), Ordering::Release);
        next
    }

    /// Leaves a fault for later.
    pub(super) fn defer(&self, guest: u64, fault: Fault) {
        let mut deferred = lock(&self.deferred);
        deferred.push((guest, fault));
        if deferred.len() == 1 {
            let value = Timespec { tv_sec: 0, tv_nsec: i64::from(RETRY_AFTER.subsec_nanos()) };
            let never = Timespec { tv_sec: 0, tv_nsec: 0 };
            let once = Itimerspec { it_interval: never, it_value: value };
            timerfd_settime(&self.retry, TimerfdTimerFlags::empty(), &once)
                .expect("a timer of ours takes a millisecond");
        }
    }

    /// What was deferred, once its time has come.
    pub(super) fn take_deferred(&self) -> Vec<(u64, Fault)> {
        // Somebody else may have read it; what is deferred is taken by one of the two.
        let _ = rustix::io::read(&self.retry, &mut [0; 8]);
        std::mem::take(&mut *lock(&self.deferred))
    }

    /// Has so many threads wake up.
    pub(super) fn wake(&self, count: usize) {
        // Full: there are 2^64 wake-ups to come.
        let _ = rustix::io::write(&self.wakeup, &(count as u64).to_ne_bytes());
    }

    /// Takes note of being woken.
    pub(super) fn woken(&self) {
        // Somebody else may have taken it.
        let _ = rustix::io::read(&self.wakeup, &mut [0; 8]);
    }
}

/// Locked for moments, and never while another lock is taken.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
