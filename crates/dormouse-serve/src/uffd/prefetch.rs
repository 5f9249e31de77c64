//! Decodes and installs memory that nobody asked for yet, after the faults.
//!
//! What is to come is cut into chunks. A thread that has nothing to do takes the next one of the guest
//! whose turn it is, decodes it, and installs what is still missing. So chunks are decoded beside each
//! other and installed in nearly the order in which they were given; a guest that faults on a page of
//! one that is being decoded waits for that and decodes nothing itself. Before each chunk a thread waits
//! until no fault waits for one; while one is answered it goes on, or a guest that wakes would always be
//! ahead of it.
//!
//! What a guest in order will come to, and what a guest will ask for that has not come yet, is decoded
//! and not installed: the source's cache bounds that.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use dormouse_live::pages::PAGE_BYTES;

use super::answer::{Scratch, Zeros};
use super::pager::{Shared, guarded};
use super::source::{Effort, MemorySource};
use super::vm::{Served, Vm};
use crate::error::{Error, ErrorKind, Result};

/// Bytes that are decoded and installed at once. A multiple of every page size.
const CHUNK_BYTES: u64 = 256 << 10;

/// A look at whether faults still wait.
const YIELD: Duration = Duration::from_micros(50);

/// How long prefetching stands back at most for faults: those of others never end on a busy host.
const YIELDS_MAX: u32 = 200;

#[derive(Debug)]
pub(super) struct Prefetcher {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

/// Jobs and who waits for them.
#[derive(Debug, Default)]
pub(super) struct Queue {
    jobs: Mutex<State>,
    added: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    is_stopping: bool,
}

/// Ranges of an image, in the order in which they are wanted.
#[derive(Debug)]
struct Job {
    work: Work,
    ranges: VecDeque<Range<u64>>,
}

/// What is to be done with them.
#[derive(Clone, Debug)]
enum Work {
    /// They are decoded, for a guest that has not come yet.
    Decode(Arc<dyn MemorySource>),

    /// They are decoded, for one that is about to ask for them.
    DecodeFor(Arc<Vm>),

    /// They are installed.
    Install(Arc<Vm>, Zeros),
}

impl Work {
    fn installs(&self, vm: &Arc<Vm>) -> bool {
        matches!(self, Work::Install(of, _) if Arc::ptr_eq(of, vm))
    }

    fn decodes(&self, source: &Arc<dyn MemorySource>) -> bool {
        match self {
            Work::Decode(of) => Arc::ptr_eq(of, source),
            Work::DecodeFor(vm) => Arc::ptr_eq(vm.source(), source),
            Work::Install(..) => false,
        }
    }

    /// Those of guests that have ended keep their descriptors.
    fn is_over(&self) -> bool {
        matches!(self, Work::Install(vm, _) | Work::DecodeFor(vm) if vm.has_ended())
    }
}

impl Prefetcher {
    pub(super) fn start(shared: &Arc<Shared>, threads: usize) -> Result<Prefetcher> {
        let queue = Arc::clone(&shared.ahead);
        let mut prefetcher = Prefetcher { queue, threads: Vec::new() };
        for number in 0..threads.max(1) {
            let (queue, shared) = (Arc::clone(&prefetcher.queue), Arc::clone(shared));
            let thread = thread::Builder::new()
                .name(format!("prefetch-{number}"))
                .spawn(move || queue.work(&shared))
                .map_err(|error| Error::io("cannot start a thread", error))?;
            prefetcher.threads.push(thread);
        }
        Ok(prefetcher)
    }

    pub(super) fn stop(&mut self) {
        let mut state = self.queue.state();
        state.is_stopping = true;
        state.jobs.clear();
        drop(state);
        self.queue.added.notify_all();
        for thread in self.threads.drain(..) {
            // A panic of a thread has been told where it happened.
            let _ = thread.join();
        }
    }
}

impl Queue {
    /// Has ranges installed. What is decoded for a guest that has not come yet is the start of the same.
    pub(super) fn install(&self, vm: Arc<Vm>, ranges: Vec<Range<u64>>, zeros: Zeros) {
        let ranges = within(vm.source(), ranges);
        let mut state = self.state();
        state.jobs.retain(|job| !job.work.decodes(vm.source()));
        state.jobs.push_back(Job { work: Work::Install(vm, zeros), ranges });
        drop(state);
        self.added.notify_all();
    }

    /// Has ranges decoded for a guest that will come.
    pub(super) fn decode(&self, source: Arc<dyn MemorySource>, ranges: Vec<Range<u64>>) {
        let ranges = within(&source, ranges);
        self.state().jobs.push_back(Job { work: Work::Decode(source), ranges });
        self.added.notify_all();
    }

    /// Has a range decoded that a guest comes to in a moment: first of all.
    pub(super) fn decode_for(&self, vm: &Arc<Vm>, range: Range<u64>) {
        let ranges = within(vm.source(), Vec::from([range]));
        self.state().jobs.push_front(Job { work: Work::DecodeFor(Arc::clone(vm)), ranges });
        self.added.notify_all();
    }

    fn work(&self, shared: &Shared) {
        let mut scratch = Scratch::default();
        while let Some((work, chunk)) = self.next() {
            match work {
                Work::Decode(source) => self.decode_chunk(&source, chunk, &mut scratch),
                Work::DecodeFor(vm) => self.decode_chunk(vm.source(), chunk, &mut scratch),
                Work::Install(vm, zeros) => {
                    for _ in 0..YIELDS_MAX {
                        if !shared.faults.is_backed_up() || shared.is_stopping() {
                            break;
                        }
                        thread::sleep(YIELD);
                    }
                    self.install_chunk(&vm, chunk, zeros, &mut scratch);
                }
            }
            scratch.pieces.clear();
        }
    }

    fn install_chunk(&self, vm: &Arc<Vm>, chunk: Range<u64>, zeros: Zeros, scratch: &mut Scratch) {
        let Err(error) = guarded(|| vm.install_ahead(chunk, zeros, scratch)) else { return };
        self.state().jobs.retain(|job| !job.work.installs(vm));
        if error.kind() == ErrorKind::Source {
            // The guest has not asked for it, and may never do so.
            tracing::warn!(error = &error as &dyn std::error::Error, "prefetching stopped");
        } else if !vm.has_ended() {
            vm.fail(error);
        }
    }

    /// Nobody has asked for it. Whoever comes to it is told, of a panic too.
    fn decode_chunk(
        &self,
        source: &Arc<dyn MemorySource>,
        chunk: Range<u64>,
        scratch: &mut Scratch,
    ) {
        let decoded = guarded(|| {
            source.pieces(chunk, Effort::All, &mut scratch.pieces).map_err(|error| {
                Error::with_source(ErrorKind::Source, "cannot read the guest's memory", error)
            })
        });
        if let Err(error) = decoded {
            self.state().jobs.retain(|job| !job.work.decodes(source));
            tracing::warn!(error = &error as &dyn std::error::Error, "decoding ahead stopped");
        }
    }

    /// The next chunk; none if all is to stop.
    fn next(&self) -> Option<(Work, Range<u64>)> {
        let mut state = self.state();
        loop {
            if state.is_stopping {
                return None;
            }
            state.jobs.retain(|job| !job.work.is_over() && !job.ranges.is_empty());
            let Some(mut job) = state.jobs.pop_front() else {
                state = self.added.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let Some(range) = job.ranges.front_mut() else { continue };
            let end = range.end.min((range.start / CHUNK_BYTES + 1) * CHUNK_BYTES);
            let chunk = range.start..end;
            range.start = end;
            if range.is_empty() {
                job.ranges.pop_front();
            }
            let work = job.work.clone();
            match work {
                _ if job.ranges.is_empty() => {}
                Work::DecodeFor(_) => state.jobs.push_front(job),
                Work::Decode(_) | Work::Install(..) => state.jobs.push_back(job),
            }
            return Some((work, chunk));
        }
    }

    /// Held for moments.
    fn state(&self) -> MutexGuard<'_, State> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an image has of some ranges.
fn within(source: &Arc<dyn MemorySource>, ranges: Vec<Range<u64>>) -> VecDeque<Range<u64>> {
    let end = source.size_bytes().next_multiple_of(PAGE_BYTES);
    let inside = ranges.into_iter().map(|range| range.start..range.end.min(end));
    inside.filter(|range| !range.is_empty()).collect()
}

impl Vm {
    /// Installs what is missing of a range of the image.
    fn install_ahead(&self, range: Range<u64>, zeros: Zeros, scratch: &mut Scratch) -> Result<()> {
        let mut at = range.start;
        while at < range.end && !self.has_ended() {
            let Some(served) = self.served_at(at) else {
                at = self.next_region(at).unwrap_or(range.end);
                continue;
            };
            let end = range.end.min(served.region.image().end);
            self.install_in_region(served, at..end, zeros, scratch)?;
            at = end;
        }
        Ok(())
    }

    fn install_in_region(
        &self,
        served: &Served,
        range: Range<u64>,
        zeros: Zeros,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let region = &served.region;
        let range = self.whole_pages(region, range);
        if !self.any_missing(&range) {
            return Ok(());
        }
        scratch.pieces.clear();
        self.source().pieces(range.clone(), Effort::All, &mut scratch.pieces).map_err(|error| {
            Error::with_source(ErrorKind::Source, "cannot read the guest's memory", error)
        })?;
        let mut installed = 0;
        if region.page_bytes > PAGE_BYTES {
            installed += self.install_huge_ahead(served, range.clone(), scratch)?;
        } else {
            for piece in &scratch.pieces {
                installed += self.install_neighbours(served, piece, &range, zeros)?;
            }
        }
        self.counters.prefetched(installed);
        Ok(())
    }
}
