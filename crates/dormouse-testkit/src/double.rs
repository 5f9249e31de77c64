//! Processes that behave as Firecracker and Cloud Hypervisor do, version by version, their bugs and
//! orders included, with a [small VMM](crate::vmm) in them that does real memory work.
//!
//! A double takes the real program's arguments, listens on the real API's socket, answers with the
//! real statuses and words, and writes files of the real shape. Its guest works on its memory and
//! its disks, and knows what every byte must be, also after it was saved and loaded elsewhere: at
//! the first wrong one the process ends with [`EXIT_WRONG_BYTE`](crate::vmm::EXIT_WRONG_BYTE) or
//! [`EXIT_WRONG_DISK`]. So a VMM that is alive is one whose guest is right.
//!
//! The process is the test's own binary: a test says [`vmm_doubles!`](crate::vmm_doubles) once, and
//! [`Program`] makes a script that starts it, for `DORMOUSE_FIRECRACKER` or
//! `DORMOUSE_CLOUD_HYPERVISOR`. By hand there are the binaries `fake-firecracker` and
//! `fake-cloud-hypervisor`, which look at the same variables:
//!
//! | variable | |
//! |---|---|
//! | `DORMOUSE_DOUBLE_VERSION` | the version to be |
//! | `DORMOUSE_DOUBLE_BEHAVIOUR` | a JSON list of [`Rule`]s |
//! | `DORMOUSE_DOUBLE_REGIONS_MIB` | Firecracker's regions, for holes in small guests: `32,32` |
//!
//! Beside the real API there is `GET /double/report` (what the guest did, as JSON), `PUT
//! /double/verify` (reads and checks all of memory), `PUT /double/touch` (a list of pages: what reading
//! each took), and `PUT /double/behaviour` (rules).

mod api;
mod behaviour;
mod client;
mod cloud_hypervisor;
mod disk;
mod firecracker;
mod guest;
mod offload;
mod postcopy;
mod program;
mod state;

pub use behaviour::{Action, Rule};
pub use client::ask;
pub use cloud_hypervisor::run as run_cloud_hypervisor;
pub use firecracker::run as run_firecracker;
pub use guest::EXIT_WRONG_DISK;
pub use program::{Program, run_if_asked};

/// Puts the doubles into a test binary: a test by whose name the binary is started again.
#[macro_export]
macro_rules! vmm_doubles {
    () => {
        #[test]
        fn vmm_double_process() {
            $crate::double::run_if_asked();
        }
    };
}
