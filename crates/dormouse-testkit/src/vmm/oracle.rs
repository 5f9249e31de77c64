//! What every word of memory must be, known without looking at it.
//!
//! A page has a *base* (the image, zeros, or the last whole page that was written) and over it a
//! word for each thread, its *lane*. Numbers that count writes stand for contents, so that 45 bytes
//! know a page.
//!
//! Readers take no lock, so that they fault beside whatever else happens to the page: they note the
//! page's epoch and lanes before and after, and check only what did not change meanwhile. Writers of
//! a lane share the page, changes of its base have it alone.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use anyhow::{Context, Result};

use super::config::THREADS_MAX;
use super::content::{Content, PAGE_BYTES, PAGE_WORDS, bytes_of, draw, written_word};

/// Words of a page among which each lane has one.
const LANE_WORDS: usize = PAGE_WORDS / THREADS_MAX;

const BASE_IMAGE: u32 = 0;
const BASE_ZERO: u32 = 1;
/// Numbers of whole pages that were written start here.
const FIRST_FILL: u32 = 2;

const ALONE: u32 = u32::MAX;

/// Somebody wrote to the page, since the last mark and since it was last given back.
pub(super) const WRITTEN: u8 = 1;
/// It was given back since the last mark.
pub(super) const GIVEN_BACK: u8 = 2;
/// Somebody touched it since the last mark.
pub(super) const TOUCHED: u8 = 4;

#[derive(Debug, Default)]
struct Page {
    /// How many share it, or [`ALONE`].
    holders: AtomicU32,
    /// Odd while its base changes.
    epoch: AtomicU32,
    base: AtomicU32,
    /// Numbers of the words last written, 0 for none; odd while one is being written.
    lanes: [AtomicU32; THREADS_MAX],
    history: AtomicU8,
}

/// A word that is not what it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    pub(super) word: usize,
    pub(super) got: u64,
    pub(super) expected: u64,
}

/// What came of reading a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// Every word that stood still was right.
    Right,
    /// The whole page changed meanwhile.
    Changed,
    /// This one was not.
    Wrong(Wrong),
}

/// The oracle.
#[derive(Debug)]
pub(crate) struct Oracle {
    seed: u64,
    pages: Vec<Page>,
    fills: AtomicU32,
}

impl Oracle {
    pub(super) fn new(seed: u64, pages: u64) -> Oracle {
        let pages = (0..pages).map(|_| Page::default()).collect();
        Oracle { seed, pages, fills: AtomicU32::new(FIRST_FILL) }
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages.len() as u64
    }

    fn page(&self, page: u64) -> &Page {
        &self.pages[usize::try_from(page).expect("a page of this machine's memory")]
    }

    fn content(&self, page: u64, base: u32) -> Content {
        match base {
            BASE_IMAGE => Content::of_image(self.seed, page),
            BASE_ZERO => Content::Zero,
            number => Content::of_fill(self.seed, number),
        }
    }

    /// The word of `page` that belongs to a lane.
    fn lane_word(page: u64, lane: usize) -> usize {
        let word = draw(&[page, lane as u64]) % LANE_WORDS as u64;
        lane * LANE_WORDS + usize::try_from(word).expect("less than a page")
    }

    /// Reads a page and says whether it is right; `read` gives its words, each once.
    pub(super) fn check(&self, page: u64, read: impl FnOnce(&mut [u64; PAGE_WORDS])) -> Check {
        let state = self.page(page);
        state.history.fetch_or(TOUCHED, Ordering::Relaxed);
        let epoch = state.epoch.load(Ordering::Acquire);
        let base = state.base.load(Ordering::Relaxed);
        let lanes: [u32; THREADS_MAX] =
            std::array::from_fn(|lane| state.lanes[lane].load(Ordering::Acquire));
        let mut words = [0; PAGE_WORDS];
        read(&mut words);
        fence(Ordering::Acquire);
        if epoch % 2 == 1 || state.epoch.load(Ordering::Relaxed) != epoch {
            return Check::Changed;
        }
        let content = self.content(page, base);
        let own: [usize; THREADS_MAX] = std::array::from_fn(|lane| Oracle::lane_word(page, lane));
        let stood_still: [bool; THREADS_MAX] = std::array::from_fn(|lane| {
            let number = lanes[lane];
            number.is_multiple_of(2) && state.lanes[lane].load(Ordering::Relaxed) == number
        });
        for (word, &got) in words.iter().enumerate() {
            let lane = word / LANE_WORDS;
            let expected = match (word == own[lane], stood_still[lane], lanes[lane]) {
                (true, false, _) => continue,
                (true, true, number @ 1..) => written_word(self.seed, page, lane, number),
                _ => content.word(word),
            };
            if got != expected {
                return Check::Wrong(Wrong { word, got, expected });
            }
        }
        Check::Right
    }

    /// Writes the `number`th word of a lane, if nobody changes the whole page; `store` is told which
    /// word and what. Numbers are even and each is used once by a lane.
    pub(super) fn write(
        &self,
        page: u64,
        lane: usize,
        number: u32,
        store: impl FnOnce(usize, u64),
    ) -> bool {
        let state = self.page(page);
        let shared = state.holders.fetch_update(Ordering::Acquire, Ordering::Relaxed, |holders| {
            (holders != ALONE).then(|| holders + 1)
        });
        if shared.is_err() {
            return false;
        }
        state.history.fetch_or(WRITTEN | TOUCHED, Ordering::Relaxed);
        let value = written_word(self.seed, page, lane, number);
        state.lanes[lane].store(number - 1, Ordering::Relaxed);
        fence(Ordering::Release);
        store(Oracle::lane_word(page, lane), value);
        state.lanes[lane].store(number, Ordering::Release);
        state.holders.fetch_sub(1, Ordering::Release);
        true
    }

    /// Takes a page for itself, if nobody has it.
    pub(super) fn try_alone(&self, page: u64) -> bool {
        let holders = &self.page(page).holders;
        holders.compare_exchange(0, ALONE, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Lets go of a page that [`try_alone`](Oracle::try_alone) took.
    pub(super) fn leave(&self, page: u64) {
        self.page(page).holders.store(0, Ordering::Release);
    }

    /// Gives pages that were taken a base of zeros, by what `change` does to memory.
    pub(super) fn give_back<T>(
        &self,
        pages: std::ops::Range<u64>,
        change: impl FnOnce() -> T,
    ) -> T {
        for page in pages.clone() {
            let state = self.page(page);
            state.begin_change();
            state.history.fetch_and(!WRITTEN, Ordering::Relaxed);
            state.history.fetch_or(GIVEN_BACK, Ordering::Relaxed);
        }
        let result = change();
        for page in pages {
            self.page(page).end_change(BASE_ZERO);
        }
        result
    }

    /// Writes a whole page that was taken: zeros, or what was nowhere before.
    pub(super) fn fill(&self, page: u64, zero: bool, words: &[AtomicU64]) {
        let base = match zero {
            true => BASE_ZERO,
            false => self.next_fill(),
        };
        let content = self.content(page, base);
        let state = self.page(page);
        state.begin_change();
        state.history.fetch_or(WRITTEN | TOUCHED, Ordering::Relaxed);
        for (index, word) in words.iter().enumerate() {
            word.store(content.word(index), Ordering::Relaxed);
        }
        state.end_change(base);
    }

    fn next_fill(&self) -> u32 {
        let next = |number: u32| number.wrapping_add(1).max(FIRST_FILL);
        let (set, get) = (Ordering::Relaxed, Ordering::Relaxed);
        match self.fills.fetch_update(set, get, |number| Some(next(number))) {
            Ok(number) | Err(number) => number,
        }
    }

    /// What a page must be, while nobody writes.
    pub(super) fn expected(&self, page: u64) -> [u8; PAGE_BYTES] {
        let state = self.page(page);
        let content = self.content(page, state.base.load(Ordering::Acquire));
        bytes_of(|word| {
            let lane = word / LANE_WORDS;
            match state.lanes[lane].load(Ordering::Acquire) {
                number @ 1.. if word == Oracle::lane_word(page, lane) => {
                    written_word(self.seed, page, lane, number)
                }
                _ => content.word(word),
            }
        })
    }

    /// What it knows, for a VMM that goes on elsewhere: call it while nobody writes.
    pub(crate) fn save(&self) -> Vec<u8> {
        let mut bytes = self.fills.load(Ordering::Relaxed).to_le_bytes().to_vec();
        for (number, page) in (0_u64..).zip(&self.pages) {
            let base = page.base.load(Ordering::Relaxed);
            let lanes = page.lanes.each_ref().map(|lane| lane.load(Ordering::Relaxed));
            if base == BASE_IMAGE && lanes == [0; THREADS_MAX] {
                continue;
            }
            bytes.extend(number.to_le_bytes());
            for word in [base].into_iter().chain(lanes) {
                bytes.extend(word.to_le_bytes());
            }
        }
        bytes
    }

    /// Knows what another one saved.
    pub(crate) fn restore(&self, bytes: &[u8]) -> Result<()> {
        const ENTRY_BYTES: usize = 8 + 4 * (1 + THREADS_MAX);
        let word = |bytes: &[u8], at: usize| -> Result<u32> {
            let word = bytes.get(at..at + 4).context("an oracle that is cut short")?;
            Ok(u32::from_le_bytes(word.try_into()?))
        };
        self.fills.store(word(bytes, 0)?, Ordering::Relaxed);
        for entry in bytes[4..].chunks(ENTRY_BYTES) {
            let number = u64::from(word(entry, 0)?) | u64::from(word(entry, 4)?) << 32;
            let page = usize::try_from(number).ok().and_then(|number| self.pages.get(number));
            let page = page.with_context(|| format!("page {number} of another VMM"))?;
            page.base.store(word(entry, 8)?, Ordering::Relaxed);
            for (lane, at) in page.lanes.iter().zip((12..).step_by(4)) {
                lane.store(word(entry, at)?, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// The highest number of a word that a lane wrote.
    pub(super) fn last_write(&self, lane: usize) -> u32 {
        let number = |page: &Page| page.lanes[lane].load(Ordering::Relaxed).next_multiple_of(2);
        self.pages.iter().map(number).max().unwrap_or(0)
    }

    /// Whether somebody wrote to a page since the last mark.
    pub(crate) fn is_written(&self, page: u64) -> bool {
        self.history(page) & WRITTEN != 0
    }

    /// What happened to a page since the last mark.
    pub(super) fn history(&self, page: u64) -> u8 {
        self.page(page).history.load(Ordering::Relaxed)
    }

    /// Forgets what happened.
    pub(crate) fn mark(&self) {
        for page in &self.pages {
            page.history.store(0, Ordering::Relaxed);
        }
    }

    /// Notes that a page was touched without being checked.
    pub(super) fn note_touched(&self, page: u64) {
        self.page(page).history.fetch_or(TOUCHED, Ordering::Relaxed);
    }
}

impl Page {
    fn begin_change(&self) {
        self.epoch.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
    }

    fn end_change(&self, base: u32) {
        self.base.store(base, Ordering::Relaxed);
        for lane in &self.lanes {
            lane.store(0, Ordering::Relaxed);
        }
        self.epoch.fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its first pages have content.
    const SEED: u64 = 11;

    /// Four pages as the image has them.
    fn memory() -> (Oracle, Vec<Vec<AtomicU64>>) {
        let oracle = Oracle::new(SEED, 4);
        let page = |page| {
            let content = Content::of_image(SEED, page);
            (0..PAGE_WORDS).map(|word| AtomicU64::new(content.word(word))).collect()
        };
        (oracle, (0..4).map(page).collect())
    }

    fn read(words: &[AtomicU64]) -> impl FnOnce(&mut [u64; PAGE_WORDS]) {
        move |into| {
            for (into, word) in into.iter_mut().zip(words) {
                *into = word.load(Ordering::Relaxed);
            }
        }
    }

    fn store(words: &[AtomicU64]) -> impl FnOnce(usize, u64) {
        |word, value| words[word].store(value, Ordering::Relaxed)
    }

    #[test]
    fn it_follows_what_is_written_filled_and_given_back() {
        let (oracle, memory) = memory();
        let check = |page: usize| oracle.check(page as u64, read(&memory[page]));
        assert_eq!(check(1), Check::Right);
        assert!(
            oracle.write(1, 3, 2, store(&memory[1])) && oracle.write(1, 7, 2, store(&memory[1]))
        );
        assert_eq!(check(1), Check::Right);
        assert!(oracle.try_alone(1) && !oracle.try_alone(1));
        assert!(!oracle.write(1, 3, 4, store(&memory[1])), "somebody has it alone");
        oracle.fill(1, false, &memory[1]);
        oracle.leave(1);
        assert_eq!(check(1), Check::Right);
        assert!(oracle.write(1, 3, 6, store(&memory[1])));
        assert_eq!(check(1), Check::Right);
        let bytes = oracle.expected(1);
        for (chunk, word) in bytes.as_chunks::<8>().0.iter().zip(&memory[1]) {
            assert_eq!(u64::from_ne_bytes(*chunk), word.load(Ordering::Relaxed));
        }
        assert!(oracle.try_alone(1));
        oracle
            .give_back(1..2, || memory[1].iter().for_each(|word| word.store(0, Ordering::Relaxed)));
        oracle.leave(1);
        assert_eq!(check(1), Check::Right);
        assert_eq!(oracle.history(1), GIVEN_BACK | TOUCHED);
        assert_eq!(oracle.history(2), 0);
    }

    #[test]
    fn every_wrong_word_is_seen() {
        let (oracle, memory) = memory();
        assert!(oracle.write(2, 0, 2, store(&memory[2])));
        for word in 0..PAGE_WORDS {
            let sound = memory[2][word].fetch_xor(1 << (word % 64), Ordering::Relaxed);
            let Check::Wrong(wrong) = oracle.check(2, read(&memory[2])) else {
                panic!("word {word} was not seen");
            };
            assert_eq!((wrong.word, wrong.expected), (word, sound));
            memory[2][word].store(sound, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_lost_write_and_a_lost_removal_are_seen() {
        let (oracle, memory) = memory();
        let before: Vec<u64> = memory[3].iter().map(|word| word.load(Ordering::Relaxed)).collect();
        assert!(oracle.write(3, 1, 2, store(&memory[3])));
        for (word, old) in memory[3].iter().zip(&before) {
            word.store(*old, Ordering::Relaxed);
        }
        assert!(matches!(oracle.check(3, read(&memory[3])), Check::Wrong(_)));
        assert_ne!(Content::of_image(SEED, 2), Content::Zero);
        assert!(oracle.try_alone(2));
        oracle.give_back(2..3, || ());
        assert!(matches!(oracle.check(2, read(&memory[2])), Check::Wrong(_)));
    }

    #[test]
    fn another_one_goes_on_with_what_it_knew() {
        let (oracle, memory) = memory();
        assert!(oracle.write(1, 3, 2, store(&memory[1])));
        assert!(oracle.try_alone(2));
        oracle.fill(2, false, &memory[2]);
        oracle.leave(2);
        let saved = oracle.save();
        let next = Oracle::new(SEED, 4);
        next.restore(&saved).unwrap();
        for (page, words) in (0..).zip(&memory) {
            assert_eq!(next.check(page, read(words)), Check::Right);
        }
        assert_eq!((next.last_write(3), next.last_write(4)), (2, 0));
        assert!(!next.is_written(1) && oracle.is_written(1));
        assert!(Oracle::new(SEED, 2).restore(&saved).is_err());
        assert!(Oracle::new(SEED, 4).restore(&saved[..saved.len() - 1]).is_err());
    }

    #[test]
    fn what_changes_meanwhile_is_not_judged() {
        let (oracle, memory) = memory();
        let during = oracle.check(1, |words| {
            assert!(oracle.try_alone(1));
            oracle.fill(1, false, &memory[1]);
            oracle.leave(1);
            words.fill(99);
        });
        assert_eq!(during, Check::Changed);
        let during = oracle.check(2, |words| {
            read(&memory[2])(words);
            assert!(oracle.write(2, 4, 2, store(&memory[2])));
        });
        assert_eq!(during, Check::Right, "the word that changed is left out");
    }
}
