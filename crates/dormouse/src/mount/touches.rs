//! What a guest touches first that wakes from a memory file, noted for the trace of its snapshot.
//!
//! The kernel asks for pages that are not in the page cache, some around each, and once for all forks;
//! so what is noted is what such a wake lacked, and speaks for nothing else. Whoever reads all of the
//! file copies it and does not wake. What earlier wakes lacked is decoded while the VMM starts that opened
//! the file. All of it is advice: whatever goes wrong costs time and is told.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use dormouse_image::block::{BLOCK_BYTES_U64, blocks_in};
use dormouse_live::trace::{Recorder, Trace, WakeKind};
use dormouse_serve::device::{BlockDevice, Context, DeviceResult, Run};
use dormouse_store::name::ImageName;
use dormouse_store::store::Snapshot;

use crate::live::memory::start_of_order;
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
        let touches = Arc::new(touches);
        let ahead = Arc::clone(&touches);
        let started = thread::Builder::new().name("trace".to_owned()).spawn(move || {
            if let Err(error) = ahead.decode() {
                tracing::warn!(error = &*error, "what earlier wakes lacked is not decoded");
            }
        });
        if let Err(error) = started {
            tracing::warn!(%error, "what earlier wakes lacked is not decoded");
        }
        Watched { device, touches }
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
    /// Decodes what earlier wakes lacked, in their order, as far as it is kept.
    fn decode(&self) -> Result<()> {
        let Some(trace) = read_trace(&self.snapshot)? else { return Ok(()) };
        let image = self.snapshot.image(&ImageName::Memory)?;
        for run in start_of_order(&trace) {
            if self.is_over.load(Ordering::Relaxed) {
                break;
            }
            image.prefetch(run.start..run.end.min(image.size_bytes()))?;
        }
        Ok(())
    }

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

#[cfg(test)]
mod tests {
    use dormouse_image::block::HoleMeaning;
    use dormouse_live::trace::Wake;
    use dormouse_store::commit::{CommitRequest, NewImage};
    use dormouse_store::progress::Job;
    use dormouse_store::source::Source;
    use dormouse_store::store::{Config, Store};

    use super::*;

    /// Traces of wakes from files were stored, and no such wake made use of them.
    #[test]
    fn what_earlier_wakes_lacked_is_decoded_before_anybody_reads() {
        const FRAME: u64 = 64 << 10;
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(&dir.path().join("store"), Config::STANDARD).unwrap();
        let bytes: Vec<u8> = (0..64_u32 << 18)
            .flat_map(|at| (at / 1024).wrapping_mul(at | 1).to_le_bytes())
            .take(16 << 20)
            .collect();
        let mut request = CommitRequest::new("vm".parse().unwrap());
        request.images.push(NewImage {
            image: ImageName::Memory,
            source: Source::Bytes(bytes.into()),
            holes: HoleMeaning::Zero,
        });
        store.commit(request, Job::quiet()).unwrap();
        let store = Store::open(&dir.path().join("store"), Config::STANDARD).unwrap();
        let snapshot = store.snapshot(&"vm@1".parse().unwrap()).unwrap();
        let image = snapshot.image(&ImageName::Memory).unwrap();
        let mut trace = Trace::new(*snapshot.manifest().uuid.as_bytes());
        trace.push(Wake::new(WakeKind::Misses, [2048..2050, 16..17]));
        snapshot.put_trace(&trace.encode()).unwrap();
        let touched = [8 << 20..(8 << 20) + 8192, FRAME..FRAME + 4096];
        assert!(touched.iter().all(|range| !image.is_cached(range.clone())));
        let watched = Watched::new(ImageDevice::new(image.clone()), snapshot);
        let begun = Instant::now();
        while !touched.iter().all(|range| image.is_cached(range.clone())) {
            assert!(begun.elapsed() < Duration::from_secs(20), "nothing is decoded");
            thread::sleep(Duration::from_millis(5));
        }
        assert!(!image.is_cached(4 << 20..5 << 20), "and nothing else");
        drop(watched);
    }
}
