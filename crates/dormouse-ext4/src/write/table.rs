//! Inode tables, block after block.

use crate::disk::inode::INODE_BYTES;
use crate::disk::{BLOCK_BYTES, INODE_FIRST, INODE_JOURNAL, INODE_RESIZE, INODE_ROOT};
use crate::layout::geometry::INODES_PER_BLOCK;
use crate::layout::{Layout, number_at};
use crate::tree::{NodeId, Tree};
use crate::write::group::{own_inodes, reserved_blocks};
use crate::write::{Watch, inode};

/// The used blocks of one group's table.
#[derive(Debug)]
pub(crate) struct Table<'a> {
    tree: &'a Tree,
    layout: &'a Layout,
    seed: u32,
    block: u64,
    /// The next inode's number, and behind the last one's.
    number: u64,
    end: u64,
}

impl<'a> Table<'a> {
    pub(crate) fn of(tree: &'a Tree, layout: &'a Layout, group: u64, seed: u32) -> Table<'a> {
        let index = usize::try_from(group).unwrap_or(usize::MAX);
        let number = 1 + group * u64::from(layout.geometry.inodes_per_group);
        let end = number + own_inodes(layout, group);
        let block = layout.geometry.tables[index].inode_table;
        Table { tree, layout, seed, block, number, end }
    }

    /// The next block and its place.
    pub(crate) fn next_block(
        &mut self,
        watch: &dyn Watch,
    ) -> Option<(u64, Box<[u8; BLOCK_BYTES]>)> {
        if self.number >= self.end {
            return None;
        }
        let mut block = Box::new([0; BLOCK_BYTES]);
        let mut other = 0;
        let places = block.chunks_exact_mut(INODE_BYTES).take(INODES_PER_BLOCK as usize);
        for (place, number) in places.zip(self.number..self.end) {
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            match node(self.layout, number) {
                Some(node) => {
                    place.copy_from_slice(&of_tree(self.tree, self.layout, node, self.seed));
                    other += u64::from(!self.tree.node(node).is_file());
                }
                None => self.own(number, place),
            }
        }
        // Files were told when their contents were.
        watch.entries(other);
        let at = self.block;
        self.block += 1;
        self.number += u64::from(INODES_PER_BLOCK);
        Some((at, block))
    }

    /// An inode of the file system's own.
    fn own(&self, number: u32, place: &mut [u8]) {
        if number == INODE_RESIZE {
            let owned = reserved_blocks(self.layout);
            place.copy_from_slice(&inode::resize(self.layout, number, owned, self.seed));
        } else if number == INODE_JOURNAL
            && let Some(journal) = inode::journal(self.layout, number, self.seed)
        {
            place.copy_from_slice(&journal.bytes);
        }
    }
}

/// The inode of a node.
pub(crate) fn of_tree(tree: &Tree, layout: &Layout, node: NodeId, seed: u32) -> [u8; INODE_BYTES] {
    let subfolders = if tree.node(node).is_folder() {
        tree.entries(node).filter(|entry| tree.node(entry.node).is_folder()).count()
    } else {
        0
    };
    let subfolders = u32::try_from(subfolders).unwrap_or(u32::MAX - 2);
    inode::inode(tree, layout, node, subfolders, seed)
}

/// The tree's inode of a number.
fn node(layout: &Layout, number: u32) -> Option<NodeId> {
    let index = match number {
        INODE_ROOT => 0,
        INODE_FIRST.. => usize::try_from(number - INODE_FIRST).unwrap_or(usize::MAX) + 1,
        _ => return None,
    };
    debug_assert_eq!(number_at(index), number, "numbers follow from the order");
    layout.order.get(index).copied()
}

/// What the superblock repeats of the journal's inode: its 15 words of blocks, and its length.
pub(crate) fn journal_inode(layout: &Layout, seed: u32) -> Option<[u32; 17]> {
    let journal = inode::journal(layout, INODE_JOURNAL, seed)?;
    let word = |at: usize| {
        let bytes = &journal.bytes[at..at + 4];
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    };
    let mut words = [0; 17];
    for (index, place) in words[..15].iter_mut().enumerate() {
        *place = word(0x28 + 4 * index);
    }
    words[15] = word(0x6c);
    words[16] = word(0x4);
    Some(words)
}
