//! Serves guests' memory page by page, over userfaultfd.
//!
//! A VMM that wakes a snapshot maps anonymous memory, makes a userfaultfd of it, and hands that over
//! a unix socket, with the list of its regions ([`handshake`]). From then on every page it touches for
//! the first time is a fault that a thread of ours answers ([`Pager`]) from the image
//! ([`MemorySource`]), verified. What each page is stands in [`Pages`](dormouse_live::pages::Pages),
//! so that the pages which the guest changed are known when it sleeps again ([`Capture`]).
//!
//! # Invariants
//!
//! - **Never other bytes.** A page that cannot be read, an address that is in no region, a panic: the
//!   VMM is stopped by SIGKILL, and why is told. It is never given zeros and never left to hang.
//! - **What a guest gave back is zero**, in whatever order the kernel tells it; see
//!   [`Vm`] for the lock that makes it so.
//! - **The first write to a page is told before it happens**, as each page is installed and protected
//!   at once.
//! - **A server that is killed is taken over**: whatever it knew lies in memory that outlives it.

pub mod handshake;
mod source;
mod vm;
mod pager;
mod prefetch;
mod capture;
mod stats;

pub use self::capture::Capture;
pub use self::pager::{Pager, PagerConfig};
pub use self::source::{Content, Effort, Keeper, MemorySource, Piece, SourceError};
pub use self::stats::VmStats;
pub use self::vm::{End, Vm, VmConfig};
