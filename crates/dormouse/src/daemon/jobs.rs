//! Jobs: what takes long, done in turn on threads of its own, and looked at meanwhile.
//!
//! A job is queued, runs, and is done, failed or cancelled. So many run at a time and so many wait as the
//! budget has; the last of those that ended are remembered. Nothing of a job needs its asker: it goes on
//! when the connection is gone.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use dormouse_store::progress::{Job as StoreJob, Progress};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::{Semaphore, watch};
use utoipa::ToSchema;
use uuid::Uuid;

use super::api::answer::ErrorBody;
use super::budget::Budget;
use super::metrics::Metrics;
use crate::exit::{Fault, Kind, Told};

/// Jobs that ended and are remembered.
const ENDED_MAX: usize = 1000;

/// VMs and jobs that are remembered of those: a fork tells of each of its VMs twice.
const ENDED_WEIGHT_MAX: usize = 20_000;

/// For how long.
const ENDED_FOR: Duration = Duration::from_secs(3600);

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum JobKind {
    /// Boots a guest.
    Run,
    /// Wakes a snapshot.
    Wake,
    /// Wakes a snapshot as many VMs.
    Fork,
    /// Stores a VM.
    Sleep,
    /// Ends a VM.
    Kill,
    /// Frees what no snapshot needs.
    Gc,
}

impl JobKind {
    /// Its word.
    pub(crate) fn word(self) -> &'static str {
        match self {
            JobKind::Run => "run",
            JobKind::Wake => "wake",
            JobKind::Fork => "fork",
            JobKind::Sleep => "sleep",
            JobKind::Kill => "kill",
            JobKind::Gc => "gc",
        }
    }
}

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum JobState {
    /// It waits for its turn.
    Queued,
    /// It is at work.
    Running,
    /// It ended, and `result` has what came of it.
    Done,
    /// It ended, and `error` says why.
    Failed,
    /// It was told to stop, and left nothing.
    Cancelled,
}

impl JobState {
    /// Its word.
    pub(crate) fn word(self) -> &'static str {
        match self {
            JobState::Queued => "queued",
            JobState::Running => "running",
            JobState::Done => "done",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
        }
    }

    /// Whether nothing comes after it.
    pub(crate) fn is_end(self) -> bool {
        !matches!(self, JobState::Queued | JobState::Running)
    }
}

/// A job, as it is told.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct JobView {
    /// Its id.
    #[schema(value_type = String, format = "uuid")]
    pub(crate) id: Uuid,
    /// What it does.
    pub(crate) kind: JobKind,
    /// The VM or snapshot that it is about; none for a collection.
    pub(crate) subject: Option<String>,
    /// Where it is.
    pub(crate) state: JobState,
    /// When it was accepted.
    #[schema(value_type = String, format = "date-time")]
    pub(crate) created: Timestamp,
    /// What it is at.
    pub(crate) stage: Option<String>,
    /// Bytes of the stage that are done.
    pub(crate) done_bytes: u64,
    /// Bytes of the stage, where that is known.
    pub(crate) total_bytes: Option<u64>,
    /// How long it waited for its turn.
    pub(crate) queue_seconds: f64,
    /// How long it has been at work, or was.
    pub(crate) service_seconds: f64,
    /// Of a sleep, once the guest stands still no longer.
    #[schema(value_type = Option<super::api::vms::FrozenObject>)]
    pub(crate) frozen: Option<Value>,
    /// Of a fork, those that are awake so far.
    #[schema(value_type = Vec<super::api::vms::AwakeObject>)]
    pub(crate) awake: Vec<Value>,
    /// What came of it; the fields are those of the command's `--json`.
    #[schema(value_type = Option<Object>)]
    pub(crate) result: Option<Value>,
    /// Why nothing came of it.
    pub(crate) error: Option<ErrorBody>,
}

/// A job.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: Uuid,
    kind: JobKind,
    subject: Option<String>,
    created: Timestamp,
    accepted: Instant,
    cancel: AtomicBool,
    done_bytes: AtomicU64,
    /// Held to read or change a few fields.
    inner: Mutex<Inner>,
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct Inner {
    state: JobState,
    begun: Option<Instant>,
    ended: Option<Instant>,
    stage: Option<String>,
    total_bytes: Option<u64>,
    frozen: Option<Value>,
    awake: Vec<Value>,
    result: Option<Value>,
    error: Option<Told>,
}

impl Job {
    fn new(kind: JobKind, subject: Option<String>) -> Job {
        Job {
            id: Uuid::now_v7(),
            kind,
            subject,
            created: Timestamp::now(),
            accepted: Instant::now(),
            cancel: AtomicBool::new(false),
            done_bytes: AtomicU64::new(0),
            inner: Mutex::new(Inner {
                state: JobState::Queued,
                begun: None,
                ended: None,
                stage: None,
                total_bytes: None,
                frozen: None,
                awake: Vec::new(),
                result: None,
                error: None,
            }),
            changed: watch::Sender::new(()),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Its fields are each set at once.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.inner());
        self.changed.send_replace(());
    }

    /// What is to be told of it.
    pub(crate) fn view(&self) -> JobView {
        let inner = self.inner();
        let now = Instant::now();
        let begun = inner.begun.or(inner.ended).unwrap_or(now);
        JobView {
            id: self.id,
            kind: self.kind,
            subject: self.subject.clone(),
            state: inner.state,
            created: self.created,
            stage: inner.stage.clone(),
            done_bytes: self.done_bytes.load(Ordering::Relaxed),
            total_bytes: inner.total_bytes,
            queue_seconds: (begun - self.accepted).as_secs_f64(),
            service_seconds: match inner.begun {
                Some(begun) => (inner.ended.unwrap_or(now) - begun).as_secs_f64(),
                None => 0.0,
            },
            frozen: inner.frozen.clone(),
            awake: inner.awake.clone(),
            result: inner.result.clone(),
            error: inner.error.as_ref().map(ErrorBody::of),
        }
    }

    /// Where it is.
    pub(crate) fn state(&self) -> JobState {
        self.inner().state
    }

    /// What came of it, once it has ended.
    pub(crate) fn outcome(&self) -> Option<Result<Value, Told>> {
        let inner = self.inner();
        match (&inner.result, &inner.error) {
            (Some(result), _) => Some(Ok(result.clone())),
            (None, Some(error)) => Some(Err(error.clone())),
            (None, None) => None,
        }
    }

    /// For how long its guest stood still, of a sleep that has come so far.
    pub(crate) fn frozen(&self) -> Option<Value> {
        self.inner().frozen.clone()
    }

    /// Told of whatever changes but bytes.
    pub(crate) fn watch(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Tells it to stop; one that waits for its turn ends at once.
    pub(crate) fn cancel(&self) {
        self.cancel.store(true, Ordering::SeqCst);
        if self.state() == JobState::Queued {
            self.end(Err(cancelled().into()));
        }
    }

    /// Fails where it was told to stop.
    pub(crate) fn check(&self) -> Result<()> {
        if self.cancel.load(Ordering::SeqCst) { Err(cancelled().into()) } else { Ok(()) }
    }

    /// What the store's long operations are given.
    pub(crate) fn store_job(&self) -> StoreJob<'_> {
        StoreJob { progress: self, cancel: &self.cancel }
    }

    /// The guest stands still no longer.
    pub(crate) fn set_frozen(&self, frozen: Value) {
        self.change(|inner| inner.frozen = Some(frozen));
    }

    /// One of several VMs is awake.
    pub(crate) fn add_awake(&self, awake: Value) {
        self.change(|inner| inner.awake.push(awake));
    }

    /// It begins, unless it has ended already.
    fn begin(&self) -> bool {
        let mut begins = false;
        self.change(|inner| {
            begins = inner.state == JobState::Queued;
            if begins {
                inner.state = JobState::Running;
                inner.begun = Some(Instant::now());
            }
        });
        begins
    }

    fn end(&self, result: Result<Value>) {
        self.change(|inner| {
            if inner.state.is_end() {
                return;
            }
            inner.ended = Some(Instant::now());
            match result {
                Ok(value) => {
                    inner.result = Some(value);
                    inner.state = JobState::Done;
                }
                Err(error) => {
                    let told = Told::of(&error);
                    inner.state = match told.kind {
                        Kind::Cancelled => JobState::Cancelled,
                        _ => JobState::Failed,
                    };
                    inner.error = Some(told);
                }
            }
        });
    }

    /// What it is to be remembered.
    fn weight(&self) -> usize {
        1 + 2 * self.inner().awake.len()
    }

    fn times(&self) -> (Duration, Duration) {
        let inner = self.inner();
        let ended = inner.ended.unwrap_or_else(Instant::now);
        let begun = inner.begun.unwrap_or(ended);
        (begun - self.accepted, ended - begun)
    }
}

impl Progress for Job {
    fn begin(&self, stage: &str, total_bytes: Option<u64>) {
        self.done_bytes.store(0, Ordering::Relaxed);
        self.change(|inner| {
            inner.stage = Some(stage.to_owned());
            inner.total_bytes = total_bytes;
        });
    }

    fn advance(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

fn cancelled() -> Fault {
    Fault::new(Kind::Cancelled, "the job was told to stop")
}

/// All jobs.
#[derive(Debug)]
pub(crate) struct Jobs {
    turns: Arc<Semaphore>,
    at_work_max: usize,
    waiting_max: usize,
    /// Oldest first. Held to look, to add and to remove.
    table: Mutex<Table>,
    /// How many have not ended.
    unfinished: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct Table {
    jobs: VecDeque<Arc<Job>>,
    is_closed: bool,
}

impl Jobs {
    /// None yet.
    pub(crate) fn new(budget: &Budget) -> Jobs {
        Jobs {
            turns: Arc::new(Semaphore::new(budget.jobs)),
            at_work_max: budget.jobs,
            waiting_max: budget.queue,
            table: Mutex::default(),
            unfinished: watch::Sender::new(0),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // It is whole after each of the calls below.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepts a job. Busy if too many wait, or the daemon is about to end.
    pub(crate) fn start(
        self: &Arc<Jobs>,
        kind: JobKind,
        subject: Option<String>,
        metrics: &Arc<Metrics>,
        work: impl FnOnce(&Job) -> Result<Value> + Send + 'static,
    ) -> Result<Arc<Job>> {
        let job = Arc::new(Job::new(kind, subject));
        {
            let mut table = self.table();
            if table.is_closed {
                return Err(Fault::new(Kind::Busy, "the daemon is about to end").into());
            }
            let (at_work, waiting) = (self.at_work_max, self.waiting_max);
            if *self.unfinished.borrow() >= at_work + waiting {
                metrics.refused("queue");
                let message =
                    format!("as many jobs wait as may: {waiting}, behind {at_work} at work");
                return Err(Fault::new(Kind::Busy, message).into());
            }
            table.forget_ended();
            table.jobs.push_back(Arc::clone(&job));
            self.unfinished.send_modify(|count| *count += 1);
        }
        let (jobs, metrics, started) = (Arc::clone(self), Arc::clone(metrics), Arc::clone(&job));
        tokio::spawn(async move {
            jobs.take_turn(&started, work).await;
            let (queue, service) = started.times();
            let outcome = started.state().word();
            metrics.job(kind.word(), outcome, queue, service);
            tell(&started, queue, service);
            jobs.unfinished.send_modify(|count| *count -= 1);
        });
        Ok(job)
    }

    async fn take_turn(
        &self,
        job: &Arc<Job>,
        work: impl FnOnce(&Job) -> Result<Value> + Send + 'static,
    ) {
        let mut changed = job.watch();
        let turn = loop {
            tokio::select! {
                turn = Arc::clone(&self.turns).acquire_owned() => break turn,
                // Cancelled, which is all that can become of a job that waits.
                _ = changed.changed() => if job.state().is_end() { return },
            }
        };
        if turn.is_err() || !job.begin() {
            return;
        }
        let at_work = Arc::clone(job);
        let done = tokio::task::spawn_blocking(move || work(&at_work)).await;
        // A panic was reported by its hook, and is an answer all the same.
        let failed =
            |_| Err(Fault::new(Kind::Other, "the job panicked; the daemon's log has it").into());
        job.end(done.unwrap_or_else(failed));
    }

    /// One of them; not found if there was none, or it ended long ago.
    pub(crate) fn find(&self, id: Uuid) -> Result<Arc<Job>> {
        let table = self.table();
        let job = table.jobs.iter().find(|job| job.id == id).map(Arc::clone);
        job.ok_or_else(|| {
            let message = format!("there is no job {id}; those that ended are kept for an hour");
            Fault::new(Kind::NotFound, message).into()
        })
    }

    /// All that are remembered, oldest first.
    pub(crate) fn list(&self) -> Vec<Arc<Job>> {
        self.table().jobs.iter().map(Arc::clone).collect()
    }

    /// How many wait and how many are at work.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let all = self.list();
        let count = |state| all.iter().filter(|job| job.state() == state).count();
        (count(JobState::Queued), count(JobState::Running))
    }

    /// Accepts none from now on, and ends those that wait.
    pub(crate) fn close(&self) {
        self.table().is_closed = true;
        for job in self.list() {
            if job.state() == JobState::Queued {
                job.cancel();
            }
        }
    }

    /// Tells all to stop.
    pub(crate) fn cancel_all(&self) {
        for job in self.list() {
            if !job.state().is_end() {
                job.cancel();
            }
        }
    }

    /// Returns when all have ended.
    pub(crate) async fn ended(&self) {
        let mut unfinished = self.unfinished.subscribe();
        // The sender is ours, so it cannot be gone.
        let _ = unfinished.wait_for(|count| *count == 0).await;
    }
}

impl Table {
    fn forget_ended(&mut self) {
        let is_old =
            |job: &Arc<Job>| job.inner().ended.is_some_and(|ended| ended.elapsed() > ENDED_FOR);
        self.jobs.retain(|job| !is_old(job));
        let ended = || self.jobs.iter().filter(|job| job.state().is_end());
        let mut count = ended().count();
        let mut weight: usize = ended().map(|job| job.weight()).sum();
        self.jobs.retain(|job| {
            let goes = (count >= ENDED_MAX || weight > ENDED_WEIGHT_MAX) && job.state().is_end();
            if goes {
                count -= 1;
                weight = weight.saturating_sub(job.weight());
            }
            !goes
        });
    }
}

fn tell(job: &Job, queue: Duration, service: Duration) {
    let view = job.view();
    let subject = view.subject.as_deref().unwrap_or("-");
    let (queue_seconds, service_seconds) = (queue.as_secs_f64(), service.as_secs_f64());
    match view.error {
        None => tracing::info!(
            job = %job.id, kind = job.kind.word(), subject, queue_seconds, service_seconds,
            "a job is done"
        ),
        // Fields of a log are no lists.
        Some(error) => tracing::warn!(
            job = %job.id, kind = job.kind.word(), subject, queue_seconds, service_seconds,
            error = %error.message,
            causes = (!error.causes.is_empty()).then(|| error.causes.join(": ")),
            "a job came to nothing"
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ended(awake: usize) -> Arc<Job> {
        let job = Job::new(JobKind::Fork, None);
        assert!(Job::begin(&job));
        for _ in 0..awake {
            job.add_awake(json!({}));
        }
        job.end(Ok(json!({})));
        Arc::new(job)
    }

    #[test]
    fn the_oldest_that_ended_are_forgotten_by_number_and_weight() {
        let mut table = Table::default();
        let waits = Arc::new(Job::new(JobKind::Gc, None));
        table.jobs.push_back(Arc::clone(&waits));
        table.jobs.extend((0..ENDED_MAX + 5).map(|_| ended(0)));
        let last = Arc::clone(table.jobs.back().unwrap());
        table.forget_ended();
        assert_eq!(table.jobs.len(), ENDED_MAX, "one that waits, and room for one more that ended");
        assert!(Arc::ptr_eq(&table.jobs[0], &waits));
        assert!(Arc::ptr_eq(table.jobs.back().unwrap(), &last));
        table.jobs.extend((0..30).map(|_| ended(500)));
        table.forget_ended();
        let weight: usize = table.jobs.iter().map(|job| job.weight()).sum();
        assert!(weight <= ENDED_WEIGHT_MAX + 1 && table.jobs.len() >= 19, "{}", table.jobs.len());
    }

    #[test]
    fn what_has_ended_stays_as_it_is() {
        let job = Job::new(JobKind::Sleep, Some("box".to_owned()));
        job.cancel();
        assert_eq!(job.state(), JobState::Cancelled);
        assert!(!Job::begin(&job));
        job.end(Ok(json!({})));
        assert_eq!(job.state(), JobState::Cancelled);
        assert_eq!(job.outcome().unwrap().unwrap_err().kind, Kind::Cancelled);
    }
}
