//! What a waking guest touches first: noted, stored beside the snapshot, and replayed on the next wake.
//!
//! All of it is advice. Whatever goes wrong costs time and is told, and nothing ends of it.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use dormouse_image::block::BLOCK_BYTES_U64;
use dormouse_live::trace::{Recorder, Trace, WakeKind};
use dormouse_store::name::SnapRef;
use dormouse_store::store::Store;

use crate::live::memory::LiveMemory;
use crate::live::read_trace;

/// What a guest touches later than this after it woke is its work, not its waking.
pub(super) const RECORD_FOR: Duration = Duration::from_secs(30);

/// Blocks whose touches are brought together, as so many are installed at once.
const WINDOW_BLOCKS: u64 = 64;

/// The first touches of one wake, and those of the wakes before it.
#[derive(Debug)]
pub(super) struct Touches {
    snap: SnapRef,
    recorder: Arc<Recorder>,
    order: Mutex<Vec<Range<u64>>>,
    /// Whether an order was replayed, so that only what it lacks is seen.
    was_replayed: AtomicBool,
    is_stored: AtomicBool,
}

impl Touches {
    /// Begins to note.
    pub(super) fn begin(snap: SnapRef, memory: &LiveMemory) -> Touches {
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
    pub(super) fn read_order(&self, store: &Store) {
        let trace = store.snapshot(&self.snap).map_err(Into::into).and_then(|it| read_trace(&it));
        match trace {
            Ok(None) => {}
            Ok(Some(trace)) => {
                let runs = trace.runs(WINDOW_BLOCKS);
                let bytes = runs
                    .into_iter()
                    .map(|run| run.start * BLOCK_BYTES_U64..run.end * BLOCK_BYTES_U64);
                *self.order.lock().unwrap_or_else(PoisonError::into_inner) = bytes.collect();
            }
            Err(error) => tracing::warn!(error = &*error, "there is no trace to replay"),
        }
    }

    /// The bytes of the image to install, in this order; once.
    pub(super) fn take_order(&self) -> Vec<Range<u64>> {
        let order = std::mem::take(&mut *self.order.lock().unwrap_or_else(PoisonError::into_inner));
        self.was_replayed.store(!order.is_empty(), Ordering::Release);
        order
    }

    /// Adds what was noted to the snapshot's trace; once.
    pub(super) fn store(&self, store: &Store) {
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
