//! Make and read ext4 images without root.
//!
//! A build goes one way:
//!
//! ```text
//!  folder ─┐
//!  tar ────┤► tree ──► layout ──────────► write ──► a file, or a sink such as a store
//!  OCI ────┤  names,   sizes, groups,     metadata in the order of its blocks; contents of
//!  ext4 ───┘  inodes   blocks of all      files copied beside it, or read when asked for
//! ```
//!
//! - [`tree`] holds what is to be, in about 140 bytes an entry.
//! - [`input`] fills it. Contents of a folder stay where they are; those of a stream go at once to
//!   where they will be in the image ([`stage`]), so that every byte is moved once: into a file, or to
//!   a [`sink`] that has no way back.
//! - [`layout`] plans: the size, the groups, and for each file its first block. Blocks are given out
//!   in one ascending run that skips the copies of the superblock, so that this one number tells all
//!   of a file's blocks.
//! - [`write`](mod@write) turns plan and tree into blocks. What is zero is never written: unused
//!   inode tables and bitmaps, the journal's log and empty blocks of files are holes.
//! - [`read`] reads any ext4 image, ours or not, with its journal replayed in memory, and [`free`]
//!   tells which blocks it does not use.
//!
//! The same tree and options give the same bytes: nothing asks for a clock or a random number.
//! Checksums do not depend on the UUID (`metadata_csum_seed`), so images of nearly the same trees
//! are nearly the same.
//!
//! Memory is at most 64 MiB and 200 bytes an entry.
#![forbid(unsafe_code)]

mod crc32c;
mod disk;
pub mod error;
pub mod input;
pub mod layout;
pub mod read;
pub mod free;
pub mod sink;
pub mod stage;
pub mod tree;
pub mod write;
