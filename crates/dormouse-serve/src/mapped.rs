//! Takes what a guest changed out of a VMM that maps an image's file privately.
//!
//! A VMM that was given a snapshot's memory as a file (Firecracker's `File` backend, QEMU's
//! `share=off`) shares its clean pages with the page cache; a page that the guest wrote to is the
//! VMM's own. So the page tables tell exactly what changed, without any tracking
//! ([`PageMap::scan`], [`Wanted::OWN`]).
//!
//! Where the VMM laid anonymous memory over the file, as Firecracker does for a balloon, a page that
//! is there is the guest's, and one that is not is zero: the VMM's maps tell such places. To know
//! that they belong to the guest, and not to somebody who was given the addresses beside it, the
//! borders of its regions must be known.
//!
//! Pages that are there and anonymous are the guest's whether or not it wrote to them: reads of a
//! private file mapping never make any. Nothing of this works while the VMM runs: pause it first.

use std::ffi::OsStr;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use dormouse_live::pages::{PAGE_BYTES, PageChanges};
use dormouse_sys::page_map::{MapEntry, PageMap, Wanted, maps};
use dormouse_sys::peer::Peer;
use dormouse_sys::process_memory;

use crate::error::{Error, ErrorKind, Result};

/// What people can do where the right to look into a VMM is missing.
const NOT_ALLOWED: &str = "not allowed to look into the VMM's memory: run as the VMM's user, or with \
                           CAP_SYS_PTRACE, and let the VMM be traced (kernel.yama.ptrace_scope)";

/// How to find the map of an image's file among a process's maps.
#[derive(Clone, Copy, Debug)]
pub enum MappedFile<'a> {
    /// The file itself, which this process sees at the same device and inode.
    Same(&'a Path),

    /// The end of the path that the VMM's maps show, for a VMM in a mount namespace of its own.
    PathEnd(&'a Path),
}

/// The private map of an image's file in a process.
#[derive(Debug)]
pub struct MappedMemory {
    peer: Peer,
    size_bytes: u64,
    parts: Vec<Part>,
}

/// A run of addresses that stand for a run of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    addresses: Range<u64>,
    image_offset: u64,
    /// Whether something else than the file lies there.
    is_replaced: bool,
}

impl MappedMemory {
    /// Finds where a process maps an image's file of `size_bytes`, as `regions`: ranges of the image,
    /// ascending and without gaps. Without any, a file that is mapped in one piece is one region, if its
    /// first and last pages are the file's still: what lies beside it may be somebody else's.
    ///
    /// `NotFound` if it does not, `InvalidInput` if it maps it shared (then the file is what the guest
    /// changed), or other than in these regions.
    pub fn find(
        peer: Peer,
        file: MappedFile<'_>,
        size_bytes: u64,
        regions: &[Range<u64>],
    ) -> Result<MappedMemory> {
        let entries = maps(peer.pid()).map_err(not_allowed)?;
        let whole = 0..size_bytes.next_multiple_of(PAGE_BYTES);
        let known = if regions.is_empty() { std::slice::from_ref(&whole) } else { regions };
        let parts = parts_of(&entries, &Identity::of(file)?, known, whole.end)?;
        let is_open = |part: Option<&Part>| part.is_none_or(|part| part.is_replaced);
        if regions.is_empty() && (is_open(parts.first()) || is_open(parts.last())) {
            let message = "the VMM laid other memory over the file's first or last pages: the snapshot's \
                           memory layout must tell where the guest's memory ends";
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let memory = MappedMemory { peer, size_bytes, parts };
        memory.is_there()?;
        Ok(memory)
    }

    /// The image's length.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// What differs from the image. The VMM must be paused until everything is read.
    pub fn changes(&self) -> Result<PageChanges> {
        let tables = PageMap::of(self.peer.pid()).map_err(not_allowed)?;
        let mut changes = PageChanges::default();
        for part in &self.parts {
            let page = |address: u64| {
                number((part.image_offset + (address - part.addresses.start)) / PAGE_BYTES)
            };
            let end = part.addresses.end - 1;
            let wanted = if part.is_replaced {
                changes.zero.insert_range(page(part.addresses.start)..=page(end));
                Wanted::THERE
            } else {
                Wanted::OWN
            };
            tables
                .scan(part.addresses.clone(), wanted, &mut |run, _| {
                    changes.dirty.insert_range(page(run.start)..=page(run.end - 1));
                })
                .map_err(not_allowed)?;
        }
        changes.zero -= &changes.dirty;
        // The tables of a process that has ended are empty, and say so without an error.
        self.is_there()?;
        Ok(changes)
    }

    fn is_there(&self) -> Result<()> {
        match self.peer.has_ended() {
            Ok(false) => Ok(()),
            Ok(true) => Err(Error::new(ErrorKind::Gone, "the VMM is gone")),
            Err(error) => Err(Error::io("cannot tell whether the VMM is there", error)),
        }
    }

    /// Fills `buffer` with pages from `first` on.
    ///
    /// # Panics
    ///
    /// If the buffer is not made of whole pages.
    pub fn read(&self, first: u64, buffer: &mut [u8]) -> Result<()> {
        assert!((buffer.len() as u64).is_multiple_of(PAGE_BYTES), "whole pages");
        let mut at = first * PAGE_BYTES;
        let end = at + buffer.len() as u64;
        let mut ranges = Vec::new();
        while at < end {
            let part = self.parts.iter().find(|part| part.image().contains(&at));
            let part = part.ok_or_else(|| {
                Error::new(ErrorKind::InvalidInput, format!("byte {at} is not in the VMM's memory"))
            })?;
            let stop = end.min(part.image().end);
            let address = |at: u64| part.addresses.start + (at - part.image_offset);
            ranges.push(address(at)..address(stop));
            at = stop;
        }
        process_memory::read(self.peer.pid(), &ranges, buffer).map_err(not_allowed)?;
        // Its number may be another process's by now.
        self.is_there()
    }
}

impl Part {
    fn image(&self) -> Range<u64> {
        let len = self.addresses.end - self.addresses.start;
        self.image_offset..self.image_offset + len
    }
}

/// What tells the file's maps from others.
#[derive(Debug)]
enum Identity<'a> {
    Inode { device: (u32, u32), inode: u64 },
    PathEnd(&'a Path),
}

impl Identity<'_> {
    fn of(file: MappedFile<'_>) -> Result<Identity<'_>> {
        match file {
            MappedFile::PathEnd(end) => Ok(Identity::PathEnd(end)),
            MappedFile::Same(path) => {
                let meta = std::fs::metadata(path).map_err(|error| {
                    Error::io(format!("cannot look at {}", path.display()), error)
                })?;
                let device = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
                Ok(Identity::Inode { device, inode: meta.ino() })
            }
        }
    }

    fn is_of(&self, entry: &MapEntry) -> bool {
        match self {
            Identity::PathEnd(end) => {
                // So the kernel shows one whose name is gone.
                let bytes = entry.path.as_os_str().as_bytes();
                let bytes = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes);
                entry.path.ends_with(end) || Path::new(OsStr::from_bytes(bytes)).ends_with(end)
            }
            Identity::Inode { device, inode } => entry.inode == *inode && entry.device == *device,
        }
    }
}

/// The parts of a process's memory that stand for the image, ascending in the image.
fn parts_of(
    entries: &[MapEntry],
    file: &Identity<'_>,
    regions: &[Range<u64>],
    end: u64,
) -> Result<Vec<Part>> {
    let of_file: Vec<&MapEntry> = entries.iter().filter(|entry| file.is_of(entry)).collect();
    if of_file.is_empty() {
        return Err(Error::new(ErrorKind::NotFound, "the process does not map the image's file"));
    }
    if of_file.iter().any(|entry| entry.is_shared) {
        let message = "the VMM maps the file shared: what its guest changed is in the file";
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let mut parts = Vec::new();
    let mut at = 0;
    for region in regions {
        if region.start != at || region.is_empty() {
            let message = format!("the region {region:?} of the image does not begin at {at}");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        at = region.end;
        let addresses = addresses_of(&of_file, region)?;
        let mut next = addresses.start;
        for entry in entries {
            let start = entry.addresses.start.max(addresses.start);
            let stop = entry.addresses.end.min(addresses.end);
            if start >= stop {
                continue;
            }
            let is_replaced = !file.is_of(entry);
            if start != next || is_replaced && (entry.is_shared || entry.inode != 0) {
                break;
            }
            let image_offset = region.start + (start - addresses.start);
            parts.push(Part { addresses: start..stop, image_offset, is_replaced });
            next = stop;
        }
        if next != addresses.end {
            let message =
                format!("something else is mapped at {next:#x}, where the guest's memory was");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
    }
    if at != end {
        let message = format!("the regions end at byte {at} of the image, which has {end}");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    Ok(parts)
}

/// Where a region of the image lies: its addresses run with its offsets, whatever was laid over some
/// of them, so one map of the file tells them all.
fn addresses_of(of_file: &[&MapEntry], region: &Range<u64>) -> Result<Range<u64>> {
    let mut bases = of_file.iter().filter_map(|entry| {
        let len = entry.addresses.end - entry.addresses.start;
        let is_in = entry.file_offset < region.end && entry.file_offset + len > region.start;
        is_in.then(|| entry.addresses.start.wrapping_sub(entry.file_offset))
    });
    let Some(base) = bases.next() else {
        let message = format!("bytes {region:?} of the image's file are not mapped");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    };
    if bases.any(|other| other != base) {
        let message = format!(
            "the VMM maps bytes {region:?} of the image's file in several pieces; commit the snapshot \
             with its --memory-layout"
        );
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    Ok(base.wrapping_add(region.start)..base.wrapping_add(region.end))
}

/// Why a VMM's memory cannot be looked at, and what to allow.
pub fn not_allowed(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            Error::with_source(ErrorKind::NotAllowed, NOT_ALLOWED, error)
        }
        io::ErrorKind::NotFound => Error::with_source(ErrorKind::Gone, "the VMM is gone", error),
        _ => Error::io("cannot look into the VMM's memory", error),
    }
}

/// A page's number in a bitmap: there are at most 2^32 of them.
fn number(page: u64) -> u32 {
    u32::try_from(page).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;

    use dormouse_sys::mapping::Mapping;

    use super::*;

    const PAGE: usize = 4096;
    const PAGES: usize = 600;

    fn ourselves() -> Peer {
        Peer::by_pid(std::process::id()).unwrap()
    }

    fn file() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&[5; PAGES * PAGE], 0).unwrap();
        file
    }

    #[test]
    fn what_was_written_is_told_to_the_page() {
        let file = file();
        let mapping = Mapping::private_file(file.as_file(), PAGES * PAGE).unwrap();
        let byte = |page: usize| &mapping.bytes()[page * PAGE + 100];
        for page in 0..PAGES {
            assert_eq!(byte(page).load(Ordering::Relaxed), 5);
        }
        for page in (0..PAGES).step_by(7) {
            byte(page).store(6, Ordering::Relaxed);
        }
        // A balloon, in which the guest uses one page again.
        mapping.replace_with_zeros(100 * PAGE..150 * PAGE).unwrap();
        byte(120).store(9, Ordering::Relaxed);
        for found in [
            MappedFile::Same(file.path()),
            MappedFile::PathEnd(Path::new(file.path().file_name().unwrap())),
        ] {
            let memory =
                MappedMemory::find(ourselves(), found, (PAGES * PAGE) as u64, &[]).unwrap();
            let changes = memory.changes().unwrap();
            let balloon = 100..150;
            let told: Vec<usize> = changes.dirty.iter().map(|page| page as usize).collect();
            // The kernel may have made neighbours of the page in the balloon, too, which are zero.
            let (inside, outside): (Vec<usize>, Vec<usize>) =
                told.into_iter().partition(|page| balloon.contains(page));
            let written: Vec<usize> =
                (0..PAGES).filter(|page| page % 7 == 0 && !balloon.contains(page)).collect();
            assert_eq!(outside, written);
            assert!(inside.contains(&120));
            assert_eq!(inside.len() + changes.zero.iter().count(), balloon.len());
            let mut buffer = vec![0; 60 * PAGE];
            memory.read(95, &mut buffer).unwrap();
            let got: Vec<u8> = (95..155).map(|page| buffer[(page - 95) * PAGE + 100]).collect();
            let want: Vec<u8> = (95..155)
                .map(|page| match page {
                    120 => 9,
                    page if balloon.contains(&page) => 0,
                    page if page % 7 == 0 => 6,
                    _ => 5,
                })
                .collect();
            assert_eq!(got, want);
        }
    }

    #[test]
    fn what_cannot_be_told_is_refused() {
        let file = file();
        let size = (PAGES * PAGE) as u64;
        let find = |size| MappedMemory::find(ourselves(), MappedFile::Same(file.path()), size, &[]);
        assert_eq!(find(size).unwrap_err().kind(), ErrorKind::NotFound);
        {
            let _half = Mapping::private_file(file.as_file(), PAGES / 2 * PAGE).unwrap();
            assert_eq!(find(size).unwrap_err().kind(), ErrorKind::InvalidInput);
            assert!(find(size / 2).is_ok());
        }
        let _shared = Mapping::shared_file(file.as_file(), PAGES * PAGE).unwrap();
        assert_eq!(find(size).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn regions_may_lie_anywhere() {
        let entry = |addresses: Range<u64>, file_offset, inode| MapEntry {
            addresses,
            is_shared: false,
            is_writable: true,
            file_offset,
            device: (0, 1),
            inode,
            path: "x".into(),
        };
        let inode = |inode| Identity::Inode { device: (0, 1), inode };
        // Two regions, the second lower; a balloon in the first, and a neighbour that is nothing of it.
        let entries = [
            entry(0x1000..0x3000, 0x5000, 7),
            entry(0x3000..0x4000, 0, 0),
            entry(0x10_0000..0x10_2000, 0, 7),
            entry(0x10_2000..0x10_3000, 0, 0),
            entry(0x10_3000..0x10_5000, 0x3000, 7),
        ];
        let regions = [0..0x5000, 0x5000..0x8000];
        let parts = parts_of(&entries, &inode(7), &regions, 0x8000).unwrap();
        let told: Vec<_> = parts
            .iter()
            .map(|part| (part.image_offset, part.addresses.start, part.is_replaced))
            .collect();
        assert_eq!(
            told,
            [
                (0, 0x10_0000, false),
                (0x2000, 0x10_2000, true),
                (0x3000, 0x10_3000, false),
                (0x5000, 0x1000, false),
                (0x7000, 0x3000, true),
            ]
        );
        // Unknown borders, a region that is not mapped, one that reaches into a neighbour's map, and
        // regions that are not all of the image.
        for (regions, end) in [
            (std::iter::once(0..0x8000).collect(), 0x8000),
            (vec![0..0x5000, 0x5000..0x8000, 0x8000..0x9000], 0x9000),
            (vec![0..0x5000, 0x5000..0xa000], 0xa000),
            (vec![0..0x5000, 0x5000..0x8000], 0x9000),
            (vec![0..0x5000, 0x6000..0x8000], 0x8000),
        ] {
            assert!(parts_of(&entries, &inode(7), &regions, end).is_err(), "{regions:?}");
        }
        assert!(parts_of(&entries, &inode(8), &regions, 0x8000).is_err());
    }
}
