//! Frames: up to 16 blocks compressed together.
//!
//! 64 KiB is where RAM stops compressing better, and it is the window in which a waking guest's
//! faults are served; one page at a time would cost half the ratio.

use std::ops::Range;
use std::sync::atomic::{AtomicU16, Ordering};

use super::layout::{RECORD_HEADER_BYTES, RecordHeader, RecordKind};
use super::segment::SEGMENT_SLOTS;
use crate::block::BLOCK_BYTES;
use crate::codec::{Decoder, Encoder, Encoding};
use crate::digest::{Digest, DomainKey};
use crate::error::{Error, Result};

/// Blocks in a full frame.
pub const FRAME_BLOCKS: usize = 16;

/// [`FRAME_BLOCKS`] for arithmetic on slots.
pub(super) const FRAME_BLOCKS_U32: u32 = 16;

const _: () = assert!(FRAME_BLOCKS_U32 as usize == FRAME_BLOCKS);

/// Bytes of a full frame, decoded.
pub const FRAME_BYTES: usize = FRAME_BLOCKS * BLOCK_BYTES;

/// The longest payload of a frame: a list of slots, and blocks that do not compress.
pub(super) const FRAME_PAYLOAD_BYTES_MAX: usize = FRAME_BLOCKS * 2 + FRAME_BYTES;

/// A frame as it will be stored, with the digests of its blocks.
#[derive(Clone, Debug)]
pub struct EncodedFrame {
    pub(super) encoding: Encoding,
    pub(super) payload: Vec<u8>,
    pub(super) digests: Vec<Digest>,
}

impl EncodedFrame {
    /// Compresses whole blocks, as many as there are digests, at most [`FRAME_BLOCKS`].
    pub fn encode(
        encoder: &mut Encoder,
        blocks: &[u8],
        digests: Vec<Digest>,
    ) -> Result<EncodedFrame> {
        assert!(
            blocks.len() == digests.len() * BLOCK_BYTES
                && (1..=FRAME_BLOCKS).contains(&digests.len()),
            "a frame has 1 to {FRAME_BLOCKS} blocks, each with its digest"
        );
        let (encoding, payload) = encoder.encode(blocks)?;
        Ok(EncodedFrame { encoding, payload: payload.to_vec(), digests })
    }

    /// Blocks in the frame.
    pub fn blocks(&self) -> usize {
        self.digests.len()
    }

    /// Bytes that the frame takes in a pack.
    pub fn stored_bytes(&self) -> usize {
        RECORD_HEADER_BYTES + self.payload.len()
    }
}

/// A frame's blocks, decoded and checked against their digests.
#[derive(Clone, Debug)]
pub struct DecodedFrame {
    bytes: Box<[u8]>,
}

impl DecodedFrame {
    pub(super) fn new(bytes: Box<[u8]>) -> DecodedFrame {
        DecodedFrame { bytes }
    }

    /// The block at `position` in the frame.
    pub fn block(&self, position: usize) -> &[u8] {
        &self.bytes[position * BLOCK_BYTES..][..BLOCK_BYTES]
    }

    /// All blocks, one behind the other.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Blocks in the frame.
    pub fn blocks(&self) -> usize {
        self.bytes.len() / BLOCK_BYTES
    }
}

/// A frame's blocks, decoded; each is checked against its digest before it is first seen.
///
/// A reader of one block is spared hashing the other fifteen.
#[derive(Debug)]
pub struct LazyFrame {
    bytes: Box<[u8]>,
    digests: Box<[Digest]>,

    /// A bit for each block that was checked.
    checked: AtomicU16,

    /// Where the frame lies, for errors.
    offset: u64,
}

const _: () = assert!(FRAME_BLOCKS <= u16::BITS as usize);

impl LazyFrame {
    pub(super) fn new(bytes: Box<[u8]>, digests: Box<[Digest]>, offset: u64) -> LazyFrame {
        LazyFrame { bytes, digests, checked: AtomicU16::new(0), offset }
    }

    /// Blocks in the frame.
    pub fn blocks(&self) -> usize {
        self.digests.len()
    }

    /// Bytes of memory that it takes.
    pub fn memory_bytes(&self) -> usize {
        self.bytes.len() + size_of_val(&*self.digests) + size_of::<LazyFrame>()
    }

    /// The blocks of `range`, if they are in the frame and were checked.
    pub fn get_checked(&self, range: Range<usize>) -> Option<&[u8]> {
        let checked = self.checked.load(Ordering::Relaxed);
        let is_checked =
            range.clone().all(|position| position < self.blocks() && checked >> position & 1 != 0);
        if !is_checked {
            return None;
        }
        self.bytes.get(range.start * BLOCK_BYTES..range.end * BLOCK_BYTES)
    }

    /// The blocks of `range`, one behind the other.
    ///
    /// # Errors
    ///
    /// `Corrupt` if one of them does not match its digest under `key`.
    ///
    /// # Panics
    ///
    /// If the frame does not have all of `range`.
    pub fn checked(&self, range: Range<usize>, key: &DomainKey) -> Result<&[u8]> {
        let bytes = &self.bytes[range.start * BLOCK_BYTES..range.end * BLOCK_BYTES];
        let before = self.checked.load(Ordering::Relaxed);
        let mut checked = before;
        let mut wrong = None;
        let (blocks, _) = bytes.as_chunks::<BLOCK_BYTES>();
        let unchecked = blocks.iter().zip(range).filter(|(_, at)| before >> at & 1 == 0);
        key.digest_each(unchecked, |at, got| match self.digests[at] {
            expected if expected == got => checked |= 1 << at,
            expected => wrong = wrong.or(Some((got, expected))),
        });
        if let Some((got, expected)) = wrong {
            return Err(Error::corrupt("block digest", got, expected).at(self.offset));
        }
        if checked != before {
            // Nothing is ordered by it: the bytes never change.
            self.checked.fetch_or(checked, Ordering::Relaxed);
        }
        Ok(bytes)
    }
}

/// A frame record taken apart, its checksum checked.
#[derive(Debug)]
pub(super) struct FrameRecord<'a> {
    pub(super) first_slot: u32,
    /// Slots within the segment, if they do not simply run on from the first one.
    pub(super) slots: Option<Vec<u16>>,
    pub(super) blocks: usize,
    pub(super) encoding: Encoding,
    pub(super) data: &'a [u8],
}

impl<'a> FrameRecord<'a> {
    pub(super) fn parse(record: &'a [u8], salt: u32) -> Result<FrameRecord<'a>> {
        let (header, payload) = RecordHeader::open(record, salt, RecordKind::Frame)?;
        FrameRecord::from_parts(&header, payload)
    }

    pub(super) fn from_parts(header: &RecordHeader, payload: &'a [u8]) -> Result<FrameRecord<'a>> {
        let blocks = usize::from(header.count);
        if blocks == 0 || blocks > FRAME_BLOCKS || header.raw_bytes as usize != blocks * BLOCK_BYTES
        {
            return Err(Error::corrupt(
                "frame",
                format_args!("{blocks} blocks in {} bytes", header.raw_bytes),
                format_args!("1 to {FRAME_BLOCKS} blocks of {BLOCK_BYTES}"),
            ));
        }
        let within = header.index % SEGMENT_SLOTS;
        let (slots, data) = if header.slot_list {
            let Some((list, data)) = payload.split_at_checked(blocks * 2) else {
                return Err(Error::corrupt("frame slot list", payload.len(), blocks * 2));
            };
            let slots: Vec<u16> =
                list.as_chunks::<2>().0.iter().map(|pair| u16::from_le_bytes(*pair)).collect();
            let ascending = slots.windows(2).all(|pair| pair[0] < pair[1]);
            let first = slots.first().map(|&first| u32::from(first));
            if !ascending
                || first != Some(within)
                || slots.last().is_none_or(|&last| u32::from(last) >= SEGMENT_SLOTS)
            {
                return Err(Error::corrupt(
                    "frame slot list",
                    "slots out of order",
                    "ascending slots",
                ));
            }
            (Some(slots), data)
        } else {
            if within as usize + blocks > SEGMENT_SLOTS as usize {
                return Err(Error::corrupt("frame", header.index, "slots of one segment"));
            }
            (None, payload)
        };
        Ok(FrameRecord { first_slot: header.index, slots, blocks, encoding: header.encoding, data })
    }

    /// Whether the frame holds just these slots of its segment.
    pub(super) fn holds(&self, slots: &[u32]) -> bool {
        match &self.slots {
            Some(list) => list.iter().map(|&slot| u32::from(slot)).eq(slots.iter().copied()),
            None => {
                let first = self.first_slot % SEGMENT_SLOTS;
                (first..).take(self.blocks).eq(slots.iter().copied())
            }
        }
    }

    pub(super) fn decode(&self, decoder: &mut Decoder) -> Result<Box<[u8]>> {
        let mut bytes = vec![0; self.blocks * BLOCK_BYTES].into_boxed_slice();
        decoder.decode(self.encoding, self.data, &mut bytes)?;
        Ok(bytes)
    }
}
