//! The bytes of ext4, shared by writer and reader: superblock, group descriptors, inodes.
//!
//! Source: the kernel's `Documentation/filesystems/ext4/`. All numbers are little-endian but the
//! journal's, which are big-endian.

pub(crate) mod hash;
pub(crate) mod inode;
pub(crate) mod journal;
pub(crate) mod superblock;

/// The block size of images that are written here, and of nearly all that are read.
pub(crate) const BLOCK_BYTES: usize = 4096;

/// [`BLOCK_BYTES`] for offsets.
pub(crate) const BLOCK: u64 = 4096;

/// Blocks of a group: as many as a bitmap of one block has bits.
pub(crate) const GROUP_BLOCKS: u64 = 8 * BLOCK;

/// The root folder.
pub(crate) const INODE_ROOT: u32 = 2;
/// Owns the blocks that group descriptors grow into.
pub(crate) const INODE_RESIZE: u32 = 7;
/// The journal.
pub(crate) const INODE_JOURNAL: u32 = 8;
/// The first inode for everybody.
pub(crate) const INODE_FIRST: u32 = 11;

/// The longest name in a folder.
pub(crate) const NAME_BYTES_MAX: usize = 255;

/// The most names that a file other than a folder may have.
pub(crate) const LINKS_MAX: u32 = 65_000;

/// The longest target of a symlink that the kernel follows.
pub(crate) const SYMLINK_BYTES_MAX: usize = 4095;

/// A symlink shorter than this lies in its inode.
pub(crate) const FAST_SYMLINK_BYTES: usize = 60;

/// The file type's bits in a mode.
pub(crate) const TYPE_MASK: u16 = 0o170_000;
/// A fifo.
pub(crate) const TYPE_FIFO: u16 = 0o010_000;
/// A character device.
pub(crate) const TYPE_CHAR: u16 = 0o020_000;
/// A folder.
pub(crate) const TYPE_FOLDER: u16 = 0o040_000;
/// A block device.
pub(crate) const TYPE_BLOCK: u16 = 0o060_000;
/// A regular file.
pub(crate) const TYPE_FILE: u16 = 0o100_000;
/// A symlink.
pub(crate) const TYPE_SYMLINK: u16 = 0o120_000;
/// A socket.
pub(crate) const TYPE_SOCKET: u16 = 0o140_000;

/// The file type as folders' entries tell it.
pub(crate) fn entry_type(mode: u16) -> u8 {
    match mode & TYPE_MASK {
        TYPE_FILE => 1,
        TYPE_FOLDER => 2,
        TYPE_CHAR => 3,
        TYPE_BLOCK => 4,
        TYPE_FIFO => 5,
        TYPE_SOCKET => 6,
        TYPE_SYMLINK => 7,
        _ => 0,
    }
}

/// A device's number as an inode holds it: the first word for small numbers, else the second.
pub(crate) fn encode_device(major: u32, minor: u32) -> [u32; 2] {
    if major < 256 && minor < 256 {
        [major << 8 | minor, 0]
    } else {
        [0, (minor & 0xff) | major << 8 | (minor & !0xff) << 12]
    }
}

/// The major and minor number in an inode's first two words.
pub(crate) fn decode_device(words: [u32; 2]) -> (u32, u32) {
    match words {
        [0, new] => ((new >> 8) & 0xfff, (new & 0xff) | (new >> 12) & 0xf_ff00),
        [old, _] => ((old >> 8) & 0xff, old & 0xff),
    }
}

/// Whether a group of a file system with `sparse_super` begins with a copy of the superblock.
pub(crate) fn has_superblock(group: u64) -> bool {
    group <= 1 || [3, 5, 7].iter().any(|&base| is_power(group, base))
}

fn is_power(mut number: u64, base: u64) -> bool {
    while number > 1 && number.is_multiple_of(base) {
        number /= base;
    }
    number == 1
}

/// The groups after the first that have a copy of the superblock, below `groups`.
pub(crate) fn backup_groups(groups: u64) -> Vec<u64> {
    let mut found = Vec::new();
    for base in [3u64, 5, 7] {
        let mut group = base;
        while group < groups {
            found.push(group);
            group *= base;
        }
    }
    if groups > 1 {
        found.push(1);
    }
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backups_are_at_powers() {
        assert!(backup_groups(1).is_empty());
        assert_eq!(backup_groups(2), [1]);
        assert_eq!(backup_groups(100), [1, 3, 5, 7, 9, 25, 27, 49, 81]);
        let by_test: Vec<u64> = (1..1000).filter(|&group| has_superblock(group)).collect();
        assert_eq!(backup_groups(1000), by_test);
    }

    #[test]
    fn device_numbers_survive() {
        for device in [(0, 1), (8, 17), (255, 255), (256, 0), (1, 256), (4095, 0xf_ffff)] {
            assert_eq!(decode_device(encode_device(device.0, device.1)), device);
        }
    }
}
