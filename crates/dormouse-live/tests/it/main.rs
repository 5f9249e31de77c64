//! Integration tests of live disks.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests, too")]

mod model;
mod page_model;
mod crash;
mod faults;
mod faulty;
mod golden;
mod real;
mod threads;
