//! LZ4 frames with nothing compressed in them: the frame format by hand, blocks stored as they are.

/// A frame with the flags and block size that E2B's writer sets: FLG, BD 0x70 (4 MiB).
///
/// FLG 0x74 is version 1, independent blocks, block checksums, content checksum; 0x70 is the same
/// without a checksum of the content.
#[must_use]
pub fn frame(bytes: &[u8], flags: u8) -> Vec<u8> {
    let mut out = 0x184d_2204_u32.to_le_bytes().to_vec();
    let descriptor = [flags, 0x70];
    out.extend(descriptor);
    out.push((xxh32(&descriptor) >> 8) as u8);
    for block in bytes.chunks(4 << 20) {
        out.extend((block.len() as u32 | 1 << 31).to_le_bytes());
        out.extend(block);
        out.extend(xxh32(block).to_le_bytes());
    }
    out.extend(0_u32.to_le_bytes());
    if flags & 4 != 0 {
        out.extend(xxh32(bytes).to_le_bytes());
    }
    out
}

/// The frames that lie one behind the other, without content sizes and dictionaries. Version 1.9.4 of
/// the `lz4` program reads too far where blocks have checksums, and so fails at the second frame,
/// also of its own making; so each is given to it alone.
#[must_use]
pub fn split(mut frames: &[u8]) -> Vec<&[u8]> {
    let mut split = Vec::new();
    while frames.len() > 7 {
        let flags = frames[4];
        let mut at = 7;
        while at + 4 <= frames.len() {
            let word = [frames[at], frames[at + 1], frames[at + 2], frames[at + 3]];
            let len = (u32::from_le_bytes(word) & 0x7fff_ffff) as usize;
            at += 4;
            if len == 0 {
                break;
            }
            at += len + if flags & 0x10 != 0 { 4 } else { 0 };
        }
        at += if flags & 4 != 0 { 4 } else { 0 };
        let (frame, rest) = frames.split_at(at.min(frames.len()));
        split.push(frame);
        frames = rest;
    }
    split
}

/// xxHash with 32 bits and seed 0.
#[must_use]
pub fn xxh32(bytes: &[u8]) -> u32 {
    const P: [u32; 5] = [2_654_435_761, 2_246_822_519, 3_266_489_917, 668_265_263, 374_761_393];
    let word = |at: &[u8]| u32::from_le_bytes([at[0], at[1], at[2], at[3]]);
    let mut chunks = bytes.chunks_exact(16);
    let mut hash = if bytes.len() >= 16 {
        let mut lanes = [P[0].wrapping_add(P[1]), P[1], 0, 0_u32.wrapping_sub(P[0])];
        for chunk in chunks.by_ref() {
            for (lane, part) in lanes.iter_mut().zip(chunk.chunks_exact(4)) {
                *lane = lane
                    .wrapping_add(word(part).wrapping_mul(P[1]))
                    .rotate_left(13)
                    .wrapping_mul(P[0]);
            }
        }
        lanes[0]
            .rotate_left(1)
            .wrapping_add(lanes[1].rotate_left(7))
            .wrapping_add(lanes[2].rotate_left(12))
            .wrapping_add(lanes[3].rotate_left(18))
    } else {
        P[4]
    };
    hash = hash.wrapping_add(bytes.len() as u32);
    let mut words = chunks.remainder().chunks_exact(4);
    for part in words.by_ref() {
        hash = hash.wrapping_add(word(part).wrapping_mul(P[2])).rotate_left(17).wrapping_mul(P[3]);
    }
    for &byte in words.remainder() {
        hash = hash
            .wrapping_add(u32::from(byte).wrapping_mul(P[4]))
            .rotate_left(11)
            .wrapping_mul(P[0]);
    }
    hash = (hash ^ hash >> 15).wrapping_mul(P[1]);
    hash = (hash ^ hash >> 13).wrapping_mul(P[2]);
    hash ^ hash >> 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_checksum_is_the_one_of_the_worked_example() {
        assert_eq!(frame(b"", 0x74)[..7], [0x04, 0x22, 0x4d, 0x18, 0x74, 0x70, 0x8e]);
    }
}
