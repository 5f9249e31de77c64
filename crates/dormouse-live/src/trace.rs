//! Access traces: in which order waking guests first touched their memory.
//!
//! A trace keeps the last [`WAKES_MAX`] wakes of a snapshot as they were, and makes one order of
//! them when it is asked: what most wakes touched comes first, at its median place. So it is
//! bounded, follows a workload that changes, and one strange wake moves little. It is advice: a
//! wrong one costs time, never bytes.
//!
//! A wake that replayed a trace shows only what the trace [lacked](WakeKind::Misses), for nobody
//! sees whether prefetched pages are touched. It speaks for the pages it has and is silent on all
//! others; a wake without prefetching, now and then, lets pages go that are no longer touched.
//!
//! ```
//! use dormouse_live::trace::{Recorder, Trace, WakeKind};
//!
//! let recorder = Recorder::new();
//! for block in [700, 701, 12, 700, 13] {
//!     recorder.record(block);
//! }
//! let mut trace = Trace::new([7; 16]);
//! trace.push(recorder.finish(WakeKind::Whole));
//! let trace = Trace::parse(&trace.encode(), [7; 16])?;
//! assert_eq!(trace.order(), [700..702, 12..14]);
//! // In chunks of 512 blocks: more at once, in nearly the same order.
//! assert_eq!(trace.runs(512), [700..702, 12..14]);
//! # Ok::<(), dormouse_live::error::Error>(())
//! ```

mod format;
mod merge;
mod record;

use std::ops::Range;

use roaring::RoaringBitmap;

pub use record::{RECORDED_MAX, Recorder};

/// Wakes that a trace keeps.
pub const WAKES_MAX: usize = 8;

/// Blocks of one wake: 4 GiB of memory. What comes later than that hardly hastens a wake.
pub const WAKE_BLOCKS_MAX: u64 = 1 << 20;

/// Blocks of all wakes together, so that merging them takes at most 100 MiB; the oldest wakes go
/// first.
pub const TRACE_BLOCKS_MAX: u64 = 1 << 22;

/// The longest trace that is written: each block takes six bytes at most.
pub const TRACE_BYTES_MAX: usize = 32 << 20;

/// The end of block numbers, as of every image.
const BLOCKS_END: u64 = 1 << 32;

/// What a wake tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WakeKind {
    /// All that was touched.
    Whole,

    /// What was touched and had not been prefetched.
    Misses,
}

/// The first touches of one wake, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wake {
    kind: WakeKind,
    runs: Vec<Range<u64>>,
}

impl Wake {
    /// A wake that touched these runs of blocks, one after the other.
    ///
    /// Only the first touch of a block counts, and only the first [`WAKE_BLOCKS_MAX`] of them; blocks
    /// that no image has are left out. Runs that go on where the one before ended are joined.
    pub fn new(kind: WakeKind, touched: impl IntoIterator<Item = Range<u64>>) -> Wake {
        let mut wake = Wake { kind, runs: Vec::new() };
        let (mut seen, mut blocks) = (RoaringBitmap::new(), 0);
        for run in touched {
            for block in run.start..run.end.min(BLOCKS_END) {
                if blocks == WAKE_BLOCKS_MAX {
                    return wake;
                }
                if u32::try_from(block).is_ok_and(|block| seen.insert(block)) {
                    blocks += 1;
                    push_joined(&mut wake.runs, block..block + 1);
                }
            }
        }
        wake
    }

    /// What it tells.
    pub fn kind(&self) -> WakeKind {
        self.kind
    }

    /// Its runs of blocks, in the order of their first touches.
    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// How many blocks it touched.
    pub fn blocks(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }
}

/// The wakes of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    subject: [u8; 16],
    /// Newest first.
    wakes: Vec<Wake>,
}

impl Trace {
    /// An empty one. `subject` is the id of the snapshot, so that a trace in a wrong place is
    /// noticed.
    pub fn new(subject: [u8; 16]) -> Trace {
        Trace { subject, wakes: Vec::new() }
    }

    /// The wakes, newest first.
    pub fn wakes(&self) -> &[Wake] {
        &self.wakes
    }

    /// Adds the newest wake; the oldest ones go where there are too many. One that touched nothing
    /// is left out.
    pub fn push(&mut self, wake: Wake) {
        if wake.runs.is_empty() {
            return;
        }
        self.wakes.insert(0, wake);
        self.wakes.truncate(WAKES_MAX);
        while self.blocks() > TRACE_BLOCKS_MAX {
            self.wakes.pop();
        }
    }

    /// The trace as far as an image of `image_blocks` has the blocks.
    #[must_use]
    pub fn within(mut self, image_blocks: u64) -> Trace {
        for wake in &mut self.wakes {
            wake.runs.retain_mut(|run| {
                run.end = run.end.min(image_blocks);
                run.start < run.end
            });
        }
        self.wakes.retain(|wake| !wake.runs.is_empty());
        self
    }

    /// The order that the wakes agree on: each block once, in runs.
    ///
    /// First what more than half of the wakes touched, by the median of its places in them; then the
    /// rest, what more wakes touched first. A wake of misses counts where it has the block.
    pub fn order(&self) -> Vec<Range<u64>> {
        merge::order(&self.wakes)
    }

    /// The same for large installs: blocks of one chunk of `window_blocks` (aligned in the image)
    /// come together, ascending, where the first of them does.
    ///
    /// # Panics
    ///
    /// If `window_blocks` is 0.
    pub fn runs(&self, window_blocks: u64) -> Vec<Range<u64>> {
        merge::in_windows(&self.order(), window_blocks)
    }

    fn blocks(&self) -> u64 {
        self.wakes.iter().map(Wake::blocks).sum()
    }
}

/// Appends a run, as part of the last one if it goes on where that ends.
fn push_joined(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of runs, here of one")]
mod tests {
    use super::*;

    #[test]
    fn only_first_touches_of_blocks_that_can_be_count() {
        let wake = Wake::new(
            WakeKind::Whole,
            [5..8, 6..10, 3..4, 4..5, (1 << 32) - 1..(1 << 32) + 5, 3..4, u64::MAX - 1..u64::MAX],
        );
        assert_eq!(wake.runs(), [5..10, 3..5, (1 << 32) - 1..1 << 32]);
        assert_eq!(wake.blocks(), 8);
        let endless = Wake::new(WakeKind::Whole, [10..u64::MAX]);
        assert_eq!(endless.runs(), [10..10 + WAKE_BLOCKS_MAX]);
    }

    #[test]
    fn old_wakes_go() {
        let mut trace = Trace::new([0; 16]);
        for number in 0..20 {
            trace.push(Wake::new(WakeKind::Whole, [number..number + 1]));
        }
        let kept: Vec<u64> = trace.wakes().iter().map(|wake| wake.runs()[0].start).collect();
        assert_eq!(kept, [19, 18, 17, 16, 15, 14, 13, 12]);
        for _ in 0..5 {
            trace.push(Wake::new(WakeKind::Whole, [0..WAKE_BLOCKS_MAX]));
        }
        assert_eq!(trace.wakes().len(), 4, "as many as the bound allows");
        trace.push(Wake::new(WakeKind::Whole, []));
        assert_eq!(trace.wakes().len(), 4, "nothing to learn from");
    }

    #[test]
    fn blocks_beyond_the_image_are_dropped() {
        let mut trace = Trace::new([0; 16]);
        trace.push(Wake::new(WakeKind::Whole, [50..60, 8..12, 0..4]));
        trace.push(Wake::new(WakeKind::Misses, [90..91]));
        let trace = trace.within(10);
        assert_eq!(trace.wakes().len(), 1);
        assert_eq!(trace.order(), [8..10, 0..4]);
        assert!(trace.within(0).order().is_empty());
    }
}
