//! What a guest touches first that wakes from a memory file, noted for the trace of its snapshot.
//!
//! The kernel asks for pages that are not in the page cache, some around each, and once for all forks;
//! so what is noted is what such a wake lacked, and speaks for nothing else. Whoever reads all of the
//! file copies it and does not wake. All of it is advice: whatever goes wrong costs time and is told.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use dormouse_image::block::{BLOCK_BYTES_U64, blocks_in};
use dormouse_live::trace::{Recorder, Trace, WakeKind};
use dormouse_serve::device::{BlockDevice, Context, DeviceResult, Run};
use dormouse_store::store::Snapshot;

use crate::live::{ImageDevice, read_trace};

/// What is touched later than this after the file was opened is a guest's work, not its waking.
const RECORD_FOR: Duration = Duration::from_secs(30);

/// A memory of which more than one part in so many was read was copied, not woken from.
const COPIED_PART: u64 = 2;

/// A memory file that is open, and who touches it.
pub(super) struct Watched {
    device: ImageDevice,
    touches: Arc<Touches>,
}

struct Touches {
    snapshot: Snapshot,
    blocks: u64,
    begun: Instant,
    recorder: Recorder,
    is_over: AtomicBool,
}

impl Watched {
    pub(super) fn new(device: ImageDevice, snapshot: Snapshot) -> Watched {
        let touches = Touches {
            snapshot,
            blocks: blocks_in(device.size_bytes()),
            begun: Instant::now(),
            recorder: Recorder::new(),
            is_over: AtomicBool::new(false),
        };
        Watched { device, touches: Arc::new(touches) }
    }

    fn note(&self, range: Range<u64>) {
        if self.touches.is_over.load(Ordering::Relaxed) {
            return;
        }
        if self.touches.begun.elapsed() > RECORD_FOR {
            return self.end();
        }
        self.touches.recorder.record_run(range.start / BLOCK_BYTES_U64..blocks_in(range.end));
    }

    /// Stores what was noted, once, and keeps nobody waiting for it.
    fn end(&self) {
        if self.touches.is_over.swap(true, Ordering::AcqRel) {
            return;
        }
        let touches = Arc::clone(&self.touches);
        let started = thread::Builder::new().name("trace".to_owned()).spawn(move || {
            if let Err(error) = touches.store() {
                let snapshot = touches.snapshot.manifest().display_name();
                tracing::warn!(error = &*error, snapshot, "the trace is not stored");
            }
        });
        if let Err(error) = started {
            tracing::warn!(%error, "the trace is not stored");
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.end();
    }
}

impl Touches {
    fn store(&self) -> Result<()> {
        let wake = self.recorder.finish(WakeKind::Misses);
        if wake.blocks() == 0 || wake.blocks() > self.blocks / COPIED_PART {
            return Ok(());
        }
        let new = || Trace::new(*self.snapshot.manifest().uuid.as_bytes());
        let mut trace = read_trace(&self.snapshot)?.unwrap_or_else(new);
        trace.push(wake);
        Ok(self.snapshot.put_trace(&trace.encode())?)
    }
}

impl BlockDevice for Watched {
    fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<()> {
        self.note(offset..offset + buffer.len() as u64);
        self.device.read_at(buffer, offset)
    }

    fn prefetch(&self, range: Range<u64>) -> DeviceResult<()> {
        self.device.prefetch(range)
    }

    fn read_will_wait(&self, range: Range<u64>) -> bool {
        self.device.read_will_wait(range)
    }

    fn contexts(&self) -> &[Context] {
        self.device.contexts()
    }

    fn extents(
        &self,
        context: &str,
        range: Range<u64>,
        sink: &mut dyn FnMut(Run) -> ControlFlow<()>,
    ) -> DeviceResult<()> {
        self.device.extents(context, range, sink)
    }
}
