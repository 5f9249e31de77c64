//! What is in memory, as functions of numbers: the image, and what is written over it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};

use crate::sim_disk::random::SplitMix64;

/// Bytes of a page of the oracle, whatever the pages of a region are.
pub const PAGE_BYTES: usize = 4096;

/// Words of a page.
pub(super) const PAGE_WORDS: usize = PAGE_BYTES / 8;

/// Pages that are alike: guests have zeros, and data of one kind, in runs.
const GROUP_PAGES: u64 = 8;

/// Different pages among those that are there many times.
const REPEATED: u64 = 16;

/// A content of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Zeros.
    Zero,
    /// Words drawn from `key`, each there `1 << repeat` times in a row.
    Drawn {
        /// What they are drawn from.
        key: u64,
        /// How compressible it is.
        repeat: u32,
    },
}

impl Content {
    /// What the image has at `page`: of eight groups two are zero, one is of pages that are there
    /// many times, two compress well and three not at all.
    pub(super) fn of_image(seed: u64, page: u64) -> Content {
        match draw(&[seed, 1, page / GROUP_PAGES]) % 8 {
            0 | 1 => Content::Zero,
            2 => Content::Drawn { key: draw(&[seed, 2, page % REPEATED]), repeat: 2 },
            3 | 4 => Content::Drawn { key: draw(&[seed, 3, page]), repeat: 5 },
            _ => Content::Drawn { key: draw(&[seed, 4, page]), repeat: 0 },
        }
    }

    /// The `number`th whole page that was written.
    pub(super) fn of_fill(seed: u64, number: u32) -> Content {
        Content::Drawn { key: draw(&[seed, 5, u64::from(number)]), repeat: 1 }
    }

    pub(super) fn word(self, index: usize) -> u64 {
        match self {
            Content::Zero => 0,
            Content::Drawn { key, repeat } => draw(&[key, (index >> repeat) as u64]),
        }
    }
}

/// The `number`th word that was written to `lane` of `page`; never zero.
pub(super) fn written_word(seed: u64, page: u64, lane: usize, number: u32) -> u64 {
    draw(&[seed, 6, page, lane as u64, u64::from(number)]) | 1
}

/// A number that depends on all of `numbers` and their order.
pub(super) fn draw(numbers: &[u64]) -> u64 {
    numbers.iter().fold(0, |drawn, number| SplitMix64::new(drawn ^ *number).next())
}

/// The image of a guest of `pages` pages: zero pages, pages that are there many times, pages that
/// compress and pages that do not.
///
/// # Panics
///
/// The function, for a page that the guest does not have.
pub fn image(seed: u64, pages: u64) -> impl Fn(u64) -> [u8; PAGE_BYTES] {
    move |page| {
        assert!(page < pages, "page {page} of {pages}");
        let content = Content::of_image(seed, page);
        bytes_of(|word| content.word(word))
    }
}

/// Writes the image as a flat file.
pub fn write_image(seed: u64, pages: u64, path: &Path) -> Result<()> {
    let failed = || format!("cannot write the image {}", path.display());
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).with_context(failed)?);
    let page_of = image(seed, pages);
    for page in 0..pages {
        file.write_all(&page_of(page)).with_context(failed)?;
    }
    file.flush().with_context(failed)
}

/// A page from its words.
pub(super) fn bytes_of(word: impl Fn(usize) -> u64) -> [u8; PAGE_BYTES] {
    let mut bytes = [0; PAGE_BYTES];
    for (index, into) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *into = word(index).to_ne_bytes();
    }
    bytes
}

/// What [`SmallVmm::checksum`](super::SmallVmm::checksum) tells, of the same memory elsewhere.
pub fn checksum(pages: u64, page_of: impl Fn(u64) -> [u8; PAGE_BYTES]) -> u64 {
    (0..pages).fold(0, |sum: u64, page| {
        let bytes = page_of(page);
        let (words, _) = bytes.as_chunks::<8>();
        sum.wrapping_add(page_sum(page, |word| u64::from_ne_bytes(words[word])))
    })
}

/// What a page adds to the checksum, in any order of pages.
pub(super) fn page_sum(page: u64, word: impl Fn(usize) -> u64) -> u64 {
    let sum = (0..PAGE_WORDS).fold(page, |sum, index| {
        (sum ^ word(index)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
    });
    draw(&[page, sum])
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn an_image_has_zeros_repetitions_and_pages_of_its_own() {
        let page_of = image(3, 4096);
        let mut seen: HashMap<[u8; PAGE_BYTES], u32> = HashMap::new();
        for page in 0..4096 {
            *seen.entry(page_of(page)).or_default() += 1;
        }
        let zeros = seen[&[0; PAGE_BYTES]];
        assert!((512..2048).contains(&zeros), "{zeros} zero pages");
        let often = seen.values().filter(|&&times| times > 1 && times != zeros).count();
        assert!((4..=16).contains(&often), "{often} repeated pages");
        let once = seen.values().filter(|&&times| times == 1).count();
        assert!(once > 1024, "{once} pages of their own");
        assert!(image(4, 4096)(5) != page_of(5) || image(4, 4096)(100) != page_of(100));
    }

    #[test]
    fn a_checksum_sees_every_bit_and_every_place() {
        let page_of = image(3, 64);
        let sum = checksum(64, &page_of);
        for bit in [0, 77, 32767] {
            let flipped = checksum(64, |page| {
                let mut bytes = page_of(page);
                if page == 40 {
                    bytes[bit / 8] ^= 1 << (bit % 8);
                }
                bytes
            });
            assert_ne!(flipped, sum, "bit {bit}");
        }
        assert_ne!(checksum(64, |page| page_of(63 - page)), sum);
    }
}
