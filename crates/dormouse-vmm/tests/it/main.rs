//! Drivers against the VMMs they drive, and against doubles of them.

mod qemu;
