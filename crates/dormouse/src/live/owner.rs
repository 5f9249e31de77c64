//! Reaching whoever has a live VM's disks, or taking them where nobody has.

use std::time::{Duration, Instant};

use anyhow::Result;
use dormouse_live::overlay::OverlayConfig;
use dormouse_store::progress::Job;
use dormouse_store::store::Store;
use serde_json::Value;

pub(crate) use super::control::Hear;
use super::control::{Request, ask_and_hear, ask_within};
use super::turn::pass_on;
use super::{LiveCommit, LiveDisks, LiveFolder, commit};
use crate::command::disk::{committed, told};
use crate::exit::Kind;
use crate::vm::Record;
use crate::vm::plane::Plane;

/// How long a command waits for a process that has the disks and does not answer: one that is about
/// to, or is letting go of them.
const REACH_TIMEOUT: Duration = Duration::from_secs(5);

/// How long it is waited for that the data plane has the disks of a VM that runs. A VMM may have none of
/// them open, and its guest waits meanwhile; a data plane that has just taken over had them before it said
/// that it is there.
const PLANE_TIMEOUT: Duration = Duration::from_millis(100);

/// How long it may take to be told that a commit is to stop.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// What a command found that wants something of a live VM's disks.
#[derive(Debug)]
pub(crate) enum Reached {
    /// The process that has them, which did what was asked.
    Answer(Value),

    /// Nobody: this process has them now.
    Disks(LiveDisks),
}

/// Asks the process that has the disks, or takes them where there is none. Those of a VM that runs are the
/// data plane's, which is waited for: its guest would find them taken.
pub(crate) fn reach(
    store: &Store,
    folder: &LiveFolder,
    request: &Request,
    hear: Hear<'_>,
    idle: &mut dyn FnMut(),
) -> Result<Reached> {
    let begun = Instant::now();
    let runs = runs_with_disks(folder)?;
    loop {
        if runs {
            Plane::find_or_start(&folder.store_dir())?;
        }
        if let Some(value) = ask_and_hear(&folder.control(), request, hear, idle)? {
            return Ok(Reached::Answer(value));
        }
        if runs && begun.elapsed() < PLANE_TIMEOUT && runs_with_disks(folder)? {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        }
        match LiveDisks::open_any(store, folder, OverlayConfig::STANDARD) {
            Ok(disks) => return Ok(Reached::Disks(disks)),
            Err(error) if Kind::of(&error) == Kind::Busy && begun.elapsed() < REACH_TIMEOUT => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether it is a VM whose VMM lives and has disks.
fn runs_with_disks(folder: &LiveFolder) -> Result<bool> {
    let record = Record::read(folder.path())?;
    let process = record.as_ref().and_then(|record| record.process.as_ref());
    let lives = process.is_some_and(|process| process.find().is_ok_and(|found| found.is_some()));
    Ok(lives && !folder.ids()?.is_empty())
}

/// Has a live VM committed by the process that has it, or by this one if none has. What came of it, as
/// `disk commit --json` prints it.
pub(crate) fn commit_wherever(
    store: &Store,
    folder: &LiveFolder,
    wanted: &LiveCommit,
    hear: Hear<'_>,
    job: Job<'_>,
) -> Result<Value> {
    let hear: Hear<'_> = &mut |told: Value| {
        if !pass_on(&told, job.progress) {
            hear(told);
        }
    };
    let idle = &mut || {
        // It may not have come that far, or have ended: it is asked again, or answers.
        if job.check().is_err()
            && let Err(error) = ask_within(
                &folder.control(),
                &Request::Cancel { commit: wanted.id },
                CANCEL_TIMEOUT,
            )
        {
            tracing::debug!(error = &*error, "a commit cannot be stopped");
        }
    };
    match reach(store, folder, &Request::Commit(Box::new(wanted.clone())), hear, idle)? {
        Reached::Answer(value) => Ok(value),
        Reached::Disks(live) => {
            let on_step = &mut |step| hear(told(&step));
            Ok(committed(&commit(store, &live, None, wanted, on_step, job)?))
        }
    }
}
