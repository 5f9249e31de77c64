//! The tree: finding leaves, laying a commit's leaves over a parent, and comparing two images.

use std::sync::Arc;

use super::leaf::{Extent, LEAF_BLOCKS, Leaf, Source};
use super::node::{CHILDREN_MAX, Inner, Node, NodeRef};
use crate::block::{BLOCK_BYTES_U64, IMAGE_BYTES_MAX};
use crate::error::{Error, Result};
use crate::pack::PackId;

/// The blocks of the longest image.
const BLOCKS_MAX: u64 = IMAGE_BYTES_MAX / BLOCK_BYTES_U64;

/// Where nodes are read from.
pub trait NodeSource {
    /// The node at `at`, checked.
    fn node(&self, at: NodeRef) -> Result<Node>;
}

/// Where new nodes are written to.
pub trait NodeSink {
    /// Writes a node into the pack being written and returns its number there.
    fn put_node(&mut self, node: &Node) -> Result<u32>;
}

/// An image's map: its length in blocks and the root of its tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    /// Blocks in the image; those past it are zero in every node.
    pub blocks: u64,

    /// The root, `None` for an image of zeros. Its level follows from `blocks`.
    pub root: Option<NodeRef>,
}

impl Map {
    /// A map of nothing but zeros.
    pub fn zero(blocks: u64) -> Map {
        Map { blocks, root: None }
    }

    /// The level of the root: 0 where one leaf is enough.
    pub fn level(&self) -> u8 {
        level_for(self.blocks)
    }

    /// How many leaves cover the image.
    pub fn leaves(&self) -> u64 {
        self.blocks.div_ceil(u64::from(LEAF_BLOCKS))
    }

    /// The leaf with number `index`, `None` where it is all zero, as it is past the image's end.
    pub fn leaf(&self, nodes: &dyn NodeSource, index: u64) -> Result<Option<Arc<Leaf>>> {
        if index >= self.leaves() {
            return Ok(None);
        }
        let mut at = self.root;
        for level in (1..=self.level()).rev() {
            let Some(node) = at else { return Ok(None) };
            let inner = load_inner(nodes, node, level)?;
            let child = index / leaves_below(level - 1) % CHILDREN_MAX as u64;
            at = inner
                .children
                .get(usize::try_from(child).expect("below CHILDREN_MAX"))
                .copied()
                .flatten();
        }
        at.map(|node| load_leaf(nodes, node)).transpose()
    }

    /// The extent that holds `block`, with the number of its leaf. Past the image's end are zeros.
    pub fn lookup(&self, nodes: &dyn NodeSource, block: u64) -> Result<(u64, Extent)> {
        let (index, within) = split(block);
        let extent = match self.leaf(nodes, index)? {
            Some(leaf) => leaf.lookup(within),
            None => Extent { start: 0, len: LEAF_BLOCKS, source: Source::Zero },
        };
        Ok((index, extent))
    }

    /// Calls `visit` with every leaf that is not all zero, in order.
    pub fn for_each_leaf(
        &self,
        nodes: &dyn NodeSource,
        visit: &mut dyn FnMut(u64, &Arc<Leaf>) -> Result<()>,
    ) -> Result<()> {
        Map::zero(self.blocks).diff(nodes, self, &mut |diff| match diff.new {
            Some(leaf) => visit(diff.leaf, &leaf),
            None => Ok(()),
        })
    }

    /// Calls `visit` with every node of the tree, parents first; one that returns `false` keeps
    /// the walk from going below it.
    pub fn for_each_node(
        &self,
        nodes: &dyn NodeSource,
        visit: &mut dyn FnMut(NodeRef, &Node) -> Result<()>,
        enter: &mut dyn FnMut(NodeRef) -> bool,
    ) -> Result<()> {
        fn walk(
            nodes: &dyn NodeSource,
            at: NodeRef,
            level: u8,
            visit: &mut dyn FnMut(NodeRef, &Node) -> Result<()>,
            enter: &mut dyn FnMut(NodeRef) -> bool,
        ) -> Result<()> {
            if !enter(at) {
                return Ok(());
            }
            if level == 0 {
                return visit(at, &Node::Leaf(load_leaf(nodes, at)?));
            }
            let inner = load_inner(nodes, at, level)?;
            visit(at, &Node::Inner(Arc::clone(&inner)))?;
            for child in inner.children.iter().flatten() {
                walk(nodes, *child, level - 1, visit, enter)?;
            }
            Ok(())
        }
        match self.root {
            Some(root) => walk(nodes, root, self.level(), visit, enter),
            None => Ok(()),
        }
    }

    /// Calls `visit` with every leaf that the two images do not share, in order. Subtrees that are
    /// one node are never entered. The images may have different lengths.
    pub fn diff(
        &self,
        nodes: &dyn NodeSource,
        other: &Map,
        visit: &mut dyn FnMut(MapDiff) -> Result<()>,
    ) -> Result<()> {
        let level = self.level().max(other.level());
        let old = Subtree::root(self, level);
        let new = Subtree::root(other, level);
        let leaves = self.leaves().max(other.leaves());
        diff_below(nodes, level, 0, old, new, &mut |diff| {
            if diff.leaf >= leaves {
                return Err(Error::corrupt(
                    "map leaf number",
                    diff.leaf,
                    format_args!("below {leaves}"),
                ));
            }
            visit(diff)
        })
    }
}

/// A leaf that two images do not share.
#[derive(Clone, Debug)]
pub struct MapDiff {
    /// The number of the leaf.
    pub leaf: u64,

    /// What the image that was asked has there; `None` is zeros.
    pub old: Option<Arc<Leaf>>,

    /// What the image that it was compared with has there.
    pub new: Option<Arc<Leaf>>,
}

/// A commit's leaves, laid over a parent's map.
#[derive(Debug)]
pub struct MapUpdate {
    parent: Map,
    blocks: u64,
    /// Leaf number and what stands there now, ascending.
    changed: Vec<(u64, Option<NodeRef>)>,
}

impl MapUpdate {
    /// An update that turns `parent` into an image of `blocks` blocks.
    pub fn new(parent: Map, blocks: u64) -> MapUpdate {
        MapUpdate { parent, blocks, changed: Vec::new() }
    }

    /// Says how long the image is, where that was not known at the start.
    pub fn resize(&mut self, blocks: u64) {
        self.blocks = blocks;
    }

    /// Puts `leaf`, whose number must be over that of the last one, in the parent's place.
    /// A leaf that is equal to the parent's should not be put at all: it would be written again.
    ///
    /// # Panics
    ///
    /// If the number is not over that of the last leaf, or if the leaf has blocks past the image's
    /// end that are not zero: they would come back when the image grows.
    pub fn put_leaf(
        &mut self,
        sink: &mut dyn NodeSink,
        index: u64,
        leaf: &Arc<Leaf>,
    ) -> Result<()> {
        assert!(self.changed.last().is_none_or(|&(last, _)| last < index), "leaves come in order");
        assert!(
            leaf.iter()
                .all(|extent| extent.source == Source::Zero || self.holds(index, extent.end())),
            "leaf {index} is zero past block {} of the image",
            self.blocks
        );
        let at = if leaf.is_zero() {
            None
        } else {
            let node = sink.put_node(&Node::Leaf(Arc::clone(leaf)))?;
            Some(NodeRef { pack: PackId::SELF, node })
        };
        self.changed.push((index, at));
        Ok(())
    }

    /// Writes the inner nodes above what changed and returns the new map. When the image shrank,
    /// nothing of the parent stays past its new end: the leaf in which it ends is cut here if it
    /// was not put.
    pub fn finish(mut self, nodes: &dyn NodeSource, sink: &mut dyn NodeSink) -> Result<Map> {
        if self.blocks > BLOCKS_MAX {
            return Err(Error::unsupported("image length in blocks", self.blocks, BLOCKS_MAX));
        }
        self.cut_last_leaf(nodes, sink)?;
        let map = Map { blocks: self.blocks, root: None };
        let leaves = map.leaves();
        self.changed.retain(|&(index, _)| index < leaves);
        let mut parent = Subtree::root(&self.parent, map.level());
        // A parent that was higher has everything that is kept below its first children.
        for level in (map.level() + 1..=self.parent.level()).rev() {
            parent = parent.children(nodes, level)?.first().copied().unwrap_or(Subtree::Zero);
        }
        let cut = if leaves < self.parent.leaves() { leaves } else { u64::MAX };
        let mut rebuild = Rebuild { nodes, sink, cut };
        let root = rebuild.subtree(map.level(), 0, parent, &self.changed)?;
        Ok(Map { root, ..map })
    }

    fn cut_last_leaf(&mut self, nodes: &dyn NodeSource, sink: &mut dyn NodeSink) -> Result<()> {
        let (last, end) = split(self.blocks);
        if self.blocks >= self.parent.blocks
            || end == 0
            || self.changed.last().is_some_and(|&(index, _)| index == last)
        {
            return Ok(());
        }
        let Some(leaf) = self.parent.leaf(nodes, last)? else { return Ok(()) };
        let cut = leaf.truncate(end);
        if cut == *leaf { Ok(()) } else { self.put_leaf(sink, last, &Arc::new(cut)) }
    }

    /// Whether the first `blocks` blocks of leaf `index` belong to the image.
    fn holds(&self, index: u64, blocks: u32) -> bool {
        let (last, end) = split(self.blocks);
        index < last || (index == last && blocks <= end)
    }
}

/// What lies below one child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subtree {
    Zero,

    /// A node of just this level.
    Node(NodeRef),

    /// A node so many levels further down, all first children: a tree that became higher.
    Above(NodeRef, u8),
}

impl Subtree {
    /// The tree of `map` seen from `level`; a map that is higher starts at its own root.
    fn root(map: &Map, level: u8) -> Subtree {
        match (map.root, level.saturating_sub(map.level())) {
            (None, _) => Subtree::Zero,
            (Some(root), 0) => Subtree::Node(root),
            (Some(root), levels) => Subtree::Above(root, levels),
        }
    }

    fn children(self, nodes: &dyn NodeSource, level: u8) -> Result<Vec<Subtree>> {
        Ok(match self {
            Subtree::Zero => Vec::new(),
            Subtree::Node(at) => load_inner(nodes, at, level)?
                .children
                .iter()
                .map(|child| child.map_or(Subtree::Zero, Subtree::Node))
                .collect(),
            Subtree::Above(at, 1) => vec![Subtree::Node(at)],
            Subtree::Above(at, levels) => vec![Subtree::Above(at, levels - 1)],
        })
    }
}

struct Rebuild<'a> {
    nodes: &'a dyn NodeSource,
    sink: &'a mut dyn NodeSink,
    /// The first leaf that is no longer part of the image.
    cut: u64,
}

impl Rebuild<'_> {
    /// The new node for the subtree whose first leaf is `first`, over the parent's `old`.
    fn subtree(
        &mut self,
        level: u8,
        first: u64,
        old: Subtree,
        changed: &[(u64, Option<NodeRef>)],
    ) -> Result<Option<NodeRef>> {
        if first >= self.cut {
            return Ok(None);
        }
        let last = first + (leaves_below(level) - 1);
        if changed.is_empty() && (last < self.cut || level == 0) {
            match old {
                Subtree::Zero => return Ok(None),
                Subtree::Node(at) => return Ok(Some(at)),
                Subtree::Above(..) => {}
            }
        }
        if level == 0 {
            return Ok(changed[0].1);
        }
        let step = leaves_below(level - 1);
        let olds = old.children(self.nodes, level)?;
        let mut children = Vec::new();
        let mut rest = changed;
        for number in 0..CHILDREN_MAX {
            let begin = first + number as u64 * step;
            let inside = rest.partition_point(|&(index, _)| index < begin + step);
            let (below, after) = rest.split_at(inside);
            rest = after;
            let child = olds.get(number).copied().unwrap_or(Subtree::Zero);
            if number >= olds.len() && below.is_empty() && after.is_empty() {
                break;
            }
            children.push(self.subtree(level - 1, begin, child, below)?);
        }
        while children.last().is_some_and(Option::is_none) {
            children.pop();
        }
        if children.is_empty() {
            return Ok(None);
        }
        if let Subtree::Node(at) = old
            && olds.iter().map(|child| Subtree::node(*child)).eq(children.iter().copied())
        {
            return Ok(Some(at));
        }
        let node = Node::Inner(Arc::new(Inner { level, children }));
        Ok(Some(NodeRef { pack: PackId::SELF, node: self.sink.put_node(&node)? }))
    }
}

impl Subtree {
    fn node(self) -> Option<NodeRef> {
        match self {
            Subtree::Node(at) => Some(at),
            Subtree::Zero | Subtree::Above(..) => None,
        }
    }
}

fn diff_below(
    nodes: &dyn NodeSource,
    level: u8,
    first: u64,
    old: Subtree,
    new: Subtree,
    visit: &mut dyn FnMut(MapDiff) -> Result<()>,
) -> Result<()> {
    if old == new {
        return Ok(());
    }
    if level == 0 {
        let load = |side: Subtree| side.node().map(|at| load_leaf(nodes, at)).transpose();
        return visit(MapDiff { leaf: first, old: load(old)?, new: load(new)? });
    }
    let (olds, news) = (old.children(nodes, level)?, new.children(nodes, level)?);
    let step = leaves_below(level - 1);
    for number in 0..olds.len().max(news.len()) {
        let child = |side: &[Subtree]| side.get(number).copied().unwrap_or(Subtree::Zero);
        let begin = first + number as u64 * step;
        diff_below(nodes, level - 1, begin, child(&olds), child(&news), visit)?;
    }
    Ok(())
}

/// The number of the leaf that holds `block`, and the block's place in it.
fn split(block: u64) -> (u64, u32) {
    let within = u32::try_from(block % u64::from(LEAF_BLOCKS)).expect("below LEAF_BLOCKS");
    (block / u64::from(LEAF_BLOCKS), within)
}

/// How many leaves a node of `level` covers.
fn leaves_below(level: u8) -> u64 {
    (CHILDREN_MAX as u64).pow(u32::from(level))
}

/// The lowest level whose one node covers `blocks` blocks.
fn level_for(blocks: u64) -> u8 {
    let leaves = blocks.div_ceil(u64::from(LEAF_BLOCKS));
    (0..).find(|&level| leaves_below(level) >= leaves).expect("leaves_below grows without end")
}

fn load_leaf(nodes: &dyn NodeSource, at: NodeRef) -> Result<Arc<Leaf>> {
    match nodes.node(at)? {
        Node::Leaf(leaf) => Ok(leaf),
        Node::Inner(inner) => Err(Error::corrupt("map node level", inner.level, 0)),
    }
}

fn load_inner(nodes: &dyn NodeSource, at: NodeRef, level: u8) -> Result<Arc<Inner>> {
    match nodes.node(at)? {
        Node::Inner(inner) if inner.level == level => Ok(inner),
        Node::Inner(inner) => Err(Error::corrupt("map node level", inner.level, level)),
        Node::Leaf(_) => Err(Error::corrupt("map node level", 0, level)),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    const OWN: PackId = PackId([9; 16]);

    #[derive(Default)]
    struct Nodes(RefCell<Vec<Node>>);

    impl NodeSource for Nodes {
        fn node(&self, at: NodeRef) -> Result<Node> {
            Ok(self.0.borrow()[at.node as usize].clone())
        }
    }

    impl NodeSink for &Nodes {
        fn put_node(&mut self, node: &Node) -> Result<u32> {
            self.0.borrow_mut().push(node.clone());
            Ok(u32::try_from(self.0.borrow().len() - 1).unwrap())
        }
    }

    fn full_leaf() -> Arc<Leaf> {
        let whole =
            Extent { start: 0, len: LEAF_BLOCKS, source: Source::Stored { pack: OWN, slot: 0 } };
        Arc::new(Leaf::zero().overlay(&[whole]))
    }

    fn map_of(nodes: &Nodes, blocks: u64, leaves: &[(u64, Arc<Leaf>)]) -> Map {
        let mut update = MapUpdate::new(Map::zero(blocks), blocks);
        leaves.iter().for_each(|(at, leaf)| update.put_leaf(&mut &*nodes, *at, leaf).unwrap());
        update.finish(nodes, &mut &*nodes).unwrap()
    }

    /// The child's number in a node was taken modulo 512 and a tree of one leaf was not indexed at
    /// all, so that a block past the end was answered with one from the start: a commit that grew
    /// an image would have compared its new blocks with those of leaf 0, and kept them.
    #[test]
    fn past_the_end_are_zeros_not_the_first_leaf_again() {
        let nodes = Nodes::default();
        for leaves in [1, 2, 512, 513] {
            let blocks = leaves * u64::from(LEAF_BLOCKS);
            let map = map_of(&nodes, blocks, &[(0, full_leaf())]);
            for past in [leaves, leaves + 1, 512, 1024, 512 * 512, u64::MAX / 8192] {
                if past >= leaves {
                    assert_eq!(map.leaf(&nodes, past).unwrap(), None, "{past} of {leaves}");
                    let found = map.lookup(&nodes, past * u64::from(LEAF_BLOCKS)).unwrap();
                    assert_eq!(found.1.source, Source::Zero);
                }
            }
        }
    }

    /// The leaf in which a shorter image ends had to be cut by the caller. One that forgot got the
    /// old blocks back when the image grew again.
    #[test]
    fn growing_back_does_not_bring_back_what_was_cut() {
        let nodes = Nodes::default();
        let leaf = u64::from(LEAF_BLOCKS);
        let map = map_of(&nodes, 3 * leaf, &[(0, full_leaf()), (1, full_leaf()), (2, full_leaf())]);
        for blocks in [0, 1, leaf, leaf + 5, 2 * leaf, 3 * leaf - 1] {
            let short = MapUpdate::new(map, blocks).finish(&nodes, &mut &nodes).unwrap();
            let long = MapUpdate::new(short, 5 * leaf).finish(&nodes, &mut &nodes).unwrap();
            for block in [0, 1, leaf - 1, leaf, leaf + 4, leaf + 5, 3 * leaf - 1, 3 * leaf] {
                let (_, extent) = long.lookup(&nodes, block).unwrap();
                assert_eq!(extent.source != Source::Zero, block < blocks, "{block} of {blocks}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "zero past block 1")]
    fn a_leaf_with_blocks_past_the_end_is_refused() {
        let nodes = Nodes::default();
        map_of(&nodes, 1, &[(0, full_leaf())]);
    }

    /// An image over the limit would have got a node of a level that no reader accepts.
    #[test]
    fn the_longest_image_is_writable_and_a_longer_one_refused() {
        let nodes = Nodes::default();
        let last = BLOCKS_MAX / u64::from(LEAF_BLOCKS) - 1;
        let map = map_of(&nodes, BLOCKS_MAX, &[(last, full_leaf())]);
        let Node::Inner(root) = nodes.node(map.root.unwrap()).unwrap() else { panic!("inner") };
        let encoded = Node::Inner(Arc::clone(&root)).encode();
        Node::decode(&encoded, OWN).unwrap();
        assert!(map.leaf(&nodes, last).unwrap().is_some());
        let update = MapUpdate::new(map, BLOCKS_MAX + 1);
        update.finish(&nodes, &mut &nodes).unwrap_err();
    }

    /// A tree whose nodes name children past the end of the image would send whoever copies the
    /// image past the end of his buffer.
    #[test]
    fn leaves_past_the_end_are_not_shown() {
        let nodes = Nodes::default();
        let leaf = u64::from(LEAF_BLOCKS);
        let map = map_of(&nodes, 3 * leaf, &[(0, full_leaf()), (2, full_leaf())]);
        let lie = Map { blocks: 2 * leaf, ..map };
        lie.for_each_leaf(&nodes, &mut |_, _| Ok(())).unwrap_err();
    }
}
