//! The servers against clients we did not write, and against clients nobody should write.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed lock is a failed test, and what is cast is small"
)]

mod memory;
mod pager;
mod wire;
mod judges;
mod hostile;
mod orderly;
mod secure;
mod fuse;
mod fuse_tree;
mod takeover;
