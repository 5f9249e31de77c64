//! What the kernel keeps of files in memory (`posix_fadvise(2)`).

use std::io;
use std::os::fd::AsFd;

use rustix::fs::Advice;

/// Drops the cached pages of a file that do not wait to be written, so that they are read from
/// the medium again.
///
/// Advice: pages that are mapped or in use stay, as does everything where the file system has no
/// medium below it (tmpfs). After a failed `fsync` the pages it did not write are clean; this is
/// how to see what really is in the file.
pub fn forget_clean(file: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    #[test]
    fn the_content_stays() {
        for folder in [std::env::temp_dir(), "/dev/shm".into()] {
            let file = crate::temp_file::unnamed(&folder).unwrap();
            file.write_all_at(&[7; 8192], 0).unwrap();
            super::forget_clean(&file).unwrap();
            let mut bytes = [0; 8192];
            file.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(bytes, [7; 8192]);
        }
    }
}
