//! Reaching whoever has a live VM's disks, or taking them where nobody has.

use std::time::{Duration, Instant};

use anyhow::Result;
use dormouse_live::overlay::OverlayConfig;
use dormouse_store::progress::Job;
use dormouse_store::store::Store;
use serde_json::Value;

use super::control::{Request, ask_and_hear};
use super::{LiveCommit, LiveDisks, LiveFolder, commit};
use crate::command::disk::{committed, told};
use crate::exit::Kind;

/// How long a command waits for a process that has the disks and does not answer: one that is about
/// to, or is letting go of them.
const REACH_TIMEOUT: Duration = Duration::from_secs(5);

/// Who is told of each step before the end.
pub(crate) type Hear<'a> = &'a mut dyn FnMut(Value);

/// What a command found that wants something of a live VM's disks.
#[derive(Debug)]
pub(crate) enum Reached {
    /// The process that has them, which did what was asked.
    Answer(Value),

    /// Nobody: this process has them now.
    Disks(LiveDisks),
}

/// Asks the process that has the disks, or takes them where there is none.
pub(crate) fn reach(
    store: &Store,
    folder: &LiveFolder,
    request: &Request,
    hear: Hear<'_>,
) -> Result<Reached> {
    let begun = Instant::now();
    loop {
        if let Some(value) = ask_and_hear(&folder.control(), request, hear)? {
            return Ok(Reached::Answer(value));
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

/// Has a live VM committed by the process that has it, or by this one if none has. What came of it, as
/// `disk commit --json` prints it.
pub(crate) fn commit_wherever(
    store: &Store,
    folder: &LiveFolder,
    wanted: &LiveCommit,
    hear: Hear<'_>,
    job: Job<'_>,
) -> Result<Value> {
    match reach(store, folder, &Request::Commit(Box::new(wanted.clone())), hear)? {
        Reached::Answer(value) => Ok(value),
        Reached::Disks(live) => {
            let on_step = &mut |step| hear(told(&step));
            Ok(committed(&commit(store, &live, None, wanted, on_step, job)?))
        }
    }
}
