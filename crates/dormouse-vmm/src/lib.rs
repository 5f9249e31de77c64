//! Drive the VMMs that guests run in: pause, save, resume, load.
//!
//! One small trait, [`Vmm`](vmm::Vmm), and a driver each for Firecracker, Cloud Hypervisor and
//! QEMU. A driver talks to a VMM's process over the VMM's own socket, with a deadline on every
//! call, and knows the VMM's files. This crate knows no store and no live VM: where memory goes and
//! comes from are paths, sockets, and the small traits that its callers give it.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use dormouse_vmm::deadline::Timeouts;
//! use dormouse_vmm::kind::Kind;
//! use dormouse_vmm::vmm::{MemoryTo, connect};
//!
//! # fn main() -> dormouse_vmm::error::Result<()> {
//! let mut vmm = connect(Kind::Qemu, Path::new("/run/box/qmp"), Timeouts::STANDARD)?;
//! vmm.pause()?;
//! let saved = vmm.save(Path::new("/var/lib/box/state"), MemoryTo::Shared)?;
//! println!("the state is in {:?}", saved.files);
//! vmm.resume()?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod vmm;
pub mod kind;
pub mod capabilities;
pub mod launch;
pub mod program;
pub mod qemu;
pub mod firecracker;
pub mod cloud_hypervisor;
pub mod http;
pub mod deadline;
mod socket;
pub mod error;
