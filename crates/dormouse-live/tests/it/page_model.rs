//! Every order of steps that two threads of a handler, two threads of a guest and one that gives a
//! page back can take on one page, explored against a model of the kernel.
//!
//! The kernel's rules are those seen on Linux 6.18: faults are read before removals whatever came
//! first; while a removal is unread, and until its thread runs again, nothing can be installed; the
//! page is taken away after that. The handler is the code in use ([`PageState`]) in the order in
//! which the pager takes its steps. What is checked: a read gives what was written last, or zero from
//! the moment the page is being given back; the states agree with the kernel whenever nobody is at
//! work; nobody waits for ever.

use std::collections::{HashSet, VecDeque};

use dormouse_live::pages::{Answer, PageEvent, PageState, Tracking, Wait};

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Content {
    Zero,
    Image,
    Written,
}

/// A rule that the handler forgets, to see that the exploration would notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Forgets {
    Nothing,
    /// Notes what was given back after it let go of the lock.
    LockWhileNoting,
    /// Chooses the answer before it takes the lock.
    LockWhileChoosing,
    /// Does not wake who waits for a page that turned out to be there.
    WakeAtExists,
    /// Takes a busy mapping for an answer.
    Deferring,
    /// Serves a page that was given back from the image.
    Zeros,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Guest {
    /// About to do what is left of its plan.
    Runs { left: u8 },
    /// Waits for the handler; the message was read or not.
    Waits { left: u8, wait: Wait, is_read: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Giver {
    Before {
        left: u8,
    },
    /// `madvise` has begun; its message is unread.
    Told {
        left: u8,
    },
    /// The message was read, but the thread did not run yet.
    Read {
        left: u8,
    },
    /// It runs, the page not yet taken away.
    Running {
        left: u8,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Handler {
    Idle,
    /// Has read that the page was given back, and not noted it (a forgetful one).
    ToNote {
        faults: Vec<Wait>,
    },
    Serving {
        faults: Vec<Wait>,
    },
    /// Holds the shared lock (or should).
    Chosen {
        faults: Vec<Wait>,
        answer: Answer,
    },
    Done {
        faults: Vec<Wait>,
        answer: Answer,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    page: Option<(Content, bool)>,
    /// What a read must give; zero too while the page is being given back.
    truth: Content,
    state: PageState,
    was_removed: bool,
    guests: [Guest; 2],
    giver: Giver,
    handlers: [Handler; 2],
}

/// What the two threads of the guest do, last first: whether they write.
const PLANS: [[bool; 2]; 2] = [[false, true], [true, false]];

struct Explorer {
    forgets: Forgets,
    tracking: Tracking,
}

impl Explorer {
    fn explore(&self) -> Result<usize, String> {
        let first = World {
            page: None,
            truth: Content::Image,
            state: PageState::Missing,
            was_removed: false,
            guests: [Guest::Runs { left: 2 }, Guest::Runs { left: 2 }],
            giver: Giver::Before { left: 2 },
            handlers: [Handler::Idle, Handler::Idle],
        };
        let mut seen = HashSet::from([first.clone()]);
        let mut queue = VecDeque::from([first]);
        while let Some(world) = queue.pop_front() {
            self.check(&world)?;
            let next = self.steps(&world)?;
            let is_over = world.guests.iter().all(|guest| *guest == Guest::Runs { left: 0 })
                && world.giver == Giver::Before { left: 0 };
            if next.is_empty() && !is_over {
                return Err(format!("somebody waits for ever: {world:?}"));
            }
            for world in next {
                if seen.insert(world.clone()) {
                    queue.push_back(world);
                }
            }
        }
        Ok(seen.len())
    }

    /// Whether states and kernel agree, where nobody is about to change either.
    fn check(&self, world: &World) -> Result<(), String> {
        if world.handlers.iter().any(|handler| {
            matches!(
                handler,
                Handler::Chosen { .. } | Handler::Done { .. } | Handler::ToNote { .. }
            )
        }) {
            return Ok(());
        }
        let agrees = match (world.page, world.state) {
            (None, PageState::Missing) => world.truth == Content::Image || self.is_giving(world),
            (None, PageState::Removed) => true,
            // Installed in the moment before the kernel took it away.
            (None, _) => world.was_removed && world.truth == Content::Zero,
            (Some(_), PageState::Missing) => false,
            // About to be taken away.
            (Some(_), PageState::Removed) => {
                matches!(world.giver, Giver::Read { .. } | Giver::Running { .. })
            }
            (Some((content, true)), PageState::Clean) => content == Content::Image,
            (Some((content, true)), PageState::Zero) => content == Content::Zero,
            (Some((_, false)), PageState::Clean | PageState::Zero) => false,
            (Some(_), PageState::Dirty) => true,
        };
        if agrees { Ok(()) } else { Err(format!("states and kernel disagree: {world:?}")) }
    }

    fn is_giving(&self, world: &World) -> bool {
        !matches!(world.giver, Giver::Before { .. })
    }

    fn steps(&self, world: &World) -> Result<Vec<World>, String> {
        let mut next = Vec::new();
        for number in 0..2 {
            self.guest_step(world, number, &mut next)?;
            self.handler_step(world, number, &mut next)?;
        }
        self.giver_step(world, &mut next);
        Ok(next)
    }

    fn guest_step(
        &self,
        world: &World,
        number: usize,
        next: &mut Vec<World>,
    ) -> Result<(), String> {
        let Guest::Runs { left } = world.guests[number] else { return Ok(()) };
        if left == 0 {
            return Ok(());
        }
        let writes = PLANS[number][usize::from(left) - 1];
        let mut world = world.clone();
        let wait = match (world.page, writes) {
            (None, false) => Some(Wait::Read),
            (None, true) => Some(Wait::Write),
            (Some((_, true)), true) => Some(Wait::ProtectedWrite),
            (Some(_), _) => None,
        };
        match wait {
            Some(wait) => world.guests[number] = Guest::Waits { left, wait, is_read: false },
            None if writes => {
                world.page = Some((Content::Written, false));
                world.truth = Content::Written;
                world.guests[number] = Guest::Runs { left: left - 1 };
            }
            None => {
                let Some((content, _)) = world.page else { return Ok(()) };
                let may_be_zero = self.is_giving(&world);
                if content != world.truth && !(content == Content::Zero && may_be_zero) {
                    return Err(format!(
                        "a read gave {content:?}, not {:?}: {world:?}",
                        world.truth
                    ));
                }
                // Whoever read zero sees zero from then on.
                world.truth = content;
                world.guests[number] = Guest::Runs { left: left - 1 };
            }
        }
        next.push(world);
        Ok(())
    }

    fn giver_step(&self, world: &World, next: &mut Vec<World>) {
        let mut world = world.clone();
        world.giver = match world.giver {
            Giver::Before { left: 0 } | Giver::Told { .. } => return,
            Giver::Before { left } => Giver::Told { left: left - 1 },
            Giver::Read { left } => Giver::Running { left },
            Giver::Running { left } => {
                world.page = None;
                world.truth = Content::Zero;
                Giver::Before { left }
            }
        };
        next.push(world);
    }

    fn handler_step(
        &self,
        world: &World,
        number: usize,
        next: &mut Vec<World>,
    ) -> Result<(), String> {
        let mut world = world.clone();
        // Reading takes the lock alone; choosing, carrying out and noting an answer share it.
        let may_read = match &world.handlers[1 - number] {
            Handler::Chosen { .. } => self.forgets == Forgets::LockWhileChoosing,
            Handler::Done { .. } => false,
            Handler::Idle | Handler::ToNote { .. } | Handler::Serving { .. } => true,
        };
        match world.handlers[number].clone() {
            Handler::Idle => {
                if !may_read || !self.read(&mut world, number, Vec::new()) {
                    return Ok(());
                }
            }
            Handler::ToNote { faults } => {
                world.state = world.state.after(PageEvent::Removed).expect("always");
                world.was_removed = true;
                world.handlers[number] = Handler::Serving { faults };
            }
            Handler::Serving { faults } => {
                world.handlers[number] = match faults.last() {
                    None => Handler::Idle,
                    Some(wait) => {
                        let answer = self.answer(&world, *wait);
                        Handler::Chosen { faults, answer }
                    }
                };
            }
            Handler::Chosen { faults, answer } => {
                let is_busy = matches!(world.giver, Giver::Told { .. } | Giver::Read { .. });
                if answer == Answer::Wake || !is_busy {
                    let answer = self.carry_out(&mut world, answer);
                    world.handlers[number] = Handler::Done { faults, answer };
                } else if self.forgets == Forgets::Deferring {
                    world.handlers[number] = Handler::Done { faults, answer: Answer::Wake };
                } else {
                    // Lets go of the lock, reads, tries again.
                    world.handlers[number] = Handler::Serving { faults: faults.clone() };
                    if may_read {
                        self.read(&mut world, number, faults);
                    }
                }
            }
            Handler::Done { mut faults, answer } => {
                if let Some(event) = PageState::noted(answer, self.tracking) {
                    world.state = world
                        .state
                        .after(event)
                        .map_err(|broken| format!("{broken}: {world:?}"))?;
                }
                faults.pop();
                world.handlers[number] = Handler::Serving { faults };
            }
        }
        next.push(world);
        Ok(())
    }

    /// Reads all messages, faults first, and notes what was given back; false if there are none.
    fn read(&self, world: &mut World, number: usize, mut faults: Vec<Wait>) -> bool {
        let had = faults.len();
        for guest in &mut world.guests {
            if let Guest::Waits { wait, is_read, .. } = guest
                && !*is_read
            {
                *is_read = true;
                faults.push(*wait);
            }
        }
        let is_told = matches!(world.giver, Giver::Told { .. });
        if faults.len() == had && !is_told {
            return false;
        }
        if let Giver::Told { left } = world.giver {
            world.giver = Giver::Read { left };
            if self.forgets == Forgets::LockWhileNoting {
                world.handlers[number] = Handler::ToNote { faults };
                return true;
            }
            world.state = world.state.after(PageEvent::Removed).expect("always");
            world.was_removed = true;
        }
        world.handlers[number] = Handler::Serving { faults };
        true
    }

    fn answer(&self, world: &World, wait: Wait) -> Answer {
        match world.state.answer(wait, world.was_removed, self.tracking) {
            Answer::Zeros { protected } if self.forgets == Forgets::Zeros => {
                Answer::Image { protected }
            }
            answer => answer,
        }
    }

    /// What the kernel makes of an answer: what was carried out.
    fn carry_out(&self, world: &mut World, answer: Answer) -> Answer {
        let mut carried_out = answer;
        match (answer, &mut world.page) {
            // Nothing to let be written to: the write comes again, and finds the page missing.
            (Answer::Wake, _) | (Answer::LetWrite, None) => {}
            (Answer::LetWrite | Answer::ZerosOrLetWrite, Some((_, protected))) => {
                *protected = false;
            }
            (Answer::ZerosOrLetWrite, page) => *page = Some((Content::Zero, false)),
            (Answer::Image { .. } | Answer::Zeros { .. }, Some(_)) => {
                carried_out = Answer::Wake;
                if self.forgets == Forgets::WakeAtExists {
                    return carried_out;
                }
            }
            (Answer::Image { protected }, page) => *page = Some((Content::Image, protected)),
            (Answer::Zeros { protected }, page) => *page = Some((Content::Zero, protected)),
        }
        for guest in &mut world.guests {
            if let Guest::Waits { left, is_read: true, .. } = *guest {
                *guest = Guest::Runs { left };
            }
        }
        carried_out
    }
}

#[test]
fn no_order_of_steps_shows_a_wrong_page_or_leaves_a_thread_waiting() {
    for tracking in [Tracking::Exact, Tracking::Off] {
        let worlds = Explorer { forgets: Forgets::Nothing, tracking }.explore().unwrap();
        assert!(worlds > 10_000, "{worlds} worlds are too few to be all of them");
    }
}

#[test]
fn a_handler_that_forgets_a_rule_is_found_out() {
    for forgets in [
        Forgets::LockWhileNoting,
        Forgets::LockWhileChoosing,
        Forgets::WakeAtExists,
        Forgets::Deferring,
        Forgets::Zeros,
    ] {
        let found = Explorer { forgets, tracking: Tracking::Exact }.explore();
        assert!(found.is_err(), "{forgets:?} went unnoticed");
    }
}
