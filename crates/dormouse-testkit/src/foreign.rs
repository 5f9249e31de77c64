//! Writers and readers of other systems' snapshots, made from descriptions of their bytes alone.
//!
//! They share no code with what they test, know one layout each, and check nothing.
#![expect(clippy::cast_possible_truncation, reason = "devices of tests are small")]

pub mod cloud_hypervisor;
pub mod dm_snapshot;
pub mod e2b;
pub mod firecracker;
pub mod lz4;
pub mod qemu;
pub mod random;
pub mod wrenn;
