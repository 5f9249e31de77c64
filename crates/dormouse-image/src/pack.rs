//! Packs: what one commit added, as one stretch of bytes.
//!
//! A pack has two sides. The *logical* one never changes: numbered slots with the digest of the
//! block that each holds, and numbered map nodes. Its hash is the pack's id, so a reference to a
//! pack and slot commits to the content. The *physical* one may be written again under the same
//! id: frames regrouped, dead slots and nodes dropped, several packs in one file (a *bundle*).
//!
//! ```text
//! header │ record … │ toc record │ footer
//! ```
//!
//! Records are frames (up to 16 blocks, compressed together), segments (the digests of 1,024 slots
//! and where their frames lie), nodes, and what a rewrite dropped. Every record carries its length, a checksum and its
//! pack's salt, so the table of contents can be rebuilt by walking the records, and a pack that
//! lies inside a guest's disk is not taken for one of ours. `docs/format.md` draws every byte.

mod bundle;
mod dropped;
mod frame;
mod id;
mod layout;
mod reader;
mod rebuild;
mod repair;
mod rewrite;
mod segment;
mod toc;
mod writer;

pub use bundle::{Bundle, BundleEntry, write_bundle_end};
pub use frame::{DecodedFrame, EncodedFrame, FRAME_BLOCKS, FRAME_BYTES, LazyFrame};
pub use id::{PackId, PackIdParts};
pub use layout::{FOOTER_BYTES, HEADER_BYTES, PackParams, RECORD_HEADER_BYTES};
pub use reader::{PackReader, ReadAt};
pub use rebuild::rebuild_pack;
pub use repair::{RepairedPack, repair_pack};
pub use rewrite::{Live, rewrite_pack};
pub use segment::{SEGMENT_FRAMES, SEGMENT_SLOTS, Segment};
pub use toc::{NodeEntry, SegmentEntry, Toc};
pub use writer::{FinishedPack, PackWriter};
