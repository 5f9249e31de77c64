//! The kernel interfaces Dormouse needs, one module per interface.
//!
//! Every module names the system calls it stands on and what they do not promise. Errors are
//! [`std::io::Error`] as the kernel gave them; callers add which file it was about.
//!
//! This is the only crate of the project in which unsafe code may live. Today there is none:
//! `rustix` has a safe wrapper for every call made here.
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

pub mod file_size;
pub mod page_cache;
pub mod publish;
pub mod sparse;

mod temp_file;
