//! What E2B's two ways of storing a memory diff would take, without their headers.
//!
//! By default, 2 MiB blocks in which anything changed are stored as they are. At best, 4 KiB pages
//! are compared with the parent's at the same offset; those that differ and are not zero are packed
//! in ascending order and compressed in frames of 2 MiB.

use std::io;

const PAGE_BYTES: usize = 4096;
const BLOCK_BYTES: usize = 2 << 20;
const FRAME_BYTES: usize = 2 << 20;
const LEVEL: i32 = 3;

/// Bytes that the best mode stores of `image` over `parent`.
///
/// # Errors
/// When zstd fails.
pub fn best_bytes(parent: &[u8], image: &[u8]) -> io::Result<u64> {
    let mut zstd = zstd::bulk::Compressor::new(LEVEL)?;
    let mut frame = Vec::with_capacity(FRAME_BYTES);
    let mut stored = 0;
    for (page, at) in image.chunks(PAGE_BYTES).zip((0..).step_by(PAGE_BYTES)) {
        let before = parent.get(at..at + page.len());
        if before == Some(page) || is_zero(page) {
            continue;
        }
        frame.extend_from_slice(page);
        if frame.len() >= FRAME_BYTES {
            stored += zstd.compress(&frame)?.len() as u64;
            frame.clear();
        }
    }
    if !frame.is_empty() {
        stored += zstd.compress(&frame)?.len() as u64;
    }
    Ok(stored)
}

/// Bytes that the default mode stores of `image` over `parent`.
#[must_use]
pub fn default_bytes(parent: &[u8], image: &[u8]) -> u64 {
    image
        .chunks(BLOCK_BYTES)
        .zip((0..).step_by(BLOCK_BYTES))
        .filter(|(block, at)| parent.get(*at..at + block.len()) != Some(block) && !is_zero(block))
        .map(|(block, _)| block.len() as u64)
        .sum()
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(64).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unchanged_and_zero_pages_are_not_stored() {
        let parent: Vec<u8> =
            (0..3 * BLOCK_BYTES).map(|at| u8::try_from(at / 7 % 251).unwrap()).collect();
        assert_eq!(best_bytes(&parent, &parent).unwrap(), 0);
        assert_eq!(default_bytes(&parent, &parent), 0);
        let mut image = parent.clone();
        image[..BLOCK_BYTES].fill(0);
        assert_eq!(best_bytes(&parent, &image).unwrap(), 0);
        assert_eq!(default_bytes(&parent, &image), 0);
        image[2 * BLOCK_BYTES] ^= 1;
        let stored = best_bytes(&parent, &image).unwrap();
        assert!((1..PAGE_BYTES as u64).contains(&stored), "one page, compressed: {stored}");
        assert_eq!(default_bytes(&parent, &image), BLOCK_BYTES as u64);
    }
}
