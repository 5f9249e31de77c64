//! A split-block Bloom filter over digest prefixes: one cache line a question.
//!
//! A block is eight 32-bit words; a key sets one bit in each. With 12 bits a key about one question
//! in 250 is answered "maybe" wrongly. Prefixes are evenly spread already, so they are their own
//! hash: the top bits choose the block, the low 40 bits the eight bits in it.

/// Bytes of a block.
pub(super) const BLOCK_BYTES: usize = 32;

const BITS_PER_KEY: u64 = 12;

/// A filter being filled.
#[derive(Debug)]
pub(super) struct FilterBuilder {
    words: Vec<[u32; 8]>,
}

impl FilterBuilder {
    /// A filter for at most so many keys.
    pub(super) fn new(keys: u64) -> FilterBuilder {
        let blocks = (keys * BITS_PER_KEY).div_ceil(256).max(1);
        let blocks = usize::try_from(blocks).expect("filters fit in memory while they are built");
        FilterBuilder { words: vec![[0; 8]; blocks] }
    }

    pub(super) fn insert(&mut self, prefix: u64) {
        let block = block_of(prefix, self.words.len() as u64);
        for (word, bit) in self.words[block].iter_mut().zip(bits_of(prefix)) {
            *word |= bit;
        }
    }

    pub(super) fn blocks(&self) -> u64 {
        self.words.len() as u64
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flatten().flat_map(|word| word.to_le_bytes()).collect()
    }
}

/// Which of `blocks` blocks a prefix belongs to.
pub(super) fn block_of(prefix: u64, blocks: u64) -> usize {
    usize::try_from((u128::from(prefix) * u128::from(blocks)) >> 64).expect("below blocks")
}

/// Whether a prefix may be in the set whose block this is.
pub(super) fn may_hold(block: &[u8; BLOCK_BYTES], prefix: u64) -> bool {
    let (words, _) = block.as_chunks::<4>();
    words
        .iter()
        .zip(bits_of(prefix))
        .fold(true, |all, (word, bit)| all & (u32::from_le_bytes(*word) & bit != 0))
}

fn bits_of(prefix: u64) -> [u32; 8] {
    std::array::from_fn(|word| 1 << (prefix >> (5 * word) & 31))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(n: u64) -> u64 {
        let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    #[test]
    fn nothing_is_forgotten_and_little_is_made_up() {
        let mut builder = FilterBuilder::new(10_000);
        (0..10_000).for_each(|n| builder.insert(spread(n)));
        let blocks = builder.blocks();
        let bytes = builder.to_bytes();
        let ask = |prefix| {
            let at = block_of(prefix, blocks) * BLOCK_BYTES;
            may_hold(bytes[at..][..BLOCK_BYTES].try_into().unwrap(), prefix)
        };
        assert!((0..10_000).all(|n| ask(spread(n))));
        let wrong = (10_000..110_000).filter(|&n| ask(spread(n))).count();
        assert!(wrong < 1_000, "{wrong} of 100,000 answered maybe");
    }
}
