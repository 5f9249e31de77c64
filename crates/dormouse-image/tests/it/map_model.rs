//! Maps against the simplest model: a list of the blocks that are not zero.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use dormouse_image::block::{BLOCK_BYTES_U64, IMAGE_BYTES_MAX};
use dormouse_image::error::Result;
use dormouse_image::map::{
    Extent, LEAF_BLOCKS, Leaf, Map, MapUpdate, Node, NodeRef, NodeSink, NodeSource, Source,
};
use dormouse_image::pack::PackId;

use crate::random::Random;

const LEAF: u64 = LEAF_BLOCKS as u64;
const BLOCKS_MAX: u64 = IMAGE_BYTES_MAX / BLOCK_BYTES_U64;

/// Nodes in memory, kept as the bytes that a pack would hold.
#[derive(Default)]
pub(crate) struct Nodes {
    published: HashMap<NodeRef, Node>,
    pub(crate) loads: Cell<usize>,
}

/// The pack that is being written.
#[derive(Default)]
pub(crate) struct Pending(pub(crate) Vec<Vec<u8>>);

impl NodeSource for Nodes {
    fn node(&self, at: NodeRef) -> Result<Node> {
        self.loads.set(self.loads.get() + 1);
        Ok(self.published[&at].clone())
    }
}

impl NodeSink for Pending {
    fn put_node(&mut self, node: &Node) -> Result<u32> {
        self.0.push(node.encode());
        Ok(u32::try_from(self.0.len() - 1).unwrap())
    }
}

impl Nodes {
    /// Gives the pack that was written its name.
    pub(crate) fn publish(&mut self, pending: Pending, own: PackId, map: Map) -> Map {
        for (node, bytes) in (0..).zip(&pending.0) {
            let decoded = Node::decode(bytes, own).unwrap();
            self.published.insert(NodeRef { pack: own, node }, decoded);
        }
        Map { root: map.root.map(|root| root.resolve(own)), ..map }
    }
}

type Blocks = BTreeMap<u64, (PackId, u32)>;

/// A generation: its map and what the model says of it.
#[derive(Clone)]
struct Generation {
    map: Map,
    blocks: Blocks,
}

pub(crate) fn pack(number: u64) -> PackId {
    let mut id = [0xab; 16];
    id[..8].copy_from_slice(&number.to_le_bytes());
    PackId(id)
}

fn sources(blocks: &mut Blocks, index: u64, extents: impl Iterator<Item = Extent>) {
    for extent in extents {
        if let Source::Stored { pack, slot } = extent.source {
            for at in 0..extent.len {
                blocks.insert(index * LEAF + u64::from(extent.start + at), (pack, slot + at));
            }
        }
    }
}

fn all_blocks(nodes: &Nodes, map: &Map) -> Blocks {
    let mut blocks = Blocks::new();
    let mut last = None;
    map.for_each_leaf(nodes, &mut |index, leaf| {
        assert!(last < Some(index), "leaves come in order");
        last = Some(index);
        assert!(!leaf.is_zero(), "leaves of zeros have no node");
        sources(&mut blocks, index, leaf.iter());
        Ok(())
    })
    .unwrap();
    blocks
}

/// A length: mostly near the last one, sometimes across a level of the tree.
fn length(random: &mut Random, blocks: u64) -> u64 {
    let near = |random: &mut Random, at: u64| (at + random.below(7)).saturating_sub(3);
    let blocks = match random.below(16) {
        0 => random.below(2),
        1 => near(random, LEAF),
        2 => near(random, LEAF * 512),
        3 => near(random, LEAF * 513),
        4 => near(random, LEAF * 512 * 512),
        5 => random.below(BLOCKS_MAX),
        6 => BLOCKS_MAX - random.below(3),
        7 => blocks + random.below(3 * LEAF),
        8 => blocks.saturating_sub(random.below(3 * LEAF)),
        9 => random.below(8 * LEAF),
        _ => blocks,
    };
    blocks.min(BLOCKS_MAX)
}

/// A place to write at: near the ends of leaves, of the image and of what was written before.
fn place(random: &mut Random, blocks: u64, written: &Blocks) -> u64 {
    let at = match random.below(5) {
        0 => random.below(blocks),
        1 => blocks - 1 - random.below(blocks.min(40)),
        2 => random.below(blocks.div_ceil(LEAF)) * LEAF + random.below(5),
        3 => random.below(blocks.min(4 * LEAF)),
        _ => written.range(random.below(blocks)..).next().map_or(0, |(&block, _)| block),
    };
    at.min(blocks - 1)
}

/// One commit: writes, zeroes and references to blocks of earlier packs.
fn commit(random: &mut Random, nodes: &mut Nodes, number: u64, parent: &Generation) -> Generation {
    let own = pack(number);
    let blocks = length(random, parent.map.blocks);
    let mut model = parent.blocks.clone();
    model.split_off(&blocks);
    let mut leaves: BTreeMap<u64, Leaf> = BTreeMap::new();
    let mut next_slot = 0;
    let runs = if blocks == 0 { 0 } else { random.below(12) };
    for _ in 0..runs {
        let at = place(random, blocks, &model);
        let len = (1 + random.below(60)).min(blocks - at);
        let (mut source, kept) = match random.below(5) {
            0 | 1 => (None, None),
            2 if number > 1 => {
                let old = (pack(1 + random.below(number - 1)), random.small(1000));
                (Some(old), Some(old))
            }
            _ => {
                let new = (PackId::SELF, next_slot);
                next_slot += u32::try_from(len).unwrap();
                (Some(new), Some((own, new.1)))
            }
        };
        for block in at..at + len {
            let leaf = leaves.entry(block / LEAF).or_insert_with(|| {
                let leaf = parent.map.leaf(nodes, block / LEAF).unwrap();
                leaf.map_or_else(Leaf::zero, |leaf| (*leaf).clone())
            });
            let run = Extent {
                start: u32::try_from(block % LEAF).unwrap(),
                len: 1,
                source: source.map_or(Source::Zero, |(pack, slot)| Source::Stored { pack, slot }),
            };
            *leaf = leaf.overlay(&[run]);
            source = source.map(|(pack, slot)| (pack, slot + 1));
            let distance = u32::try_from(block - at).unwrap();
            match kept {
                Some((pack, slot)) => drop(model.insert(block, (pack, slot + distance))),
                None => drop(model.remove(&block)),
            }
        }
    }
    let mut pending = Pending::default();
    let mut update = MapUpdate::new(parent.map, blocks);
    let mut changed = BTreeSet::new();
    for (&index, leaf) in &leaves {
        let within = blocks.saturating_sub(index * LEAF).min(LEAF);
        let leaf = leaf.truncate(u32::try_from(within).unwrap());
        let old = parent.map.leaf(nodes, index).unwrap();
        if old.map_or_else(Leaf::zero, |leaf| (*leaf).clone()) != leaf {
            update.put_leaf(&mut pending, index, &Arc::new(leaf)).unwrap();
            changed.insert(index);
        }
    }
    let map = update.finish(nodes, &mut pending).unwrap();
    // What may be written: the changed leaves and those above them, the path to a new end, and
    // roots of a higher tree.
    let levels = usize::from(map.level());
    let above: usize = (1..=u32::from(map.level()))
        .map(|level| {
            let parents = changed.iter().map(|index| index / 512_u64.pow(level));
            parents.collect::<BTreeSet<_>>().len()
        })
        .sum();
    let end = if blocks < parent.map.blocks { levels + 1 } else { 0 };
    let limit = changed.len() + above + end + levels;
    assert!(pending.0.len() <= limit, "{} nodes written, {limit} allowed", pending.0.len());
    if changed.is_empty() && blocks == parent.map.blocks {
        assert_eq!(map, parent.map, "nothing changed, nothing is new");
    }
    let map = nodes.publish(pending, own, map);
    Generation { map, blocks: model }
}

fn check(random: &mut Random, nodes: &Nodes, generation: &Generation) {
    let Generation { map, blocks } = generation;
    assert!(all_blocks(nodes, map) == *blocks, "the leaves hold what the model holds");
    let ends = [0, map.blocks.saturating_sub(1), map.blocks, map.blocks + 1, u64::MAX];
    let places = (0..60).map(|_| place(random, map.blocks.max(1), blocks)).chain(ends);
    for at in places.collect::<Vec<_>>() {
        let (index, extent) = map.lookup(nodes, at).unwrap();
        let within = u32::try_from(at % LEAF).unwrap();
        assert_eq!(index, at / LEAF);
        assert!((extent.start..extent.end()).contains(&within));
        let expected =
            blocks.get(&at).map_or(Source::Zero, |&(pack, slot)| Source::Stored { pack, slot });
        assert_eq!(extent.source.advance(within - extent.start), expected, "block {at}");
    }
    let mut leaves = 0;
    let seen = RefCell::new(BTreeSet::new());
    map.for_each_node(
        nodes,
        &mut |at, node| {
            assert!(seen.borrow().contains(&at), "a node is entered before it is shown");
            leaves += usize::from(matches!(node, Node::Leaf(_)));
            Ok(())
        },
        &mut |at| seen.borrow_mut().insert(at),
    )
    .unwrap();
    let expected: BTreeSet<u64> = blocks.keys().map(|block| block / LEAF).collect();
    assert!(leaves <= expected.len(), "leaves with equal bytes may be one node");
    assert!(leaves > 0 || expected.is_empty());
}

fn check_diff(nodes: &Nodes, old: &Generation, new: &Generation) {
    let mut expected = BTreeSet::new();
    for (block, source) in &old.blocks {
        if new.blocks.get(block) != Some(source) {
            expected.insert(*block);
        }
    }
    expected.extend(new.blocks.keys().filter(|block| !old.blocks.contains_key(block)));
    let mut found = BTreeSet::new();
    let mut last = None;
    old.map
        .diff(nodes, &new.map, &mut |diff| {
            assert!(last < Some(diff.leaf), "leaves come in order");
            last = Some(diff.leaf);
            let zero = Arc::new(Leaf::zero());
            let before = diff.old.unwrap_or_else(|| Arc::clone(&zero));
            let after = diff.new.unwrap_or(zero);
            for run in before.diff(&after) {
                for at in 0..run.len {
                    let block = diff.leaf * LEAF + u64::from(run.start + at);
                    let source = |blocks: &Blocks| {
                        let stored = blocks.get(&block);
                        stored.map_or(Source::Zero, |&(pack, slot)| Source::Stored { pack, slot })
                    };
                    assert_eq!(run.old.advance(at), source(&old.blocks), "block {block}");
                    assert_eq!(run.new.advance(at), source(&new.blocks), "block {block}");
                    found.insert(block);
                }
            }
            Ok(())
        })
        .unwrap();
    assert!(found == expected, "{} blocks differ, {} expected", found.len(), expected.len());
}

fn lineage(seed: u64, generations: u64) {
    let mut random = Random::new(seed);
    let mut nodes = Nodes::default();
    let mut last = Generation { map: Map::zero(10 * LEAF), blocks: Blocks::new() };
    let mut kept = vec![last.clone()];
    for number in 1..=generations {
        let next = commit(&mut random, &mut nodes, number, &last);
        check(&mut random, &nodes, &next);
        check_diff(&nodes, &last, &next);
        let other = &kept[random.index(kept.len())];
        check_diff(&nodes, other, &next);
        check_diff(&nodes, &next, other);
        if kept.len() < 8 {
            kept.push(next.clone());
        } else {
            let at = random.index(8);
            kept[at] = next.clone();
        }
        last = next;
    }
    // A generation is for ever what it was, whatever came after it.
    kept.iter().for_each(|generation| check(&mut random, &nodes, generation));
}

#[test]
fn a_lineage_of_300_generations_is_what_the_model_is() {
    lineage(1, 300);
}

#[test]
fn many_short_lineages_are_what_the_model_is() {
    (100..160).for_each(|seed| lineage(seed, 12));
}
