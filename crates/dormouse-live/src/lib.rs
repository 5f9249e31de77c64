//! Live disks: a guest's writable disk over an image that never changes.
//!
//! An [`Overlay`](overlay::Overlay) keeps what the guest wrote since the image in *layers*: sparse
//! files with each block at its own offset, and a log that says which blocks count. Zeros take no
//! space, wherever they come from. What was flushed survives a power cut; of the rest, each sector
//! is old or new. What was answered survives the process, see [`notes`].
//!
//! A commit *seals* the overlay: an empty layer goes on top, which takes microseconds whatever
//! the disk's size, and the [`Sealed`](overlay::Sealed) layers below are read and stored while the
//! guest writes on. Then the overlay is *rebased* onto the new image. If the commit fails, nothing
//! was lost and nothing has to be undone.
//!
//! ```
//! use std::sync::Arc;
//! use dormouse_live::base::BlankBase;
//! use dormouse_live::files::RealFolder;
//! use dormouse_live::overlay::{NewOverlay, Overlay, OverlayConfig, SealedRun};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! let folder = Arc::new(RealFolder::new(folder));
//! let new = NewOverlay {
//!     size_bytes: 1 << 30,
//!     base: Arc::new(BlankBase),
//!     base_label: "nothing".to_owned(),
//! };
//! let disk = Overlay::create(folder, new, OverlayConfig::STANDARD)?;
//! disk.write_at(b"the guest's", 5000)?;
//! disk.flush()?;
//!
//! let sealed = disk.seal()?;
//! disk.write_at(b"its next", 5000)?;
//! let mut runs = Vec::new();
//! sealed.for_each_run(&mut |range, run| {
//!     runs.push((range, run));
//!     Ok(())
//! })?;
//! assert_eq!(runs, [(4096..8192, SealedRun::Dirty)]);
//! let mut word = [0; 3];
//! sealed.read_at(&mut word, 5000)?;
//! assert_eq!(&word, b"the");
//! disk.read_at(&mut word, 5000)?;
//! assert_eq!(&word, b"its");
//! # Ok(())
//! # }
//! ```
//!
//! Memory: three bits for each block of a chunk of 128 MiB that was touched, in each layer, 16
//! bytes for each other chunk, and one bit at most for what the log says. Nothing is allocated for
//! a request.
#![forbid(unsafe_code)]

pub mod base;
pub mod description;
pub mod error;
mod failures;
pub mod files;
mod layer;
pub mod notes;
pub mod overlay;
pub mod pages;
mod stack;
pub mod state_log;
pub mod states;
mod sync;
pub mod trace;
