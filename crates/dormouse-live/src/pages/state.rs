//! The life of a page, as a state machine without a kernel: what a page is, what is done when a
//! guest waits for it, and what it is afterwards.
//!
//! ```text
//!              image installed           first write let through
//!   missing ───────────────────► clean ─────────────────────────► dirty
//!      │ └──────── image installed for a write ───────────────────► │
//!      │ given back                 │ given back                    │ given back
//!      ▼                            ▼                               ▼
//!   removed ◄──────────────────────────────────────────────────────-┘
//!      │ zeros installed            first write let through
//!      └────────────────► zero ───────────────────────────────────► dirty
//! ```
//!
//! The rules hold for any number of threads that answer faults at once, if giving back is noted
//! under an exclusive lock together with reading it from the kernel, and each answer is chosen,
//! carried out and noted under a shared one. `tests/it/page_model.rs` explores all of it.

use std::fmt;

/// What a page of a guest's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum PageState {
    /// Not in the guest's memory; its content is the image's.
    Missing = 0,

    /// In the guest's memory, unchanged since it was installed or last captured.
    Clean = 1,

    /// In the guest's memory, and the guest may have changed it.
    Dirty = 2,

    /// In the guest's memory and zero since the guest gave it back.
    Zero = 3,

    /// Given back by the guest: not in its memory, and zero.
    Removed = 4,
}

/// What was done to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageEvent {
    /// The image's content was installed; the first write to it will be told.
    ImageInstalled,

    /// Zeros were installed for a page that was given back; the first write to it will be told.
    ZerosInstalled,

    /// It was installed for a write, or a write was let through.
    MadeWritable,

    /// The guest gave it back.
    Removed,

    /// Its content was taken, or is bound to be before the next write; that write will be told.
    Captured,

    /// The capture came to nothing.
    CaptureFailed,
}

/// Why a guest's thread waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wait {
    /// It reads a page that is missing.
    Read,

    /// It writes to a page that is missing.
    Write,

    /// It writes to a page that is protected.
    ProtectedWrite,
}

/// What makes a thread that waits go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// Install the image's content.
    Image {
        /// Whether the next write must be told.
        protected: bool,
    },

    /// Install zeros.
    Zeros {
        /// Whether the next write must be told.
        protected: bool,
    },

    /// Let it write to the page that is there.
    LetWrite,

    /// Install zeros that can be written to; where a page is there, let it write to that.
    ZerosOrLetWrite,

    /// Wake it, to try again: somebody else has answered meanwhile, or soon will.
    Wake,
}

/// Whether first writes are to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// Every page is protected until the guest writes to it.
    Exact,

    /// Whatever was installed counts as dirty.
    Off,
}

/// An event that cannot have happened to a page in this state: the content of a guest would be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokenRule {
    /// What the page was.
    pub state: PageState,
    /// What is said to have been done to it.
    pub event: PageEvent,
}

impl fmt::Display for BrokenRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} cannot happen to a page that is {:?}", self.event, self.state)
    }
}

impl PageState {
    /// The state after an event.
    ///
    /// Answers to the same page race: one that was carried out later may be noted earlier. So a page
    /// that is dirty stays dirty when the installation that came before it is noted.
    pub fn after(self, event: PageEvent) -> Result<PageState, BrokenRule> {
        use PageEvent::{
            CaptureFailed, Captured, ImageInstalled, MadeWritable, Removed, ZerosInstalled,
        };
        use PageState::{Clean, Dirty, Missing, Zero};
        match (self, event) {
            (Missing | Clean, ImageInstalled) => Ok(Clean),
            (Dirty, ImageInstalled | ZerosInstalled) => Ok(Dirty),
            (Clean | PageState::Removed | Zero, ZerosInstalled) => Ok(Zero),
            (_, MadeWritable) => Ok(Dirty),
            (_, Removed) => Ok(PageState::Removed),
            (Clean | Dirty, Captured) => Ok(Clean),
            (Clean | Dirty, CaptureFailed) => Ok(Dirty),
            (state, CaptureFailed) => Ok(state),
            (state, event) => Err(BrokenRule { state, event }),
        }
    }

    /// How to answer a thread that waits for a page in this state.
    ///
    /// `was_removed`: whether the guest ever gave the page back. A page that was installed again in
    /// the moment between that being read and the kernel taking the page away is gone although it
    /// counts as installed. What such a page held is zero. Any other page that counts as installed is
    /// there: its fault was answered by somebody else.
    pub fn answer(self, wait: Wait, was_removed: bool, tracking: Tracking) -> Answer {
        let protected = wait == Wait::Read && tracking == Tracking::Exact;
        match (self, wait) {
            (PageState::Clean | PageState::Zero | PageState::Dirty, Wait::ProtectedWrite) => {
                Answer::LetWrite
            }
            // Not yet noted as installed, but protected it can only be if it is.
            (PageState::Missing, Wait::ProtectedWrite) => Answer::LetWrite,
            // The kernel has taken it away, is about to, or could not (the memory was locked
            // meanwhile): then it is there for good, and waking would go on for ever.
            (PageState::Removed, Wait::ProtectedWrite) => Answer::ZerosOrLetWrite,
            (PageState::Missing, _) => Answer::Image { protected },
            (PageState::Removed, _) => Answer::Zeros { protected },
            (_, _) if was_removed => Answer::Zeros { protected },
            (PageState::Clean | PageState::Zero | PageState::Dirty, _) => Answer::Wake,
        }
    }

    /// The event that an answer is noted as, once it was carried out.
    pub fn noted(answer: Answer, tracking: Tracking) -> Option<PageEvent> {
        match (answer, tracking) {
            (Answer::Wake, _) => None,
            (Answer::LetWrite | Answer::ZerosOrLetWrite, _) | (_, Tracking::Off) => {
                Some(PageEvent::MadeWritable)
            }
            (Answer::Image { protected: false } | Answer::Zeros { protected: false }, _) => {
                Some(PageEvent::MadeWritable)
            }
            (Answer::Image { protected: true }, _) => Some(PageEvent::ImageInstalled),
            (Answer::Zeros { protected: true }, _) => Some(PageEvent::ZerosInstalled),
        }
    }

    pub(super) fn from_bits(bits: u8) -> PageState {
        match bits {
            0 => PageState::Missing,
            1 => PageState::Clean,
            2 => PageState::Dirty,
            3 => PageState::Zero,
            _ => PageState::Removed,
        }
    }
}
