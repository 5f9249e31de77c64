//! The table of contents of a pack: what its id covers, and where its segments and nodes lie.
//!
//! ```text
//! byte 0  slots      u32
//!      4  segments   u32   n = ⌈slots / 1,024⌉
//!      8  nodes      u32   m
//!     12  reserved   u32   0
//!     16  segments   n × (hash 16 bytes, offset u64, bytes u32, live u32)
//!         nodes      m × (digest 16 bytes, offset u64, bytes u32, raw bytes u32)
//! ```
//!
//! An offset of 0 means that the segment or node was dropped because nothing refers to it.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::id::{PackId, PackIdParts};
use super::layout::{HEADER_BYTES, NODES_MAX, PackParams, RECORD_HEADER_BYTES};
use super::segment::{SEGMENT_BYTES_MAX, SEGMENT_SLOTS};
use crate::error::{Error, Result};
use crate::map::NODE_BYTES_MAX;

/// Where a segment lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentEntry {
    /// The hash of its digests.
    pub hash: [u8; 16],

    /// The offset of its record from the start of the pack; 0 if it was dropped.
    pub offset: u64,

    /// Bytes of its record.
    pub bytes: u32,

    /// Slots whose blocks are in the file.
    pub live: u32,
}

/// Where a node lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeEntry {
    /// The digest of its bytes before compression.
    pub digest: [u8; 16],

    /// The offset of its record from the start of the pack; 0 if it was dropped.
    pub offset: u64,

    /// Bytes of its record.
    pub bytes: u32,

    /// Bytes of the node before compression; 0 if it was dropped.
    pub raw_bytes: u32,
}

/// A pack's table of contents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Toc {
    /// Slots in the pack, dropped ones included.
    pub slots: u32,

    /// The segments, each of 1,024 slots but the last.
    pub segments: Vec<SegmentEntry>,

    /// The nodes.
    pub nodes: Vec<NodeEntry>,
}

impl SegmentEntry {
    /// The row of a segment that is not in the file.
    pub(super) fn dropped(hash: [u8; 16]) -> SegmentEntry {
        SegmentEntry { hash, offset: 0, bytes: 0, live: 0 }
    }
}

impl NodeEntry {
    /// The row of a node that is not in the file.
    pub(super) fn dropped(digest: [u8; 16]) -> NodeEntry {
        NodeEntry { digest, offset: 0, bytes: 0, raw_bytes: 0 }
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    slots: U32,
    segments: U32,
    nodes: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    hash: [u8; 16],
    offset: U64,
    bytes: U32,
    extra: U32,
}

const _: () = assert!(size_of::<RawHead>() == 16 && size_of::<RawEntry>() == 32);

impl Toc {
    /// The id that a pack with these contents has.
    pub fn pack_id(&self, params: &PackParams) -> PackId {
        let segments: Vec<_> = self.segments.iter().map(|segment| segment.hash).collect();
        let nodes: Vec<_> = self.nodes.iter().map(|node| node.digest).collect();
        PackIdParts { params, slots: self.slots, segments: &segments, nodes: &nodes }.id()
    }

    /// Slots whose blocks are in the file.
    pub fn live_slots(&self) -> u64 {
        self.segments.iter().map(|segment| u64::from(segment.live)).sum()
    }

    /// Slots of the segment with number `segment`.
    pub fn segment_slots(&self, segment: usize) -> u32 {
        let before = u32::try_from(segment).expect("at most 2^22 segments") * SEGMENT_SLOTS;
        (self.slots - before).min(SEGMENT_SLOTS)
    }

    /// Bytes that the table takes in memory.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Toc>()
            + self.segments.len() * size_of::<SegmentEntry>()
            + self.nodes.len() * size_of::<NodeEntry>()
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 + (self.segments.len() + self.nodes.len()) * 32);
        let count = |len: usize| U32::new(u32::try_from(len).expect("numbers have 32 bits"));
        let head = RawHead {
            slots: self.slots.into(),
            segments: count(self.segments.len()),
            nodes: count(self.nodes.len()),
            reserved: U32::ZERO,
        };
        out.extend(head.as_bytes());
        let segments = self.segments.iter().map(|s| (s.hash, s.offset, s.bytes, s.live));
        let nodes = self.nodes.iter().map(|n| (n.digest, n.offset, n.bytes, n.raw_bytes));
        for (hash, offset, bytes, extra) in segments.chain(nodes) {
            let entry =
                RawEntry { hash, offset: offset.into(), bytes: bytes.into(), extra: extra.into() };
            out.extend(entry.as_bytes());
        }
        out
    }

    /// Reads a table of a pack whose records end at `records_end`.
    pub(super) fn decode(bytes: &[u8], records_end: u64) -> Result<Toc> {
        let what = "table of contents";
        let (head, entries) = RawHead::ref_from_prefix(bytes)
            .map_err(|_| Error::corrupt(what, bytes.len(), "at least 16 bytes"))?;
        let (slots, segments, nodes) = (head.slots.get(), head.segments.get(), head.nodes.get());
        if segments != slots.div_ceil(SEGMENT_SLOTS) || head.reserved.get() != 0 {
            return Err(Error::corrupt(
                what,
                format_args!("{segments} segments"),
                format_args!("as many as {slots} slots need"),
            ));
        }
        if nodes > NODES_MAX {
            return Err(Error::corrupt(what, format_args!("{nodes} nodes"), NODES_MAX));
        }
        let entries = <[RawEntry]>::ref_from_bytes(entries)
            .map_err(|_| Error::corrupt(what, entries.len(), "whole entries"))?;
        if entries.len() as u64 != u64::from(segments) + u64::from(nodes) {
            return Err(Error::corrupt(what, entries.len(), "an entry for each segment and node"));
        }
        for entry in entries {
            let (offset, bytes) = (entry.offset.get(), u64::from(entry.bytes.get()));
            let inside = offset.checked_add(bytes).is_some_and(|end| end <= records_end);
            let after_header = offset == 0 || offset >= HEADER_BYTES as u64;
            if !inside || !after_header || (offset == 0) != (bytes == 0) {
                return Err(Error::corrupt(
                    what,
                    format_args!("a record of {bytes} bytes at {offset}"),
                    format_args!("one before {records_end}"),
                ));
            }
        }
        let (segments, nodes) = entries.split_at(segments as usize);
        let toc = Toc {
            slots,
            segments: segments
                .iter()
                .map(|entry| SegmentEntry {
                    hash: entry.hash,
                    offset: entry.offset.get(),
                    bytes: entry.bytes.get(),
                    live: entry.extra.get(),
                })
                .collect(),
            nodes: nodes
                .iter()
                .map(|entry| NodeEntry {
                    digest: entry.hash,
                    offset: entry.offset.get(),
                    bytes: entry.bytes.get(),
                    raw_bytes: entry.extra.get(),
                })
                .collect(),
        };
        for (number, segment) in toc.segments.iter().enumerate() {
            if segment.live > toc.segment_slots(number)
                || (segment.live == 0) != (segment.offset == 0)
                || segment.bytes as usize > RECORD_HEADER_BYTES + SEGMENT_BYTES_MAX
            {
                return Err(Error::corrupt(what, segment.live, "no more blocks than slots"));
            }
        }
        for node in &toc.nodes {
            let record_max = RECORD_HEADER_BYTES + NODE_BYTES_MAX;
            if node.raw_bytes as usize > NODE_BYTES_MAX || node.bytes as usize > record_max {
                return Err(Error::corrupt("node length", node.raw_bytes, NODE_BYTES_MAX));
            }
            if (node.raw_bytes == 0) != (node.offset == 0) {
                return Err(Error::corrupt(what, node.raw_bytes, "a length where a node is"));
            }
        }
        Ok(toc)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toc() -> Toc {
        let segment = SegmentEntry { hash: [1; 16], offset: 500, bytes: 100, live: 1000 };
        let dropped = SegmentEntry::dropped([2; 16]);
        let node = NodeEntry { digest: [3; 16], offset: 700, bytes: 50, raw_bytes: 90 };
        let lost = NodeEntry::dropped([4; 16]);
        Toc { slots: 1025, segments: vec![segment, dropped], nodes: vec![node, lost] }
    }

    #[test]
    fn tables_round_trip() {
        for toc in [toc(), Toc::default()] {
            assert_eq!(Toc::decode(&toc.encode(), 750).unwrap(), toc);
        }
        assert_eq!((toc().segment_slots(0), toc().segment_slots(1)), (1024, 1));
        assert_eq!(toc().live_slots(), 1000);
    }

    /// A table with a sound checksum could ask for 4 GiB of memory at once: lengths of records were
    /// only held against the length of the file.
    #[test]
    fn hostile_tables_are_refused() {
        type Change = fn(&mut Toc);
        let cases: [(&str, Change); 14] = [
            ("too few segments", |toc| toc.slots = 2049),
            ("too many segments", |toc| toc.slots = 1024),
            ("more live than slots", |toc| toc.segments[0].live = 1025),
            ("a dropped segment with blocks", |toc| toc.segments[1].live = 1),
            ("a segment without blocks", |toc| toc.segments[0].live = 0),
            ("a segment past the end", |toc| toc.segments[0].offset = 1 << 40),
            ("an offset past 2^64", |toc| toc.segments[0].offset = u64::MAX),
            ("a segment inside the header", |toc| toc.segments[0].offset = 71),
            ("a segment of no bytes", |toc| toc.segments[0].bytes = 0),
            ("a segment of 4 GiB", |toc| toc.segments[0].bytes = u32::MAX),
            ("a node of no bytes", |toc| toc.nodes[0].raw_bytes = 0),
            ("a dropped node with bytes", |toc| toc.nodes[1].raw_bytes = 90),
            ("a node of 4 GiB", |toc| toc.nodes[0].bytes = u32::MAX),
            ("a node that decodes to 4 GiB", |toc| toc.nodes[0].raw_bytes = u32::MAX),
        ];
        for (what, change) in cases {
            let mut toc = toc();
            change(&mut toc);
            Toc::decode(&toc.encode(), 1 << 33).expect_err(what);
        }
        let bytes = toc().encode();
        for len in 0..bytes.len() {
            Toc::decode(&bytes[..len], 750).unwrap_err();
        }
    }
}
