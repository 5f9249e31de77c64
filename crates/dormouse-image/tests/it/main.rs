//! The data model from outside: maps and packs against models, damage and golden files.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(clippy::cast_possible_truncation, reason = "tests run where a usize has 64 bits")]

mod bit_flips;
mod forged;
mod golden;
mod map_model;
mod map_sharing;
mod pack_roundtrip;
mod random;
mod rebuild;
mod rewrite;
mod sample;
