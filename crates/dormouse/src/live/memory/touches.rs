//! What a waking guest touches first: noted, stored beside the snapshot, and replayed on the next wake.
//!
//! All of it is advice. Whatever goes wrong costs time and is told, and nothing ends of it.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use dormouse_image::block::BLOCK_BYTES_U64;
use dormouse_image::pack::FRAME_BYTES;
use dormouse_live::trace::{Recorder, Trace, WakeKind};
use dormouse_store::name::SnapRef;
use dormouse_store::store::{Config, Store};

use crate::live::memory::LiveMemory;
use crate::live::read_trace;

/// What a guest touches later than this after it woke is its work, not its waking.
pub(crate) const RECORD_FOR: Duration = Duration::from_secs(30);

/// Blocks whose touches are brought together, as so many are installed at once.
const WINDOW_BLOCKS: u64 = 64;

/// What is decoded of an order before the VMM comes: half of the cache that keeps it.
const DECODED_BYTES: u64 = Config::STANDARD.frame_cache_bytes / 2;

/// The first touches of one wake, and those of the wakes before it.
#[derive(Debug)]
pub(crate) struct Touches {
    snap: SnapRef,
    recorder: Arc<Recorder>,
    order: Mutex<Vec<Range<u64>>>,
    /// Whether an order was replayed, so that only what it lacks is seen.
    was_replayed: AtomicBool,
    is_stored: AtomicBool,
}

impl Touches {
    /// Begins to note.
    pub(crate) fn begin(snap: SnapRef, memory: &LiveMemory) -> Touches {
        let recorder = Arc::new(Recorder::new());
        memory.source().record(Arc::clone(&recorder));
        Touches {
            snap,
            recorder,
            order: Mutex::default(),
            was_replayed: AtomicBool::new(false),
            is_stored: AtomicBool::new(false),
        }
    }

    /// Reads what the wakes before agree on.
    pub(crate) fn read_order(&self, store: &Store) {
        let trace = store.snapshot(&self.snap).map_err(Into::into).and_then(|it| read_trace(&it));
        match trace {
            Ok(None) => {}
            Ok(Some(trace)) => {
                *self.order.lock().unwrap_or_else(PoisonError::into_inner) = in_bytes(&trace);
            }
            Err(error) => tracing::warn!(error = &*error, "there is no trace to replay"),
        }
    }

    /// The start of the order, as far as it is worth decoding before the VMM comes. A run may begin and
    /// end inside of frames, which are decoded whole.
    pub(crate) fn start_of_order(&self) -> Vec<Range<u64>> {
        let order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        start_of(&order, DECODED_BYTES)
    }

    /// The bytes of the image to install, in this order; once.
    pub(crate) fn take_order(&self) -> Vec<Range<u64>> {
        let order = std::mem::take(&mut *self.order.lock().unwrap_or_else(PoisonError::into_inner));
        self.was_replayed.store(!order.is_empty(), Ordering::Release);
        order
    }

    /// Adds what was noted to the snapshot's trace; once.
    pub(crate) fn store(&self, store: &Store) {
        if self.is_stored.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Err(error) = self.try_to_store(store) {
            tracing::warn!(error = &*error, snapshot = %self.snap, "the trace is not stored");
        }
    }

    fn try_to_store(&self, store: &Store) -> Result<()> {
        let kind = match self.was_replayed.load(Ordering::Acquire) {
            true => WakeKind::Misses,
            false => WakeKind::Whole,
        };
        let wake = self.recorder.finish(kind);
        if wake.blocks() == 0 {
            return Ok(());
        }
        let snapshot = store.snapshot(&self.snap)?;
        let new = || Trace::new(*snapshot.manifest().uuid.as_bytes());
        let mut trace = read_trace(&snapshot)?.unwrap_or_else(new);
        trace.push(wake);
        Ok(snapshot.put_trace(&trace.encode())?)
    }
}

/// The start of a trace's order in bytes of the image, as far as it is worth decoding before the VMM asks.
pub(crate) fn start_of_order(trace: &Trace) -> Vec<Range<u64>> {
    start_of(&in_bytes(trace), DECODED_BYTES)
}

fn in_bytes(trace: &Trace) -> Vec<Range<u64>> {
    let runs = trace.runs(WINDOW_BLOCKS).into_iter();
    runs.map(|run| run.start * BLOCK_BYTES_U64..run.end * BLOCK_BYTES_U64).collect()
}

/// As many runs from the first on as lie in frames of `bytes`.
fn start_of(order: &[Range<u64>], bytes: u64) -> Vec<Range<u64>> {
    let frame = FRAME_BYTES as u64;
    let mut left = bytes;
    let fits = |run: &&Range<u64>| {
        let frames = (run.end - run.start).div_ceil(frame) + 1;
        let rest = left.checked_sub(frames * frame);
        left = rest.unwrap_or(0);
        rest.is_some()
    };
    order.iter().take_while(fits).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is decoded before the VMM comes must still be in the cache when it does.
    #[test]
    fn no_more_is_decoded_than_is_kept() {
        let frame = FRAME_BYTES as u64;
        let order: Vec<_> = (0..10).map(|run| run * 10 * frame..run * 10 * frame + 4096).collect();
        // A run of one block may lie in two frames where slots do not run on.
        assert_eq!(start_of(&order, 7 * frame), order[..3]);
        assert_eq!(start_of(&order, 20 * frame), order);
        assert!(start_of(&order, frame).is_empty());
        let long = [0..3 * frame, 100 * frame..101 * frame];
        assert_eq!(start_of(&long, 4 * frame), long[..1]);
        assert!(start_of(&long, 3 * frame).is_empty());
    }
}
