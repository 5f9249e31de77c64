//! Where trees come from: folders, tars, OCI images, other ext4 images.

mod follow;
pub mod folder;
pub mod decode;
pub mod tar;
pub mod layers;
pub mod oci;
#[cfg(feature = "registry")]
pub mod registry;
pub mod image;
pub mod inject;
pub mod list;

/// Bounds on what an input may bring, so that a hostile one ends with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries of the tree and of all layers together.
    pub entries: u64,

    /// Bytes of a stream after it was unpacked, headers and contents together.
    pub unpacked_bytes: u64,
}

impl Limits {
    /// 16 million entries and 1 TiB: more than any image, less than a bomb.
    pub const STANDARD: Limits = Limits { entries: 16 << 20, unpacked_bytes: 1 << 40 };
}
