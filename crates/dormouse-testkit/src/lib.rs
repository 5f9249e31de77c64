//! Guests, models and faults for testing Dormouse; a dev-dependency, never published.
#![forbid(unsafe_code)]

pub mod baseline;
pub mod foreign;
pub mod guest;
pub mod sim_disk;
pub mod sim_files;
pub mod vmm;
