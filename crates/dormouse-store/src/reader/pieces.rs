//! An image's content as it lies in the cache of decoded frames, not copied: for those who hand it
//! on to the kernel.

use std::ops::Range;
use std::sync::Arc;

use dormouse_image::block::BLOCK_BYTES_U64;
use dormouse_image::map::{LEAF_BYTES, Source};
use dormouse_image::pack::LazyFrame;

use super::ahead::CachedNodes;
use super::{ImageReader, block_in_leaf, block_in_leaf_up};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::packs::CheckedBlocks;

/// A run of an image's blocks.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Where it starts in the image, in bytes.
    pub at: u64,

    /// How many bytes it has, a multiple of 4096. The last block of an image whose length is none is
    /// filled up with zeros.
    pub len: u64,

    /// What it holds.
    pub content: PieceContent,
}

/// What a run of blocks holds.
#[derive(Clone, Debug)]
pub enum PieceContent {
    /// Zeros.
    Zero,

    /// Blocks of a decoded frame that were checked: [`LazyFrame::get_checked`] gives them.
    Frame {
        /// The frame.
        frame: Arc<LazyFrame>,
        /// Which of its blocks.
        blocks: Range<usize>,
    },
}

/// How much work pieces are worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// All of the range, decoding whatever it takes.
    All,

    /// The block at this offset. Of the rest of the range only what is decoded already, or lies in
    /// the same frame; what is left out is a gap between pieces.
    Block(u64),

    /// Only what is decoded already. Nothing is read for it, no part of the map either, and nobody is
    /// waited for.
    Decoded,
}

impl ImageReader {
    /// Adds the pieces of `range` to `pieces`, ascending. Neighbours in the image may be several
    /// pieces.
    ///
    /// `range` starts at a block and ends at one, or past the image's end, where there is nothing.
    /// A block that cannot be read or does not match its digest is an error.
    pub fn pieces(&self, range: Range<u64>, effort: Effort, pieces: &mut Vec<Piece>) -> Result<()> {
        self.for_each_piece(range, effort, &mut |piece| pieces.push(piece))
    }

    /// Gives the same pieces to `sink`, one after the other.
    pub fn for_each_piece(
        &self,
        range: Range<u64>,
        effort: Effort,
        sink: &mut dyn FnMut(Piece),
    ) -> Result<()> {
        let end = range.end.min(self.size_bytes.next_multiple_of(BLOCK_BYTES_U64));
        if !range.start.is_multiple_of(BLOCK_BYTES_U64) || !end.is_multiple_of(BLOCK_BYTES_U64) {
            let message = format!("{range:?} of {} is not made of whole blocks", self.label);
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        if let Effort::Block(at) = effort {
            let block = at..(at + BLOCK_BYTES_U64).min(end);
            if block == (range.start..end) {
                return self.block_pieces(block, Effort::All, sink);
            }
            // First, so that its frame is decoded when its neighbours are looked up.
            self.block_pieces(block, Effort::All, &mut |_| {})?;
        }
        self.block_pieces(range.start..end, effort, sink)
    }

    fn block_pieces(
        &self,
        range: Range<u64>,
        effort: Effort,
        sink: &mut dyn FnMut(Piece),
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let number = at / LEAF_BYTES;
            let base = number * LEAF_BYTES;
            let leaf_end = range.end.min(base + LEAF_BYTES);
            let leaf = match effort {
                Effort::Decoded => match self.map.leaf(&CachedNodes(&self.packs), number) {
                    Ok(leaf) => leaf,
                    // Not at hand, or worse: whoever asks for all of it is told.
                    Err(_) => {
                        at = leaf_end;
                        continue;
                    }
                },
                Effort::All | Effort::Block(_) => self.leaf(number)?,
            };
            match leaf {
                None => sink(Piece { at, len: leaf_end - at, content: PieceContent::Zero }),
                Some(leaf) => {
                    let blocks = block_in_leaf(at - base)..block_in_leaf_up(leaf_end - base);
                    for extent in leaf.iter_range(blocks.clone()) {
                        let first = extent.start.max(blocks.start);
                        let last = extent.end().min(blocks.end);
                        let start = base + u64::from(first) * BLOCK_BYTES_U64;
                        let len = u64::from(last - first) * BLOCK_BYTES_U64;
                        match extent.source {
                            Source::Zero => {
                                sink(Piece { at: start, len, content: PieceContent::Zero });
                            }
                            Source::Stored { pack, slot } => {
                                let slot = slot + (first - extent.start);
                                let stored = Stored { pack, slot, blocks: last - first };
                                self.frame_pieces(start, stored, effort, sink)?;
                            }
                        }
                    }
                }
            }
            at = leaf_end;
        }
        Ok(())
    }

    fn frame_pieces(
        &self,
        start: u64,
        stored: Stored,
        effort: Effort,
        sink: &mut dyn FnMut(Piece),
    ) -> Result<()> {
        let Stored { pack, slot, blocks } = stored;
        let mut done = 0;
        while done < blocks {
            let at = start + u64::from(done) * BLOCK_BYTES_U64;
            let first = slot + done;
            let left = (blocks - done) as usize;
            let found = match effort {
                Effort::Decoded => self.packs.cached_blocks(pack, first, left),
                Effort::Block(wanted) if wanted != at => {
                    self.packs.cached_blocks(pack, first, left)
                }
                Effort::All | Effort::Block(_) => self.packs.blocks(pack, first, left).map(Some),
            };
            let found = found.context(|| {
                format!("cannot read {} at byte {at} (pack {pack}, slot {first})", self.label)
            })?;
            let Some(CheckedBlocks { frame, range }) = found else {
                done += 1;
                continue;
            };
            let len = range.len() as u64 * BLOCK_BYTES_U64;
            done += u32::try_from(range.len()).unwrap_or(blocks);
            sink(Piece { at, len, content: PieceContent::Frame { frame, blocks: range } });
        }
        Ok(())
    }
}

/// Slots of a pack that run on.
#[derive(Clone, Copy, Debug)]
struct Stored {
    pack: dormouse_image::pack::PackId,
    slot: u32,
    blocks: u32,
}
