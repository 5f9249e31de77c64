//! A FUSE file system: images, live disks and captures as files for tools that know nothing of us.
//!
//! What there is to see comes from a [`Tree`], which its consumer defines by paths. A [`Mount`] shows
//! it under a folder until it is unmounted. Nothing is translated: an image is a regular file with
//! the right size, holes and allocation, and what the kernel can do by itself (page cache, private
//! mappings, locks) is left to it.
//!
//! | opened as | page cache | used for |
//! |---|---|---|
//! | [`Opened::Image`] | kept for as long as the kernel likes, one for all forks | snapshots |
//! | [`Opened::Disk`] | none: every request comes to the device at once | a live VM's disks |
//! | [`Opened::Memory`] | written back by the kernel, so that it can be mapped shared | a live VM's memory |
//! | [`Opened::Sink`] | none | dumps that a VMM writes |
//!
//! # Invariants
//!
//! - **Bytes of an image reach the page cache only from the device.** An image may be opened for
//!   writing, since QEMU before 8.2 opens a memory file so even when it maps it privately; such an
//!   open is uncached, every write to it is refused, and the kernel then refuses shared mappings.
//!   For that reason `FUSE_DIRECT_IO_ALLOW_MMAP`, which is for a whole mount, is not asked for.
//! - **Inode numbers are made from paths and identities**, never from an order of events, so that
//!   they mean the same to a successor that takes the mount over (see [`Handover`]).
//! - **What can change is looked up again each time**: entries of such folders and attributes of such
//!   files are given out for no time at all, so nothing ever has to be invalidated.
//! - **An error is an error**: unreadable bytes are `EIO` to whoever asked, never zeros.

mod tree;
mod errno;
mod inodes;
mod open_file;
mod read_ahead;
mod filesystem;
mod handover;
mod mount;
mod traffic;

pub use self::handover::Handover;
pub use self::mount::{Mount, MountOptions, Unmounted, clear_stale};
pub use self::traffic::Traffic;
pub use self::tree::{
    Access, Creation, Entry, Item, Kind, Opened, Sink, Tree, TreeError, TreeErrorKind, TreeResult,
};
