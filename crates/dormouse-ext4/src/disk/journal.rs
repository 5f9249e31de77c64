//! The journal's blocks (jbd2), big-endian.

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What begins every block of the journal's own.
pub(crate) const JOURNAL_MAGIC: u32 = 0xc03b_3998;

/// Lists the blocks that follow.
pub(crate) const KIND_DESCRIPTOR: u32 = 1;
/// Ends a transaction.
pub(crate) const KIND_COMMIT: u32 = 2;
/// A superblock of the first version.
pub(crate) const KIND_SUPERBLOCK_V1: u32 = 3;
/// A superblock.
pub(crate) const KIND_SUPERBLOCK: u32 = 4;
/// Lists blocks whose older copies must not be replayed.
pub(crate) const KIND_REVOKE: u32 = 5;

/// There are revoke blocks.
pub(crate) const INCOMPAT_REVOKE: u32 = 0x1;
/// Block numbers have 64 bits.
pub(crate) const INCOMPAT_64BIT: u32 = 0x2;
/// A commit block may be written without waiting for the blocks before it.
pub(crate) const INCOMPAT_ASYNC_COMMIT: u32 = 0x4;
/// Checksums, second version.
pub(crate) const INCOMPAT_CSUM_V2: u32 = 0x8;
/// Checksums, third version.
pub(crate) const INCOMPAT_CSUM_V3: u32 = 0x10;
/// Small changes beside the transactions.
pub(crate) const INCOMPAT_FAST_COMMIT: u32 = 0x20;

/// A block whose first bytes were the magic number.
pub(crate) const TAG_ESCAPED: u32 = 1;
/// The tag has no UUID after it.
pub(crate) const TAG_SAME_UUID: u32 = 2;
/// The last tag of its block.
pub(crate) const TAG_LAST: u32 = 8;

/// What each block of the journal's own begins with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct BlockHeader {
    pub(crate) magic: U32,
    pub(crate) kind: U32,
    pub(crate) sequence: U32,
}

/// The journal's first block.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct JournalSuperblock {
    pub(crate) header: BlockHeader,
    pub(crate) block_bytes: U32,
    pub(crate) blocks: U32,
    pub(crate) first: U32,
    pub(crate) sequence: U32,
    pub(crate) start: U32,
    pub(crate) error: U32,
    pub(crate) compat: U32,
    pub(crate) incompat: U32,
    pub(crate) ro_compat: U32,
    pub(crate) uuid: [u8; 16],
    pub(crate) users: U32,
    pub(crate) dynamic_superblock: U32,
    pub(crate) transaction_max: U32,
    pub(crate) transaction_data_max: U32,
    pub(crate) checksum_type: u8,
    pub(crate) padding: [u8; 3],
    pub(crate) fast_commit_blocks: U32,
    pub(crate) head: U32,
    pub(crate) unused: [U32; 40],
    pub(crate) checksum: U32,
    pub(crate) user_ids: [u8; 768],
}

const _: () = assert!(size_of::<JournalSuperblock>() == 1024);

/// A tag with the third version of checksums.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Tag3 {
    pub(crate) block_low: U32,
    pub(crate) flags: U32,
    pub(crate) block_high: U32,
    pub(crate) checksum: U32,
}

/// A tag without, of which the last field is there only with 64-bit numbers.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Tag {
    pub(crate) block_low: U32,
    pub(crate) checksum: U16,
    pub(crate) flags: U16,
    pub(crate) block_high: U32,
}
