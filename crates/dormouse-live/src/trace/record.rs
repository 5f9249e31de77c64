//! Notes what a waking guest touches, from several threads, in a few nanoseconds.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::{Wake, WakeKind};

/// Touches that are noted, first or not; later ones are left out. 4 MiB of memory.
pub const RECORDED_MAX: usize = CHUNKS * CHUNK;

/// Touches in a chunk: memory is taken as it is needed.
const CHUNK: usize = 4096;
const CHUNKS: usize = 128;

/// Blocks of a run that one note can hold.
const RUN_BLOCKS_MAX: u64 = (1 << 24) - 1;

/// Bits of a note for the length of its run.
const LENGTH_BITS: u32 = 24;

/// First touches as they come. Its threads need no lock, and stop noting when it is full.
#[derive(Debug, Default)]
pub struct Recorder {
    next: AtomicUsize,
    /// Chunks of notes: the first block of a run in the upper bits, its length in the lower 24; 0
    /// where none was written yet.
    chunks: Chunks,
}

type Chunks = Box<[OnceLock<Box<[AtomicU64]>>]>;

impl Recorder {
    /// An empty one.
    pub fn new() -> Recorder {
        let chunks = (0..CHUNKS).map(|_| OnceLock::new()).collect();
        Recorder { next: AtomicUsize::new(0), chunks }
    }

    /// Notes that a block was touched.
    pub fn record(&self, block: u64) {
        self.record_run(block..block.saturating_add(1));
    }

    /// Notes that a run of blocks was touched, or is as good as touched.
    pub fn record_run(&self, run: Range<u64>) {
        if run.is_empty() || run.start >= super::BLOCKS_END || self.is_full() {
            return;
        }
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        let Some(chunk) = self.chunks.get(at / CHUNK) else { return };
        let notes = chunk.get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
        let length = (run.end - run.start).min(RUN_BLOCKS_MAX);
        notes[at % CHUNK].store(run.start << LENGTH_BITS | length, Ordering::Release);
    }

    /// Whether nothing more is noted.
    pub fn is_full(&self) -> bool {
        self.next.load(Ordering::Relaxed) >= RECORDED_MAX
    }

    /// What was touched so far, in the order in which it was noted. Recording may go on meanwhile.
    pub fn finish(&self, kind: WakeKind) -> Wake {
        let notes = self.chunks.iter().filter_map(OnceLock::get).flat_map(|chunk| chunk.iter());
        let runs = notes.filter_map(|note| {
            let note = note.load(Ordering::Acquire);
            let (start, length) = (note >> LENGTH_BITS, note & RUN_BLOCKS_MAX);
            (length > 0).then_some(start..start + length)
        });
        Wake::new(kind, runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_comes_back_in_order() {
        let recorder = Recorder::new();
        recorder.record(9);
        recorder.record_run(100..116);
        recorder.record(8);
        recorder.record(9);
        recorder.record(1 << 32);
        recorder.record_run(5..5);
        recorder.record((1 << 32) - 1);
        let wake = recorder.finish(WakeKind::Misses);
        assert_eq!(wake.runs(), [9..10, 100..116, 8..9, (1 << 32) - 1..1 << 32]);
        assert_eq!(wake.kind(), WakeKind::Misses);
    }

    #[test]
    fn a_full_one_stops() {
        let recorder = Recorder::new();
        for block in 0..RECORDED_MAX as u64 + 100 {
            assert_eq!(recorder.is_full(), block >= RECORDED_MAX as u64);
            recorder.record(block * 2);
        }
        assert_eq!(recorder.finish(WakeKind::Whole).blocks(), RECORDED_MAX as u64);
    }

    #[test]
    fn threads_note_beside_each_other() {
        let recorder = Recorder::new();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let recorder = &recorder;
                scope.spawn(move || (0..20_000).for_each(|n| recorder.record(n * 4 + thread)));
            }
        });
        let wake = recorder.finish(WakeKind::Whole);
        assert_eq!(wake.blocks(), 80_000);
    }
}
