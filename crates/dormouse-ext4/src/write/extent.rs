//! Extent trees: up to four extents in the inode, more in blocks below it.

use crate::crc32c::crc32c;
use crate::disk::BLOCK_BYTES;
use crate::disk::inode::EXTENT_MAGIC;
use crate::disk::superblock::{high_word, low_half, low_word};
use crate::layout::space::Space;
use crate::layout::{EXTENTS_IN_BLOCK, EXTENTS_IN_INODE, Extent, tree_blocks};

/// An entry of an inner node.
#[derive(Clone, Copy)]
struct Below {
    logical: u32,
    block: u64,
}

/// The 60 bytes for the inode, and the blocks of the tree in the order of their places from
/// `start` on: the leaves first.
pub(crate) fn extent_tree(
    extents: &[Extent],
    space: &Space,
    start: Option<u64>,
    inode_seed: u32,
) -> ([u8; 60], Vec<(u64, Vec<u8>)>) {
    let mut root = [0; 60];
    let Some(start) = start else {
        node(&mut root, EXTENTS_IN_INODE, 0, extents.iter().map(leaf_entry));
        return (root, Vec::new());
    };
    let count = tree_blocks(extents.len() as u64);
    let mut places = space.runs(start, count).flatten();
    let mut blocks = Vec::new();
    let mut add = |below: &mut Vec<Below>, logical: u32, mut bytes: Vec<u8>| {
        let at = bytes.len() - 4;
        let sum = crc32c(inode_seed, &bytes[..at]);
        bytes[at..].copy_from_slice(&sum.to_le_bytes());
        let block = places.next().expect("the layout counted the tree's blocks");
        below.push(Below { logical, block });
        blocks.push((block, bytes));
    };
    let per_block = usize::try_from(EXTENTS_IN_BLOCK).unwrap_or(usize::MAX);
    let mut level = Vec::new();
    for chunk in extents.chunks(per_block) {
        let mut bytes = vec![0; BLOCK_BYTES];
        node(&mut bytes, EXTENTS_IN_BLOCK, 0, chunk.iter().map(leaf_entry));
        add(&mut level, chunk[0].logical, bytes);
    }
    let mut depth = 1;
    while level.len() as u64 > EXTENTS_IN_INODE {
        let below = std::mem::take(&mut level);
        for chunk in below.chunks(per_block) {
            let mut bytes = vec![0; BLOCK_BYTES];
            node(&mut bytes, EXTENTS_IN_BLOCK, depth, chunk.iter().map(index_entry));
            add(&mut level, chunk[0].logical, bytes);
        }
        depth += 1;
    }
    node(&mut root, EXTENTS_IN_INODE, depth, level.iter().map(index_entry));
    (root, blocks)
}

fn node(bytes: &mut [u8], most: u64, depth: u16, entries: impl Iterator<Item = [u8; 12]>) {
    let mut count = 0u16;
    for (entry, place) in entries.zip(bytes[12..].chunks_exact_mut(12)) {
        place.copy_from_slice(&entry);
        count += 1;
    }
    let most = low_half(low_word(most));
    for (at, field) in [EXTENT_MAGIC, count, most, depth].into_iter().enumerate() {
        bytes[2 * at..2 * at + 2].copy_from_slice(&field.to_le_bytes());
    }
}

fn leaf_entry(extent: &Extent) -> [u8; 12] {
    let mut entry = [0; 12];
    entry[..4].copy_from_slice(&extent.logical.to_le_bytes());
    entry[4..6].copy_from_slice(&extent.blocks.to_le_bytes());
    entry[6..8].copy_from_slice(&low_half(high_word(extent.start)).to_le_bytes());
    entry[8..].copy_from_slice(&low_word(extent.start).to_le_bytes());
    entry
}

fn index_entry(below: &Below) -> [u8; 12] {
    let mut entry = [0; 12];
    entry[..4].copy_from_slice(&below.logical.to_le_bytes());
    entry[4..8].copy_from_slice(&low_word(below.block).to_le_bytes());
    entry[8..10].copy_from_slice(&low_half(high_word(below.block)).to_le_bytes());
    entry
}
