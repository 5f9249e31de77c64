//! The page tracker: what each page of a waking guest's memory is, in memory that outlives the
//! process that serves it.
//!
//! ```text
//! 0      magic, version, number of pages
//! 4096   inbox: messages as the kernel gives them, 32 bytes each
//! 8192   a byte for each page: bits 0 to 2 its state, bit 5 in a capture that has not ended,
//!        bit 6 not read by that capture yet, bit 7 given back once
//! ```
//!
//! It lies in a sealed memfd that a holder keeps, too. Messages are read into the inbox, and those
//! that gave pages back are noted before they are crossed out there. So whatever the moment at which
//! the serving process is killed, its successor finds them; what else it was doing the page tables
//! tell ([`Pages::reconcile`]).

mod state;

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};

use dormouse_sys::mapping::SharedMemory;
use roaring::RoaringBitmap;

use crate::error::{Context, Error, ErrorKind, Result};

pub use self::state::{Answer, BrokenRule, PageEvent, PageState, Tracking, Wait};

/// Bytes of a page, whatever the size of those that the guest is backed with.
pub const PAGE_BYTES: u64 = 4096;

const MAGIC: u64 = u64::from_le_bytes(*b"dormpage");
const VERSION: u64 = 1;
const INBOX: Range<usize> = 4096..8192;
const STATES: usize = INBOX.end;

const STATE_BITS: u8 = 0b111;
const IN_CAPTURE: u8 = 1 << 5;
const TO_CAPTURE: u8 = 1 << 6;
const WAS_REMOVED: u8 = 1 << 7;

/// Guests up to 16 TiB; page numbers have 32 bits.
const PAGES_MAX: u64 = 1 << 32;

/// The states of a guest's pages. A page's number is its place in the memory image.
///
/// Changing states is lock-free; which changes may happen at once is the caller's to keep (see
/// [`PageState`]).
#[derive(Debug)]
pub struct Pages {
    memory: SharedMemory,
    count: u64,
}

/// How many pages are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Not asked for yet.
    pub missing: u64,
    /// There and unchanged.
    pub clean: u64,
    /// There and perhaps changed.
    pub dirty: u64,
    /// There and zero.
    pub zero: u64,
    /// Given back.
    pub removed: u64,
}

/// What differs from the image, in pages: whatever is in neither set is as it was.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PageChanges {
    /// What the guest may have written.
    pub dirty: RoaringBitmap,
    /// What is zero now.
    pub zero: RoaringBitmap,
}

/// A page's state and marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Its state.
    pub state: PageState,
    /// Whether it was ever given back.
    pub was_removed: bool,
    /// Whether a capture has yet to take its content.
    pub is_to_capture: bool,
}

impl Pages {
    /// All missing.
    pub fn new(count: u64) -> Result<Pages> {
        if count == 0 || count > PAGES_MAX {
            let message = format!("{count} pages: not between 1 and {PAGES_MAX}");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let len = STATES + usize::try_from(count.next_multiple_of(8)).unwrap_or(usize::MAX);
        let memory = SharedMemory::create("dormouse-pages", len)
            .context(|| "keep page states".to_owned())?;
        for (at, word) in [MAGIC, VERSION, count].into_iter().enumerate() {
            memory.words()[at].store(word, Ordering::Relaxed);
        }
        Ok(Pages { memory, count })
    }

    /// Those of a process that ended, from the descriptor that was kept.
    pub fn adopt(fd: OwnedFd) -> Result<Pages> {
        let memory = SharedMemory::from_fd(fd).context(|| "take over page states".to_owned())?;
        if memory.words().len() < STATES / 8 {
            return Err(Error::corrupt("page states", memory.bytes().len(), "more bytes"));
        }
        let [magic, version, count] =
            [0, 1, 2].map(|at: usize| memory.words()[at].load(Ordering::Relaxed));
        if magic != MAGIC {
            return Err(Error::corrupt("page states", format!("magic {magic:#x}"), "page states"));
        }
        if version != VERSION {
            let message = format!("page states of version {version}; this is version {VERSION}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if count == 0 || count > (memory.bytes().len() - STATES) as u64 {
            return Err(Error::corrupt("page states", format!("{count} pages"), "as many as fit"));
        }
        Ok(Pages { memory, count })
    }

    /// The descriptor of the memory they lie in, for whoever keeps it.
    pub fn fd(&self) -> &OwnedFd {
        self.memory.fd()
    }

    /// How many pages there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Where messages of the kernel are read to.
    pub fn inbox(&self) -> &[AtomicU8] {
        &self.memory.bytes()[INBOX]
    }

    /// A page.
    ///
    /// # Panics
    ///
    /// If there is no such page; so do all others that take pages.
    pub fn get(&self, page: u64) -> Page {
        let byte = self.bytes(page..page + 1)[0].load(Ordering::Acquire);
        Page {
            state: PageState::from_bits(byte & STATE_BITS),
            was_removed: byte & WAS_REMOVED != 0,
            is_to_capture: byte & TO_CAPTURE != 0,
        }
    }

    /// Notes an event for all pages of a range.
    ///
    /// A rule that is broken leaves the pages behind it as they were; the guest's memory may be wrong
    /// then, and it must not go on.
    pub fn note(&self, pages: Range<u64>, event: PageEvent) -> Result<()> {
        let first = pages.start;
        for (at, byte) in self.bytes(pages).iter().enumerate() {
            let changed = byte.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| {
                let next = PageState::from_bits(old & STATE_BITS).after(event).ok()?;
                let marks = match event {
                    PageEvent::Removed => WAS_REMOVED,
                    PageEvent::CaptureFailed => old & WAS_REMOVED,
                    // At once with the state: a page that is clean and not in the capture would be
                    // forgotten, if this process were killed between the two.
                    PageEvent::Captured => old & WAS_REMOVED | TO_CAPTURE | IN_CAPTURE,
                    _ => old & (WAS_REMOVED | TO_CAPTURE | IN_CAPTURE),
                };
                Some(next as u8 | marks)
            });
            if let Err(old) = changed {
                let broken = BrokenRule { state: PageState::from_bits(old & STATE_BITS), event };
                let page = first + at as u64;
                return Err(Error::new(ErrorKind::Corrupt, format!("page {page}: {broken}")));
            }
        }
        Ok(())
    }

    /// The state of the page at `from`, and where the run of pages like it ends, at most at `end`.
    pub fn run(&self, from: u64, end: u64) -> (PageState, u64) {
        let bytes = self.bytes(from..end);
        let state = bytes[0].load(Ordering::Acquire) & STATE_BITS;
        let len = bytes
            .iter()
            .position(|byte| byte.load(Ordering::Acquire) & STATE_BITS != state)
            .unwrap_or(bytes.len());
        (PageState::from_bits(state), from + len as u64)
    }

    /// Tells the runs of equal state in a range, ascending.
    pub fn for_each_run(&self, pages: Range<u64>, visit: &mut dyn FnMut(Range<u64>, PageState)) {
        let mut at = pages.start;
        while at < pages.end {
            let (state, end) = self.run(at, pages.end);
            visit(at..end, state);
            at = end;
        }
    }

    /// How many pages are in which state.
    pub fn counts(&self) -> PageCounts {
        let mut counts = PageCounts::default();
        self.for_each_run(0..self.count, &mut |run, state| {
            let count = match state {
                PageState::Missing => &mut counts.missing,
                PageState::Clean => &mut counts.clean,
                PageState::Dirty => &mut counts.dirty,
                PageState::Zero => &mut counts.zero,
                PageState::Removed => &mut counts.removed,
            };
            *count += run.end - run.start;
        });
        counts
    }

    /// What differs from the image now.
    pub fn changes(&self) -> PageChanges {
        let mut changes = PageChanges::default();
        self.for_each_run(0..self.count, &mut |run, state| {
            let set = match state {
                PageState::Dirty => &mut changes.dirty,
                PageState::Zero | PageState::Removed => &mut changes.zero,
                PageState::Missing | PageState::Clean => return,
            };
            set.insert_range(number(run.start)..=number(run.end - 1));
        });
        changes
    }

    /// Notes that pages are [captured](PageEvent::Captured), with a mark that their content has yet to
    /// be taken.
    pub fn mark_to_capture(&self, pages: Range<u64>) -> Result<()> {
        self.note(pages, PageEvent::Captured)
    }

    /// Notes that the capture a page belongs to has ended well: what it took is stored.
    pub fn end_capture(&self, page: u64) {
        self.bytes(page..page + 1)[0].fetch_and(!(TO_CAPTURE | IN_CAPTURE), Ordering::AcqRel);
    }

    /// Takes the mark off a page; tells whether it had it.
    pub fn unmark_to_capture(&self, page: u64) -> bool {
        let byte = &self.bytes(page..page + 1)[0];
        byte.fetch_and(!TO_CAPTURE, Ordering::AcqRel) & TO_CAPTURE != 0
    }

    /// Whether a capture has yet to take any of the pages.
    pub fn any_to_capture(&self, pages: Range<u64>) -> bool {
        self.bytes(pages).iter().any(|byte| byte.load(Ordering::Acquire) & TO_CAPTURE != 0)
    }

    /// Sets a page to what the page tables say it is, after the process that noted it was killed.
    ///
    /// That process may have installed or unprotected a page and not have come to note it. What the
    /// tables cannot tell is that a page was given back, which is why that is noted first of all.
    /// An error means that the page's content is lost: it was the guest's own and is not there.
    pub fn reconcile(&self, page: u64, found: Found, tracking: Tracking) -> Result<()> {
        let byte = &self.bytes(page..page + 1)[0];
        let old = byte.load(Ordering::Acquire);
        // What a capture took and did not store is nowhere but here.
        let state = match PageState::from_bits(old & STATE_BITS) {
            PageState::Clean if old & IN_CAPTURE != 0 => PageState::Dirty,
            state => state,
        };
        let next = match (found, state) {
            (Found::Writable, _) => PageState::Dirty,
            (Found::Protected, _) if tracking == Tracking::Off => PageState::Dirty,
            // A page that is protected was not written to since it was; but if it is dirty it may
            // have been before that.
            (Found::Protected, PageState::Missing) => PageState::Clean,
            (Found::Protected, PageState::Removed) => PageState::Zero,
            (Found::Protected, state) => state,
            (Found::Nothing, PageState::Missing | PageState::Removed) => state,
            (Found::Nothing, _) if old & WAS_REMOVED != 0 => PageState::Removed,
            (Found::Nothing, state) => {
                let message = format!("page {page} is {state:?} and not in the guest's memory");
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
        };
        byte.store(next as u8 | old & WAS_REMOVED, Ordering::Release);
        Ok(())
    }

    fn bytes(&self, pages: Range<u64>) -> &[AtomicU8] {
        let all = &self.memory.bytes()[STATES..];
        assert!(pages.end <= self.count, "page {} of {}", pages.end, self.count);
        let at = |page: u64| usize::try_from(page).unwrap_or(usize::MAX);
        &all[at(pages.start)..at(pages.end)]
    }
}

/// What the page tables have for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// No page.
    Nothing,
    /// A page whose next write is told.
    Protected,
    /// A page that the guest writes to untold.
    Writable,
}

/// A page's number in a bitmap.
fn number(page: u64) -> u32 {
    u32::try_from(page).expect("at most PAGES_MAX pages")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_lives_as_drawn() {
        let pages = Pages::new(10).unwrap();
        pages.note(2..5, PageEvent::ImageInstalled).unwrap();
        pages.note(3..4, PageEvent::MadeWritable).unwrap();
        pages.note(4..7, PageEvent::Removed).unwrap();
        pages.note(5..6, PageEvent::ZerosInstalled).unwrap();
        let states: Vec<_> = (0..8).map(|page| pages.get(page).state).collect();
        use PageState::{Clean, Dirty, Missing, Removed, Zero};
        assert_eq!(states, [Missing, Missing, Clean, Dirty, Removed, Zero, Removed, Missing]);
        let changes = pages.changes();
        assert_eq!(changes.dirty.iter().collect::<Vec<_>>(), [3]);
        assert_eq!(changes.zero.iter().collect::<Vec<_>>(), [4, 5, 6]);
        let counts = PageCounts { missing: 5, clean: 1, dirty: 1, zero: 1, removed: 2 };
        assert_eq!(pages.counts(), counts);
    }

    #[test]
    fn stale_content_is_never_noted_for_a_page_that_was_given_back() {
        let pages = Pages::new(1).unwrap();
        pages.note(0..1, PageEvent::Removed).unwrap();
        let error = pages.note(0..1, PageEvent::ImageInstalled).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(pages.get(0).state, PageState::Removed);
    }

    #[test]
    fn a_successor_sees_the_same_pages() {
        let pages = Pages::new(1000).unwrap();
        pages.note(7..9, PageEvent::MadeWritable).unwrap();
        let adopted = Pages::adopt(pages.fd().try_clone().unwrap()).unwrap();
        assert_eq!(adopted.count(), 1000);
        assert_eq!(adopted.get(8).state, PageState::Dirty);
        adopted.note(8..9, PageEvent::Removed).unwrap();
        assert_eq!(pages.get(8).state, PageState::Removed);
    }

    #[test]
    fn what_is_no_page_states_is_refused() {
        for (words, len) in [
            (vec![0; 3], 16384),
            (vec![MAGIC, 2, 1], 16384),
            (vec![MAGIC, VERSION, 9000], 16384),
            (vec![], 8),
        ] {
            let memory = SharedMemory::create("test", len).unwrap();
            for (at, word) in words.iter().enumerate() {
                memory.words()[at].store(*word, Ordering::Relaxed);
            }
            assert!(Pages::adopt(memory.fd().try_clone().unwrap()).is_err(), "{words:?}");
        }
    }

    #[test]
    fn a_successor_believes_the_page_tables() {
        use PageState::{Clean, Dirty, Missing, Removed, Zero};
        let pages = Pages::new(6).unwrap();
        pages.note(1..2, PageEvent::ImageInstalled).unwrap();
        pages.note(2..4, PageEvent::Removed).unwrap();
        pages.note(4..5, PageEvent::MadeWritable).unwrap();
        for (page, found, after) in [
            (0, Found::Protected, Clean),
            (1, Found::Writable, Dirty),
            (2, Found::Protected, Zero),
            (3, Found::Nothing, Removed),
            (5, Found::Nothing, Missing),
        ] {
            pages.reconcile(page, found, Tracking::Exact).unwrap();
            assert_eq!(pages.get(page).state, after, "page {page}");
        }
        assert!(pages.reconcile(4, Found::Nothing, Tracking::Exact).is_err(), "lost");
        // Being captured when the server was killed.
        pages.note(1..2, PageEvent::MadeWritable).unwrap();
        pages.mark_to_capture(1..2).unwrap();
        assert_eq!(pages.get(1).state, Clean);
        pages.reconcile(1, Found::Protected, Tracking::Exact).unwrap();
        assert_eq!(pages.get(1).state, Dirty);
        pages.mark_to_capture(1..2).unwrap();
        pages.end_capture(1);
        pages.reconcile(1, Found::Protected, Tracking::Exact).unwrap();
        assert_eq!(pages.get(1).state, Clean);
        // Written, given back, and installed again while the kernel was taking it away.
        pages.note(3..4, PageEvent::MadeWritable).unwrap();
        pages.reconcile(3, Found::Nothing, Tracking::Exact).unwrap();
        assert_eq!(pages.get(3).state, Removed);
    }
}
