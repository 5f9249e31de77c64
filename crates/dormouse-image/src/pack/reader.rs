//! Reads a pack: its table of contents at once, the rest when asked for, all of it checked.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use super::frame::{DecodedFrame, FrameRecord, LazyFrame};
use super::id::PackId;
use super::layout::{
    FOOTER_BYTES, Footer, HEADER_BYTES, Header, PackParams, RECORD_HEADER_BYTES, RecordHeader,
    RecordKind,
};
use super::segment::{SEGMENT_SLOTS, Segment};
use super::toc::{NodeEntry, Toc};
use crate::block::BLOCK_BYTES;
use crate::codec::{Decoder, with_decoder};
use crate::digest::{DomainKey, structure_hash};
use crate::error::{Error, Result};
use crate::map::Node;

/// The end of a pack that is read at once: most tables of contents are inside it.
const TAIL_BYTES: u64 = 16 << 10;

/// Bytes that can be read at an offset.
pub trait ReadAt: Debug + Send + Sync {
    /// Fills `buf` from `offset`, or fails.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.get(offset..)?.get(..buf.len()))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

/// An open pack.
#[derive(Clone, Debug)]
pub struct PackReader {
    file: Arc<dyn ReadAt>,
    start: u64,
    records_end: u64,
    params: PackParams,
    toc: Arc<Toc>,
    id: PackId,
}

impl PackReader {
    /// Opens the pack that lies in `bytes` bytes of `file` from `start` on.
    pub fn open(file: Arc<dyn ReadAt>, start: u64, bytes: u64) -> Result<PackReader> {
        if bytes < (HEADER_BYTES + RECORD_HEADER_BYTES + FOOTER_BYTES) as u64 {
            return Err(Error::corrupt("pack length", bytes, "a header, a table and a footer"));
        }
        if start.checked_add(bytes).is_none() {
            return Err(Error::corrupt("pack length", bytes, "an end below 2^64").at(start));
        }
        let mut header = [0; HEADER_BYTES];
        read(&*file, start, &mut header)?;
        let params = Header::parse(&header).map_err(|error| error.at(start))?;
        let tail_bytes = bytes.min(TAIL_BYTES);
        let mut tail = vec![0; tail_bytes as usize];
        read(&*file, start + (bytes - tail_bytes), &mut tail)?;
        let (rest, footer) = tail.split_at(tail.len() - FOOTER_BYTES);
        let footer = Footer::parse(footer, bytes)
            .map_err(|error| error.at(start + bytes - FOOTER_BYTES as u64))?;
        let toc_bytes = usize::try_from(footer.toc_bytes).expect("limited by Footer::parse");
        let far;
        let record = match rest.len().checked_sub(toc_bytes) {
            Some(from) => &rest[from..],
            None => {
                let mut record = vec![0; toc_bytes];
                read(&*file, start + footer.toc_offset, &mut record)?;
                far = record;
                &far
            }
        };
        let toc_at = start + footer.toc_offset;
        let (_, body) = RecordHeader::open(record, params.salt, RecordKind::Toc)
            .map_err(|error| error.at(toc_at))?;
        let toc = Toc::decode(body, footer.toc_offset).map_err(|error| error.at(toc_at))?;
        let id = toc.pack_id(&params);
        if id != footer.pack {
            return Err(Error::corrupt("pack id", id, footer.pack).at(toc_at));
        }
        let records_end = footer.toc_offset;
        Ok(PackReader { file, start, records_end, params, toc: Arc::new(toc), id })
    }

    /// The pack's name.
    pub fn id(&self) -> PackId {
        self.id
    }

    /// Algorithms and keys.
    pub fn params(&self) -> &PackParams {
        &self.params
    }

    /// The table of contents.
    pub fn toc(&self) -> &Toc {
        &self.toc
    }

    /// Bytes from the start of the pack to the end of its last record before the table.
    pub fn records_end(&self) -> u64 {
        self.records_end
    }

    /// Reads and checks the segment with number `number`.
    pub fn segment(&self, number: usize) -> Result<Segment> {
        let Some(entry) = self.toc.segments.get(number) else {
            return Err(Error::corrupt("segment number", number, self.toc.segments.len()));
        };
        if entry.offset == 0 {
            return Err(Error::missing("segment", "one that was dropped", number));
        }
        let record = self.record(entry.offset, entry.bytes)?;
        let at = self.start + entry.offset;
        let (header, body) = RecordHeader::open(&record, self.params.salt, RecordKind::Segment)
            .map_err(|error| error.at(at))?;
        let segment = Segment::decode(body, self.records_end).map_err(|error| error.at(at))?;
        let slots = self.toc.segment_slots(number);
        if header.index as usize != number
            || segment.slots() != slots
            || segment.live() != entry.live
        {
            return Err(Error::corrupt("segment number", header.index, number).at(at));
        }
        if segment.hash() != entry.hash {
            return Err(Error::corrupt("segment hash", "another", "that of the table").at(at));
        }
        Ok(segment)
    }

    /// Reads and checks the node with number `number`.
    pub fn node(&self, number: u32) -> Result<Node> {
        let raw = with_decoder(|decoder| self.node_bytes(number, decoder))?;
        Node::decode(&raw, self.id)
            .map_err(|error| error.at(self.start + self.toc.nodes[number as usize].offset))
    }

    /// The bytes of a node, checked but not taken apart.
    pub(super) fn node_bytes(&self, number: u32, decoder: &mut Decoder) -> Result<Vec<u8>> {
        let Some(entry) = self.toc.nodes.get(number as usize) else {
            return Err(Error::corrupt("node number", number, self.toc.nodes.len()));
        };
        if entry.offset == 0 {
            return Err(Error::missing("node", "one that was dropped", number));
        }
        let record = self.record(entry.offset, entry.bytes)?;
        let at = self.start + entry.offset;
        let (header, payload) = RecordHeader::open(&record, self.params.salt, RecordKind::Node)
            .map_err(|error| error.at(at))?;
        if header.index != number || header.raw_bytes != entry.raw_bytes {
            return Err(Error::corrupt("node number", header.index, number).at(at));
        }
        let mut raw = vec![0; entry.raw_bytes as usize];
        decoder.decode(header.encoding, payload, &mut raw).map_err(|error| error.at(at))?;
        if structure_hash([raw.as_slice()]) != entry.digest {
            return Err(Error::corrupt("node digest", "another", "that of the table").at(at));
        }
        Ok(raw)
    }

    /// Reads, decodes and checks frame `frame` of a segment: every block's digest is compared.
    pub fn frame(
        &self,
        number: usize,
        segment: &Segment,
        frame: usize,
        key: &DomainKey,
        decoder: &mut Decoder,
    ) -> Result<DecodedFrame> {
        self.params.check_key(key.id())?;
        decoder.with_record(|decoder, record| {
            let record = self.read_frame_record(segment, frame, record)?;
            let parsed = self.parse_frame(number, segment, frame, record)?;
            self.decode_frame(segment, frame, &parsed, key, decoder)
        })
    }

    /// Reads and decodes frame `frame` of a segment, whose blocks are checked when they are asked
    /// for, with the same key.
    pub fn lazy_frame(
        &self,
        number: usize,
        segment: &Segment,
        frame: usize,
        key: &DomainKey,
        decoder: &mut Decoder,
    ) -> Result<LazyFrame> {
        self.params.check_key(key.id())?;
        let at = self.frame_offset(segment, frame);
        let bytes = decoder.with_record(|decoder, record| {
            let record = self.read_frame_record(segment, frame, record)?;
            let parsed = self.parse_frame(number, segment, frame, record)?;
            parsed.decode(decoder).map_err(|error| error.at(at))
        })?;
        let slots = segment.frame_slots(frame);
        let digests = slots.iter().map(|&slot| segment.digests[slot as usize]).collect();
        Ok(LazyFrame::new(bytes, digests, at))
    }

    /// Decodes a frame that was taken apart and compares every block's digest.
    pub(super) fn decode_frame(
        &self,
        segment: &Segment,
        frame: usize,
        parsed: &FrameRecord<'_>,
        key: &DomainKey,
        decoder: &mut Decoder,
    ) -> Result<DecodedFrame> {
        self.params.check_key(key.id())?;
        let at = self.frame_offset(segment, frame);
        let bytes = parsed.decode(decoder).map_err(|error| error.at(at))?;
        let slots = segment.frame_slots(frame);
        let (blocks, _) = bytes.as_chunks::<BLOCK_BYTES>();
        let mut wrong = None;
        key.digest_each(blocks.iter().zip(&slots), |&slot, got| {
            let expected = segment.digests[slot as usize];
            if got != expected {
                wrong = wrong.or(Some((got, expected)));
            }
        });
        match wrong {
            None => Ok(DecodedFrame::new(bytes)),
            Some((got, expected)) => Err(Error::corrupt("block digest", got, expected).at(at)),
        }
    }

    /// Where a frame's record begins in the file.
    pub fn frame_offset(&self, segment: &Segment, frame: usize) -> u64 {
        self.start + segment.frames.get(frame).map_or(0, |place| place.offset)
    }

    /// The bytes of a frame's record.
    pub(super) fn frame_record(&self, segment: &Segment, frame: usize) -> Result<Vec<u8>> {
        let mut record = Vec::new();
        self.read_frame_record(segment, frame, &mut record)?;
        Ok(record)
    }

    /// Reads a frame's record to the beginning of `buf`, which grows to the longest one.
    fn read_frame_record<'a>(
        &self,
        segment: &Segment,
        frame: usize,
        buf: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        let Some(place) = segment.frames.get(frame) else {
            return Err(Error::corrupt("frame number", frame, segment.frames.len()));
        };
        let bytes = place.bytes as usize;
        if buf.len() < bytes {
            buf.resize(bytes, 0);
        }
        read(&*self.file, self.start + place.offset, &mut buf[..bytes])?;
        Ok(&buf[..bytes])
    }

    /// The bytes of a node's record.
    pub(super) fn node_record(&self, entry: &NodeEntry) -> Result<Vec<u8>> {
        self.record(entry.offset, entry.bytes)
    }

    /// Takes a frame's record apart and checks that it is the one that belongs there.
    pub(super) fn parse_frame<'a>(
        &self,
        number: usize,
        segment: &Segment,
        frame: usize,
        record: &'a [u8],
    ) -> Result<FrameRecord<'a>> {
        let at = self.frame_offset(segment, frame);
        let parsed = FrameRecord::parse(record, self.params.salt).map_err(|error| error.at(at))?;
        let slots = segment.frame_slots(frame);
        let base = u32::try_from(number).ok().and_then(|number| number.checked_mul(SEGMENT_SLOTS));
        let first = base.and_then(|base| slots.first()?.checked_add(base));
        if !parsed.holds(&slots) || Some(parsed.first_slot) != first {
            return Err(Error::corrupt(
                "frame",
                format_args!("{} blocks from slot {}", parsed.blocks, parsed.first_slot),
                format_args!("{} blocks from slot {first:?}", slots.len()),
            )
            .at(at));
        }
        Ok(parsed)
    }

    fn record(&self, offset: u64, bytes: u32) -> Result<Vec<u8>> {
        let mut record = vec![0; bytes as usize];
        read(&*self.file, self.start + offset, &mut record)?;
        Ok(record)
    }
}

fn read(file: &dyn ReadAt, offset: u64, buf: &mut [u8]) -> Result<()> {
    file.read_exact_at(buf, offset).map_err(|error| Error::io("pack", error).at(offset))
}
