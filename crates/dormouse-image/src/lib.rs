//! The data model of Dormouse: blocks, digests, maps and packs, without sockets, threads or paths.
//!
//! An *image* is a flat byte space: a guest's memory, one of its disks, an opaque state file. It is
//! cut into 4 KiB [blocks](block). Each block is zero or stored in a numbered slot of a
//! [pack](mod@pack), compressed together with its neighbours; a [map](mod@map) says which, as sorted
//! extents in a tree that shares every node with the parent image below which nothing changed.
//!
//! ```
//! use dormouse_image::digest::DomainKey;
//! use dormouse_image::map::{Extent, Leaf, LeafBuilder, Source};
//! use dormouse_image::pack::PackId;
//!
//! let (old, new) = (PackId([1; 16]), PackId([2; 16]));
//! let mut leaf = LeafBuilder::new();
//! leaf.push(100, Source::Stored { pack: old, slot: 0 });
//! let leaf = leaf.finish();
//! // A later commit stores block 10 anew and finds block 20 zero.
//! let child = leaf.overlay(&[
//!     Extent { start: 10, len: 1, source: Source::Stored { pack: new, slot: 0 } },
//!     Extent { start: 20, len: 1, source: Source::Zero },
//! ]);
//! assert_eq!(child.lookup(11).source, Source::Stored { pack: old, slot: 11 });
//! assert_eq!(child.lookup(20).source, Source::Zero);
//!
//! let key = DomainKey::new([7; 32]);
//! assert_eq!(key.digest(&[1; 4096]), key.digest(&[1; 4096]));
//! ```
#![forbid(unsafe_code)]

pub mod block;
pub mod codec;
pub mod digest;
pub mod error;
pub mod map;
pub mod pack;
pub mod zero;
