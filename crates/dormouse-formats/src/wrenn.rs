//! wrenn's snapshots: the memory header of version 1, its data files, and the folder around them.
//!
//! ```text
//! snapfile          Firecracker's vmstate
//! memfile.header    records of the memory (module `records`)
//! memfile           data of a full dump, or of a merged chain
//! memfile.UUID      data of the build UUID: a diff, or the full dump under one
//! rootfs.ext4       the disk of a template, or
//! rootfs.cow        a dm-snapshot store over the template's disk, and
//! rootfs.meta       {"base_template": "/path/of/rootfs.ext4", "template_id": "…"}
//! ```
//!
//! A folder has one header, that of its newest generation, and the data of all its ancestors. What
//! the ancestors looked like cannot be told from it, for the places of what they had and lost stood
//! in their own headers. So a folder is one snapshot, and a folder of such folders is a chain.

mod folder;
pub(crate) use folder::{disk_beside, is_rootfs, write_file};
mod header;

pub use folder::{RootMeta, export, look};
pub use header::{Header, VERSION};
