//! Rebuilds a pack whose table of contents, footer, header or segments are damaged, by walking its
//! records. Digests of a lost segment are made again from its blocks, which takes the key.
//!
//! What a rewrite dropped as a whole leaves only a hash, in the table of contents and in the record
//! behind the header: such a pack can be rebuilt as long as one of the two is sound.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use super::dropped::Dropped;
use super::frame::FrameRecord;
use super::id::PackId;
use super::layout::{
    FOOTER_BYTES, Footer, HEADER_BYTES, Header, PackParams, RECORD_HEADER_BYTES, RECORD_HEADER_U32,
    RECORD_MAGIC, RecordHeader, RecordKind,
};
use super::reader::ReadAt;
use super::segment::{SEGMENT_SLOTS, SEGMENTS_MAX, Segment};
use super::toc::{SegmentEntry, Toc};
use super::writer::{FinishedPack, Output, slot_bits};
use crate::block::BLOCK_BYTES;
use crate::codec::Decoder;
use crate::digest::{Digest, DomainKey};
use crate::error::{Error, Result};

/// How much is searched at a time for the next record after damage.
const SEARCH_BYTES: usize = 64 << 10;

/// The least that a disk fails to read.
const SECTOR_BYTES: u64 = 512;

/// Writes a sound copy of the pack `expected` from what can still be read of the `bytes` bytes of
/// `file` from `start` on. Places that cannot be read count as damaged. Fails if the copy would not
/// have that id: a frame, a node, a segment that lost slots when the pack was written again, or all
/// that was said of what was dropped then is lost for good.
pub fn rebuild_pack<W: Write>(
    file: &Arc<dyn ReadAt>,
    start: u64,
    bytes: u64,
    expected: PackId,
    key: &DomainKey,
    sink: W,
) -> Result<(FinishedPack, W)> {
    let region = Region { file: &**file, start, bytes };
    let params = region.params(key)?;
    let mut found = Found::default();
    region.for_each_record(params.salt, &mut |offset, header, record| {
        found.add(offset, header, record, params.salt);
    });
    let dropped = found.dropped();
    let mut out = Output::begin(sink, &params)?;
    out.dropped(&dropped)?;
    let mut toc = Toc::default();
    let mut decoder = Decoder::new()?;
    for number in 0..found.segment_count().max(dropped.segment_count()) {
        let (entry, slots) = match dropped.segment(number) {
            Some(dropped) => dropped,
            None => rebuild_segment(&region, &params, key, number, &found, &mut decoder, &mut out)?,
        };
        toc.slots = toc
            .slots
            .checked_add(slots)
            .ok_or_else(|| Error::corrupt("pack", "2^32 slots", "fewer"))?;
        toc.segments.push(entry);
    }
    for number in 0..found.node_count().max(dropped.node_count()) {
        if let Some(entry) = dropped.node(number) {
            toc.nodes.push(entry);
            continue;
        }
        let Some(&(offset, bytes)) = found.nodes.get(&number) else {
            return Err(Error::missing("node", "nothing", number));
        };
        let record = region.read(offset, bytes as usize)?;
        let (header, payload) = RecordHeader::open(&record, params.salt, RecordKind::Node)?;
        let mut raw = vec![0; header.raw_bytes as usize];
        decoder.decode(header.encoding, payload, &mut raw)?;
        toc.nodes.push(out.node(number, header.encoding, payload, &raw)?);
    }
    let (finished, sink) = out.finish(&params, toc)?;
    if finished.id != expected {
        return Err(Error::corrupt("rebuilt pack id", finished.id, expected));
    }
    Ok((finished, sink))
}

fn rebuild_segment<W: Write>(
    region: &Region<'_>,
    params: &PackParams,
    key: &DomainKey,
    number: u32,
    found: &Found,
    decoder: &mut Decoder,
    out: &mut Output<W>,
) -> Result<(SegmentEntry, u32)> {
    let mut digests: BTreeMap<u32, Digest> = BTreeMap::new();
    let mut places = Vec::new();
    let base = number * SEGMENT_SLOTS;
    for &(offset, bytes) in found.frames.range(base..=base + (SEGMENT_SLOTS - 1)).map(|at| at.1) {
        let record = region.read(offset, bytes as usize)?;
        let frame = FrameRecord::parse(&record, params.salt)?;
        let decoded = frame.decode(decoder)?;
        let within = frame.first_slot % SEGMENT_SLOTS;
        for (position, block) in (0_u32..).zip(decoded.chunks_exact(BLOCK_BYTES)) {
            let slot = match &frame.slots {
                Some(slots) => u32::from(slots[position as usize]),
                None => within + position,
            };
            digests.insert(slot, key.digest(block));
        }
        places.push(out.frame(
            frame.first_slot,
            frame.slots.as_deref(),
            frame.encoding,
            frame.blocks,
            frame.data,
        )?);
    }
    let old = found.segments.get(&number);
    let segment = match old {
        Some(old) => {
            let sound = digests.iter().all(|(&slot, digest)| old.digest(slot) == Some(*digest));
            if !sound || digests.len() != old.live() as usize {
                return Err(Error::missing("frame of segment", digests.len(), old.live()));
            }
            Segment {
                digests: old.digests.clone(),
                frames: places,
                present: old.present.as_ref().map(|_| slot_bits(digests.keys().copied())),
            }
        }
        None => {
            let whole = (0_u32..).zip(digests.keys()).all(|(at, &slot)| at == slot);
            if digests.is_empty() || !whole {
                return Err(Error::missing("segment", "only some of its frames", number));
            }
            Segment { digests: digests.into_values().collect(), frames: places, present: None }
        }
    };
    let slots = segment.slots();
    Ok((out.segment(number as usize, &segment)?, slots))
}

/// The sound records of a pack, by their numbers.
#[derive(Default)]
struct Found {
    /// By first slot: where a damaged region shows one frame twice, it counts once.
    frames: BTreeMap<u32, (u64, u32)>,
    segments: BTreeMap<u32, Segment>,
    nodes: BTreeMap<u32, (u64, u32)>,
    toc: Option<Toc>,
    dropped: Option<Dropped>,
}

impl Found {
    fn add(&mut self, offset: u64, header: &RecordHeader, record: &[u8], salt: u32) {
        let bytes = header.stored_bytes + RECORD_HEADER_U32;
        let body = RecordHeader::open(record, salt, header.kind).map(|(_, body)| body);
        match header.kind {
            RecordKind::Frame => {
                self.frames.insert(header.index, (offset, bytes));
            }
            RecordKind::Segment => {
                if let Ok(segment) = body.and_then(|body| Segment::decode(body, offset))
                    && header.index < SEGMENTS_MAX
                {
                    self.segments.insert(header.index, segment);
                }
            }
            RecordKind::Node => {
                self.nodes.insert(header.index, (offset, bytes));
            }
            RecordKind::Toc => {
                self.toc = body.and_then(|body| Toc::decode(body, offset)).ok().or(self.toc.take());
            }
            RecordKind::Dropped => {
                self.dropped = body.and_then(Dropped::decode).ok().or(self.dropped.take());
            }
        }
    }

    fn segment_count(&self) -> u32 {
        let frames = self.frames.last_key_value().map(|(slot, _)| slot / SEGMENT_SLOTS + 1);
        let segments = self.segments.last_key_value().map(|(number, _)| number + 1);
        frames.max(segments).unwrap_or(0)
    }

    fn node_count(&self) -> u32 {
        self.nodes.last_key_value().map_or(0, |(&number, _)| number.saturating_add(1))
    }

    /// What is not in the file as a whole, and how much there would be: the table of contents
    /// says it, and so does the record that a rewrite leaves.
    fn dropped(&self) -> Dropped {
        match (&self.toc, &self.dropped) {
            (Some(toc), _) => Dropped::of(toc, |_| true, |_| true),
            (None, Some(dropped)) => dropped.clone(),
            (None, None) => Dropped::default(),
        }
    }
}

/// The bytes of one pack in a file.
struct Region<'a> {
    file: &'a dyn ReadAt,
    start: u64,
    bytes: u64,
}

impl Region<'_> {
    /// The parameters, from the header or else from the footer or a record, and the key.
    fn params(&self, key: &DomainKey) -> Result<PackParams> {
        if self.bytes < (HEADER_BYTES + FOOTER_BYTES) as u64 {
            return Err(Error::corrupt("pack length", self.bytes, "a header and a footer"));
        }
        // A header or footer that cannot be read is as good as a damaged one.
        let header = self.read(0, HEADER_BYTES).and_then(|bytes| Header::parse(&bytes));
        if let Ok(params) = header {
            params.check_key(key.id())?;
            return Ok(params);
        }
        let footer = self
            .read(self.bytes - FOOTER_BYTES as u64, FOOTER_BYTES)
            .and_then(|bytes| Footer::parse(&bytes, self.bytes));
        if let Ok(footer) = footer {
            return Ok(PackParams::new(key.id(), footer.salt));
        }
        // Records come first after the header; take the salt that the first one claims.
        let head = self.read(HEADER_BYTES as u64, RECORD_HEADER_BYTES)?;
        let salt = u32::from_le_bytes([head[20], head[21], head[22], head[23]]);
        RecordHeader::parse(&head, salt)?;
        Ok(PackParams::new(key.id(), salt))
    }

    fn for_each_record(&self, salt: u32, visit: &mut dyn FnMut(u64, &RecordHeader, &[u8])) {
        let mut at = HEADER_BYTES as u64;
        let end = self.bytes;
        while at + RECORD_HEADER_BYTES as u64 <= end {
            match self.record_at(at, end, salt) {
                Some((header, record)) => {
                    visit(at, &header, &record);
                    at += record.len() as u64;
                }
                None => at = self.search(at + 1, end),
            }
        }
    }

    /// The record at `at` if a whole and sound one can be read there.
    fn record_at(&self, at: u64, end: u64, salt: u32) -> Option<(RecordHeader, Vec<u8>)> {
        let head = self.read(at, RECORD_HEADER_BYTES).ok()?;
        let header = RecordHeader::parse(&head, salt).ok()?;
        let bytes = RECORD_HEADER_BYTES as u64 + u64::from(header.stored_bytes);
        if at + bytes > end {
            return None;
        }
        let record = self.read(at, usize::try_from(bytes).expect("limited by parse")).ok()?;
        let sound = RecordHeader::open(&record, salt, header.kind).is_ok();
        sound.then_some((header, record))
    }

    /// The next place from `from` on where the magic of a record stands. Bytes that cannot be read
    /// are stepped over, [`SECTOR_BYTES`] at a time: what counts is the id in the end.
    fn search(&self, from: u64, end: u64) -> u64 {
        let mut at = from;
        while at + RECORD_HEADER_BYTES as u64 <= end {
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(SEARCH_BYTES);
            let step = SECTOR_BYTES - (self.start + at) % SECTOR_BYTES;
            let to_boundary = usize::try_from(step).expect("at most SECTOR_BYTES");
            let (window, step) = match self.read(at, len) {
                Ok(window) => (window, len as u64 - 3),
                Err(_) => match self.read(at, len.min(to_boundary)) {
                    // A magic across the boundary may be whole if the next sector is.
                    Ok(window) if step > 3 => (window, step - 3),
                    _ => match self.read(at, RECORD_MAGIC.len()) {
                        Ok(window) => (window, 1),
                        Err(_) => (Vec::new(), step),
                    },
                },
            };
            if let Some(found) = window.windows(4).position(|bytes| bytes == RECORD_MAGIC) {
                return at + found as u64;
            }
            at += step;
        }
        end
    }

    fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.file
            .read_exact_at(&mut bytes, self.start + offset)
            .map_err(|error| Error::io("pack", error).at(self.start + offset))?;
        Ok(bytes)
    }
}
