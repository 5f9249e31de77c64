//! The block: 4 KiB, the unit of mapping, identity, verification and dirty tracking.

use std::fmt;

/// Bytes in a block. A page of every guest we serve, and a block of every file system on its
/// disks, is this long or a multiple of it.
pub const BLOCK_BYTES: usize = 4096;

/// [`BLOCK_BYTES`] for arithmetic on file offsets.
pub const BLOCK_BYTES_U64: u64 = BLOCK_BYTES as u64;

/// The largest image: block numbers and slots fit 32 bits, as roaring bitmaps need them to.
pub const IMAGE_BYTES_MAX: u64 = 16 << 40;

/// The number of a block in an image: byte offset divided by [`BLOCK_BYTES`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u64);

impl BlockIndex {
    /// The block that holds the byte at `offset`.
    pub fn containing(offset: u64) -> BlockIndex {
        BlockIndex(offset / BLOCK_BYTES_U64)
    }

    /// The offset of the block's first byte.
    pub fn byte_offset(self) -> u64 {
        self.0 * BLOCK_BYTES_U64
    }
}

impl fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How many blocks an image of `bytes` bytes has; the last one may be short.
pub fn blocks_in(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES_U64)
}

/// What a hole in a sparse source says about its blocks.
///
/// A Firecracker *diff* has holes where nothing changed; every other sparse file has holes where
/// there are zeros. Taking one for the other corrupts a guest silently, so it is always said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoleMeaning {
    /// The blocks are zero.
    Zero,

    /// The blocks are as they were in the parent image.
    Parent,
}
