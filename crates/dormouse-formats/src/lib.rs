//! Other systems' snapshots of microVMs, taken into a store and given back.
//!
//! ```text
//!  path ──► detect ──► a format's look ──► Found: generations, oldest first, each with its images
//!                        parse, check        │    as layers, files or bytes; nothing read but headers
//!                                            ▼
//!                                         import ──► Store::commit, once a generation ──► verify
//!
//!  Store ──► Line: snapshots from a base on ──► a format's export ──► a folder or file, published whole
//! ```
//!
//! - A format is a module. Its parsers take bytes, or a [`RandomRead`](data::RandomRead) where a file
//!   is too long to be held, know neither paths nor the store, and have a fuzz target each.
//! - [`page_map`] is what the headers of wrenn and E2B come down to: which page of which build each
//!   page of a device is. It covers its device without gap or overlap, or is not made at all, and it
//!   joins runs only where their storage runs on, too.
//! - [`data`] presents a map and its files to the store as a layer with its own runs, which are found
//!   while they are walked. So an import streams into a commit without a temporary copy or a list,
//!   reads only what changed since the generation before, and never the holes of a file.
//! - `foreign_folder` opens what lies in a foreign folder, and nothing that a link or a name leads to
//!   outside of it.
//! - [`verify`](mod@verify) compares what was stored on another way through the source: headers read
//!   again by other code, record by record, files from their first byte to their last, frames decoded
//!   as one stream, without the maps, frame tables, lookups and hole lists that the import went by.
//!
//! The crate depends on `dormouse-store`, whose `Source` and `CommitRequest` an import is made of and
//! whose readers an export reads; traits of our own in between would say the same in other words.
//! What keeps parsing and I/O apart is the rule above, not the order of crates. It depends neither on
//! servers nor on the command.
//!
//! Memory is 12 bytes for each run of a device and generation, at most 8 million of one and 32 million of all, 128 MiB of
//! decoded frames, and 64 MiB for each thread that decodes a frame.
#![forbid(unsafe_code)]

pub mod format;
pub mod detect;
pub mod import;
pub mod export;
pub mod verify;
pub mod page_map;
pub mod records;
pub mod data;
pub mod replay;
pub mod wrenn;
pub mod e2b;
pub mod firecracker;
pub mod cloud_hypervisor;
pub mod qemu;
pub mod dm_snapshot;
pub mod disk;
pub mod raw;
pub mod carry;
pub mod error;
mod fields;
mod stable_file;
mod stored;
mod foreign_folder;
mod rank;
