//! Finding the runs of zero blocks of one file on several threads, and punching them.
//!
//! The data extents are cut into segments that threads take in turn. A run within a segment is
//! punched by the thread that found it. A run that touches a cut is kept until all are done,
//! joined with its neighbours and punched then, so that the cuts change neither which runs there
//! are nor how many calls are made.
//!
//! The extents are looked up by one cursor, each once: finding the end of one makes tmpfs walk
//! all of its pages, so that asking again for every segment would be quadratic.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use dormouse_image::zero::is_zero;
use dormouse_sys::sparse::{self, DataExtents};

use super::{BLOCK_BYTES, PunchError, PunchMode, PunchOptions, PunchWatch};

/// What a thread takes at a time: small enough for the threads to end together and for a disk to
/// see one nearly sequential stream, large enough for the borders not to count.
pub(super) const SEGMENT_BYTES: u64 = 8 << 20;

/// What is read at a time. Measured: from 128 KiB on reading is as fast as the page cache can be
/// copied, and this much stays in the second-level cache for the test.
const READ_BYTES: usize = 256 << 10;

const BLOCK: usize = 4096;
const _: () = assert!(BLOCK as u64 == BLOCK_BYTES);
const _: () =
    assert!(READ_BYTES.is_multiple_of(BLOCK) && SEGMENT_BYTES.is_multiple_of(BLOCK_BYTES));

/// One file being scanned.
pub(super) struct Scan<'a> {
    pub(super) path: &'a Path,
    pub(super) file: &'a File,
    pub(super) options: &'a PunchOptions,
    pub(super) watch: &'a dyn PunchWatch,
}

/// Where in the file the threads are.
struct Cursor<'a> {
    extents: DataExtents<'a>,

    /// What is left of the extent being cut.
    extent: Range<u64>,

    /// Everything before is a hole or taken.
    at: u64,

    end: u64,
}

/// What one thread reads at a time.
struct Segment {
    range: Range<u64>,

    /// Whether the blocks before belong to the same extent.
    is_cut_before: bool,

    /// Whether the blocks after do.
    is_cut_after: bool,
}

/// What was found and, unless it is a dry run, punched.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) zero_bytes: u64,
    pub(super) punched_bytes: u64,
    pub(super) runs: u64,

    /// Runs not looked at yet because they may go on in the next segment.
    border_runs: Vec<Range<u64>>,
}

impl Scan<'_> {
    /// Scans the first `end` bytes, a multiple of the block size.
    pub(super) fn run(&self, end: u64, threads: usize) -> Result<Found, PunchError> {
        // Guards nothing but the cursor; held for two `lseek` calls at most.
        let cursor = Mutex::new(Cursor {
            extents: sparse::data_extents(self.file, 0..end),
            extent: 0..0,
            at: 0,
            end,
        });
        let failed = AtomicBool::new(false);
        let work = || {
            let mut found = Found::default();
            let mut buf = vec![0; READ_BYTES];
            while !failed.load(Ordering::Relaxed) {
                let taken = {
                    let mut cursor = cursor.lock().unwrap_or_else(PoisonError::into_inner);
                    self.take_segment(&mut cursor)
                };
                let result = match taken {
                    Ok(None) => break,
                    Ok(Some(segment)) => self.segment(&segment, &mut buf, &mut found),
                    Err(error) => Err(error),
                };
                if let Err(error) = result {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
            Ok(found)
        };
        let segments = end.div_ceil(SEGMENT_BYTES);
        let helpers = threads.min(usize::try_from(segments).unwrap_or(usize::MAX)).max(1) - 1;
        let parts: Vec<Result<Found, PunchError>> = thread::scope(|scope| {
            let helpers: Vec<_> = (0..helpers).map(|_| scope.spawn(work)).collect();
            let mut parts = vec![work()];
            parts.extend(helpers.into_iter().map(|helper| {
                helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }));
            parts
        });

        let mut total = Found::default();
        for part in parts {
            let part = part?;
            total.zero_bytes += part.zero_bytes;
            total.punched_bytes += part.punched_bytes;
            total.runs += part.runs;
            total.border_runs.extend(part.border_runs);
        }
        self.punch_border_runs(&mut total)?;
        Ok(total)
    }

    fn take_segment(&self, cursor: &mut Cursor<'_>) -> Result<Option<Segment>, PunchError> {
        let mut is_cut_before = true;
        while cursor.extent.is_empty() {
            let extent = cursor.extents.next().transpose();
            let extent = extent.map_err(|source| self.error("look for holes in it", source))?;
            let Some(extent) = extent else {
                self.watch.advanced(self.path, cursor.end - cursor.at);
                cursor.at = cursor.end;
                return Ok(None);
            };
            // File systems with smaller blocks may begin and end an extent within one of ours.
            let start = (extent.start / BLOCK_BYTES * BLOCK_BYTES).max(cursor.at);
            is_cut_before = start == cursor.at;
            self.watch.advanced(self.path, start - cursor.at);
            cursor.extent = start..extent.end.next_multiple_of(BLOCK_BYTES).min(cursor.end);
            cursor.at = start;
        }
        let start = cursor.extent.start;
        let end = cursor.extent.end.min((start / SEGMENT_BYTES + 1) * SEGMENT_BYTES);
        cursor.extent.start = end;
        cursor.at = end;
        let is_cut_after = !cursor.extent.is_empty();
        Ok(Some(Segment { range: start..end, is_cut_before, is_cut_after }))
    }

    /// Finds the runs of a segment and punches those that do not touch a cut.
    fn segment(
        &self,
        segment: &Segment,
        buf: &mut [u8],
        found: &mut Found,
    ) -> Result<(), PunchError> {
        let mut run = 0..0;
        let Range { start: mut at, end } = segment.range;
        while at < end {
            if self.watch.is_cancelled() {
                return Err(PunchError::Cancelled { path: self.path.to_owned() });
            }
            let len = usize::try_from(end - at).unwrap_or(READ_BYTES).min(READ_BYTES);
            let read = self.read(&mut buf[..len], at)?;
            let blocks = buf[..read].chunks_exact(BLOCK);
            for (block, block_at) in blocks.zip((at..).step_by(BLOCK)) {
                if is_zero(block) {
                    if run.end != block_at || run.is_empty() {
                        self.finish(run, segment, found)?;
                        run = block_at..block_at;
                    }
                    run.end += BLOCK_BYTES;
                }
            }
            at += len as u64;
            self.watch.advanced(self.path, len as u64);
        }
        self.finish(run, segment, found)
    }

    /// Reads as much of `buf` as the file has; less than all if it was cut meanwhile.
    fn read(&self, buf: &mut [u8], at: u64) -> Result<usize, PunchError> {
        let mut filled = 0;
        while filled < buf.len() {
            match self.file.read_at(&mut buf[filled..], at + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.error("read it", error)),
            }
        }
        Ok(filled)
    }

    fn finish(
        &self,
        run: Range<u64>,
        segment: &Segment,
        found: &mut Found,
    ) -> Result<(), PunchError> {
        if run.is_empty() {
            return Ok(());
        }
        found.zero_bytes += run.end - run.start;
        let touches_cut = segment.is_cut_before && run.start == segment.range.start
            || segment.is_cut_after && run.end == segment.range.end;
        if touches_cut {
            found.border_runs.push(run);
            return Ok(());
        }
        self.punch(&run, found)
    }

    fn punch_border_runs(&self, found: &mut Found) -> Result<(), PunchError> {
        let mut runs = std::mem::take(&mut found.border_runs);
        runs.sort_by_key(|run| run.start);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for run in runs {
            match joined.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => joined.push(run),
            }
        }
        for run in joined {
            if self.watch.is_cancelled() {
                return Err(PunchError::Cancelled { path: self.path.to_owned() });
            }
            self.punch(&run, found)?;
        }
        Ok(())
    }

    fn punch(&self, run: &Range<u64>, found: &mut Found) -> Result<(), PunchError> {
        let len = run.end - run.start;
        if len < self.options.min_run_bytes {
            return Ok(());
        }
        if self.options.mode == PunchMode::Punch {
            sparse::punch_hole(self.file, run.start, len)
                .map_err(|source| self.error("punch a hole into it", source))?;
        }
        found.punched_bytes += len;
        found.runs += 1;
        Ok(())
    }

    fn error(&self, action: &'static str, source: io::Error) -> PunchError {
        PunchError::Io { path: self.path.to_owned(), action, source }
    }
}
