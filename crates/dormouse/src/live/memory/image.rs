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
    /// Where the first touches of a waking guest are noted.
    touches: OnceLock<Arc<Recorder>>,
}

impl ImageMemory {
    pub(super) fn new(image: ImageReader) -> ImageMemory {
        let size_bytes = image.size_bytes();
        ImageMemory { size_bytes, image: RwLock::new(Arc::new(image)), touches: OnceLock::new() }
    }

    /// Has what the guest touches first noted from now on.
    pub(crate) fn record(&self, recorder: Arc<Recorder>) {
        // A second recorder is never given.
        let _ = self.touches.set(recorder);
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
            Effort::Block(at) => reader::Effort::Block(at),
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

    fn touched(&self, range: Range<u64>) {
        if let Some(recorder) = self.touches.get() {
            recorder.record_run(range.start / BLOCK_BYTES_U64..range.end / BLOCK_BYTES_U64);
        }
    }
}
