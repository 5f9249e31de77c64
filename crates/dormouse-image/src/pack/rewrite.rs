//! Writes a pack again under the same id, without the slots and nodes that nothing refers to.

use std::io::Write;

use super::dropped::Dropped;
use super::frame::{EncodedFrame, FRAME_BLOCKS};
use super::layout::PackParams;
use super::reader::PackReader;
use super::segment::{SEGMENT_SLOTS, Segment};
use super::toc::{NodeEntry, SegmentEntry, Toc};
use super::writer::{FinishedPack, NODE_CODEC, Output, slot_bits};
use crate::block::BLOCK_BYTES;
use crate::codec::{Codec, Decoder, Encoder};
use crate::digest::DomainKey;
use crate::error::{Error, Result};

/// What of a pack is referred to.
#[derive(Clone, Debug, Default)]
pub struct Live {
    slots: Vec<u64>,
    nodes: Vec<u64>,
}

impl Live {
    /// Nothing yet.
    pub fn new() -> Live {
        Live::default()
    }

    /// Everything in a pack.
    pub fn all(toc: &Toc) -> Live {
        let mut live = Live::new();
        live.add_slots(0, toc.slots);
        (0..u32::try_from(toc.nodes.len()).expect("node numbers have 32 bits"))
            .for_each(|node| live.add_node(node));
        live
    }

    /// Everything of a pack that is in its file.
    pub fn present(pack: &PackReader) -> Result<Live> {
        let mut live = Live::new();
        let toc = pack.toc();
        for (number, entry) in toc.segments.iter().enumerate() {
            let base = u32::try_from(number).expect("at most 2^22 segments") * SEGMENT_SLOTS;
            let slots = toc.segment_slots(number);
            if entry.live == slots {
                live.add_slots(base, slots);
            } else if entry.offset != 0 {
                let segment = pack.segment(number)?;
                (0..slots)
                    .filter(|&slot| segment.is_present(slot))
                    .for_each(|slot| live.add_slots(base + slot, 1));
            }
        }
        for (number, entry) in (0_u32..).zip(&toc.nodes) {
            if entry.offset != 0 {
                live.add_node(number);
            }
        }
        Ok(live)
    }

    /// Whether everything that is marked here is marked in `other`, too.
    pub fn is_subset(&self, other: &Live) -> bool {
        let inside = |these: &[u64], those: &[u64]| {
            let rest = those.iter().copied().chain(std::iter::repeat(0));
            these.iter().zip(rest).all(|(this, that)| this & !that == 0)
        };
        inside(&self.slots, &other.slots) && inside(&self.nodes, &other.nodes)
    }

    /// Marks `len` slots from `first` on.
    pub fn add_slots(&mut self, first: u32, len: u32) {
        let end = first as usize + len as usize;
        if self.slots.len() * 64 < end {
            self.slots.resize(end.div_ceil(64), 0);
        }
        let mut at = first as usize;
        while at < end {
            let word = at / 64;
            let upto = end.min((word + 1) * 64);
            let bits = upto - at;
            let mask = if bits == 64 { u64::MAX } else { ((1 << bits) - 1) << (at % 64) };
            self.slots[word] |= mask;
            at = upto;
        }
    }

    /// Marks a node.
    pub fn add_node(&mut self, node: u32) {
        let word = node as usize / 64;
        if self.nodes.len() <= word {
            self.nodes.resize(word + 1, 0);
        }
        self.nodes[word] |= 1 << (node % 64);
    }

    /// Whether a slot is marked.
    pub fn has_slot(&self, slot: u32) -> bool {
        self.slots.get(slot as usize / 64).is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    /// Whether a node is marked.
    pub fn has_node(&self, node: u32) -> bool {
        self.nodes.get(node as usize / 64).is_some_and(|word| word >> (node % 64) & 1 == 1)
    }

    /// Whether a slot of the segment is marked.
    fn has_segment(&self, segment: u32) -> bool {
        const WORDS: usize = SEGMENT_SLOTS as usize / 64;
        let words = self.slots.iter().skip(segment as usize * WORDS).take(WORDS);
        words.copied().any(|word| word != 0)
    }

    /// Fails if something is marked that a pack with this table never had: it was meant for another.
    fn check(&self, toc: &Toc) -> Result<()> {
        let end = |words: &[u64]| {
            let last = words.iter().rposition(|&word| word != 0);
            last.map_or(0, |word| word * 64 + 64 - words[word].leading_zeros() as usize)
        };
        if end(&self.slots) > toc.slots as usize {
            return Err(Error::missing(
                "slot",
                end(&self.slots) - 1,
                format_args!("below {}", toc.slots),
            ));
        }
        if end(&self.nodes) > toc.nodes.len() {
            let nodes = toc.nodes.len();
            return Err(Error::missing(
                "node",
                end(&self.nodes) - 1,
                format_args!("below {nodes}"),
            ));
        }
        Ok(())
    }

    /// How many slots are marked.
    pub fn slots(&self) -> u64 {
        self.slots.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// Copies the live part of `pack` to `sink`. Fails if something live is not in the pack. Segments that lose nothing are copied as they are;
/// in others the blocks that stay are checked, regrouped and compressed again with `codec`.
pub fn rewrite_pack<W: Write>(
    pack: &PackReader,
    live: &Live,
    key: &DomainKey,
    codec: Codec,
    salt: u32,
    sink: W,
) -> Result<(FinishedPack, W)> {
    let params = PackParams { salt, ..*pack.params() };
    params.check_key(key.id())?;
    live.check(pack.toc())?;
    let mut rewrite = Rewrite {
        pack,
        key,
        out: Output::begin(sink, &params)?,
        encoder: Encoder::new(codec)?,
        nodes: Encoder::new(NODE_CODEC)?,
        decoder: Decoder::new()?,
    };
    let old = pack.toc();
    rewrite.out.dropped(&Dropped::of(
        old,
        |segment| live.has_segment(segment),
        |node| live.has_node(node),
    ))?;
    let mut toc = Toc { slots: old.slots, ..Toc::default() };
    for (number, entry) in old.segments.iter().enumerate() {
        toc.segments.push(rewrite.segment(number, entry, live)?);
    }
    for (number, entry) in (0_u32..).zip(&old.nodes) {
        toc.nodes.push(rewrite.node(number, entry, live)?);
    }
    let (finished, sink) = rewrite.out.finish(&params, toc)?;
    if finished.id != pack.id() {
        return Err(Error::corrupt("rewritten pack id", finished.id, pack.id()));
    }
    Ok((finished, sink))
}

struct Rewrite<'a, W> {
    pack: &'a PackReader,
    key: &'a DomainKey,
    out: Output<W>,
    encoder: Encoder,
    nodes: Encoder,
    decoder: Decoder,
}

impl<W: Write> Rewrite<'_, W> {
    fn segment(
        &mut self,
        number: usize,
        entry: &SegmentEntry,
        live: &Live,
    ) -> Result<SegmentEntry> {
        let base = u32::try_from(number).expect("at most 2^22 segments") * SEGMENT_SLOTS;
        let slots = self.pack.toc().segment_slots(number);
        let wanted = (0..slots).filter(|slot| live.has_slot(base + slot)).count();
        if wanted == 0 || entry.offset == 0 {
            if wanted > 0 {
                return Err(Error::missing("segment", "one that was dropped", number));
            }
            return Ok(SegmentEntry::dropped(entry.hash));
        }
        let segment = self.pack.segment(number)?;
        let keep: Vec<u32> = (0..slots).filter(|slot| live.has_slot(base + slot)).collect();
        if let Some(lost) = keep.iter().find(|&&slot| !segment.is_present(slot)) {
            return Err(Error::missing("slot", "one that was dropped", base + lost));
        }
        let mut new =
            Segment { digests: segment.digests.clone(), frames: Vec::new(), present: None };
        if keep.len() == segment.live() as usize {
            new.present.clone_from(&segment.present);
            for frame in 0..segment.frames() {
                let record = self.pack.frame_record(&segment, frame)?;
                let old = self.pack.parse_frame(number, &segment, frame, &record)?;
                // Decoding checks the digests: damage must not be copied into a fresh checksum.
                self.pack.decode_frame(&segment, frame, &old, self.key, &mut self.decoder)?;
                let place = self.out.frame(
                    old.first_slot,
                    old.slots.as_deref(),
                    old.encoding,
                    old.blocks,
                    old.data,
                )?;
                new.frames.push(place);
            }
        } else {
            new.present = Some(slot_bits(keep.iter().copied()));
            self.regroup(number, base, &segment, &keep, &mut new)?;
        }
        self.out.segment(number, &new)
    }

    fn regroup(
        &mut self,
        number: usize,
        base: u32,
        segment: &Segment,
        keep: &[u32],
        new: &mut Segment,
    ) -> Result<()> {
        let mut decoded = None;
        for slots in keep.chunks(FRAME_BLOCKS) {
            let mut blocks = Vec::with_capacity(slots.len() * BLOCK_BYTES);
            for &slot in slots {
                let Some((frame, position)) = segment.locate(slot) else {
                    return Err(Error::missing("slot", "one that was dropped", base + slot));
                };
                let current = match decoded.take() {
                    Some((at, bytes)) if at == frame => (at, bytes),
                    _ => {
                        let bytes =
                            self.pack.frame(number, segment, frame, self.key, &mut self.decoder)?;
                        (frame, bytes)
                    }
                };
                blocks.extend_from_slice(current.1.block(position));
                decoded = Some(current);
            }
            let digests = slots.iter().map(|&slot| segment.digests[slot as usize]).collect();
            let encoded = EncodedFrame::encode(&mut self.encoder, &blocks, digests)?;
            let list: Vec<u16> = slots
                .iter()
                .map(|&slot| u16::try_from(slot).expect("below SEGMENT_SLOTS"))
                .collect();
            let place = self.out.frame(
                base + slots[0],
                Some(&list),
                encoded.encoding,
                slots.len(),
                &encoded.payload,
            )?;
            new.frames.push(place);
        }
        Ok(())
    }

    fn node(&mut self, number: u32, entry: &NodeEntry, live: &Live) -> Result<NodeEntry> {
        if !live.has_node(number) || entry.offset == 0 {
            if live.has_node(number) {
                return Err(Error::missing("node", "one that was dropped", number));
            }
            return Ok(NodeEntry::dropped(entry.digest));
        }
        let raw = self.pack.node_bytes(number, &mut self.decoder)?;
        let (encoding, payload) = self.nodes.encode(&raw)?;
        self.out.node(number, encoding, payload, &raw)
    }
}
