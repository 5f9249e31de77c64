//! What an overlay lies over: an image that never changes.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use dormouse_sys::file_size::file_size;
use dormouse_sys::sparse;

use crate::error::{Context, Error, ErrorKind, Result};

/// What is known of a run of a base without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// Zeros; reading them costs nothing.
    Zero,

    /// Bytes, which may be zeros all the same.
    Data,
}

/// An image that is read through where the overlay has nothing, and never changes.
///
/// A failed read is told to whoever asked, and to nobody else: the base is not ours to judge.
pub trait Base: Debug + Send + Sync {
    /// The length in bytes. A disk may be longer; it is zero from there on.
    fn size_bytes(&self) -> u64;

    /// Fills `buf` from `offset`; all of it lies before [`Base::size_bytes`].
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Calls `visit` with runs that cover `range` in order, cut to it. Neighbours may be alike.
    fn for_each_run(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, RunKind) -> Result<()>,
    ) -> Result<()>;

    /// Calls `visit` with runs that cover `range` in order, cut to it, and with what the base calls
    /// the place they are stored in: a number of its own, 0 for zeros.
    fn for_each_source(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, u64) -> Result<()>,
    ) -> Result<()> {
        self.for_each_run(range, &mut |run, kind| visit(run, u64::from(kind == RunKind::Data)))
    }

    /// Makes a later read of the range quicker, if there is a way.
    fn prefetch(&self, range: Range<u64>) -> Result<()> {
        let _ = range;
        Ok(())
    }

    /// Whether reading the range probably waits for a disk or a decoder. Cheap, and may be wrong.
    fn read_will_wait(&self, range: Range<u64>) -> bool {
        let _ = range;
        false
    }
}

/// The base of a blank disk: no bytes at all.
#[derive(Clone, Copy, Debug)]
pub struct BlankBase;

impl Base for BlankBase {
    fn size_bytes(&self) -> u64 {
        0
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if buf.is_empty() { Ok(()) } else { Err(past_the_end("a blank base", offset)) }
    }

    fn for_each_run(
        &self,
        _range: Range<u64>,
        _visit: &mut dyn FnMut(Range<u64>, RunKind) -> Result<()>,
    ) -> Result<()> {
        Ok(())
    }
}

/// A raw file or block device as a base. Its holes are zeros.
#[derive(Debug)]
pub struct FileBase {
    file: File,
    label: String,
    size_bytes: u64,
}

impl FileBase {
    /// Opens a raw image, which nobody may change as long as it is a base.
    pub fn open(path: &Path) -> Result<FileBase> {
        let label = path.display().to_string();
        let file = File::open(path).context(|| format!("cannot open {label}"))?;
        let size = file_size(&file).context(|| format!("cannot look at {label}"))?;
        let Some(size_bytes) = size.bytes else {
            let got = size.kind.describe();
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{label} is {got}; expected a file or a block device"),
            ));
        };
        Ok(FileBase { file, label, size_bytes })
    }
}

impl Base for FileBase {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buf, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => past_the_end(&self.label, offset),
            _ => Error::io(format!("cannot read {} at byte {offset}", self.label), error),
        })
    }

    fn for_each_run(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, RunKind) -> Result<()>,
    ) -> Result<()> {
        let end = range.end.min(self.size_bytes);
        let mut at = range.start;
        for extent in sparse::data_extents(&self.file, range.start..end) {
            let extent = extent.context(|| format!("cannot find the holes of {}", self.label))?;
            if at < extent.start {
                visit(at..extent.start, RunKind::Zero)?;
            }
            at = extent.end;
            visit(extent, RunKind::Data)?;
        }
        if at < end { visit(at..end, RunKind::Zero) } else { Ok(()) }
    }
}

fn past_the_end(label: &str, offset: u64) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{label} ends before the bytes at {offset}"))
}
