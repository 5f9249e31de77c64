//! Formats against writers, readers and tools that do not share their code.

mod world;
mod wrenn;
mod e2b;
mod dm_snapshot;
mod vmm;
mod carry;
mod disk;
mod hostile;
