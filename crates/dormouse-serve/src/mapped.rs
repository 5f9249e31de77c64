//! Takes what a guest changed out of a VMM that maps an image's file privately.
//!
//! A VMM that was given a snapshot's memory as a file (Firecracker's `File` backend, QEMU's
//! `share=off`) shares its clean pages with the page cache; a page that the guest wrote to is the
//! VMM's own. So the page tables tell exactly what changed, without any tracking
//! ([`PageMap::scan`], [`Wanted::OWN`]).
//!
//! Where the VMM laid anonymous memory over the file, as Firecracker does for a balloon, a page that
//! is there is the guest's, and one that is not is zero: the VMM's maps tell such places.
//!
//! Pages that are there and anonymous are the guest's whether or not it wrote to them: reads of a
//! private file mapping never make any. Nothing of this works while the VMM runs: pause it first.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
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
    PathEnd(&'a str),
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
    /// Finds where a process maps an image's file of `size_bytes`.
    ///
    /// `NotFound` if it does not, `InvalidInput` if it maps it shared (then the file is what the guest
    /// changed) or only in part.
    pub fn find(peer: Peer, file: MappedFile<'_>, size_bytes: u64) -> Result<MappedMemory> {
        let entries = maps(peer.pid()).map_err(not_allowed)?;
        let parts = parts_of(&entries, &Identity::of(file)?, size_bytes)?;
        if peer.has_ended().unwrap_or(true) {
            return Err(Error::new(ErrorKind::Gone, "the VMM is gone"));
        }
        Ok(MappedMemory { peer, size_bytes, parts })
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
        Ok(changes)
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
        process_memory::read(self.peer.pid(), &ranges, buffer).map_err(not_allowed)
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
    PathEnd(&'a str),
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
            Identity::PathEnd(end) => entry.path.ends_with(end),
            Identity::Inode { device, inode } => entry.inode == *inode && entry.device == *device,
        }
    }
}

/// The parts of a process's memory that stand for the image, ascending in the image.
fn parts_of(entries: &[MapEntry], file: &Identity<'_>, size_bytes: u64) -> Result<Vec<Part>> {
    // A region's addresses run with its offsets, whatever was laid over some of them. So it is told by
    // the difference of the two.
    let mut regions: BTreeMap<u64, Range<u64>> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| file.is_of(entry)) {
        if entry.is_shared {
            let message = "the VMM maps the file shared: what its guest changed is in the file";
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let base = entry.addresses.start.wrapping_sub(entry.file_offset);
        let region = regions.entry(base).or_insert_with(|| entry.addresses.clone());
        region.end = region.end.max(entry.addresses.end);
    }
    if regions.is_empty() {
        return Err(Error::new(ErrorKind::NotFound, "the process does not map the image's file"));
    }
    let mut parts = Vec::new();
    for (base, region) in regions {
        for entry in entries {
            let start = entry.addresses.start.max(region.start);
            let end = entry.addresses.end.min(region.end);
            if start < end {
                parts.push(Part {
                    addresses: start..end,
                    image_offset: start.wrapping_sub(base),
                    is_replaced: !file.is_of(entry),
                });
            }
        }
    }
    parts.sort_by_key(|part| part.image_offset);
    cut_to(&mut parts, size_bytes);
    let mut at = 0;
    for part in &parts {
        if part.image_offset != at {
            break;
        }
        at = part.image().end;
    }
    if at != size_bytes.next_multiple_of(PAGE_BYTES) {
        let message = format!("the VMM maps the image's file to byte {at} only, of {size_bytes}");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    Ok(parts)
}

/// Cuts off what is mapped past the image's last page.
fn cut_to(parts: &mut Vec<Part>, size_bytes: u64) {
    let end = size_bytes.next_multiple_of(PAGE_BYTES);
    for part in parts.iter_mut() {
        let over = part.image().end.saturating_sub(end.max(part.image_offset));
        part.addresses.end -= over;
    }
    parts.retain(|part| !part.addresses.is_empty());
}

fn not_allowed(error: io::Error) -> Error {
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
            MappedFile::PathEnd(file.path().file_name().unwrap().to_str().unwrap()),
        ] {
            let memory = MappedMemory::find(ourselves(), found, (PAGES * PAGE) as u64).unwrap();
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
        let find = |size| MappedMemory::find(ourselves(), MappedFile::Same(file.path()), size);
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
        let parts = parts_of(&entries, &inode(7), 0x7000).unwrap();
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
            ]
        );
        assert!(parts_of(&entries, &inode(7), 0x8000).is_err());
        assert!(parts_of(&entries, &inode(8), 0x7000).is_err());
    }
}
