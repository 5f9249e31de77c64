//! What the page tables of a process hold (`/proc/PID/pagemap`, `PAGEMAP_SCAN`, Linux 6.7), and its
//! maps (`/proc/PID/maps`).
//!
//! Reading those of another process wants the right to trace it (`ptrace(2)`, access mode
//! `PTRACE_MODE_READ_FSCREDS`): the same user and no dropped privileges, or `CAP_SYS_PTRACE`.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::{BitOr, Range};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use rustix::ioctl::{Opcode, opcode};

const SCAN: Opcode = opcode::read_write::<ScanArgument>(b'f', 16);

/// Runs told by one call of the kernel; 12 KiB of memory.
const RUNS: usize = 512;

#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArgument>() == 96);

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Run {
    start: u64,
    end: u64,
    categories: u64,
}

/// What a page is, as a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Categories(u64);

impl Categories {
    /// Not protected by a userfaultfd.
    pub const WRITABLE: Categories = Categories(1 << 1);
    /// A page of a file, or of shared memory.
    pub const FILE: Categories = Categories(1 << 2);
    /// In memory.
    pub const PRESENT: Categories = Categories(1 << 3);
    /// In swap, or an entry that stands for such a page.
    pub const SWAPPED: Categories = Categories(1 << 4);
    /// The kernel's one page of zeros.
    pub const ZERO: Categories = Categories(1 << 5);

    const NONE: Categories = Categories(0);

    /// Whether it has all of `other`.
    pub const fn has(self, other: Categories) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Categories {
    type Output = Categories;

    fn bitor(self, other: Categories) -> Categories {
        Categories(self.0 | other.0)
    }
}

/// Which pages a scan tells of.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    any_of: Categories,
    none_of: Categories,
}

impl Wanted {
    /// Pages that the process has: in memory or swapped out.
    pub const THERE: Wanted =
        Wanted { any_of: Categories(1 << 3 | 1 << 4), none_of: Categories::NONE };

    /// Pages that the process has and that are none of a file: of a private map of a file, just
    /// those that were written to.
    pub const OWN: Wanted =
        Wanted { any_of: Categories(1 << 3 | 1 << 4), none_of: Categories::FILE };
}

/// The page tables of a process.
#[derive(Debug)]
pub struct PageMap {
    file: File,
}

impl PageMap {
    /// Those of a process. `EACCES` or `EPERM` where it may not be traced.
    pub fn of(pid: u32) -> io::Result<PageMap> {
        Ok(PageMap { file: File::open(format!("/proc/{pid}/pagemap"))? })
    }

    /// Tells `sink` of the pages in `range` that are wanted, in runs of equal categories, ascending.
    ///
    /// While the process runs each run was true when it was looked at. `ENOTTY` before Linux 6.7.
    pub fn scan(
        &self,
        range: Range<u64>,
        wanted: Wanted,
        sink: &mut dyn FnMut(Range<u64>, Categories),
    ) -> io::Result<()> {
        let mut runs = [Run::default(); RUNS];
        let mut at = range.start;
        while at < range.end {
            let mut argument = ScanArgument {
                size: size_of::<ScanArgument>() as u64,
                flags: 0,
                start: at,
                end: range.end,
                walk_end: 0,
                vec: runs.as_mut_ptr().expose_provenance() as u64,
                vec_len: RUNS as u64,
                max_pages: 0,
                category_inverted: wanted.none_of.0,
                category_mask: wanted.none_of.0,
                category_anyof_mask: wanted.any_of.0,
                return_mask: 0b11_1110,
            };
            // SAFETY: the opcode belongs to the argument's type, whose `vec` are `vec_len` runs that
            // the kernel may write to.
            let told = unsafe { scan(&self.file, &mut argument)? };
            for run in &runs[..told.min(RUNS)] {
                sink(run.start..run.end, Categories(run.categories));
            }
            if argument.walk_end <= at {
                return Err(io::Error::other("a scan of page tables made no way"));
            }
            at = argument.walk_end;
        }
        Ok(())
    }
}

/// # Safety
///
/// `argument.vec` points to `argument.vec_len` runs that may be written to.
unsafe fn scan(file: &File, argument: &mut ScanArgument) -> io::Result<usize> {
    // SAFETY: as the caller promised.
    let told = unsafe {
        libc::ioctl(file.as_raw_fd(), libc::Ioctl::from(SCAN), std::ptr::from_mut(argument))
    };
    usize::try_from(told).map_err(|_| io::Error::last_os_error())
}

/// A map of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// Its addresses.
    pub addresses: Range<u64>,
    /// Whether writes go to the file or other processes.
    pub is_shared: bool,
    /// Whether it may be written to.
    pub is_writable: bool,
    /// Where in the file it starts.
    pub file_offset: u64,
    /// The file's device, major and minor.
    pub device: (u32, u32),
    /// The file's inode; 0 for anonymous memory.
    pub inode: u64,
    /// The file's path, as the kernel shows it.
    pub path: PathBuf,
}

impl MapEntry {
    /// Takes a line of `/proc/PID/maps` apart.
    pub fn parse(line: &str) -> Option<MapEntry> {
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let mut rest = line;
        let mut field = || {
            let trimmed = rest.trim_start_matches(' ');
            let (field, after) = trimmed.split_once(' ').unwrap_or((trimmed, ""));
            rest = after;
            field
        };
        let (start, end) = field().split_once('-')?;
        let rights = field().as_bytes();
        let file_offset = hex(field())?;
        let (major, minor) = field().split_once(':')?;
        let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
        let inode = field().parse().ok()?;
        Some(MapEntry {
            addresses: hex(start)?..hex(end)?,
            is_shared: rights.get(3) == Some(&b's'),
            is_writable: rights.get(1) == Some(&b'w'),
            file_offset,
            device,
            inode,
            path: PathBuf::from(rest.trim_start_matches(' ')),
        })
    }
}

/// The maps of a process, ascending. `EACCES` or `EPERM` where it may not be traced.
pub fn maps(pid: u32) -> io::Result<Vec<MapEntry>> {
    BufReader::new(File::open(format!("/proc/{pid}/maps"))?)
        .split(b'\n')
        .map(|line| {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            MapEntry::parse(&line)
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, line.into_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::mapping::Mapping;
    use crate::temp_file;

    #[test]
    fn written_pages_of_a_private_map_are_its_own() {
        let len = 2048 * 4096;
        let file = temp_file::unnamed(&std::env::temp_dir()).unwrap();
        file.write_all_at(&vec![5; len], 0).unwrap();
        let mapping = Mapping::private_file(&file, len).unwrap();
        let mut sum = 0;
        for page in (0..2048).step_by(3) {
            sum += u64::from(mapping.bytes()[page * 4096].load(Ordering::Relaxed));
        }
        assert_eq!(sum, 5 * 683);
        // More runs than one call tells.
        for page in (1..2048).step_by(2) {
            mapping.bytes()[page * 4096].store(6, Ordering::Relaxed);
        }
        let addresses = mapping.addresses();
        let pages = PageMap::of(std::process::id()).unwrap();
        let mut own = Vec::new();
        pages
            .scan(addresses.clone(), Wanted::OWN, &mut |run, _| {
                own.extend(
                    (run.start..run.end).step_by(4096).map(|at| (at - addresses.start) / 4096),
                );
            })
            .unwrap();
        assert_eq!(own, (1..2048).step_by(2).collect::<Vec<u64>>());
    }

    #[test]
    fn lines_of_maps_are_taken_apart() {
        let line =
            "7f01a000-7f02b000 rw-p 00003000 fd:01 1234                       /a b/c (deleted)";
        let entry = MapEntry::parse(line).unwrap();
        assert_eq!(entry.addresses, 0x7f01_a000..0x7f02_b000);
        assert_eq!((entry.is_shared, entry.is_writable), (false, true));
        assert_eq!((entry.file_offset, entry.device, entry.inode), (0x3000, (0xfd, 1), 1234));
        assert_eq!(entry.path, PathBuf::from("/a b/c (deleted)"));
        let anonymous = MapEntry::parse("7ffe0000-7ffe1000 r-xs 00000000 00:00 0 ").unwrap();
        assert!(
            anonymous.is_shared && anonymous.inode == 0 && anonymous.path.as_os_str().is_empty()
        );
        for bad in ["", "x", "1-2", "1-2 rw-p 0 0 0", "1-2 rw-p 0 0:0 x"] {
            assert_eq!(MapEntry::parse(bad), None, "{bad}");
        }
        assert!(maps(std::process::id()).unwrap().len() > 5);
    }
}
