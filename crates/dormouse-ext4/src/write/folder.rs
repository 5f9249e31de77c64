//! Folders' blocks: entries in one block, or leaves below a hash index.

use crate::crc32c::crc32c;
use crate::disk::hash::HALF_MD4;
use crate::disk::superblock::{low_half, low_word};
use crate::disk::{BLOCK_BYTES, entry_type};
use crate::layout::Layout;
use crate::layout::folder::{
    ENTRY_BYTES, FolderPlan, LEAF_BYTES, NODE_ENTRIES, NODE_INDEX_AT, ROOT_ENTRIES, ROOT_INDEX_AT,
    TAIL_BYTES, entry_bytes,
};
use crate::tree::{NodeId, Tree};

/// What the checksum at the end of a block of entries looks like to those who do not know it:
/// an entry without a name, of this type.
const TAIL_TYPE: u8 = 0xde;

/// Bytes about the index in its root.
const INDEX_INFO_BYTES: u8 = 8;

/// A folder's blocks, in order.
pub(crate) fn folder(
    tree: &Tree,
    layout: &Layout,
    node: NodeId,
    plan: &FolderPlan<'_>,
    inode_seed: u32,
) -> Vec<u8> {
    let count = usize::try_from(layout.folder_blocks(node)).unwrap_or(usize::MAX);
    let mut blocks = vec![0; count * BLOCK_BYTES];
    let dots = [
        (&b"."[..], layout.number(node), entry_type(tree.node(node).mode)),
        (b"..", layout.number(tree.parent(node)), entry_type(tree.node(node).mode)),
    ];
    let of_entry = |entry: &crate::tree::Entry<'_>| {
        (layout.number(entry.node), entry_type(tree.node(entry.node).mode))
    };
    match plan {
        FolderPlan::Linear(entries) => {
            let entries = entries.iter().map(|entry| {
                let (number, kind) = of_entry(entry);
                (entry.name, number, kind)
            });
            put_leaf(&mut blocks[..BLOCK_BYTES], inode_seed, dots.into_iter().chain(entries));
            for empty in blocks[BLOCK_BYTES..].chunks_exact_mut(BLOCK_BYTES) {
                put_leaf(empty, inode_seed, std::iter::empty());
            }
        }
        FolderPlan::Indexed { entries, leaves, inner_nodes } => {
            let first_leaf = 1 + inner_nodes;
            let mut index: Vec<(u32, u32)> = Vec::with_capacity(leaves.len());
            for (at, leaf) in leaves.iter().enumerate() {
                index.push((leaf.hash, low_word((first_leaf + at) as u64)));
                let block = &mut blocks[(first_leaf + at) * BLOCK_BYTES..][..BLOCK_BYTES];
                let entries = entries[leaf.entries.clone()].iter().map(|(_, entry)| {
                    let (number, kind) = of_entry(entry);
                    (entry.name, number, kind)
                });
                put_leaf(block, inode_seed, entries);
            }
            let (root, nodes) = blocks.split_at_mut(BLOCK_BYTES);
            put_root(root, dots, u8::from(*inner_nodes > 0));
            if *inner_nodes == 0 {
                put_index(root, ROOT_INDEX_AT, ROOT_ENTRIES, &index, inode_seed);
            } else {
                let mut above = Vec::with_capacity(*inner_nodes);
                let nodes = nodes.chunks_exact_mut(BLOCK_BYTES);
                for (at, (node, below)) in nodes.zip(index.chunks(NODE_ENTRIES)).enumerate() {
                    above.push((below[0].0, low_word(1 + at as u64)));
                    // An entry without a name over the whole block.
                    node[4..6].copy_from_slice(&block_length());
                    put_index(node, NODE_INDEX_AT, NODE_ENTRIES, below, inode_seed);
                }
                put_index(root, ROOT_INDEX_AT, ROOT_ENTRIES, &above, inode_seed);
            }
        }
    }
    blocks
}

fn block_length() -> [u8; 2] {
    low_half(low_word(BLOCK_BYTES as u64)).to_le_bytes()
}

fn put_root(block: &mut [u8], dots: [(&[u8], u32, u8); 2], levels: u8) {
    let mut at = 0;
    for ((name, number, kind), len) in dots.into_iter().zip([12, BLOCK_BYTES - 12]) {
        put_entry(&mut block[at..], name, number, kind, len);
        at += 12;
    }
    block[28] = HALF_MD4;
    block[29] = INDEX_INFO_BYTES;
    block[30] = levels;
}

fn put_index(block: &mut [u8], at: usize, most: usize, index: &[(u32, u32)], inode_seed: u32) {
    for ((hash, below), place) in index.iter().zip(block[at..].chunks_exact_mut(8)) {
        place[..4].copy_from_slice(&hash.to_le_bytes());
        place[4..].copy_from_slice(&below.to_le_bytes());
    }
    // The first entry stands for all hashes from zero on; its hash's place has the counts.
    let small = |number: usize| u16::try_from(number).unwrap_or(u16::MAX).to_le_bytes();
    block[at..at + 2].copy_from_slice(&small(most));
    block[at + 2..at + 4].copy_from_slice(&small(index.len()));
    let sum = crc32c(inode_seed, &block[..at + 8 * index.len()]);
    let tail = at + 8 * most;
    // The tail's first word and, in place of the sum, zero.
    let sum = crc32c(sum, &[0; 8]);
    block[tail + 4..tail + 8].copy_from_slice(&sum.to_le_bytes());
}

fn put_leaf<'a>(
    block: &mut [u8],
    inode_seed: u32,
    entries: impl Iterator<Item = (&'a [u8], u32, u8)>,
) {
    let (mut at, mut last) = (0, 0);
    for (name, number, kind) in entries {
        let len = entry_bytes(name.len());
        put_entry(&mut block[at..], name, number, kind, len);
        last = at;
        at += len;
    }
    // The last entry, or one without a name, takes what is left.
    let rest = u16::try_from(LEAF_BYTES - last).unwrap_or(u16::MAX);
    block[last + 4..last + 6].copy_from_slice(&rest.to_le_bytes());
    let (content, tail) = block.split_at_mut(LEAF_BYTES);
    tail[4] = 12;
    tail[7] = TAIL_TYPE;
    tail[8..TAIL_BYTES].copy_from_slice(&crc32c(inode_seed, content).to_le_bytes());
}

fn put_entry(place: &mut [u8], name: &[u8], number: u32, kind: u8, len: usize) {
    place[..4].copy_from_slice(&number.to_le_bytes());
    place[4..6].copy_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_le_bytes());
    place[6] = u8::try_from(name.len()).unwrap_or(u8::MAX);
    place[7] = kind;
    place[ENTRY_BYTES..ENTRY_BYTES + name.len()].copy_from_slice(name);
}
