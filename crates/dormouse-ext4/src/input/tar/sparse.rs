//! Which parts of a file hold data, as a tar tells it.

use std::ops::Range;

use crate::disk::BLOCK;
use crate::error::{Error, ErrorKind, Result};
use crate::input::tar::RECORD_BYTES;
use crate::input::tar::header::SparseEntry;
use crate::input::tar::pax::decimal;

/// The most parts of one file.
const ENTRIES_MAX: usize = 4 << 20;

/// The parts that hold data: in order, apart from each other, never empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SparseMap {
    pub(crate) data: Vec<Range<u64>>,
}

impl SparseMap {
    pub(crate) fn extend(&mut self, entries: &[SparseEntry]) -> Result<()> {
        for &(offset, len) in entries {
            let end = offset.checked_add(len).ok_or_else(|| bad("a part beyond all bounds"))?;
            if self.data.last().is_some_and(|last| offset < last.end) {
                return Err(bad("parts that overlap"));
            }
            if self.data.len() >= ENTRIES_MAX {
                return Err(bad("too many parts"));
            }
            // The last part of a file that ends with a hole is empty.
            if len > 0 {
                self.data.push(offset..end);
            }
        }
        Ok(())
    }

    /// Fails unless the parts lie in the file and their content is all that is stored.
    pub(crate) fn check(&self, bytes: u64, stored: u64) -> Result<()> {
        if self.data.last().is_some_and(|last| last.end > bytes) {
            return Err(bad("parts beyond the end of the file"));
        }
        let sum: u64 = self.data.iter().map(|part| part.end - part.start).sum();
        if sum != stored {
            return Err(bad("parts of another length than their content"));
        }
        Ok(())
    }

    /// The blocks that hold data.
    pub(crate) fn blocks(&self) -> Vec<Range<u64>> {
        let mut blocks: Vec<Range<u64>> = Vec::with_capacity(self.data.len());
        for part in &self.data {
            let part = part.start / BLOCK..part.end.div_ceil(BLOCK);
            match blocks.last_mut() {
                Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
                _ => blocks.push(part),
            }
        }
        blocks
    }
}

/// A map as text before the content: the count, then offset and length of each, a line each.
#[derive(Clone, Debug, Default)]
pub(crate) struct TextMap {
    line: Vec<u8>,
    count: Option<usize>,
    offset: Option<u64>,
    entries: Vec<SparseEntry>,
}

impl TextMap {
    pub(crate) fn is_complete(&self) -> bool {
        self.count == Some(self.entries.len())
    }

    pub(crate) fn read(&mut self, record: &[u8; RECORD_BYTES]) -> Result<()> {
        for &byte in record {
            if self.is_complete() {
                break;
            }
            if byte != b'\n' {
                if self.line.len() > 20 {
                    return Err(bad("a number of more than 20 digits"));
                }
                self.line.push(byte);
                continue;
            }
            let number = decimal(&self.line).ok_or_else(|| bad("a line that is no number"))?;
            self.line.clear();
            match (self.count, self.offset.take()) {
                (None, _) => {
                    let count = usize::try_from(number).ok().filter(|&n| n <= ENTRIES_MAX);
                    self.count = Some(count.ok_or_else(|| bad("too many parts"))?);
                }
                (Some(_), None) => self.offset = Some(number),
                (Some(_), Some(offset)) => self.entries.push((offset, number)),
            }
        }
        Ok(())
    }

    pub(crate) fn entries(&self) -> &[SparseEntry] {
        &self.entries
    }
}

fn bad(what: &str) -> Error {
    Error::new(ErrorKind::BadArchive, format!("a sparse file with {what}"))
}
