//! Which thread of a pager listens: one at a time.
//!
//! Whoever listens and hears of a fault answers it, if what it takes is at hand, and goes on listening:
//! so a guest whose memory is decoded is served by one thread, and no second one is woken beside it on a
//! processor that the guest could have. Before a thread does anything that may take long it gives up the
//! lead, and another one listens; so whatever is slow holds up nobody as long as a thread is left.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The lead of a pager's threads.
#[derive(Debug, Default)]
pub(super) struct Lead {
    is_taken: Mutex<bool>,
    given_up: Condvar,
}

/// Held by the thread that listens. Dropped, another one does.
#[derive(Debug)]
pub(super) struct Leading(Arc<Lead>);

impl Lead {
    /// Waits for the lead.
    pub(super) fn take(self: &Arc<Lead>) -> Leading {
        let mut is_taken = self.state();
        while *is_taken {
            is_taken = self.given_up.wait(is_taken).unwrap_or_else(PoisonError::into_inner);
        }
        *is_taken = true;
        drop(is_taken);
        Leading(Arc::clone(self))
    }

    /// Held for a look.
    fn state(&self) -> MutexGuard<'_, bool> {
        self.is_taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Leading {
    fn drop(&mut self) {
        *self.0.state() = false;
        self.0.given_up.notify_one();
    }
}
