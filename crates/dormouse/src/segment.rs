//! Writes in ascending order, on their way into the store.
//!
//! ```text
//! write ─ copied once ─► pieces of 512 KiB, whole blocks ─► the store's pipeline, in a thread
//! ```
//!
//! The store takes whole blocks. What a write leaves of its first and last block is filled with what
//! lies below: the base where holes mean that, else zeros.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use dormouse_image::block::{BLOCK_BYTES, BLOCK_BYTES_U64, HoleMeaning};
use dormouse_image::codec::Codec;
use dormouse_store::commit::StageRequest;
use dormouse_store::error::{Error, ErrorKind, Result};
use dormouse_store::progress::Job;
use dormouse_store::reader::ImageReader;
use dormouse_store::source::{Staged, WRITTEN_BYTES_MAX, WriteSource, Written};
use dormouse_store::store::Store;

const PIECE_BYTES: u64 = WRITTEN_BYTES_MAX as u64;

/// Pieces that wait for the pipeline.
const QUEUE_PIECES: usize = 8;

/// Pieces that one request of the kernel fills at most, and one that it may begin.
const REQUEST_PIECES: usize = 3;

/// What writes lie over.
#[derive(Clone, Debug)]
pub(crate) struct Below {
    pub(crate) base: Option<ImageReader>,
    pub(crate) holes: HoleMeaning,
}

impl Below {
    /// Fills `buffer` with what is there where nothing is written.
    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        buffer.fill(0);
        let base = self.base.as_ref().filter(|_| self.holes == HoleMeaning::Parent);
        let Some(base) = base else { return Ok(()) };
        let left = usize::try_from(base.size_bytes().saturating_sub(offset));
        let len = left.unwrap_or(usize::MAX).min(buffer.len());
        if len == 0 { Ok(()) } else { base.read_at(&mut buffer[..len], offset) }
    }
}

/// Writes that are captured as they come.
pub(crate) struct Segment {
    below: Below,
    pieces: Option<SyncSender<Written>>,
    spares: Receiver<Vec<u8>>,
    waiting: Arc<AtomicUsize>,
    /// None once it was seen to have failed.
    thread: Option<JoinHandle<Result<Staged>>>,
    /// Bytes that are no piece yet, and where they begin, a block's start.
    buffer: Vec<u8>,
    start: u64,
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment").field("end", &self.end()).finish_non_exhaustive()
    }
}

/// The other end of the pieces.
struct Pieces {
    pieces: Receiver<Written>,
    spares: Sender<Vec<u8>>,
    waiting: Arc<AtomicUsize>,
}

impl WriteSource for Pieces {
    fn next(&mut self, spare: Vec<u8>) -> io::Result<Written> {
        // Who writes may have ended.
        let _ = self.spares.send(spare);
        let piece = self.pieces.recv().map_err(|_| {
            io::Error::new(io::ErrorKind::UnexpectedEof, "it was removed before its end")
        })?;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        Ok(piece)
    }
}

impl Segment {
    /// Starts to capture what will be written.
    pub(crate) fn start(store: &Store, label: &str, below: Below) -> Result<Segment> {
        let (pieces, receiver) = sync_channel(QUEUE_PIECES);
        let (spare_sender, spares) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let source =
            Pieces { pieces: receiver, spares: spare_sender, waiting: Arc::clone(&waiting) };
        let request = StageRequest {
            label: label.to_owned(),
            writes: Box::new(source),
            base: below.base.clone(),
            holes: below.holes,
            codec: Codec::DEFAULT,
        };
        let store = store.clone();
        let thread = thread::Builder::new()
            .name("capture".to_owned())
            .spawn(move || store.stage(request, Job::quiet()))
            .map_err(|error| Error::io("cannot start a thread", error))?;
        let (pieces, buffer, thread) = (Some(pieces), Vec::new(), Some(thread));
        Ok(Segment { below, pieces, spares, waiting, thread, buffer, start: 0 })
    }

    /// Behind the last byte that was written.
    pub(crate) fn end(&self) -> u64 {
        self.start + self.buffer.len() as u64
    }

    /// Whether a request of the kernel is taken without waiting.
    pub(crate) fn has_room(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) + REQUEST_PIECES <= QUEUE_PIECES
    }

    /// Takes bytes, not before [`end`](Segment::end).
    pub(crate) fn write(&mut self, mut data: &[u8], offset: u64) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        self.skip_to(offset)?;
        while !data.is_empty() {
            let room = PIECE_BYTES - self.end() % PIECE_BYTES;
            let len = usize::try_from(room).unwrap_or(data.len()).min(data.len());
            let (now, later) = data.split_at(len);
            self.buffer.extend_from_slice(now);
            data = later;
            if self.end().is_multiple_of(PIECE_BYTES) {
                self.send()?;
            }
        }
        Ok(())
    }

    /// Gives up what was written, and returns when nothing is left of it but what a collection sweeps.
    pub(crate) fn abandon(mut self) {
        self.pieces = None;
        // Why it comes to no end is known.
        let _ = self.outcome();
    }

    /// Ends the image at `size_bytes`, not before [`end`](Segment::end), and returns when it is
    /// durable.
    pub(crate) fn finish(mut self, size_bytes: u64) -> Result<Staged> {
        let cut = size_bytes / BLOCK_BYTES_U64 * BLOCK_BYTES_U64;
        let base = self.below.base.as_ref().map_or(0, ImageReader::size_bytes);
        if self.end() <= cut && cut < size_bytes && size_bytes < base {
            // What lies below goes on behind the end of the image, in its last block.
            self.skip_to(size_bytes)?;
        }
        if !self.end().is_multiple_of(BLOCK_BYTES_U64) {
            let end = self.end().next_multiple_of(BLOCK_BYTES_U64);
            self.fill_to(end.min(size_bytes.max(self.end())))?;
            // Behind the end of the image nothing is.
            self.buffer.resize(self.buffer.len().next_multiple_of(BLOCK_BYTES), 0);
        }
        if !self.buffer.is_empty() {
            self.send()?;
        }
        self.hand_on(Written::End { size_bytes })?;
        self.pieces = None;
        self.outcome()
    }

    /// Goes on at `offset`, with what lies below in the blocks that are written in part.
    fn skip_to(&mut self, offset: u64) -> Result<()> {
        let block = offset / BLOCK_BYTES_U64 * BLOCK_BYTES_U64;
        if self.end() < block {
            let end = self.end().next_multiple_of(BLOCK_BYTES_U64);
            self.fill_to(end)?;
            if !self.buffer.is_empty() {
                self.send()?;
            }
            self.start = block;
        }
        self.fill_to(offset)
    }

    /// Goes on with what lies below, to `offset` in the block that was begun.
    fn fill_to(&mut self, offset: u64) -> Result<()> {
        let from = self.end();
        let len = usize::try_from(offset.saturating_sub(from)).unwrap_or(0);
        if len == 0 {
            return Ok(());
        }
        let at = self.buffer.len();
        self.buffer.resize(at + len, 0);
        self.below.read(&mut self.buffer[at..], from)?;
        if self.end().is_multiple_of(PIECE_BYTES) {
            self.send()?;
        }
        Ok(())
    }

    /// Hands the buffer on; it is made of whole blocks.
    fn send(&mut self) -> Result<()> {
        let mut spare = self.spares.try_recv().unwrap_or_default();
        spare.clear();
        spare.reserve_exact(WRITTEN_BYTES_MAX);
        let (offset, end) = (self.start, self.end());
        let bytes = std::mem::replace(&mut self.buffer, spare);
        self.start = end;
        self.hand_on(Written::Data { offset, bytes })
    }

    fn hand_on(&mut self, piece: Written) -> Result<()> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let sent = self.pieces.as_ref().is_some_and(|pieces| pieces.send(piece).is_ok());
        if sent {
            return Ok(());
        }
        // The pipeline knows why it takes no more.
        self.pieces = None;
        match self.outcome() {
            Err(error) => Err(error),
            Ok(_) => Err(Error::new(ErrorKind::Io, "a capture ended before its image")),
        }
    }

    fn outcome(&mut self) -> Result<Staged> {
        let lost = |why: &'static str| Err(Error::new(ErrorKind::Io, why));
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => lost("a capture panicked"),
            None => lost("a capture failed before"),
        }
    }
}
