//! Serves guests' memory page by page, over userfaultfd.
//!
//! A VMM that wakes a snapshot maps anonymous memory, makes a userfaultfd of it, and hands that over
//! a unix socket, with the list of its regions ([`handshake`]). From then on every page it touches for
//! the first time is a fault that a thread of ours answers ([`Pager`]) from the image
//! ([`MemorySource`]), verified. What each page is stands in [`Pages`](dormouse_live::pages::Pages),
//! so that the pages which the guest changed are known when it sleeps again ([`Capture`]).
//!
//! # Huge pages
//!
//! Regions of 2 MiB `hugetlbfs` pages are served a huge page at a time; zeros are copied, as the kernel
//! has no zero page of that size. Write protection of them is registered for as well. Linux 6.18
//! grants that although Firecracker did not ask for `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`: changes are known
//! to the huge page (512 pages of the image). Where a kernel refuses, all that was installed counts as
//! changed ([`Vm::is_tracked`]), and the guest must stay paused until a capture is read.
//!
//! # Invariants
//!
//! - **Never other bytes.** A page that cannot be read, an address that is in no region, a panic: the
//!   VMM is stopped by SIGKILL, and why is told. It is never given zeros and never left to hang.
//! - **What a guest gave back is zero**, in whatever order the kernel tells it; see
//!   [`Vm`] for the lock that makes it so.
//! - **The first write to a page is told before it happens**, as each page is installed and protected
//!   at once.
//! - **A page that a capture has yet to take is copied under the lock**, where it is sure to be there: a
//!   thread that answers faults never waits for one.
//! - **A guest that was let go of is not touched**, from the moment that was said.
//! - **Messages are lost with their guest alone**: whoever reads them passes the faults on, or stops it.
//! - **A server that is killed is taken over**: whatever it knew lies in memory that outlives it.

pub mod handshake;
mod source;
mod faults;
mod lead;
mod course;
mod vm;
mod answer;
mod pager;
mod prefetch;
mod capture;
mod stats;

pub use self::capture::Capture;
pub use self::pager::{Pager, PagerConfig};
pub use self::source::{Content, Effort, Keeper, MemorySource, Piece, SourceError};
pub use self::stats::VmStats;
pub use self::vm::{End, Vm, VmConfig};
