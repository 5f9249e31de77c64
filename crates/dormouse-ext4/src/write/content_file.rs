//! The image's file as contents go into it: past the page cache where there are many.
//!
//! Nobody reads contents back before the image is published, and publishing waits for the disk
//! anyway. Through the page cache their bytes would be copied once more, take the place of what
//! guests share there, and cost the most of all of a build. Zeros are never written.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};

use crate::disk::BLOCK_BYTES;
use crate::write::blocks::is_zero;

/// Images of less content stay in the page cache, where whoever made them will want them.
pub(crate) const DIRECT_FROM_BYTES: u64 = 64 << 20;

/// Shorter runs go through the page cache, which gathers them.
const DIRECT_RUN_BYTES_MIN: usize = 128 << 10;

/// A file that contents are written to.
#[derive(Debug)]
pub(crate) struct ContentFile<F> {
    file: F,
    /// The same file, opened with `O_DIRECT`.
    direct: Option<File>,
    /// Whether it turned out that the file system cannot.
    cannot: AtomicBool,
}

impl<F: std::borrow::Borrow<File>> ContentFile<F> {
    /// Writes through the page cache.
    pub(crate) fn cached(file: F) -> ContentFile<F> {
        ContentFile { file, direct: None, cannot: AtomicBool::new(true) }
    }

    /// Writes past the page cache if the file system can.
    pub(crate) fn direct(file: F) -> ContentFile<F> {
        let path = format!("/proc/self/fd/{}", file.borrow().as_raw_fd());
        let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
        let direct = rustix::fs::open(path, flags, Mode::empty()).ok().map(File::from);
        ContentFile { file, direct, cannot: AtomicBool::new(false) }
    }

    /// Whether writes wait for the disk.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Writes the runs of blocks that are not zero.
    pub(crate) fn write_nonzero(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut begin = None;
        let write = |from: usize, to: usize| {
            self.write(&bytes[from * BLOCK_BYTES..to], offset + (from * BLOCK_BYTES) as u64)
        };
        for (index, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
            match (is_zero(block), begin) {
                (false, None) => begin = Some(index),
                (true, Some(first)) => {
                    write(first, index * BLOCK_BYTES)?;
                    begin = None;
                }
                _ => {}
            }
        }
        begin.map_or(Ok(()), |first| write(first, bytes.len()))
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let is_aligned = bytes.as_ptr().align_offset(BLOCK_BYTES) == 0
            && bytes.len().is_multiple_of(BLOCK_BYTES)
            && offset.is_multiple_of(BLOCK_BYTES as u64);
        if let Some(direct) = &self.direct
            && is_aligned
            && bytes.len() >= DIRECT_RUN_BYTES_MIN
            && !self.cannot.load(Ordering::Relaxed)
        {
            match direct.write_all_at(bytes, offset) {
                // Some say only now that they cannot.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    self.cannot.store(true, Ordering::Relaxed);
                }
                written => return written,
            }
        }
        self.file.borrow().write_all_at(bytes, offset)
    }
}
