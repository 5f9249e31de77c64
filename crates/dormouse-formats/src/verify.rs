//! Comparing a snapshot with its source, on a way of its own: in the order of the source's files, all
//! of them read to the end, without the maps, frame tables and hole lists that the import went by.
//! Where a page of builds' data lies, the header tells once more, to other code
//! ([`replay`](crate::replay)).

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use dormouse_image::block::BLOCK_BYTES;
use dormouse_store::progress::Job;
use dormouse_store::reader::ImageReader;

use crate::data::{RandomRead, StableFile};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::page_map::PAGE_BYTES;

/// Bytes compared at once.
const PIECE_BYTES: usize = 1 << 20;

/// Another way to the bytes of an image.
pub trait Replay: fmt::Debug {
    /// Tells `compare` every byte of the image, in any order, each once.
    fn replay(&self, compare: &mut Compare<'_>) -> Result<()>;
}

/// Holds an image against what it is told.
#[derive(Debug)]
pub struct Compare<'a> {
    image: ImageReader,
    base: Option<ImageReader>,
    job: Job<'a>,
    /// Ranges that were compared, joined: their ends by their starts.
    done: BTreeMap<u64, u64>,
    buf: Vec<u8>,
    bytes: u64,
}

impl<'a> Compare<'a> {
    pub(crate) fn new(image: ImageReader, base: Option<ImageReader>, job: Job<'a>) -> Compare<'a> {
        Compare { image, base, job, done: BTreeMap::new(), buf: Vec::new(), bytes: 0 }
    }

    /// The length of the source.
    pub fn size(&mut self, bytes: u64) -> Result<()> {
        if self.image.size_bytes() != bytes {
            return Err(differs(format!("length {}; expected {bytes}", self.image.size_bytes())));
        }
        Ok(())
    }

    /// Bytes of the source; what is past the image's end is padding and must be zero.
    pub fn bytes(&mut self, offset: u64, expected: &[u8]) -> Result<()> {
        let inside = self.image.size_bytes().saturating_sub(offset).min(expected.len() as u64);
        let (expected, padding) = expected.split_at(usize::try_from(inside).unwrap_or(0));
        if padding.iter().any(|&byte| byte != 0) {
            return Err(differs(format!(
                "bytes that are not zero past the end, from {}",
                offset + inside
            )));
        }
        self.note(offset..offset + inside)?;
        let mut at = offset;
        for piece in expected.chunks(PIECE_BYTES) {
            self.job.check()?;
            self.buf.resize(piece.len(), 0);
            self.image.read_at(&mut self.buf, at)?;
            if self.buf != piece {
                return Err(first_difference(at, &self.buf, piece));
            }
            at += piece.len() as u64;
            self.job.progress.advance(piece.len() as u64);
        }
        Ok(())
    }

    /// A range in which the source is zero.
    pub fn zeros(&mut self, range: Range<u64>) -> Result<()> {
        let end = range.end.min(self.image.size_bytes());
        self.note(range.start.min(end)..end)?;
        // Blocks that are zero are never stored, so the map tells.
        let mut stored = None;
        self.image.for_each_extent(range.start..end, &mut |extent| {
            if extent.source != dormouse_image::map::Source::Zero {
                stored.get_or_insert(extent.range.start);
            }
            Ok(())
        })?;
        self.job.progress.advance(end.saturating_sub(range.start));
        match stored {
            None => Ok(()),
            Some(at) => Err(differs(format!("data at byte {at}; expected zeros"))),
        }
    }

    /// A range in which the source says nothing, so that the image must be as the one before.
    pub fn as_before(&mut self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let base = self.base.clone().ok_or_else(|| {
            Error::new(ErrorKind::Refused, "a diff without the image that it is against")
        })?;
        let mut buf = vec![0; PIECE_BYTES];
        let mut at = range.start;
        let end = range.end.min(self.image.size_bytes());
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let there = base.size_bytes().saturating_sub(at).min(len as u64);
            let there = usize::try_from(there).unwrap_or(0);
            buf[there..].fill(0);
            base.read_at(&mut buf[..there], at)?;
            self.bytes(at, &buf[..len])?;
            at += len as u64;
        }
        Ok(())
    }

    fn note(&mut self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.bytes += range.end - range.start;
        let mut range = range;
        if let Some((&start, &end)) = self.done.range(..=range.start).next_back()
            && end >= range.start
        {
            if end > range.start {
                return Err(differs(format!("byte {} comes twice in the source", range.start)));
            }
            range.start = start;
        }
        if let Some((&next, &end)) = self.done.range(range.end.min(range.start + 1)..).next() {
            if next < range.end {
                return Err(differs(format!("byte {next} comes twice in the source")));
            }
            if next == range.end {
                self.done.remove(&next);
                range.end = end;
            }
        }
        self.done.insert(range.start, range.end);
        Ok(())
    }

    /// How many bytes were compared, if it was every one.
    pub(crate) fn finish(self) -> Result<u64> {
        let size = self.image.size_bytes();
        let whole = match self.done.iter().next() {
            None => size == 0,
            Some((&start, &end)) => start == 0 && end == size,
        };
        if !whole {
            let at = match self.done.iter().next() {
                Some((&0, &end)) => end,
                _ => 0,
            };
            return Err(differs(format!("the source says nothing of byte {at}")));
        }
        Ok(self.bytes)
    }
}

fn differs(why: String) -> Error {
    Error::new(ErrorKind::Differs, why)
}

fn first_difference(at: u64, got: &[u8], expected: &[u8]) -> Error {
    let place = got.iter().zip(expected).position(|(got, expected)| got != expected).unwrap_or(0);
    let byte = |bytes: &[u8]| bytes.get(place).copied().unwrap_or(0);
    differs(format!(
        "byte {}: got {:#04x}; expected {:#04x}",
        at + place as u64,
        byte(got),
        byte(expected)
    ))
}

/// A file as reading it from its first to its last byte gives it.
pub(crate) fn plain_file(path: &Path, compare: &mut Compare<'_>) -> Result<()> {
    for_each_piece(path, &mut |at, piece| compare.bytes(at, piece))
        .and_then(|end| compare.size(end))
}

/// The same of a file that is open, which is read from its first byte to its last, holes and all.
pub(crate) fn opened_file(file: &StableFile, compare: &mut Compare<'_>) -> Result<()> {
    let size = RandomRead::size_bytes(file);
    let mut buf = vec![0; PIECE_BYTES];
    let mut at = 0;
    while at < size {
        let len = usize::try_from(size - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        RandomRead::read_at(file, &mut buf[..len], at)?;
        compare.bytes(at, &buf[..len])?;
        at += len as u64;
    }
    compare.size(size)
}

/// A diff, page by page: the kernel is asked for each page whether it is a hole, not for the extents.
pub(crate) fn diff_file(path: &Path, compare: &mut Compare<'_>) -> Result<()> {
    let file = File::open(path).context(|| format!("cannot open {}", path.display()))?;
    let end = for_each_piece(path, &mut |at, piece| {
        for (page, bytes) in (0..).zip(piece.chunks(BLOCK_BYTES)) {
            let at = at + page * PAGE_BYTES;
            let is_data = bytes.iter().any(|&byte| byte != 0)
                || dormouse_sys::sparse::data_extents(&file, at..at + 1)
                    .next()
                    .transpose()
                    .context(|| format!("cannot look for holes in {}", path.display()))?
                    .is_some();
            match is_data {
                true => compare.bytes(at, bytes)?,
                false => compare.as_before(at..at + bytes.len() as u64)?,
            }
        }
        Ok(())
    })?;
    compare.size(end)
}

/// Calls `visit` with the pieces of a file in order and returns its length.
fn for_each_piece(path: &Path, visit: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<u64> {
    let what = || format!("cannot read {}", path.display());
    let mut file = File::open(path).context(what)?;
    let mut buf = vec![0; PIECE_BYTES];
    let mut at = 0;
    loop {
        let mut len = 0;
        while len < buf.len() {
            match file.read(&mut buf[len..]).context(what)? {
                0 => break,
                read => len += read,
            }
        }
        if len > 0 {
            visit(at, &buf[..len])?;
            at += len as u64;
        }
        if len < buf.len() {
            return Ok(at);
        }
    }
}
