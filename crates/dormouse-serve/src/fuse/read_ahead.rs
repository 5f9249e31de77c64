//! Read-ahead: whoever reads on where the last read ended is soon going to want what follows.
//!
//! The kernel reads ahead by 128 KiB at most unless an administrator allows more, which keeps a
//! few frames being decoded. So windows of a mebibyte are decoded ahead of sequential readers by
//! threads of our own, into the cache that the device has; what they do not get done in time the
//! request decodes itself.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::device::BlockDevice;

/// How far ahead of a reader is decoded.
const AHEAD_BYTES: u64 = 4 << 20;

/// What one thread decodes at a time: a few frames, so that several threads share a window.
const PIECE_BYTES: u64 = 256 << 10;

/// A read within this distance of where the last one ended still goes on: the kernel's reads of one
/// reader overtake each other.
const SLACK_BYTES: u64 = 1 << 20;

/// Bytes that must have been read in a row before anything is read ahead: a fault brings 128 KiB.
const RUN_BYTES_MIN: u64 = 256 << 10;

/// Pieces that wait; beyond that readers are faster than decoders, and nothing is gained.
const QUEUE_PIECES: usize = 64;

/// Threads that decode ahead, for all files of a mount.
pub(super) struct ReadAheadPool {
    queue: SyncSender<Piece>,
}

struct Piece {
    device: Arc<dyn BlockDevice>,
    range: Range<u64>,
}

/// Where the reader of a file is.
pub(super) struct ReadAhead {
    device: Arc<dyn BlockDevice>,
    pool: Arc<ReadAheadPool>,

    /// Where the last read ended. These are guesses about readers; torn together they do no harm.
    end: AtomicU64,

    /// How much was read in a row.
    run: AtomicU64,

    /// How far was asked to be decoded.
    asked: AtomicU64,
}

impl ReadAheadPool {
    /// Starts `threads` threads, which end when the pool and all pieces are gone.
    pub(super) fn start(threads: usize) -> std::io::Result<ReadAheadPool> {
        let (queue, pieces) = sync_channel(QUEUE_PIECES);
        let pieces: Arc<Mutex<Receiver<Piece>>> = Arc::new(Mutex::new(pieces));
        for number in 0..threads {
            let pieces = Arc::clone(&pieces);
            thread::Builder::new()
                .name(format!("read-ahead-{number}"))
                .spawn(move || decode_all(&pieces))?;
        }
        Ok(ReadAheadPool { queue })
    }
}

fn decode_all(pieces: &Mutex<Receiver<Piece>>) {
    loop {
        // Whoever waits for a piece holds the lock, the others wait for it.
        let piece = pieces.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(piece) = piece else { return };
        if let Err(error) = piece.device.prefetch(piece.range) {
            // Whoever really reads it is told.
            tracing::debug!(%error, "cannot read ahead");
        }
    }
}

impl ReadAhead {
    pub(super) fn new(device: Arc<dyn BlockDevice>, pool: Arc<ReadAheadPool>) -> ReadAhead {
        let (end, run, asked) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        ReadAhead { device, pool, end, run, asked }
    }

    /// A range is about to be read.
    pub(super) fn note(&self, range: Range<u64>) {
        let end = self.end.load(Ordering::Relaxed);
        let goes_on = range.start <= end.saturating_add(SLACK_BYTES)
            && range.end.saturating_add(SLACK_BYTES) >= end;
        if !goes_on {
            self.end.store(range.end, Ordering::Relaxed);
            self.run.store(range.end - range.start, Ordering::Relaxed);
            self.asked.store(range.end, Ordering::Relaxed);
            return;
        }
        self.end.store(end.max(range.end), Ordering::Relaxed);
        let length = range.end - range.start;
        if self.run.fetch_add(length, Ordering::Relaxed) + length < RUN_BYTES_MIN {
            return;
        }
        let target = range.end.saturating_add(AHEAD_BYTES).min(self.device.size_bytes());
        let from = self.asked.fetch_max(target, Ordering::Relaxed).max(range.end);
        let mut at = from;
        while at < target {
            let next = (at / PIECE_BYTES + 1).saturating_mul(PIECE_BYTES).min(target);
            let piece = Piece { device: Arc::clone(&self.device), range: at..next };
            if self.pool.queue.try_send(piece).is_err() {
                return;
            }
            at = next;
        }
    }
}

impl fmt::Debug for ReadAheadPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadAheadPool").finish_non_exhaustive()
    }
}

impl fmt::Debug for ReadAhead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadAhead").field("end", &self.end).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Condvar;
    use std::time::Duration;

    use super::*;
    use crate::device::DeviceResult;

    #[derive(Default)]
    struct Watched {
        asked: Mutex<Vec<Range<u64>>>,
        more: Condvar,
    }

    impl Watched {
        /// Everything that was asked for, joined, once it reaches `end`.
        fn reaching(&self, end: u64) -> Vec<Range<u64>> {
            let mut asked = self.asked.lock().unwrap();
            while asked.iter().all(|range| range.end < end) {
                let (next, waited) =
                    self.more.wait_timeout(asked, Duration::from_secs(20)).unwrap();
                assert!(!waited.timed_out(), "{next:?}");
                asked = next;
            }
            asked.clone()
        }
    }

    impl BlockDevice for Watched {
        fn size_bytes(&self) -> u64 {
            64 << 20
        }
        fn is_read_only(&self) -> bool {
            true
        }
        fn read_at(&self, _: &mut [u8], _: u64) -> DeviceResult<()> {
            Ok(())
        }
        fn prefetch(&self, range: Range<u64>) -> DeviceResult<()> {
            self.asked.lock().unwrap().push(range);
            self.more.notify_all();
            Ok(())
        }
    }

    #[test]
    fn only_readers_that_go_on_are_read_ahead_for() {
        let device = Arc::new(Watched::default());
        let pool = Arc::new(ReadAheadPool::start(1).unwrap());
        let read_ahead = ReadAhead::new(Arc::clone(&device) as Arc<dyn BlockDevice>, pool);
        for at in [40_u64, 9, 55, 21] {
            read_ahead.note(at << 20..(at << 20) + 4096);
        }
        assert_eq!(*device.asked.lock().unwrap(), []);
        let mut at = 32 << 20;
        while at < 33 << 20 {
            read_ahead.note(at..at + (128 << 10));
            at += 128 << 10;
        }
        let asked = device.reaching((33 << 20) + AHEAD_BYTES);
        assert!(asked.iter().all(|range| range.start > 32 << 20 && range.end <= 38 << 20));
        let bytes: u64 = asked.iter().map(|range| range.end - range.start).sum();
        assert!(bytes <= AHEAD_BYTES + (1 << 20), "nothing is asked for twice: {asked:?}");
    }
}
