//! The kernel interfaces Dormouse needs, one module per interface.
//!
//! Every module names the system calls it stands on and what they do not promise. Errors are
//! [`std::io::Error`] as the kernel gave them; callers add which file it was about.
//!
//! This is the only crate of the project in which unsafe code may live. `rustix` has safe wrappers
//! for most calls; what is left are memory maps, userfaultfd, page tables and other processes'
//! memory.
//!
//! ```no_run
//! use std::fs::File;
//! use dormouse_sys::sparse;
//!
//! let file = File::open("memory-ranges")?;
//! for extent in sparse::data_extents(&file, 0..file.metadata()?.len()) {
//!     let extent = extent?;
//!     println!("{} bytes of data at {}", extent.end - extent.start, extent.start);
//! }
//! # Ok::<(), std::io::Error>(())
//! ```

pub mod activation;
pub mod block_device;
pub mod clone;
pub mod descriptor;
pub mod file_size;
#[cfg(target_arch = "x86_64")]
pub mod kvm;
pub mod mapping;
pub mod nbd_device;
pub mod netlink;
pub mod own_folder;
pub mod page_cache;
pub mod page_map;
pub mod passing;
pub mod peer;
pub mod process_memory;
pub mod publish;
pub mod sparse;
pub mod userfaultfd;

mod temp_file;
