//! A guest while it is served: its regions, its messages, and what each page is. Its faults are answered
//! in `answer.rs`.
//!
//! # Locks
//!
//! `gate` is held alone while messages are read from the kernel and pages that were given back are
//! noted: as soon as such a message is read the kernel may take the page away, and whoever installs
//! one must know. It is shared by whoever chooses, carries out and notes an answer. Nothing is decoded
//! or waited for under it. `capture` is taken inside it and guards what a capture keeps.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

use dormouse_live::pages::{Found, PAGE_BYTES, PageEvent, PageState, Pages, Tracking, Wait};
use dormouse_sys::page_map::{Categories, PageMap, Wanted};
use dormouse_sys::peer::Peer;
use dormouse_sys::userfaultfd::{Access, Event, MESSAGE_BYTES, Register, Userfaultfd, message_at};

use super::capture::CaptureState;
use super::course::Courses;
use super::faults::{Fault, Faults};
use super::handshake::Region;
use super::source::MemorySource;
use super::stats::{Counters, VmStats};
use crate::error::{Error, ErrorKind, Result};

/// The largest window around a fault.
const WINDOW_BYTES_MAX: u64 = 64 << 20;

/// Messages are read so many times in a row at most: a guest that gives back memory without end is
/// not to keep a thread for itself. What is still unread keeps the kernel from installing anything.
const READS_MAX: usize = 64;

/// How a guest is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// Around a fault, so many bytes are looked at for pages to install with it; a multiple of 4096, at
    /// most 64 MiB. 4096: none but the page itself.
    pub window_bytes: u64,

    /// Whether the pages that the guest changes are to be known exactly.
    pub tracking: Tracking,
}

impl VmConfig {
    /// Windows of 64 KiB, exact tracking.
    pub const STANDARD: VmConfig = VmConfig { window_bytes: 64 << 10, tracking: Tracking::Exact };
}

/// How serving a guest ended.
#[derive(Debug)]
pub enum End {
    /// Its VMM is gone.
    Gone,

    /// It was stopped, as its memory could not be served rightly.
    Stopped(Error),

    /// It was let go of: another process serves it from now on, or it was asked for.
    Released,
}

/// A guest whose memory is served.
pub struct Vm {
    pub(super) uffd: Userfaultfd,
    pub(super) peer: Peer,
    pub(super) pages: Pages,
    source: Arc<dyn MemorySource>,
    regions: Vec<Served>,
    /// Of the regions, by address and by place in the image: where each begins, and its number.
    by_address: Vec<(u64, usize)>,
    by_offset: Vec<(u64, usize)>,
    config: VmConfig,
    id: u64,
    faults: Arc<Faults>,
    pub(super) tables: OnceLock<PageMap>,
    pub(super) gate: RwLock<()>,
    pub(super) capture: Mutex<Option<CaptureState>>,
    end: Mutex<Option<End>>,
    has_ended: AtomicBool,
    pub(super) courses: Courses,
    /// Faults of pages that count as there.
    pub(super) repeats: AtomicU64,
    pub(super) counters: Counters,
}

/// A region and how it is registered.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) region: Region,
    pub(super) tracking: Tracking,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("pid", &self.peer.pid())
            .field("regions", &self.regions.len())
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// Registers a guest's regions as they have to be for `config`.
    ///
    /// The regions were checked against the image. Where a region cannot be tracked (huge pages,
    /// unless the VMM asked for that feature) whatever is installed counts as dirty.
    pub(super) fn new(
        uffd: Userfaultfd,
        peer: Peer,
        regions: Vec<Region>,
        source: Arc<dyn MemorySource>,
        pages: Pages,
        config: VmConfig,
        (id, faults): (u64, Arc<Faults>),
    ) -> Result<Vm> {
        let VmConfig { window_bytes, .. } = config;
        if !window_bytes.is_multiple_of(PAGE_BYTES) || window_bytes > WINDOW_BYTES_MAX {
            let message = format!(
                "a window of {window_bytes} bytes; expected a multiple of {PAGE_BYTES}, at most \
                 {WINDOW_BYTES_MAX}"
            );
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let end = regions.iter().map(|region| region.image().end).max().unwrap_or(0);
        if end > pages.count() * PAGE_BYTES
            || end > source.size_bytes().next_multiple_of(PAGE_BYTES)
        {
            let message = format!(
                "regions up to byte {end} of the image, of which {} pages are known and {} bytes \
                 served",
                pages.count(),
                source.size_bytes()
            );
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let sorted = |start: fn(&Region) -> u64| {
            let mut sorted: Vec<_> = regions.iter().map(start).zip(0..).collect();
            sorted.sort_unstable();
            sorted
        };
        let (by_address, by_offset) =
            (sorted(|region| region.address), sorted(|region| region.offset));
        let regions = regions
            .into_iter()
            .map(|region| {
                let tracking = match config.tracking {
                    Tracking::Off => Tracking::Off,
                    Tracking::Exact => register(&uffd, &region)?,
                };
                Ok(Served { region, tracking })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Vm {
            uffd,
            peer,
            pages,
            source,
            regions,
            by_address,
            by_offset,
            config,
            id,
            faults,
            tables: OnceLock::new(),
            gate: RwLock::new(()),
            capture: Mutex::new(None),
            end: Mutex::new(None),
            has_ended: AtomicBool::new(false),
            courses: Courses::default(),
            repeats: AtomicU64::new(0),
            counters: Counters::default(),
        })
    }

    /// The process whose memory it is.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// What each page is.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// The regions, in the order of the handshake.
    pub fn regions(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter().map(|served| &served.region)
    }

    /// Whether every region's changes are known to the page.
    pub fn is_tracked(&self) -> bool {
        self.regions.iter().all(|served| served.tracking == Tracking::Exact)
    }

    /// What was done so far.
    pub fn stats(&self) -> VmStats {
        self.counters.read()
    }

    /// Whether serving has ended.
    pub fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Acquire)
    }

    /// How serving ended; once.
    pub fn take_end(&self) -> Option<End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(super) fn finish(&self, end: End) {
        let mut slot = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.has_ended.swap(true, Ordering::AcqRel) {
            *slot = Some(end);
        }
    }

    /// Stops the guest: its memory cannot be served rightly.
    pub(super) fn fail(&self, error: Error) {
        tracing::error!(
            pid = self.peer.pid(),
            error = &error as &dyn std::error::Error,
            "the guest is stopped"
        );
        // First, so that it has not just gone when its process ends by that.
        self.finish(End::Stopped(error));
        if let Err(error) = self.peer.kill() {
            tracing::error!(pid = self.peer.pid(), %error, "and cannot be stopped");
        }
    }

    /// Reads what the kernel has to say, notes what was given back, and adds the faults.
    ///
    /// True if nothing is left to read. What is read nobody else will be told of: if this fails the
    /// guest cannot go on.
    pub(super) fn read_messages(&self, faults: &mut Vec<Fault>) -> Result<bool> {
        let alone = self.alone();
        self.read_messages_alone(&alone, faults)
    }

    /// The same for whoever holds the gate.
    pub(super) fn read_messages_alone(
        &self,
        _alone: &RwLockWriteGuard<'_, ()>,
        faults: &mut Vec<Fault>,
    ) -> Result<bool> {
        let inbox = self.pages.inbox();
        for _ in 0..READS_MAX {
            // Somebody else may have taken over.
            if self.has_ended() {
                return Ok(true);
            }
            let count = match self.uffd.read_into(inbox) {
                Ok(count) => count,
                Err(error) => return Err(Error::io("cannot read page faults", error)),
            };
            let read = Instant::now();
            for number in 0..count {
                match Event::parse(&message_at(inbox, number)) {
                    Event::Fault { address, access } => {
                        let wait = match access {
                            Access::Read => Wait::Read,
                            Access::Write => Wait::Write,
                            Access::WriteProtected => Wait::ProtectedWrite,
                            Access::Minor => {
                                return Err(Error::new(
                                    ErrorKind::Protocol,
                                    format!("a minor fault at {address:#x}, never asked for"),
                                ));
                            }
                        };
                        faults.push(Fault { address, wait, read });
                    }
                    Event::Remove(range) => self.note_removed(&range)?,
                    Event::Other(kind) => {
                        let message = format!("an event {kind:#x} of the VMM, never asked for");
                        return Err(Error::new(ErrorKind::Protocol, message));
                    }
                }
                // Whoever takes over after us need not look at it.
                inbox[number * MESSAGE_BYTES].store(0, Ordering::Release);
            }
            // The kernel fills the inbox as long as it has something.
            if count < inbox.len() / MESSAGE_BYTES {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Leaves faults to the threads of the pager.
    pub(super) fn pass_on(&self, faults: Vec<Fault>) {
        self.faults.pass_on(self.id, faults.into_iter());
    }

    /// Waits until nobody touches the guest any more; it must have ended. Not under the gate.
    pub(super) fn settle(&self) {
        drop(self.alone());
    }

    /// Lets go of memory whose process has ended. Whoever reads it from outside keeps it, and may wait
    /// for a page that nobody installs any more.
    pub(super) fn abandon(&self) {
        for served in &self.regions {
            // As likely as not nothing is left.
            let _ = self.uffd.unregister(&served.region.addresses());
        }
    }

    /// Notes what a predecessor had read and perhaps not noted.
    pub(super) fn note_inbox(&self) -> Result<()> {
        let inbox = self.pages.inbox();
        for number in 0..inbox.len() / MESSAGE_BYTES {
            if let Event::Remove(range) = Event::parse(&message_at(inbox, number)) {
                self.note_removed(&range)?;
            }
            inbox[number * MESSAGE_BYTES].store(0, Ordering::Release);
        }
        Ok(())
    }

    fn note_removed(&self, range: &Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            // An address that is in no region would leave a page with its old content.
            let served = self.served(at)?;
            let region = &served.region;
            let end = range.end.min(region.address + region.size);
            let pages = page_of(region, at)..page_of(region, end - 1) + 1;
            self.lose_captures(pages.clone());
            self.note(pages, PageEvent::Removed)?;
            at = end;
        }
        self.counters.removed(range.end - range.start);
        Ok(())
    }

    pub(super) fn note(&self, pages: Range<u64>, event: PageEvent) -> Result<()> {
        self.pages
            .note(pages, event)
            .map_err(|error| Error::with_source(ErrorKind::Lost, "page states are wrong", error))
    }

    /// Takes up where a server left off that was killed: what it had read is noted, what it had done the
    /// page tables tell, and whoever waits asks again.
    pub(super) fn reconcile(&self) -> Result<()> {
        let _alone = self.alone();
        self.note_inbox()?;
        let cannot = |error| Error::io("cannot look at the VMM's page tables", error);
        let tables = PageMap::of(self.peer.pid()).map_err(cannot)?;
        // As long as it lives, nobody else has its number.
        if self.peer.has_ended().map_err(cannot)? {
            return Err(Error::new(ErrorKind::Gone, "the VMM is gone"));
        }
        for served in &self.regions {
            let region = &served.region;
            let mut next = region.address;
            let mut result = Ok(());
            let mut set = |range: Range<u64>, found| {
                if result.is_ok() {
                    result = self.set_found(served, range, found);
                }
            };
            tables
                .scan(region.addresses(), Wanted::THERE, &mut |range, categories| {
                    set(next..range.start, Found::Nothing);
                    next = range.end;
                    let is_writable = categories.has(Categories::WRITABLE);
                    set(range, if is_writable { Found::Writable } else { Found::Protected });
                })
                .map_err(cannot)?;
            set(next..region.addresses().end, Found::Nothing);
            result?;
            self.uffd
                .wake(&region.addresses())
                .map_err(|error| Error::io("cannot wake who waits", error))?;
        }
        Ok(())
    }

    fn set_found(&self, served: &Served, range: Range<u64>, found: Found) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let region = &served.region;
        for page in page_of(region, range.start)..page_of(region, range.end - 1) + 1 {
            self.pages.reconcile(page, found, served.tracking).map_err(|error| {
                Error::with_source(
                    ErrorKind::Lost,
                    "the guest's memory cannot be taken over",
                    error,
                )
            })?;
        }
        Ok(())
    }

    /// A range of the image, widened to whole pages of the guest.
    pub(super) fn whole_pages(&self, region: &Region, range: Range<u64>) -> Range<u64> {
        let page = region.page_bytes;
        let start = region.offset + (range.start - region.offset) / page * page;
        let end = region.offset + (range.end - region.offset).next_multiple_of(page);
        start..end.min(region.offset + region.size)
    }

    /// Whether any page of a range of the image is missing.
    pub(super) fn any_missing(&self, range: &Range<u64>) -> bool {
        let mut at = range.start / PAGE_BYTES;
        let end = range.end / PAGE_BYTES;
        while at < end {
            let (state, stop) = self.pages.run(at, end);
            if state == PageState::Missing {
                return true;
            }
            at = stop;
        }
        false
    }

    pub(super) fn served(&self, address: u64) -> Result<&Served> {
        let after = self.by_address.partition_point(|(start, _)| *start <= address);
        let served = after.checked_sub(1).map(|at| &self.regions[self.by_address[at].1]);
        served.filter(|served| served.region.addresses().contains(&address)).ok_or_else(|| {
            let message = format!("address {address:#x} is in no region of the guest");
            Error::new(ErrorKind::Protocol, message)
        })
    }

    /// The region that holds a byte of the image.
    pub(super) fn served_at(&self, at: u64) -> Option<&Served> {
        let after = self.by_offset.partition_point(|(start, _)| *start <= at);
        let served = after.checked_sub(1).map(|index| &self.regions[self.by_offset[index].1]);
        served.filter(|served| served.region.image().contains(&at))
    }

    /// Where the first region begins that is behind a byte of the image.
    pub(super) fn next_region(&self, at: u64) -> Option<u64> {
        let after = self.by_offset.partition_point(|(start, _)| *start <= at);
        self.by_offset.get(after).map(|(start, _)| *start)
    }

    pub(super) fn served_regions(&self) -> &[Served] {
        &self.regions
    }

    pub(super) fn source(&self) -> &Arc<dyn MemorySource> {
        &self.source
    }

    pub(super) fn window_bytes(&self) -> u64 {
        self.config.window_bytes
    }

    /// The gate, for an answer; none if the guest is not to be touched any more.
    pub(super) fn shared(&self) -> Option<RwLockReadGuard<'_, ()>> {
        // Whoever panicked while holding it has had the guest stopped.
        let shared = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        (!self.has_ended()).then_some(shared)
    }

    pub(super) fn alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

/// Registers a region for write protection, too, where the kernel can do that.
fn register(uffd: &Userfaultfd, region: &Region) -> Result<Tracking> {
    let range = region.address..region.address + region.size;
    match uffd.register(&range, Register::MissingAndProtected) {
        Ok(()) => Ok(Tracking::Exact),
        Err(error) if region.page_bytes > PAGE_BYTES => {
            tracing::warn!(%error, "changes of huge pages are not tracked");
            Ok(Tracking::Off)
        }
        Err(error) => Err(Error::io("cannot track the pages that the guest changes", error)),
    }
}

/// The page of the image that an address of a region stands for.
pub(super) fn page_of(region: &Region, address: u64) -> u64 {
    (region.offset + (address - region.address)) / PAGE_BYTES
}

/// The addresses of a range of the image.
pub(super) fn addresses_of(region: &Region, range: &Range<u64>) -> Range<u64> {
    let address = |at: u64| region.address + (at - region.offset);
    address(range.start)..address(range.end)
}
