//! Which blocks of an image its file system does not use, by its bitmaps.
//!
//! Only a file system that says it has no errors is judged, and every bitmap is checked against its
//! sum. In ordered mode, data goes to disk before the bitmap that gives it its blocks: in an image
//! of a guest that runs or sleeps, blocks that are called free may hold data that the guest's memory
//! knows of. Use this for guests that were shut down, killed, or whose file system was frozen.

use std::ops::Range;

use zerocopy::little_endian::U16;

use crate::crc32c::crc32c;
use crate::disk::superblock::{BLOCK_UNINIT, compat, high_half, join, low_half, ro_compat};
use crate::error::{Error, ErrorKind, Result, corrupt};
use crate::layout::space::merge;
use crate::read::Ext4;

/// The superblock's state when it was unmounted, or was never mounted.
const STATE_CLEAN: u16 = 1;

/// The superblock's state when errors were found.
const STATE_ERRORS: u16 = 2;

/// What a file system has left for new files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// The bytes in which it gives room away: a block, or a cluster of blocks.
    pub unit_bytes: u64,

    /// How many of them are free, those for root alone among them.
    pub units: u64,

    /// How many files it has room for.
    pub inodes: u64,
}

impl Ext4 {
    /// What is left for new files, by the counts of its groups.
    pub fn room(&self) -> Room {
        let mut room = Room { unit_bytes: self.block_bytes, units: 0, inodes: 0 };
        if self.superblock.ro_compat.get() & ro_compat::BIGALLOC != 0 {
            room.unit_bytes = 1024u64 << self.superblock.log_cluster.get().min(30);
        }
        for descriptor in &self.descriptors {
            let count = |low: U16, high: U16| u64::from(high.get()) << 16 | u64::from(low.get());
            room.units += count(descriptor.free_blocks_low, descriptor.free_blocks_high);
            room.inodes += count(descriptor.free_inodes_low, descriptor.free_inodes_high);
        }
        room
    }

    /// The bytes of the image that the file system does not use, in order.
    pub fn free_ranges(&self) -> Result<Vec<Range<u64>>> {
        self.check_can_judge()?;
        let fixed = self.fixed_blocks()?;
        let uninit = ro_compat::GDT_CSUM | ro_compat::METADATA_CSUM;
        let has_uninit = self.superblock.ro_compat.get() & uninit != 0;
        let mut free = Vec::new();
        for (group, descriptor) in (0..).zip(&self.descriptors) {
            let blocks = self.group_blocks(group);
            if has_uninit && descriptor.flags.get() & BLOCK_UNINIT != 0 {
                subtract(&blocks, &fixed, &mut free);
                continue;
            }
            let at = join(descriptor.block_bitmap_low, descriptor.block_bitmap_high);
            let bitmap = self.block(at)?;
            if self.has_sums() {
                let bytes = usize::try_from(self.superblock.blocks_per_group.get() / 8)
                    .unwrap_or(usize::MAX)
                    .min(bitmap.len());
                let sum = crc32c(self.seed, &bitmap[..bytes]);
                let low = low_half(sum) != descriptor.block_bitmap_sum_low.get();
                let high = high_half(sum) != descriptor.block_bitmap_sum_high.get();
                if low || high && self.descriptors_are_long() {
                    return Err(corrupt(format!("group {group}'s bitmap has a wrong sum")));
                }
            }
            free_bits(&bitmap, &blocks, &mut free);
        }
        // A bitmap that calls the file system's own blocks free is not one to believe.
        for range in &free {
            let index = fixed.partition_point(|fixed| fixed.end <= range.start);
            if fixed.get(index).is_some_and(|fixed| fixed.start < range.end) {
                return Err(corrupt("a bitmap calls the file system's own blocks free"));
            }
        }
        let size = self.block_bytes;
        Ok(merge(free).into_iter().map(|range| range.start * size..range.end * size).collect())
    }

    fn check_can_judge(&self) -> Result<()> {
        if self.superblock.state.get() & STATE_ERRORS != 0 {
            let what = "the file system says that it has errors; repair it with e2fsck first";
            return Err(Error::new(ErrorKind::Refused, what));
        }
        // A journal makes bitmaps whole again; without one only unmounting does.
        let has_journal = self.superblock.compat.get() & compat::HAS_JOURNAL != 0;
        if self.superblock.state.get() & STATE_CLEAN == 0 && !has_journal {
            let what = "the file system has no journal and was not unmounted; its bitmaps may be \
                        older than its files. Run e2fsck first";
            return Err(Error::new(ErrorKind::Refused, what));
        }
        let features = self.superblock.ro_compat.get();
        if features & ro_compat::BIGALLOC != 0 {
            return Err(Error::new(ErrorKind::Unsupported, "an image with bigalloc"));
        }
        if features & ro_compat::ORPHAN_PRESENT != 0 && !self.was_replayed() {
            let what = "the file system has orphans to clean up; let a kernel mount it once";
            return Err(Error::new(ErrorKind::Refused, what));
        }
        Ok(())
    }

    fn descriptors_are_long(&self) -> bool {
        self.superblock.incompat.get() & crate::disk::superblock::incompat::BITS_64 != 0
    }

    fn group_blocks(&self, group: u64) -> Range<u64> {
        let first = self.group_first(group);
        let per_group = u64::from(self.superblock.blocks_per_group.get());
        first..(first + per_group).min(self.blocks)
    }

    /// The file system's own blocks that bitmaps must have, and that groups without one have.
    fn fixed_blocks(&self) -> Result<Vec<Range<u64>>> {
        let inodes = u64::from(self.superblock.inodes_per_group.get());
        let table = (inodes * self.inode_bytes()).div_ceil(self.block_bytes);
        let mut fixed = Vec::new();
        let meta = crate::disk::superblock::incompat::META_BG;
        let is_meta = self.superblock.incompat.get() & meta != 0;
        let len = if self.descriptors_are_long() {
            u64::from(self.superblock.descriptor_bytes.get())
        } else {
            32
        };
        let per_block = self.block_bytes / len.max(1);
        let plain_blocks = if is_meta {
            u64::from(self.superblock.first_meta_group.get())
        } else {
            self.groups().div_ceil(per_block)
                + u64::from(self.superblock.reserved_descriptors.get())
        };
        for (group, descriptor) in (0..).zip(&self.descriptors) {
            let first = self.group_first(group);
            let has_copy = self.group_has_superblock(group);
            if has_copy {
                fixed.push(first..first + 1 + plain_blocks);
            }
            // With meta groups, their first two and last groups have a block of descriptors.
            let within = group % per_block;
            if is_meta
                && group / per_block >= plain_blocks
                && (within <= 1 || within == per_block - 1)
            {
                let at = first + u64::from(has_copy);
                fixed.push(at..at + 1);
            }
            let bitmaps = [
                join(descriptor.block_bitmap_low, descriptor.block_bitmap_high),
                join(descriptor.inode_bitmap_low, descriptor.inode_bitmap_high),
            ];
            let start = join(descriptor.inode_table_low, descriptor.inode_table_high);
            let ends =
                bitmaps.iter().map(|&at| at.checked_add(1)).chain([start.checked_add(table)]);
            if ends.into_iter().any(|end| end.is_none_or(|end| end > self.blocks)) {
                return Err(corrupt(format!("group {group}'s tables are not in the image")));
            }
            fixed.extend(bitmaps.map(|at| at..at + 1));
            fixed.push(start..start + table);
        }
        Ok(merge(fixed))
    }
}

/// Adds to `free` what of `blocks` is not fixed.
fn subtract(blocks: &Range<u64>, fixed: &[Range<u64>], free: &mut Vec<Range<u64>>) {
    let mut at = blocks.start;
    let first = fixed.partition_point(|range| range.end <= blocks.start);
    for range in &fixed[first..] {
        if range.start >= blocks.end {
            break;
        }
        if range.start > at {
            free.push(at..range.start);
        }
        at = at.max(range.end);
    }
    if at < blocks.end {
        free.push(at..blocks.end);
    }
}

/// Adds to `free` the runs of bits that are not set.
fn free_bits(bitmap: &[u8], blocks: &Range<u64>, free: &mut Vec<Range<u64>>) {
    let mut begin = None;
    for (block, bit) in blocks.clone().zip(0usize..) {
        let is_used = bitmap.get(bit / 8).is_none_or(|byte| byte & (1 << (bit % 8)) != 0);
        match (is_used, begin) {
            (false, None) => begin = Some(block),
            (true, Some(first)) => {
                free.push(first..block);
                begin = None;
            }
            _ => {}
        }
    }
    if let Some(first) = begin {
        free.push(first..blocks.end);
    }
}
