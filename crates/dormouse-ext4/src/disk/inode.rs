//! Inodes of 256 bytes, their times, and the headers of extent trees and extended attributes.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::crc32c::crc32c;
use crate::disk::superblock::{high_half, low_half};

/// The size of inodes that are written here.
pub(crate) const INODE_BYTES: usize = 256;

/// Bytes beyond the first 128 that have fields.
pub(crate) const EXTRA_BYTES: u16 = 32;

/// A folder has a hash index.
pub(crate) const FLAG_INDEX: u32 = 0x1000;

/// Blocks are found through extents.
pub(crate) const FLAG_EXTENTS: u32 = 0x8_0000;
/// The value of an extended attribute lies in this inode.
pub(crate) const FLAG_EA_INODE: u32 = 0x20_0000;
/// The content lies in the inode.
pub(crate) const FLAG_INLINE: u32 = 0x1000_0000;
/// The content is encrypted.
pub(crate) const FLAG_ENCRYPTED: u32 = 0x800;

/// What begins an extent tree's node.
pub(crate) const EXTENT_MAGIC: u16 = 0xf30a;

/// What begins extended attributes, in inode and block.
pub(crate) const XATTR_MAGIC: u32 = 0xea02_0000;

/// An inode, without what follows its fixed fields.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Inode {
    pub(crate) mode: U16,
    pub(crate) uid_low: U16,
    pub(crate) size_low: U32,
    pub(crate) atime: U32,
    pub(crate) ctime: U32,
    pub(crate) mtime: U32,
    pub(crate) dtime: U32,
    pub(crate) gid_low: U16,
    pub(crate) links: U16,
    pub(crate) sectors_low: U32,
    pub(crate) flags: U32,
    pub(crate) version_low: U32,
    pub(crate) block: [u8; 60],
    pub(crate) generation: U32,
    pub(crate) xattr_block_low: U32,
    pub(crate) size_high: U32,
    pub(crate) fragment: U32,
    pub(crate) sectors_high: U16,
    pub(crate) xattr_block_high: U16,
    pub(crate) uid_high: U16,
    pub(crate) gid_high: U16,
    pub(crate) checksum_low: U16,
    pub(crate) reserved: U16,
    pub(crate) extra_bytes: U16,
    pub(crate) checksum_high: U16,
    pub(crate) ctime_extra: U32,
    pub(crate) mtime_extra: U32,
    pub(crate) atime_extra: U32,
    pub(crate) crtime: U32,
    pub(crate) crtime_extra: U32,
    pub(crate) version_high: U32,
    pub(crate) project: U32,
}

/// Bytes of the fixed fields.
pub(crate) const FIXED_BYTES: usize = size_of::<Inode>();

const _: () = assert!(FIXED_BYTES == 160);
const _: () = assert!(core::mem::offset_of!(Inode, block) == 0x28);
const _: () = assert!(core::mem::offset_of!(Inode, checksum_low) == 0x7c);

const CHECKSUM_LOW: usize = 0x7c;
const CHECKSUM_HIGH: usize = 0x82;

/// What all sums of an inode's structures begin with.
pub(crate) fn inode_seed(seed: u32, number: u32, generation: u32) -> u32 {
    crc32c(crc32c(seed, &number.to_le_bytes()), &generation.to_le_bytes())
}

/// The sum over an inode's bytes, its own fields taken as zero.
pub(crate) fn inode_sum(inode_seed: u32, bytes: &[u8]) -> u32 {
    let sum = crc32c(inode_seed, &bytes[..CHECKSUM_LOW]);
    let sum = crc32c(sum, &[0; 2]);
    if bytes.len() <= CHECKSUM_HIGH + 2 {
        return crc32c(sum, &bytes[CHECKSUM_LOW + 2..]);
    }
    let extra = u16::from_le_bytes([bytes[128], bytes[129]]);
    if extra < 4 {
        return crc32c(sum, &bytes[CHECKSUM_LOW + 2..]);
    }
    let sum = crc32c(sum, &bytes[CHECKSUM_LOW + 2..CHECKSUM_HIGH]);
    let sum = crc32c(sum, &[0; 2]);
    crc32c(sum, &bytes[CHECKSUM_HIGH + 2..])
}

/// Puts the sum into an inode of 256 bytes.
pub(crate) fn seal_inode(inode_seed: u32, bytes: &mut [u8]) {
    let sum = inode_sum(inode_seed, bytes);
    bytes[CHECKSUM_LOW..CHECKSUM_LOW + 2].copy_from_slice(&low_half(sum).to_le_bytes());
    bytes[CHECKSUM_HIGH..CHECKSUM_HIGH + 2].copy_from_slice(&high_half(sum).to_le_bytes());
}

/// The earliest second that an inode can hold.
const SECONDS_MIN: i64 = i32::MIN as i64;

/// The latest: two more bits beside the 32.
const SECONDS_MAX: i64 = SECONDS_MIN + (1 << 34) - 1;

/// A time as an inode holds it: the low 32 bits of the seconds, and nanoseconds with two more.
/// What lies outside of 1901 to 2446 becomes the nearest that does not.
pub(crate) fn encode_time(seconds: i64, nanoseconds: u32) -> (u32, u32) {
    let clamped = seconds.clamp(SECONDS_MIN, SECONDS_MAX);
    let nanoseconds = if clamped == seconds { nanoseconds } else { 0 };
    let low = crate::disk::superblock::low_word(clamped.cast_unsigned());
    let epoch = (clamped - i64::from(low.cast_signed())) >> 32;
    let epoch = crate::disk::superblock::low_word(epoch.cast_unsigned()) & 3;
    (low, nanoseconds << 2 | epoch)
}

/// Seconds and nanoseconds of an inode's time.
pub(crate) fn decode_time(low: u32, extra: u32) -> (i64, u32) {
    (i64::from(low.cast_signed()) + (i64::from(extra & 3) << 32), extra >> 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_from_1901_to_2446() {
        let seconds = [SECONDS_MIN, -1, 0, 1, 1 << 31, (1 << 32) - 1, 1 << 32, SECONDS_MAX];
        for seconds in seconds {
            let (low, extra) = encode_time(seconds, 999_999_999);
            assert_eq!(decode_time(low, extra), (seconds, 999_999_999), "{seconds}");
        }
        let (low, extra) = encode_time(i64::MAX, 5);
        assert_eq!(decode_time(low, extra), (SECONDS_MAX, 0));
        let (low, extra) = encode_time(i64::MIN, 5);
        assert_eq!(decode_time(low, extra), (SECONDS_MIN, 0));
    }
}
