//! Which steps fail, and how much of a failing step happens all the same.

use std::collections::BTreeMap;
use std::io;

use super::LastStep;

/// What a step does, as far as faults care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StepKind {
    /// Appends to a file.
    Write,

    /// Writes bytes of a file that take space already.
    Overwrite,

    /// Syncs a file.
    Sync,

    /// Makes a name or a folder.
    Make,

    /// Removes a name or a folder, or syncs a folder: needs no room.
    Roomless,
}

/// How much of a step happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Nothing,
    Part,
    Whole,
}

/// What becomes of a step: an `error` is its answer, whatever its effect.
#[derive(Debug)]
pub(crate) struct Admission {
    pub(crate) effect: Effect,
    pub(crate) error: Option<io::Error>,
}

/// The faults to come, by the absolute number of the step; the first step is 1.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    operations: u64,
    is_off: bool,
    cut: Option<(u64, LastStep)>,
    fail_at: BTreeMap<u64, io::ErrorKind>,
    fail_from: Option<(u64, io::ErrorKind)>,
    /// Whether the cut is of the process alone: what it had synced half way is not lost.
    is_kill: bool,
    has_lost_pages: bool,
    is_dead: bool,
}

impl Faults {
    pub(crate) fn operations(&self) -> u64 {
        self.operations
    }

    pub(crate) fn is_off(&self) -> bool {
        self.is_off
    }

    pub(crate) fn cut_after(&mut self, n: u64, last: LastStep) {
        if n == 0 {
            self.is_off = true;
        } else {
            self.cut = Some((self.operations.saturating_add(n), last));
        }
    }

    pub(crate) fn kill_after(&mut self, n: u64, last: LastStep) {
        self.is_kill = true;
        self.cut_after(n, last);
    }

    pub(crate) fn fail_at(&mut self, n: u64, kind: io::ErrorKind) {
        self.fail_at.insert(self.operations.saturating_add(n), kind);
    }

    pub(crate) fn fail_from(&mut self, n: u64, kind: io::ErrorKind) {
        self.fail_from = Some((self.operations.saturating_add(n), kind));
    }

    /// Forgets the faults to come; power that is off stays off.
    pub(crate) fn clear(&mut self) {
        self.cut = None;
        self.fail_at.clear();
        self.fail_from = None;
        self.has_lost_pages = false;
    }

    /// Whether neither syncing nor writing worked for a while: such a file system comes back by being
    /// mounted anew. Asking ends it.
    pub(crate) fn take_death(&mut self) -> bool {
        std::mem::take(&mut self.is_dead)
    }

    /// The power is on again, or rather it was a process that ended.
    pub(crate) fn revive(&mut self) {
        self.clear();
        self.is_off = false;
        self.is_kill = false;
    }

    /// Whether anything works at all.
    pub(crate) fn power(&self) -> io::Result<()> {
        if self.is_off { Err(power_is_off()) } else { Ok(()) }
    }

    /// Counts a step and decides about it.
    pub(crate) fn admit(&mut self, kind: StepKind) -> Admission {
        if self.is_off {
            return Admission { effect: Effect::Nothing, error: Some(power_is_off()) };
        }
        self.operations += 1;
        if let Some((number, last)) = self.cut
            && self.operations >= number
        {
            self.is_off = true;
            let effect = match last {
                LastStep::Undone => Effect::Nothing,
                LastStep::Torn if self.is_kill && kind == StepKind::Sync => Effect::Nothing,
                LastStep::Torn => Effect::Part,
                LastStep::Done => Effect::Whole,
            };
            return Admission { effect, error: Some(power_is_off()) };
        }
        let once = self.fail_at.remove(&self.operations);
        let lasting = self.fail_from.and_then(|(number, error)| {
            let spared = error == io::ErrorKind::StorageFull
                && matches!(kind, StepKind::Overwrite | StepKind::Sync | StepKind::Roomless);
            (self.operations >= number && !spared).then_some(error)
        });
        if lasting.is_some() {
            self.is_dead |= self.has_lost_pages && kind == StepKind::Overwrite;
            self.has_lost_pages |= kind == StepKind::Sync;
        }
        let Some(error) = once.or(lasting) else {
            return Admission { effect: Effect::Whole, error: None };
        };
        // A write that fails may have written some of its bytes, and a sync that fails has lost
        // its pages; operations on names are atomic.
        let effect = match kind {
            StepKind::Write | StepKind::Overwrite | StepKind::Sync => Effect::Part,
            StepKind::Make | StepKind::Roomless => Effect::Nothing,
        };
        Admission { effect, error: Some(io::Error::new(error, "injected fault")) }
    }
}

fn power_is_off() -> io::Error {
    io::Error::other("the power is off")
}
