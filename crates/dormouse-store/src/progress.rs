//! How long work tells what it does, and how it is told to stop.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Told about the stages of long work. Called from several threads.
pub trait Progress: Sync {
    /// A stage begins; `total_bytes` is how much it will go through, where that is known.
    fn begin(&self, stage: &str, total_bytes: Option<u64>);

    /// So many more bytes of the stage are done.
    fn advance(&self, bytes: u64);
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn begin(&self, _stage: &str, _total_bytes: Option<u64>) {}

    fn advance(&self, _bytes: u64) {}
}

/// What every long operation is given: whom to tell, and a flag that stops it.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// Whom to tell.
    pub progress: &'a dyn Progress,

    /// Set from outside to stop; the operation then fails with `Cancelled` and leaves nothing.
    pub cancel: &'a AtomicBool,
}

impl std::fmt::Debug for Job<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("cancel", self.cancel).finish_non_exhaustive()
    }
}

impl Job<'static> {
    /// A job that tells nobody and is never stopped.
    pub const fn quiet() -> Job<'static> {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Job { progress: &Quiet, cancel: &NEVER }
    }
}

impl Job<'_> {
    /// Fails if the job was told to stop.
    pub fn check(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) { Err(Error::cancelled()) } else { Ok(()) }
    }
}
