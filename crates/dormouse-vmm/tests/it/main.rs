//! Drivers against the VMMs they drive, and against doubles of them.
#![expect(clippy::unwrap_used, reason = "what fails in a test's own wiring is a failed test")]

mod process;
mod qemu;
mod firecracker;
mod cloud_hypervisor;
mod hostile;
mod real;

dormouse_testkit::vmm_doubles!();
