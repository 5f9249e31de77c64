//! Images against judges we did not write: e2fsck, the kernel, dumpe2fs, debugfs, resize2fs,
//! mke2fs and ext4-view.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod archive;
mod build;
mod folders;
mod grow;
mod hostile;
mod judge;
mod layers;
mod mkext4;
mod oci;
mod options;
mod past_cache;
mod random;
mod reader;
mod sample;
mod sink;
