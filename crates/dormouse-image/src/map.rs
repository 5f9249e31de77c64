//! Maps: how an image's blocks lie in packs.
//!
//! A map is a tree over the image's blocks. A [`Leaf`] covers 32 MiB and holds sorted extents; an
//! [`Inner`] node has up to 512 children. A child that holds nothing but zeros has no node at all,
//! and a node that a commit did not change is shared with the parent image, so that a map costs
//! what changed and reads cost the same at any generation.
//!
//! Nodes live in packs and are named by pack and number ([`NodeRef`]); a pack's id commits to the
//! digests of its nodes, so a reference to a root commits to the whole image.

mod leaf;
mod node;
mod tree;
mod varint;

pub use leaf::{Extent, LEAF_BLOCKS, LEAF_BYTES, Leaf, LeafBuilder, LeafDiff, Source};
pub use node::{CHILDREN_MAX, Inner, NODE_BYTES_MAX, Node, NodeRef};
pub use tree::{Map, MapDiff, MapUpdate, NodeSink, NodeSource};
