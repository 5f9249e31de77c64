//! E2B's builds: headers of versions 1 to 5, and data objects that are plain, zstd or LZ4.
//!
//! ```text
//! {build}/memfile[.zstd|.lz4]       {build}/memfile.header        memory
//! {build}/rootfs.ext4[.zstd|.lz4]   {build}/rootfs.ext4.header    disk
//! {build}/snapfile                  {build}/metadata.json         Firecracker's state; what it was for
//! ```
//!
//! The same keys are used in a bucket and in a folder. A header is flat: each page of the device lies
//! in the data of the build itself or of any ancestor, or is zero. How an ancestor's data is
//! compressed does not stand in its object's name alone, see [`build`].

pub mod build;
pub mod frames;
pub mod header;
mod columns;
mod lz4_frame;
mod write;

pub use build::{BUILD_LABEL, look};
pub use write::export;
