//! What a rewrite left out as a whole: the hashes that the pack's id covers and that no other
//! record holds, so that a lost table of contents can be made again from the records.
//!
//! ```text
//! byte 0  slots      u32   in the pack, dropped ones included
//!      4  nodes      u32   in the pack, dropped ones included
//!      8  entries    n × (what u32, number u32, hash 16 bytes), ascending by what and number
//! ```
//!
//! What is 1 for a segment and 2 for a node. The record stands right behind the header of a pack
//! from which a segment or node was dropped, and in no other.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::NODES_MAX;
use super::segment::{SEGMENT_SLOTS, SEGMENTS_MAX};
use super::toc::{NodeEntry, SegmentEntry, Toc};
use crate::error::{Error, Result};

const HEAD_BYTES: usize = 8;
const ENTRY_BYTES: usize = 24;

/// The longest payload: every segment and node of the largest pack.
pub(super) const DROPPED_BYTES_MAX: usize =
    HEAD_BYTES + (SEGMENTS_MAX as usize + NODES_MAX as usize) * ENTRY_BYTES;

const SEGMENT: u32 = 1;
const NODE: u32 = 2;

/// The segments and nodes of a pack that are not in its file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Dropped {
    slots: u32,
    nodes: u32,
    /// Ascending, each once, within `slots` and `nodes`.
    segment_hashes: Vec<(u32, [u8; 16])>,
    node_hashes: Vec<(u32, [u8; 16])>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    slots: U32,
    nodes: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    what: U32,
    number: U32,
    hash: [u8; 16],
}

const _: () = assert!(size_of::<RawHead>() == HEAD_BYTES && size_of::<RawEntry>() == ENTRY_BYTES);

impl Dropped {
    /// What will be missing of a pack with the table `toc` once only `keeps_segment` and
    /// `keeps_node` are kept of what is in its file.
    pub(super) fn of(
        toc: &Toc,
        keeps_segment: impl Fn(u32) -> bool,
        keeps_node: impl Fn(u32) -> bool,
    ) -> Dropped {
        let segments = (0_u32..).zip(&toc.segments);
        let nodes = (0_u32..).zip(&toc.nodes);
        Dropped {
            slots: toc.slots,
            nodes: u32::try_from(toc.nodes.len()).expect("node numbers have 32 bits"),
            segment_hashes: segments
                .filter(|&(number, entry)| entry.offset == 0 || !keeps_segment(number))
                .map(|(number, entry)| (number, entry.hash))
                .collect(),
            node_hashes: nodes
                .filter(|&(number, entry)| entry.offset == 0 || !keeps_node(number))
                .map(|(number, entry)| (number, entry.digest))
                .collect(),
        }
    }

    /// Whether everything is in the file.
    pub(super) fn is_empty(&self) -> bool {
        self.segment_hashes.is_empty() && self.node_hashes.is_empty()
    }

    /// Segments of the pack.
    pub(super) fn segment_count(&self) -> u32 {
        self.slots.div_ceil(SEGMENT_SLOTS)
    }

    /// Nodes of the pack.
    pub(super) fn node_count(&self) -> u32 {
        self.nodes
    }

    /// The table's row of a dropped segment, and the segment's slots.
    pub(super) fn segment(&self, number: u32) -> Option<(SegmentEntry, u32)> {
        let hash = find(&self.segment_hashes, number)?;
        let slots = (self.slots - number * SEGMENT_SLOTS).min(SEGMENT_SLOTS);
        Some((SegmentEntry::dropped(hash), slots))
    }

    /// The table's row of a dropped node.
    pub(super) fn node(&self, number: u32) -> Option<NodeEntry> {
        find(&self.node_hashes, number).map(NodeEntry::dropped)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let rows = self.segment_hashes.len() + self.node_hashes.len();
        let mut out = Vec::with_capacity(HEAD_BYTES + rows * ENTRY_BYTES);
        out.extend(RawHead { slots: self.slots.into(), nodes: self.nodes.into() }.as_bytes());
        for (what, rows) in [(SEGMENT, &self.segment_hashes), (NODE, &self.node_hashes)] {
            for &(number, hash) in rows {
                let entry = RawEntry { what: what.into(), number: number.into(), hash };
                out.extend(entry.as_bytes());
            }
        }
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Dropped> {
        let what = "list of what was dropped";
        let (head, entries) = RawHead::ref_from_prefix(bytes)
            .map_err(|_| Error::corrupt(what, bytes.len(), "at least 8 bytes"))?;
        let entries = <[RawEntry]>::ref_from_bytes(entries)
            .map_err(|_| Error::corrupt(what, entries.len(), "whole entries"))?;
        let mut dropped =
            Dropped { slots: head.slots.get(), nodes: head.nodes.get(), ..Dropped::default() };
        if dropped.nodes > NODES_MAX {
            return Err(Error::corrupt(what, dropped.nodes, NODES_MAX));
        }
        let key = |entry: &RawEntry| (entry.what.get(), entry.number.get());
        if entries.is_empty() || !entries.windows(2).all(|pair| key(&pair[0]) < key(&pair[1])) {
            return Err(Error::corrupt(what, "entries out of order, or none", "some in order"));
        }
        for entry in entries {
            let number = entry.number.get();
            let (rows, count) = match entry.what.get() {
                SEGMENT => (&mut dropped.segment_hashes, head.slots.get().div_ceil(SEGMENT_SLOTS)),
                NODE => (&mut dropped.node_hashes, head.nodes.get()),
                other => return Err(Error::unsupported(what, other, "1 or 2")),
            };
            if number >= count {
                return Err(Error::corrupt(what, number, format_args!("below {count}")));
            }
            rows.push((number, entry.hash));
        }
        Ok(dropped)
    }
}

fn find(rows: &[(u32, [u8; 16])], number: u32) -> Option<[u8; 16]> {
    let at = rows.binary_search_by_key(&number, |&(number, _)| number).ok()?;
    Some(rows[at].1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dropped() -> Dropped {
        Dropped {
            slots: 2049,
            nodes: 5,
            segment_hashes: vec![(0, [1; 16]), (2, [2; 16])],
            node_hashes: vec![(1, [3; 16]), (4, [4; 16])],
        }
    }

    #[test]
    fn lists_round_trip() {
        let read = Dropped::decode(&dropped().encode()).unwrap();
        assert_eq!(read, dropped());
        assert_eq!((read.segment_count(), read.node_count()), (3, 5));
        assert_eq!(read.segment(0).unwrap().1, 1024);
        assert_eq!(read.segment(2).unwrap(), (SegmentEntry::dropped([2; 16]), 1));
        assert_eq!(read.segment(1), None);
        assert_eq!(read.node(4).unwrap().digest, [4; 16]);
        assert_eq!(read.node(0), None);
    }

    #[test]
    fn hostile_lists_are_refused() {
        let sound = dropped().encode();
        let entry = |number: usize| HEAD_BYTES + number * ENTRY_BYTES;
        let cases: [(&str, usize, u8); 8] = [
            ("fewer slots than segments", 1, 0),
            ("fewer nodes", 4, 4),
            ("more nodes than a pack may have", 7, 1),
            ("something else that was dropped", entry(3), 3),
            ("nothing that was dropped", entry(0), 0),
            ("out of order", entry(0) + 4, 3),
            ("twice the same", entry(1) + 4, 0),
            ("a segment past the end", entry(1) + 4, 3),
        ];
        for (what, at, value) in cases {
            let mut bytes = sound.clone();
            bytes[at] = value;
            Dropped::decode(&bytes).expect_err(what);
        }
        Dropped::decode(&sound[..HEAD_BYTES]).expect_err("nothing dropped");
        for len in (0..sound.len()).filter(|len| len % ENTRY_BYTES != HEAD_BYTES) {
            Dropped::decode(&sound[..len]).unwrap_err();
        }
    }
}
