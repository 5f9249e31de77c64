//! The superblock (1,024 bytes at offset 1,024) and the group descriptors.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::crc32c::{START, crc32c};

/// Where the superblock begins.
pub(crate) const SUPERBLOCK_OFFSET: u64 = 1024;

/// What a superblock is told by.
pub(crate) const MAGIC: u16 = 0xef53;

/// Features that may be ignored.
pub(crate) mod compat {
    pub(crate) const HAS_JOURNAL: u32 = 0x4;
    pub(crate) const EXT_ATTR: u32 = 0x8;
    pub(crate) const RESIZE_INODE: u32 = 0x10;
    pub(crate) const DIR_INDEX: u32 = 0x20;
}

/// Features that have to be known to read.
pub(crate) mod incompat {
    pub(crate) const FILETYPE: u32 = 0x2;
    pub(crate) const RECOVER: u32 = 0x4;
    pub(crate) const JOURNAL_DEV: u32 = 0x8;
    pub(crate) const META_BG: u32 = 0x10;
    pub(crate) const EXTENTS: u32 = 0x40;
    pub(crate) const BITS_64: u32 = 0x80;
    pub(crate) const FLEX_BG: u32 = 0x200;
    pub(crate) const EA_INODE: u32 = 0x400;
    pub(crate) const CSUM_SEED: u32 = 0x2000;
    pub(crate) const LARGE_DIR: u32 = 0x4000;
    pub(crate) const INLINE_DATA: u32 = 0x8000;
    pub(crate) const CASEFOLD: u32 = 0x2_0000;
}

/// Features that have to be known to write.
pub(crate) mod ro_compat {
    pub(crate) const SPARSE_SUPER: u32 = 0x1;
    pub(crate) const LARGE_FILE: u32 = 0x2;
    pub(crate) const HUGE_FILE: u32 = 0x8;
    pub(crate) const GDT_CSUM: u32 = 0x10;
    pub(crate) const DIR_NLINK: u32 = 0x20;
    pub(crate) const EXTRA_ISIZE: u32 = 0x40;
    pub(crate) const BIGALLOC: u32 = 0x200;
    pub(crate) const METADATA_CSUM: u32 = 0x400;
    pub(crate) const ORPHAN_PRESENT: u32 = 0x1_0000;
}

/// No inode of the group is used; its bitmap was never written.
pub(crate) const INODE_UNINIT: u16 = 1;
/// No block of the group is used but by its own metadata; its bitmap was never written.
pub(crate) const BLOCK_UNINIT: u16 = 2;
/// The unused part of the inode table is zero.
pub(crate) const INODE_ZEROED: u16 = 4;

/// The superblock.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Superblock {
    pub(crate) inodes: U32,
    pub(crate) blocks_low: U32,
    pub(crate) reserved_low: U32,
    pub(crate) free_blocks_low: U32,
    pub(crate) free_inodes: U32,
    pub(crate) first_data_block: U32,
    pub(crate) log_block: U32,
    pub(crate) log_cluster: U32,
    pub(crate) blocks_per_group: U32,
    pub(crate) clusters_per_group: U32,
    pub(crate) inodes_per_group: U32,
    pub(crate) mount_time: U32,
    pub(crate) write_time: U32,
    pub(crate) mounts: U16,
    pub(crate) mounts_max: U16,
    pub(crate) magic: U16,
    pub(crate) state: U16,
    pub(crate) errors: U16,
    pub(crate) minor_revision: U16,
    pub(crate) check_time: U32,
    pub(crate) check_interval: U32,
    pub(crate) creator: U32,
    pub(crate) revision: U32,
    pub(crate) reserved_uid: U16,
    pub(crate) reserved_gid: U16,
    pub(crate) first_inode: U32,
    pub(crate) inode_size: U16,
    pub(crate) block_group: U16,
    pub(crate) compat: U32,
    pub(crate) incompat: U32,
    pub(crate) ro_compat: U32,
    pub(crate) uuid: [u8; 16],
    pub(crate) label: [u8; 16],
    pub(crate) last_mounted: [u8; 64],
    pub(crate) usage_bitmap: U32,
    pub(crate) preallocate: [u8; 2],
    pub(crate) reserved_descriptors: U16,
    pub(crate) journal_uuid: [u8; 16],
    pub(crate) journal_inode: U32,
    pub(crate) journal_device: U32,
    pub(crate) last_orphan: U32,
    pub(crate) hash_seed: [U32; 4],
    pub(crate) hash_version: u8,
    pub(crate) journal_backup_type: u8,
    pub(crate) descriptor_bytes: U16,
    pub(crate) mount_options: U32,
    pub(crate) first_meta_group: U32,
    pub(crate) made_time: U32,
    pub(crate) journal_blocks: [U32; 17],
    pub(crate) blocks_high: U32,
    pub(crate) reserved_high: U32,
    pub(crate) free_blocks_high: U32,
    pub(crate) extra_min: U16,
    pub(crate) extra_want: U16,
    pub(crate) flags: U32,
    pub(crate) raid_stride: U16,
    pub(crate) mmp_interval: U16,
    pub(crate) mmp_block: U64,
    pub(crate) raid_stripe: U32,
    pub(crate) log_flex_groups: u8,
    pub(crate) checksum_type: u8,
    pub(crate) padding: U16,
    pub(crate) written_kib: U64,
    pub(crate) unused_snapshot_and_errors: [u8; 0x200 - 0x180],
    pub(crate) mount_text: [u8; 64],
    pub(crate) quota_inodes: [U32; 2],
    pub(crate) overhead: U32,
    pub(crate) sparse_super2_groups: [U32; 2],
    pub(crate) encryption: [u8; 4 + 16],
    pub(crate) lost_found_inode: U32,
    pub(crate) project_quota_inode: U32,
    pub(crate) checksum_seed: U32,
    pub(crate) times_high: [u8; 8],
    pub(crate) encoding: [u8; 4],
    pub(crate) orphan_file_inode: U32,
    pub(crate) unused: [U32; 94],
    pub(crate) checksum: U32,
}

const _: () = assert!(size_of::<Superblock>() == 1024);
const _: () = assert!(core::mem::offset_of!(Superblock, uuid) == 0x68);
const _: () = assert!(core::mem::offset_of!(Superblock, hash_seed) == 0xec);
const _: () = assert!(core::mem::offset_of!(Superblock, blocks_high) == 0x150);
const _: () = assert!(core::mem::offset_of!(Superblock, checksum_seed) == 0x270);

impl Superblock {
    /// The sum over all but its own field.
    pub(crate) fn sum(&self) -> u32 {
        crc32c(START, &self.as_bytes()[..1020])
    }
}

/// A group's descriptor, of 64 bytes with the feature `64bit` and the first 32 without.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Descriptor {
    pub(crate) block_bitmap_low: U32,
    pub(crate) inode_bitmap_low: U32,
    pub(crate) inode_table_low: U32,
    pub(crate) free_blocks_low: U16,
    pub(crate) free_inodes_low: U16,
    pub(crate) folders_low: U16,
    pub(crate) flags: U16,
    pub(crate) exclude_low: U32,
    pub(crate) block_bitmap_sum_low: U16,
    pub(crate) inode_bitmap_sum_low: U16,
    pub(crate) unused_inodes_low: U16,
    pub(crate) checksum: U16,
    pub(crate) block_bitmap_high: U32,
    pub(crate) inode_bitmap_high: U32,
    pub(crate) inode_table_high: U32,
    pub(crate) free_blocks_high: U16,
    pub(crate) free_inodes_high: U16,
    pub(crate) folders_high: U16,
    pub(crate) unused_inodes_high: U16,
    pub(crate) exclude_high: U32,
    pub(crate) block_bitmap_sum_high: U16,
    pub(crate) inode_bitmap_sum_high: U16,
    pub(crate) reserved: U32,
}

/// Bytes of a descriptor with the feature `64bit`.
pub(crate) const DESCRIPTOR_BYTES: usize = 64;
/// Bytes of a descriptor without.
pub(crate) const DESCRIPTOR_BYTES_OLD: usize = 32;

const _: () = assert!(size_of::<Descriptor>() == DESCRIPTOR_BYTES);

impl Descriptor {
    /// The sum of group `group`'s descriptor, of which `len` bytes are on disk.
    pub(crate) fn sum(&self, seed: u32, group: u32, len: usize) -> u16 {
        let mut copy = *self;
        copy.checksum = U16::ZERO;
        let sum = crc32c(crc32c(seed, &group.to_le_bytes()), &copy.as_bytes()[..len]);
        low_half(sum)
    }
}

/// The lower 16 bits of a sum.
pub(crate) fn low_half(sum: u32) -> u16 {
    let [a, b, ..] = sum.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// The upper 16 bits of a number.
pub(crate) fn high_half(number: u32) -> u16 {
    let [.., c, d] = number.to_le_bytes();
    u16::from_le_bytes([c, d])
}

/// The lower 32 bits of a block's number.
pub(crate) fn low_word(number: u64) -> u32 {
    let [a, b, c, d, ..] = number.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// The upper 32 bits of a number.
pub(crate) fn high_word(number: u64) -> u32 {
    low_word(number >> 32)
}

/// A number made of two halves.
pub(crate) fn join(low: U32, high: U32) -> u64 {
    u64::from(high.get()) << 32 | u64::from(low.get())
}
