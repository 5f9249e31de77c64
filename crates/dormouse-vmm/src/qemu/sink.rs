//! Guest memory as a flat, sparse file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::vmm::{PAGE_BYTES, PageSink};

/// A file that pages are written to at their offsets. Zeros become holes, unless something was
/// written there before.
#[derive(Debug)]
pub(super) struct FileSink {
    file: File,
    /// Nothing was written from here on.
    fresh_from: u64,
}

impl FileSink {
    pub(super) fn create(path: &Path, bytes: u64) -> Result<FileSink> {
        let made = File::options().write(true).create(true).truncate(true).open(path);
        let sized = made.and_then(|file| file.set_len(bytes).map(|()| file));
        let file =
            sized.map_err(|error| Error::file(format!("cannot make {}", path.display()), error))?;
        Ok(FileSink { file, fresh_from: 0 })
    }
}

impl PageSink for FileSink {
    fn page(&mut self, offset: u64, bytes: &[u8; PAGE_BYTES]) -> io::Result<()> {
        self.fresh_from = self.fresh_from.max(offset + PAGE_BYTES as u64);
        self.file.write_all_at(bytes, offset)
    }

    fn zero(&mut self, offset: u64) -> io::Result<()> {
        if offset < self.fresh_from {
            return self.file.write_all_at(&[0; PAGE_BYTES], offset);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_later_page_counts_and_zeros_are_holes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let mut sink = FileSink::create(&path, 4 << 12).unwrap();
        sink.zero(0).unwrap();
        sink.page(1 << 12, &[1; PAGE_BYTES]).unwrap();
        sink.zero(2 << 12).unwrap();
        sink.page(3 << 12, &[3; PAGE_BYTES]).unwrap();
        sink.zero(1 << 12).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes[..3 << 12].iter().all(|&byte| byte == 0));
        assert!(bytes[3 << 12..].iter().all(|&byte| byte == 3));
    }
}
