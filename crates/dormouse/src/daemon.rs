//! The daemon: one a store, which wakes VMs and puts them to sleep for others, over HTTP.
//!
//! ```text
//! live/.daemon/lock      locked by the daemon for as long as it lives
//! live/.daemon/api       its socket, unless it was given another one
//! live/.daemon/address   where its socket is; see `place`
//! ```
//!
//! It holds nothing that a VM needs: disks and memory are the data plane's, VMMs are processes of their
//! own, and all that is known of a VM is in its folder. So it may end at any moment, be it killed, and
//! the next one goes on. This is the one place with an async runtime; whatever touches a store or a VM
//! is done on threads of which there are as many as the [`budget`] has.

pub(crate) mod api;
pub(crate) mod budget;
pub(crate) mod client;
mod jobs;
mod listen;
mod metrics;
mod patience;
mod place;
pub(crate) mod run;
mod systemd;
