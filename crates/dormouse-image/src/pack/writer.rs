//! Writes a pack front to back.

use std::io::Write;

use super::dropped::Dropped;
use super::frame::{EncodedFrame, FRAME_BLOCKS, FRAME_BLOCKS_U32};
use super::id::PackId;
use super::layout::{
    FOOTER_BYTES, Footer, HEADER_BYTES, Header, NODES_MAX, PackParams, RECORD_HEADER_U32,
    RecordHeader, RecordKind,
};
use super::segment::{FramePlace, SEGMENT_SLOTS, Segment, SlotBits};
use super::toc::{NodeEntry, SegmentEntry, Toc};
use crate::block::BLOCK_BYTES;
use crate::codec::{Codec, Encoder, Encoding};
use crate::digest::structure_hash;
use crate::error::{Error, Result};
use crate::map::{Node, NodeSink};

/// Nodes are read once and kept decoded, so a good ratio costs nobody.
pub(super) const NODE_CODEC: Codec = Codec::Zstd(6);

/// Writes frames and nodes as they come, and the table of contents at the end.
///
/// Memory: 32 bytes for each 1,024 slots and for each node; nothing else grows with the pack.
#[derive(Debug)]
pub struct PackWriter<W> {
    out: Output<W>,
    params: PackParams,
    toc: Toc,
    segment: Segment,
    /// Only the last frame of a pack may be short: a slot's frame follows from its rank.
    short_frame: bool,
    nodes: Encoder,
}

/// A written pack.
#[derive(Clone, Debug)]
pub struct FinishedPack {
    /// Its name.
    pub id: PackId,

    /// Its length in bytes.
    pub bytes: u64,

    /// Its table of contents.
    pub toc: Toc,
}

impl<W: Write> PackWriter<W> {
    /// Begins a pack at the current end of `sink`.
    pub fn new(sink: W, params: PackParams) -> Result<PackWriter<W>> {
        let mut out = Output { sink, offset: 0, salt: params.salt };
        out.raw(Header::new(&params))?;
        Ok(PackWriter {
            out,
            params,
            toc: Toc::default(),
            segment: empty_segment(),
            short_frame: false,
            nodes: Encoder::new(NODE_CODEC)?,
        })
    }

    /// Slots given out so far; the next block gets this number.
    pub fn slots(&self) -> u32 {
        self.toc.slots + self.segment.slots()
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.out.offset
    }

    /// Appends a frame; its blocks get the next slots in order.
    ///
    /// # Panics
    ///
    /// If a frame before this one was short of [`FRAME_BLOCKS`] blocks.
    pub fn push_frame(&mut self, frame: &EncodedFrame) -> Result<()> {
        assert!(!self.short_frame, "only the last frame of a pack may be short");
        self.short_frame = frame.blocks() < FRAME_BLOCKS;
        let first_slot = self.slots();
        if first_slot.checked_add(FRAME_BLOCKS_U32).is_none() {
            return Err(Error::unsupported("pack", "more than 2^32 slots", "several commits"));
        }
        let place =
            self.out.frame(first_slot, None, frame.encoding, frame.blocks(), &frame.payload)?;
        self.segment.frames.push(place);
        self.segment.digests.extend(&frame.digests);
        if self.segment.slots() == SEGMENT_SLOTS {
            self.end_segment()?;
        }
        Ok(())
    }

    /// Ends the pack and makes its name.
    pub fn finish(mut self) -> Result<(FinishedPack, W)> {
        if self.segment.slots() > 0 {
            self.end_segment()?;
        }
        self.out.finish(&self.params, self.toc)
    }

    fn end_segment(&mut self) -> Result<()> {
        let segment = std::mem::replace(&mut self.segment, empty_segment());
        let number = self.toc.segments.len();
        let entry = self.out.segment(number, &segment)?;
        self.toc.slots += segment.slots();
        self.toc.segments.push(entry);
        Ok(())
    }
}

impl<W: Write> NodeSink for PackWriter<W> {
    fn put_node(&mut self, node: &Node) -> Result<u32> {
        let number = u32::try_from(self.toc.nodes.len())
            .ok()
            .filter(|&number| number < NODES_MAX)
            .ok_or_else(|| Error::unsupported("pack", "more nodes", NODES_MAX))?;
        let raw = node.encode();
        let (encoding, payload) = self.nodes.encode(&raw)?;
        let entry = self.out.node(number, encoding, payload, &raw)?;
        self.toc.nodes.push(entry);
        Ok(number)
    }
}

fn empty_segment() -> Segment {
    Segment { digests: Vec::new(), frames: Vec::new(), present: None }
}

/// Records in a row, with the offset from the pack's start.
#[derive(Debug)]
pub(super) struct Output<W> {
    sink: W,
    offset: u64,
    salt: u32,
}

impl<W: Write> Output<W> {
    pub(super) fn begin(sink: W, params: &PackParams) -> Result<Output<W>> {
        let mut out = Output { sink, offset: 0, salt: params.salt };
        out.raw(Header::new(params))?;
        Ok(out)
    }

    fn raw(&mut self, header: Header) -> Result<()> {
        use zerocopy::IntoBytes;
        self.write(header.as_bytes())?;
        debug_assert_eq!(self.offset, HEADER_BYTES as u64, "the header comes first");
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.sink.write_all(bytes).map_err(|error| Error::io("pack", error))?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    fn record(&mut self, header: RecordHeader, payload: &[&[u8]]) -> Result<(u64, u32)> {
        let offset = self.offset;
        let head = header.encode(self.salt, payload);
        self.write(&head)?;
        payload.iter().try_for_each(|part| self.write(part))?;
        let bytes = header.stored_bytes + RECORD_HEADER_U32;
        Ok((offset, bytes))
    }

    pub(super) fn frame(
        &mut self,
        first_slot: u32,
        slots: Option<&[u16]>,
        encoding: Encoding,
        blocks: usize,
        data: &[u8],
    ) -> Result<FramePlace> {
        let list: Vec<u8> =
            slots.unwrap_or(&[]).iter().flat_map(|slot| slot.to_le_bytes()).collect();
        let header = RecordHeader {
            kind: RecordKind::Frame,
            encoding,
            slot_list: slots.is_some(),
            count: u16::try_from(blocks).expect("at most FRAME_BLOCKS"),
            index: first_slot,
            stored_bytes: length(list.len() + data.len()),
            raw_bytes: length(blocks * BLOCK_BYTES),
        };
        let (offset, bytes) = self.record(header, &[&list, data])?;
        Ok(FramePlace { offset, bytes })
    }

    /// Writes bytes as they are and returns where.
    pub(super) fn verbatim(&mut self, bytes: &[u8]) -> Result<u64> {
        let offset = self.offset;
        self.write(bytes)?;
        Ok(offset)
    }

    pub(super) fn segment(&mut self, number: usize, segment: &Segment) -> Result<SegmentEntry> {
        let body = segment.encode();
        let header = RecordHeader {
            kind: RecordKind::Segment,
            encoding: Encoding::Raw,
            slot_list: false,
            count: u16::try_from(segment.slots()).expect("at most SEGMENT_SLOTS"),
            index: u32::try_from(number).expect("at most 2^22 segments"),
            stored_bytes: length(body.len()),
            raw_bytes: length(body.len()),
        };
        let (offset, bytes) = self.record(header, &[&body])?;
        Ok(SegmentEntry { hash: segment.hash(), offset, bytes, live: segment.live() })
    }

    pub(super) fn node(
        &mut self,
        number: u32,
        encoding: Encoding,
        payload: &[u8],
        raw: &[u8],
    ) -> Result<NodeEntry> {
        let header = RecordHeader {
            kind: RecordKind::Node,
            encoding,
            slot_list: false,
            count: 0,
            index: number,
            stored_bytes: length(payload.len()),
            raw_bytes: length(raw.len()),
        };
        let (offset, bytes) = self.record(header, &[payload])?;
        Ok(NodeEntry { digest: structure_hash([raw]), offset, bytes, raw_bytes: header.raw_bytes })
    }

    /// Says what is dropped, if anything is; before all other records.
    pub(super) fn dropped(&mut self, dropped: &Dropped) -> Result<()> {
        if dropped.is_empty() {
            return Ok(());
        }
        let body = dropped.encode();
        let header = RecordHeader {
            kind: RecordKind::Dropped,
            encoding: Encoding::Raw,
            slot_list: false,
            count: 0,
            index: 0,
            stored_bytes: length(body.len()),
            raw_bytes: length(body.len()),
        };
        self.record(header, &[&body]).map(drop)
    }

    pub(super) fn finish(mut self, params: &PackParams, toc: Toc) -> Result<(FinishedPack, W)> {
        let id = toc.pack_id(params);
        let body = toc.encode();
        let header = RecordHeader {
            kind: RecordKind::Toc,
            encoding: Encoding::Raw,
            slot_list: false,
            count: 0,
            index: 0,
            stored_bytes: length(body.len()),
            raw_bytes: length(body.len()),
        };
        let (toc_offset, toc_bytes) = self.record(header, &[&body])?;
        let region_bytes = self.offset + FOOTER_BYTES as u64;
        let footer = Footer {
            salt: self.salt,
            toc_offset,
            toc_bytes: u64::from(toc_bytes),
            region_bytes,
            pack: id,
        };
        self.write(&footer.encode())?;
        Ok((FinishedPack { id, bytes: region_bytes, toc }, self.sink))
    }
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("records are shorter than TOC_BYTES_MAX")
}

/// The bits of a segment of which only `slots` are kept.
pub(super) fn slot_bits(slots: impl Iterator<Item = u32>) -> Box<SlotBits> {
    let mut bits = Box::new(SlotBits::default());
    slots.for_each(|slot| bits[slot as usize / 64] |= 1 << (slot % 64));
    bits
}
