//! Commits that a process does for others: one at a time, told as they go on, and stopped when that is
//! asked for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use dormouse_store::name::Name;
use dormouse_store::progress::{Job, Progress};
use serde_json::{Value, json};
use uuid::Uuid;

use super::commit::{Committed, OnStep};
use super::control::Tell;
use crate::command::disk::{committed, told};
use crate::exit::{Fault, Kind};

/// How often it is told how far a commit is.
const ADVANCE_INTERVAL: Duration = Duration::from_millis(200);

/// Whose turn it is.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    running: Mutex<Option<Running>>,
    /// Stops the commit that runs, and all others where the process ends.
    cancel: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Running {
    commit: Uuid,
    is_cancelled: bool,
}

impl Turn {
    /// With the flag that is set when the process ends.
    pub(crate) fn until(cancel: Arc<AtomicBool>) -> Turn {
        Turn { cancel, ..Turn::default() }
    }

    /// Whether a commit is under way.
    pub(crate) fn is_taken(&self) -> bool {
        self.running().is_some()
    }

    /// Has a commit done by `work`, and tells its steps; busy if another one is under way.
    pub(crate) fn commit(
        &self,
        commit: Uuid,
        live: &Name,
        tell: Tell<'_>,
        work: impl FnOnce(OnStep<'_>, Job<'_>) -> Result<Committed>,
    ) -> Result<Value> {
        let _taken = self.take(commit, live)?;
        let telling = Telling { tell: Mutex::new((tell, 0, Instant::now())) };
        let job = Job { progress: &telling, cancel: &self.cancel };
        work(&mut |step| telling.say(told(&step)), job).map(|done| committed(&done))
    }

    /// Stops a commit, if it is under way.
    pub(crate) fn cancel(&self, commit: Uuid) {
        if let Some(running) = &mut *self.running()
            && running.commit == commit
        {
            running.is_cancelled = true;
            self.cancel.store(true, Ordering::SeqCst);
        }
    }

    fn take(&self, commit: Uuid, live: &Name) -> Result<Taken<'_>> {
        let mut running = self.running();
        if running.is_some() {
            let message = format!("another commit of {live} is under way");
            return Err(Fault::new(Kind::Busy, message).into());
        }
        *running = Some(Running { commit, is_cancelled: false });
        Ok(Taken(self))
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        // It is replaced whole.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Taken<'a>(&'a Turn);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut running = self.0.running();
        // That was meant for this one.
        if running.take().is_some_and(|running| running.is_cancelled) {
            self.0.cancel.store(false, Ordering::SeqCst);
        }
    }
}

/// Progress that is told to whoever asked.
struct Telling<'a> {
    /// Whom, bytes that were not told yet, and when some were.
    tell: Mutex<(Tell<'a>, u64, Instant)>,
}

impl Telling<'_> {
    fn say(&self, value: Value) {
        let mut tell = self.tell.lock().unwrap_or_else(PoisonError::into_inner);
        (tell.0)(value);
    }
}

impl Progress for Telling<'_> {
    fn begin(&self, stage: &str, total_bytes: Option<u64>) {
        self.say(json!({ "stage": stage, "total_bytes": total_bytes }));
    }

    fn advance(&self, bytes: u64) {
        let mut tell = self.tell.lock().unwrap_or_else(PoisonError::into_inner);
        let (say, pending, last) = &mut *tell;
        *pending += bytes;
        if last.elapsed() >= ADVANCE_INTERVAL {
            *last = Instant::now();
            say(json!({ "advanced_bytes": std::mem::take(pending) }));
        }
    }
}

/// Hands what is told of another process's progress on; false if it was something else.
pub(super) fn pass_on(told: &Value, progress: &dyn Progress) -> bool {
    if let Some(stage) = told["stage"].as_str() {
        progress.begin(stage, told["total_bytes"].as_u64());
    } else if let Some(bytes) = told["advanced_bytes"].as_u64() {
        progress.advance(bytes);
    } else {
        return false;
    }
    true
}

#[cfg(test)]
mod tests {
    use dormouse_store::progress::Quiet;

    use super::*;

    fn cancelled_within(turn: &Turn, commit: Uuid, cancel: Uuid) -> bool {
        let mut was_cancelled = false;
        let live = Name::new("box").unwrap();
        let ended = turn.commit(commit, &live, &mut |_| {}, |_, job| {
            turn.cancel(cancel);
            was_cancelled = job.check().is_err();
            anyhow::bail!("enough")
        });
        assert!(ended.is_err());
        was_cancelled
    }

    #[test]
    fn a_commit_is_stopped_and_no_other() {
        let turn = Turn::default();
        let (one, other) = (Uuid::new_v4(), Uuid::new_v4());
        turn.cancel(one);
        assert!(!cancelled_within(&turn, one, other));
        assert!(cancelled_within(&turn, one, one));
        assert!(!cancelled_within(&turn, one, other), "what stopped the one before is over");
        assert!(!turn.is_taken());
    }

    #[test]
    fn the_end_of_the_process_stops_all() {
        let end = Arc::new(AtomicBool::new(true));
        let turn = Turn::until(Arc::clone(&end));
        let (one, other) = (Uuid::new_v4(), Uuid::new_v4());
        assert!(cancelled_within(&turn, one, other));
        assert!(end.load(Ordering::SeqCst));
    }

    #[test]
    fn one_at_a_time() {
        let turn = Turn::default();
        let live = Name::new("box").unwrap();
        let _ = turn.commit(Uuid::new_v4(), &live, &mut |_| {}, |_, _| {
            assert!(turn.is_taken());
            let second = turn.commit(Uuid::new_v4(), &live, &mut |_| {}, |_, _| unreachable!());
            assert_eq!(Kind::of(&second.unwrap_err()), Kind::Busy);
            anyhow::bail!("enough")
        });
    }

    #[test]
    fn progress_is_passed_on() {
        let said = Mutex::new(Vec::new());
        let tell: Tell<'_> = &mut |value| said.lock().unwrap().push(value);
        let past = Instant::now().checked_sub(ADVANCE_INTERVAL * 2).unwrap();
        let telling = Telling { tell: Mutex::new((tell, 0, past)) };
        telling.begin("capture", Some(7));
        telling.advance(3);
        telling.advance(4);
        let said = said.lock().unwrap();
        assert_eq!(said.len(), 2, "{said:?}");
        assert_eq!(said[1], json!({ "advanced_bytes": 3 }), "the rest comes later");
        assert!(said.iter().all(|value| pass_on(value, &Quiet)));
        assert!(!pass_on(&json!({ "stored": "vm@1" }), &Quiet));
    }
}
