//! Other systems' snapshots of microVMs, taken into a store and given back.
#![forbid(unsafe_code)]

pub mod format;
pub mod detect;
pub mod import;
pub mod export;
pub mod verify;
pub mod page_map;
pub mod records;
pub mod data;
pub mod wrenn;
pub mod e2b;
pub mod firecracker;
pub mod cloud_hypervisor;
pub mod qemu;
pub mod disk;
pub mod raw;
pub mod carry;
pub mod dm_snapshot;
pub mod error;
mod fields;
mod rank;
pub mod replay;
