//! Bitmaps, group descriptors, the superblock and their copies.

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
use crate::layout::geometry::{INODES_PER_BLOCK, LOG_FLEX_GROUPS};
use crate::write::blocks::Blocks;

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

/// Writes bitmaps, descriptors and superblocks. `folders` are counts by group.
pub(crate) fn groups(
    out: &mut Blocks<'_>,
    layout: &Layout,
    folders: &[u32],
    identity: &Identity,
) -> Result<()> {
    let geometry = &layout.geometry;
    let seed = checksum_seed();
    let used = layout.used_ranges();
    let mut descriptors = Vec::with_capacity(folders.len() * DESCRIPTOR_BYTES);
    let (mut free_blocks, mut free_inodes) = (0, 0);
    let mut used_inodes = layout.used_inodes();
    let last = geometry.groups() - 1;
    let mut at = 0;
    for (group, (tables, &folders)) in (0..).zip(geometry.tables.iter().zip(folders)) {
        let range = geometry.group_range(group);
        at += used[at..].iter().take_while(|used| used.end <= range.start).count();
        let inside = used[at..].iter().take_while(|used| used.start < range.end);
        let inside: Vec<Range<u64>> =
            inside.map(|u| u.start.max(range.start)..u.end.min(range.end)).collect();
        let used_blocks: u64 = inside.iter().map(|used| used.end - used.start).sum();
        let own_blocks = if has_superblock(group) { geometry.first_block } else { 0 };
        let own_inodes = used_inodes.min(geometry.inodes_per_group.into());
        used_inodes -= own_inodes;

        let mut descriptor = Descriptor::new_zeroed();
        let mut flags = INODE_ZEROED;
        if used_blocks == own_blocks && group != last {
            flags |= BLOCK_UNINIT;
        } else {
            let bitmap = block_bitmap(&range, &inside);
            let sum = crc32c(seed, &bitmap);
            descriptor.block_bitmap_sum_low = low_half(sum).into();
            descriptor.block_bitmap_sum_high = high_half(sum).into();
            out.put(tables.block_bitmap, &bitmap)?;
        }
        if own_inodes == 0 {
            flags |= INODE_UNINIT;
        } else {
            let bitmap = inode_bitmap(own_inodes, geometry.inodes_per_group.into());
            let bytes = usize::try_from(geometry.inodes_per_group / 8).unwrap_or(usize::MAX);
            let sum = crc32c(seed, &bitmap[..bytes]);
            descriptor.inode_bitmap_sum_low = low_half(sum).into();
            descriptor.inode_bitmap_sum_high = high_half(sum).into();
            out.put(tables.inode_bitmap, &bitmap)?;
        }
        let group_free = (range.end - range.start) - used_blocks;
        let group_free_inodes = u64::from(geometry.inodes_per_group) - own_inodes;
        free_blocks += group_free;
        free_inodes += group_free_inodes;
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
        descriptors.extend_from_slice(descriptor.as_bytes());
    }

    let superblock = superblock(layout, free_blocks, free_inodes, identity);
    let copies = backup_groups(geometry.groups());
    for group in std::iter::once(0).chain(copies.iter().copied()) {
        let mut copy = superblock.clone();
        copy.block_group = low_half(low_word(group)).into();
        copy.checksum = copy.sum().into();
        // The first one has room for a boot sector before it; copies begin their block.
        let begin = if group == 0 { usize::try_from(SUPERBLOCK_OFFSET).unwrap_or(0) } else { 0 };
        let mut block = vec![0; BLOCK_BYTES];
        block[begin..begin + 1024].copy_from_slice(copy.as_bytes());
        let first = group * GROUP_BLOCKS;
        out.put(first, &block)?;
        for (at, block) in (first + 1..).zip(descriptors.chunks(BLOCK_BYTES)) {
            let mut whole = vec![0; BLOCK_BYTES];
            whole[..block.len()].copy_from_slice(block);
            out.put(at, &whole)?;
        }
    }
    reserved(out, layout, &copies)
}

/// How many blocks the resize inode owns: all reserved ones, their copies, and its index.
pub(crate) fn reserved_blocks(layout: &Layout) -> u64 {
    let copies = backup_groups(layout.geometry.groups()).len() as u64;
    1 + layout.geometry.reserved_descriptors * (1 + copies)
}

/// Writes the resize inode's blocks: each reserved block lists its own copies.
fn reserved(out: &mut Blocks<'_>, layout: &Layout, copies: &[u64]) -> Result<()> {
    let geometry = &layout.geometry;
    let words_in_block = BLOCK_BYTES / 4;
    let mut index = vec![0; BLOCK_BYTES];
    for number in 0..geometry.reserved_descriptors {
        let at = geometry.descriptor_blocks + number;
        let block = 1 + at;
        let slot = usize::try_from(at).unwrap_or(usize::MAX) % words_in_block;
        index[4 * slot..4 * slot + 4].copy_from_slice(&low_word(block).to_le_bytes());
        let mut list = vec![0; BLOCK_BYTES];
        for (place, group) in list.chunks_exact_mut(4).zip(copies) {
            place.copy_from_slice(&low_word(group * GROUP_BLOCKS + block).to_le_bytes());
        }
        out.put(block, &list)?;
    }
    out.put(layout.resize_block, &index)
}

fn block_bitmap(group: &Range<u64>, used: &[Range<u64>]) -> Vec<u8> {
    let mut bitmap = vec![0; BLOCK_BYTES];
    for range in used {
        set_bits(&mut bitmap, range.start - group.start..range.end - group.start);
    }
    // What the last group is short of counts as used.
    set_bits(&mut bitmap, group.end - group.start..GROUP_BLOCKS);
    bitmap
}

fn inode_bitmap(used: u64, in_group: u64) -> Vec<u8> {
    let mut bitmap = vec![0; BLOCK_BYTES];
    set_bits(&mut bitmap, 0..used);
    set_bits(&mut bitmap, in_group..8 * BLOCK);
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

/// The group of an inode, and its place in the image.
pub(crate) fn inode_place(layout: &Layout, number: u32) -> (usize, u64, usize) {
    let index = number - 1;
    let group = index / layout.geometry.inodes_per_group;
    let within = index % layout.geometry.inodes_per_group;
    let group = usize::try_from(group).unwrap_or(usize::MAX);
    let block = layout.geometry.tables[group].inode_table + u64::from(within / INODES_PER_BLOCK);
    let slot = usize::try_from(within % INODES_PER_BLOCK).unwrap_or(usize::MAX);
    (group, block, slot * INODE_BYTES)
}
