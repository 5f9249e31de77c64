//! Pages that a Cloud Hypervisor asks for, one at a time, over a connection of their own.
//!
//! A guest whose pages are served lives on them for as long as Cloud Hypervisor has not asked for all.
//! Meanwhile whoever serves them may be killed, and somebody else go on who was given the descriptors
//! ([`PageRequests::descriptors`], [`PageRequests::adopt`]):
//!
//! - **A request is taken from the connection when it was answered**, and what is being answered stands in
//!   memory that both share. A successor who finds it there tells by the connection whether the answer
//!   went out: behind it there is another request, or the answer itself, unread. Only where neither is,
//!   nor comes, the guest is lost, and told so.
//! - **A page is filled once.** The guest may have written to it since, whether or not Cloud Hypervisor
//!   asks for it again. Which pages were filled stands in the same memory, beside the run that is being
//!   filled.
//! - A page that was filled and is a hole again was given back by the guest: it is zero.
//! - A page that cannot be read is answered with an error. Never zeros.
//!
//! With shared memory, neighbours are filled with the page that was asked for: the requests for them need
//! nothing but an answer then.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use dormouse_sys::mapping::SharedMemory;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use serde::{Deserialize, Serialize};

use super::super::state::Slot;
use super::frame::{Command, HEAD_BYTES, PageFault, Request, Response, Status};
use super::{MemorySource, PIECE_BYTES, SHMEM_THP, huge_pages_are_safe};
use crate::error::{Error, ErrorKind, Result};

/// Bytes of the smallest page.
const PAGE_BYTES: u64 = 4096;
/// One of zeros.
const ZERO: [u8; 4096] = [0; 4096];

/// Bytes that are filled around a page: a frame of most stores.
const WINDOW_BYTES: u64 = 64 << 10;

/// Bytes of a request for a page.
const FAULT_BYTES: usize = HEAD_BYTES + 16;

/// How long a successor waits for what tells whether an answer went out.
const DOUBT_TIMEOUT: Duration =
    if cfg!(test) { Duration::from_millis(200) } else { Duration::from_secs(5) };

/// Between two looks at a connection where nothing can be waited for.
const LOOK: Duration = Duration::from_micros(50);

/// Words of the shared memory before its bits.
const WORDS: usize = 8;
/// Whether something is being answered: the address and length that were asked for.
const ANSWERING: usize = 0;
const ASKED_GPA: usize = 1;
const ASKED_LENGTH: usize = 2;
/// What is being filled: bytes of the image, none if they are the same.
const FILLING_START: usize = 3;
const FILLING_END: usize = 4;

/// A slot of memory, and where it is in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesOfSlot {
    /// The slot.
    #[serde(flatten)]
    pub slot: Slot,
    /// Its first byte in the image.
    pub image_offset: u64,
}

/// Requests for the pages of a guest, on a connection that Cloud Hypervisor was given.
#[derive(Debug)]
pub struct PageRequests {
    stream: UnixStream,
    progress: SharedMemory,
    slots: Vec<PagesOfSlot>,
    /// A descriptor for each slot; none if pages are sent over the connection.
    memory: Vec<File>,
}

/// Pages that are served on a thread of their own, until Cloud Hypervisor has all of them or ends.
/// Dropping this does not stop it.
#[derive(Debug)]
pub struct Faults {
    thread: JoinHandle<Result<u64>>,
}

impl Faults {
    /// Whether the last page was served, or something went wrong.
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until it is over. How many pages were asked for; or why one could not be served, after
    /// which the guest must not go on: kill it.
    pub fn wait(self) -> Result<u64> {
        self.thread.join().unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Io, "the thread that serves pages panicked"))
        })
    }
}

/// What stands first on the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Page(PageFault),
    Abandon,
    /// Cloud Hypervisor has all pages, or is gone.
    End,
}

impl PageRequests {
    pub(super) fn new(
        stream: UnixStream,
        slots: Vec<PagesOfSlot>,
        memory: Vec<File>,
    ) -> Result<PageRequests> {
        let pages = slots.iter().map(|of| of.slot.size).sum::<u64>().div_ceil(PAGE_BYTES);
        let words = WORDS + usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX >> 4);
        let progress = SharedMemory::create("page-requests", words * size_of::<u64>())
            .map_err(|error| Error::io("cannot note which pages are filled", error))?;
        Ok(PageRequests { stream, progress, slots, memory })
    }

    /// The slots that it is about: with the descriptors, all that a successor needs to know.
    pub fn slots(&self) -> &[PagesOfSlot] {
        &self.slots
    }

    /// What a successor needs: the connection, what is noted of the pages, and the memory of each slot if
    /// it is shared.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let first = [self.stream.as_fd(), self.progress.fd().as_fd()];
        first.into_iter().chain(self.memory.iter().map(File::as_fd)).collect()
    }

    /// Goes on with what somebody else served, or was about to, from slots and descriptors of theirs.
    pub fn adopt(slots: Vec<PagesOfSlot>, descriptors: Vec<OwnedFd>) -> Result<PageRequests> {
        let odd = |what: &str| Error::new(ErrorKind::InvalidInput, what);
        let mut descriptors = descriptors.into_iter();
        let stream = descriptors.next().ok_or_else(|| odd("no connection for page faults"))?;
        let progress = descriptors.next().ok_or_else(|| odd("no notes of pages"))?;
        let progress = SharedMemory::from_fd(progress)
            .map_err(|error| Error::io("cannot use the notes of pages", error))?;
        let memory: Vec<File> = descriptors.map(File::from).collect();
        if !memory.is_empty() && memory.len() != slots.len() {
            return Err(odd("not one descriptor for each slot of memory"));
        }
        let bytes = slots.iter().map(|of| of.slot.size).sum::<u64>();
        let bits = progress.words().len().saturating_sub(WORDS) as u64 * 64;
        if bits * PAGE_BYTES < bytes {
            return Err(odd("notes of fewer pages than the slots have"));
        }
        Ok(PageRequests { stream: UnixStream::from(stream), progress, slots, memory })
    }

    /// Serves on a thread.
    pub fn serve_on_thread(self, source: Arc<dyn MemorySource>) -> Result<Faults> {
        let thread = thread::Builder::new()
            .name("page-faults".to_owned())
            .spawn(move || self.serve(&*source))
            .map_err(|error| Error::io("cannot start a thread for page faults", error))?;
        Ok(Faults { thread })
    }

    /// Serves until Cloud Hypervisor has all pages or ends. How many it asked for.
    ///
    /// # Errors
    ///
    /// After any the guest must not go on: kill it. [`ErrorKind::Sink`] if a page cannot be read.
    pub fn serve(&self, source: &dyn MemorySource) -> Result<u64> {
        let served = self.serve_all(source);
        if let Err(error) = &served {
            tracing::error!(%error, "a guest's page was not served");
            // Cloud Hypervisor may be gone.
            drop(self.send(&Response { status: Status::Error, length: 0 }.to_bytes()));
        }
        served
    }

    fn serve_all(&self, source: &dyn MemorySource) -> Result<u64> {
        let failed = |error| Error::io("cannot serve page faults", error);
        self.stream.set_nonblocking(false).map_err(failed)?;
        self.stream.set_read_timeout(None).map_err(failed)?;
        self.stream.set_write_timeout(None).map_err(failed)?;
        self.settle_filling()?;
        self.settle_answer()?;
        let mut served = 0;
        loop {
            match self.first()? {
                Asked::Page(fault) => {
                    let answer = self.prepare(fault, source)?;
                    self.answer(fault, &answer)?;
                    served += 1;
                }
                Asked::Abandon => {
                    self.send(&Response { status: Status::Ok, length: 0 }.to_bytes())?;
                    return Ok(served);
                }
                Asked::End => return Ok(served),
            }
        }
    }

    fn word(&self, number: usize) -> &AtomicU64 {
        &self.progress.words()[number]
    }

    /// Answers what stands first, and takes it from the connection.
    fn answer(&self, fault: PageFault, answer: &[u8]) -> Result<()> {
        self.word(ASKED_GPA).store(fault.gpa, Ordering::Relaxed);
        self.word(ASKED_LENGTH).store(fault.length, Ordering::Relaxed);
        self.word(ANSWERING).store(1, Ordering::Release);
        let sent = self.send(answer)?;
        if sent {
            self.take()?;
        }
        self.word(ANSWERING).store(0, Ordering::Release);
        Ok(())
    }

    /// Finds out what became of the request that a predecessor was answering.
    fn settle_answer(&self) -> Result<()> {
        if self.word(ANSWERING).load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        let asked = PageFault {
            gpa: self.word(ASKED_GPA).load(Ordering::Relaxed),
            length: self.word(ASKED_LENGTH).load(Ordering::Relaxed),
        };
        let begun = Instant::now();
        loop {
            let queued = self.queued()?;
            if queued < FAULT_BYTES as u64 {
                // It was answered and taken; what comes next is another one.
                break;
            }
            if self.first()? != Asked::Page(asked) {
                break;
            }
            // An answer of a page's bytes may have gone out in part.
            let is_unread = !self.memory.is_empty() && self.unread()? > 0;
            if queued >= 2 * FAULT_BYTES as u64 || is_unread {
                self.take()?;
                break;
            }
            if self.is_over()? {
                break;
            }
            if begun.elapsed() > DOUBT_TIMEOUT {
                let context = format!(
                    "whoever served pages was killed while it answered for {:#x}, and nothing tells \
                     whether the answer went out",
                    asked.gpa
                );
                return Err(Error::new(ErrorKind::Protocol, context));
            }
            sleep(LOOK);
        }
        self.word(ANSWERING).store(0, Ordering::Release);
        Ok(())
    }

    /// What stands first on the connection, which is waited for, and stays.
    fn first(&self) -> Result<Asked> {
        let mut bytes = [0; FAULT_BYTES];
        loop {
            let (count, _) = match rustix::net::recv(&self.stream, &mut bytes, RecvFlags::PEEK) {
                // It ended with an answer unread.
                Err(Errno::CONNRESET) => return Ok(Asked::End),
                Err(Errno::INTR) => continue,
                received => received.map_err(|error| {
                    Error::io("cannot receive a page fault", io::Error::from(error))
                })?,
            };
            if count == 0 {
                return Ok(Asked::End);
            }
            if count >= HEAD_BYTES {
                let mut head = [0; HEAD_BYTES];
                head.copy_from_slice(&bytes[..HEAD_BYTES]);
                match Request::parse(&head)?.command {
                    Command::PageFault if count >= FAULT_BYTES => {
                        let mut range = [0; FAULT_BYTES - HEAD_BYTES];
                        range.copy_from_slice(&bytes[HEAD_BYTES..]);
                        return Ok(Asked::Page(PageFault::parse(&range)?));
                    }
                    Command::PageFault => {}
                    Command::Abandon => return Ok(Asked::Abandon),
                    other => {
                        let context =
                            format!("Cloud Hypervisor sent {other:?}, expected a page fault");
                        return Err(Error::new(ErrorKind::Protocol, context));
                    }
                }
            }
            if self.is_over()? {
                return Ok(Asked::End);
            }
            // The rest of it is on its way.
            sleep(LOOK);
        }
    }

    /// Whether the other end is closed, whatever it sent before.
    fn is_over(&self) -> Result<bool> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut polled = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
            .map_err(|error| Error::io("cannot look at a connection", io::Error::from(error)))?;
        Ok(polled[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR))
    }

    /// Takes a request from the connection.
    fn take(&self) -> Result<()> {
        let mut bytes = [0; FAULT_BYTES];
        let mut taken = 0;
        while taken < FAULT_BYTES {
            match rustix::net::recv(&self.stream, &mut bytes[taken..], RecvFlags::empty()) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(()),
                Ok((count, _)) => taken += count,
                Err(Errno::INTR) => {}
                Err(error) => {
                    return Err(Error::io("cannot receive a page fault", io::Error::from(error)));
                }
            }
        }
        Ok(())
    }

    /// Sends an answer; false if Cloud Hypervisor is gone.
    fn send(&self, bytes: &[u8]) -> Result<bool> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match rustix::net::send(&self.stream, rest, SendFlags::NOSIGNAL) {
                Ok(count) => rest = &rest[count..],
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(false),
                Err(error) => return Err(Error::io("cannot send a page", io::Error::from(error))),
            }
        }
        Ok(true)
    }

    /// Bytes that came and were not taken.
    fn queued(&self) -> Result<u64> {
        rustix::io::ioctl_fionread(&self.stream)
            .map_err(|error| Error::io("cannot look at a connection", io::Error::from(error)))
    }

    /// Bytes that were sent and not taken, in the kernel's measure.
    fn unread(&self) -> Result<u64> {
        dormouse_sys::passing::unread(&self.stream)
            .map_err(|error| Error::io("cannot look at a connection", error))
    }

    /// Makes a page be there, and returns what is to be said of it.
    fn prepare(&self, fault: PageFault, source: &dyn MemorySource) -> Result<Vec<u8>> {
        let inside = |of: &PagesOfSlot| {
            let (start, end) = (of.slot.gpa, of.slot.gpa + of.slot.size);
            fault.gpa >= start && fault.gpa < end && fault.length <= end - fault.gpa
        };
        let Some(number) = self.slots.iter().position(inside) else {
            let context = format!("a page at {:#x}, where the guest has no memory", fault.gpa);
            return Err(Error::new(ErrorKind::Protocol, context));
        };
        let of = self.slots[number];
        let within = fault.gpa - of.slot.gpa;
        if !within.is_multiple_of(PAGE_BYTES) || !fault.length.is_multiple_of(PAGE_BYTES) {
            let context = format!("{} bytes at {:#x}, which are no pages", fault.length, fault.gpa);
            return Err(Error::new(ErrorKind::Protocol, context));
        }
        if let Some(memory) = self.memory.get(number) {
            self.fill(of, memory, within, fault.length, source)?;
            return Ok(Response { status: Status::Ok, length: 0 }.to_bytes().to_vec());
        }
        if fault.length > PIECE_BYTES {
            let context = format!(
                "pages of {} bytes of private memory cannot be sent; share the guest's memory",
                fault.length
            );
            return Err(Error::new(ErrorKind::Incompatible, context));
        }
        let head = Response { status: Status::Ok, length: fault.length }.to_bytes();
        let mut answer = vec![0; HEAD_BYTES + usize::try_from(fault.length).unwrap_or(0)];
        answer[..HEAD_BYTES].copy_from_slice(&head);
        read(source, &mut answer[HEAD_BYTES..], of.image_offset + within)?;
        Ok(answer)
    }

    /// Fills what was asked for and its neighbours, as far as they were not filled.
    fn fill(
        &self,
        of: PagesOfSlot,
        memory: &File,
        within: u64,
        length: u64,
        source: &dyn MemorySource,
    ) -> Result<()> {
        let mut is_missing = false;
        self.each_page(of, within, within + length, &mut |page, is_filled| {
            is_missing |= !is_filled;
            // The guest gave it back.
            if is_filled && is_hole(memory, of.slot.file_offset + page)? {
                write(memory, &ZERO, of.slot.file_offset + page)?;
            }
            Ok(())
        })?;
        if !is_missing {
            return Ok(());
        }
        let start = within / WINDOW_BYTES * WINDOW_BYTES;
        let end = (within + length).next_multiple_of(WINDOW_BYTES).min(of.slot.size);
        let mut at = start;
        let mut buffer = Vec::new();
        while at < end {
            let stop = (at + PIECE_BYTES).min(end);
            buffer.resize(usize::try_from(stop - at).unwrap_or(0), 0);
            read(source, &mut buffer, of.image_offset + at)?;
            self.word(FILLING_START).store(of.image_offset + at, Ordering::Relaxed);
            self.word(FILLING_END).store(of.image_offset + stop, Ordering::Release);
            // Runs of pages that were not filled.
            let mut run: Option<u64> = None;
            let put = |from: u64, to: u64| {
                let [low, high] = [from - at, to - at].map(|at| usize::try_from(at).unwrap_or(0));
                write(memory, &buffer[low..high], of.slot.file_offset + from)
            };
            self.each_page(of, at, stop, &mut |page, is_filled| {
                match (is_filled, run) {
                    (false, None) => run = Some(page),
                    (true, Some(from)) => {
                        put(from, page)?;
                        run = None;
                    }
                    _ => {}
                }
                Ok(())
            })?;
            if let Some(from) = run {
                put(from, stop)?;
            }
            self.mark(of.image_offset + at, of.image_offset + stop);
            self.word(FILLING_END).store(of.image_offset + at, Ordering::Release);
            at = stop;
        }
        Ok(())
    }

    /// Finds out what of a run was filled that a predecessor was filling.
    fn settle_filling(&self) -> Result<()> {
        let start = self.word(FILLING_START).load(Ordering::Relaxed);
        let end = self.word(FILLING_END).load(Ordering::Acquire);
        let Some(number) = self.slots.iter().position(|of| {
            start < end && start >= of.image_offset && end <= of.image_offset + of.slot.size
        }) else {
            return Ok(());
        };
        let (of, memory) = (self.slots[number], &self.memory[number]);
        let mut found = Vec::new();
        self.each_page(of, start - of.image_offset, end - of.image_offset, &mut |page, filled| {
            if !filled && !is_hole(memory, of.slot.file_offset + page)? {
                found.push(of.image_offset + page);
            }
            Ok(())
        })?;
        if !found.is_empty() && !huge_pages_are_safe(&setting()) {
            let context = format!(
                "whoever served pages was killed while it filled some, and with huge pages of shared \
                 memory ({SHMEM_THP}) nothing tells which"
            );
            return Err(Error::new(ErrorKind::Protocol, context));
        }
        found.into_iter().for_each(|page| self.mark(page, page + PAGE_BYTES));
        self.word(FILLING_END).store(start, Ordering::Release);
        Ok(())
    }

    fn each_page(
        &self,
        of: PagesOfSlot,
        start: u64,
        end: u64,
        visit: &mut dyn FnMut(u64, bool) -> Result<()>,
    ) -> Result<()> {
        let mut at = start;
        while at < end {
            visit(at, self.is_filled((of.image_offset + at) / PAGE_BYTES))?;
            at += PAGE_BYTES;
        }
        Ok(())
    }

    fn is_filled(&self, page: u64) -> bool {
        let (word, bit) = place(page);
        self.word(word).load(Ordering::Acquire) & bit != 0
    }

    fn mark(&self, start: u64, end: u64) {
        for page in start / PAGE_BYTES..end.div_ceil(PAGE_BYTES) {
            let (word, bit) = place(page);
            self.word(word).fetch_or(bit, Ordering::Release);
        }
    }
}

fn place(page: u64) -> (usize, u64) {
    (WORDS + usize::try_from(page / 64).unwrap_or(usize::MAX), 1 << (page % 64))
}

fn is_hole(memory: &File, offset: u64) -> Result<bool> {
    match rustix::fs::seek(memory, SeekFrom::Data(offset)) {
        Ok(data) => Ok(data >= offset + PAGE_BYTES),
        Err(Errno::NXIO) => Ok(true),
        Err(error) => Err(Error::io("cannot look at a guest's memory", io::Error::from(error))),
    }
}

fn write(memory: &File, bytes: &[u8], offset: u64) -> Result<()> {
    let written = memory.write_all_at(bytes, offset);
    written.map_err(|error| Error::io("cannot fill a page of a guest", error))
}

pub(super) fn read(source: &dyn MemorySource, buffer: &mut [u8], offset: u64) -> Result<()> {
    source.read_at(buffer, offset).map_err(|error| {
        let context = format!("memory at {offset:#x} of the image cannot be read");
        Error::with_source(ErrorKind::Sink, context, error)
    })
}

fn setting() -> String {
    std::fs::read_to_string(SHMEM_THP).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    const GPA: u64 = 1 << 32;
    const PAGES: u64 = 64;

    struct Image;

    impl MemorySource for Image {
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            for (at, byte) in (offset..).zip(buffer) {
                *byte = content(at / PAGE_BYTES);
            }
            Ok(())
        }
    }

    fn content(page: u64) -> u8 {
        u8::try_from(page % 251).unwrap() + 1
    }

    /// Cloud Hypervisor's end of the connection, and its memory.
    struct Asking {
        stream: UnixStream,
        memory: File,
    }

    impl Asking {
        fn new() -> (Asking, PageRequests) {
            let (theirs, ours) = UnixStream::pair().unwrap();
            let memory = tempfile::tempfile().unwrap();
            memory.set_len(PAGES * PAGE_BYTES).unwrap();
            let slot = Slot { slot: 0, gpa: GPA, size: PAGES * PAGE_BYTES, file_offset: 0 };
            let slots = vec![PagesOfSlot { slot, image_offset: 0 }];
            let given = memory.try_clone().unwrap();
            let requests = PageRequests::new(ours, slots, vec![given]).unwrap();
            (Asking { stream: theirs, memory }, requests)
        }

        fn ask(&mut self, page: u64) {
            self.stream.write_all(&Request::new(Command::PageFault, 16).to_bytes()).unwrap();
            let fault = [GPA + page * PAGE_BYTES, PAGE_BYTES].map(u64::to_le_bytes).concat();
            self.stream.write_all(&fault).unwrap();
        }

        fn hear(&mut self) -> Status {
            let mut head = [0; HEAD_BYTES];
            self.stream.read_exact(&mut head).unwrap();
            Response::parse(&head).unwrap().status
        }

        fn page(&self, page: u64) -> [u8; ZERO.len()] {
            let mut bytes = ZERO;
            self.memory.read_exact_at(&mut bytes, page * PAGE_BYTES).unwrap();
            bytes
        }

        fn has(&self, page: u64) -> bool {
            self.page(page) == [content(page); ZERO.len()]
        }
    }

    /// Another process's, as the holder gives it.
    fn successor(requests: &PageRequests) -> PageRequests {
        let descriptors = requests.descriptors();
        let copies = descriptors.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
        PageRequests::adopt(requests.slots().to_vec(), copies).unwrap()
    }

    #[test]
    fn pages_are_filled_once_and_those_given_back_are_zero() {
        let (mut guest, requests) = Asking::new();
        thread::scope(|scope| {
            let serving = scope.spawn(|| requests.serve(&Image));
            guest.ask(20);
            assert_eq!(guest.hear(), Status::Ok);
            assert!((16..32).all(|page| guest.has(page)), "neighbours come with it");
            assert!(!guest.has(15) && !guest.has(32));
            // The guest writes, without having asked for its page; later it is asked for.
            let own = [255; ZERO.len()];
            guest.memory.write_all_at(&own, 21 * PAGE_BYTES).unwrap();
            dormouse_sys::sparse::punch_hole(&guest.memory, 22 * PAGE_BYTES, PAGE_BYTES).unwrap();
            for page in [20, 21, 22, 63] {
                guest.ask(page);
                assert_eq!(guest.hear(), Status::Ok);
            }
            assert!(guest.has(20) && guest.has(63));
            assert_eq!(guest.page(21), own);
            assert_eq!(guest.page(22), ZERO);
            assert!(!is_hole(&guest.memory, 22 * PAGE_BYTES).unwrap(), "it is there");
            // A successor knows all of that.
            let next = successor(&requests);
            assert_eq!((0..PAGES).filter(|page| next.is_filled(*page)).count(), 32);
            guest.stream.shutdown(std::net::Shutdown::Both).unwrap();
            assert_eq!(serving.join().unwrap().unwrap(), 5);
        });
    }

    /// Whoever serves is killed at each step of an answer; Cloud Hypervisor gets one answer, or its guest
    /// is given up.
    #[test]
    fn one_answer_is_given_whoever_is_killed() {
        for killed_at in 0..5 {
            for reads_first in [false, true] {
                let (mut guest, requests) = Asking::new();
                guest.ask(3);
                let Asked::Page(fault) = requests.first().unwrap() else { panic!("no page") };
                let answer = requests.prepare(fault, &Image).unwrap();
                if killed_at > 0 {
                    requests.word(ASKED_GPA).store(fault.gpa, Ordering::Relaxed);
                    requests.word(ASKED_LENGTH).store(fault.length, Ordering::Relaxed);
                    requests.word(ANSWERING).store(1, Ordering::Relaxed);
                }
                if killed_at > 1 {
                    assert!(requests.send(&answer).unwrap());
                }
                if killed_at > 2 {
                    requests.take().unwrap();
                }
                if killed_at > 3 {
                    requests.word(ANSWERING).store(0, Ordering::Relaxed);
                }
                if reads_first && killed_at > 1 {
                    // It has the answer, and asks for the next page.
                    assert_eq!(guest.hear(), Status::Ok);
                    guest.ask(4);
                }
                let next = successor(&requests);
                drop(requests);
                let lost = thread::scope(|scope| {
                    let serving = scope.spawn(|| next.serve(&Image));
                    if killed_at == 1 {
                        // Nothing tells; the guest is told before it is given up.
                        assert_eq!(guest.hear(), Status::Error);
                        return serving.join().unwrap().is_err();
                    }
                    assert_eq!(guest.hear(), Status::Ok);
                    guest.ask(40);
                    assert_eq!(guest.hear(), Status::Ok);
                    assert!(guest.has(3) && guest.has(40));
                    // No answer stands there that nobody asked for.
                    guest.stream.set_nonblocking(true).unwrap();
                    let more = guest.stream.read(&mut [0; 1]);
                    assert_eq!(more.unwrap_err().kind(), io::ErrorKind::WouldBlock);
                    guest.stream.shutdown(std::net::Shutdown::Both).unwrap();
                    serving.join().unwrap().unwrap();
                    false
                });
                assert_eq!(lost, killed_at == 1, "{killed_at} {reads_first}");
            }
        }
    }

    /// What was written when its server was killed is not written again, for the guest may have.
    #[test]
    fn a_run_that_was_being_filled_is_told_by_its_holes() {
        let (mut guest, requests) = Asking::new();
        requests.word(FILLING_START).store(16 * PAGE_BYTES, Ordering::Relaxed);
        requests.word(FILLING_END).store(32 * PAGE_BYTES, Ordering::Relaxed);
        let own = [255; ZERO.len()];
        guest.memory.write_all_at(&own, 17 * PAGE_BYTES).unwrap();
        let next = successor(&requests);
        if !huge_pages_are_safe(&setting()) {
            assert!(next.settle_filling().is_err());
            return;
        }
        thread::scope(|scope| {
            let serving = scope.spawn(|| next.serve(&Image));
            guest.ask(18);
            assert_eq!(guest.hear(), Status::Ok);
            assert_eq!(guest.page(17), own);
            assert!(guest.has(16) && guest.has(18) && guest.has(31));
            guest.stream.shutdown(std::net::Shutdown::Both).unwrap();
            serving.join().unwrap().unwrap();
        });
    }

    #[test]
    fn what_is_no_page_is_refused() {
        for (gpa, length) in [(GPA + 1, 4096), (0, 4096), (GPA, 4095), (GPA, 1 << 30)] {
            let (mut guest, requests) = Asking::new();
            guest.stream.write_all(&Request::new(Command::PageFault, 16).to_bytes()).unwrap();
            guest.stream.write_all(&[gpa, length].map(u64::to_le_bytes).concat()).unwrap();
            let error = requests.serve(&Image).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Protocol, "{gpa:#x} {length}");
            assert_eq!(guest.hear(), Status::Error);
        }
    }
}
