//! Reads the memory of another process (`process_vm_readv(2)`).
//!
//! Wants the right to trace it, as `page_map` does. Pages that are missing and observed by a
//! userfaultfd make the reader wait for its handler.

use std::io;
use std::ops::Range;

/// Ranges read by one call (`IOV_MAX`).
const RANGES_MAX: usize = 1024;

/// Fills `buffer` with the ranges of `pid`'s memory, one behind the other.
///
/// `EFAULT`: some of it is not mapped. `ESRCH`: the process is gone. `EPERM`: not allowed to.
///
/// # Panics
///
/// If the buffer is not as long as the ranges together.
pub fn read(pid: u32, ranges: &[Range<u64>], buffer: &mut [u8]) -> io::Result<()> {
    let wanted: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    assert_eq!(buffer.len() as u64, wanted, "a buffer as long as what is read");
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
    let mut rest = buffer;
    for ranges in ranges.chunks(RANGES_MAX) {
        let len = ranges.iter().map(|range| range.end - range.start).sum::<u64>();
        let (part, after) = rest.split_at_mut(usize::try_from(len).unwrap_or(usize::MAX));
        read_chunk(pid, ranges, part)?;
        rest = after;
    }
    Ok(())
}

fn read_chunk(pid: libc::pid_t, ranges: &[Range<u64>], buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        let mut skip = done as u64;
        let mut remote = Vec::with_capacity(ranges.len());
        for range in ranges {
            let len = range.end - range.start;
            let skipped = skip.min(len);
            skip -= skipped;
            if skipped < len {
                remote.push(libc::iovec {
                    iov_base: std::ptr::without_provenance_mut(to_usize(range.start + skipped)),
                    iov_len: to_usize(len - skipped),
                });
            }
        }
        let rest = &mut buffer[done..];
        let local = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        // SAFETY: `local` is memory of ours that may be written to; addresses of the other process
        // are the kernel's to check.
        let read = unsafe {
            libc::process_vm_readv(
                pid,
                &raw const local,
                1,
                remote.as_ptr(),
                remote.len() as u64,
                0,
            )
        };
        match usize::try_from(read) {
            Ok(0) => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
            Ok(bytes) => done += bytes,
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

/// An address or length of another process of this machine.
fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::mapping::{Mapping, PageSize};

    fn mark(number: usize) -> u8 {
        number.to_le_bytes()[0]
    }

    #[test]
    fn ranges_come_one_behind_the_other() {
        let len = 3000 * 8192;
        let mapping = Mapping::anonymous(len, PageSize::Small).unwrap();
        for (at, byte) in mapping.bytes().iter().enumerate().step_by(64) {
            byte.store(mark(at / 64), Ordering::Relaxed);
        }
        let base = mapping.addresses().start;
        let ranges: Vec<_> = (0..3000).map(|n| base + n * 8192..base + n * 8192 + 64).collect();
        let mut buffer = vec![0xff; 3000 * 64];
        read(std::process::id(), &ranges, &mut buffer).unwrap();
        for (n, piece) in buffer.chunks(64).enumerate() {
            assert_eq!(piece[0], mark(n * 8192 / 64), "range {n}");
            assert!(piece[1..].iter().all(|&byte| byte == 0), "range {n}");
        }
    }

    #[test]
    fn what_is_not_mapped_is_an_error() {
        let mapping = Mapping::anonymous(8192, PageSize::Small).unwrap();
        let start = mapping.addresses().start;
        drop(mapping);
        let mut buffer = [0; 64];
        let range = start..start + 64;
        assert!(read(std::process::id(), std::slice::from_ref(&range), &mut buffer).is_err());
    }
}
