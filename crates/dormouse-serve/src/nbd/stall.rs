//! How long a peer has kept a connection waiting in the middle of something.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Since when a peer is waited for, if it is. Set by the one thread that waits, read by any.
#[derive(Debug, Default)]
pub(crate) struct Stall {
    /// Nanoseconds since the epoch, plus one; 0 while nobody waits.
    since: AtomicU64,
}

impl Stall {
    /// The wait begins, or begins anew because something came.
    pub(crate) fn begin(&self) {
        let now = u64::try_from(EPOCH.elapsed().as_nanos()).unwrap_or(u64::MAX - 1);
        self.since.store(now + 1, Ordering::Relaxed);
    }

    pub(crate) fn end(&self) {
        self.since.store(0, Ordering::Relaxed);
    }

    /// How long the wait has lasted; none if there is none.
    pub(crate) fn lasts(&self) -> Option<Duration> {
        let since = self.since.load(Ordering::Relaxed).checked_sub(1)?;
        Some(EPOCH.elapsed().saturating_sub(Duration::from_nanos(since)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_lasts_from_its_last_beginning_to_its_end() {
        let stall = Stall::default();
        assert_eq!(stall.lasts(), None);
        stall.begin();
        std::thread::sleep(Duration::from_millis(20));
        assert!(stall.lasts().unwrap() >= Duration::from_millis(20));
        stall.end();
        assert_eq!(stall.lasts(), None);
    }
}
