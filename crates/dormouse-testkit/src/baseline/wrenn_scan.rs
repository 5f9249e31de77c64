//! The zero scan as wrenn describes it: data extents, reads of 1 MiB, every byte looked at.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

const BLOCK_BYTES: u64 = 4096;
const READ_BYTES: usize = 1 << 20;

/// The joined runs of whole zero blocks in the data extents of `file`, in ascending order.
pub fn zero_runs(file: &File) -> io::Result<Vec<Range<u64>>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut buf = vec![0; READ_BYTES];
    let mut at = 0;
    loop {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data / BLOCK_BYTES * BLOCK_BYTES,
            Err(Errno::NXIO) => return Ok(runs),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(data.max(at)))?;
        at = data;
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(READ_BYTES).min(READ_BYTES);
            file.read_exact_at(&mut buf[..want], at)?;
            for (index, block) in buf[..want].chunks(4096).enumerate() {
                let start = at + index as u64 * BLOCK_BYTES;
                if block.len() == 4096 && block.iter().all(|&byte| byte == 0) {
                    match runs.last_mut() {
                        Some(run) if run.end == start => run.end += BLOCK_BYTES,
                        _ => runs.push(start..start + BLOCK_BYTES),
                    }
                }
            }
            at += want as u64;
        }
    }
}
