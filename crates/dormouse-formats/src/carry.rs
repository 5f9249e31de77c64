//! Our own: snapshots in one file, or in a pipe to another host.
//!
//! A carry has what its snapshots are and their blocks, but no key and no digest under one: the
//! receiver digests every block under its own key, and stores only what it has not. The sender leaves out
//! what the receiver says that it has: a snapshot goes as its changes over one that both have,
//! with a digest of what that one holds, as labels that say what a snapshot is can be forged.
//! Blocks travel, not packs, as packs hold other snapshots' blocks, too.
//!
//! `docs/format.md` draws the bytes. All of it can be read once, from first to last, with the memory
//! of a few records.

mod content;
mod receive;
mod record;
mod send;

pub use content::content_digest;
pub use receive::look;
pub use record::{CarriedSnapshot, Header, MAGIC, Record, RecordBody};
pub use send::send;

/// The label with the UUID that a snapshot had where it was made.
pub const ORIGIN_LABEL: &str = "carry.uuid";
