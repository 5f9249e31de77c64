//! Guests, models and faults for testing Dormouse; a dev-dependency, never published.
#![forbid(unsafe_code)]

pub mod baseline;
pub mod certificates;
pub mod counter;
pub mod double;
pub mod foreign;
pub mod guest;
pub mod registry;
pub mod sim_disk;
pub mod sim_files;
pub mod vmm;
