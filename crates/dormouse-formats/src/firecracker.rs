//! Firecracker's snapshots.

pub mod vmstate;
