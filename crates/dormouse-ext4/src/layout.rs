//! The plan of an image: its size, its groups, and where everything lies.
//!
//! ```text
//!  block 0       1 + area           flex front                           end
//!  │superblock   │ staged contents │ bitmaps, │ journal, folders, │ contents │ free …
//!  │descriptors  │ (of streams)    │ tables   │ long symlinks     │          │
//! ```
//!
//! Blocks are given out in ascending order by one cursor that skips what is fixed: the copies of
//! superblock and descriptors, and the tables at the front of each flex group of 16 groups. So a
//! file's blocks follow from its first one. The copies' places do not depend on the image's size,
//! because the area for descriptors is as large in small images as in those of 50 GiB; contents can
//! be staged before the size is known.

pub(crate) mod folder;
pub(crate) mod geometry;
pub(crate) mod options;
pub(crate) mod space;

use std::collections::HashMap;
use std::ops::Range;

use crate::disk::{
    BLOCK, BLOCK_BYTES, FAST_SYMLINK_BYTES, INODE_FIRST, INODE_ROOT, SYMLINK_BYTES_MAX,
};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::folder::FolderPlan;
use crate::layout::geometry::Geometry;
use crate::layout::space::{Cursor, Space};
use crate::stage::Staged;
use crate::tree::content::FileId;
use crate::tree::{Attributes, Kind, NodeId, ROOT, Time, Tree};
use crate::write::xattr::XattrPlan;

pub use options::{Journal, Options, Size, Uuid};

/// Blocks of `lost+found`, so that a repair need not allocate any.
const LOST_FOUND_BLOCKS: u64 = 4;

/// The longest extent.
pub(crate) const EXTENT_BLOCKS_MAX: u64 = 32_768;

/// Extents that fit into an inode.
pub(crate) const EXTENTS_IN_INODE: u64 = 4;

/// Extents, or nodes below, in a block of an extent tree.
pub(crate) const EXTENTS_IN_BLOCK: u64 = (BLOCK - 12) / 12;

/// A file's blocks are counted with 32 bits.
const FILE_BLOCKS_MAX: u64 = u32::MAX as u64;

/// The name of the folder for what a repair finds.
pub(crate) const LOST_FOUND: &[u8] = b"lost+found";

/// A run of a file's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) logical: u32,
    pub(crate) blocks: u16,
    pub(crate) start: u64,
}

/// Where everything of an image lies.
#[derive(Debug)]
pub struct Layout {
    pub(crate) geometry: Geometry,
    pub(crate) space: Space,
    /// The root, `lost+found`, and all others: by number.
    pub(crate) order: Vec<NodeId>,
    /// Inode numbers, by node.
    pub(crate) numbers: Vec<u32>,
    /// First blocks of content, by node; 0 for those without.
    starts: Vec<u64>,
    /// First blocks of extent trees that do not fit into their inode.
    trees: HashMap<NodeId, u64>,
    pub(crate) xattr_blocks: HashMap<NodeId, u64>,
    folder_blocks: HashMap<NodeId, u64>,
    pub(crate) journal: Option<(u64, u64, u64)>,
    /// The double indirect block of the inode that reserves descriptors' blocks.
    pub(crate) resize_block: u64,
    /// Where the cursor ended; beyond are only tables and copies.
    end: u64,
    /// Before `end`, and in no use.
    free: Vec<Range<u64>>,
    /// Of those, what contents were staged in that are gone.
    pub(crate) freed: Vec<Range<u64>>,
    pub(crate) options: Options,
    pub(crate) made: Time,
}

impl Layout {
    /// Plans an image of `tree`, which is sorted and gets a `lost+found` if it has none.
    pub fn plan(tree: &mut Tree, options: &Options, staged: &Staged) -> Result<Layout> {
        options.check()?;
        let made = match options.epoch {
            None => newest(tree),
            Some(seconds) => {
                clamp_times(tree, seconds);
                Time { seconds, nanoseconds: 0 }
            }
        };
        add_lost_found(tree, made)?;
        tree.sort();
        let order = number(tree)?;
        let demand = Demand::of(tree, &order)?;
        let used_inodes = u64::from(INODE_FIRST - 2) + order.len() as u64;
        let mut geometry = Geometry::choose(options, demand.blocks, used_inodes, staged)?;
        loop {
            let mut layout =
                Layout::empty(geometry, tree, order.clone(), &demand, options.clone(), made)?;
            match layout.place(tree, staged) {
                Ok(()) => return Ok(layout),
                // Extents of files that are in many pieces are not foreseen.
                Err(error) if error.kind() == ErrorKind::DoesNotFit => {
                    geometry = layout.geometry.larger(options, used_inodes, staged).ok_or(error)?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn empty(
        geometry: Geometry,
        tree: &Tree,
        order: Vec<NodeId>,
        demand: &Demand,
        options: Options,
        made: Time,
    ) -> Result<Layout> {
        let mut numbers = vec![0; tree.nodes.len()];
        for (index, node) in order.iter().enumerate() {
            numbers[node.0 as usize] = number_at(index);
        }
        Ok(Layout {
            space: geometry.space()?,
            geometry,
            order,
            numbers,
            starts: vec![0; tree.nodes.len()],
            trees: HashMap::new(),
            xattr_blocks: HashMap::new(),
            folder_blocks: demand.folder_blocks.clone(),
            journal: None,
            resize_block: 0,
            end: 0,
            free: Vec::new(),
            freed: Vec::new(),
            options,
            made,
        })
    }

    fn place(&mut self, tree: &Tree, staged: &Staged) -> Result<()> {
        let space = self.space.clone();
        let mut cursor = Cursor::new(&space, self.geometry.first_block.max(staged.end()));
        self.freed = space::merge(staged.freed().to_vec());
        self.free = self.freed.clone();
        if let Some(blocks) = self.geometry.journal_blocks {
            let start = cursor.take(blocks)?;
            let extents = extents_in(&space, start, std::iter::once(0..blocks)).count() as u64;
            let tree_blocks = tree_blocks(extents);
            self.journal = Some((start, blocks, cursor.take(tree_blocks)?));
        }
        self.resize_block = cursor.take(1)?;
        let metadata_begins = cursor.at();
        for index in 0..self.order.len() {
            let node = self.order[index];
            if tree.node(node).is_folder() {
                let blocks = self.folder_blocks(node);
                self.take_content(&mut cursor, tree, node, blocks)?;
            } else if tree.node(node).is_symlink() && is_slow(tree, node) {
                self.starts[node.0 as usize] = cursor.take(1)?;
            }
            if XattrPlan::of(tree.xattrs(node)).needs_block() {
                self.xattr_blocks.insert(node, cursor.take(1)?);
            }
        }
        // So that a folder that grew by a block does not move all that follows.
        let unit = (cursor.at() - metadata_begins).next_power_of_two() / 16;
        if unit > 1 {
            let at = cursor.at();
            let next = at.next_multiple_of(unit);
            if next < self.geometry.blocks {
                self.free.push(at..next);
                cursor = Cursor::new(&space, next);
            }
        }
        for index in 0..self.order.len() {
            let node = self.order[index];
            if !tree.node(node).is_file() {
                continue;
            }
            let content = tree.node(node).content();
            if content.source == FileId::PLACED {
                self.starts[node.0 as usize] = content.key;
                let extents = self.extents(tree, node).count() as u64;
                self.take_tree(&mut cursor, node, extents)?;
            } else if content.source != FileId::EMPTY {
                let blocks = data_blocks(tree, node);
                self.take_content(&mut cursor, tree, node, blocks)?;
            }
        }
        self.end = cursor.at();
        Ok(())
    }

    fn take_content(
        &mut self,
        cursor: &mut Cursor<'_>,
        tree: &Tree,
        node: NodeId,
        blocks: u64,
    ) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        self.starts[node.0 as usize] = cursor.take(blocks)?;
        let extents = self.extents(tree, node).count() as u64;
        self.take_tree(cursor, node, extents)
    }

    fn take_tree(&mut self, cursor: &mut Cursor<'_>, node: NodeId, extents: u64) -> Result<()> {
        let blocks = tree_blocks(extents);
        if blocks > 0 {
            self.trees.insert(node, cursor.take(blocks)?);
        }
        Ok(())
    }

    /// The inode's number.
    pub(crate) fn number(&self, node: NodeId) -> u32 {
        self.numbers[node.0 as usize]
    }

    /// The first block of a node's content, 0 if it has none.
    pub(crate) fn start(&self, node: NodeId) -> u64 {
        self.starts[node.0 as usize]
    }

    /// The first block of a node's extent tree, if it does not fit into the inode.
    pub(crate) fn tree_start(&self, node: NodeId) -> Option<u64> {
        self.trees.get(&node).copied()
    }

    /// Blocks of a folder.
    pub(crate) fn folder_blocks(&self, node: NodeId) -> u64 {
        self.folder_blocks.get(&node).copied().unwrap_or(1)
    }

    /// The extents of a node's content.
    pub(crate) fn extents<'a>(
        &'a self,
        tree: &'a Tree,
        node: NodeId,
    ) -> Box<dyn Iterator<Item = Extent> + 'a> {
        let start = self.start(node);
        if start == 0 {
            return Box::new(std::iter::empty());
        }
        let inode = &tree.node(node);
        if inode.is_file() {
            return match tree.sparse(node) {
                Some(data) => Box::new(extents_in(&self.space, start, data.iter().cloned())),
                None => {
                    let all = 0..inode.size.div_ceil(BLOCK);
                    Box::new(extents_in(&self.space, start, std::iter::once(all)))
                }
            };
        }
        let blocks = if inode.is_folder() { self.folder_blocks(node) } else { 1 };
        Box::new(extents_in(&self.space, start, std::iter::once(0..blocks)))
    }

    /// The image's length in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.geometry.size_bytes
    }

    /// Inodes in use, those without a name among them.
    pub fn used_inodes(&self) -> u64 {
        u64::from(INODE_FIRST - 2) + self.order.len() as u64
    }

    /// Bytes of contents that are not in the image yet, in whole blocks.
    pub fn copied_bytes(&self, tree: &Tree) -> u64 {
        let is_elsewhere = |node: &&NodeId| {
            let inode = tree.node(**node);
            inode.is_file() && !matches!(inode.source, FileId::EMPTY | FileId::PLACED)
        };
        self.order.iter().filter(is_elsewhere).map(|&node| data_blocks(tree, node) * BLOCK).sum()
    }

    /// All blocks in use, in order.
    pub(crate) fn used_ranges(&self) -> Vec<Range<u64>> {
        let mut free = self.free.clone();
        free.sort_unstable_by_key(|range| range.start);
        let mut used: Vec<Range<u64>> = Vec::new();
        let mut at = self.geometry.first_block;
        for range in free {
            if range.start > at {
                used.push(at..range.start);
            }
            at = at.max(range.end);
        }
        if self.end > at {
            used.push(at..self.end);
        }
        used.push(0..self.geometry.first_block);
        used.extend(self.space.fixed().iter().cloned());
        space::merge(used)
    }
}

/// The number of the inode at a place of the order.
pub(crate) fn number_at(index: usize) -> u32 {
    match u32::try_from(index).unwrap_or(u32::MAX) {
        0 => INODE_ROOT,
        index => INODE_FIRST - 1 + index,
    }
}

/// The extents of content whose logical blocks are `data` and whose blocks begin at `start`.
pub(crate) fn extents_in<'a>(
    space: &'a Space,
    start: u64,
    data: impl Iterator<Item = Range<u64>> + 'a,
) -> impl Iterator<Item = Extent> + 'a {
    let mut at = start;
    data.flat_map(move |range| {
        let mut logical = range.start;
        let mut runs = Vec::new();
        for run in space.runs(at, range.end - range.start) {
            at = run.end;
            let mut block = run.start;
            while block < run.end {
                let blocks = (run.end - block).min(EXTENT_BLOCKS_MAX);
                runs.push(Extent {
                    // Both are below the limits that `Demand` checks, and of an extent.
                    logical: u32::try_from(logical).unwrap_or(u32::MAX),
                    blocks: u16::try_from(blocks).unwrap_or(u16::MAX),
                    start: block,
                });
                block += blocks;
                logical += blocks;
            }
        }
        runs
    })
}

/// Blocks of a tree of so many extents, beside the node in the inode.
pub(crate) fn tree_blocks(extents: u64) -> u64 {
    let (mut total, mut level) = (0, extents);
    while level > EXTENTS_IN_INODE {
        level = level.div_ceil(EXTENTS_IN_BLOCK);
        total += level;
    }
    total
}

/// Whether a symlink's target needs a block.
pub(crate) fn is_slow(tree: &Tree, node: NodeId) -> bool {
    tree.node(node).size >= FAST_SYMLINK_BYTES as u64
}

/// Blocks of a file that hold data.
pub(crate) fn data_blocks(tree: &Tree, node: NodeId) -> u64 {
    match tree.sparse(node) {
        Some(data) => data.iter().map(|range| range.end - range.start).sum(),
        None => tree.node(node).size.div_ceil(BLOCK),
    }
}

/// What a tree needs, wherever it lies.
struct Demand {
    blocks: u64,
    /// Of those that have more than one.
    folder_blocks: HashMap<NodeId, u64>,
}

impl Demand {
    fn of(tree: &Tree, order: &[NodeId]) -> Result<Demand> {
        let mut demand = Demand { blocks: 1, folder_blocks: HashMap::new() };
        for (index, &node) in order.iter().enumerate() {
            let inode = &tree.node(node);
            if inode.is_folder() {
                let mut blocks = FolderPlan::of(tree, node)?.blocks();
                if index == 1 && blocks == 1 {
                    blocks = LOST_FOUND_BLOCKS;
                }
                if blocks > 1 {
                    demand.folder_blocks.insert(node, blocks);
                }
                demand.blocks += blocks + tree_blocks(blocks.div_ceil(EXTENT_BLOCKS_MAX) + 1);
            } else if inode.is_file() {
                demand.add_file(tree, node)?;
            } else if inode.is_symlink() {
                check_target(tree, node)?;
                demand.blocks += u64::from(is_slow(tree, node));
            }
            let xattrs = XattrPlan::of(tree.xattrs(node));
            demand.blocks += u64::from(xattrs.needs_block());
            xattrs.check().map_err(|error| error.within(tree.path_of(node)))?;
        }
        Ok(demand)
    }

    fn add_file(&mut self, tree: &Tree, node: NodeId) -> Result<()> {
        let inode = &tree.node(node);
        if inode.size.div_ceil(BLOCK) > FILE_BLOCKS_MAX {
            let path = tree.path_of(node);
            let what = format!("{path} has {} bytes, ext4's files at most 16 TiB", inode.size);
            return Err(Error::new(ErrorKind::DoesNotFit, what));
        }
        let pieces = tree.sparse(node).map_or(1, <[_]>::len) as u64;
        let blocks = data_blocks(tree, node);
        if !matches!(inode.source, FileId::EMPTY | FileId::PLACED) {
            self.blocks += blocks;
        }
        // A file may be cut by each copy of the superblock that it meets.
        self.blocks += tree_blocks(pieces + blocks / (EXTENT_BLOCKS_MAX / 2));
        Ok(())
    }
}

fn check_target(tree: &Tree, node: NodeId) -> Result<()> {
    let len = tree.node(node).size;
    if len == 0 || len > SYMLINK_BYTES_MAX as u64 {
        let path = tree.path_of(node);
        let what = format!("{path} is a symlink to {len} bytes; 1 to {SYMLINK_BYTES_MAX} can be");
        return Err(Error::new(ErrorKind::DoesNotFit, what));
    }
    const { assert!(SYMLINK_BYTES_MAX < BLOCK_BYTES) };
    Ok(())
}

/// All inodes in the order of their numbers: those of a folder beside each other.
fn number(tree: &Tree) -> Result<Vec<NodeId>> {
    let count = usize::try_from(tree.len()).unwrap_or(usize::MAX);
    let mut order = Vec::with_capacity(count);
    let mut seen = vec![false; tree.nodes.len()];
    let mut push = |node: NodeId, order: &mut Vec<NodeId>| {
        let new = !std::mem::replace(&mut seen[node.0 as usize], true);
        if new {
            order.push(node);
        }
    };
    push(ROOT, &mut order);
    if let Some(lost_found) = tree.lookup(ROOT, LOST_FOUND) {
        push(lost_found, &mut order);
    }
    let mut pending = vec![ROOT];
    while let Some(folder) = pending.pop() {
        let below = pending.len();
        for entry in tree.entries(folder) {
            push(entry.node, &mut order);
            if tree.node(entry.node).is_folder() {
                pending.push(entry.node);
            }
        }
        pending[below..].reverse();
    }
    if order.len() as u64 + u64::from(INODE_FIRST) > u64::from(u32::MAX) {
        return Err(Error::new(ErrorKind::DoesNotFit, "more than 4,000,000,000 inodes"));
    }
    Ok(order)
}

fn add_lost_found(tree: &mut Tree, made: Time) -> Result<()> {
    match tree.lookup(ROOT, LOST_FOUND) {
        None => {
            let attributes = Attributes { mode: 0o700, uid: 0, gid: 0, mtime: made };
            tree.add(ROOT, LOST_FOUND, 0, &attributes, Kind::Folder)?;
            Ok(())
        }
        Some(node) if tree.node(node).is_folder() => Ok(()),
        Some(_) => {
            let what = "/lost+found is not a folder, and ext4 needs one of this name";
            Err(Error::new(ErrorKind::InvalidInput, what))
        }
    }
}

/// The newest time in the tree, which stands for when the image was made.
fn newest(tree: &Tree) -> Time {
    let times = tree.nodes.iter().filter(|node| node.links > 0).map(|node| node.mtime_seconds);
    Time { seconds: times.max().unwrap_or(0).max(0), nanoseconds: 0 }
}

/// What is later than the moment that stands for now becomes that moment.
fn clamp_times(tree: &mut Tree, seconds: i64) {
    for node in &mut tree.nodes {
        if (node.mtime_seconds, node.mtime_nanoseconds) > (seconds, 0) {
            (node.mtime_seconds, node.mtime_nanoseconds) = (seconds, 0);
        }
    }
}
