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
use dormouse_store::progress::Job;
use dormouse_store::reader::ImageReader;

use crate::error::Result;
use crate::stored::{for_each_piece, stored_runs};

/// The digest, in hexadecimal.
pub fn content_digest(image: &ImageReader, job: Job<'_>) -> Result<String> {
    let size = image.size_bytes();
    let runs = stored_runs(image, 0..size)?;
    job.progress.begin("digest", Some(runs.iter().map(|run| run.end - run.start).sum()));
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes());
    for_each_piece(image, runs, job, &mut |piece, at| {
        for (number, block) in (at / BLOCK_BYTES_U64..).zip(piece.chunks(BLOCK_BYTES)) {
            hasher.update(&number.to_le_bytes());
            hasher.update(block);
            hasher.update(&[0; BLOCK_BYTES][block.len()..]);
        }
        Ok(())
    })?;
    Ok(hasher.finalize().to_hex().to_string())
}
