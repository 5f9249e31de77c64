//! Large zeroings, trims and prefetches of a connection: served by a thread of their own, a piece
//! of each in turn, so that neither they nor other requests wait for the largest of them.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::connection::{Connection, Worker};
use super::limits::PIECE_BYTES;
use super::pulse::lock;
use super::reply::SHORT_REPLY_MAX;
use super::request::Request;
use super::serve::do_piece;
use crate::device::{DeviceResult, Durability};
use crate::error::Result;

/// The requests under way.
#[derive(Debug)]
pub(crate) struct Bulk {
    /// Guards the queue; held for a push or a pop.
    queue: Mutex<Queue>,
    changed: Condvar,
    capacity: usize,
}

#[derive(Debug)]
struct Queue {
    tasks: VecDeque<Task>,
    closed: bool,

    /// Whether the thread is gone.
    abandoned: bool,

    /// Whether the thread has one in its hands.
    one_out: bool,
}

#[derive(Debug)]
struct Task {
    request: Request,
    done_to: u64,
    waiting: Option<Duration>,
    serving: Duration,
}

impl Bulk {
    pub(crate) fn new(capacity: usize) -> Bulk {
        let capacity = capacity.max(1);
        let tasks = VecDeque::with_capacity(capacity);
        Bulk {
            queue: Mutex::new(Queue { tasks, closed: false, abandoned: false, one_out: false }),
            changed: Condvar::new(),
            capacity,
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        lock(&self.queue).len() >= self.capacity
    }

    /// Waits for room. Where the thread is gone the peer is too, and the request is dropped.
    pub(crate) fn push(&self, request: Request) {
        let mut queue = lock(&self.queue);
        while queue.len() >= self.capacity && !queue.abandoned {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        if !queue.abandoned {
            queue.tasks.push_back(Task {
                request,
                done_to: request.offset,
                waiting: None,
                serving: Duration::ZERO,
            });
        }
        drop(queue);
        self.changed.notify_all();
    }

    /// What is there is still done.
    pub(crate) fn close(&self) {
        lock(&self.queue).closed = true;
        self.changed.notify_all();
    }

    /// Nobody takes tasks any more.
    pub(crate) fn abandon(&self) {
        lock(&self.queue).abandoned = true;
        self.changed.notify_all();
    }

    fn take(&self) -> Option<Task> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(task) = queue.tasks.pop_front() {
                queue.one_out = true;
                return Some(task);
            }
            if queue.closed {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn put_back(&self, task: Option<Task>) {
        let mut queue = lock(&self.queue);
        queue.one_out = false;
        queue.tasks.extend(task);
        drop(queue);
        self.changed.notify_all();
    }
}

impl Queue {
    fn len(&self) -> usize {
        self.tasks.len() + usize::from(self.one_out)
    }
}

impl Connection<'_> {
    /// The thread for large ranges; returns when the connection is over and all are done.
    pub(crate) fn work_in_bulk(&self, worker: &mut Worker) -> Result<()> {
        while let Some(mut task) = self.bulk.take() {
            let begun = Instant::now();
            task.waiting.get_or_insert(begun.saturating_duration_since(task.request.arrived));
            let result = self.next_piece(&mut task);
            task.serving += begun.elapsed();
            if result.is_ok() && task.done_to < task.request.range().end {
                self.bulk.put_back(Some(task));
                continue;
            }
            self.bulk.put_back(None);
            let request = &task.request;
            let waiting = task.waiting.unwrap_or_default();
            let failed = result.is_err();
            let counters = self.export.counters();
            counters.count(request.kind, request.length, failed, waiting, task.serving);
            self.make_room(SHORT_REPLY_MAX, worker)?;
            match result {
                Ok(()) => worker.replies.done(request.into()),
                Err(error) => {
                    let refusal = self.refusal_of(request, error);
                    worker.replies.error(request.into(), refusal, None);
                }
            }
            worker.unsent += 1;
            self.send(worker)?;
        }
        Ok(())
    }

    /// The next piece of a task; after the last one it is durable if it has to be.
    fn next_piece(&self, task: &mut Task) -> DeviceResult<()> {
        let device = self.export.device();
        let range = task.request.range();
        let end = range.end.min(task.done_to + PIECE_BYTES);
        do_piece(device, task.request.kind, task.done_to..end, Durability::Later)?;
        task.done_to = end;
        if end == range.end && task.request.durability == Durability::Now {
            device.flush()?;
        }
        Ok(())
    }
}
