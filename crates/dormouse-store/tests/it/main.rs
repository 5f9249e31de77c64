//! Integration tests of the store.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests, too")]
#![expect(clippy::cast_possible_truncation, reason = "tests run where a usize has 64 bits")]

mod punch;
mod commit;
mod bad_input;
mod usage;
mod verify;
mod live;
mod stage;
mod ahead;
mod together;
mod trace;
mod model;
mod crash;
mod golden;
mod flips;
mod interleave;
mod races;
