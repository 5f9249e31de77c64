//! Copies of sparse files that keep their holes.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

/// Copies `from` to the new file `to`: as a reflink where the file system can, else data range by data range.
///
/// Holes stay holes. An existing `to` is replaced. Returns the bytes of data ranges, 0 for a reflink.
pub fn copy_sparse(from: &Path, to: &Path) -> Result<u64> {
    let source = File::open(from).with_context(|| format!("cannot open {}", from.display()))?;
    let target = File::create(to).with_context(|| format!("cannot create {}", to.display()))?;
    if ioctl_ficlone(&target, &source).is_ok() {
        return Ok(0);
    }
    copy_ranges(&source, &target)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

fn copy_ranges(source: &File, target: &File) -> Result<u64> {
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut copied = 0;
    let mut end = 0;
    loop {
        let start = match seek(source.as_fd(), SeekFrom::Data(end)) {
            Ok(start) => start,
            // No data up to the end of the file.
            Err(Errno::NXIO) => return Ok(copied),
            Err(error) => return Err(error.into()),
        };
        end = seek(source.as_fd(), SeekFrom::Hole(start))?;
        copied += end - start;
        copy_range(source, target, start, end)?;
    }
}

fn copy_range(source: &File, target: &File, start: u64, end: u64) -> Result<()> {
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        let left = usize::try_from(end - read_at)?;
        let moved = copy_file_range(source, Some(&mut read_at), target, Some(&mut write_at), left)?;
        if moved == 0 {
            bail!("the file ended at {read_at}, inside the data range {start}..{end}");
        }
    }
    Ok(())
}
