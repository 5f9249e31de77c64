//! Bitmaps, group descriptors, the superblock and their copies: counted at once, written when their
//! places come.

use std::ops::Range;

use zerocopy::little_endian::U32;
use zerocopy::{FromZeros, IntoBytes};

use crate::crc32c::{START, crc32c};
use crate::disk::hash::{FLAG_SIGNED, HALF_MD4};
use crate::disk::inode::{EXTRA_BYTES, INODE_BYTES};
use crate::disk::superblock::{
    BLOCK_UNINIT, DESCRIPTOR_BYTES, Descriptor, INODE_UNINIT, INODE_ZEROED, MAGIC,
    SUPERBLOCK_OFFSET, Superblock, compat, high_half, high_word, incompat, low_half, low_word,
    ro_compat,
};
use crate::disk::{
    BLOCK, BLOCK_BYTES, GROUP_BLOCKS, INODE_FIRST, INODE_JOURNAL, backup_groups, has_superblock,
};
use crate::error::Result;
use crate::layout::Layout;
use crate::layout::folder::HASH_SEED;
use crate::layout::geometry::LOG_FLEX_GROUPS;
use crate::tree::Tree;
use crate::write::blocks::Blocks;
use crate::write::metadata::Placed;

/// What all checksums of metadata begin with. It is part of the superblock and the same in all
/// images, so that equal trees have equal blocks whatever their UUIDs are.
pub(crate) fn checksum_seed() -> u32 {
    crc32c(START, b"dormouse-ext4")
}

const COMPAT: u32 = compat::EXT_ATTR | compat::RESIZE_INODE | compat::DIR_INDEX;
const INCOMPAT: u32 = incompat::FILETYPE
    | incompat::EXTENTS
    | incompat::BITS_64
    | incompat::FLEX_BG
    | incompat::CSUM_SEED;
const RO_COMPAT: u32 = ro_compat::SPARSE_SUPER
    | ro_compat::LARGE_FILE
    | ro_compat::HUGE_FILE
    | ro_compat::DIR_NLINK
    | ro_compat::EXTRA_ISIZE
    | ro_compat::METADATA_CSUM;

/// What the superblock has from elsewhere.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) uuid: [u8; 16],
    /// The journal's inode: its 15 words of blocks, and its length.
    pub(crate) journal_blocks: Option<[u32; 17]>,
}

/// What lies at a fixed place, of a group.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    /// Descriptors, and in the first group what their blocks are reserved by.
    Descriptors(u64),
    BlockBitmap(u64),
    InodeBitmap(u64),
    Table(u64),
}

/// All groups, counted.
#[derive(Debug)]
pub(crate) struct Groups {
    /// What is to be written at fixed places, in ascending order.
    pub(crate) parts: Vec<(u64, Part)>,
    used: Vec<Range<u64>>,
    copies: Vec<u64>,
    descriptors: Vec<u8>,
    free_blocks: u64,
    free_inodes: u64,
}

impl Groups {
    /// Counts what all groups have.
    pub(crate) fn count(tree: &Tree, layout: &Layout) -> Groups {
        let geometry = &layout.geometry;
        let mut groups = Groups {
            parts: Vec::new(),
            used: layout.used_ranges(),
            copies: backup_groups(geometry.groups()),
            descriptors: Vec::with_capacity(geometry.tables.len() * DESCRIPTOR_BYTES),
            free_blocks: 0,
            free_inodes: 0,
        };
        let mut folders = vec![0; geometry.tables.len()];
        for &node in &layout.order {
            if tree.node(node).is_folder() {
                folders[inode_group(layout, layout.number(node))] += 1;
            }
        }
        for (group, folders) in (0..).zip(folders) {
            groups.add(layout, group, folders);
        }
        groups.parts.push((1, Part::Descriptors(0)));
        let copies = groups.copies.iter();
        let copies = copies.map(|&group| (group * GROUP_BLOCKS + 1, Part::Descriptors(group)));
        groups.parts.extend(copies);
        groups.parts.sort_unstable_by_key(|&(at, _)| at);
        groups
    }

    fn add(&mut self, layout: &Layout, group: u64, folders: u32) {
        let geometry = &layout.geometry;
        let seed = checksum_seed();
        let range = geometry.group_range(group);
        let used_blocks: u64 = self.inside(&range).map(|used| used.end - used.start).sum();
        let own_blocks = if has_superblock(group) { geometry.first_block } else { 0 };
        let own_inodes = own_inodes(layout, group);
        let tables = geometry.tables[usize::try_from(group).unwrap_or(usize::MAX)];

        let mut descriptor = Descriptor::new_zeroed();
        let mut flags = INODE_ZEROED;
        if used_blocks == own_blocks && group != geometry.groups() - 1 {
            flags |= BLOCK_UNINIT;
        } else {
            let sum = crc32c(seed, &self.block_bitmap(layout, group));
            descriptor.block_bitmap_sum_low = low_half(sum).into();
            descriptor.block_bitmap_sum_high = high_half(sum).into();
            self.parts.push((tables.block_bitmap, Part::BlockBitmap(group)));
        }
        if own_inodes == 0 {
            flags |= INODE_UNINIT;
        } else {
            let bytes = usize::try_from(geometry.inodes_per_group / 8).unwrap_or(usize::MAX);
            let sum = crc32c(seed, &inode_bitmap(layout, group)[..bytes]);
            descriptor.inode_bitmap_sum_low = low_half(sum).into();
            descriptor.inode_bitmap_sum_high = high_half(sum).into();
            self.parts.push((tables.inode_bitmap, Part::InodeBitmap(group)));
            self.parts.push((tables.inode_table, Part::Table(group)));
        }
        let group_free = (range.end - range.start) - used_blocks;
        let group_free_inodes = u64::from(geometry.inodes_per_group) - own_inodes;
        self.free_blocks += group_free;
        self.free_inodes += group_free_inodes;
        descriptor.block_bitmap_low = low_word(tables.block_bitmap).into();
        descriptor.block_bitmap_high = high_word(tables.block_bitmap).into();
        descriptor.inode_bitmap_low = low_word(tables.inode_bitmap).into();
        descriptor.inode_bitmap_high = high_word(tables.inode_bitmap).into();
        descriptor.inode_table_low = low_word(tables.inode_table).into();
        descriptor.inode_table_high = high_word(tables.inode_table).into();
        descriptor.free_blocks_low = low_half(low_word(group_free)).into();
        descriptor.free_blocks_high = high_half(low_word(group_free)).into();
        // Inodes are given out in order, so what is free is what was never used.
        let unused = low_word(group_free_inodes);
        descriptor.free_inodes_low = low_half(unused).into();
        descriptor.free_inodes_high = high_half(unused).into();
        descriptor.unused_inodes_low = low_half(unused).into();
        descriptor.unused_inodes_high = high_half(unused).into();
        descriptor.folders_low = low_half(folders).into();
        descriptor.folders_high = high_half(folders).into();
        descriptor.flags = flags.into();
        descriptor.checksum = descriptor.sum(seed, low_word(group), DESCRIPTOR_BYTES).into();
        self.descriptors.extend_from_slice(descriptor.as_bytes());
    }

    /// What is in use within a range.
    fn inside<'a>(&'a self, range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + 'a {
        let (start, end) = (range.start, range.end);
        let first = self.used.partition_point(|used| used.end <= start);
        let inside = self.used[first..].iter().take_while(move |used| used.start < end);
        inside.map(move |used| used.start.max(start)..used.end.min(end))
    }

    fn block_bitmap(&self, layout: &Layout, group: u64) -> Vec<u8> {
        let range = layout.geometry.group_range(group);
        let mut bitmap = vec![0; BLOCK_BYTES];
        for used in self.inside(&range) {
            set_bits(&mut bitmap, used.start - range.start..used.end - range.start);
        }
        // What the last group is short of counts as used.
        set_bits(&mut bitmap, range.end - range.start..GROUP_BLOCKS);
        bitmap
    }

    /// Writes a part that is no table.
    pub(crate) fn put(&self, layout: &Layout, part: Part, out: &mut Blocks<'_>) -> Result<()> {
        let tables = |group: u64| {
            let group = usize::try_from(group).unwrap_or(usize::MAX);
            &layout.geometry.tables[group]
        };
        match part {
            Part::BlockBitmap(group) => {
                out.put(tables(group).block_bitmap, &self.block_bitmap(layout, group))
            }
            Part::InodeBitmap(group) => {
                out.put(tables(group).inode_bitmap, &inode_bitmap(layout, group))
            }
            Part::Descriptors(group) => {
                let first = group * GROUP_BLOCKS;
                for (at, block) in (first + 1..).zip(self.descriptors.chunks(BLOCK_BYTES)) {
                    let mut whole = vec![0; BLOCK_BYTES];
                    whole[..block.len()].copy_from_slice(block);
                    out.put(at, &whole)?;
                }
                if group == 0 { self.put_reserved(layout, out) } else { Ok(()) }
            }
            Part::Table(_) => Ok(()),
        }
    }

    /// Writes the resize inode's blocks: each reserved block lists its own copies.
    fn put_reserved(&self, layout: &Layout, out: &mut Blocks<'_>) -> Result<()> {
        for block in reserved_run(layout) {
            let mut list = vec![0; BLOCK_BYTES];
            for (place, group) in list.chunks_exact_mut(4).zip(&self.copies) {
                place.copy_from_slice(&low_word(group * GROUP_BLOCKS + block).to_le_bytes());
            }
            out.put(block, &list)?;
        }
        Ok(())
    }

    /// The superblock and its copies.
    pub(crate) fn superblocks(&self, layout: &Layout, identity: &Identity) -> Placed {
        let superblock = superblock(layout, self.free_blocks, self.free_inodes, identity);
        let groups = std::iter::once(0).chain(self.copies.iter().copied());
        let copies = groups.map(|group| {
            let mut copy = superblock.clone();
            copy.block_group = low_half(low_word(group)).into();
            copy.checksum = copy.sum().into();
            // The first one has room for a boot sector before it; copies begin their block.
            let begin = if group == 0 { SUPERBLOCK_OFFSET } else { 0 };
            let begin = usize::try_from(begin).unwrap_or(0);
            let mut block = Box::new([0; BLOCK_BYTES]);
            block[begin..begin + 1024].copy_from_slice(copy.as_bytes());
            (group * GROUP_BLOCKS, block)
        });
        copies.collect()
    }
}

/// The resize inode's index of the blocks that are reserved for descriptors.
pub(crate) fn reserved_index(layout: &Layout) -> Vec<u8> {
    let mut index = vec![0; BLOCK_BYTES];
    for block in reserved_run(layout) {
        let slot = usize::try_from(block - 1).unwrap_or(usize::MAX) % (BLOCK_BYTES / 4);
        index[4 * slot..4 * slot + 4].copy_from_slice(&low_word(block).to_le_bytes());
    }
    index
}

/// The blocks that are reserved for descriptors.
fn reserved_run(layout: &Layout) -> Range<u64> {
    let first = 1 + layout.geometry.descriptor_blocks;
    first..first + layout.geometry.reserved_descriptors
}

/// How many blocks the resize inode owns: all reserved ones, their copies, and its index.
pub(crate) fn reserved_blocks(layout: &Layout) -> u64 {
    let copies = backup_groups(layout.geometry.groups()).len() as u64;
    1 + layout.geometry.reserved_descriptors * (1 + copies)
}

/// Inodes of a group that are in use: they are given out in order.
pub(crate) fn own_inodes(layout: &Layout, group: u64) -> u64 {
    let in_group = u64::from(layout.geometry.inodes_per_group);
    layout.used_inodes().saturating_sub(group * in_group).min(in_group)
}

fn inode_bitmap(layout: &Layout, group: u64) -> Vec<u8> {
    let mut bitmap = vec![0; BLOCK_BYTES];
    set_bits(&mut bitmap, 0..own_inodes(layout, group));
    set_bits(&mut bitmap, layout.geometry.inodes_per_group.into()..8 * BLOCK);
    bitmap
}

fn set_bits(bitmap: &mut [u8], range: Range<u64>) {
    let mut bit = range.start;
    while bit < range.end {
        let byte = usize::try_from(bit / 8).unwrap_or(usize::MAX);
        if bit.is_multiple_of(8) && bit + 8 <= range.end {
            bitmap[byte] = 0xff;
            bit += 8;
        } else {
            bitmap[byte] |= 1 << (bit % 8);
            bit += 1;
        }
    }
}

fn superblock(layout: &Layout, free: u64, free_inodes: u64, identity: &Identity) -> Superblock {
    let geometry = &layout.geometry;
    let options = &layout.options;
    let reserved = geometry.blocks / 100 * u64::from(options.reserved_percent);
    let made = low_word(layout.made.seconds.max(0).cast_unsigned());
    let mut superblock = Superblock::new_zeroed();
    let sb = &mut superblock;
    let inodes = u64::from(geometry.inodes_per_group) * geometry.groups();
    sb.inodes = low_word(inodes).into();
    sb.blocks_low = low_word(geometry.blocks).into();
    sb.blocks_high = high_word(geometry.blocks).into();
    sb.reserved_low = low_word(reserved).into();
    sb.reserved_high = high_word(reserved).into();
    sb.free_blocks_low = low_word(free).into();
    sb.free_blocks_high = high_word(free).into();
    sb.free_inodes = low_word(free_inodes).into();
    // 1024 << 2 bytes.
    sb.log_block = 2.into();
    sb.log_cluster = 2.into();
    sb.blocks_per_group = low_word(GROUP_BLOCKS).into();
    sb.clusters_per_group = low_word(GROUP_BLOCKS).into();
    sb.inodes_per_group = geometry.inodes_per_group.into();
    // Never written since it was made; e2fsck takes a later moment than its clock's for a fault.
    sb.write_time = layout.options.epoch.map_or(0, |_| made).into();
    sb.check_time = sb.write_time;
    sb.made_time = made.into();
    sb.mounts_max = u16::MAX.into();
    sb.magic = MAGIC.into();
    // Clean; go on after errors.
    sb.state = 1.into();
    sb.errors = 1.into();
    sb.revision = 1.into();
    sb.first_inode = INODE_FIRST.into();
    sb.inode_size = u16::try_from(INODE_BYTES).unwrap_or(u16::MAX).into();
    sb.compat = COMPAT.into();
    sb.incompat = INCOMPAT.into();
    sb.ro_compat = RO_COMPAT.into();
    sb.uuid = identity.uuid;
    sb.label[..options.label.len()].copy_from_slice(options.label.as_bytes());
    sb.reserved_descriptors = low_half(low_word(geometry.reserved_descriptors)).into();
    if let Some(blocks) = identity.journal_blocks {
        sb.compat = (COMPAT | compat::HAS_JOURNAL).into();
        sb.journal_inode = INODE_JOURNAL.into();
        // A copy of the journal inode's blocks, should its table be lost.
        sb.journal_backup_type = 1;
        sb.journal_blocks = blocks.map(U32::from);
    }
    sb.hash_seed = HASH_SEED.map(U32::from);
    sb.hash_version = HALF_MD4;
    sb.flags = FLAG_SIGNED.into();
    sb.descriptor_bytes = u16::try_from(DESCRIPTOR_BYTES).unwrap_or(u16::MAX).into();
    // User attributes and ACLs, as mke2fs sets them.
    sb.mount_options = 0xc.into();
    sb.extra_min = EXTRA_BYTES.into();
    sb.extra_want = EXTRA_BYTES.into();
    sb.log_flex_groups = LOG_FLEX_GROUPS;
    sb.checksum_type = 1;
    sb.checksum_seed = checksum_seed().into();
    superblock
}

/// The group of an inode.
fn inode_group(layout: &Layout, number: u32) -> usize {
    let group = (number - 1) / layout.geometry.inodes_per_group;
    usize::try_from(group).unwrap_or(usize::MAX)
}
