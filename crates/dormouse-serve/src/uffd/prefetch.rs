//! Installs memory that nobody asked for yet, after the faults.
//!
//! What is to come is cut into chunks. A thread that has nothing to do takes the next one of the first
//! guest, decodes it, and installs what is still missing. Before each chunk it waits until no fault
//! waits for an answer. Installing a chunk holds the guest's gate, shared, for a quarter of a
//! millisecond at most.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::pager::Shared;
use dormouse_live::pages::PAGE_BYTES;

use super::source::Effort;
use super::vm::{Scratch, Vm, Zeros};
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
        let mut state = self.queue.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        state.jobs.push_back(PrefetchJob { vm, ranges: ranges.into(), zeros });
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
                if shared.waiting.load(Ordering::Acquire) == 0 || shared.is_stopping() {
                    break;
                }
                thread::sleep(YIELD);
            }
            if vm.has_ended() {
                self.drop_job(&vm);
            } else if let Err(error) = vm.install_ahead(chunk, zeros, &mut scratch) {
                // The guest has not asked for it, and may never do so.
                tracing::warn!(error = &error as &dyn std::error::Error, "prefetching stopped");
                self.drop_job(&vm);
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
            let Some(job) = state.jobs.front_mut() else {
                state = self.added.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let Some(range) = job.ranges.front_mut() else {
                state.jobs.pop_front();
                continue;
            };
            let end = range.end.min((range.start / CHUNK_BYTES + 1) * CHUNK_BYTES);
            let chunk = range.start..end;
            range.start = end;
            if range.is_empty() {
                job.ranges.pop_front();
            }
            if !chunk.is_empty() {
                return Some((Arc::clone(&job.vm), chunk, job.zeros));
            }
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
        let Some(served) = self.served_at(range.start) else { return Ok(()) };
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
            installed += self.install_huge_ahead(served, range, scratch)?;
        } else {
            let _shared = self.shared();
            for piece in &scratch.pieces {
                installed += self.install_neighbours(served, piece, region, zeros)?;
            }
        }
        self.counters.prefetched(installed);
        Ok(())
    }
}
