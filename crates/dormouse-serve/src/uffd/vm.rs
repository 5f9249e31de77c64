//! A guest's memory while it is served: answers its faults and keeps what each page is.
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

use dormouse_live::pages::{
    Answer, Found, PAGE_BYTES, PageEvent, PageState, Pages, Tracking, Wait,
};
use dormouse_sys::page_map::{Categories, PageMap, Wanted};
use dormouse_sys::peer::Peer;
use dormouse_sys::userfaultfd::{
    Access, Event, MESSAGE_BYTES, Progress, Protection, Register, Stop, Userfaultfd, message_at,
};

use super::capture::CaptureState;
use super::faults::{Fault, Faults};
use super::handshake::Region;
use super::source::{Content, Effort, MemorySource, Piece};
use super::stats::{Counters, VmStats};
use crate::error::{Error, ErrorKind, Result};

/// Zeros to install, as long as a huge page.
static ZEROS: [u8; HUGE_BYTES] = [0; HUGE_BYTES];

/// The largest page that a guest can be backed with.
const HUGE_BYTES: usize = 2 << 20;

/// Every so many faults of pages that count as there, the kernel is asked whether the page is there. If
/// not, its thread would try for ever.
const ASK_EVERY: u64 = 64;

/// Windows that are installed at once for a guest that goes through its memory in order.
const WINDOWS_MAX: u64 = 4;

/// Bytes that are installed before messages are let through.
const STEP_BYTES: u64 = 32 << 10;

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
    tables: OnceLock<PageMap>,
    pub(super) gate: RwLock<()>,
    pub(super) capture: Mutex<Option<CaptureState>>,
    end: Mutex<Option<End>>,
    has_ended: AtomicBool,
    /// Where the last window ended, to tell a guest that goes through its memory in order, and for how
    /// many windows it has.
    last_end: AtomicU64,
    streak: AtomicU64,
    /// Faults of pages that count as there.
    repeats: AtomicU64,
    pub(super) counters: Counters,
}

/// A region and how it is registered.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) region: Region,
    pub(super) tracking: Tracking,
}

/// What becomes of zeros that nobody has asked for, where each page of them would take memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zeros {
    /// The guest will ask for them in a moment.
    Installed,
    /// As long as nobody asks for them they need none.
    Left,
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
            last_end: AtomicU64::new(u64::MAX),
            streak: AtomicU64::new(0),
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
        let Some(_shared) = self.shared() else { return Ok(Answered::Gone) };
        let first = self.pages.get(page.start);
        match first.state.answer(fault.wait, first.was_removed, served.tracking) {
            Answer::ZerosOrLetWrite => {
                let progress = self.install_zeros(served, &addresses, Protection::Writable);
                if !matches!(progress.stop, Some(Stop::Exists)) {
                    let event = Some(PageEvent::MadeWritable);
                    return self.note_progress(page, event, progress, &addresses);
                }
            }
            Answer::LetWrite => self.keep_for_capture(served, page.clone()),
            _ => return self.wake(&addresses),
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
            Err(Stop::Unmapped | Stop::Exists) => self.wake(&addresses),
            Err(Stop::Failed(error)) => Err(Error::io("cannot let a page be written to", error)),
        }
    }

    /// Installs the page that a thread waits for, then its neighbours where they are at hand.
    ///
    /// The page comes first, verified alone, so that its thread goes on. A guest that goes through its
    /// memory in order would fault on the next page before that is installed; for one those behind
    /// come first, zeros too, and the longer it does so the more.
    fn install(&self, served: &Served, fault: Fault, scratch: &mut Scratch) -> Result<Answered> {
        let region = &served.region;
        let (page, addresses) = page_at(region, fault.address);
        let at = page.start * PAGE_BYTES;
        let is_huge = region.page_bytes > PAGE_BYTES;
        let (window, is_in_order) = self.window(region, at);
        let is_missing = self.pages.get(page.start).state == PageState::Missing;
        let is_alone = is_huge || window.end - window.start <= PAGE_BYTES;
        scratch.pieces.clear();
        if is_missing && is_in_order && !is_alone {
            // It may be a neighbour that cannot be read, and that nobody has asked for.
            if self.load(at..window.end, Effort::Block(at), scratch).is_ok() {
                for piece in &scratch.pieces {
                    let behind = at + PAGE_BYTES..window.end;
                    self.install_neighbours(served, piece, &behind, Zeros::Installed)?;
                }
                return self.install_page(served, fault, &page, &addresses, scratch);
            }
        }
        if is_missing {
            let effort = if is_huge { Effort::All } else { Effort::Block(at) };
            self.load(at..at + region.page_bytes, effort, scratch)?;
        }
        let answered = self.install_page(served, fault, &page, &addresses, scratch)?;
        if is_missing && !is_alone && answered == Answered::Done {
            if let Err(error) = self.load(window.clone(), Effort::AtHand, scratch) {
                // The guest has not asked for them; if it does, it is told then.
                tracing::debug!(error = &error as &dyn std::error::Error, "no neighbours");
                return Ok(answered);
            }
            for piece in &scratch.pieces {
                self.install_neighbours(served, piece, &window, Zeros::Left)?;
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
        let Some(_shared) = self.shared() else { return Ok(Answered::Gone) };
        let first = self.pages.get(page.start);
        let answer = first.state.answer(fault.wait, first.was_removed, served.tracking);
        let protection = match answer {
            Answer::Image { protected: true } | Answer::Zeros { protected: true } => {
                Protection::Protected
            }
            _ => Protection::Writable,
        };
        let progress = match answer {
            Answer::Wake | Answer::LetWrite | Answer::ZerosOrLetWrite => {
                self.check_there(page, addresses)?;
                return self.wake(addresses);
            }
            Answer::Zeros { .. } => self.install_zeros(served, addresses, protection),
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
                self.install_piece(served, piece, &(at..at + PAGE_BYTES), protection)
            }
        };
        let noted = PageState::noted(answer, served.tracking);
        self.note_progress(page.clone(), noted, progress, addresses)
    }

    fn neighbour_protection(&self, served: &Served) -> Protection {
        match served.tracking {
            Tracking::Exact => Protection::Protected,
            Tracking::Off => Protection::Writable,
        }
    }

    /// Installs those pages of a piece that are in `within` and missing; whatever stands in the way,
    /// they are left. Takes the gate a few pages at a time: messages wait for it.
    pub(super) fn install_neighbours(
        &self,
        served: &Served,
        piece: &Piece,
        within: &Range<u64>,
        zeros: Zeros,
    ) -> Result<u64> {
        let is_zero = matches!(piece.content, Content::Zeros(_));
        if is_zero && served.tracking == Tracking::Exact && zeros == Zeros::Left {
            return Ok(0);
        }
        let protection = self.neighbour_protection(served);
        let event = installed_event(protection);
        let range = piece.range();
        let end = range.end.min(within.end).min(served.region.image().end);
        let mut at = range.start.max(within.start).max(served.region.offset);
        let mut installed = 0;
        while at < end {
            let Some(_shared) = self.shared() else { break };
            let stop = self.missing_until(at, end.min(at + STEP_BYTES));
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
                    // Short of memory, perhaps. Nobody has asked for these.
                    tracing::debug!(%error, "pages are left");
                    break;
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
        let Some(_shared) = self.shared() else { return Ok(0) };
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
            // None is free: whoever asks for it is told.
            Some(Stop::Failed(error)) if error.kind() != std::io::ErrorKind::OutOfMemory => {
                Err(Error::io("cannot install a huge page", error))
            }
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
            Some(Stop::Exists) => self.wake(addresses),
            // The mapping is gone: whoever waited is told by the kernel.
            Some(Stop::Unmapped) => self.wake(addresses),
            Some(Stop::Changing) => Ok(Answered::Busy),
            Some(Stop::Gone) => Ok(Answered::Gone),
            Some(Stop::Failed(error)) => Err(Error::io("cannot install a page", error)),
        }
    }

    fn wake(&self, addresses: &Range<u64>) -> Result<Answered> {
        match self.uffd.wake(addresses) {
            Ok(()) => Ok(Answered::Done),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
                Ok(Answered::Gone)
            }
            Err(error) => Err(Error::io("cannot wake a thread of the guest", error)),
        }
    }

    /// A page that is asked for although it counts as there: as a rule somebody else has just installed
    /// it. But if it was taken away behind our back, its content is lost. Called with the gate held,
    /// so that it is not being given back.
    fn check_there(&self, page: &Range<u64>, addresses: &Range<u64>) -> Result<()> {
        if self.repeats.fetch_add(1, Ordering::Relaxed) % ASK_EVERY != ASK_EVERY - 1 {
            return Ok(());
        }
        let cannot = |error| Error::io("cannot look at the VMM's page tables", error);
        let tables = match self.tables.get() {
            Some(tables) => tables,
            None => {
                let tables = match PageMap::of(self.peer.pid()) {
                    // Without the right to look, its thread tries until it is there.
                    Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                        return Ok(());
                    }
                    tables => tables.map_err(cannot)?,
                };
                self.tables.get_or_init(|| tables)
            }
        };
        let mut is_there = false;
        let scanned = tables.scan(addresses.clone(), Wanted::THERE, &mut |_, _| is_there = true);
        // Before Linux 6.7 nobody can tell; and a process that has ended has no pages.
        if is_there || scanned.is_err() || self.peer.has_ended().map_err(cannot)? {
            return Ok(());
        }
        let state = self.pages.get(page.start).state;
        let message = format!("page {} is {state:?} and not in the guest's memory", page.start);
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

    /// The bytes of the image around `at` that are looked at for pages to install, and whether the guest
    /// comes from the end of the last.
    fn window(&self, region: &Region, at: u64) -> (Range<u64>, bool) {
        let window = self.config.window_bytes.max(PAGE_BYTES);
        let start = at / window * window;
        let is_in_order = self.last_end.load(Ordering::Relaxed) == at;
        let streak = if is_in_order { self.streak.fetch_add(1, Ordering::Relaxed) + 1 } else { 0 };
        if !is_in_order {
            self.streak.store(0, Ordering::Relaxed);
        }
        let count = if window > PAGE_BYTES { (streak + 1).min(WINDOWS_MAX) } else { 1 };
        let image = region.image();
        let window = start.max(image.start)..(start + window * count).min(image.end);
        self.last_end.store(window.end, Ordering::Relaxed);
        (window, is_in_order)
    }

    fn served(&self, address: u64) -> Result<&Served> {
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

    pub(super) fn source(&self) -> &dyn MemorySource {
        &*self.source
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
        let mut next = at;
        for piece in &self.pieces {
            if piece.at != next {
                let message = format!("the image has a gap at byte {next}");
                return Err(Error::new(ErrorKind::Protocol, message));
            }
            next = piece.range().end;
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
