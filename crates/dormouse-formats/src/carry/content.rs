//! What an image holds, as a number that two stores agree on.
//!
//! ```text
//! BLAKE3 of: u64 length of the image, then for each block that is not zero, in order,
//!            u64 its number, its 4096 bytes (the last one with zeros behind its end)
//! ```
//!
//! A store's own digests are of its own key. This one has none, and is of bytes alone: a snapshot
//! that says it is the base of some changes is believed when this is right, whatever its labels say.

use dormouse_image::block::{BLOCK_BYTES, BLOCK_BYTES_U64};
use dormouse_image::map::Source;
use dormouse_store::progress::Job;
use dormouse_store::reader::ImageReader;

use crate::error::Result;

/// Bytes read at once.
const PIECE_BYTES: usize = 1 << 20;

/// The digest, in hexadecimal.
pub fn content_digest(image: &ImageReader, job: Job<'_>) -> Result<String> {
    let size = image.size_bytes();
    let mut runs: Vec<std::ops::Range<u64>> = Vec::new();
    image.for_each_extent(0..size, &mut |extent| {
        if extent.source != Source::Zero {
            match runs.last_mut() {
                Some(last) if last.end == extent.range.start => last.end = extent.range.end,
                _ => runs.push(extent.range),
            }
        }
        Ok(())
    })?;
    let total = runs.iter().map(|run| run.end - run.start).sum();
    job.progress.begin("digest", Some(total));
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes());
    let mut buf = vec![0; PIECE_BYTES];
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            job.check()?;
            let len = usize::try_from(run.end - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            image.read_at(&mut buf[..len], at)?;
            let padded = len.next_multiple_of(BLOCK_BYTES);
            buf[len..padded].fill(0);
            for (number, block) in (at / BLOCK_BYTES_U64..).zip(buf[..padded].chunks(BLOCK_BYTES)) {
                hasher.update(&number.to_le_bytes());
                hasher.update(block);
            }
            at += len as u64;
            job.progress.advance(len as u64);
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}
