//! How long a VMM may take: every call has an end.

use std::fmt;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

/// How long calls may take. A VMM that hangs must not hang us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// From the start of a VMM's process until its API answers.
    pub start: Duration,

    /// A call that only asks, or changes a little: status, pause, resume, a drive.
    pub call: Duration,

    /// Saving. The VMM may write all of memory.
    pub save: Duration,

    /// Loading. The VMM may read all of memory.
    pub load: Duration,
}

impl Timeouts {
    /// For hosts that are busy and guests of some GiB: ten seconds to start or to answer, ten
    /// minutes to save or load. (wrenn's 10 s for all calls broke dumps of 20 GB.)
    pub const STANDARD: Timeouts = Timeouts {
        start: Duration::from_secs(10),
        call: Duration::from_secs(10),
        save: Duration::from_secs(600),
        load: Duration::from_secs(600),
    };
}

/// A point in time after which a call has failed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    at: Instant,
    allowed: Duration,
}

impl Deadline {
    pub(crate) fn after(allowed: Duration) -> Deadline {
        let now = Instant::now();
        // A time beyond what the clock can tell is as good as a year.
        let year = Duration::from_secs(365 * 86_400);
        Deadline { at: now.checked_add(allowed).unwrap_or(now + year), allowed }
    }

    /// What is left of it; an error that names `what` when it has passed.
    pub(crate) fn left(&self, what: impl fmt::Display) -> Result<Duration> {
        let left = self.at.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(self.passed(what)) } else { Ok(left) }
    }

    pub(crate) fn has_passed(&self) -> bool {
        Instant::now() >= self.at
    }

    pub(crate) fn passed(&self, what: impl fmt::Display) -> Error {
        let context = format!("{what}: no answer within {:?}", self.allowed);
        Error::new(ErrorKind::Timeout, context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_passed_is_an_error_that_names_the_call() {
        let deadline = Deadline::after(Duration::ZERO);
        let error = deadline.left("stop").unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string()),
            (ErrorKind::Timeout, "stop: no answer within 0ns".to_owned())
        );
        assert!(Deadline::after(Duration::MAX).left("stop").is_ok());
    }
}
