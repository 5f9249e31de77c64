//! The tree that `dormouse mount` shows, over a store and its live VMs.
//!
//! ```text
//! NAME/N/memory             a snapshot's images, read-only, for ever the same
//! NAME/N/disk/ID
//! NAME/N/state/NAME
//! NAME/N/manifest.json
//! live/NAME/disk/ID         a live VM's disks, read-write
//! live/NAME/memory          its memory, read-write, if it has such a file
//! capture/ID/NAME           what a VMM writes goes into the store; see `captures`
//! discard/                  files made here keep their sizes and nothing else
//! ```

mod attendance;
pub(crate) mod captures;
mod discard;
mod journal;
mod keeping;
mod live;
pub(crate) mod memories;
pub(crate) mod page_requests;
mod path;
mod removed;
mod snapshots;
mod touches;
mod tree;

pub(crate) use attendance::Attendance;
pub(crate) use keeping::{FaultFigures, MountFigures, MountKeeping, Orphan};
pub(crate) use tree::StoreTree;
