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

use dormouse_live::pages::{PAGE_BYTES, PageChanges, PageEvent, PageState, Tracking};
use dormouse_sys::process_memory;
use dormouse_sys::userfaultfd::{Protection, Stop};
use roaring::RoaringBitmap;

use super::vm::{Answered, Fault, Scratch, Served, Vm, addresses_of};
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a page.
const PAGE: usize = 4096;

/// Copies that are kept of pages which the guest wrote to before they were read. More are kept for
/// no capture: it fails, and the guest runs on.
const COPIES_MAX: usize = (256 << 20) / PAGE;

/// Pages that are read at once.
const READ_PAGES: u64 = 64;

/// How often sealing waits for the guest to have given back what it is giving back.
const BUSY_MAX: u32 = 10_000;

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
    /// `Busy` while another capture is under way.
    pub fn seal(self: &Arc<Self>) -> Result<Capture> {
        {
            let mut capture = self.capture_state();
            if capture.is_some() {
                return Err(Error::new(ErrorKind::Busy, "the guest is being captured already"));
            }
            *capture = Some(CaptureState::default());
        }
        let sealed = self.seal_pages();
        if sealed.is_err() {
            *self.capture_state() = None;
        }
        sealed
    }

    fn seal_pages(self: &Arc<Self>) -> Result<Capture> {
        let mut capture = Capture {
            vm: Arc::clone(self),
            changes: PageChanges::default(),
            marked: RoaringBitmap::new(),
            is_finished: false,
        };
        for _ in 0..BUSY_MAX {
            // What the guest gave back before it was paused comes first.
            let mut faults: Vec<Fault> = Vec::new();
            self.read_messages(&mut faults)?;
            self.answer_now(faults)?;
            let _alone = self.alone();
            if self.protect_dirty(&mut capture.marked)? {
                let mut changes = self.pages.changes();
                changes.dirty |= &capture.marked;
                capture.changes = changes;
                return Ok(capture);
            }
        }
        Err(Error::new(ErrorKind::Busy, "the guest is giving back memory and does not finish"))
    }

    /// Answers faults that were read by the way.
    fn answer_now(&self, mut faults: Vec<Fault>) -> Result<()> {
        let mut scratch = Scratch::default();
        while let Some(fault) = faults.pop() {
            if self.answer(fault, &mut scratch)? == Answered::Busy {
                faults.push(fault);
                self.read_messages(&mut faults)?;
                std::thread::yield_now();
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
                    self.pages.mark_to_capture(at..stop).map_err(|error| {
                        Error::with_source(ErrorKind::Lost, "page states are wrong", error)
                    })?;
                    marked.insert_range(number(at)..=number(stop - 1));
                }
                at = stop;
            }
        }
        Ok(true)
    }

    /// Copies pages that a capture has yet to take, as the guest is about to write to them. Called
    /// before the gate is taken, since it may wait for a fault of its own.
    pub(super) fn copy_for_capture(&self, served: &Served, pages: &Range<u64>) -> Option<Copied> {
        if !self.pages.any_to_capture(pages.clone()) {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(pages.end - pages.start).unwrap_or(1) * PAGE];
        let range = pages.start * PAGE_BYTES..pages.end * PAGE_BYTES;
        let addresses = addresses_of(&served.region, &range);
        let read =
            process_memory::read(self.peer.pid(), std::slice::from_ref(&addresses), &mut bytes);
        Some(Copied { bytes, result: read })
    }

    /// Gives a capture the copies of pages that it has not taken yet; false if it began since they were
    /// looked at, so that there are none.
    pub(super) fn keep_for_capture(&self, pages: Range<u64>, copied: Option<Copied>) -> bool {
        if !self.pages.any_to_capture(pages.clone()) {
            return true;
        }
        let Some(Copied { bytes, result }) = copied else { return false };
        let mut state = self.capture_state();
        let mut failure = result
            .map_err(|error| Error::io("cannot copy a page before it is written to", error))
            .err();
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
        true
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

/// Pages as they were before a write.
#[derive(Debug)]
pub(super) struct Copied {
    bytes: Vec<u8>,
    result: std::io::Result<()>,
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
        process_memory::read(vm.peer.pid(), &ranges, part).map_err(|error| {
            if error.kind() == std::io::ErrorKind::PermissionDenied {
                let message = "not allowed to read the VMM's memory: run as the VMM's user, or with \
                    CAP_SYS_PTRACE, and let the VMM be traced (kernel.yama.ptrace_scope)";
                return Error::with_source(ErrorKind::NotAllowed, message, error);
            }
            Error::io("cannot read the VMM's memory", error)
        })?;
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
}

impl Drop for Capture {
    fn drop(&mut self) {
        if self.is_finished {
            return;
        }
        let vm = &self.vm;
        let _alone = vm.alone();
        for page in &self.marked {
            vm.pages.unmark_to_capture(u64::from(page));
            let page = u64::from(page);
            if let Err(error) = vm.note(page..page + 1, PageEvent::CaptureFailed) {
                vm.fail(error);
                break;
            }
        }
        *vm.capture_state() = None;
    }
}

/// A page's number in a bitmap: there are at most 2^32 of them.
fn number(page: u64) -> u32 {
    u32::try_from(page).unwrap_or(u32::MAX)
}
