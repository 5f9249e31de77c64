//! Guests, models and faults for testing Dormouse; a dev-dependency, never published.
#![forbid(unsafe_code)]

#[cfg(feature = "all")]
pub mod baseline;
#[cfg(feature = "all")]
pub mod certificates;
#[cfg(feature = "all")]
pub mod counter;
#[cfg(feature = "all")]
pub mod double;
#[cfg(feature = "all")]
pub mod foreign;
pub mod guest;
#[cfg(feature = "all")]
pub mod registry;
#[cfg(feature = "all")]
pub mod sim_disk;
#[cfg(feature = "all")]
pub mod sim_files;
#[cfg(feature = "all")]
pub mod vmm;
