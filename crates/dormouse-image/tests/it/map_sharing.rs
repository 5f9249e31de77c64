//! What a commit writes of the tree and what a comparison reads of it.

use std::sync::Arc;

use dormouse_image::map::{Extent, LEAF_BLOCKS, Leaf, Map, MapUpdate, Node, NodeRef, Source};
use dormouse_image::pack::PackId;

use crate::map_model::{Nodes, Pending, pack};

const LEAF: u64 = LEAF_BLOCKS as u64;

fn leaf(slot: u32) -> Arc<Leaf> {
    let source = Source::Stored { pack: PackId::SELF, slot };
    Arc::new(Leaf::zero().overlay(&[Extent { start: 5, len: 9, source }]))
}

/// Lays leaves over a parent; returns the map and how many nodes it took.
fn commit(
    nodes: &mut Nodes,
    number: u64,
    parent: Map,
    blocks: u64,
    leaves: &[(u64, Arc<Leaf>)],
) -> (Map, usize) {
    let mut pending = Pending::default();
    let mut update = MapUpdate::new(parent, blocks);
    leaves.iter().for_each(|(at, leaf)| update.put_leaf(&mut pending, *at, leaf).unwrap());
    let map = update.finish(nodes, &mut pending).unwrap();
    let written = pending.0.len();
    (nodes.publish(pending, pack(number), map), written)
}

/// 16 TiB with a leaf in every 4,096th place.
fn huge(nodes: &mut Nodes) -> Map {
    let blocks = 1 << 32;
    let leaves: Vec<_> = (0..128_u32).map(|at| (u64::from(at) * 4096, leaf(at))).collect();
    commit(nodes, 1, Map::zero(blocks), blocks, &leaves).0
}

#[test]
fn a_changed_leaf_costs_itself_and_its_parents() {
    let mut nodes = Nodes::default();
    let map = huge(&mut nodes);
    assert_eq!(map.level(), 3);
    let (child, written) = commit(&mut nodes, 2, map, map.blocks, &[(77, leaf(1000))]);
    assert_eq!(written, 1 + 3);
    // Two leaves below one node cost one parent.
    let (_, written) = commit(&mut nodes, 3, child, map.blocks, &[(78, leaf(1)), (79, leaf(2))]);
    assert_eq!(written, 2 + 3);
}

#[test]
fn nothing_changed_is_the_same_root() {
    let mut nodes = Nodes::default();
    let map = huge(&mut nodes);
    nodes.loads.set(0);
    let (child, written) = commit(&mut nodes, 2, map, map.blocks, &[]);
    assert_eq!((child, written, nodes.loads.get()), (map, 0, 0));
}

#[test]
fn zeros_have_no_nodes() {
    let mut nodes = Nodes::default();
    let (map, written) = commit(&mut nodes, 1, Map::zero(1 << 32), 1 << 32, &[]);
    assert_eq!((map.root, written), (None, 0));
    let (map, _) = commit(&mut nodes, 2, map, 1 << 32, &[(400_000, leaf(1))]);
    assert!(map.root.is_some());
    let zero = Arc::new(Leaf::zero());
    let (map, written) = commit(&mut nodes, 3, map, 1 << 32, &[(400_000, zero)]);
    assert_eq!((map.root, written), (None, 0));
}

#[test]
fn a_comparison_reads_only_what_differs() {
    let mut nodes = Nodes::default();
    let map = huge(&mut nodes);
    let (child, _) = commit(&mut nodes, 2, map, map.blocks, &[(4096, leaf(1000))]);
    nodes.loads.set(0);
    let mut leaves = Vec::new();
    map.diff(&nodes, &child, &mut |diff| {
        leaves.push(diff.leaf);
        Ok(())
    })
    .unwrap();
    assert_eq!(leaves, [4096]);
    assert_eq!(nodes.loads.get(), 2 * 4, "three levels and a leaf of each");
}

#[test]
fn growing_by_levels_keeps_what_is_below() {
    let mut nodes = Nodes::default();
    let (small, _) = commit(&mut nodes, 1, Map::zero(1), LEAF, &[(0, leaf(1))]);
    let (huge, written) = commit(&mut nodes, 2, small, 1 << 32, &[]);
    assert_eq!(written, 3, "a node for each new level");
    let mut seen: Vec<NodeRef> = Vec::new();
    huge.for_each_node(
        &nodes,
        &mut |at, _| {
            seen.push(at);
            Ok(())
        },
        &mut |_| true,
    )
    .unwrap();
    assert_eq!(seen.last(), small.root.as_ref(), "the old root is a leaf below them");
    let mut differ = 0;
    small
        .diff(&nodes, &huge, &mut |_| {
            differ += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(differ, 0);
    let (back, written) = commit(&mut nodes, 3, huge, LEAF, &[]);
    assert_eq!((back, written), (small, 0));
}

#[test]
fn a_walk_does_not_go_where_it_is_not_let() {
    let mut nodes = Nodes::default();
    let map = huge(&mut nodes);
    let root = map.root.unwrap();
    nodes.loads.set(0);
    map.for_each_node(&nodes, &mut |_, _| panic!("not let in"), &mut |at| at != root).unwrap();
    assert_eq!(nodes.loads.get(), 0);
    let mut inner = 0;
    let visit = &mut |_, node: &Node| {
        inner += usize::from(matches!(node, Node::Inner(_)));
        Ok(())
    };
    map.for_each_node(&nodes, visit, &mut |_| true).unwrap();
    assert_eq!(inner, 1 + 2 + 128);
}
