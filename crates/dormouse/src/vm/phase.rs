//! What a VM is doing, and what is to be done about one that was left in the middle of it.
//!
//! ```text
//!            wake, run                       sleep
//!  (nothing) ────────► waking ──► awake ◄──► falling asleep ──► (nothing: a snapshot has it)
//!                        │          │               │
//!                        ▼          ▼               ▼
//!                    (nothing)    failed ◄──────────┘
//! ```
//!
//! A phase is written down before what it stands for begins. Whoever does something to a VM holds its
//! lock; one that is waking or falling asleep with nobody holding the lock was left by a crash, and
//! [`Phase::repair`] says what becomes of it:
//!
//! - **What nobody was told of is undone.** A VM that had not woken is removed. So nothing of it has to
//!   survive a power cut before its guest goes on: all of it is durable then, and that it is awake before
//!   anybody is told.
//! - **The snapshot decides.** A sleep that was published is carried through, whatever else happened; one
//!   that was not is undone: the VM runs on.
//! - **A VM without its VMM has failed**: its memory is gone. Its disks are kept until somebody says
//!   what becomes of them.

use serde::{Deserialize, Serialize};

/// What a VM is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Phase {
    /// It is being made, and its VMM may or may not have been started.
    Waking,

    /// Its VMM runs it.
    Awake,

    /// It is being stored.
    FallingAsleep(Sleep),

    /// It is of no more use but for its disks.
    Failed {
        /// Why.
        why: String,
    },
}

/// A sleep that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sleep {
    /// What the snapshot that comes of it is marked with, to be found again.
    pub(crate) attempt: uuid::Uuid,

    /// The snapshot's name.
    pub(crate) name: String,

    /// What becomes of the VM.
    pub(crate) then: Then,
}

/// What becomes of a VM that was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Then {
    /// It ends: the snapshot is what there is of it.
    End,

    /// It goes on.
    GoOn,
}

/// What is known of a VM that nobody is doing anything to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Whether its VMM's process lives.
    pub(crate) vmm_lives: bool,

    /// Whether the snapshot of the sleep that was begun is there.
    pub(crate) is_published: bool,
}

/// What is to be done to a VM that was left in the middle of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repair {
    /// Nothing.
    None,

    /// End its VMM if that lives, and remove all of it.
    Remove,

    /// Let its guest go on; it is awake.
    Resume,

    /// Say that its VMM is gone.
    Fail,
}

impl Phase {
    /// What becomes of a VM in this phase with nobody at it.
    pub(crate) fn repair(&self, seen: Seen) -> Repair {
        match self {
            Phase::Failed { .. } => Repair::None,
            Phase::Waking => Repair::Remove,
            Phase::Awake if seen.vmm_lives => Repair::None,
            Phase::Awake => Repair::Fail,
            Phase::FallingAsleep(sleep) => match (sleep.then, seen.is_published, seen.vmm_lives) {
                (Then::End, true, _) => Repair::Remove,
                (_, _, true) => Repair::Resume,
                (_, _, false) => Repair::Fail,
            },
        }
    }

    /// Its word in listings and JSON.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Phase::Waking => "waking",
            Phase::Awake => "awake",
            Phase::FallingAsleep(_) => "falling_asleep",
            Phase::Failed { .. } => "failed",
        }
    }
}

#[cfg(test)]
mod tests {
    //! All that can happen to a VM, in every order: each step of a wake and a sleep, a crash of whoever
    //! does it, a death of the VMM, and the repair.

    use std::collections::{BTreeSet, VecDeque};

    use super::*;

    /// The world around one VM. `has_lost` is what must never come about.
    #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
    struct World {
        /// What is written down; none: there is no VM.
        phase: Option<Written>,
        guest: Guest,
        disks: bool,
        /// What of the guest's life a snapshot has: everything up to now, or nothing of this sleep.
        is_published: bool,
        /// Whether the guest has gone on since it was sealed: the snapshot has not all of it any more.
        is_ahead: bool,
        /// Steps that whoever holds the lock has yet to take; none if nobody does.
        at_work: Option<Work>,
        /// Whether somebody was told that the VM is awake.
        was_told: bool,
        /// Whether its disks survive a power cut.
        is_settled: bool,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Written {
        Waking,
        Awake,
        FallingAsleep(bool),
        Failed,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Guest {
        None,
        Paused,
        Runs,
        Dead,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Work {
        // A wake.
        MakeDisks,
        StartVmm,
        Load,
        Settle,
        LetGo,
        WriteAwake,
        Tell,
        // A sleep.
        Pause,
        SaveAndSeal,
        Publish,
        EndVmm,
        RemoveAll,
        ResumeAfter,
        WriteAwakeAfter,
    }

    impl World {
        fn empty() -> World {
            World {
                phase: None,
                guest: Guest::None,
                disks: false,
                is_published: false,
                is_ahead: false,
                at_work: None,
                was_told: false,
                is_settled: false,
            }
        }

        /// What a power cut may leave.
        fn after_power_cut(&self) -> Vec<World> {
            let guest = if self.guest == Guest::None { Guest::None } else { Guest::Dead };
            let cut = World { at_work: None, guest, ..self.clone() };
            if self.is_settled || self.phase.is_none() {
                return vec![cut];
            }
            // Nothing, or any part; a record that is half there counts as one of a VM that was waking.
            vec![World::empty(), World { disks: false, ..cut.clone() }, cut]
        }

        fn phase(&self) -> Option<Phase> {
            Some(match self.phase? {
                Written::Waking => Phase::Waking,
                Written::Awake => Phase::Awake,
                Written::Failed => Phase::Failed { why: "gone".to_owned() },
                Written::FallingAsleep(goes_on) => Phase::FallingAsleep(Sleep {
                    attempt: uuid::Uuid::nil(),
                    name: "vm".to_owned(),
                    then: if goes_on { Then::GoOn } else { Then::End },
                }),
            })
        }

        /// Everything that may happen next.
        fn next(&self) -> Vec<World> {
            let mut next = Vec::new();
            let with = |change: &dyn Fn(&mut World)| {
                let mut world = self.clone();
                change(&mut world);
                world
            };
            if matches!(self.guest, Guest::Runs | Guest::Paused) {
                next.push(with(&|world| world.guest = Guest::Dead));
            }
            next.extend(self.after_power_cut());
            match self.at_work {
                Some(work) => {
                    next.push(with(&|world| world.at_work = None));
                    next.push(with(&|world| world.step(work)));
                    // It may go on as soon as all is sealed.
                    if work == Work::Publish
                        && self.phase == Some(Written::FallingAsleep(true))
                        && self.guest == Guest::Paused
                    {
                        next.push(with(&|world| world.go_on()));
                    }
                }
                None => match self.phase {
                    None => next.push(with(&|world| {
                        *world = World::empty();
                        world.phase = Some(Written::Waking);
                        world.at_work = Some(Work::MakeDisks);
                    })),
                    Some(Written::Awake) if self.guest == Guest::Runs => {
                        for goes_on in [true, false] {
                            next.push(with(&|world| {
                                world.phase = Some(Written::FallingAsleep(goes_on));
                                world.is_published = false;
                                world.is_ahead = false;
                                world.at_work = Some(Work::Pause);
                            }));
                        }
                    }
                    Some(_) => next.push(with(&|world| world.repair())),
                },
            }
            next
        }

        fn step(&mut self, work: Work) {
            let goes_on = self.phase == Some(Written::FallingAsleep(true));
            let lives = matches!(self.guest, Guest::Runs | Guest::Paused);
            self.at_work = match work {
                Work::MakeDisks => {
                    self.disks = true;
                    Some(Work::StartVmm)
                }
                Work::StartVmm => {
                    self.guest = Guest::Paused;
                    Some(Work::Load)
                }
                // A VMM that died is noticed by the call that it does not answer: the lock is let go of,
                // as after a crash.
                Work::Load | Work::LetGo | Work::Pause | Work::SaveAndSeal | Work::ResumeAfter
                    if !lives =>
                {
                    None
                }
                Work::Load => Some(Work::Settle),
                Work::Settle => {
                    self.is_settled = true;
                    Some(Work::LetGo)
                }
                Work::LetGo => {
                    self.guest = Guest::Runs;
                    Some(Work::WriteAwake)
                }
                Work::WriteAwake => {
                    self.phase = Some(Written::Awake);
                    Some(Work::Tell)
                }
                Work::Tell => {
                    self.was_told = true;
                    None
                }
                Work::Pause => {
                    self.guest = Guest::Paused;
                    Some(Work::SaveAndSeal)
                }
                Work::SaveAndSeal => Some(Work::Publish),
                Work::Publish => {
                    self.is_published = true;
                    Some(match (goes_on, self.guest) {
                        (false, _) => Work::EndVmm,
                        (true, Guest::Runs) => Work::WriteAwakeAfter,
                        (true, _) => Work::ResumeAfter,
                    })
                }
                Work::EndVmm => {
                    self.guest = Guest::None;
                    Some(Work::RemoveAll)
                }
                Work::RemoveAll => {
                    self.disks = false;
                    self.is_settled = false;
                    self.phase = None;
                    None
                }
                Work::ResumeAfter => {
                    self.go_on();
                    Some(Work::WriteAwakeAfter)
                }
                Work::WriteAwakeAfter => {
                    self.phase = Some(Written::Awake);
                    None
                }
            };
        }

        fn go_on(&mut self) {
            self.guest = Guest::Runs;
            self.is_ahead = true;
        }

        /// Whether a snapshot has all that there is of the guest's life.
        fn is_stored(&self) -> bool {
            self.is_published && !self.is_ahead
        }

        fn repair(&mut self) {
            let lives = matches!(self.guest, Guest::Runs | Guest::Paused);
            let seen = Seen { vmm_lives: lives, is_published: self.is_published };
            let Some(phase) = self.phase() else { return };
            match phase.repair(seen) {
                Repair::None => {}
                Repair::Remove => {
                    self.guest = Guest::None;
                    self.disks = false;
                    self.is_settled = false;
                    self.phase = None;
                }
                Repair::Resume => {
                    self.go_on();
                    self.phase = Some(Written::Awake);
                }
                Repair::Fail => self.phase = Some(Written::Failed),
            }
        }

        fn check(&self, before: Option<&World>) {
            let is_at_rest = self.at_work.is_none();
            if self.phase.is_none() && is_at_rest {
                assert!(!self.disks, "disks are left: {self:?}");
                assert!(
                    matches!(self.guest, Guest::None | Guest::Dead),
                    "a guest that nobody knows of: {self:?}"
                );
            }
            if matches!(
                self.phase,
                Some(Written::Awake | Written::FallingAsleep(_) | Written::Failed)
            ) {
                assert!(self.disks, "a VM has lost its disks: {self:?}");
            }
            // It may tell the world what it was told is durable.
            assert!(self.guest != Guest::Runs || self.is_settled, "{self:?}");
            let Some(before) = before else { return };
            if before.was_told && before.disks && !self.disks {
                assert!(
                    self.is_stored(),
                    "a VM was removed that nothing has: {before:?} → {self:?}"
                );
            }
            if before.guest == Guest::Runs && self.guest == Guest::None {
                assert!(
                    self.is_stored() || !before.was_told,
                    "a guest that runs was ended: {before:?} → {self:?}"
                );
            }
        }
    }

    #[test]
    fn no_order_of_steps_and_crashes_loses_a_vm_or_leaves_one_behind() {
        let mut seen = BTreeSet::from([World::empty()]);
        let mut queue = VecDeque::from([World::empty()]);
        while let Some(world) = queue.pop_front() {
            for next in world.next() {
                next.check(Some(&world));
                if seen.insert(next.clone()) {
                    queue.push_back(next);
                }
            }
        }
        assert!(seen.len() > 60, "{} worlds are too few to mean anything", seen.len());
        // Wherever nobody is at work, one repair brings the VM to rest: a second one finds nothing to do.
        for world in seen.iter().filter(|world| world.at_work.is_none()) {
            let mut once = world.clone();
            once.repair();
            let mut twice = once.clone();
            twice.repair();
            assert_eq!(once, twice, "from {world:?}");
            let is_paused = once.guest == Guest::Paused;
            assert!(!is_paused, "a guest stays paused with nobody at it: {once:?}");
        }
    }

    #[test]
    fn phases_are_written_as_they_are_read() {
        let sleep = Sleep { attempt: uuid::Uuid::nil(), name: "vm".to_owned(), then: Then::GoOn };
        for phase in [
            Phase::Waking,
            Phase::Awake,
            Phase::FallingAsleep(sleep),
            Phase::Failed { why: "x".to_owned() },
        ] {
            let text = serde_json::to_string(&phase).unwrap();
            assert!(text.contains(phase.word()), "{text}");
            assert_eq!(serde_json::from_str::<Phase>(&text).unwrap(), phase);
        }
    }
}
