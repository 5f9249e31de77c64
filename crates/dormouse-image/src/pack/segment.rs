//! Segments: the digests of 1,024 slots and the places of their frames.
//!
//! ```text
//! byte 0  slots      u16   s, 1 to 1,024
//!      2  frames     u16   f
//!      4  flags      u16   bit 0: some slots were dropped
//!      6  reserved   u16   0
//!      8  present    128 bytes, a bit per slot, lowest first; only with flag bit 0
//!         frames     f × (offset u64, bytes u32)
//!         digests    s × 16 bytes, also those of dropped slots: the pack's id covers them
//! ```
//!
//! The slots that are present are ranked in order; frame k holds ranks 16k to 16k+15. So no table
//! of slots is needed, neither in a new pack nor in one that was written again without dead slots.

use zerocopy::{FromBytes, IntoBytes};

use super::frame::{FRAME_BLOCKS, FRAME_BLOCKS_U32, FRAME_PAYLOAD_BYTES_MAX};
use super::layout::RECORD_HEADER_BYTES;
use crate::digest::{Digest, structure_hash};
use crate::error::{Error, Result};

/// Slots in a full segment: 4 MiB of blocks, 16 KiB of digests.
pub const SEGMENT_SLOTS: u32 = 1024;

/// Segments of a pack with 2³² slots.
pub(super) const SEGMENTS_MAX: u32 = 1 << 22;

/// Frames in a full segment.
pub const SEGMENT_FRAMES: usize = SEGMENT_SLOTS as usize / FRAME_BLOCKS;

/// The longest segment.
pub(super) const SEGMENT_BYTES_MAX: usize =
    8 + 128 + SEGMENT_FRAMES * 12 + SEGMENT_SLOTS as usize * 16;

/// The longest record of a frame.
const FRAME_RECORD_BYTES_MAX: usize = RECORD_HEADER_BYTES + FRAME_PAYLOAD_BYTES_MAX;

const FLAG_PARTIAL: u16 = 1;

/// Where a frame's record lies, from the start of the pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FramePlace {
    pub(super) offset: u64,
    pub(super) bytes: u32,
}

/// A bit for each slot of a segment.
pub(super) type SlotBits = [u64; SEGMENT_SLOTS as usize / 64];

/// Digests and frame places of up to 1,024 slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub(super) digests: Vec<Digest>,
    pub(super) frames: Vec<FramePlace>,
    /// `None` when all slots are there.
    pub(super) present: Option<Box<SlotBits>>,
}

impl Segment {
    /// The digest of a slot, also of one that was dropped.
    pub fn digest(&self, slot: u32) -> Option<Digest> {
        self.digests.get(slot as usize).copied()
    }

    /// Slots in the segment.
    pub fn slots(&self) -> u32 {
        u32::try_from(self.digests.len()).expect("at most SEGMENT_SLOTS")
    }

    /// Slots whose blocks are in the file.
    pub fn live(&self) -> u32 {
        match &self.present {
            None => self.slots(),
            Some(bits) => bits.iter().map(|word| word.count_ones()).sum(),
        }
    }

    /// Frames that hold the blocks.
    pub fn frames(&self) -> usize {
        self.frames.len()
    }

    /// Bytes that a frame's record takes in the pack.
    pub fn frame_bytes(&self, frame: usize) -> Option<u32> {
        self.frames.get(frame).map(|place| place.bytes)
    }

    /// Whether the block of a slot is in the file.
    pub fn is_present(&self, slot: u32) -> bool {
        slot < self.slots()
            && self
                .present
                .as_ref()
                .is_none_or(|bits| bits[slot as usize / 64] >> (slot % 64) & 1 == 1)
    }

    /// The frame and the position in it of a slot's block, `None` if it was dropped.
    pub fn locate(&self, slot: u32) -> Option<(usize, usize)> {
        if !self.is_present(slot) {
            return None;
        }
        let rank = match &self.present {
            None => slot as usize,
            Some(bits) => {
                let word = slot as usize / 64;
                let below = bits[..word].iter().map(|word| word.count_ones()).sum::<u32>()
                    + (bits[word] & ((1 << (slot % 64)) - 1)).count_ones();
                below as usize
            }
        };
        Some((rank / FRAME_BLOCKS, rank % FRAME_BLOCKS))
    }

    /// How many slots from `slot` on are there without a gap, counted up to a frame's worth. Blocks
    /// that lie one behind the other in a frame belong to slots that run on only so far.
    pub fn run_from(&self, slot: u32) -> usize {
        (slot..self.slots()).take(FRAME_BLOCKS).take_while(|&slot| self.is_present(slot)).count()
    }

    /// The slots whose blocks a frame holds, in order.
    pub fn frame_slots(&self, frame: usize) -> Vec<u32> {
        if frame >= self.frames.len() {
            return Vec::new();
        }
        let first = u32::try_from(frame * FRAME_BLOCKS).expect("at most SEGMENT_SLOTS");
        let Some(bits) = &self.present else {
            return (first..self.slots().min(first + FRAME_BLOCKS_U32)).collect();
        };
        let mut slots = Vec::with_capacity(FRAME_BLOCKS);
        let mut rank = 0;
        for (word, base) in bits.iter().zip((0_u32..).step_by(64)) {
            let end = rank + word.count_ones();
            if end > first {
                let mut rest = *word;
                while rest != 0 && slots.len() < FRAME_BLOCKS {
                    if rank >= first {
                        slots.push(base + rest.trailing_zeros());
                    }
                    rest &= rest - 1;
                    rank += 1;
                }
            }
            if slots.len() == FRAME_BLOCKS {
                break;
            }
            rank = end;
        }
        slots
    }

    /// Bytes that the segment takes in memory.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Segment>()
            + self.digests.len() * 16
            + self.frames.len() * size_of::<FramePlace>()
            + self.present.as_ref().map_or(0, |bits| size_of_val(&**bits))
    }

    /// What the pack's id covers of this segment.
    pub(super) fn hash(&self) -> [u8; 16] {
        structure_hash([self.digests.as_bytes()])
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SEGMENT_BYTES_MAX);
        let short = |len: usize| u16::try_from(len).expect("at most SEGMENT_SLOTS").to_le_bytes();
        out.extend(short(self.digests.len()));
        out.extend(short(self.frames.len()));
        out.extend(if self.present.is_some() { FLAG_PARTIAL } else { 0 }.to_le_bytes());
        out.extend([0, 0]);
        if let Some(bits) = &self.present {
            bits.iter().for_each(|word| out.extend(word.to_le_bytes()));
        }
        for frame in &self.frames {
            out.extend(frame.offset.to_le_bytes());
            out.extend(frame.bytes.to_le_bytes());
        }
        out.extend(self.digests.as_bytes());
        out
    }

    /// Reads a segment of a pack whose records end at `records_end`.
    pub(super) fn decode(bytes: &[u8], records_end: u64) -> Result<Segment> {
        let corrupt = |got: String, expected: &str| Error::corrupt("segment", got, expected);
        let Some((head, rest)) = bytes.split_at_checked(8) else {
            return Err(corrupt(format!("{} bytes", bytes.len()), "at least 8"));
        };
        let short = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let (slots, frames, flags) = (u32::from(short(0)), usize::from(short(2)), short(4));
        if slots == 0 || slots > SEGMENT_SLOTS || flags & !FLAG_PARTIAL != 0 || short(6) != 0 {
            return Err(corrupt(
                format!("{slots} slots, flags {flags:#x}"),
                "1 to 1024 slots and known flags",
            ));
        }
        let (present, rest) = if flags & FLAG_PARTIAL != 0 {
            let Some((bits, rest)) = rest.split_at_checked(128) else {
                return Err(corrupt(format!("{} bytes", bytes.len()), "a bit for each slot"));
            };
            let mut words = Box::new(SlotBits::default());
            for (word, bytes) in words.iter_mut().zip(bits.as_chunks::<8>().0) {
                *word = u64::from_le_bytes(*bytes);
            }
            let beyond = (slots..SEGMENT_SLOTS)
                .any(|slot| words[slot as usize / 64] >> (slot % 64) & 1 == 1);
            if beyond {
                return Err(corrupt("slots past its end".to_owned(), "none"));
            }
            (Some(words), rest)
        } else {
            (None, rest)
        };
        if rest.len() != frames * 12 + slots as usize * 16 {
            return Err(corrupt(
                format!("{} bytes", bytes.len()),
                "as many as its frames and slots need",
            ));
        }
        let (places, digests) = rest.split_at(frames * 12);
        let places: Vec<FramePlace> = places
            .as_chunks::<12>()
            .0
            .iter()
            .map(|place| FramePlace {
                offset: u64::from_le_bytes([
                    place[0], place[1], place[2], place[3], place[4], place[5], place[6], place[7],
                ]),
                bytes: u32::from_le_bytes([place[8], place[9], place[10], place[11]]),
            })
            .collect();
        for place in &places {
            let end = place.offset.checked_add(u64::from(place.bytes));
            if end.is_none_or(|end| end > records_end)
                || place.bytes as usize > FRAME_RECORD_BYTES_MAX
            {
                return Err(corrupt(
                    format!("a frame of {} bytes at {}", place.bytes, place.offset),
                    "one inside the pack",
                ));
            }
        }
        let digests = <[Digest]>::ref_from_bytes(digests)
            .map_err(|_| corrupt(format!("{} bytes", digests.len()), "whole digests"))?
            .to_vec();
        let segment = Segment { digests, frames: places, present };
        if segment.frames.len() != (segment.live() as usize).div_ceil(FRAME_BLOCKS) {
            return Err(corrupt(
                format!("{} frames for {} blocks", segment.frames.len(), segment.live()),
                "a frame for each 16 blocks",
            ));
        }
        Ok(segment)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn segment(slots: u32, present: Option<&[u32]>) -> Segment {
        let live = present.map_or(slots as usize, <[u32]>::len);
        Segment {
            digests: (0..slots).map(|slot| Digest([slot.to_le_bytes()[0]; 16])).collect(),
            frames: (0..live.div_ceil(FRAME_BLOCKS) as u64)
                .map(|frame| FramePlace { offset: 72 + frame * 100, bytes: 100 })
                .collect(),
            present: present.map(|present| {
                let mut bits = Box::new(SlotBits::default());
                present.iter().for_each(|&slot| bits[slot as usize / 64] |= 1 << (slot % 64));
                bits
            }),
        }
    }

    /// The simplest rank: the place of the slot in the list of those that are there.
    fn check_against_list(segment: &Segment, present: &[u32]) {
        for slot in 0..SEGMENT_SLOTS + 70 {
            let rank = present.iter().position(|&at| at == slot);
            assert_eq!(segment.locate(slot), rank.map(|rank| (rank / 16, rank % 16)), "{slot}");
            assert_eq!(segment.is_present(slot), rank.is_some());
            let run = (slot..).take(16).take_while(|at| present.contains(at)).count();
            assert_eq!(segment.run_from(slot), run);
        }
        for frame in 0..=segment.frames() {
            let expected: Vec<u32> = present.iter().copied().skip(frame * 16).take(16).collect();
            assert_eq!(segment.frame_slots(frame), expected);
        }
        assert_eq!(segment.frame_slots(usize::MAX), []);
        assert_eq!(segment.live() as usize, present.len());
    }

    #[test]
    fn whole_segments_rank_their_slots() {
        for slots in [1, 15, 16, 17, 63, 64, 65, 1023, 1024] {
            let segment = segment(slots, None);
            check_against_list(&segment, &(0..slots).collect::<Vec<_>>());
            assert_eq!(Segment::decode(&segment.encode(), 1 << 20).unwrap(), segment);
        }
    }

    proptest! {
        #[test]
        fn partial_segments_rank_their_slots(
            slots in 1_u32..=SEGMENT_SLOTS,
            seed in prop::collection::btree_set(0..SEGMENT_SLOTS, 1..300),
        ) {
            let present: Vec<u32> = seed.into_iter().filter(|&slot| slot < slots).collect();
            let segment = segment(slots, Some(&present));
            check_against_list(&segment, &present);
            prop_assert_eq!(Segment::decode(&segment.encode(), 1 << 20).unwrap(), segment);
        }
    }

    #[test]
    fn hostile_segments_are_refused() {
        let sound = segment(40, Some(&[0, 17, 39])).encode();
        Segment::decode(&sound, 1 << 20).unwrap();
        let cases: [(&str, usize, u8); 7] = [
            ("no slots", 0, 0),
            ("another number of slots", 0, 41),
            ("too many slots", 1, 0xff),
            ("too many frames", 2, 2),
            ("an unknown flag", 4, 3),
            ("a reserved byte", 6, 1),
            ("a slot past the end", 8 + 40 / 8, 1),
        ];
        for (what, at, value) in cases {
            let mut bytes = sound.clone();
            bytes[at] = value;
            Segment::decode(&bytes, 1 << 20).expect_err(what);
        }
        Segment::decode(&sound, 171).expect_err("a frame past the end");
        for len in 0..sound.len() {
            Segment::decode(&sound[..len], 1 << 20).unwrap_err();
        }
    }
}
