//! A snapshot's memory as what a pager serves from.

use std::ops::Range;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use dormouse_image::block::{BLOCK_BYTES, BLOCK_BYTES_U64};
use dormouse_live::trace::Recorder;
use dormouse_serve::uffd::{Content, Effort, MemorySource, Piece, SourceError};
use dormouse_store::reader::{self, ImageReader, PieceContent};

/// An image of the store, handed on frame by frame: nothing is copied, nothing allocated for a fault.
#[derive(Debug)]
pub(crate) struct ImageMemory {
    /// Exchanged after a commit, for one with the same content wherever the guest has not been.
    image: RwLock<Arc<ImageReader>>,
    size_bytes: u64,
    touches: OnceLock<Touches>,
}

/// Where the first touches of a waking guest are noted.
#[derive(Debug)]
struct Touches {
    recorder: Arc<Recorder>,
    window_bytes: u64,
}

impl Touches {
    /// A guest waits for the block at `at`, and gets `range` at once if it goes through its memory in
    /// order. Then it has been through the window before, too, of which it was given all at its start.
    fn note(&self, at: u64, range: &Range<u64>) {
        let is_in_order = range.end - range.start > BLOCK_BYTES_U64;
        let first = if is_in_order { at.saturating_sub(self.window_bytes) } else { at };
        self.recorder.record_run(first / BLOCK_BYTES_U64..at / BLOCK_BYTES_U64 + 1);
    }
}

impl ImageMemory {
    pub(super) fn new(image: ImageReader) -> ImageMemory {
        let size_bytes = image.size_bytes();
        ImageMemory { size_bytes, image: RwLock::new(Arc::new(image)), touches: OnceLock::new() }
    }

    /// Has what the guest waits for noted from now on. Huge pages are not: their faults look like
    /// prefetching.
    pub(crate) fn record(&self, recorder: Arc<Recorder>, window_bytes: u64) {
        // A second recorder is never given.
        let _ = self.touches.set(Touches { recorder, window_bytes });
    }

    /// The image that faults are answered from now.
    pub(crate) fn image(&self) -> Arc<ImageReader> {
        Arc::clone(&self.image.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn replace(&self, image: ImageReader) {
        *self.image.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(image);
    }
}

impl MemorySource for ImageMemory {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn pieces(
        &self,
        range: Range<u64>,
        effort: Effort,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), SourceError> {
        let effort = match effort {
            Effort::All => reader::Effort::All,
            Effort::Block(at) => {
                if let Some(touches) = self.touches.get() {
                    touches.note(at, &range);
                }
                reader::Effort::Block(at)
            }
            Effort::AtHand => reader::Effort::Decoded,
        };
        let found = self.image().for_each_piece(range, effort, &mut |piece| {
            let content = match piece.content {
                PieceContent::Zero => Content::Zeros(piece.len),
                PieceContent::Frame { frame, blocks } => Content::Bytes {
                    keeper: frame,
                    range: blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES,
                },
            };
            pieces.push(Piece { at: piece.at, content });
        });
        found.map_err(SourceError::from)
    }
}
