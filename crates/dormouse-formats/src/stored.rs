//! What of an image of the store is not zero, read piece by piece.

use std::ops::Range;

use dormouse_image::map::Source;
use dormouse_store::progress::Job;
use dormouse_store::reader::ImageReader;

use crate::error::Result;

/// Bytes read at once.
const PIECE_BYTES: usize = 1 << 20;

/// The runs of `range` that are stored, in order; what is between them is zero.
pub(crate) fn stored_runs(image: &ImageReader, range: Range<u64>) -> Result<Vec<Range<u64>>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    image.for_each_extent(range, &mut |extent| {
        if extent.source != Source::Zero {
            match runs.last_mut() {
                Some(last) if last.end == extent.range.start => last.end = extent.range.end,
                _ => runs.push(extent.range),
            }
        }
        Ok(())
    })?;
    Ok(runs)
}

/// Calls `visit` with the bytes of runs and where each piece lies in the image.
pub(crate) fn for_each_piece(
    image: &ImageReader,
    runs: Vec<Range<u64>>,
    job: Job<'_>,
    visit: &mut dyn FnMut(&[u8], u64) -> Result<()>,
) -> Result<()> {
    let mut buf = vec![0; PIECE_BYTES];
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            job.check()?;
            let len = usize::try_from(run.end - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            image.read_at(&mut buf[..len], at)?;
            visit(&buf[..len], at)?;
            at += len as u64;
            job.progress.advance(len as u64);
        }
    }
    Ok(())
}
