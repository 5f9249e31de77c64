//! Where threads stop between two operations while the VMM is paused.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A gate that all threads pass through.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// A copy of `paused` that costs nothing to look at.
    is_paused: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    paused: bool,
    /// Threads between gate and gate.
    working: usize,
}

impl Gate {
    /// A thread begins to work, as soon as it may.
    pub(super) fn enter(&self) {
        let mut state = self.lock();
        while state.paused {
            state = self.wait(state);
        }
        state.working += 1;
    }

    /// A thread is between two operations.
    pub(super) fn pass(&self) {
        if self.is_paused.load(Ordering::Acquire) {
            self.leave();
            self.enter();
        }
    }

    /// A thread has nothing to do.
    pub(super) fn leave(&self) {
        self.lock().working -= 1;
        self.changed.notify_all();
    }

    /// Returns when no thread works any more.
    pub(super) fn pause(&self) {
        let mut state = self.lock();
        state.paused = true;
        self.is_paused.store(true, Ordering::Release);
        while state.working > 0 {
            state = self.wait(state);
        }
    }

    /// Lets threads go on.
    pub(super) fn resume(&self) {
        self.lock().paused = false;
        self.is_paused.store(false, Ordering::Release);
        self.changed.notify_all();
    }

    pub(super) fn paused(&self) -> bool {
        self.lock().paused
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}
