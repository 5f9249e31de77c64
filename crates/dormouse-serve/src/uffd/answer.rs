//! Answers page faults: what to install, what else with it, and what is noted.
//!
//! Choosing, carrying out and noting an answer share the gate of [`Vm`]; nothing is decoded under it.

use std::ops::Range;
use std::sync::atomic::Ordering;

use dormouse_live::pages::{Answer, PAGE_BYTES, PageEvent, PageState, Tracking, Wait};
use dormouse_sys::page_map::{PageMap, Wanted};
use dormouse_sys::userfaultfd::{Progress, Protection, Stop};

use super::faults::Fault;
use super::handshake::Region;
use super::lead::Leading;
use super::source::{Content, Effort, Piece};
use super::vm::{Served, Vm, addresses_of, page_of};
use crate::error::{Error, ErrorKind, Result};

/// Zeros to install, as long as a huge page.
static ZEROS: [u8; HUGE_BYTES] = [0; HUGE_BYTES];

/// The largest page that a guest can be backed with.
const HUGE_BYTES: usize = 2 << 20;

/// Every so many faults of pages that count as there, the kernel is asked whether the page is there. If
/// not, its thread would try for ever.
const ASK_EVERY: u64 = 64;

/// Bytes that are installed before messages are let through: as many as a frame has, so that most
/// installations are one piece.
const STEP_BYTES: u64 = 64 << 10;

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

impl Vm {
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
        let whole = at..page.end * PAGE_BYTES;
        scratch.pieces.clear();
        if self.pages.get(page.start).state != PageState::Missing {
            return self.install_page(served, fault, &page, &addresses, scratch);
        }
        if region.page_bytes > PAGE_BYTES {
            scratch.lead = None;
            self.source().touched(whole.clone());
            self.load(whole, Effort::All, scratch)?;
            return self.install_page(served, fault, &page, &addresses, scratch);
        }
        let image = region.image();
        let step = self.courses.step(at, self.window_bytes(), &image);
        self.source().touched(step.passed_from..whole.end);
        // It may be a neighbour that cannot be read, and that nobody has asked for.
        if step.is_in_order && self.load_at_last(at, at..step.window.end, scratch).is_ok() {
            // It takes a while.
            scratch.lead = None;
            let behind = whole.end..step.window.end;
            for piece in &scratch.pieces {
                let bytes = self.install_neighbours(served, piece, &behind, Zeros::Installed)?;
                self.counters.around(bytes);
            }
            // Before its thread can come to what is next.
            let next = self.there_until(behind);
            scratch.ahead = self.courses.came_to(&step, next, &image);
            return self.install_page(served, fault, &page, &addresses, scratch);
        }
        self.load_at_last(at, whole.clone(), scratch)?;
        let answered = self.install_page(served, fault, &page, &addresses, scratch)?;
        if answered != Answered::Done || step.window == whole {
            return Ok(answered);
        }
        if let Err(error) = self.load(step.window.clone(), Effort::AtHand, scratch) {
            // The guest has not asked for them; if it does, it is told then.
            tracing::debug!(error = &error as &dyn std::error::Error, "no neighbours");
            return Ok(answered);
        }
        for piece in &scratch.pieces {
            let bytes = self.install_neighbours(served, piece, &step.window, Zeros::Left)?;
            self.counters.around(bytes);
        }
        let next = self.there_until(whole.end..step.window.end);
        scratch.ahead = self.courses.came_to(&step, next, &image);
        Ok(answered)
    }

    /// Loads what is at hand of a range, and the page at `at` in any case; whatever that takes.
    fn load_at_last(&self, at: u64, range: Range<u64>, scratch: &mut Scratch) -> Result<()> {
        let is_at_hand = self.load(range.clone(), Effort::AtHand, scratch).is_ok()
            && scratch.pieces.iter().any(|piece| piece.range().contains(&at));
        if !is_at_hand {
            scratch.lead = None;
            self.load(range, Effort::Block(at), scratch)?;
        }
        Ok(())
    }

    fn load(&self, range: Range<u64>, effort: Effort, scratch: &mut Scratch) -> Result<()> {
        scratch.pieces.clear();
        self.source().pieces(range, effort, &mut scratch.pieces).map_err(|error| {
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
    /// they are left. Takes the gate a few pages at a time: messages wait for it. How many bytes that were.
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
        match progress.stop {
            // None is free: whoever asks for it is told.
            Some(Stop::Failed(error)) if error.kind() != std::io::ErrorKind::OutOfMemory => {
                Err(Error::io("cannot install a huge page", error))
            }
            _ => Ok(done),
        }
    }

    /// Where the first page of a range of the image is that is missing; else its end.
    fn there_until(&self, range: Range<u64>) -> u64 {
        let (mut at, end) = (range.start / PAGE_BYTES, range.end / PAGE_BYTES);
        while at < end {
            let (state, stop) = self.pages.run(at, end);
            if state == PageState::Missing {
                break;
            }
            at = stop;
        }
        at * PAGE_BYTES
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
        let progress = if protection == Protection::Writable && !is_huge {
            self.uffd.zero(addresses)
        } else {
            self.copy_zeros(addresses, len, protection)
        };
        self.counters.zeros(progress.done_bytes);
        progress
    }

    fn copy_zeros(&self, addresses: &Range<u64>, len: u64, protection: Protection) -> Progress {
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
}

/// Buffers of a thread that answers faults.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) pieces: Vec<Piece>,
    /// What the guest whose fault was answered last will come to: to be decoded.
    pub(super) ahead: Option<Range<u64>>,
    /// Whether this thread is the one that listens. Given up before anything that may take long.
    pub(super) lead: Option<Leading>,
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
/// What pages of the image are noted as that were installed so.
fn installed_event(protection: Protection) -> PageEvent {
    match protection {
        Protection::Protected => PageEvent::ImageInstalled,
        Protection::Writable => PageEvent::MadeWritable,
    }
}
/// The guest's page that an address lies in, in pages of the image and in addresses.
fn page_at(region: &Region, address: u64) -> (Range<u64>, Range<u64>) {
    let start = address / region.page_bytes * region.page_bytes;
    let page = page_of(region, start);
    (page..page + region.page_bytes / PAGE_BYTES, start..start + region.page_bytes)
}
