//! Guests made up of pages: numbers in, pages that are zero, shared or new out.

/// A page.
pub const PAGE: usize = 4096;

/// A small generator (xorshift64*).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator with a seed.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.number() >> 16) as usize % end.max(1)
    }

    /// A page that no other is like: half of it text, so that it can be compressed.
    pub fn page(&mut self) -> Vec<u8> {
        let mut page = vec![b'd'; PAGE];
        for chunk in page[..PAGE / 2].chunks_mut(8) {
            chunk.copy_from_slice(&self.number().to_le_bytes());
        }
        page
    }

    /// A device of `pages`: a third zero, in runs.
    pub fn device(&mut self, pages: usize) -> Vec<u8> {
        let mut bytes = vec![0; pages * PAGE];
        let mut at = 0;
        while at < pages {
            let run = (1 + self.below(7)).min(pages - at);
            if self.below(3) > 0 {
                for page in at..at + run {
                    bytes[page * PAGE..][..PAGE].copy_from_slice(&self.page());
                }
            }
            at += run;
        }
        bytes
    }

    /// Writes some pages again: new bytes, zeros, or what another page has.
    pub fn work(&mut self, bytes: &mut [u8], writes: usize) {
        let pages = bytes.len() / PAGE;
        for _ in 0..writes {
            let at = self.below(pages) * PAGE;
            match self.below(4) {
                0 => bytes[at..at + PAGE].fill(0),
                1 => {
                    let other = self.below(pages) * PAGE;
                    let page = bytes[other..other + PAGE].to_vec();
                    bytes[at..at + PAGE].copy_from_slice(&page);
                }
                _ => {
                    let page = self.page();
                    bytes[at..at + PAGE].copy_from_slice(&page);
                }
            }
        }
    }
}
