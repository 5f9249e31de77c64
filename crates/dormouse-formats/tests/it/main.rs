//! Formats against writers, readers and tools that do not share their code.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::cast_possible_truncation, reason = "devices of tests are small")]

mod world;
mod wrenn;
mod e2b;
mod dm_snapshot;
mod vmm;
#[expect(unreachable_pub, reason = "the fuzzers have it, too")]
mod accepted;
mod carry;
mod disk;
mod qemu_loads;
mod hostile;
mod import;
mod mutated;
