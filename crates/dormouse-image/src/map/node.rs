//! A node's bytes: a pack table, then columns of varints.
//!
//! ```text
//! byte  0  level         u8    0 leaf; k: each child covers 8,192 × 512^(k−1) blocks
//!       1  version       u8    1
//!       2  reserved      u16   0
//!       4  packs         u32   p
//!       8  entries       u32   n
//!      12  pack table    p × 16 bytes
//!          columns       leaf:  n lengths; n sources; a slot for each stored entry
//!                        inner: n sources; a node number for each stored entry
//! ```
//!
//! A source is 0 for zeros, 1 for the pack that the node lies in, k + 2 for the pack table's k-th
//! row. A slot is the signed distance from where the last extent of the same pack ended. Trailing
//! zeros are left out. A node has one form only: what the reader accepts, the writer would write.

use std::collections::HashMap;
use std::sync::Arc;

use super::leaf::{LEAF_BLOCKS, Leaf, LeafBuilder, Source};
use super::varint::{self, Reader};
use crate::error::{Error, Result};
use crate::pack::PackId;

/// Children of an inner node.
pub const CHILDREN_MAX: usize = 512;

/// The longest node: a leaf with 8,192 extents, each from another pack, at 11 bytes of columns.
pub const NODE_BYTES_MAX: usize = HEADER_BYTES + LEAF_BLOCKS as usize * (16 + 11);

const HEADER_BYTES: usize = 12;
const VERSION: u8 = 1;

/// Levels above the leaves: 8,192 × 512³ blocks are 4,096 TiB, far over the limit of an image.
const LEVEL_MAX: u8 = 3;

/// Where a node lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeRef {
    /// The pack; [`PackId::SELF`] while that pack is being written.
    pub pack: PackId,

    /// The node's number in the pack.
    pub node: u32,
}

impl NodeRef {
    /// The reference with [`PackId::SELF`] replaced by the name that the pack got.
    #[must_use]
    pub fn resolve(self, own: PackId) -> NodeRef {
        NodeRef { pack: self.pack.resolve(own), node: self.node }
    }
}

/// An inner node: up to 512 children, `None` where there are only zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inner {
    /// The level, from 1; each child covers 8,192 × 512^(level−1) blocks.
    pub level: u8,

    /// The children; the last one is never `None`.
    pub children: Vec<Option<NodeRef>>,
}

/// A node of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// Extents.
    Leaf(Arc<Leaf>),

    /// Children.
    Inner(Arc<Inner>),
}

impl Node {
    /// The packs that this node's own entries refer to: of a leaf those that hold blocks, of an
    /// inner node those that hold its children.
    pub fn packs(&self) -> Vec<PackId> {
        match self {
            Node::Leaf(leaf) => leaf.packs().to_vec(),
            Node::Inner(inner) => {
                let mut packs: Vec<_> = inner.children.iter().flatten().map(|at| at.pack).collect();
                packs.sort_unstable();
                packs.dedup();
                packs
            }
        }
    }

    /// Bytes that the node takes in memory.
    pub fn memory_bytes(&self) -> usize {
        match self {
            Node::Leaf(leaf) => leaf.memory_bytes(),
            Node::Inner(inner) => {
                size_of::<Inner>() + inner.children.len() * size_of::<Option<NodeRef>>()
            }
        }
    }

    /// The node's bytes. References to the pack that it is written into are [`PackId::SELF`].
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Node::Leaf(leaf) => encode_leaf(leaf),
            Node::Inner(inner) => encode_inner(inner),
        }
    }

    /// Reads a node that lies in the pack `own`.
    pub fn decode(bytes: &[u8], own: PackId) -> Result<Node> {
        if bytes.len() > NODE_BYTES_MAX {
            return Err(Error::corrupt("node length", bytes.len(), NODE_BYTES_MAX));
        }
        let mut reader = Reader::new(bytes);
        let header = reader.bytes("node header", HEADER_BYTES)?;
        let (level, version) = (header[0], header[1]);
        if version != VERSION {
            return Err(Error::unsupported("node version", version, VERSION));
        }
        if level > LEVEL_MAX {
            return Err(Error::corrupt("node level", level, format_args!("at most {LEVEL_MAX}")));
        }
        if header[2..4] != [0, 0] {
            return Err(Error::corrupt("node header", "reserved bytes in use", "zeros"));
        }
        let number = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let (packs, entries) = (number(4) as usize, number(8) as usize);
        let entries_max = if level == 0 { LEAF_BLOCKS as usize } else { CHILDREN_MAX };
        if entries == 0 || entries > entries_max || packs > entries {
            return Err(Error::corrupt(
                "node header",
                format_args!("{entries} entries, {packs} packs"),
                format_args!("1 to {entries_max} entries, no more packs than entries"),
            ));
        }
        let table: Vec<PackId> = reader
            .bytes("node pack table", packs * 16)?
            .as_chunks::<16>()
            .0
            .iter()
            .map(|&id| PackId(id))
            .collect();
        if table.iter().any(|&pack| pack == own || pack == PackId::SELF) {
            return Err(Error::corrupt("node pack table", "the node's own pack", "others"));
        }
        let mut sorted = table.clone();
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Error::corrupt("node pack table", "one pack twice", "each once"));
        }
        let node = if level == 0 {
            decode_leaf(&mut reader, &table, entries, own)?
        } else {
            decode_inner(&mut reader, &table, entries, level, own)?
        };
        reader.finish("node")?;
        Ok(node)
    }
}

/// Numbers sources in the order of their first use; the pack itself is always 1.
#[derive(Default)]
struct PackTable {
    packs: Vec<PackId>,
    numbers: HashMap<PackId, u64>,
}

impl PackTable {
    fn number(&mut self, pack: PackId) -> u64 {
        if pack == PackId::SELF {
            return 1;
        }
        *self.numbers.entry(pack).or_insert_with(|| {
            self.packs.push(pack);
            self.packs.len() as u64 + 1
        })
    }

    fn encode(&self, level: u8, entries: usize, columns: [&[u8]; 3]) -> Vec<u8> {
        let mut out = Vec::with_capacity(
            HEADER_BYTES
                + self.packs.len() * 16
                + columns.iter().map(|column| column.len()).sum::<usize>(),
        );
        out.extend([level, VERSION, 0, 0]);
        out.extend(u32::try_from(self.packs.len()).expect("at most LEAF_BLOCKS").to_le_bytes());
        out.extend(u32::try_from(entries).expect("at most LEAF_BLOCKS").to_le_bytes());
        self.packs.iter().for_each(|pack| out.extend(pack.0));
        columns.iter().for_each(|column| out.extend(*column));
        out
    }
}

fn encode_leaf(leaf: &Leaf) -> Vec<u8> {
    let mut table = PackTable::default();
    let (mut lengths, mut sources, mut slots) = (Vec::new(), Vec::new(), Vec::new());
    let mut ends: HashMap<u64, i64> = HashMap::new();
    let mut entries = 0;
    let stored_end = leaf
        .iter()
        .filter(|extent| extent.source != Source::Zero)
        .last()
        .map_or(0, |extent| extent.end());
    for extent in leaf.iter().take_while(|extent| extent.start < stored_end) {
        entries += 1;
        varint::put(&mut lengths, u64::from(extent.len));
        match extent.source {
            Source::Zero => varint::put(&mut sources, 0),
            Source::Stored { pack, slot } => {
                let number = table.number(pack);
                varint::put(&mut sources, number);
                let end = ends.entry(number).or_insert(0);
                varint::put_signed(&mut slots, i64::from(slot) - *end);
                *end = i64::from(slot) + i64::from(extent.len);
            }
        }
    }
    table.encode(0, entries, [&lengths, &sources, &slots])
}

fn decode_leaf(
    reader: &mut Reader<'_>,
    table: &[PackId],
    entries: usize,
    own: PackId,
) -> Result<Node> {
    let lengths = (0..entries)
        .map(|_| reader.take("leaf extent length", u64::from(LEAF_BLOCKS)))
        .collect::<Result<Vec<_>>>()?;
    let sources = read_sources(reader, table, entries)?;
    let mut ends = vec![0_i64; table.len() + 2];
    // The builder's numbers of the sources; a table names each pack once, so nothing is hashed.
    let mut numbers = vec![0_u16; table.len() + 2];
    let mut builder = LeafBuilder::new();
    for (&len, &number) in lengths.iter().zip(&sources) {
        let room = u64::from(LEAF_BLOCKS - builder.blocks());
        if len == 0 || len > room {
            return Err(Error::corrupt("leaf extent length", len, format_args!("1 to {room}")));
        }
        // The limit above makes the length fit.
        let len = u32::try_from(len).expect("at most LEAF_BLOCKS");
        if number == 0 {
            builder.push_numbered(len, 0, 0);
            continue;
        }
        let delta = reader.take_signed("leaf slot")?;
        let end = &mut ends[number];
        let slot = end.checked_add(delta).unwrap_or(-1);
        let last = slot.saturating_add(i64::from(len) - 1);
        let Ok(slot) = u32::try_from(slot) else {
            return Err(Error::corrupt("leaf slot", slot, "a slot below 2^32"));
        };
        if u32::try_from(last).is_err() {
            return Err(Error::corrupt("leaf slot", last, "a slot below 2^32"));
        }
        *end = last + 1;
        if numbers[number] == 0 {
            numbers[number] = builder.add_pack(pack_of(table, number, own));
        }
        builder.push_numbered(len, numbers[number], slot);
    }
    if sources.last() == Some(&0) {
        return Err(Error::corrupt("leaf", "zeros at its end", "none, they are implied"));
    }
    let leaf = builder.finish();
    let implied = usize::from(leaf.lookup(LEAF_BLOCKS - 1).source == Source::Zero);
    if leaf.extents() != entries + implied {
        return Err(Error::corrupt("leaf", "extents that continue each other", "them joined"));
    }
    Ok(Node::Leaf(Arc::new(leaf)))
}

fn encode_inner(inner: &Inner) -> Vec<u8> {
    let mut table = PackTable::default();
    let (mut sources, mut nodes) = (Vec::new(), Vec::new());
    for child in &inner.children {
        match child {
            None => varint::put(&mut sources, 0),
            Some(at) => {
                varint::put(&mut sources, table.number(at.pack));
                varint::put(&mut nodes, u64::from(at.node));
            }
        }
    }
    table.encode(inner.level, inner.children.len(), [&sources, &nodes, &[]])
}

fn decode_inner(
    reader: &mut Reader<'_>,
    table: &[PackId],
    entries: usize,
    level: u8,
    own: PackId,
) -> Result<Node> {
    let sources = read_sources(reader, table, entries)?;
    let mut children = Vec::with_capacity(entries);
    for number in sources {
        children.push(match number {
            0 => None,
            number => {
                let node = reader.take("node number", u64::from(u32::MAX))?;
                let node = u32::try_from(node).expect("limited by take");
                Some(NodeRef { pack: pack_of(table, number, own), node })
            }
        });
    }
    if children.last().is_some_and(Option::is_none) {
        return Err(Error::corrupt("inner node", "zeros at its end", "none, they are implied"));
    }
    Ok(Node::Inner(Arc::new(Inner { level, children })))
}

/// Reads the column of sources and checks that the pack table is in the order of first use.
fn read_sources(reader: &mut Reader<'_>, table: &[PackId], entries: usize) -> Result<Vec<usize>> {
    let limit = table.len() as u64 + 1;
    let mut next = 2;
    let mut sources = Vec::with_capacity(entries);
    for _ in 0..entries {
        let number = reader.take("source", limit)?;
        if number > next {
            return Err(Error::corrupt("source", number, format_args!("at most {next} here")));
        }
        next += u64::from(number == next);
        sources.push(usize::try_from(number).expect("at most LEAF_BLOCKS + 1"));
    }
    if next != limit + 1 {
        return Err(Error::corrupt("node pack table", "packs that nothing refers to", "none"));
    }
    Ok(sources)
}

fn pack_of(table: &[PackId], number: usize, own: PackId) -> PackId {
    if number == 1 { own } else { table[number - 2] }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWN: PackId = PackId([0xee; 16]);

    fn any_leaf() -> impl Strategy<Value = Leaf> {
        prop::collection::vec((1_u32..300, 0_u8..5, 0_u32..10_000), 1..200).prop_map(|runs| {
            let mut builder = LeafBuilder::new();
            for (len, pack, slot) in runs {
                let len = len.min(LEAF_BLOCKS - builder.blocks());
                let source = match pack {
                    0 => Source::Zero,
                    1 => Source::Stored { pack: PackId::SELF, slot },
                    pack => Source::Stored { pack: PackId([pack; 16]), slot },
                };
                builder.push(len, source);
            }
            builder.finish()
        })
    }

    proptest! {
        #[test]
        fn leaves_round_trip(leaf in any_leaf()) {
            prop_assume!(!leaf.is_zero());
            let bytes = Node::Leaf(Arc::new(leaf.clone())).encode();
            prop_assert!(bytes.len() <= NODE_BYTES_MAX);
            let Node::Leaf(read) = Node::decode(&bytes, OWN).unwrap() else { panic!("a leaf") };
            prop_assert_eq!(&*read, &leaf.rename_pack(PackId::SELF, OWN));
        }

        #[test]
        fn bytes_have_one_meaning(bytes in prop::collection::vec(any::<u8>(), 0..64), level in 0_u8..2) {
            let mut node = vec![level, 1, 0, 0, 0, 0, 0, 0];
            node.extend(bytes);
            if let Ok(read) = Node::decode(&node, OWN) {
                let read = match read {
                    Node::Leaf(leaf) => Node::Leaf(Arc::new(leaf.rename_pack(OWN, PackId::SELF))),
                    Node::Inner(inner) => Node::Inner(Arc::new(Inner {
                        level: inner.level,
                        children: inner.children.iter().map(|child| child.map(|at| NodeRef {
                            pack: if at.pack == OWN { PackId::SELF } else { at.pack },
                            node: at.node,
                        })).collect(),
                    })),
                };
                prop_assert_eq!(read.encode(), node);
            }
        }
    }

    /// A table that named one pack twice was read, and written differently: the same map had two
    /// digests, and nothing below it would have been shared.
    #[test]
    fn a_pack_stands_in_the_table_once() {
        let inner = Inner {
            level: 1,
            children: [3, 4].map(|id| Some(NodeRef { pack: PackId([id; 16]), node: 1 })).to_vec(),
        };
        let mut bytes = Node::Inner(Arc::new(inner)).encode();
        Node::decode(&bytes, OWN).unwrap();
        bytes[28..44].fill(3);
        Node::decode(&bytes, OWN).unwrap_err();
    }

    /// A leaf as full as it gets stays within the limit that its reader has.
    #[test]
    fn the_longest_leaf_is_readable() {
        let mut builder = LeafBuilder::new();
        for block in 0..LEAF_BLOCKS {
            let mut id = [1; 16];
            id[..4].copy_from_slice(&block.to_le_bytes());
            let slot = if block % 2 == 0 { u32::MAX } else { 0 };
            builder.push(1, Source::Stored { pack: PackId(id), slot });
        }
        let leaf = builder.finish();
        let bytes = Node::Leaf(Arc::new(leaf.clone())).encode();
        assert!(bytes.len() <= NODE_BYTES_MAX, "{}", bytes.len());
        assert_eq!(Node::decode(&bytes, OWN).unwrap(), Node::Leaf(Arc::new(leaf)));
    }

    #[test]
    fn hostile_nodes_are_refused() {
        let header = |level: u8, packs: u32, entries: u32| {
            let mut bytes = vec![level, 1, 0, 0];
            bytes.extend(packs.to_le_bytes());
            bytes.extend(entries.to_le_bytes());
            bytes
        };
        let cases: [(&str, Vec<u8>); 9] = [
            ("nothing", vec![]),
            ("no entries", header(0, 0, 0)),
            ("too many entries", header(0, 0, 8193)),
            ("too many children", header(1, 0, 513)),
            ("level 4", [header(4, 0, 1), vec![1, 0]].concat()),
            ("more packs than entries", header(0, u32::MAX, 1)),
            ("its own pack", [header(0, 1, 1), OWN.0.to_vec(), vec![1, 2, 0]].concat()),
            ("bytes behind it", [header(0, 0, 1), vec![1, 1, 0, 0]].concat()),
            ("a slot below zero", [header(0, 0, 1), vec![1, 1, 1]].concat()),
        ];
        for (what, bytes) in cases {
            Node::decode(&bytes, OWN).expect_err(what);
        }
        Node::decode(&[header(0, 0, 1), vec![1, 1, 0]].concat(), OWN).unwrap();
    }

    #[test]
    fn inner_nodes_round_trip() {
        let inner = Inner {
            level: 2,
            children: vec![
                None,
                Some(NodeRef { pack: PackId::SELF, node: 7 }),
                Some(NodeRef { pack: PackId([3; 16]), node: u32::MAX }),
            ],
        };
        let bytes = Node::Inner(Arc::new(inner.clone())).encode();
        let Node::Inner(read) = Node::decode(&bytes, OWN).unwrap() else { panic!("an inner node") };
        assert_eq!(read.level, 2);
        assert_eq!(read.children[1], Some(NodeRef { pack: OWN, node: 7 }));
        assert_eq!(read.children[2], inner.children[2]);
    }
}
