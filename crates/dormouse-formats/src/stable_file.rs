//! A foreign file that is read for as long as it stays the one that was looked at.
//!
//! Descriptors are given back between a look and the reads after it; what is opened again is the
//! same inode with the same length and time, or it is refused.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use dormouse_image::block::BLOCK_BYTES_U64;
use dormouse_store::source::{LayerRun, LayerSource};
use dormouse_sys::sparse::{data_extents, has_holes};

use crate::data::RandomRead;
use crate::error::{Context, Error, ErrorKind, Result};

/// A file as it was when it was first opened. It may be closed and opened again: another file at its
/// path is refused then.
#[derive(Debug)]
pub struct StableFile {
    path: PathBuf,
    label: String,
    size_bytes: u64,
    /// What tells the file from another one and from itself after a write.
    stamp: Stamp,
    has_holes: bool,
    file: Mutex<Option<Arc<File>>>,
}

#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size_bytes: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Stamp {
        Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size_bytes: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }
}

impl StableFile {
    /// Opens a regular file.
    pub fn open(path: &Path) -> Result<StableFile> {
        let label = path.display().to_string();
        let what = || format!("cannot open {label}");
        // A pipe or terminal in the place of a file would be waited for.
        if !path.metadata().context(what)?.is_file() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{label} is not a regular file"),
            ));
        }
        let file = File::open(path).context(what)?;
        let metadata = file.metadata().context(what)?;
        let size_bytes = metadata.len();
        let has_holes = has_holes(&file, size_bytes).context(what)?;
        Ok(StableFile {
            path: path.to_owned(),
            label,
            size_bytes,
            stamp: Stamp::of(&metadata),
            has_holes,
            file: Mutex::new(Some(Arc::new(file))),
        })
    }

    /// The file, opened again if it was closed.
    fn file(&self) -> Result<Arc<File>> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &*file {
            return Ok(Arc::clone(file));
        }
        let what = || format!("cannot open {} again", self.label);
        // What lies there now may be a pipe, which opening would wait for.
        self.check(&self.path.metadata().context(what)?)?;
        let opened = File::open(&self.path).context(what)?;
        self.check(&opened.metadata().context(what)?)?;
        Ok(Arc::clone(file.insert(Arc::new(opened))))
    }

    fn check(&self, metadata: &Metadata) -> Result<()> {
        if Stamp::of(metadata) == self.stamp {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!("{} was written to while it was read, or is another file now", self.label),
        ))
    }

    /// Fails if another file lies at `path`.
    pub(crate) fn check_same(&self, path: &Path) -> Result<()> {
        self.check(&path.metadata().context(|| format!("cannot look at {}", path.display()))?)
    }

    /// Whether both are one file, under two names.
    pub(crate) fn is_one_with(&self, other: &StableFile) -> bool {
        self.stamp == other.stamp
    }

    /// The path that it was opened at.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a part of it has no data.
    pub fn has_holes(&self) -> bool {
        self.has_holes
    }

    /// Its path, for messages.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The whole file, at most `max` bytes.
    pub fn read_all(&self, max: u64) -> Result<Vec<u8>> {
        if self.size_bytes > max {
            return Err(Error::corrupt(format!(
                "{} has {} bytes; expected at most {max}",
                self.label, self.size_bytes
            )));
        }
        let len = usize::try_from(self.size_bytes)
            .map_err(|_| Error::corrupt(format!("{} is too long", self.label)))?;
        let mut bytes = vec![0; len];
        self.read_at(&mut bytes, 0)?;
        Ok(bytes)
    }
}

/// The file as the store reads it: data where it has some, zeros in its holes.
#[derive(Debug)]
pub(crate) struct WholeFile(pub(crate) Arc<StableFile>);

impl LayerSource for WholeFile {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes
    }

    fn label(&self) -> String {
        self.0.label.clone()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        Ok(RandomRead::read_at(&*self.0, buf, offset)?)
    }

    fn check_unchanged(&self) -> io::Result<()> {
        Ok(RandomRead::check_unchanged(&*self.0)?)
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()> {
        let size_bytes = self.0.size_bytes;
        // A block that is data in part is data.
        let mut at = 0;
        for extent in data_extents(&self.0.file()?, 0..size_bytes) {
            let extent = extent?;
            let start = (extent.start / BLOCK_BYTES_U64 * BLOCK_BYTES_U64).max(at);
            let end = extent.end.next_multiple_of(BLOCK_BYTES_U64).min(size_bytes);
            if start > at {
                visit(at..start, LayerRun::Zero)?;
            }
            if end > start {
                visit(start..end, LayerRun::Data)?;
            }
            at = at.max(end);
        }
        if at < size_bytes {
            visit(at..size_bytes, LayerRun::Zero)?;
        }
        Ok(())
    }
}

impl RandomRead for StableFile {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file()?
            .read_exact_at(buf, offset)
            .context(|| format!("cannot read {} bytes at {offset} of {}", buf.len(), self.label))
    }

    fn check_unchanged(&self) -> Result<()> {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let metadata = match file {
            Some(file) => file.metadata(),
            None => self.path.metadata(),
        };
        self.check(&metadata.context(|| format!("cannot look at {}", self.label))?)
    }

    fn release(&self) {
        *self.file.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn for_each_hole(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        if !self.has_holes {
            return Ok(());
        }
        let mut at = range.start;
        for extent in data_extents(&self.file()?, range.clone()) {
            let extent = extent.context(|| format!("cannot look for holes in {}", self.label))?;
            if extent.start > at {
                visit(at..extent.start)?;
            }
            at = extent.end;
        }
        if at < range.end {
            visit(at..range.end)?;
        }
        Ok(())
    }
}
