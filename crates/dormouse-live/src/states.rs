//! What a layer has for each block: nothing, its bytes, or zeros; kept in lock-free bits.
//!
//! Two bits say the state: `present`, and `is_zero`, which means nothing without the first. In
//! one layer a block never becomes untouched again, so `present` only ever rises, and whoever
//! sees it risen sees an `is_zero` at least as new. A reader therefore never takes a block that is
//! changing between dirty and zero for an untouched one. A third bit says that the state is newer
//! than what a flush last took.
//!
//! Blocks of a *stripe*, 64 of them, share a word of each kind. Whoever changes states holds the
//! lock of the stripe; reading takes no lock. Words lie in chunks of 128 MiB of disk, which are
//! made when the first of their blocks is touched: 12 KiB each, and 16 bytes where there is none.

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use crate::sync::{AtomicBool, AtomicU64};

/// Blocks whose states share a word, and a lock.
pub(crate) const STRIPE_BLOCKS: u64 = 64;

/// Stripes in a chunk.
const CHUNK_STRIPES: usize = 512;

/// Blocks in a chunk: 128 MiB of disk.
const CHUNK_BLOCKS: u64 = STRIPE_BLOCKS * CHUNK_STRIPES as u64;

/// What a layer has for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockState {
    /// Nothing: what lies below shows through.
    Untouched,

    /// Its bytes.
    Dirty,

    /// Zeros, which take no space.
    Zero,
}

/// The states of all blocks of a layer.
pub struct States {
    chunks: Box<[OnceLock<Box<Chunk>>]>,
    blocks: u64,
}

struct Chunk {
    present: [AtomicU64; CHUNK_STRIPES],
    is_zero: [AtomicU64; CHUNK_STRIPES],
    changed: [AtomicU64; CHUNK_STRIPES],
    /// Whether any word of `changed` may be set.
    any_changed: AtomicBool,
}

/// How many blocks of a layer are in a state other than untouched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateCounts {
    /// Blocks that have bytes.
    pub dirty: u64,

    /// Blocks that are zero.
    pub zero: u64,
}

impl States {
    /// All untouched.
    pub fn new(blocks: u64) -> States {
        let chunks = (0..blocks.div_ceil(CHUNK_BLOCKS)).map(|_| OnceLock::new()).collect();
        States { chunks, blocks }
    }

    /// The state of the block at `from`, and where the run of blocks like it ends, at most at
    /// `end`. While others change states, each block's was true at some moment of the call.
    pub fn run(&self, from: u64, end: u64) -> (BlockState, u64) {
        let end = end.min(self.blocks);
        let (words, bit) = self.words_at(from);
        let state = words.state(bit);
        let mut at = from;
        while at < end {
            let (chunk, stripe, bit) = place(at);
            let Some(chunk) = self.chunks.get(chunk).and_then(OnceLock::get) else {
                if state != BlockState::Untouched {
                    return (state, at);
                }
                at = (at / CHUNK_BLOCKS + 1) * CHUNK_BLOCKS;
                continue;
            };
            let differ = chunk.words(stripe).differing(state) & (u64::MAX << bit);
            if differ != 0 {
                let stop = at - u64::from(bit) + u64::from(differ.trailing_zeros());
                // The first block may have changed since it was looked at; it is one run then.
                return (state, stop.max(from + 1).min(end));
            }
            at = at - u64::from(bit) + STRIPE_BLOCKS;
        }
        (state, end)
    }

    /// The state of one block.
    pub fn get(&self, block: u64) -> BlockState {
        let (words, bit) = self.words_at(block);
        words.state(bit)
    }

    /// Sets blocks to dirty or zero and marks those that were not as changed; untouched is where
    /// blocks come from, and changes nothing. Who sets blocks of one stripe takes turns.
    pub fn set(&self, blocks: Range<u64>, state: BlockState) {
        self.store(blocks, state, true);
    }

    /// Sets blocks as a state log says, so that no flush writes them again.
    pub(crate) fn restore(&self, blocks: Range<u64>, state: BlockState) {
        self.store(blocks, state, false);
    }

    /// Whether any of the blocks is dirty, and if so the range from the first to the last.
    pub(crate) fn dirty_hull(&self, blocks: Range<u64>) -> Option<Range<u64>> {
        let mut hull: Option<Range<u64>> = None;
        let mut at = blocks.start;
        while at < blocks.end {
            let (state, end) = self.run(at, blocks.end);
            if state == BlockState::Dirty {
                hull = Some(hull.map_or(at, |hull| hull.start)..end);
            }
            at = end;
        }
        hull
    }

    /// Takes the changed blocks with their states, in order. What a flush cannot write it gives
    /// back with [`States::mark_changed`].
    ///
    /// A block taken as dirty has its bytes in the file already, as these are written before the
    /// state is set; the sync that follows covers them.
    pub(crate) fn take_changed(&self, visit: &mut dyn FnMut(Range<u64>, BlockState)) {
        for (index, chunk) in self.chunks.iter().enumerate() {
            let Some(chunk) = chunk.get() else { continue };
            if !chunk.any_changed.load(Ordering::Relaxed) {
                continue;
            }
            chunk.any_changed.swap(false, Ordering::AcqRel);
            for stripe in 0..CHUNK_STRIPES {
                if chunk.changed[stripe].load(Ordering::Relaxed) == 0 {
                    continue;
                }
                let mut changed = chunk.changed[stripe].swap(0, Ordering::AcqRel);
                let words = chunk.words(stripe);
                let first = index as u64 * CHUNK_BLOCKS + stripe as u64 * STRIPE_BLOCKS;
                while changed != 0 {
                    let bit = changed.trailing_zeros();
                    let state = words.state(bit);
                    let alike = changed & !words.differing(state) & (u64::MAX << bit);
                    let len = (!(alike >> bit)).trailing_zeros().max(1).min(64 - bit);
                    changed &= !mask(bit, len);
                    let start = first + u64::from(bit);
                    visit(start..start + u64::from(len), state);
                }
            }
        }
    }

    /// Marks blocks as changed again.
    pub(crate) fn mark_changed(&self, blocks: Range<u64>) {
        for_each_word(blocks, |chunk, stripe, mask| {
            let chunk = self.chunk(chunk);
            chunk.changed[stripe].fetch_or(mask, Ordering::Release);
            chunk.any_changed.store(true, Ordering::Release);
        });
    }

    /// How many blocks are dirty and how many zero.
    pub fn counts(&self) -> StateCounts {
        let mut counts = StateCounts::default();
        for chunk in self.chunks.iter().filter_map(OnceLock::get) {
            for stripe in 0..CHUNK_STRIPES {
                let words = chunk.words(stripe);
                counts.dirty += u64::from((words.present & !words.is_zero).count_ones());
                counts.zero += u64::from((words.present & words.is_zero).count_ones());
            }
        }
        counts
    }

    /// Bytes of memory the states take.
    pub fn memory_bytes(&self) -> usize {
        let made = self.chunks.iter().filter(|chunk| chunk.get().is_some()).count();
        size_of_val(&*self.chunks) + made * size_of::<Chunk>()
    }

    fn store(&self, blocks: Range<u64>, state: BlockState, track: bool) {
        for_each_word(blocks, |chunk, stripe, mask| {
            let chunk = self.chunk(chunk);
            let words = chunk.words(stripe);
            let different = words.differing(state) & mask;
            if different == 0 {
                return;
            }
            match state {
                BlockState::Untouched => return,
                BlockState::Dirty => chunk.is_zero[stripe].fetch_and(!mask, Ordering::Release),
                BlockState::Zero => chunk.is_zero[stripe].fetch_or(mask, Ordering::Release),
            };
            chunk.present[stripe].fetch_or(mask, Ordering::Release);
            if track {
                chunk.changed[stripe].fetch_or(different, Ordering::Release);
                chunk.any_changed.store(true, Ordering::Release);
            }
        });
    }

    fn chunk(&self, index: usize) -> &Chunk {
        self.chunks[index].get_or_init(Chunk::new)
    }

    fn words_at(&self, block: u64) -> (Words, u32) {
        let (chunk, stripe, bit) = place(block);
        let words = match self.chunks.get(chunk).and_then(OnceLock::get) {
            Some(chunk) => chunk.words(stripe),
            None => Words { present: 0, is_zero: 0 },
        };
        (words, bit)
    }
}

impl fmt::Debug for States {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("States").field("blocks", &self.blocks).finish_non_exhaustive()
    }
}

impl Chunk {
    fn new() -> Box<Chunk> {
        let zeros = || [const { AtomicU64::new(0) }; CHUNK_STRIPES];
        Box::new(Chunk {
            present: zeros(),
            is_zero: zeros(),
            changed: zeros(),
            any_changed: AtomicBool::new(false),
        })
    }

    /// The words of a stripe; `present` is loaded first, see the head of this file.
    fn words(&self, stripe: usize) -> Words {
        let present = self.present[stripe].load(Ordering::Acquire);
        Words { present, is_zero: self.is_zero[stripe].load(Ordering::Acquire) }
    }
}

#[derive(Clone, Copy)]
struct Words {
    present: u64,
    is_zero: u64,
}

impl Words {
    fn state(self, bit: u32) -> BlockState {
        match (self.present >> bit & 1, self.is_zero >> bit & 1) {
            (0, _) => BlockState::Untouched,
            (_, 0) => BlockState::Dirty,
            _ => BlockState::Zero,
        }
    }

    /// The blocks in another state than `state`.
    fn differing(self, state: BlockState) -> u64 {
        match state {
            BlockState::Untouched => self.present,
            BlockState::Dirty => !(self.present & !self.is_zero),
            BlockState::Zero => !(self.present & self.is_zero),
        }
    }
}

/// The chunk, the stripe in it and the bit of a block.
fn place(block: u64) -> (usize, usize, u32) {
    let chunk = usize::try_from(block / CHUNK_BLOCKS).unwrap_or(usize::MAX);
    let stripe = usize::try_from(block % CHUNK_BLOCKS / STRIPE_BLOCKS).unwrap_or(0);
    (chunk, stripe, u32::try_from(block % STRIPE_BLOCKS).unwrap_or(0))
}

/// `len` bits from `bit` on, at most to the end of the word.
fn mask(bit: u32, len: u32) -> u64 {
    (u64::MAX >> (64 - len.clamp(1, 64))) << bit
}

fn for_each_word(blocks: Range<u64>, mut visit: impl FnMut(usize, usize, u64)) {
    let mut at = blocks.start;
    while at < blocks.end {
        let (chunk, stripe, bit) = place(at);
        let end = (at - u64::from(bit) + STRIPE_BLOCKS).min(blocks.end);
        visit(chunk, stripe, mask(bit, u32::try_from(end - at).unwrap_or(64)));
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::alone;

    /// Runs over words, chunks and the end, against one state per block.
    #[test]
    fn runs_are_those_of_a_plain_vector() {
        alone(|| {
            let blocks = 3 * CHUNK_BLOCKS + 77;
            let states = States::new(blocks);
            let mut model = vec![BlockState::Untouched; usize::try_from(blocks).unwrap()];
            let mut seed = 7_u64;
            let mut next = |bound: u64| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
                (seed >> 33) % bound
            };
            for step in 0..400 {
                // The third chunk stays empty most of the time.
                let area = if step < 390 { 2 * CHUNK_BLOCKS } else { blocks };
                let start = next(area);
                let end = (start + 1 + next([2, 70, 40_000][step % 3])).min(area);
                let state = if next(2) == 0 { BlockState::Dirty } else { BlockState::Zero };
                states.set(start..end, state);
                for block in start..end {
                    model[usize::try_from(block).unwrap()] = state;
                }
                if step % 40 != 0 && step < 395 {
                    continue;
                }
                let mut at = 0;
                while at < blocks {
                    let (state, end) = states.run(at, u64::MAX);
                    let range = usize::try_from(at).unwrap()..usize::try_from(end).unwrap();
                    assert!(model[range.clone()].iter().all(|it| *it == state), "{range:?}");
                    assert!(range.end == model.len() || model[range.end] != state, "{range:?}");
                    assert_eq!(states.get(at), state);
                    at = end;
                }
            }
            let dirty = model.iter().filter(|state| **state == BlockState::Dirty).count() as u64;
            let zero = model.iter().filter(|state| **state == BlockState::Zero).count() as u64;
            assert_eq!(states.counts(), StateCounts { dirty, zero });

            let mut taken = 0;
            states.take_changed(&mut |range, state| {
                for block in range {
                    assert_eq!(model[usize::try_from(block).unwrap()], state);
                    taken += 1;
                }
            });
            assert_eq!(taken, dirty + zero);
            states.take_changed(&mut |range, _| panic!("{range:?} was taken"));
            states.set(0..5, model[0]);
            states.mark_changed(60..70);
            let mut again = Vec::new();
            states.take_changed(&mut |range, _| again.extend(range));
            again.retain(|block| *block >= 5);
            assert_eq!(again, (60..70).collect::<Vec<_>>());
        });
    }

    #[test]
    fn the_largest_disk_costs_little_before_it_is_used() {
        alone(|| {
            let states = States::new(1 << 32);
            assert!(states.memory_bytes() <= 4 << 20, "{}", states.memory_bytes());
            assert_eq!(states.run(5, u64::MAX), (BlockState::Untouched, 1 << 32));
            states.set((1 << 32) - 1..1 << 32, BlockState::Zero);
            assert_eq!(states.run(5, u64::MAX), (BlockState::Untouched, (1 << 32) - 1));
        });
    }
}
