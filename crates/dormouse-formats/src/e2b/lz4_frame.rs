//! Frames of LZ4, decoded into memory that is there already.
//!
//! ```text
//! u32 0x184d2204, u8 flags (version 01, independent blocks, block sums, content size, content sum, -,
//! dictionary), u8 block size, [u64 content size], u8 header sum
//! blocks: u32 length (bit 31: as it is), bytes, [u32 xxh32 of them]; a length of 0 ends them
//! [u32 xxh32 of the content]
//! ```
//!
//! A reader of streams decodes into a buffer of its own and copies from there, and makes that buffer
//! for each frame: of frames of 2 MiB that took longer than decoding. Here the length is known, and
//! each block is decoded where it belongs. Frames whose blocks go on from each other, which E2B does
//! not write, are left to that reader.

use std::io::Read;

use lz4_flex::block::decompress_into;
use lz4_flex::frame::FrameDecoder;
use twox_hash::XxHash32;

const MAGIC: u32 = 0x184d_2204;
const VERSION: u8 = 0b0100_0000;
const VERSION_MASK: u8 = 0b1100_0000;
const INDEPENDENT: u8 = 0b0010_0000;
const BLOCK_SUMS: u8 = 0b0001_0000;
const CONTENT_SIZE: u8 = 0b0000_1000;
const CONTENT_SUM: u8 = 0b0000_0100;
const DICTIONARY: u8 = 0b0000_0001;
const AS_IT_IS: u32 = 1 << 31;

/// Decodes one frame. Returns how many bytes it has, and how many of `encoded` it took. One that has
/// more than `decoded` has room for fails, as does one that is damaged.
pub(super) fn decode(
    encoded: &[u8],
    decoded: &mut [u8],
) -> std::result::Result<(usize, usize), String> {
    let mut rest = encoded;
    if number(&mut rest)? != MAGIC {
        return Err("it does not begin as a frame of LZ4".to_owned());
    }
    let header = rest;
    let [flags, size] = take::<2>(&mut rest)?;
    if flags & (INDEPENDENT | VERSION_MASK) != INDEPENDENT | VERSION || flags & DICTIONARY != 0 {
        if flags & VERSION_MASK == VERSION {
            check_whole(header)?;
        }
        return decode_linked(encoded, decoded);
    }
    let block_max = match size >> 4 & 7 {
        4 => 64 << 10,
        5 => 256 << 10,
        6 => 1 << 20,
        7 => 4 << 20,
        other => return Err(format!("blocks of size {other}; expected 4 to 7")),
    };
    let content = match flags & CONTENT_SIZE {
        0 => None,
        _ => Some(u64::from_le_bytes(take(&mut rest)?)),
    };
    let described = header.len() - rest.len();
    let [sum] = take::<1>(&mut rest)?;
    if sum != XxHash32::oneshot(0, &header[..described]).to_le_bytes()[1] {
        return Err("the sum of its header is wrong".to_owned());
    }
    let mut len = 0;
    while let Some(Block { bytes: block, is_as_it_is, sum }) = next_block(&mut rest, flags)? {
        let bytes = block.len();
        if bytes > block_max {
            return Err(format!("a block of {bytes} bytes; expected at most {block_max}"));
        }
        if sum.is_some_and(|sum| sum != XxHash32::oneshot(0, block)) {
            return Err(format!("the sum of the block behind byte {len} is wrong"));
        }
        let room = decoded.get_mut(len..).unwrap_or_default();
        let room_bytes = room.len().min(block_max);
        let room = &mut room[..room_bytes];
        len += if is_as_it_is {
            let room = room.get_mut(..bytes).ok_or_else(|| long(len))?;
            room.copy_from_slice(block);
            bytes
        } else {
            decompress_into(block, room).map_err(|error| match error {
                lz4_flex::block::DecompressError::OutputTooSmall { .. }
                    if room_bytes < block_max =>
                {
                    long(len)
                }
                error => error.to_string(),
            })?
        };
    }
    let content_bytes = decoded.get(..len).unwrap_or_default();
    if content.is_some_and(|content| content != len as u64) {
        return Err(format!("it has {len} bytes; expected {}", content.unwrap_or(0)));
    }
    if flags & CONTENT_SUM != 0 && number(&mut rest)? != XxHash32::oneshot(0, content_bytes) {
        return Err("the sum of its content is wrong".to_owned());
    }
    Ok((len, encoded.len() - rest.len()))
}

/// A block as it lies in a frame.
struct Block<'a> {
    bytes: &'a [u8],
    is_as_it_is: bool,
    sum: Option<u32>,
}

/// Takes the next block; none at the mark behind the last one.
fn next_block<'a>(
    rest: &mut &'a [u8],
    flags: u8,
) -> std::result::Result<Option<Block<'a>>, String> {
    let word = number(rest)?;
    if word == 0 {
        return Ok(None);
    }
    let len = usize::try_from(word & !AS_IT_IS).unwrap_or(usize::MAX);
    let (bytes, behind) = rest.split_at_checked(len).ok_or_else(short)?;
    *rest = behind;
    let sum = if flags & BLOCK_SUMS != 0 { Some(number(rest)?) } else { None };
    Ok(Some(Block { bytes, is_as_it_is: word & AS_IT_IS != 0, sum }))
}

/// Fails where a frame is cut off, also between its blocks, which a reader of streams takes for its end.
fn check_whole(header: &[u8]) -> std::result::Result<(), String> {
    let mut rest = header;
    let [flags, _] = take::<2>(&mut rest)?;
    if flags & CONTENT_SIZE != 0 {
        take::<8>(&mut rest)?;
    }
    if flags & DICTIONARY != 0 {
        take::<4>(&mut rest)?;
    }
    take::<1>(&mut rest)?;
    while next_block(&mut rest, flags)?.is_some() {}
    if flags & CONTENT_SUM != 0 {
        number(&mut rest)?;
    }
    Ok(())
}

fn decode_linked(
    encoded: &[u8],
    decoded: &mut [u8],
) -> std::result::Result<(usize, usize), String> {
    let mut rest = encoded;
    let mut decoder = FrameDecoder::new(&mut rest);
    let mut len = 0;
    while len < decoded.len() {
        match decoder.read(&mut decoded[len..]).map_err(|error| error.to_string())? {
            0 => break,
            read => len += read,
        }
    }
    // The end mark, and the checksum behind it, are looked at only when more is asked for.
    if decoder.read(&mut [0]).map_err(|error| error.to_string())? > 0 {
        return Err(long(len));
    }
    drop(decoder);
    Ok((len, encoded.len() - rest.len()))
}

fn take<const N: usize>(rest: &mut &[u8]) -> std::result::Result<[u8; N], String> {
    let (head, behind) = rest.split_first_chunk::<N>().ok_or_else(short)?;
    *rest = behind;
    Ok(*head)
}

fn number(rest: &mut &[u8]) -> std::result::Result<u32, String> {
    take(rest).map(u32::from_le_bytes)
}

fn short() -> String {
    "it ends too early".to_owned()
}

fn long(len: usize) -> String {
    format!("it has more than the {len} bytes that its header says")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
    use proptest::prelude::*;

    use super::*;

    /// Frames of every kind that the encoder makes, whole, cut, damaged and with too little room.
    #[test]
    fn frames_are_decoded_as_by_a_reader_of_streams() {
        let strategy = (
            proptest::collection::vec((any::<u8>(), 1..9000_usize), 0..60),
            any::<[bool; 4]>(),
            any::<prop::sample::Index>(),
            1..=255_u8,
        );
        proptest!(|((runs, [linked, block_sums, content_sum, with_size], at, change) in strategy)| {
            let mut content = Vec::new();
            for (byte, len) in runs {
                // Some of it compresses, some does not.
                content.extend((0..len).map(|at| match byte % 3 {
                    0 => byte,
                    _ => at.wrapping_mul(0x9e37_79b1).to_le_bytes()[2] ^ byte,
                }));
            }
            let mut info = FrameInfo::new()
                .block_size(BlockSize::Max64KB)
                .block_mode(if linked { BlockMode::Linked } else { BlockMode::Independent })
                .block_checksums(block_sums)
                .content_checksum(content_sum);
            if with_size {
                info = info.content_size(Some(content.len() as u64));
            }
            let mut encoder = FrameEncoder::with_frame_info(info, Vec::new());
            encoder.write_all(&content).unwrap();
            let frame = encoder.finish().unwrap();
            let mut decoded = vec![0; content.len()];
            let with_more = [&frame[..], b"behind"].concat();
            prop_assert_eq!(decode(&with_more, &mut decoded), Ok((content.len(), frame.len())));
            prop_assert!(decoded == content);
            let mut large = vec![0; content.len() + 9];
            prop_assert_eq!(decode(&frame, &mut large), Ok((content.len(), frame.len())));
            if !content.is_empty() {
                let mut small = vec![0; at.index(content.len())];
                prop_assert!(decode(&frame, &mut small).is_err());
            }
            prop_assert!(decode(&frame[..at.index(frame.len())], &mut decoded).is_err());
            let mut bad = frame.clone();
            bad[at.index(frame.len())] ^= change;
            let mut theirs = Vec::new();
            let read = FrameDecoder::new(&bad[..]).read_to_end(&mut theirs);
            // Who accepts what is damaged agrees on what it is; sums are missing where none are kept.
            if let (Ok((len, _)), Ok(_)) = (decode(&bad, &mut large), read) {
                prop_assert!(large[..len] == theirs[..]);
            }
        });
    }
}
