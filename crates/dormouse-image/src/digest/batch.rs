//! Keyed BLAKE3 of up to sixteen blocks at once.
//!
//! A block has four chunks of 1 KiB, and processors hash eight or sixteen chunks in the time of one.
//! Hashed alone, a block leaves most of that idle. Here chunk *n* of all blocks is hashed together,
//! and so are the two levels of parents above them:
//!
//! ```text
//!             root
//!          /        \
//!      parent      parent
//!      /    \      /    \
//!   chunk0 chunk1 chunk2 chunk3
//! ```
//!
//! The crate has no interface for that but the one its own benchmarks use, which is why the
//! workspace names its version exactly. Tests compare every count of blocks with the crate's own
//! hash, so that a change of it cannot pass unnoticed.

use blake3::IncrementCounter;
use blake3::platform::Platform;

use crate::block::BLOCK_BYTES;

/// Blocks that are hashed at once: as many as the widest registers have places for.
pub(super) const BLOCKS_MAX: usize = 16;

/// Below this many there is nothing to be won.
const BLOCKS_MIN: usize = 3;

const CHUNK_BYTES: usize = blake3::CHUNK_LEN;
const HASH_BYTES: usize = blake3::OUT_LEN;
const CHUNKS: usize = BLOCK_BYTES / CHUNK_BYTES;
const PAIR_BYTES: usize = 2 * HASH_BYTES;

const _: () = assert!(CHUNKS == 4, "two levels of parents");

/// Flags of the compression function, by section 2.1 of the BLAKE3 paper.
const CHUNK_START: u8 = 1 << 0;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;
const KEYED_HASH: u8 = 1 << 4;

/// Blocks to be hashed.
pub(super) struct Batch<'a> {
    blocks: [&'a [u8; BLOCK_BYTES]; BLOCKS_MAX],
    count: usize,
}

impl<'a> Batch<'a> {
    pub(super) fn new() -> Batch<'a> {
        Batch { blocks: [&[0; BLOCK_BYTES]; BLOCKS_MAX], count: 0 }
    }

    /// Adds a block; there are at most [`BLOCKS_MAX`].
    pub(super) fn push(&mut self, block: &'a [u8; BLOCK_BYTES]) {
        self.blocks[self.count] = block;
        self.count += 1;
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// The hashes of the blocks, in order; those behind the last block's mean nothing.
    pub(super) fn keyed_hashes(&self, key: &[u8; 32]) -> [[u8; HASH_BYTES]; BLOCKS_MAX] {
        let mut roots = [[0; HASH_BYTES]; BLOCKS_MAX];
        let blocks = &self.blocks[..self.count];
        if blocks.len() < BLOCKS_MIN {
            for (root, block) in roots.iter_mut().zip(blocks) {
                *root = *blake3::keyed_hash(key, *block).as_bytes();
            }
            return roots;
        }
        let platform = Platform::detect();
        let (words, _) = key.as_chunks::<4>();
        let mut key = [0; 8];
        for (word, bytes) in key.iter_mut().zip(words) {
            *word = u32::from_le_bytes(*bytes);
        }

        // Sixteen chunks, one of each block, go in together; four of one block lie side by side.
        let mut chunks = [[0; CHUNKS * HASH_BYTES]; BLOCKS_MAX];
        for chunk in 0..CHUNKS {
            let mut inputs = [&[0; CHUNK_BYTES]; BLOCKS_MAX];
            for (input, block) in inputs.iter_mut().zip(blocks) {
                *input = &block.as_chunks::<CHUNK_BYTES>().0[chunk];
            }
            let mut hashes = [[0; HASH_BYTES]; BLOCKS_MAX];
            platform.hash_many(
                &inputs[..blocks.len()],
                &key,
                chunk as u64,
                IncrementCounter::No,
                KEYED_HASH,
                CHUNK_START,
                CHUNK_END,
                hashes.as_flattened_mut(),
            );
            for (chunks, hash) in chunks.iter_mut().zip(&hashes) {
                chunks[chunk * HASH_BYTES..][..HASH_BYTES].copy_from_slice(hash);
            }
        }
        let mut parents = [[0; HASH_BYTES]; 2 * BLOCKS_MAX];
        let pairs = chunks.as_flattened().as_chunks::<PAIR_BYTES>().0;
        hash_pairs::<{ 2 * BLOCKS_MAX }>(
            platform,
            &key,
            PARENT,
            &pairs[..2 * blocks.len()],
            parents.as_flattened_mut(),
        );
        let pairs = parents.as_flattened().as_chunks::<PAIR_BYTES>().0;
        hash_pairs::<BLOCKS_MAX>(
            platform,
            &key,
            PARENT | ROOT,
            &pairs[..blocks.len()],
            roots.as_flattened_mut(),
        );
        roots
    }
}

/// The parents of at most `MAX` pairs of hashes.
fn hash_pairs<const MAX: usize>(
    platform: Platform,
    key: &[u32; 8],
    flags: u8,
    pairs: &[[u8; PAIR_BYTES]],
    hashes: &mut [u8],
) {
    let mut inputs = [&[0; PAIR_BYTES]; MAX];
    for (input, pair) in inputs.iter_mut().zip(pairs) {
        *input = pair;
    }
    platform.hash_many(
        &inputs[..pairs.len()],
        key,
        0,
        IncrementCounter::No,
        KEYED_HASH | flags,
        0,
        0,
        hashes,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64, count: usize) -> Vec<[u8; BLOCK_BYTES]> {
        let mut state = seed;
        let mut byte = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
            state.to_le_bytes()[5]
        };
        (0..count).map(|_| std::array::from_fn(|_| byte())).collect()
    }

    #[test]
    fn a_batch_of_any_count_has_the_hashes_of_its_blocks() {
        for count in 0..=BLOCKS_MAX {
            let blocks = noise(count as u64, count);
            let key: [u8; 32] = std::array::from_fn(|at| u8::try_from(at * 7 + count).unwrap());
            let mut batch = Batch::new();
            blocks.iter().for_each(|block| batch.push(block));
            assert_eq!(batch.len(), count);
            let hashes = batch.keyed_hashes(&key);
            for (block, hash) in blocks.iter().zip(&hashes) {
                assert_eq!(blake3::keyed_hash(&key, block).as_bytes(), hash, "of {count}");
            }
        }
    }
}
