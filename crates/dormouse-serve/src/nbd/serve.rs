//! Requests as calls of the device, and what comes back as replies.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use super::connection::{Connection, Worker};
use super::handshake::ReplyForm;
use super::limits::{
    BULK_BYTES_MIN, EXTENTS_MAX, INLINE_BYTES_MAX, INLINE_NS_MAX, PIECE_BYTES, TRANSFER_BYTES,
};
use super::meta::Selected;
use super::protocol::{CompactExtent, ExtendedExtent, chunk};
use super::reply::{CHUNK_BYTES_MAX, Replies, SHORT_REPLY_MAX, Unfinished};
use super::request::{ContextSet, Kind, Request};
use super::stats::nanos;
use crate::device::{
    BASE_ALLOCATION, BlockDevice, DeviceError, DeviceErrorKind, DeviceResult, Durability,
    FlagsWidth, Run, ZERO,
};
use crate::error::Result;

/// Zero runs shorter than this are sent as data: the chunks would outweigh them.
const HOLE_BYTES_MIN: u64 = 4096;

/// A part of a read: data, or zeros that need not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    length: u64,
    zero: bool,
}

impl Segment {
    /// Segments of one transfer: holes of at least 4 KiB with data between them.
    pub(crate) const COUNT_MAX: usize = 2 * (TRANSFER_BYTES / 4096) + 1;
}

/// What a request was worth before it was answered, for the figures.
struct Clock {
    begun: Instant,
    device: Duration,
}

impl Connection<'_> {
    /// Serves a request whose payload, if it has one, is in the worker's buffer.
    pub(crate) fn serve(&self, request: &Request, worker: &mut Worker) -> Result<()> {
        let device = self.export.device();
        let splits = matches!(request.kind, Kind::Zero(_) | Kind::Trim | Kind::Cache);
        if splits && request.length > BULK_BYTES_MIN && self.limits.workers > 1 {
            if self.bulk.is_full() {
                self.send(worker)?;
            }
            self.bulk.push(*request);
            return Ok(());
        }
        let alone = self.is_alone(request);
        if !self.is_quick(request) {
            if !alone {
                self.pulse.call_another();
            }
            self.send(worker)?;
        }
        let begun = Instant::now();
        match request.kind {
            Kind::Read { whole } => self.read(request, whole, worker)?,
            Kind::Write => {
                // TRANSFER_BYTES at most.
                let length = usize::try_from(request.length).unwrap_or(0);
                let data = &worker.payload[..length];
                let result = if data.is_empty() {
                    Ok(())
                } else {
                    device.write_at(data, request.offset, request.durability)
                };
                self.finish(request, result, begun, worker)?;
            }
            Kind::Flush => self.finish(request, device.flush(), begun, worker)?,
            Kind::Zero(_) | Kind::Trim | Kind::Cache => {
                let result = in_pieces(device, request);
                self.finish(request, result, begun, worker)?;
            }
            Kind::BlockStatus { one, contexts } => {
                self.block_status(request, one, contexts, worker)?;
            }
        }
        if request.length <= INLINE_BYTES_MAX
            && matches!(request.kind, Kind::Read { .. } | Kind::Write)
        {
            self.learn(begun.elapsed());
        }
        if alone && self.pulse.has_input() {
            self.see_company(true);
        }
        Ok(())
    }

    /// Whether the peer waits for the reply before it sends more, as far as it was seen. Then there
    /// is nobody to read on for, however long the request takes, and waking another thread would
    /// cost the peer more than anything else. If more comes all the same, the watchdog calls.
    fn is_alone(&self, request: &Request) -> bool {
        matches!(request.kind, Kind::Read { .. } | Kind::Write)
            && request.durability == Durability::Later
            && self.company.load(Ordering::Relaxed) == 0
    }

    /// Whether the thread that read the request may serve it and read on afterwards.
    fn is_quick(&self, request: &Request) -> bool {
        let short = request.length <= INLINE_BYTES_MAX && request.durability == Durability::Later;
        let device_is_quick = || self.typical_ns.load(Ordering::Relaxed) <= INLINE_NS_MAX;
        match request.kind {
            Kind::Read { .. } => {
                short && device_is_quick() && !self.export.device().read_will_wait(request.range())
            }
            Kind::Write | Kind::Trim | Kind::Zero(_) => short && device_is_quick(),
            Kind::BlockStatus { .. } => true,
            Kind::Flush | Kind::Cache => false,
        }
    }

    /// A moving average over about eight requests. One that was kept by the scheduler counts as
    /// eight slow ones at most.
    fn learn(&self, took: Duration) {
        let sample = nanos(took).min(8 * INLINE_NS_MAX);
        let before = self.typical_ns.load(Ordering::Relaxed);
        // Concurrent workers may overwrite each other's sample; it is an estimate.
        self.typical_ns.store(before - before / 8 + sample / 8, Ordering::Relaxed);
    }

    fn read(&self, request: &Request, whole: bool, worker: &mut Worker) -> Result<()> {
        if request.length == 0 {
            self.count(request, false, Instant::now());
            self.make_room(SHORT_REPLY_MAX, worker)?;
            worker.replies.nothing_read(request.into());
            worker.unsent += 1;
            return Ok(());
        }
        let one_piece = self.form == ReplyForm::Simple || whole;
        if one_piece && request.length > TRANSFER_BYTES as u64 {
            return self.send_large(request, worker);
        }
        let mut clock = Clock { begun: Instant::now(), device: Duration::ZERO };
        let mut at = request.offset;
        let end = request.range().end;
        let mut result = Ok(());
        while at < end && result.is_ok() {
            let piece = at..end.min(at + TRANSFER_BYTES as u64);
            at = piece.end;
            result = self.read_piece(request, piece, one_piece, &mut clock, worker)?;
        }
        let waiting = clock.begun.saturating_duration_since(request.arrived);
        let counters = self.export.counters();
        counters.count(request.kind, request.length, result.is_err(), waiting, clock.device);
        if let Err((error, at)) = result {
            let refusal = self.refusal_of(request, error);
            self.make_room(SHORT_REPLY_MAX, worker)?;
            worker.replies.error(request.into(), refusal, Some(at));
        }
        worker.unsent += 1;
        Ok(())
    }

    /// Reads at most TRANSFER_BYTES into chunks. The inner error is the device's, and where.
    fn read_piece(
        &self,
        request: &Request,
        piece: Range<u64>,
        one_piece: bool,
        clock: &mut Clock,
        worker: &mut Worker,
    ) -> Result<std::result::Result<(), (DeviceError, u64)>> {
        let device = self.export.device();
        let length = piece.end - piece.start;
        let begun = Instant::now();
        if one_piece || length < u64::from(device.hole_probe_bytes_min()) {
            worker.segments.clear();
            worker.segments.push(Segment { length, zero: false });
        } else {
            find_segments(device, &piece, &mut worker.segments);
        }
        // TRANSFER_BYTES and its headers at most.
        let bytes = usize::try_from(length).unwrap_or(0);
        self.make_room(bytes + worker.segments.len() * CHUNK_BYTES_MAX, worker)?;
        let mut at = piece.start;
        for index in 0..worker.segments.len() {
            let segment = worker.segments[index];
            let last = at + segment.length == request.range().end;
            if segment.zero {
                let length = u32::try_from(segment.length).unwrap_or(0);
                worker.replies.hole(request.into(), at, length, last);
            } else {
                let length = usize::try_from(segment.length).unwrap_or(0);
                let before = worker.replies.filled();
                let place = worker.replies.data(request.into(), at, length, last);
                if let Err(error) = device.read_at(place, at) {
                    worker.replies.truncate(before);
                    clock.device += begun.elapsed();
                    return Ok(Err((error, at)));
                }
            }
            at += segment.length;
        }
        clock.device += begun.elapsed();
        Ok(Ok(()))
    }

    fn block_status(
        &self,
        request: &Request,
        one: bool,
        contexts: ContextSet,
        worker: &mut Worker,
    ) -> Result<()> {
        let begun = Instant::now();
        let mut asked = self.contexts.iter().filter(|one| contexts.has(one.id)).peekable();
        while let Some(selected) = asked.next() {
            let chunk_bytes = SHORT_REPLY_MAX + EXTENTS_MAX * size_of::<ExtendedExtent>();
            self.make_room(chunk_bytes, worker)?;
            let before = worker.replies.filled();
            let last = asked.peek().is_none();
            let device = self.export.device();
            let result = put_extents(device, request, one, *selected, last, &mut worker.replies);
            if let Err(error) = result {
                worker.replies.truncate(before);
                return self.finish(request, Err(error), begun, worker);
            }
        }
        self.count(request, false, begun);
        worker.unsent += 1;
        Ok(())
    }
}

/// One piece of a zeroing, trim or prefetch.
pub(crate) fn do_piece(
    device: &dyn BlockDevice,
    kind: Kind,
    range: Range<u64>,
    durability: Durability,
) -> DeviceResult<()> {
    match kind {
        Kind::Zero(mode) => device.zero(range, mode, durability),
        Kind::Trim => device.trim(range, durability),
        Kind::Cache => device.prefetch(range),
        _ => Err(DeviceErrorKind::Invalid.into()),
    }
}

fn in_pieces(device: &dyn BlockDevice, request: &Request) -> DeviceResult<()> {
    let range = request.range();
    if request.length == 0 {
        return Ok(());
    }
    if request.length <= PIECE_BYTES {
        return do_piece(device, request.kind, range, request.durability);
    }
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min(at + PIECE_BYTES);
        do_piece(device, request.kind, at..end, Durability::Later)?;
        at = end;
    }
    match request.durability {
        Durability::Now => device.flush(),
        Durability::Later => Ok(()),
    }
}

/// Splits `range` into data and zero runs that are worth a chunk.
fn find_segments(device: &dyn BlockDevice, range: &Range<u64>, segments: &mut Vec<Segment>) {
    segments.clear();
    // The first time, that is.
    segments.reserve(Segment::COUNT_MAX);
    let mut at = range.start;
    let found = device.extents(BASE_ALLOCATION, range.clone(), &mut |run| {
        let length = run.length.min(range.end - at);
        if length == 0 {
            return ControlFlow::Break(());
        }
        let zero = run.flags & ZERO != 0 && run.length >= HOLE_BYTES_MIN;
        at += length;
        match segments.last_mut() {
            Some(last) if last.zero == zero => last.length += length,
            _ => segments.push(Segment { length, zero }),
        }
        if at == range.end || segments.len() + 1 >= Segment::COUNT_MAX {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    if found.is_err() {
        // Then all of it is read, and reading tells what is wrong.
        segments.clear();
        at = range.start;
    }
    if at < range.end {
        let length = range.end - at;
        match segments.last_mut() {
            Some(last) if !last.zero => last.length += length,
            _ => segments.push(Segment { length, zero: false }),
        }
    }
}

/// Writes the chunk of one context: maximal extents from the request's offset on.
fn put_extents(
    device: &dyn BlockDevice,
    request: &Request,
    one: bool,
    selected: Selected,
    last: bool,
    replies: &mut Replies,
) -> DeviceResult<()> {
    let extended = replies.form() == ReplyForm::Extended;
    let kind = if extended { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
    let unfinished = replies.begin_chunk(request.into(), kind, last);
    replies.put(&selected.id.to_be_bytes());
    if extended {
        replies.put(&[0; 4]);
    }
    let mut extents = ExtentWriter { replies, pending: None, count: 0, extended };
    let mut at = request.offset;
    let end = request.range().end;
    let limit = if one { end } else { device.size_bytes() };
    let is_prefix = !extended && selected.context.flags == FlagsWidth::U64Prefix;
    let mut empty_run = false;
    device.extents(selected.context.name, request.range(), &mut |run| {
        let length = run.length.min(limit - at);
        if run.length == 0 {
            empty_run = true;
            return ControlFlow::Break(());
        }
        at += length;
        let flags = if is_prefix { run.flags >> 32 } else { run.flags };
        let more = extents.add(Run { length, flags }, one);
        if more && at < end { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    let count = extents.end();
    if empty_run || count == 0 {
        let message = format!("{} was told without progress at {at}", selected.context.name);
        return Err(DeviceError::new(DeviceErrorKind::Io, message));
    }
    finish_extents(replies, unfinished, extended, count);
    Ok(())
}

fn finish_extents(replies: &mut Replies, unfinished: Unfinished, extended: bool, count: u32) {
    if extended {
        replies.patch(&unfinished, 4, &count.to_be_bytes());
    }
    replies.finish_chunk(unfinished);
}

/// Joins neighbours of equal flags and writes what cannot grow any more.
struct ExtentWriter<'a> {
    replies: &'a mut Replies,
    pending: Option<Run>,
    count: u32,
    extended: bool,
}

impl ExtentWriter<'_> {
    /// Whether there is room for more.
    fn add(&mut self, run: Run, one: bool) -> bool {
        match &mut self.pending {
            Some(pending) if pending.flags == run.flags => {
                pending.length += run.length;
                true
            }
            Some(_) if one => false,
            pending => {
                if let Some(before) = pending.replace(run) {
                    self.write(before);
                }
                (self.count as usize) + 1 < EXTENTS_MAX
            }
        }
    }

    /// Writes the last one; how many there are.
    fn end(mut self) -> u32 {
        if let Some(last) = self.pending.take() {
            self.write(last);
        }
        self.count
    }

    fn write(&mut self, run: Run) {
        if self.extended {
            let extent = ExtendedExtent { length: run.length.into(), flags: run.flags.into() };
            self.replies.put(extent.as_bytes());
            self.count += 1;
            return;
        }
        // `meta` offers contexts with wider flags only to clients with extended headers.
        let flags = u32::try_from(run.flags & u64::from(u32::MAX)).unwrap_or(0);
        let mut left = run.length;
        while left > 0 && (self.count as usize) < EXTENTS_MAX {
            // The largest whole number of blocks in 32 bits.
            let length = u32::try_from(left).unwrap_or(u32::MAX - 4095);
            let extent = CompactExtent { length: length.into(), flags: flags.into() };
            self.replies.put(extent.as_bytes());
            self.count += 1;
            left -= u64::from(length);
        }
    }
}
