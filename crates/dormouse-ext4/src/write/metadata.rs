//! Everything of an image but the contents of files, in the order of its blocks.
//!
//! ```text
//!  copies, bitmaps, inode tables ─┐ each as soon as what
//!                                 ├──► follows lies behind it ──► a sink
//!  journal, folders, symlinks, ───┘
//!  attributes, extent trees
//! ```
//!
//! So whoever takes it need not go back. What a block tells of later ones is counted before the first
//! is written; only superblocks come last, as they hold a hash of all others.

use std::fmt;
use std::iter::Peekable;
use std::vec::IntoIter;

use sha2::{Digest, Sha256};
use zerocopy::{FromZeros, IntoBytes};

use crate::disk::inode::inode_seed;
use crate::disk::journal::{BlockHeader, JOURNAL_MAGIC, JournalSuperblock, KIND_SUPERBLOCK};
use crate::disk::superblock::low_word;
use crate::disk::{BLOCK_BYTES, INODE_JOURNAL};
use crate::error::{Error, Result};
use crate::layout::folder::FolderPlan;
use crate::layout::{Layout, Uuid, is_slow};
use crate::sink::Sink;
use crate::tree::{NodeId, Tree};
use crate::write::blocks::Blocks;
use crate::write::group::{Groups, Identity, Part, checksum_seed, reserved_index};
use crate::write::table::{Table, journal_inode};
use crate::write::xattr::XattrPlan;
use crate::write::{Report, Watch, folder, inode, table};

/// Blocks, with their places.
pub(crate) type Placed = Vec<(u64, Box<[u8; BLOCK_BYTES]>)>;

/// What was written, and what is left to be.
#[derive(Debug)]
pub(crate) struct Metadata {
    pub(crate) report: Report,

    /// The superblock and its copies, in ascending order.
    pub(crate) superblocks: Placed,
}

/// Writes all metadata but the superblocks.
pub(crate) fn metadata(
    tree: &Tree,
    layout: &Layout,
    sink: &mut dyn Sink,
    watch: &dyn Watch,
) -> Result<Metadata> {
    let mut groups = Groups::count(tree, layout);
    let parts = std::mem::take(&mut groups.parts).into_iter().peekable();
    let mut identity = Sha256::new();
    identity.update(layout.size_bytes().to_le_bytes());
    identity.update(layout.options.label.as_bytes());
    let out = Blocks::new(sink);
    let mut walk =
        Walk { tree, layout, watch, seed: checksum_seed(), out, identity, groups, parts };
    walk.journal()?;
    walk.put(layout.resize_block, &reserved_index(layout))?;
    for &node in &layout.order {
        walk.node(node)?;
    }
    for &node in &layout.order {
        if tree.node(node).is_file() {
            walk.extent_tree(node)?;
        }
    }
    walk.finish()
}

struct Walk<'a> {
    tree: &'a Tree,
    layout: &'a Layout,
    watch: &'a dyn Watch,
    seed: u32,
    out: Blocks<'a>,
    identity: Sha256,
    groups: Groups,
    /// What lies at fixed places, and is still to come.
    parts: Peekable<IntoIter<(u64, Part)>>,
}

impl fmt::Debug for Walk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walk").field("out", &self.out).finish_non_exhaustive()
    }
}

impl Walk<'_> {
    /// Writes blocks from `block` on, after all that lies at fixed places before.
    fn put(&mut self, block: u64, bytes: &[u8]) -> Result<()> {
        while let Some((_, part)) = self.parts.next_if(|(at, _)| *at < block) {
            self.part(part)?;
        }
        self.out.put(block, bytes)
    }

    fn part(&mut self, part: Part) -> Result<()> {
        if self.watch.is_cancelled() {
            return Err(Error::cancelled());
        }
        let Part::Table(group) = part else {
            return self.groups.put(self.layout, part, &mut self.out);
        };
        let mut table = Table::of(self.tree, self.layout, group, self.seed);
        while let Some((block, bytes)) = table.next_block(self.watch) {
            self.out.put(block, &bytes[..])?;
        }
        Ok(())
    }

    fn journal(&mut self) -> Result<()> {
        let layout = self.layout;
        let (Some((start, blocks, _)), Some(journal)) =
            (layout.journal, inode::journal(layout, INODE_JOURNAL, self.seed))
        else {
            return Ok(());
        };
        let mut block = vec![0; BLOCK_BYTES];
        block[..1024].copy_from_slice(journal_superblock(blocks).as_bytes());
        self.put(start, &block)?;
        self.all(&journal.blocks)
    }

    /// What lies in the run of metadata for a node.
    fn node(&mut self, node: NodeId) -> Result<()> {
        if self.watch.is_cancelled() {
            return Err(Error::cancelled());
        }
        let (tree, layout) = (self.tree, self.layout);
        let found = tree.node(node);
        if found.is_folder() {
            let own_seed = inode_seed(self.seed, layout.number(node), 0);
            let plan = FolderPlan::of(tree, node)?;
            let bytes = folder::folder(tree, layout, node, &plan, own_seed);
            drop(plan);
            self.identity.update(&bytes);
            self.content(node, &bytes)?;
            self.extent_tree(node)?;
        } else if found.is_symlink() && is_slow(tree, node) {
            let mut block = vec![0; BLOCK_BYTES];
            let target = tree.target(node);
            block[..target.len()].copy_from_slice(target);
            self.identity.update(&block);
            self.content(node, &block)?;
        }
        if let Some(&block) = layout.xattr_blocks.get(&node) {
            let bytes = XattrPlan::of(tree.xattrs(node)).block(self.seed, block);
            self.identity.update(&bytes);
            self.put(block, &bytes)?;
        }
        if layout.options.uuid == Uuid::Derived {
            // Made once more in its table, which may lie far behind: the order of what is hashed is
            // that of the tree, and no matter of where things lie.
            self.identity.update(table::of_tree(tree, layout, node, self.seed));
        }
        Ok(())
    }

    fn content(&mut self, node: NodeId, bytes: &[u8]) -> Result<()> {
        let (tree, layout) = (self.tree, self.layout);
        for extent in layout.extents(tree, node) {
            let from = usize::try_from(extent.logical).unwrap_or(usize::MAX) * BLOCK_BYTES;
            let len = usize::from(extent.blocks) * BLOCK_BYTES;
            self.put(extent.start, &bytes[from..from + len])?;
        }
        Ok(())
    }

    /// The extent tree of a node whose inode has no room for it.
    fn extent_tree(&mut self, node: NodeId) -> Result<()> {
        let blocks = inode::extent_blocks(self.tree, self.layout, node, self.seed);
        self.all(&blocks)
    }

    fn all(&mut self, blocks: &[(u64, Vec<u8>)]) -> Result<()> {
        blocks.iter().try_for_each(|(block, bytes)| self.put(*block, bytes))
    }

    fn finish(mut self) -> Result<Metadata> {
        while let Some((_, part)) = self.parts.next() {
            self.part(part)?;
        }
        self.out.flush()?;
        let Walk { tree, layout, out, identity, groups, seed, .. } = self;
        let uuid = match layout.options.uuid {
            Uuid::Given(uuid) => uuid,
            Uuid::Derived => derived(&identity.finalize()),
        };
        let journal_blocks = journal_inode(layout, seed);
        let superblocks = groups.superblocks(layout, &Identity { uuid, journal_blocks });
        let report = Report {
            size_bytes: layout.size_bytes(),
            entries: tree.len(),
            copied_bytes: 0,
            shared_bytes: 0,
            metadata_bytes: out.written() + (superblocks.len() * BLOCK_BYTES) as u64,
            uuid,
        };
        Ok(Metadata { report, superblocks })
    }
}

/// A UUID of version 8, whose bits mean what who made them says (RFC 9562).
fn derived(hash: &[u8]) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&hash[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// An empty journal: nothing but its first block is ever read of it.
fn journal_superblock(blocks: u64) -> JournalSuperblock {
    let mut superblock = JournalSuperblock::new_zeroed();
    superblock.header = BlockHeader {
        magic: JOURNAL_MAGIC.into(),
        kind: KIND_SUPERBLOCK.into(),
        sequence: 0.into(),
    };
    superblock.block_bytes = low_word(BLOCK_BYTES as u64).into();
    superblock.blocks = low_word(blocks).into();
    superblock.first = 1.into();
    superblock.sequence = 1.into();
    superblock.users = 1.into();
    superblock
}
