//! What a memory server needs of the image it serves.

use std::error::Error as StdError;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use dormouse_image::block::BLOCK_BYTES;
use dormouse_image::pack::LazyFrame;

/// An image of a guest's memory that does not change.
///
/// Called from several threads at once.
pub trait MemorySource: fmt::Debug + Send + Sync {
    /// The image's length in bytes.
    fn size_bytes(&self) -> u64;

    /// Adds the content of `range`, which is made of whole 4 KiB blocks, to `pieces`, ascending.
    ///
    /// What is given was verified. An error means that the guest cannot go on.
    fn pieces(
        &self,
        range: Range<u64>,
        effort: Effort,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), SourceError>;

    /// A guest waits for the last page of `range`, for the first time, and has just come through the
    /// others. For those who want to know; nothing hangs on it.
    fn touched(&self, range: Range<u64>) {
        let _ = range;
    }
}

/// How much work pieces are worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// All of the range.
    All,

    /// The block at this offset; the rest of the range only where it is decoded with it or already.
    Block(u64),

    /// Only what is decoded already.
    AtHand,
}

/// Why an image cannot be read.
pub type SourceError = Box<dyn StdError + Send + Sync>;

/// A run of an image's bytes.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Where it starts in the image, in bytes; a multiple of 4096, as is its length.
    pub at: u64,

    /// What it holds.
    pub content: Content,
}

/// What a run of bytes holds.
#[derive(Clone)]
pub enum Content {
    /// So many zeros.
    Zeros(u64),

    /// Bytes that somebody keeps.
    Bytes {
        /// Who keeps them.
        keeper: Arc<dyn Keeper>,
        /// Which of them.
        range: Range<usize>,
    },
}

/// Keeps verified bytes.
pub trait Keeper: Send + Sync {
    /// Some of them; `None` if it does not have all of these, verified.
    fn bytes(&self, range: Range<usize>) -> Option<&[u8]>;
}

impl Keeper for Vec<u8> {
    fn bytes(&self, range: Range<usize>) -> Option<&[u8]> {
        self.get(range)
    }
}

impl Keeper for LazyFrame {
    fn bytes(&self, range: Range<usize>) -> Option<&[u8]> {
        let blocks = range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES);
        let skip = range.start % BLOCK_BYTES;
        self.get_checked(blocks)?.get(skip..skip + range.len())
    }
}

impl Piece {
    /// Its bytes in the image.
    pub fn range(&self) -> Range<u64> {
        let len = match &self.content {
            Content::Zeros(len) => *len,
            Content::Bytes { range, .. } => range.len() as u64,
        };
        self.at..self.at + len
    }

    /// Its bytes; none if they are zeros, or their keeper does not have them.
    pub fn bytes(&self) -> Option<&[u8]> {
        match &self.content {
            Content::Zeros(_) => None,
            Content::Bytes { keeper, range } => keeper.bytes(range.clone()),
        }
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Content::Zeros(len) => write!(f, "{len} zeros"),
            Content::Bytes { range, .. } => write!(f, "{} bytes", range.len()),
        }
    }
}
