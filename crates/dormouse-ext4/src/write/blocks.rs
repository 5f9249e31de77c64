//! Hands blocks on in ascending order: neighbours together, zeros not at all.

use std::fmt;

use crate::disk::{BLOCK, BLOCK_BYTES};
use crate::error::{Context, Result};
use crate::sink::Sink;

/// Neighbours are gathered up to so many bytes.
const GATHERED_BYTES_MAX: usize = 1 << 20;

/// Gathers blocks on their way to a sink.
pub(crate) struct Blocks<'a> {
    sink: &'a mut dyn Sink,
    first: u64,
    gathered: Vec<u8>,
    written: u64,
}

impl fmt::Debug for Blocks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blocks").field("next", &self.next()).finish_non_exhaustive()
    }
}

impl Blocks<'_> {
    pub(crate) fn new(sink: &mut dyn Sink) -> Blocks<'_> {
        let gathered = Vec::with_capacity(GATHERED_BYTES_MAX);
        Blocks { sink, first: 0, gathered, written: 0 }
    }

    /// Behind the last block that was taken.
    fn next(&self) -> u64 {
        self.first + (self.gathered.len() / BLOCK_BYTES) as u64
    }

    /// Takes whole blocks for block `at` on, which is behind all that were taken.
    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        for (at, block) in (at..).zip(bytes.chunks(BLOCK_BYTES)) {
            debug_assert_eq!(block.len(), BLOCK_BYTES, "only whole blocks are written");
            if is_zero(block) {
                continue;
            }
            let next = self.next();
            debug_assert!(at >= next, "block {at} comes after {next}");
            if at != next || self.gathered.len() >= GATHERED_BYTES_MAX {
                self.flush()?;
                self.first = at;
            }
            self.gathered.extend_from_slice(block);
        }
        Ok(())
    }

    /// Writes what is gathered; nothing is lost only after this.
    pub(crate) fn flush(&mut self) -> Result<()> {
        if !self.gathered.is_empty() {
            self.sink
                .write(&self.gathered, self.first * BLOCK)
                .context(|| format!("cannot write the image's block {}", self.first))?;
            self.written += self.gathered.len() as u64;
            self.first = self.next();
            self.gathered.clear();
        }
        Ok(())
    }

    /// Bytes written so far.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }
}

/// Whether all bytes are zero: told from the first few in nearly all cases that are not.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk == &[0; 64]) && rest.iter().all(|&byte| byte == 0)
}
