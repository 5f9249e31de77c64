//! Takes what a guest changed out of its memory, while it is paused or runs on.
//!
//! Sealing protects every dirty page and marks it. From then on the guest may run: before it is let
//! write to a marked page, the page is copied. Reading takes no lock: what was read counts if the
//! mark is still there afterwards, for whoever lets a write through, or takes the page away, takes
//! the mark off first.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use dormouse_live::pages::{PAGE_BYTES, PageChanges, PageEvent, PageState, Tracking};
use dormouse_sys::page_map::{Categories, PageMap, Wanted};
use dormouse_sys::process_memory;
use dormouse_sys::userfaultfd::{Protection, Stop};
use roaring::RoaringBitmap;
use rustix::io::Errno;

use super::vm::{Served, Vm, addresses_of};
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a page.
const PAGE: usize = 4096;

/// Copies that are kept of pages which the guest wrote to before they were read. More are kept for
/// no capture: it fails, and the guest runs on.
const COPIES_MAX: usize = (256 << 20) / PAGE;

/// Pages that are read at once.
const READ_PAGES: u64 = 64;

/// How often sealing is tried while the guest is giving memory back: at once, and with pauses.
const BUSY_MAX: u32 = 3_000;
const BUSY_AT_ONCE: u32 = 1_000;
const BUSY_PAUSE: Duration = Duration::from_millis(1);

/// What a capture keeps while the guest runs on.
#[derive(Debug, Default)]
pub(super) struct CaptureState {
    copies: HashMap<u64, Box<[u8; PAGE]>>,
    failure: Option<Error>,
}

/// The changes of a guest's memory at one moment.
///
/// Dropped without [`finish`](Capture::finish), what it would have taken counts as changed again.
pub struct Capture {
    vm: Arc<Vm>,
    changes: PageChanges,
    /// Pages of `changes.dirty` that were marked: the others belong to regions that are not tracked.
    marked: RoaringBitmap,
    is_finished: bool,
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture")
            .field("dirty", &self.changes.dirty.len())
            .field("zero", &self.changes.zero.len())
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// Seals what differs from the image. The guest must be paused, so that the moment is one.
    ///
    /// It may go on as soon as this returns, if [`Capture::is_live`]; else when everything is read.
    /// `Busy` while another capture is under way, `Gone` if it is not served any more.
    pub fn seal(self: &Arc<Self>) -> Result<Capture> {
        {
            let mut capture = self.capture_state();
            if capture.is_some() {
                return Err(Error::new(ErrorKind::Busy, "the guest is being captured already"));
            }
            *capture = Some(CaptureState::default());
        }
        // Dropped, it takes back what it did.
        let mut capture = Capture {
            vm: Arc::clone(self),
            changes: PageChanges::default(),
            marked: RoaringBitmap::new(),
            is_finished: false,
        };
        for attempt in 0..BUSY_MAX {
            if self.has_ended() {
                return Err(Error::new(ErrorKind::Gone, "the guest is not served any more"));
            }
            if self.seal_pages(&mut capture)? {
                return Ok(capture);
            }
            if attempt > BUSY_AT_ONCE {
                std::thread::sleep(BUSY_PAUSE);
            } else {
                std::thread::yield_now();
            }
        }
        Err(Error::new(ErrorKind::Busy, "the guest is giving back memory and does not finish"))
    }

    /// Tries once; false if the guest is giving back memory meanwhile.
    fn seal_pages(&self, capture: &mut Capture) -> Result<bool> {
        let alone = self.alone();
        // Before messages are read: what they give back is still there for a moment.
        self.note_still_there()?;
        // What the guest gave back before it was paused comes first. Faults that are read by the way
        // are answered later: whatever comes of them comes after this moment.
        let mut faults = Vec::new();
        let heard = self.read_messages_alone(&alone, &mut faults);
        self.pass_on(faults);
        let is_all = heard.map_err(|error| self.fail_sealing(error))?;
        if !is_all || !self.protect_dirty(&mut capture.marked)? {
            capture.take_back();
            return Ok(false);
        }
        capture.changes = self.pages.changes();
        capture.changes.dirty |= &capture.marked;
        Ok(true)
    }

    /// Messages were read that nobody will answer, or states are wrong.
    fn fail_sealing(&self, error: Error) -> Error {
        let kind = error.kind();
        self.fail(error);
        Error::new(kind, "the guest was stopped while its memory was sealed")
    }

    /// Notes pages that were given back and are there all the same: what the kernel could not take away
    /// (locked memory) the guest writes to untold. Where the page tables may not be read, nothing of
    /// the guest's memory can be, and reading it will say so.
    fn note_still_there(&self) -> Result<()> {
        let Ok(tables) = PageMap::of(self.peer.pid()) else { return Ok(()) };
        for served in self.served_regions() {
            let region = &served.region;
            let mut there = Vec::new();
            let mut scanned = Ok(());
            let pages = region.offset / PAGE_BYTES..(region.offset + region.size) / PAGE_BYTES;
            self.pages.for_each_run(pages, &mut |run, state| {
                if state == PageState::Removed && scanned.is_ok() {
                    let bytes = run.start * PAGE_BYTES..run.end * PAGE_BYTES;
                    let addresses = addresses_of(region, &bytes);
                    scanned = tables.scan(addresses, Wanted::THERE, &mut |found, categories| {
                        if categories.has(Categories::WRITABLE) {
                            there.push(found);
                        }
                    });
                }
            });
            scanned.map_err(|error| Error::io("cannot look at the VMM's page tables", error))?;
            for found in there {
                let page = |address: u64| (region.offset + (address - region.address)) / PAGE_BYTES;
                self.note(page(found.start)..page(found.end), PageEvent::MadeWritable)?;
            }
        }
        Ok(())
    }

    /// Protects and marks all dirty pages; false if the guest is giving back memory meanwhile.
    fn protect_dirty(&self, marked: &mut RoaringBitmap) -> Result<bool> {
        for served in self.served_regions() {
            if served.tracking == Tracking::Off {
                continue;
            }
            let region = &served.region;
            let end = (region.offset + region.size) / PAGE_BYTES;
            let mut at = region.offset / PAGE_BYTES;
            while at < end {
                let (state, stop) = self.pages.run(at, end);
                if state == PageState::Dirty {
                    let bytes = at * PAGE_BYTES..stop * PAGE_BYTES;
                    match self.uffd.protect(&addresses_of(region, &bytes), Protection::Protected) {
                        Ok(()) => {}
                        Err(Stop::Changing) => return Ok(false),
                        Err(Stop::Gone) => {
                            return Err(Error::new(ErrorKind::Gone, "the VMM is gone"));
                        }
                        Err(stop) => {
                            let message = format!("cannot protect pages {at} to {stop:?}");
                            return Err(Error::new(ErrorKind::Io, message));
                        }
                    }
                    marked.insert_range(number(at)..=number(stop - 1));
                    self.pages.mark_to_capture(at..stop).map_err(|error| {
                        let error = "page states are wrong".to_owned() + &format!(": {error}");
                        self.fail_sealing(Error::new(ErrorKind::Lost, error))
                    })?;
                }
                at = stop;
            }
        }
        Ok(true)
    }

    /// Copies pages that a capture has yet to take, as the guest is about to write to them.
    ///
    /// Called with the gate held: a page that has the mark then is there, and reading it waits for
    /// nobody. Without it the page could be given back in between, its reader wait for a thread that
    /// answers faults, and all of those do the same.
    pub(super) fn keep_for_capture(&self, served: &Served, pages: Range<u64>) {
        if !self.pages.any_to_capture(pages.clone()) {
            return;
        }
        let mut bytes = vec![0; usize::try_from(pages.end - pages.start).unwrap_or(1) * PAGE];
        let range = pages.start * PAGE_BYTES..pages.end * PAGE_BYTES;
        let addresses = addresses_of(&served.region, &range);
        let mut failure = self.read_memory(std::slice::from_ref(&addresses), &mut bytes).err();
        let mut state = self.capture_state();
        for (page, bytes) in pages.zip(bytes.chunks_exact(PAGE)) {
            if !self.pages.unmark_to_capture(page) {
                continue;
            }
            let Some(state) = state.as_mut() else { continue };
            if state.copies.len() >= COPIES_MAX {
                let message = "the guest writes faster than its memory is captured";
                failure = Some(Error::new(ErrorKind::Busy, message));
            }
            if let Some(failure) = failure.take() {
                state.failure.get_or_insert(failure);
                continue;
            }
            let mut copy = Box::new([0; PAGE]);
            copy.copy_from_slice(bytes);
            state.copies.insert(page, copy);
        }
    }

    /// Reads the guest's memory from outside. May wait for missing pages.
    fn read_memory(&self, ranges: &[Range<u64>], bytes: &mut [u8]) -> Result<()> {
        let cannot = |error| Error::io("cannot read the VMM's memory", error);
        process_memory::read(self.peer.pid(), ranges, bytes).map_err(|error| {
            if error.kind() == std::io::ErrorKind::PermissionDenied {
                let message = "not allowed to read the VMM's memory: run as the VMM's user, or with \
                    CAP_SYS_PTRACE, and let the VMM be traced (kernel.yama.ptrace_scope)";
                return Error::with_source(ErrorKind::NotAllowed, message, error);
            }
            // Its memory goes a little earlier than the process.
            if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) {
                return Error::new(ErrorKind::Gone, "the VMM is gone");
            }
            match self.peer.has_ended() {
                Ok(true) => Error::new(ErrorKind::Gone, "the VMM is gone"),
                _ => cannot(error),
            }
        })?;
        // As long as it lives nobody else has its number, and nothing was read of somebody else.
        if self.peer.has_ended().map_err(cannot)? {
            return Err(Error::new(ErrorKind::Gone, "the VMM is gone"));
        }
        Ok(())
    }

    /// Notes that pages are given back before a capture took them. Called with the gate held alone.
    pub(super) fn lose_captures(&self, pages: Range<u64>) {
        if self.pages.any_to_capture(pages) {
            self.counters.captures_lost.fetch_add(1, Ordering::Relaxed);
            if let Some(state) = self.capture_state().as_mut() {
                let error = Error::new(ErrorKind::Busy, "the guest gave back memory meanwhile");
                state.failure.get_or_insert(error);
            }
        }
    }

    /// What a capture keeps. Held for moments, never over anything that can wait.
    fn capture_state(&self) -> MutexGuard<'_, Option<CaptureState>> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Capture {
    /// The pages that differ from the image.
    pub fn changes(&self) -> &PageChanges {
        &self.changes
    }

    /// Whether the guest may go on before everything is read.
    pub fn is_live(&self) -> bool {
        self.marked.len() == self.changes.dirty.len()
    }

    /// Fills `buffer` with dirty pages from `first` on, as they were when they were sealed.
    ///
    /// Once a page is read here, or was not in [`changes`](Capture::changes) to begin with, it is not
    /// kept any longer. `Busy`: the guest gave pages back, or wrote, faster than they were read.
    ///
    /// # Panics
    ///
    /// If the buffer is not made of whole pages.
    pub fn read(&self, first: u64, buffer: &mut [u8]) -> Result<()> {
        assert!(buffer.len().is_multiple_of(PAGE), "whole pages");
        let mut at = first;
        for part in buffer.chunks_mut(usize::try_from(READ_PAGES).unwrap_or(1) * PAGE) {
            self.read_part(at, part)?;
            at += READ_PAGES;
        }
        Ok(())
    }

    fn read_part(&self, first: u64, part: &mut [u8]) -> Result<()> {
        let vm = &self.vm;
        let end = first + (part.len() / PAGE) as u64;
        let mut ranges = Vec::new();
        let mut at = first;
        while at < end {
            let served = vm.served_at(at * PAGE_BYTES).ok_or_else(|| {
                Error::new(ErrorKind::InvalidInput, format!("page {at} is in no region"))
            })?;
            let stop = end.min((served.region.offset + served.region.size) / PAGE_BYTES);
            ranges.push(addresses_of(&served.region, &(at * PAGE_BYTES..stop * PAGE_BYTES)));
            at = stop;
        }
        vm.read_memory(&ranges, part)?;
        let mut state = vm.capture_state();
        let state = state.as_mut().ok_or_else(|| {
            Error::new(ErrorKind::Protocol, "a capture that is read after it ended")
        })?;
        if let Some(error) = state.failure.take() {
            return Err(error);
        }
        for (page, bytes) in (first..end).zip(part.chunks_mut(PAGE)) {
            if !self.marked.contains(number(page)) || vm.pages.unmark_to_capture(page) {
                continue;
            }
            let copy = state.copies.remove(&page).ok_or_else(|| {
                let message = format!("page {page} was given back before it was captured");
                Error::new(ErrorKind::Busy, message)
            })?;
            bytes.copy_from_slice(&*copy);
        }
        Ok(())
    }

    /// Ends the capture: what it took is stored, and counts as unchanged from the moment it was sealed.
    pub fn finish(mut self) {
        self.is_finished = true;
        for page in &self.marked {
            self.vm.pages.end_capture(u64::from(page));
        }
        *self.vm.capture_state() = None;
    }

    /// What was marked counts as changed again. Called with the gate held alone.
    fn take_back(&mut self) {
        let vm = &self.vm;
        for page in std::mem::take(&mut self.marked) {
            let page = u64::from(page);
            if let Err(error) = vm.note(page..page + 1, PageEvent::CaptureFailed) {
                vm.fail(error);
                break;
            }
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if self.is_finished {
            return;
        }
        let vm = Arc::clone(&self.vm);
        let _alone = vm.alone();
        self.take_back();
        *vm.capture_state() = None;
    }
}

/// A page's number in a bitmap: there are at most 2^32 of them.
fn number(page: u64) -> u32 {
    u32::try_from(page).unwrap_or(u32::MAX)
}
