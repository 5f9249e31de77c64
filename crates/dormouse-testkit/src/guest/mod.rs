//! Real Linux guests under QEMU: made from Debian packages, booted, driven over a serial line, paused and restored.
//!
//! ```text
//! target/guest/
//!     lock                  held while anything below is made
//!     ASSETS_VERSION/       kernel, initramfs, disk (a 2 GiB ext4 root)
//!     pauses/               version, and 1..5/{memory,disk,state}: the pinned five pauses
//! ```
//!
//! A folder is made beside its place and renamed into it, so that one that exists is whole.
//! The memory file of a guest is its flat guest-physical memory; holes and zeros mean zero.
//!
//! ```no_run
//! use dormouse_testkit::guest::{Assets, Config, Guest, cache_dir};
//! # fn main() -> anyhow::Result<()> {
//! let assets = Assets::prepare(&cache_dir(), &mut |line| eprintln!("{line}"))?;
//! let config = Config::in_dir(std::path::Path::new("/tmp/guest"));
//! let mut guest = Guest::boot(&assets, &config)?;
//! assert_eq!(guest.run("uname -s")?.text.trim(), "Linux");
//! guest.pause(std::path::Path::new("/tmp/guest/state"))?;
//! guest.kill()?;
//! let mut guest = Guest::restore(&assets, &config, std::path::Path::new("/tmp/guest/state"))?;
//! guest.wait_counter()?;
//! # Ok(())
//! # }
//! ```

mod assets;
mod command;
mod console;
mod copy;
mod initramfs;
mod qemu;
mod qmp;
mod serial;
mod workload;

pub use assets::{Assets, cache_dir};
pub use console::{Console, guest_for_run};
pub use copy::copy_sparse;
pub use qemu::{Config, Disk, Guest, Machine, MemoryMapping, private_files_stay_whole};
pub use qmp::Qmp;
pub use serial::Output;
pub use workload::{Pause, PauseFiles, Pauses, drive};
