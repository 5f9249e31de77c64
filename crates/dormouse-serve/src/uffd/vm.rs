//! A guest's memory while it is served: answers its faults and keeps what each page is.
//!
//! # Locks
//!
//! `gate` is held alone while messages are read from the kernel and pages that were given back are
//! noted: as soon as such a message is read the kernel may take the page away, and whoever installs
//! one must know. It is shared by whoever chooses, carries out and notes an answer. Nothing is read,
//! decoded or waited for under it. `capture` is taken inside it and guards what a capture keeps.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dormouse_live::pages::{
    Answer, Found, PAGE_BYTES, PageEvent, PageState, Pages, Tracking, Wait,
};
use dormouse_sys::page_map::{Categories, PageMap, Wanted};
use dormouse_sys::peer::Peer;
use dormouse_sys::userfaultfd::{
    Access, Event, MESSAGE_BYTES, Progress, Protection, Register, Stop, Userfaultfd, message_at,
};

use super::capture::CaptureState;
use super::handshake::Region;
use super::source::{Content, Effort, MemorySource, Piece};
use super::stats::{Counters, VmStats};
use crate::error::{Error, ErrorKind, Result};

/// Zeros to install, as long as a huge page.
static ZEROS: [u8; HUGE_BYTES] = [0; HUGE_BYTES];

/// The largest page that a guest can be backed with.
const HUGE_BYTES: usize = 2 << 20;

/// So often in a row the same page may turn out to be there already. More means that it is not there
/// although it was installed, and that its thread would try for ever.
const REPEATS_MAX: u64 = 10_000;

/// How a guest is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// Around a fault, so many bytes are looked at for pages to install with it; a multiple of 4096.
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
    config: VmConfig,
    pub(super) gate: RwLock<()>,
    pub(super) capture: Mutex<Option<CaptureState>>,
    end: Mutex<Option<End>>,
    has_ended: AtomicBool,
    /// Where the last window ended, to tell a guest that goes through its memory in order.
    last_end: AtomicU64,
    /// The page that was answered by waking last, and how often in a row.
    repeat: (AtomicU64, AtomicU64),
    pub(super) counters: Counters,
}

/// A region and how it is registered.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) region: Region,
    pub(super) tracking: Tracking,
}

/// What becomes of zeros that nobody has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zeros {
    /// They are left to the fault that may never come, where they would take memory.
    Leave,

    /// They are installed: somebody will ask for them.
    Install,
}

/// A thread of the guest that waits for a page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    pub(super) address: u64,
    pub(super) wait: Wait,
}

/// What came of answering a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answered {
    /// The thread goes on.
    Done,
    /// The mapping is changing: messages have to be read first, then it is tried again.
    Busy,
    /// The VMM is gone.
    Gone,
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
    ) -> Result<Vm> {
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
            config,
            gate: RwLock::new(()),
            capture: Mutex::new(None),
            end: Mutex::new(None),
            has_ended: AtomicBool::new(false),
            last_end: AtomicU64::new(u64::MAX),
            repeat: (AtomicU64::new(u64::MAX), AtomicU64::new(0)),
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
        if let Err(error) = self.peer.kill() {
            tracing::error!(pid = self.peer.pid(), %error, "and cannot be stopped");
        }
        self.finish(End::Stopped(error));
    }

    /// Reads what the kernel has to say, notes what was given back, and adds the faults.
    ///
    /// Returns once nothing is left to read: messages that give pages back come after faults that
    /// happened later.
    pub(super) fn read_messages(&self, faults: &mut Vec<Fault>) -> Result<()> {
        let _alone = self.alone();
        let inbox = self.pages.inbox();
        loop {
            let count = match self.uffd.read_into(inbox) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) => return Err(Error::io("cannot read page faults", error)),
            };
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
                        faults.push(Fault { address, wait });
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

    /// Answers a fault.
    pub(super) fn answer(&self, fault: Fault, scratch: &mut Scratch) -> Result<Answered> {
        let served = self.served(fault.address)?;
        match fault.wait {
            Wait::ProtectedWrite => self.let_write(served, fault),
            Wait::Read | Wait::Write => self.install(served, fault, scratch),
        }
    }

    /// Lets a thread write to a page that is there.
    fn let_write(&self, served: &Served, fault: Fault) -> Result<Answered> {
        let (page, addresses) = page_at(&served.region, fault.address);
        let copied = self.copy_for_capture(served, &page);
        let _shared = self.shared();
        let first = self.pages.get(page.start);
        let answer = first.state.answer(fault.wait, first.was_removed, served.tracking);
        if answer == Answer::Wake {
            return Ok(self.wake(&addresses));
        }
        if !self.keep_for_capture(page.clone(), copied) {
            return Ok(Answered::Busy);
        }
        match self.uffd.protect(&addresses, Protection::Writable) {
            Ok(()) => {
                // Noted before anybody can look at the states: looking takes the gate alone.
                self.note(page, PageEvent::MadeWritable)?;
                self.counters.first_write();
                Ok(Answered::Done)
            }
            Err(Stop::Changing) => Ok(Answered::Busy),
            Err(Stop::Gone) => Ok(Answered::Gone),
            Err(Stop::Unmapped | Stop::Exists) => Ok(self.wake(&addresses)),
            Err(Stop::Failed(error)) => Err(Error::io("cannot let a page be written to", error)),
        }
    }

    /// Installs the page that a thread waits for, then its neighbours where they are at hand.
    ///
    /// The page comes first, verified alone, so that its thread goes on. A guest that goes through its
    /// memory in order would fault on the next page before that is installed; for one the page and
    /// those behind it are one installation.
    fn install(&self, served: &Served, fault: Fault, scratch: &mut Scratch) -> Result<Answered> {
        let region = &served.region;
        let (page, addresses) = page_at(region, fault.address);
        let at = page.start * PAGE_BYTES;
        let is_huge = region.page_bytes > PAGE_BYTES;
        let window = self.window(region, at);
        let is_missing = self.pages.get(page.start).state == PageState::Missing;
        scratch.pieces.clear();
        if is_missing {
            let is_in_order = self.last_end.swap(window.end, Ordering::Relaxed) == at;
            let range = match (is_huge, is_in_order) {
                (true, _) => at..at + region.page_bytes,
                (false, true) => at..window.end,
                (false, false) => at..at + PAGE_BYTES,
            };
            self.load(range, if is_huge { Effort::All } else { Effort::Block(at) }, scratch)?;
        }
        let answered = self.install_page(served, fault, &page, &addresses, scratch)?;
        if is_missing && !is_huge && answered == Answered::Done {
            self.load(window, Effort::AtHand, scratch)?;
            let _shared = self.shared();
            for piece in &scratch.pieces {
                self.install_neighbours(served, piece, region, Zeros::Leave)?;
            }
        }
        Ok(answered)
    }

    fn load(&self, range: Range<u64>, effort: Effort, scratch: &mut Scratch) -> Result<()> {
        scratch.pieces.clear();
        self.source.pieces(range, effort, &mut scratch.pieces).map_err(|error| {
            Error::with_source(ErrorKind::Source, "cannot read the guest's memory", error)
        })
    }

    fn install_page(
        &self,
        served: &Served,
        fault: Fault,
        page: &Range<u64>,
        addresses: &Range<u64>,
        scratch: &mut Scratch,
    ) -> Result<Answered> {
        let region = &served.region;
        let at = page.start * PAGE_BYTES;
        let _shared = self.shared();
        let first = self.pages.get(page.start);
        let answer = first.state.answer(fault.wait, first.was_removed, served.tracking);
        let protection = match answer {
            Answer::Image { protected: true } | Answer::Zeros { protected: true } => {
                Protection::Protected
            }
            _ => Protection::Writable,
        };
        let (mut pages, mut addresses) = (page.clone(), addresses.clone());
        let progress = match answer {
            Answer::Wake | Answer::LetWrite => {
                self.check_repeats(page.start)?;
                return Ok(self.wake(&addresses));
            }
            Answer::Zeros { .. } => self.install_zeros(served, &addresses, protection),
            Answer::Image { .. } if region.page_bytes > PAGE_BYTES => {
                let bytes = scratch.assemble(at, region.page_bytes)?;
                self.uffd.copy(addresses.start, bytes, protection)
            }
            Answer::Image { .. } => {
                let piece = scratch.pieces.iter().find(|piece| piece.range().contains(&at));
                let Some(piece) = piece else {
                    // Not missing when it was looked up, and missing now: never.
                    let message = format!("page {} came back", page.start);
                    return Err(Error::new(ErrorKind::Protocol, message));
                };
                let mut range = at..at + PAGE_BYTES;
                if protection == self.neighbour_protection(served) {
                    range.end = self.missing_until(at, piece.range().end);
                }
                pages = range.start / PAGE_BYTES..range.end / PAGE_BYTES;
                addresses = addresses_of(region, &range);
                self.install_piece(served, piece, &range, protection)
            }
        };
        let noted = PageState::noted(answer, served.tracking);
        self.note_progress(pages, noted, progress, &addresses)
    }

    fn neighbour_protection(&self, served: &Served) -> Protection {
        match served.tracking {
            Tracking::Exact => Protection::Protected,
            Tracking::Off => Protection::Writable,
        }
    }

    /// Installs those pages of a piece that are missing; whatever stands in the way, they are left.
    ///
    /// Zeros may be left where each would take a page of memory: as long as nobody asks for them they
    /// need none.
    pub(super) fn install_neighbours(
        &self,
        served: &Served,
        piece: &Piece,
        region: &Region,
        zeros: Zeros,
    ) -> Result<u64> {
        let is_zero = matches!(piece.content, Content::Zeros(_));
        if is_zero && served.tracking == Tracking::Exact && zeros == Zeros::Leave {
            return Ok(0);
        }
        let protection = self.neighbour_protection(served);
        let event = installed_event(protection);
        let range = piece.range();
        let end = range.end.min(region.offset + region.size);
        let mut at = range.start.max(region.offset);
        let mut installed = 0;
        while at < end {
            let stop = self.missing_until(at, end);
            if stop == at {
                at += PAGE_BYTES;
                continue;
            }
            let progress = self.install_piece(served, piece, &(at..stop), protection);
            let done = at + progress.done_bytes;
            self.note(at / PAGE_BYTES..done / PAGE_BYTES, event)?;
            installed += progress.done_bytes;
            match progress.stop {
                None => at = stop,
                Some(Stop::Exists) => at = done + PAGE_BYTES,
                Some(Stop::Changing) if progress.done_bytes > 0 => at = done,
                Some(Stop::Changing | Stop::Unmapped | Stop::Gone) => break,
                Some(Stop::Failed(error)) => {
                    return Err(Error::io("cannot install pages", error));
                }
            }
        }
        self.counters.around(installed);
        Ok(installed)
    }

    /// Installs a huge page that nobody asked for, if it is still missing. Its pieces are in `scratch`.
    pub(super) fn install_huge_ahead(
        &self,
        served: &Served,
        range: Range<u64>,
        scratch: &mut Scratch,
    ) -> Result<u64> {
        let bytes = scratch.assemble(range.start, range.end - range.start)?;
        let _shared = self.shared();
        let pages = range.start / PAGE_BYTES..range.end / PAGE_BYTES;
        if self.pages.get(pages.start).state != PageState::Missing {
            return Ok(0);
        }
        let protection = self.neighbour_protection(served);
        let addresses = addresses_of(&served.region, &range);
        let progress = self.uffd.copy(addresses.start, bytes, protection);
        let done = progress.done_bytes;
        let event = installed_event(protection);
        self.note(pages.start..pages.start + done / PAGE_BYTES, event)?;
        self.counters.around(done);
        match progress.stop {
            Some(Stop::Failed(error)) => Err(Error::io("cannot install a huge page", error)),
            _ => Ok(done),
        }
    }

    /// Where the pages from `at` on cease to be missing, at most at `end`.
    fn missing_until(&self, at: u64, end: u64) -> u64 {
        let (state, stop) = self.pages.run(at / PAGE_BYTES, end / PAGE_BYTES);
        if state == PageState::Missing { stop * PAGE_BYTES } else { at }
    }

    fn install_piece(
        &self,
        served: &Served,
        piece: &Piece,
        range: &Range<u64>,
        protection: Protection,
    ) -> Progress {
        let addresses = addresses_of(&served.region, range);
        let within = |at: u64| usize::try_from(at - piece.at).unwrap_or(usize::MAX);
        match (&piece.content, piece.bytes()) {
            (Content::Zeros(_), _) => self.install_zeros(served, &addresses, protection),
            (_, Some(bytes)) => {
                let bytes = &bytes[within(range.start)..within(range.end)];
                self.uffd.copy(addresses.start, bytes, protection)
            }
            (_, None) => {
                let error = std::io::Error::other("the image's bytes are gone");
                Progress { done_bytes: 0, stop: Some(Stop::Failed(error)) }
            }
        }
    }

    /// Zeros: the kernel's own page of them where the first write need not be told. Installing that
    /// and protecting it afterwards would miss a write between the two.
    fn install_zeros(
        &self,
        served: &Served,
        addresses: &Range<u64>,
        protection: Protection,
    ) -> Progress {
        let len = addresses.end - addresses.start;
        let is_huge = served.region.page_bytes > PAGE_BYTES;
        if protection == Protection::Writable && !is_huge {
            return self.uffd.zero(addresses);
        }
        let mut done = 0;
        while done < len {
            let part = (len - done).min(HUGE_BYTES as u64);
            let bytes = &ZEROS[..usize::try_from(part).unwrap_or(HUGE_BYTES)];
            let progress = self.uffd.copy(addresses.start + done, bytes, protection);
            done += progress.done_bytes;
            if progress.stop.is_some() {
                return Progress { done_bytes: done, ..progress };
            }
        }
        Progress { done_bytes: done, stop: None }
    }

    /// Notes what was installed for a thread that waits, and makes it go on in any case.
    fn note_progress(
        &self,
        pages: Range<u64>,
        event: Option<PageEvent>,
        progress: Progress,
        addresses: &Range<u64>,
    ) -> Result<Answered> {
        let done = progress.done_bytes / PAGE_BYTES;
        if let Some(event) = event.filter(|_| done > 0) {
            self.note(pages.start..pages.start + done, event)?;
            self.counters.installed(progress.done_bytes);
        }
        match progress.stop {
            // Woken with the first page that was installed.
            _ if done > 0 => Ok(Answered::Done),
            None => Ok(Answered::Done),
            Some(Stop::Exists) => {
                self.check_repeats(pages.start)?;
                Ok(self.wake(addresses))
            }
            // The mapping is gone: whoever waited is told by the kernel.
            Some(Stop::Unmapped) => Ok(self.wake(addresses)),
            Some(Stop::Changing) => Ok(Answered::Busy),
            Some(Stop::Gone) => Ok(Answered::Gone),
            Some(Stop::Failed(error)) => Err(Error::io("cannot install a page", error)),
        }
    }

    fn wake(&self, addresses: &Range<u64>) -> Answered {
        match self.uffd.wake(addresses) {
            Ok(()) => Answered::Done,
            // Nobody is left who could wait.
            Err(_) => Answered::Gone,
        }
    }

    /// A page that is asked for again and again although it counts as there is lost.
    fn check_repeats(&self, page: u64) -> Result<()> {
        if self.repeat.0.swap(page, Ordering::Relaxed) != page {
            self.repeat.1.store(0, Ordering::Relaxed);
            return Ok(());
        }
        if self.repeat.1.fetch_add(1, Ordering::Relaxed) < REPEATS_MAX {
            return Ok(());
        }
        let state = self.pages.get(page).state;
        let message = format!("page {page} is {state:?} and yet not in the guest's memory");
        Err(Error::new(ErrorKind::Lost, message))
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

    /// The bytes of the image around `at` that are looked at for pages to install.
    fn window(&self, region: &Region, at: u64) -> Range<u64> {
        let window = self.config.window_bytes.max(PAGE_BYTES);
        let start = at / window * window;
        start.max(region.offset)..(start + window).min(region.offset + region.size)
    }

    fn served(&self, address: u64) -> Result<&Served> {
        self.regions
            .iter()
            .find(|served| {
                let region = &served.region;
                address.checked_sub(region.address).is_some_and(|within| within < region.size)
            })
            .ok_or_else(|| {
                let message = format!("address {address:#x} is in no region of the guest");
                Error::new(ErrorKind::Protocol, message)
            })
    }

    /// The region that holds a byte of the image.
    pub(super) fn served_at(&self, at: u64) -> Option<&Served> {
        self.regions.iter().find(|served| {
            let region = &served.region;
            at.checked_sub(region.offset).is_some_and(|within| within < region.size)
        })
    }

    pub(super) fn served_regions(&self) -> &[Served] {
        &self.regions
    }

    pub(super) fn source(&self) -> &dyn MemorySource {
        &*self.source
    }

    pub(super) fn shared(&self) -> RwLockReadGuard<'_, ()> {
        // Whoever panicked while holding it has had the guest stopped.
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
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

/// Buffers of a thread that answers faults.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) pieces: Vec<Piece>,
    huge: Vec<u8>,
}

impl Scratch {
    /// The pieces as one run of bytes.
    fn assemble(&mut self, at: u64, len: u64) -> Result<&[u8]> {
        let len = usize::try_from(len).unwrap_or(HUGE_BYTES);
        self.huge.clear();
        self.huge.resize(len, 0);
        for piece in &self.pieces {
            let start = usize::try_from(piece.at - at).unwrap_or(usize::MAX);
            if let Content::Bytes { .. } = piece.content {
                let bytes = piece
                    .bytes()
                    .ok_or_else(|| Error::new(ErrorKind::Source, "the image's bytes are gone"))?;
                let Some(part) = self.huge.get_mut(start..start + bytes.len()) else {
                    let message = format!("{piece:?} is outside of the page at {at}");
                    return Err(Error::new(ErrorKind::Protocol, message));
                };
                part.copy_from_slice(bytes);
            }
        }
        Ok(&self.huge)
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

/// What pages of the image are noted as that were installed so.
fn installed_event(protection: Protection) -> PageEvent {
    match protection {
        Protection::Protected => PageEvent::ImageInstalled,
        Protection::Writable => PageEvent::MadeWritable,
    }
}

/// The page of the image that an address of a region stands for.
fn page_of(region: &Region, address: u64) -> u64 {
    (region.offset + (address - region.address)) / PAGE_BYTES
}

/// The guest's page that an address lies in, in pages of the image and in addresses.
fn page_at(region: &Region, address: u64) -> (Range<u64>, Range<u64>) {
    let start = address / region.page_bytes * region.page_bytes;
    let page = page_of(region, start);
    (page..page + region.page_bytes / PAGE_BYTES, start..start + region.page_bytes)
}

/// The addresses of a range of the image.
pub(super) fn addresses_of(region: &Region, range: &Range<u64>) -> Range<u64> {
    let address = |at: u64| region.address + (at - region.offset);
    address(range.start)..address(range.end)
}
