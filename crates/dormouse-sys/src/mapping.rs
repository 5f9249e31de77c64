//! Memory maps (`mmap(2)`), of memory that other processes or the kernel change at any time.
//!
//! All access is through atomics, so that changes behind our back are values, not undefined
//! behaviour. Nothing here maps a file that somebody could cut short: a page past its end would be
//! a SIGBUS.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// The size of the pages of an anonymous map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB, and never joined to larger ones behind our back.
    Small,
    /// 2 MiB, reserved by `vm.nr_hugepages`.
    Huge,
}

/// A map of this process; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<AtomicU8>,
    len: usize,
}

// SAFETY: the memory belongs to the process, not to a thread, and is only reached through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Memory of its own for this process, all zero; `len` is a multiple of the page size.
    ///
    /// `ENOMEM` where there are not enough free huge pages.
    pub fn anonymous(len: usize, page: PageSize) -> io::Result<Mapping> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let flags = match page {
            PageSize::Small => flags,
            PageSize::Huge => flags | MapFlags::HUGETLB | MapFlags::HUGE_2MB,
        };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: no address is asked for, so nothing that is mapped is replaced.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, flags)? };
        let mapping = Mapping::own(start, len)?;
        if page == PageSize::Small {
            // SAFETY: the range is ours; the advice changes no content.
            let advised = unsafe { rustix::mm::madvise(start, len, Advice::LinuxNoHugepage) };
            match advised {
                // EINVAL: the kernel has no transparent huge pages.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(mapping)
    }

    /// A private map of a file's first `len` bytes: writes go to pages of this process alone.
    ///
    /// The caller answers for the file's length: touching a page beyond its end is a SIGBUS.
    pub fn private_file(file: &File, len: usize) -> io::Result<Mapping> {
        Mapping::of_file(file, 0, len, MapFlags::PRIVATE)
    }

    /// A private map of `len` bytes of a file from `offset` on, a multiple of 4 KiB.
    pub fn private_file_at(file: &File, offset: u64, len: usize) -> io::Result<Mapping> {
        Mapping::of_file(file, offset, len, MapFlags::PRIVATE | MapFlags::NORESERVE)
    }

    /// A shared map of a file's first `len` bytes; the same about its length.
    pub fn shared_file(file: &File, len: usize) -> io::Result<Mapping> {
        Mapping::of_file(file, 0, len, MapFlags::SHARED)
    }

    fn of_file(file: impl AsFd, offset: u64, len: usize, flags: MapFlags) -> io::Result<Mapping> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: no address is asked for, so nothing that is mapped is replaced.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file, offset)?
        };
        Mapping::own(start, len)
    }

    fn own(start: *mut c_void, len: usize) -> io::Result<Mapping> {
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::from(Errno::NOMEM))?;
        Ok(Mapping { start, len })
    }

    /// The bytes. Reading or writing one can be a page fault that somebody has to answer.
    pub fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: mapped for reading and writing as long as `self` lives; any bytes are valid
        // atomics, and changes by others are changes to atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The same as words; bytes after the last whole word are left out.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: as above, and a map starts at a page.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / 8) }
    }

    /// The addresses in this process.
    pub fn addresses(&self) -> Range<u64> {
        let start = self.start.as_ptr().expose_provenance() as u64;
        start..start + self.len as u64
    }

    /// Gives pages back (`MADV_DONTNEED`): anonymous ones read as zeros afterwards, private ones of
    /// a file as the file, unless a userfaultfd decides.
    pub fn give_back(&self, range: Range<usize>) -> io::Result<()> {
        self.check(&range)?;
        // SAFETY: the range lies inside our map, whose content is only reached through atomics.
        unsafe {
            let start = self.start.as_ptr().add(range.start).cast();
            rustix::mm::madvise(start, range.len(), Advice::LinuxDontNeed)?;
        }
        Ok(())
    }

    /// Puts anonymous memory in the place of pages, whatever they were of: they read as zeros, and
    /// are no part of a file any more (`MAP_FIXED`).
    pub fn replace_with_zeros(&self, range: Range<usize>) -> io::Result<()> {
        self.check(&range)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range lies inside our map, whose content is only reached through atomics, and
        // stays mapped with the same rights.
        unsafe {
            let start = self.start.as_ptr().add(range.start).cast();
            rustix::mm::mmap_anonymous(start, range.len(), protection, flags)?;
        }
        Ok(())
    }

    /// Keeps pages in memory (`mlock`): they are installed, and cannot be given back (`EINVAL`).
    pub fn lock(&self, range: Range<usize>) -> io::Result<()> {
        self.check(&range)?;
        // SAFETY: the range lies inside our map; no content changes.
        unsafe {
            let start = self.start.as_ptr().add(range.start).cast();
            rustix::mm::mlock(start, range.len())?;
        }
        Ok(())
    }

    fn check(&self, range: &Range<usize>) -> io::Result<()> {
        if range.start > range.end || range.end > self.len {
            return Err(Errno::INVAL.into());
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing borrows the map any more, as all references are bound to `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "a map of ours can be unmapped");
    }
}

/// Memory without a file that several processes map, and that outlives each of them as long as one
/// has the descriptor (`memfd_create(2)`). Its size is sealed, so that no access is a SIGBUS.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    mapping: Mapping,
}

impl SharedMemory {
    /// New memory, all zero. The name shows in `/proc/PID/maps`.
    pub fn create(name: &str, len: usize) -> io::Result<SharedMemory> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, len as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SIZE_SEALS | SealFlags::SEAL)?;
        SharedMemory::from_fd(fd)
    }

    /// Memory of another process. `EINVAL` if its size is not sealed or it is empty.
    pub fn from_fd(fd: OwnedFd) -> io::Result<SharedMemory> {
        let is_sealed =
            rustix::fs::fcntl_get_seals(&fd).is_ok_and(|seals| seals.contains(SIZE_SEALS));
        let len = usize::try_from(rustix::fs::fstat(&fd)?.st_size).unwrap_or(0);
        if !is_sealed || len == 0 {
            return Err(Errno::INVAL.into());
        }
        let mapping = Mapping::of_file(&fd, 0, len, MapFlags::SHARED)?;
        Ok(SharedMemory { fd, mapping })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[AtomicU8] {
        self.mapping.bytes()
    }

    /// The same as words.
    pub fn words(&self) -> &[AtomicU64] {
        self.mapping.words()
    }

    /// The descriptor, to hand over.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

/// Seals of memory that neither shrinks nor grows.
const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// Has the kernel back a large buffer with huge pages as far as it has any, so that filling it for the
/// first time takes a fault for 2 MiB and not for 4 KiB (`MADV_HUGEPAGE`). Where it does not know how,
/// nothing happens.
pub fn prefer_huge_pages(buffer: &mut [u8]) {
    const PAGE: usize = 4096;
    let skip = buffer.as_ptr().align_offset(PAGE).min(buffer.len());
    let inner = &mut buffer[skip..];
    let len = inner.len() / PAGE * PAGE;
    if len == 0 {
        return;
    }
    // SAFETY: the range is whole pages of memory that is borrowed exclusively, whose bytes the advice
    // leaves as they are.
    let advised = unsafe {
        rustix::mm::madvise(inner.as_mut_ptr().cast(), len, rustix::mm::Advice::LinuxHugepage)
    };
    // It is slower without, and no worse.
    let _ = advised;
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn pages_that_are_given_back_read_as_zeros() {
        let mapping = Mapping::anonymous(8192, PageSize::Small).unwrap();
        mapping.bytes()[5000].store(7, Ordering::Relaxed);
        mapping.bytes()[5].store(8, Ordering::Relaxed);
        mapping.give_back(4096..8192).unwrap();
        assert_eq!(mapping.bytes()[5000].load(Ordering::Relaxed), 0);
        assert_eq!(mapping.bytes()[5].load(Ordering::Relaxed), 8);
        assert!(mapping.give_back(4096..12288).is_err(), "past the end");
    }

    #[test]
    fn replaced_pages_of_a_file_read_as_zeros() {
        let file = crate::temp_file::unnamed(&std::env::temp_dir()).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[5; 16384], 0).unwrap();
        let mapping = Mapping::private_file_at(&file, 4096, 12288).unwrap();
        mapping.replace_with_zeros(4096..8192).unwrap();
        mapping.bytes()[8191].store(7, Ordering::Relaxed);
        for (at, expected) in [(4095, 5), (4096, 0), (8191, 7), (8192, 5)] {
            assert_eq!(mapping.bytes()[at].load(Ordering::Relaxed), expected, "{at}");
        }
        mapping.give_back(4096..12288).unwrap();
        assert_eq!(mapping.bytes()[8191].load(Ordering::Relaxed), 0);
        assert!(mapping.replace_with_zeros(8192..16384).is_err(), "past the end");
    }

    #[test]
    fn shared_memory_is_seen_through_every_map() {
        let one = SharedMemory::create("test", 4096).unwrap();
        let two = SharedMemory::from_fd(one.fd().try_clone().unwrap()).unwrap();
        one.words()[3].store(77, Ordering::Relaxed);
        assert_eq!(two.words()[3].load(Ordering::Relaxed), 77);
    }

    #[test]
    fn memory_that_could_shrink_is_refused() {
        let fd = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        let refused = SharedMemory::from_fd(fd).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::INVAL.raw_os_error()));
    }
}
