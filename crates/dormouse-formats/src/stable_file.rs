//! A foreign file that is read for as long as it stays the one that was looked at.
//!
//! Descriptors are given back between a look and the reads after it; what is opened again is the
//! same inode with the same length and time, or it is refused.

use std::fs::{File, Metadata};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

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

    fn holes(&self, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        let mut holes = Vec::new();
        if !self.has_holes {
            return Ok(holes);
        }
        let mut at = range.start;
        for extent in data_extents(&self.file()?, range.clone()) {
            let extent = extent.context(|| format!("cannot look for holes in {}", self.label))?;
            if extent.start > at {
                holes.push(at..extent.start);
            }
            at = extent.end;
        }
        if at < range.end {
            holes.push(at..range.end);
        }
        Ok(holes)
    }
}
