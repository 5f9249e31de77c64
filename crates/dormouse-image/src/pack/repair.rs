//! Writes a pack again under the same id, with the blocks of damaged frames put in from elsewhere.
//!
//! A frame that cannot be read and for which not every block is to be had is copied as it lies
//! there: it stays damaged, in its place, and whoever wants to look at its bytes still can.

use std::io::Write;

use super::dropped::Dropped;
use super::frame::EncodedFrame;
use super::layout::PackParams;
use super::reader::PackReader;
use super::segment::{FramePlace, SEGMENT_SLOTS, Segment};
use super::toc::{NodeEntry, SegmentEntry, Toc};
use super::writer::{FinishedPack, NODE_CODEC, Output};
use crate::block::BLOCK_BYTES;
use crate::codec::{Codec, Decoder, Encoder};
use crate::digest::{Digest, DomainKey};
use crate::error::{Error, Result};

/// What became of mending a pack.
#[derive(Clone, Debug)]
pub struct RepairedPack {
    /// The pack as it is now.
    pub finished: FinishedPack,

    /// Slots of frames that were made again.
    pub mended: Vec<u32>,

    /// Slots of frames that are as damaged as they were.
    pub lost: Vec<u32>,
}

/// Copies `pack`, whose table and segments must be sound, to `sink`. For each block of a frame that
/// cannot be read `find` is asked; what it gives is taken if it has the block's digest. Nodes that
/// cannot be read stay damaged as well.
pub fn repair_pack<W: Write>(
    pack: &PackReader,
    key: &DomainKey,
    codec: Codec,
    salt: u32,
    find: &mut dyn FnMut(u32, &Digest) -> Option<Vec<u8>>,
    sink: W,
) -> Result<(RepairedPack, W)> {
    let params = PackParams { salt, ..*pack.params() };
    params.check_key(key.id())?;
    let mut repair = Repair {
        pack,
        key,
        find,
        out: Output::begin(sink, &params)?,
        encoder: Encoder::new(codec)?,
        nodes: Encoder::new(NODE_CODEC)?,
        decoder: Decoder::new()?,
        mended: Vec::new(),
        lost: Vec::new(),
    };
    let old = pack.toc();
    repair.out.dropped(&Dropped::of(old, |_| true, |_| true))?;
    let mut toc = Toc { slots: old.slots, ..Toc::default() };
    for (number, entry) in old.segments.iter().enumerate() {
        toc.segments.push(repair.segment(number, entry)?);
    }
    for (number, entry) in (0_u32..).zip(&old.nodes) {
        toc.nodes.push(repair.node(number, entry)?);
    }
    let (mended, lost) = (repair.mended, repair.lost);
    let (finished, sink) = repair.out.finish(&params, toc)?;
    if finished.id != pack.id() {
        return Err(Error::corrupt("repaired pack id", finished.id, pack.id()));
    }
    Ok((RepairedPack { finished, mended, lost }, sink))
}

struct Repair<'a, W> {
    pack: &'a PackReader,
    key: &'a DomainKey,
    find: &'a mut dyn FnMut(u32, &Digest) -> Option<Vec<u8>>,
    out: Output<W>,
    encoder: Encoder,
    nodes: Encoder,
    decoder: Decoder,
    mended: Vec<u32>,
    lost: Vec<u32>,
}

impl<W: Write> Repair<'_, W> {
    fn segment(&mut self, number: usize, entry: &SegmentEntry) -> Result<SegmentEntry> {
        if entry.offset == 0 {
            return Ok(*entry);
        }
        let segment = self.pack.segment(number)?;
        let mut new = Segment {
            digests: segment.digests.clone(),
            frames: Vec::with_capacity(segment.frames()),
            present: segment.present.clone(),
        };
        for frame in 0..segment.frames() {
            new.frames.push(self.frame(number, &segment, frame)?);
        }
        self.out.segment(number, &new)
    }

    fn frame(&mut self, number: usize, segment: &Segment, frame: usize) -> Result<FramePlace> {
        match self.copy_frame(number, segment, frame) {
            Ok(place) => return Ok(place),
            Err(Copy::Damaged) => {}
            Err(Copy::Failed(error)) => return Err(error),
        }
        let base = u32::try_from(number).expect("at most 2^22 segments") * SEGMENT_SLOTS;
        let slots = segment.frame_slots(frame);
        let digests: Vec<Digest> =
            slots.iter().map(|&slot| segment.digests[slot as usize]).collect();
        let mut blocks = Vec::with_capacity(slots.len() * BLOCK_BYTES);
        for (&slot, digest) in slots.iter().zip(&digests) {
            let block = (self.find)(base + slot, digest)
                .filter(|block| block.len() == BLOCK_BYTES && self.key.digest(block) == *digest);
            let Some(block) = block else { return self.leave_frame(base, segment, frame) };
            blocks.extend_from_slice(&block);
        }
        let encoded = EncodedFrame::encode(&mut self.encoder, &blocks, digests)?;
        let list: Option<Vec<u16>> = segment.present.as_ref().map(|_| {
            slots.iter().map(|&slot| u16::try_from(slot).expect("below SEGMENT_SLOTS")).collect()
        });
        self.mended.extend(slots.iter().map(|slot| base + slot));
        self.out.frame(
            base + slots[0],
            list.as_deref(),
            encoded.encoding,
            slots.len(),
            &encoded.payload,
        )
    }

    /// Copies a sound frame; the other way to fail is that writing does.
    fn copy_frame(
        &mut self,
        number: usize,
        segment: &Segment,
        frame: usize,
    ) -> std::result::Result<FramePlace, Copy> {
        let damaged = |_| Copy::Damaged;
        let record = self.pack.frame_record(segment, frame).map_err(damaged)?;
        let old = self.pack.parse_frame(number, segment, frame, &record).map_err(damaged)?;
        self.pack
            .decode_frame(segment, frame, &old, self.key, &mut self.decoder)
            .map_err(damaged)?;
        self.out
            .frame(old.first_slot, old.slots.as_deref(), old.encoding, old.blocks, old.data)
            .map_err(Copy::Failed)
    }

    /// Copies a damaged frame's bytes; zeros if not even they can be read.
    fn leave_frame(&mut self, base: u32, segment: &Segment, frame: usize) -> Result<FramePlace> {
        self.lost.extend(segment.frame_slots(frame).iter().map(|slot| base + slot));
        let bytes = segment.frame_bytes(frame).unwrap_or(0);
        let record =
            self.pack.frame_record(segment, frame).unwrap_or_else(|_| vec![0; bytes as usize]);
        let offset = self.out.verbatim(&record)?;
        Ok(FramePlace { offset, bytes })
    }

    fn node(&mut self, number: u32, entry: &NodeEntry) -> Result<NodeEntry> {
        if entry.offset == 0 {
            return Ok(*entry);
        }
        match self.pack.node_bytes(number, &mut self.decoder) {
            Ok(raw) => {
                let (encoding, payload) = self.nodes.encode(&raw)?;
                self.out.node(number, encoding, payload, &raw)
            }
            Err(_) => {
                let record = self.pack.node_record(entry);
                let offset =
                    self.out.verbatim(&record.unwrap_or_else(|_| vec![0; entry.bytes as usize]))?;
                Ok(NodeEntry { offset, ..*entry })
            }
        }
    }
}

/// Why a frame was not copied.
enum Copy {
    Damaged,
    Failed(Error),
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::writer::PackWriter;
    use super::*;

    fn block(number: u8) -> Vec<u8> {
        let mut block = vec![number; BLOCK_BYTES];
        block[..8].copy_from_slice(&[number.wrapping_mul(31); 8]);
        block
    }

    #[test]
    fn damaged_frames_are_made_again_or_left() {
        let key = DomainKey::new([5; 32]);
        let mut encoder = Encoder::new(Codec::Zstd(1)).unwrap();
        let mut writer = PackWriter::new(Vec::new(), PackParams::new(key.id(), 1)).unwrap();
        for frame in 0..4_u8 {
            let numbers = frame * 16..frame * 16 + 16;
            let blocks: Vec<u8> = numbers.clone().flat_map(block).collect();
            let digests = numbers.map(|number| key.digest(&block(number))).collect();
            let frame = EncodedFrame::encode(&mut encoder, &blocks, digests).unwrap();
            writer.push_frame(&frame).unwrap();
        }
        let (finished, mut file) = writer.finish().unwrap();
        let sound = PackReader::open(Arc::new(file.clone()), 0, finished.bytes).unwrap();
        let segment = sound.segment(0).unwrap();
        for frame in [1, 3] {
            file[usize::try_from(sound.frame_offset(&segment, frame)).unwrap() + 40] ^= 4;
        }
        let pack = PackReader::open(Arc::new(file), 0, finished.bytes).unwrap();
        // One block of frame 3 is not to be had, and one of frame 1 is offered wrongly first.
        let mut find =
            |slot: u32, _: &Digest| (slot != 50).then(|| block(u8::try_from(slot).unwrap()));
        let (repaired, bytes) =
            repair_pack(&pack, &key, Codec::Zstd(1), 2, &mut find, Vec::new()).unwrap();
        assert_eq!(repaired.finished.id, finished.id);
        assert_eq!(repaired.mended, (16..32).collect::<Vec<_>>());
        assert_eq!(repaired.lost, (48..64).collect::<Vec<_>>());
        let again = PackReader::open(Arc::new(bytes), 0, repaired.finished.bytes).unwrap();
        let segment = again.segment(0).unwrap();
        let mut decoder = Decoder::new().unwrap();
        for frame in 0..4 {
            let read = again.frame(0, &segment, frame, &key, &mut decoder);
            assert_eq!(read.is_ok(), frame != 3);
        }
        let mut lie = |_: u32, _: &Digest| Some(block(99));
        let (repaired, _) =
            repair_pack(&pack, &key, Codec::Zstd(1), 2, &mut lie, Vec::new()).unwrap();
        assert_eq!((repaired.mended.len(), repaired.lost.len()), (0, 32));
    }
}
