//! A file that a VMM dumps into, and the image that becomes of it.
//!
//! A dump comes in ascending order, and is captured as one *segment*. A write that goes back, or comes
//! after the file was made durable, begins another segment, which lies over the one before. So any
//! order gives the right image, and the usual one costs nothing; one that goes back all the time
//! is refused.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dormouse_image::block::HoleMeaning;
use dormouse_serve::device::{DeviceError, DeviceErrorKind, DeviceResult};
use dormouse_serve::fuse::Sink;
use dormouse_store::error::{Error, ErrorKind};
use dormouse_store::name::ImageName;
use dormouse_store::reader::ImageReader;
use dormouse_store::source::Staged;
use dormouse_store::store::Store;

use super::description::CapturedImage;
use crate::segment::{Below, Segment};

/// How often a file may go back, or be made durable and written to again: each time costs a pack.
const SEGMENTS_MAX: u32 = 64;

/// Zeros are written so many at a time.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A file that is captured while it is written.
#[derive(Debug)]
pub(super) struct CapturedFile {
    store: Store,
    label: String,
    image: ImageName,
    number: u64,
    /// What the file lies over as long as nothing of it is durable.
    first: Below,
    opens: AtomicU64,
    /// Held over waiting for the pipeline: who writes to a file waits for who writes to it before.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    size_bytes: u64,
    segment: Option<Segment>,
    staged: Option<Staged>,
    /// Whether there is more than what is staged.
    is_dirty: bool,
    segments: u32,
    /// Why nothing comes of it any more.
    failure: Option<Arc<Error>>,
}

impl CapturedFile {
    pub(super) fn new(
        store: Store,
        label: String,
        image: ImageName,
        number: u64,
        base: Option<ImageReader>,
        holes: HoleMeaning,
    ) -> CapturedFile {
        let first = Below { base, holes };
        let (opens, state) = (AtomicU64::new(0), Mutex::default());
        CapturedFile { store, label, image, number, first, opens, state }
    }

    pub(super) fn image(&self) -> &ImageName {
        &self.image
    }

    /// What tells it from others of its name.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Changes when other bytes of it are durable.
    pub(super) fn version(&self) -> u64 {
        u64::from(self.state().segments)
    }

    /// Whether all that was written is durable.
    pub(super) fn is_durable(&self) -> bool {
        let state = self.state();
        state.failure.is_none() && !state.is_dirty && state.staged.is_some()
    }

    /// Why nothing comes of it any more, if so.
    pub(super) fn failure(&self) -> Option<DeviceError> {
        self.state().failure.as_ref().map(failed)
    }

    /// Whether anybody has it open.
    pub(super) fn is_open(&self) -> bool {
        self.opens.load(Ordering::Acquire) > 0
    }

    /// The image as far as it is durable.
    pub(super) fn captured(&self) -> Option<CapturedImage> {
        let state = self.state();
        state.staged.as_ref().map(|staged| CapturedImage::of(self.image.clone(), staged))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while it is changed leaves a segment that cannot be finished, or a failure.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, unless it is of no use any more.
    fn usable(&self) -> DeviceResult<MutexGuard<'_, State>> {
        let state = self.state();
        match &state.failure {
            Some(error) => Err(failed(error)),
            None => Ok(state),
        }
    }

    /// What the next segment lies over.
    fn below(&self, state: &State) -> Below {
        match &state.staged {
            Some(staged) => {
                Below { base: Some(staged.image().clone()), holes: HoleMeaning::Parent }
            }
            None => self.first.clone(),
        }
    }

    fn segment<'a>(&self, state: &'a mut State) -> DeviceResult<&'a mut Segment> {
        if state.segment.is_none() {
            if state.segments >= SEGMENTS_MAX {
                let message = format!(
                    "{} went back or was made durable {SEGMENTS_MAX} times; write it in ascending \
                     order",
                    self.label
                );
                return Err(self.fail(state, Error::new(ErrorKind::InvalidInput, message)));
            }
            let below = self.below(state);
            match Segment::start(&self.store, &self.label, below) {
                Ok(segment) => state.segment = Some(segment),
                Err(error) => return Err(self.fail(state, error)),
            }
            state.segments += 1;
        }
        state.segment.as_mut().ok_or_else(|| DeviceErrorKind::Io.into())
    }

    /// Makes durable what there is.
    fn finish(&self, state: &mut State) -> DeviceResult<()> {
        self.segment(state)?;
        let size_bytes = state.size_bytes;
        let Some(segment) = state.segment.take() else { return Ok(()) };
        match segment.finish(size_bytes) {
            Ok(staged) => {
                state.staged = Some(match state.staged.take() {
                    Some(lower) => staged.over(&lower),
                    None => staged,
                });
                state.is_dirty = false;
                Ok(())
            }
            Err(error) => Err(self.fail(state, error)),
        }
    }

    /// From now on everything fails: what was written is lost.
    fn fail(&self, state: &mut State, error: Error) -> DeviceError {
        let error = Arc::new(error);
        state.segment = None;
        state.failure = Some(Arc::clone(&error));
        failed(&error)
    }

    fn write(&self, state: &mut State, data: &[u8], offset: u64) -> DeviceResult<()> {
        let end = offset.checked_add(data.len() as u64).ok_or(DeviceErrorKind::NoSpace)?;
        state.is_dirty = true;
        if state.segment.as_ref().is_some_and(|segment| offset < segment.end()) {
            self.finish(state)?;
            state.is_dirty = true;
        }
        let segment = self.segment(state)?;
        if let Err(error) = segment.write(data, offset) {
            return Err(self.fail(state, error));
        }
        state.size_bytes = state.size_bytes.max(end);
        Ok(())
    }
}

/// A file as long as it is open.
pub(super) struct OpenCapture(Arc<CapturedFile>);

impl OpenCapture {
    pub(super) fn new(file: Arc<CapturedFile>) -> OpenCapture {
        file.opens.fetch_add(1, Ordering::AcqRel);
        OpenCapture(file)
    }
}

impl Drop for OpenCapture {
    fn drop(&mut self) {
        self.0.opens.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Sink for OpenCapture {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<usize> {
        self.0.read_at(buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> DeviceResult<()> {
        self.0.write_at(data, offset)
    }

    fn zero(&self, range: Range<u64>) -> DeviceResult<()> {
        self.0.zero(range)
    }

    fn set_size(&self, size_bytes: u64) -> DeviceResult<()> {
        self.0.set_size(size_bytes)
    }

    fn flush(&self) -> DeviceResult<()> {
        self.0.flush()
    }

    fn is_patient(&self) -> bool {
        true
    }

    fn write_will_wait(&self) -> bool {
        self.0.write_will_wait()
    }
}

impl CapturedFile {
    pub(super) fn size_bytes(&self) -> u64 {
        self.state().size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<usize> {
        let state = self.usable()?;
        let staged = state.staged.as_ref().filter(|_| !state.is_dirty);
        let staged = staged.ok_or(DeviceErrorKind::Invalid)?.image().clone();
        drop(state);
        let left = usize::try_from(staged.size_bytes().saturating_sub(offset));
        let len = left.unwrap_or(usize::MAX).min(buffer.len());
        if len > 0 {
            staged.read_at(&mut buffer[..len], offset).map_err(|error| failed(&Arc::new(error)))?;
        }
        Ok(len)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> DeviceResult<()> {
        self.write(&mut *self.usable()?, data, offset)
    }

    fn zero(&self, range: Range<u64>) -> DeviceResult<()> {
        let mut state = self.usable()?;
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(ZEROS.len() as u64);
            self.write(&mut state, &ZEROS[..usize::try_from(len).unwrap_or(0)], at)?;
            at += len;
        }
        Ok(())
    }

    fn set_size(&self, size_bytes: u64) -> DeviceResult<()> {
        if size_bytes == 0 {
            // All anew, whatever became of what was there.
            let mut state = self.state();
            let is_new = state.segment.is_none() && state.staged.is_none();
            *state = State { is_dirty: state.is_dirty || !is_new, ..State::default() };
            return Ok(());
        }
        let mut state = self.usable()?;
        if size_bytes == state.size_bytes {
            return Ok(());
        }
        state.is_dirty = true;
        let written = state.segment.as_ref().map_or(0, Segment::end);
        let durable = state.staged.as_ref().map_or(0, |staged| staged.image().size_bytes());
        if size_bytes < written {
            self.finish(&mut state)?;
        }
        state.size_bytes = size_bytes;
        if size_bytes < written.max(durable) {
            // Cut off now, so that nothing of it is there when the file grows again.
            self.finish(&mut state)?;
        }
        state.is_dirty = true;
        Ok(())
    }

    fn flush(&self) -> DeviceResult<()> {
        let mut state = self.usable()?;
        if !state.is_dirty && state.staged.is_some() {
            return Ok(());
        }
        let parent = self.first.base.as_ref().filter(|_| self.first.holes == HoleMeaning::Parent);
        if let Some(parent) = parent
            && parent.size_bytes() != state.size_bytes
        {
            let message = format!(
                "{} has {} bytes and the parent's memory {}, so it is no diff against it",
                self.label,
                state.size_bytes,
                parent.size_bytes()
            );
            return Err(DeviceError::new(DeviceErrorKind::Invalid, message));
        }
        self.finish(&mut state)
    }

    fn write_will_wait(&self) -> bool {
        self.state
            .try_lock()
            .map_or(true, |state| state.segment.as_ref().is_none_or(|segment| !segment.has_room()))
    }
}

fn failed(error: &Arc<Error>) -> DeviceError {
    let mut kind = match error.kind() {
        ErrorKind::InvalidInput | ErrorKind::Refused => DeviceErrorKind::Invalid,
        _ => DeviceErrorKind::Io,
    };
    let mut cause = std::error::Error::source(&**error);
    while let Some(one) = cause {
        if let Some(error) = one.downcast_ref::<std::io::Error>()
            && DeviceError::from(std::io::Error::from(error.kind())).kind()
                == DeviceErrorKind::NoSpace
        {
            kind = DeviceErrorKind::NoSpace;
        }
        cause = one.source();
    }
    DeviceError::new(kind, Arc::clone(error))
}
