//! Page faults of another process (`userfaultfd(2)`, `ioctl_userfaultfd(2)`).
//!
//! What a handler must know and the manual does not say, all seen on Linux 6.18:
//!
//! - `read` gives faults before other events, whatever came first. A `madvise` in the observed
//!   process is let go when its event was *read*, not when it was handled.
//! - Until then, and a little longer, installing anything fails with [`Stop::Changing`].
//! - An installation that meets a page which is there wakes nobody: [`Userfaultfd::wake`] does.
//! - Faults that were read and not resolved are not delivered again, unless they are woken.
//! - When the last copy of the descriptor is closed, memory that was not installed becomes zero.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;

/// Bytes of a message, as `read` gives them.
pub const MESSAGE_BYTES: usize = 32;

const GROUP: u8 = 0xaa;
const NEW: libc::Ioctl = 0xaa00;
const API: Opcode = opcode::read_write::<ApiArgument>(GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<RegisterArgument>(GROUP, 0x00);
const UNREGISTER: Opcode = opcode::read::<RangeArgument>(GROUP, 0x01);
const WAKE: Opcode = opcode::read::<RangeArgument>(GROUP, 0x02);
const COPY: Opcode = opcode::read_write::<CopyArgument>(GROUP, 0x03);
const ZEROPAGE: Opcode = opcode::read_write::<ZeroArgument>(GROUP, 0x04);
const WRITEPROTECT: Opcode = opcode::read_write::<ProtectArgument>(GROUP, 0x06);

const API_VERSION: u64 = 0xaa;

/// What the kernel adds to the features of a descriptor whose API is agreed on.
const AGREED: u64 = 1 << 31;
const COPY_PROTECTED: u64 = 2;
const PROTECT: u64 = 1;
const UNPROTECT_DONT_WAKE: u64 = 2;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RangeArgument {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArgument {
    range: RangeArgument,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgument {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct ZeroArgument {
    range: RangeArgument,
    mode: u64,
    zeroed: i64,
}

#[repr(C)]
struct ProtectArgument {
    range: RangeArgument,
    mode: u64,
}

const _: () = assert!(size_of::<ApiArgument>() == 24);
const _: () = assert!(size_of::<RegisterArgument>() == 32);
const _: () = assert!(size_of::<CopyArgument>() == 40);
const _: () = assert!(size_of::<ZeroArgument>() == 32);
const _: () = assert!(size_of::<ProtectArgument>() == 24);

/// Features of the kernel's API, as bits of `uffdio_api.features`.
///
/// They are fixed when the descriptor is made; whoever is given it later cannot add any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// None but faults for missing pages of anonymous memory.
    pub const NONE: Features = Features(0);
    /// Tells of pages that the process gave back (`MADV_DONTNEED`, `MADV_REMOVE`).
    pub const EVENT_REMOVE: Features = Features(1 << 3);
    /// Missing pages of `hugetlbfs`.
    pub const MISSING_HUGETLBFS: Features = Features(1 << 4);
    /// Missing pages of shared memory.
    pub const MISSING_SHMEM: Features = Features(1 << 5);
    /// Write protection of `hugetlbfs` and shared memory.
    pub const WP_HUGETLBFS_SHMEM: Features = Features(1 << 12);

    /// Both.
    #[must_use]
    pub const fn with(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }
}

/// What a range is registered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// Faults of missing pages.
    Missing,
    /// Faults of missing pages, and of writes to pages that are protected.
    MissingAndProtected,
}

/// How installed pages may be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// The first write is a fault of its own.
    Protected,
    /// Nobody is told.
    Writable,
}

/// Why an operation on a range went no further.
#[derive(Debug)]
pub enum Stop {
    /// The next page is there already. Nobody who waits for it was woken.
    Exists,

    /// The mapping is changing: an event waits to be read, or was read a moment ago. Read events,
    /// then try again.
    Changing,

    /// The next page is not in a mapping that is registered.
    Unmapped,

    /// The process is gone.
    Gone,

    /// Anything else.
    Failed(io::Error),
}

/// How far an operation on a range came.
#[derive(Debug)]
#[must_use]
pub struct Progress {
    /// Bytes done; who waited for one of them was woken.
    pub done_bytes: u64,

    /// Why not all were, if so. After some were done the kernel does not tell: it is
    /// [`Stop::Changing`] then, and the rest tried alone gives the reason.
    pub stop: Option<Stop>,
}

/// An access that waits for the handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A read of a missing page.
    Read,
    /// A write to a missing page.
    Write,
    /// A write to a page that is there and protected.
    WriteProtected,
    /// A page that is in the page cache and not mapped.
    Minor,
}

/// What happened in the observed process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread waits for a page. The address is that of the page, unless exact addresses were asked
    /// for.
    Fault {
        /// Where.
        address: u64,
        /// For what.
        access: Access,
    },

    /// Pages were given back; from now on they are to read as zeros.
    Remove(Range<u64>),

    /// An event of another kind, by its number.
    Other(u8),
}

impl Event {
    /// Takes a message apart.
    pub fn parse(message: &[u8; MESSAGE_BYTES]) -> Event {
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&message[at..at + 8]);
            u64::from_ne_bytes(bytes)
        };
        match message[0] {
            0x12 => {
                let flags = word(8);
                let access = match flags & 0b111 {
                    flags if flags & 0b010 != 0 => Access::WriteProtected,
                    flags if flags & 0b100 != 0 => Access::Minor,
                    flags if flags & 0b001 != 0 => Access::Write,
                    _ => Access::Read,
                };
                Event::Fault { address: word(16), access }
            }
            0x15 => Event::Remove(word(8)..word(16)),
            other => Event::Other(other),
        }
    }
}

/// A userfaultfd, of this process or of one that handed it over.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl Userfaultfd {
    /// One for the memory of this process, that does not block on reading.
    ///
    /// Takes `/dev/userfaultfd`, else the system call, which wants `CAP_SYS_PTRACE` or
    /// `vm.unprivileged_userfaultfd=1`. `EINVAL`: the kernel does not know one of `features`.
    pub fn open(features: Features) -> io::Result<Userfaultfd> {
        let fd = match File::options().read(true).write(true).open("/dev/userfaultfd") {
            Ok(device) => {
                let flags = (OFlags::CLOEXEC | OFlags::NONBLOCK).bits();
                // SAFETY: the ioctl takes open flags by value and touches no memory.
                let fd = unsafe { libc::ioctl(device.as_raw_fd(), NEW, flags) };
                if fd < 0 {
                    return Err(io::Error::last_os_error());
                }
                // SAFETY: the kernel made this descriptor for us a moment ago.
                unsafe { OwnedFd::from_raw_fd(fd) }
            }
            // SAFETY: the descriptor is owned here, and all that it can do to this process's memory
            // is asked for by `register` and the operations on what was registered.
            Err(_) => unsafe {
                rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK)?
            },
        };
        let mut argument = ApiArgument { api: API_VERSION, features: features.0, ioctls: 0 };
        // SAFETY: the opcode belongs to the argument's type.
        unsafe { ioctl(&fd, Updater::<API, _>::new(&mut argument))? };
        Ok(Userfaultfd { fd })
    }

    /// One that another process handed over. Reading it will not block.
    ///
    /// `EINVAL` if it is a descriptor of something else.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Userfaultfd> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if link.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err(io::Error::from(Errno::INVAL));
        }
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        Ok(Userfaultfd { fd })
    }

    /// The features that whoever made it asked for; none if the kernel's API was never agreed on,
    /// and then nothing can be done with it. Source: `/proc/self/fdinfo`.
    pub fn features(&self) -> io::Result<Option<Features>> {
        let path = format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd());
        let unknown = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
        let info = std::fs::read_to_string(path)?;
        let line = info.lines().find_map(|line| line.strip_prefix("API:"));
        let bits = line
            .and_then(|line| line.trim().split(':').nth(1))
            .and_then(|bits| u64::from_str_radix(bits, 16).ok());
        let bits = bits.ok_or_else(|| unknown(info))?;
        Ok((bits & AGREED != 0).then_some(Features(bits & !AGREED)))
    }

    /// Observes a range of the process that the descriptor belongs to; again with another mode to
    /// change it.
    ///
    /// `EINVAL`: not page-aligned, not all mapped, or a mapping that cannot be observed so (private
    /// file mappings; protection of huge pages without the feature). `EBUSY`: observed by another.
    pub fn register(&self, range: &Range<u64>, mode: Register) -> io::Result<()> {
        let mode = match mode {
            Register::Missing => 0b01,
            Register::MissingAndProtected => 0b11,
        };
        let mut argument = RegisterArgument { range: argument(range), mode, ioctls: 0 };
        // SAFETY: the opcode belongs to the argument's type.
        unsafe { ioctl(&self.fd, Updater::<REGISTER, _>::new(&mut argument)) }.map_err(Into::into)
    }

    /// Observes a range no longer: who waits goes on, with zeros where nothing was installed.
    pub fn unregister(&self, range: &Range<u64>) -> io::Result<()> {
        // SAFETY: the opcode belongs to the argument's type.
        unsafe { ioctl(&self.fd, Setter::<UNREGISTER, _>::new(argument(range))) }
            .map_err(Into::into)
    }

    /// Installs pages with the content `bytes` from `address` on, and wakes who waits for them.
    ///
    /// `address` and the length are multiples of the region's page size.
    pub fn copy(&self, address: u64, bytes: &[u8], protection: Protection) -> Progress {
        let mode = match protection {
            Protection::Protected => COPY_PROTECTED,
            Protection::Writable => 0,
        };
        let from = bytes.as_ptr().expose_provenance() as u64;
        let len = bytes.len() as u64;
        let mut argument = CopyArgument { to: address, from, len, mode, copied: 0 };
        // SAFETY: the opcode belongs to the argument's type; the kernel reads `bytes` and writes to
        // pages that were not there, which nothing can have a reference to.
        let result = unsafe { ioctl(&self.fd, Updater::<COPY, _>::new(&mut argument)) };
        progress(result, argument.copied, len)
    }

    /// Installs pages of zeros that can be written to, and wakes who waits for them.
    ///
    /// Costs no memory until written to. Not for huge pages (`EINVAL`). There is no protected form;
    /// [`copy`](Userfaultfd::copy) zeros for that, as protecting them afterwards can miss a write.
    pub fn zero(&self, range: &Range<u64>) -> Progress {
        let mut argument = ZeroArgument { range: argument(range), mode: 0, zeroed: 0 };
        // SAFETY: the opcode belongs to the argument's type; only pages that were not there change.
        let result = unsafe { ioctl(&self.fd, Updater::<ZEROPAGE, _>::new(&mut argument)) };
        progress(result, argument.zeroed, range.end - range.start)
    }

    /// Makes pages that are there fault on their next write, or lets them be written to and wakes
    /// who waits for that. Pages that are missing stay as they are.
    pub fn protect(&self, range: &Range<u64>, protection: Protection) -> Result<(), Stop> {
        let mode = match protection {
            Protection::Protected => PROTECT,
            Protection::Writable => 0,
        };
        self.write_protect(range, mode)
    }

    /// Lets pages be written to without waking who waits: [`wake`](Userfaultfd::wake) does.
    pub fn unprotect_quietly(&self, range: &Range<u64>) -> Result<(), Stop> {
        self.write_protect(range, UNPROTECT_DONT_WAKE)
    }

    fn write_protect(&self, range: &Range<u64>, mode: u64) -> Result<(), Stop> {
        let mut argument = ProtectArgument { range: argument(range), mode };
        // SAFETY: the opcode belongs to the argument's type; no content changes.
        unsafe { ioctl(&self.fd, Updater::<WRITEPROTECT, _>::new(&mut argument)) }.map_err(stop)
    }

    /// Makes everybody who waits for a page of the range try again.
    pub fn wake(&self, range: &Range<u64>) -> io::Result<()> {
        // SAFETY: the opcode belongs to the argument's type; no content changes.
        unsafe { ioctl(&self.fd, Setter::<WAKE, _>::new(argument(range))) }.map_err(Into::into)
    }

    /// Reads waiting messages into `messages`, as many as fit, and returns how many; 0 if none wait.
    pub fn read(&self, messages: &mut [[u8; MESSAGE_BYTES]]) -> io::Result<usize> {
        let bytes = messages.as_flattened_mut();
        match rustix::io::read(&self.fd, bytes) {
            Ok(bytes) => Ok(bytes / MESSAGE_BYTES),
            Err(Errno::AGAIN) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// The same into shared memory, where they outlive this process: the kernel has put them there
    /// before it can be killed.
    pub fn read_into(&self, inbox: &[AtomicU8]) -> io::Result<usize> {
        let len = inbox.len() / MESSAGE_BYTES * MESSAGE_BYTES;
        // SAFETY: the bytes are valid for writes of `len` and atomic, so that changing them behind a
        // shared reference is allowed.
        let read = unsafe {
            libc::read(self.fd.as_raw_fd(), inbox.as_ptr().cast_mut().cast::<libc::c_void>(), len)
        };
        match usize::try_from(read) {
            Ok(bytes) => Ok(bytes / MESSAGE_BYTES),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                error => Err(error),
            },
        }
    }
}

/// A message out of shared memory.
pub fn message_at(inbox: &[AtomicU8], number: usize) -> [u8; MESSAGE_BYTES] {
    let bytes = &inbox[number * MESSAGE_BYTES..][..MESSAGE_BYTES];
    std::array::from_fn(|at| bytes[at].load(Ordering::Relaxed))
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Userfaultfd> for OwnedFd {
    fn from(uffd: Userfaultfd) -> OwnedFd {
        uffd.fd
    }
}

fn argument(range: &Range<u64>) -> RangeArgument {
    RangeArgument { start: range.start, len: range.end.saturating_sub(range.start) }
}

/// What came of an operation that tells how many bytes it did.
fn progress(result: rustix::io::Result<()>, done: i64, wanted: u64) -> Progress {
    match (result, u64::try_from(done)) {
        (Ok(()), _) => Progress { done_bytes: wanted, stop: None },
        (Err(Errno::AGAIN), Ok(done_bytes)) if done_bytes > 0 => {
            Progress { done_bytes, stop: Some(Stop::Changing) }
        }
        (Err(error), _) => Progress { done_bytes: 0, stop: Some(stop(error)) },
    }
}

fn stop(error: Errno) -> Stop {
    match error {
        Errno::EXIST => Stop::Exists,
        Errno::AGAIN => Stop::Changing,
        Errno::NOENT => Stop::Unmapped,
        Errno::SRCH => Stop::Gone,
        error => Stop::Failed(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags};

    use super::*;
    use crate::mapping::{Mapping, PageSize, SharedMemory};

    const PAGE: u64 = 4096;
    const LEN: usize = 4096;

    /// Four observed pages, and the address of the first.
    fn observed(mode: Register) -> (Mapping, Userfaultfd, u64) {
        let mapping = Mapping::anonymous(4 * LEN, PageSize::Small).unwrap();
        let uffd = Userfaultfd::open(Features::EVENT_REMOVE).unwrap();
        let addresses = mapping.addresses();
        uffd.register(&addresses, mode).unwrap();
        (mapping, uffd, addresses.start)
    }

    fn next_event(uffd: &Userfaultfd) -> Event {
        let mut poll = [PollFd::new(uffd, PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut poll, None).unwrap(), 1);
        let mut message = [[0; MESSAGE_BYTES]];
        assert_eq!(uffd.read(&mut message).unwrap(), 1);
        Event::parse(&message[0])
    }

    #[test]
    fn a_read_waits_for_its_page() {
        let (mapping, uffd, base) = observed(Register::Missing);
        thread::scope(|scope| {
            let reader = scope.spawn(|| mapping.bytes()[5000].load(Ordering::Relaxed));
            let fault = Event::Fault { address: base + PAGE, access: Access::Read };
            assert_eq!(next_event(&uffd), fault);
            let page = [9; LEN];
            let done = uffd.copy(base + PAGE, &page, Protection::Writable);
            assert!(done.stop.is_none() && done.done_bytes == PAGE);
            assert_eq!(reader.join().unwrap(), 9);
        });
    }

    #[test]
    fn a_copy_stops_at_a_page_that_is_there() {
        let (_mapping, uffd, base) = observed(Register::Missing);
        assert!(uffd.zero(&(base + 2 * PAGE..base + 3 * PAGE)).stop.is_none());
        let pages = [1; 4 * LEN];
        let first = uffd.copy(base, &pages, Protection::Writable);
        assert!(matches!(first.stop, Some(Stop::Changing)) && first.done_bytes == 2 * PAGE);
        let rest = uffd.copy(base + 2 * PAGE, &pages[2 * LEN..], Protection::Writable);
        assert!(matches!(rest.stop, Some(Stop::Exists)) && rest.done_bytes == 0);
        let outside = uffd.copy(base + 4 * PAGE, &pages, Protection::Writable);
        assert!(matches!(outside.stop, Some(Stop::Unmapped)), "{outside:?}");
    }

    #[test]
    fn the_first_write_to_a_protected_page_is_told() {
        let (mapping, uffd, base) = observed(Register::MissingAndProtected);
        let page = [3; LEN];
        assert!(uffd.copy(base, &page, Protection::Protected).stop.is_none());
        assert_eq!(mapping.bytes()[7].load(Ordering::Relaxed), 3);
        thread::scope(|scope| {
            let writer = scope.spawn(|| mapping.bytes()[7].store(4, Ordering::Relaxed));
            let fault = Event::Fault { address: base, access: Access::WriteProtected };
            assert_eq!(next_event(&uffd), fault);
            assert_eq!(mapping.bytes()[7].load(Ordering::Relaxed), 3);
            uffd.protect(&(base..base + PAGE), Protection::Writable).unwrap();
            writer.join().unwrap();
        });
        assert_eq!(mapping.bytes()[7].load(Ordering::Relaxed), 4);
    }

    #[test]
    fn nothing_is_installed_while_a_removal_waits_to_be_read() {
        let (mapping, uffd, base) = observed(Register::Missing);
        let inbox = SharedMemory::create("inbox", 4096).unwrap();
        thread::scope(|scope| {
            let giver = scope.spawn(|| mapping.give_back(0..2 * LEN).unwrap());
            let mut poll = [PollFd::new(&uffd, PollFlags::IN)];
            assert_eq!(rustix::event::poll(&mut poll, None).unwrap(), 1);
            let page = [3; LEN];
            let refused = uffd.copy(base, &page, Protection::Writable);
            assert!(matches!(refused.stop, Some(Stop::Changing)), "{refused:?}");
            thread::sleep(Duration::from_millis(10));
            assert!(!giver.is_finished(), "let go before it was read");
            assert_eq!(uffd.read_into(inbox.bytes()).unwrap(), 1);
            let removed = Event::parse(&message_at(inbox.bytes(), 0));
            assert_eq!(removed, Event::Remove(base..base + 2 * PAGE));
            giver.join().unwrap();
            assert!(uffd.copy(base, &page, Protection::Writable).stop.is_none());
        });
    }

    #[test]
    fn features_are_told_as_they_were_agreed_on() {
        for features in [Features::NONE, Features::EVENT_REMOVE] {
            let uffd = Userfaultfd::open(features).unwrap();
            assert_eq!(uffd.features().unwrap(), Some(features));
        }
        let flags = UserfaultfdFlags::CLOEXEC;
        // SAFETY: nothing is ever registered with it.
        let fd = unsafe { rustix::mm::userfaultfd(flags).unwrap() };
        assert_eq!(Userfaultfd::from_fd(fd).unwrap().features().unwrap(), None);
    }

    #[test]
    fn another_descriptor_is_refused() {
        let file = File::open("/dev/null").unwrap();
        assert!(Userfaultfd::from_fd(file.into()).is_err());
        let uffd = Userfaultfd::open(Features::NONE).unwrap();
        Userfaultfd::from_fd(OwnedFd::from(uffd)).unwrap();
    }
}
