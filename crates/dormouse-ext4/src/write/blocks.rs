//! Writes blocks into a sparse file: neighbours together, zeros not at all.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::disk::{BLOCK, BLOCK_BYTES};
use crate::error::{Context, Result};

/// Neighbours are gathered up to so many bytes.
const GATHERED_BYTES_MAX: usize = 1 << 20;

/// Gathers blocks on their way into a file whose other bytes are holes.
#[derive(Debug)]
pub(crate) struct Blocks<'a> {
    file: &'a File,
    first: u64,
    gathered: Vec<u8>,
    written: u64,
}

impl Blocks<'_> {
    pub(crate) fn new(file: &File) -> Blocks<'_> {
        Blocks { file, first: 0, gathered: Vec::with_capacity(GATHERED_BYTES_MAX), written: 0 }
    }

    /// Writes whole blocks from block `at` on.
    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        for (at, block) in (at..).zip(bytes.chunks(BLOCK_BYTES)) {
            debug_assert_eq!(block.len(), BLOCK_BYTES, "only whole blocks are written");
            if is_zero(block) {
                continue;
            }
            let next = self.first + (self.gathered.len() / BLOCK_BYTES) as u64;
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
            self.file
                .write_all_at(&self.gathered, self.first * BLOCK)
                .context(|| format!("cannot write the image's block {}", self.first))?;
            self.written += self.gathered.len() as u64;
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
