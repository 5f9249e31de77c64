//! Overlays and images as devices of a server.

#[cfg(test)]
mod allocations;

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use dormouse_image::map::Source;
use dormouse_live::base::RunKind;
use dormouse_live::error::{Error as LiveError, ErrorKind as LiveErrorKind};
use dormouse_live::overlay::{DiskRun, Overlay, RunSource, Zeroing};
use dormouse_serve::nbd::{
    BASE_ALLOCATION, BlockDevice, Context, DIRTY_CONTEXT, DeviceError, DeviceErrorKind,
    DeviceResult, Durability, FlagsWidth, HOLE, Run, SOURCE_CONTEXT, ZERO, ZeroMode,
};
use dormouse_store::reader::{ImageReader, ReadAhead};

use super::base::source_id;

/// Flags of `dormouse:dirty`: 1 where the disk was written since its base, 2 where it is zero since.
const DIRTY: Context = Context { name: DIRTY_CONTEXT, flags: FlagsWidth::U32 };

/// Where a run is stored: how its pack's id begins, [`SOURCE_ZERO`] or [`SOURCE_LIVE`]. Clients
/// without extended headers get the upper half.
const SOURCE: Context = Context { name: SOURCE_CONTEXT, flags: FlagsWidth::U64Prefix };

/// Nowhere: the run is zero.
const SOURCE_ZERO: u64 = 0;

/// In the live disk's own layers: written since its base.
const SOURCE_LIVE: u64 = u64::MAX;

/// Reads shorter than this are not asked for zero runs: looking them up costs more than it saves.
const HOLE_PROBE_BYTES: u32 = 64 << 10;

/// A live disk.
#[derive(Debug)]
pub(crate) struct OverlayDevice(Arc<Overlay>);

impl OverlayDevice {
    pub(crate) fn new(overlay: Arc<Overlay>) -> OverlayDevice {
        OverlayDevice(overlay)
    }

    fn settle(&self, durability: Durability) -> DeviceResult<()> {
        match durability {
            Durability::Later => Ok(()),
            Durability::Now => self.flush(),
        }
    }
}

impl BlockDevice for OverlayDevice {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<()> {
        self.0.read_at(buffer, offset).map_err(failed)
    }

    fn write_at(&self, data: &[u8], offset: u64, durability: Durability) -> DeviceResult<()> {
        self.0.write_at(data, offset).map_err(failed)?;
        self.settle(durability)
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode, durability: Durability) -> DeviceResult<()> {
        if mode.fast_only && !mode.may_punch {
            return Err(DeviceErrorKind::NotSupported.into());
        }
        let zeroing = if mode.may_punch { Zeroing::Free } else { Zeroing::Keep };
        self.0.write_zeroes(range.start, range.end - range.start, zeroing).map_err(failed)?;
        self.settle(durability)
    }

    fn trim(&self, range: Range<u64>, durability: Durability) -> DeviceResult<()> {
        self.0.trim(range.start, range.end - range.start).map_err(failed)?;
        self.settle(durability)
    }

    fn flush(&self) -> DeviceResult<()> {
        self.0.flush().map_err(failed)
    }

    fn prefetch(&self, range: Range<u64>) -> DeviceResult<()> {
        self.0.prefetch(range).map_err(failed)
    }

    fn read_will_wait(&self, range: Range<u64>) -> bool {
        self.0.read_will_wait(range)
    }

    fn contexts(&self) -> &[Context] {
        &[Context::ALLOCATION, DIRTY, SOURCE]
    }

    fn extents(
        &self,
        context: &str,
        range: Range<u64>,
        sink: &mut dyn FnMut(Run) -> ControlFlow<()>,
    ) -> DeviceResult<()> {
        let mut full = false;
        let mut tell = |run: Range<u64>, flags: u64| {
            full = sink(Run { length: run.end - run.start, flags }).is_break();
            if full {
                // Seen by nobody, and made for every request.
                Err(LiveError::new(LiveErrorKind::Io, "told enough"))
            } else {
                Ok(())
            }
        };
        let walked = if context == SOURCE_CONTEXT {
            self.0.for_each_source(range, &mut |run, source| {
                let id = match source {
                    RunSource::Overlay => SOURCE_LIVE,
                    RunSource::Zero => SOURCE_ZERO,
                    RunSource::Base(id) => id,
                };
                tell(run, id)
            })
        } else {
            self.0.for_each_run(range, &mut |run, kind| {
                let flags = match (context, kind) {
                    (BASE_ALLOCATION, DiskRun::Zero | DiskRun::Base(RunKind::Zero)) => HOLE | ZERO,
                    (BASE_ALLOCATION, DiskRun::Dirty | DiskRun::Base(RunKind::Data)) => 0,
                    (_, DiskRun::Dirty) => 1,
                    (_, DiskRun::Zero) => 2,
                    (_, DiskRun::Base(_)) => 0,
                };
                tell(run, flags)
            })
        };
        if full { Ok(()) } else { walked.map_err(failed) }
    }

    fn hole_probe_bytes_min(&self) -> u32 {
        HOLE_PROBE_BYTES
    }
}

fn failed(error: LiveError) -> DeviceError {
    let kind = match error.kind() {
        LiveErrorKind::NoSpace => DeviceErrorKind::NoSpace,
        LiveErrorKind::InvalidInput => DeviceErrorKind::Invalid,
        _ => DeviceErrorKind::Io,
    };
    DeviceError::new(kind, error)
}

/// An image of a snapshot, which nobody writes to.
#[derive(Debug)]
pub(crate) struct ImageDevice(ReadAhead);

impl ImageDevice {
    pub(crate) fn new(image: ImageReader) -> ImageDevice {
        ImageDevice(ReadAhead::new(image))
    }
}

impl BlockDevice for ImageDevice {
    fn size_bytes(&self) -> u64 {
        self.0.image().size_bytes()
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<()> {
        self.0.read_at(buffer, offset).map_err(unreadable)
    }

    fn prefetch(&self, range: Range<u64>) -> DeviceResult<()> {
        self.0.image().prefetch(range).map_err(unreadable)
    }

    fn read_will_wait(&self, range: Range<u64>) -> bool {
        !self.0.image().is_cached(range)
    }

    fn contexts(&self) -> &[Context] {
        &[Context::ALLOCATION, SOURCE]
    }

    fn extents(
        &self,
        context: &str,
        range: Range<u64>,
        sink: &mut dyn FnMut(Run) -> ControlFlow<()>,
    ) -> DeviceResult<()> {
        let mut full = false;
        let walked = self.0.image().for_each_extent(range, &mut |extent| {
            let flags = match extent.source {
                source if context == SOURCE_CONTEXT => source_id(source),
                Source::Zero => HOLE | ZERO,
                Source::Stored { .. } => 0,
            };
            let length = extent.range.end - extent.range.start;
            full = sink(Run { length, flags }).is_break();
            if full { Err(dormouse_store::error::Error::cancelled()) } else { Ok(()) }
        });
        match (full, walked) {
            (true, _) | (false, Ok(())) => Ok(()),
            (false, Err(error)) => Err(unreadable(error)),
        }
    }

    fn hole_probe_bytes_min(&self) -> u32 {
        HOLE_PROBE_BYTES
    }
}

fn unreadable(error: dormouse_store::error::Error) -> DeviceError {
    DeviceError::new(DeviceErrorKind::Io, error)
}

#[cfg(test)]
mod tests {
    use super::allocations::live_disk;
    use super::*;

    /// Whoever serves a connection reads on for others meanwhile where this says so.
    #[test]
    fn reads_wait_for_blocks_that_nobody_decoded_and_for_no_others() {
        const FRAME: u64 = 64 << 10;
        let dir = tempfile::tempdir().unwrap();
        let device = OverlayDevice::new(Arc::new(live_disk(dir.path())));
        let block = |at: u64| at..at + 4096;
        let mut buffer = [0; 4096];
        assert!(device.read_will_wait(block(0)));
        device.read_at(&mut buffer, 0).unwrap();
        assert!(!device.read_will_wait(0..FRAME), "what was decoded with it");
        assert!(device.read_will_wait(0..FRAME + 4096), "a part is cold");
        assert!(!device.read_will_wait(block(12 << 20)), "past the base all is zero");
        let at = 4 << 20;
        assert!(device.read_will_wait(block(at)));
        device.write_at(&buffer, at, Durability::Later).unwrap();
        assert!(!device.read_will_wait(block(at)), "written");
        assert!(device.read_will_wait(at..at + 2 * 4096), "its neighbour is not");
        let zero = ZeroMode { may_punch: true, fast_only: true };
        device.zero(at..at + 2 * 4096, zero, Durability::Later).unwrap();
        assert!(!device.read_will_wait(at..at + 2 * 4096), "zero");
        device.prefetch(6 << 20..7 << 20).unwrap();
        assert!(!device.read_will_wait(6 << 20..7 << 20));
    }
}
