//! Plain versions of what Dormouse does, to compare results and speed with.
//!
//! Each is written anew from a description of what the other does; none has its code.

pub mod e2b_diff;
pub mod qemu_qcow2;
pub mod wrenn_diff;
pub mod wrenn_scan;
