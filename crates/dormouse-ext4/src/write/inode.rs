//! Inodes: those of the tree, and those of the file system's own.

use zerocopy::{FromZeros, IntoBytes};

use crate::disk::inode::{
    EXTRA_BYTES, FIXED_BYTES, FLAG_EXTENTS, FLAG_INDEX, INODE_BYTES, Inode, encode_time,
    inode_seed, seal_inode,
};
use crate::disk::superblock::{high_half, high_word, low_half, low_word};
use crate::disk::{BLOCK, LINKS_MAX, TYPE_FILE, encode_device};
use crate::layout::{Layout, data_blocks, is_slow, tree_blocks};
use crate::tree::{NodeId, Time, Tree};
use crate::write::extent::extent_tree;
use crate::write::xattr::XattrPlan;

/// An inode's bytes, and the blocks of its extent tree if it does not fit.
pub(crate) struct Written {
    pub(crate) bytes: [u8; INODE_BYTES],
    pub(crate) blocks: Vec<(u64, Vec<u8>)>,
}

/// The blocks of a node's extent tree, if that does not fit into its inode.
pub(crate) fn extent_blocks(
    tree: &Tree,
    layout: &Layout,
    node: NodeId,
    seed: u32,
) -> Vec<(u64, Vec<u8>)> {
    let Some(start) = layout.tree_start(node) else { return Vec::new() };
    let extents: Vec<_> = layout.extents(tree, node).collect();
    let own_seed = inode_seed(seed, layout.number(node), 0);
    extent_tree(&extents, &layout.space, Some(start), own_seed).1
}

/// The inode of a node of the tree.
pub(crate) fn inode(
    tree: &Tree,
    layout: &Layout,
    node: NodeId,
    subfolders: u32,
    seed: u32,
) -> [u8; INODE_BYTES] {
    let found = &tree.node(node);
    let own_seed = inode_seed(seed, layout.number(node), 0);
    let mut inode = Inode::new_zeroed();
    let mut content = 0;
    inode.mode = found.mode.into();
    set_owner(&mut inode, found.uid, found.gid);
    set_times(&mut inode, found.mtime());
    inode.links = low_half(found.links).into();
    if found.is_symlink() && !is_slow(tree, node) {
        let target = tree.target(node);
        inode.block[..target.len()].copy_from_slice(target);
        set_size(&mut inode, found.size);
    } else if found.is_folder() || found.is_file() || found.is_symlink() {
        let extents: Vec<_> = layout.extents(tree, node).collect();
        let tree_start = layout.tree_start(node);
        inode.block = extent_tree(&extents, &layout.space, tree_start, own_seed).0;
        let mut flags = FLAG_EXTENTS;
        content = tree_blocks(extents.len() as u64);
        if found.is_folder() {
            let count = layout.folder_blocks(node);
            content += count;
            set_size(&mut inode, count * BLOCK);
            // A name in its parent, its own dot, and the dots of the folders below. Above the
            // limit, 1 says that nobody counts (`dir_nlink`).
            let links = 2 + subfolders;
            inode.links = if links >= LINKS_MAX { 1 } else { low_half(links) }.into();
            if is_indexed(tree, layout, node) {
                flags |= FLAG_INDEX;
            }
        } else {
            content += if found.is_file() && layout.start(node) != 0 {
                data_blocks(tree, node)
            } else {
                u64::from(found.is_symlink())
            };
            set_size(&mut inode, found.size);
        }
        inode.flags = flags.into();
    } else {
        let device = encode_device(high_word(found.size), low_word(found.size));
        for (place, word) in inode.block.chunks_exact_mut(4).zip(device) {
            place.copy_from_slice(&word.to_le_bytes());
        }
    }
    if let Some(&block) = layout.xattr_blocks.get(&node) {
        inode.xattr_block_low = low_word(block).into();
        inode.xattr_block_high = low_half(high_word(block)).into();
        content += 1;
    }
    set_sectors(&mut inode, content);
    let mut bytes = sealed_room(&inode);
    XattrPlan::of(tree.xattrs(node)).put_in_inode(&mut bytes);
    seal_inode(own_seed, &mut bytes);
    bytes
}

/// Only `lost+found` has more than one block without an index.
fn is_indexed(tree: &Tree, layout: &Layout, node: NodeId) -> bool {
    layout.folder_blocks(node) > 1 && !tree.fits_one_block(node)
}

impl Tree {
    /// Whether a folder's entries fit into one block.
    pub(crate) fn fits_one_block(&self, folder: NodeId) -> bool {
        use crate::layout::folder::{LEAF_BYTES, entry_bytes};
        let bytes: usize = self.entries(folder).map(|entry| entry_bytes(entry.name.len())).sum();
        24 + bytes <= LEAF_BYTES
    }
}

/// The journal's inode.
pub(crate) fn journal(layout: &Layout, number: u32, seed: u32) -> Option<Written> {
    let (start, count, tree_start) = layout.journal?;
    let own_seed = inode_seed(seed, number, 0);
    let data = std::iter::once(0..count);
    let extents: Vec<_> = crate::layout::extents_in(&layout.space, start, data).collect();
    let in_tree = tree_blocks(extents.len() as u64);
    let tree_start = (in_tree > 0).then_some(tree_start);
    let mut inode = own_file(layout.made);
    let (block, blocks) = extent_tree(&extents, &layout.space, tree_start, own_seed);
    inode.block = block;
    inode.flags = FLAG_EXTENTS.into();
    set_size(&mut inode, count * BLOCK);
    set_sectors(&mut inode, count + in_tree);
    let mut bytes = sealed_room(&inode);
    seal_inode(own_seed, &mut bytes);
    Some(Written { bytes, blocks })
}

/// The inode that owns the blocks that descriptors grow into, through one double indirect block.
pub(crate) fn resize(layout: &Layout, number: u32, owned: u64, seed: u32) -> [u8; INODE_BYTES] {
    let mut inode = own_file(layout.made);
    let in_block = BLOCK / 4;
    set_size(&mut inode, (12 + in_block + in_block * in_block) * BLOCK);
    set_sectors(&mut inode, owned);
    inode.block[13 * 4..14 * 4].copy_from_slice(&low_word(layout.resize_block).to_le_bytes());
    let mut bytes = sealed_room(&inode);
    seal_inode(inode_seed(seed, number, 0), &mut bytes);
    bytes
}

fn own_file(made: Time) -> Inode {
    let mut inode = Inode::new_zeroed();
    inode.mode = (TYPE_FILE | 0o600).into();
    inode.links = 1.into();
    set_times(&mut inode, made);
    inode
}

fn sealed_room(inode: &Inode) -> [u8; INODE_BYTES] {
    let mut bytes = [0; INODE_BYTES];
    bytes[..FIXED_BYTES].copy_from_slice(inode.as_bytes());
    bytes
}

fn set_owner(inode: &mut Inode, uid: u32, gid: u32) {
    inode.uid_low = low_half(uid).into();
    inode.uid_high = high_half(uid).into();
    inode.gid_low = low_half(gid).into();
    inode.gid_high = high_half(gid).into();
}

/// All four times are that of the content: the others are no part of a tree.
fn set_times(inode: &mut Inode, mtime: Time) {
    inode.extra_bytes = EXTRA_BYTES.into();
    let (low, extra) = encode_time(mtime.seconds, mtime.nanoseconds);
    for field in [&mut inode.atime, &mut inode.ctime, &mut inode.mtime, &mut inode.crtime] {
        *field = low.into();
    }
    let extras = [
        &mut inode.atime_extra,
        &mut inode.ctime_extra,
        &mut inode.mtime_extra,
        &mut inode.crtime_extra,
    ];
    for field in extras {
        *field = extra.into();
    }
}

fn set_size(inode: &mut Inode, bytes: u64) {
    inode.size_low = low_word(bytes).into();
    inode.size_high = high_word(bytes).into();
}

/// Blocks are counted in sectors of 512 bytes, with 48 bits: enough for files of 16 TiB.
fn set_sectors(inode: &mut Inode, blocks: u64) {
    let sectors = blocks * (BLOCK / 512);
    inode.sectors_low = low_word(sectors).into();
    inode.sectors_high = low_half(high_word(sectors)).into();
}
