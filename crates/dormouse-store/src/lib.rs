//! Commit, read, verify and collect snapshots of microVMs.
//!
//! A [`Store`](store::Store) is a folder. A *commit* puts a guest's memory, its disks and the VMM's
//! state into it as one durable [snapshot](store::Snapshot): holes are not read, zero blocks not
//! stored, and a block that is stored anywhere already (at the same offset of the parent, elsewhere
//! in its memory, on a disk, in another lineage) is not stored again. What is new goes into one
//! pack, compressed; then a small [`Manifest`](manifest::Manifest) is published, which is the one
//! commit point. A snapshot reads the same at generation 1 and at 2,500, because its maps name
//! blocks, never parents.
//!
//! ```
//! use dormouse_store::commit::CommitRequest;
//! use dormouse_store::name::{ImageName, Name};
//! use dormouse_store::progress::Job;
//! use dormouse_store::source::Source;
//! use dormouse_store::store::{Config, Store};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let (dir, ram) = (folder.path().join("store"), folder.path().join("ram"));
//! # std::fs::write(&ram, vec![7; 1 << 20])?;
//! let store = Store::init(&dir, Config::STANDARD)?;
//! let request = CommitRequest::new(Name::new("vm")?)
//!     .image(ImageName::Memory, Source::File(ram.clone()));
//! let report = store.commit(request, Job::quiet())?;
//! assert_eq!(report.manifest.display_name(), "vm@1");
//!
//! let snapshot = store.snapshot(&"vm".parse()?)?;
//! let memory = snapshot.image(&ImageName::Memory)?;
//! let mut page = [0; 4096];
//! memory.read_at(&mut page, 8192)?;
//! assert_eq!(page, [7; 4096]);
//! # Ok(())
//! # }
//! ```
//!
//! Everything that is read is checked: blocks against their keyed digests, structures against
//! checksums. What does not match is an [`Error`](error::Error) with what, where, got and expected,
//! never other bytes.
//!
//! Any number of processes may commit, read, remove and collect at once. What a process relies on it
//! *pins*; collections delete only what neither a manifest nor a pin reaches. The module `pin` tells
//! the protocol, `layout` the folder, `docs/format.md` every byte.
//!
//! # Memory
//!
//! Bounded whatever the guests' size: the caches and filters of [`Config`](store::Config), and while
//! committing, for each thread 6 pieces of 512 KiB and 32 frames of 64 KiB, 24 MiB for the digests
//! of the newest 900,000 new blocks (older ones are spilled to `tmp/`), and 32 bytes for each leaf of
//! 32 MiB and each 4 MiB of new blocks.
#![forbid(unsafe_code)]

pub mod store;
pub mod commit;
pub mod source;
pub mod reader;
pub mod manifest;
pub mod name;
pub mod gc;
pub mod trace;
pub mod usage;
pub mod verify;
pub mod punch;
pub mod disk_usage;
pub mod progress;
pub mod disk;
pub mod error;
pub mod index;
mod capture;
mod catalog;
mod envelope;
mod layout;
mod live;
mod pin;
mod packs;
mod reach;
