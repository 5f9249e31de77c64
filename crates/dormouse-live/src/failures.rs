//! What failed and was not made good since: flushes and seals answer for it.
//!
//! A request that could not write leaves its range behind until all of it was written or zeroed
//! by later ones. So does a read of a layer's own bytes that failed, until they were read after
//! all or written anew. Failed reads of the base are told to the reader and forgotten: no flush
//! ever promised anything about the base, and no commit reads it.
//!
//! Some failures cannot be made good here. After a failed `fsync` the kernel may have dropped the
//! pages and calls them clean; a file that somebody cut short may grow again over lost bytes.
//! These poison the overlay: it serves reads, and refuses all else until it is opened again.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{OnceLock, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::sync::{AtomicUsize, Mutex, MutexGuard};

/// Ranges that are remembered one by one; a disk with more faults than these is poisoned.
const RANGES_MAX: usize = 4096;

/// The failures of an overlay.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    /// Ranges in `ranges`, to keep the lock off the path of requests while all is well.
    count: AtomicUsize,

    /// Guards the ranges. Taken last of all locks.
    ranges: Mutex<Ranges>,

    poison: OnceLock<String>,
}

#[derive(Debug, Default)]
struct Ranges {
    writes: RangeSet,
    reads: RangeSet,
}

impl Failures {
    /// Remembers a request that did not write all of `range`.
    pub(crate) fn add_write(&self, range: Range<u64>) {
        self.change(|ranges| ranges.writes.insert(range));
    }

    /// Remembers bytes of a layer that could not be read.
    pub(crate) fn add_read(&self, range: Range<u64>) {
        self.change(|ranges| ranges.reads.insert(range));
    }

    /// All of `range` was written or zeroed.
    pub(crate) fn written(&self, range: &Range<u64>) {
        if self.count.load(Ordering::Acquire) > 0 {
            self.change(|ranges| {
                ranges.writes.remove(range);
                ranges.reads.remove(range);
            });
        }
    }

    /// All of `range` was read.
    pub(crate) fn was_read(&self, range: &Range<u64>) {
        if self.count.load(Ordering::Acquire) > 0 {
            self.change(|ranges| ranges.reads.remove(range));
        }
    }

    /// The layers that could not be read are gone.
    pub(crate) fn forget_reads(&self) {
        self.change(|ranges| ranges.reads = RangeSet::default());
    }

    /// Nothing but reading works from now on.
    pub(crate) fn poison(&self, reason: &str) {
        // The first reason is the one to tell.
        let _ = self.poison.set(reason.to_owned());
    }

    /// Refuses if the overlay is poisoned.
    pub(crate) fn check_poison(&self) -> Result<()> {
        match self.poison.get() {
            None => Ok(()),
            Some(reason) => Err(Error::new(
                ErrorKind::Poisoned,
                format!("{reason}; the disk must be opened again before it can be written"),
            )),
        }
    }

    /// Refuses if anything is not made good.
    pub(crate) fn check(&self) -> Result<()> {
        self.check_poison()?;
        if self.count.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        let ranges = self.ranges();
        for (set, what) in [(&ranges.writes, "written"), (&ranges.reads, "read")] {
            if let Some(first) = set.0.first() {
                return Err(Error::new(
                    ErrorKind::Unresolved,
                    format!(
                        "bytes {} to {} could not be {what}, as well as {} other ranges; \
                         write or discard them",
                        first.start,
                        first.end,
                        ranges.len() - 1
                    ),
                ));
            }
        }
        Ok(())
    }

    /// How many ranges are not made good.
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    fn change(&self, change: impl FnOnce(&mut Ranges)) {
        let mut ranges = self.ranges();
        change(&mut ranges);
        let count = ranges.len();
        self.count.store(count, Ordering::Release);
        drop(ranges);
        if count > RANGES_MAX {
            self.poison("too many requests failed");
        }
    }

    fn ranges(&self) -> MutexGuard<'_, Ranges> {
        // Ranges are whole after each step, whoever panicked.
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ranges {
    fn len(&self) -> usize {
        self.writes.0.len() + self.reads.0.len()
    }
}

/// Ranges in ascending order that neither overlap nor touch.
#[derive(Debug, Default)]
struct RangeSet(Vec<Range<u64>>);

impl RangeSet {
    fn insert(&mut self, mut range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let first = self.0.partition_point(|it| it.end < range.start);
        let last = self.0.partition_point(|it| it.start <= range.end);
        if first < last {
            range.start = range.start.min(self.0[first].start);
            range.end = range.end.max(self.0[last - 1].end);
        }
        self.0.splice(first..last, [range]);
    }

    fn remove(&mut self, range: &Range<u64>) {
        if range.is_empty() {
            return;
        }
        let first = self.0.partition_point(|it| it.end <= range.start);
        let last = self.0.partition_point(|it| it.start < range.end);
        if first < last {
            let before = self.0[first].start..range.start;
            let after = range.end..self.0[last - 1].end;
            let kept = [before, after].into_iter().filter(|it| it.start < it.end);
            self.0.splice(first..last, kept);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::alone;

    #[test]
    fn a_range_set_is_a_set_of_bytes() {
        let mut seed = 3_u64;
        let mut next = |bound: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
            (seed >> 33) % bound
        };
        let mut set = RangeSet::default();
        let mut model = [false; 64];
        for _ in 0..5000 {
            let start = next(64);
            let range = start..start + next(65 - start);
            let bytes = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            if next(2) == 0 {
                set.insert(range);
                model[bytes].fill(true);
            } else {
                set.remove(&range);
                model[bytes].fill(false);
            }
            let mut seen = [false; 64];
            for range in &set.0 {
                assert!(range.start < range.end);
                seen[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
                    .fill(true);
            }
            assert_eq!(seen, model);
            assert!(set.0.windows(2).all(|pair| pair[0].end < pair[1].start), "{set:?}");
        }
    }

    #[test]
    fn a_failure_lasts_until_all_of_it_is_written() {
        alone(|| {
            let failures = Failures::default();
            failures.add_write(1000..9000);
            failures.written(&(0..5000));
            failures.was_read(&(0..10_000));
            assert_eq!(failures.check().unwrap_err().kind(), ErrorKind::Unresolved);
            failures.written(&(5000..9000));
            failures.check().unwrap();
            failures.add_read(0..10);
            assert_eq!(failures.check().unwrap_err().kind(), ErrorKind::Unresolved);
            failures.was_read(&(0..10));
            failures.check().unwrap();
            failures.poison("the sync failed");
            failures.written(&(0..u64::MAX));
            assert_eq!(failures.check().unwrap_err().kind(), ErrorKind::Poisoned);
        });
    }
}
