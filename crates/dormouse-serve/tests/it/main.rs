//! The servers against clients we did not write, and against clients nobody should write; the pager
//! against guests that know what every byte of their memory must be.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::single_range_in_vec_init,
    reason = "a failed lock is a failed test, what is cast is small, and a trace may be one range"
)]

mod memory;
mod guests;
mod pager;
mod races;
mod small_vmms;
mod take_over;
mod wire;
mod judges;
mod hostile;
mod orderly;
mod secure;
mod fuse;
mod fuse_tree;
mod takeover;

dormouse_testkit::small_vmm!();
