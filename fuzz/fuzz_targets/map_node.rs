//! A map node: what is read is written the same, and its extents keep their invariants.
#![no_main]

use std::sync::Arc;

use dormouse_image::map::{Inner, LEAF_BLOCKS, Leaf, Node, NodeRef, Source};
use dormouse_image::pack::PackId;
use libfuzzer_sys::fuzz_target;

const OWN: PackId = PackId([0xee; 16]);

fuzz_target!(|data: &[u8]| {
    let Ok(node) = Node::decode(data, OWN) else { return };
    let renamed = match node {
        Node::Leaf(leaf) => {
            let mut at = 0;
            for extent in leaf.iter() {
                assert!(extent.start == at && extent.len > 0);
                assert_eq!(leaf.lookup(at), extent);
                let last = extent.source.advance(extent.len - 1);
                assert_eq!(last == Source::Zero, extent.source == Source::Zero);
                at = extent.end();
            }
            assert_eq!(at, LEAF_BLOCKS);
            assert_eq!(leaf.diff(&leaf).count(), 0);
            let cut = leaf.truncate(LEAF_BLOCKS / 2);
            let changed: u32 = leaf.diff(&cut).map(|run| run.len).sum();
            assert!(changed <= LEAF_BLOCKS / 2);
            let back: Vec<_> = leaf.iter_range(LEAF_BLOCKS / 2..LEAF_BLOCKS).collect();
            assert_eq!(cut.overlay(&back), *leaf);
            assert!(Leaf::zero().diff(&leaf).count() <= leaf.extents());
            Node::Leaf(Arc::new(leaf.rename_pack(OWN, PackId::SELF)))
        }
        Node::Inner(inner) => {
            let back = |at: NodeRef| match at.pack == OWN {
                true => NodeRef { pack: PackId::SELF, ..at },
                false => at,
            };
            let children = inner.children.iter().map(|child| child.map(back)).collect();
            Node::Inner(Arc::new(Inner { level: inner.level, children }))
        }
    };
    assert_eq!(renamed.encode(), data);
});
