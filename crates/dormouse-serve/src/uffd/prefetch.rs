//! Installs memory that nobody asked for yet, after the faults.
//!
//! What is to come is cut into chunks. A thread that has nothing to do takes the next one of the guest
//! whose turn it is, decodes it, and installs what is still missing. Before each chunk it waits until
//! no fault waits for a thread; while one is answered it goes on, or a guest that wakes would always
//! be ahead of it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use dormouse_live::pages::PAGE_BYTES;

use super::pager::{Shared, guarded};
use super::source::Effort;
use super::vm::{Scratch, Served, Vm, Zeros};
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

#[derive(Debug, Default)]
struct Queue {
    jobs: Mutex<State>,
    added: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<PrefetchJob>,
    is_stopping: bool,
}

/// What is to be installed for a guest.
#[derive(Debug)]
struct PrefetchJob {
    vm: Arc<Vm>,
    ranges: VecDeque<Range<u64>>,
    zeros: Zeros,
}

impl Prefetcher {
    pub(super) fn start(shared: &Arc<Shared>, threads: usize) -> Result<Prefetcher> {
        let mut prefetcher = Prefetcher { queue: Arc::default(), threads: Vec::new() };
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

    pub(super) fn add(&self, vm: Arc<Vm>, ranges: Vec<Range<u64>>, zeros: Zeros) {
        let image = vm.source().size_bytes();
        let inside = ranges.into_iter().map(|range| range.start..range.end.min(image));
        let ranges = inside.filter(|range| !range.is_empty()).collect();
        let mut state = self.queue.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        state.jobs.push_back(PrefetchJob { vm, ranges, zeros });
        drop(state);
        self.queue.added.notify_all();
    }

    pub(super) fn stop(&mut self) {
        self.queue.jobs.lock().unwrap_or_else(PoisonError::into_inner).is_stopping = true;
        self.queue.added.notify_all();
        for thread in self.threads.drain(..) {
            // A panic of a thread has been told where it happened.
            let _ = thread.join();
        }
    }
}

impl Queue {
    fn work(&self, shared: &Shared) {
        let mut scratch = Scratch::default();
        while let Some((vm, chunk, zeros)) = self.next() {
            for _ in 0..YIELDS_MAX {
                if !shared.faults.is_backed_up() || shared.is_stopping() {
                    break;
                }
                thread::sleep(YIELD);
            }
            let installed = guarded(|| vm.install_ahead(chunk, zeros, &mut scratch));
            if let Err(error) = installed {
                self.drop_job(&vm);
                if error.kind() == ErrorKind::Source {
                    // The guest has not asked for it, and may never do so.
                    tracing::warn!(error = &error as &dyn std::error::Error, "prefetching stopped");
                } else if !vm.has_ended() {
                    vm.fail(error);
                }
            }
            scratch.pieces.clear();
        }
    }

    /// The next chunk; none if all is to stop.
    fn next(&self) -> Option<(Arc<Vm>, Range<u64>, Zeros)> {
        let mut state = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if state.is_stopping {
                return None;
            }
            // Those of guests that have ended keep their descriptors.
            state.jobs.retain(|job| !job.vm.has_ended() && !job.ranges.is_empty());
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
            let (vm, zeros) = (Arc::clone(&job.vm), job.zeros);
            if !job.ranges.is_empty() {
                state.jobs.push_back(job);
            }
            return Some((vm, chunk, zeros));
        }
    }

    fn drop_job(&self, vm: &Arc<Vm>) {
        let mut state = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        state.jobs.retain(|job| !Arc::ptr_eq(&job.vm, vm));
    }
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
