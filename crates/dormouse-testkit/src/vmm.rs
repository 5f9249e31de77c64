//! A small VMM in a process of its own, that knows what every byte of its memory must be.
//!
//! It maps memory, hands it over as a chosen version of Firecracker does (or maps a file privately,
//! or fills its memory itself), and sets threads to work on it: they read, write, ask the kernel to
//! read, and give pages back, at random from a seed. Every read is checked against an oracle: the
//! image is a [function](image()) of seed and page, what was written is known, and what was given
//! back is zero. At the first wrong byte it exits with [`EXIT_WRONG_BYTE`] and
//! says where; when nothing moves any more, with [`EXIT_HANG`].
//!
//! With [`Cpus::Kvm`] it is virtual CPUs that read and write, so that faults are a guest's own.
//!
//! The process is the test's own binary, started again: that one is always built, and never stale.
//! An integration test says [`small_vmm!`](crate::small_vmm) once, a program without libtest calls
//! [`run_if_asked`] first in its `main`. By hand there is the binary `small-vmm`.
//!
//! ```no_run
//! use dormouse_testkit::vmm::{Backing, Config, SmallVmm, Version};
//!
//! # fn main() -> anyhow::Result<()> {
//! let socket = std::path::Path::new("/tmp/memory.sock");
//! let config = Config::small(7, 4096, Backing::firecracker(socket, Version::V1_12));
//! // Somebody listens at the socket, and serves `vmm::image(7, 4096)`.
//! let mut vmm = SmallVmm::spawn(&config)?;
//! vmm.run(100_000)?;
//! vmm.pause()?;
//! // Capture its memory, and compare:
//! vmm.write_expected(std::path::Path::new("/tmp/expected"))?;
//! vmm.resume()?;
//! vmm.quit()?;
//! # Ok(())
//! # }
//! ```

mod config;
mod content;
mod cpu;
mod driver;
mod gate;
mod huge_pages;
mod memory;
mod oracle;
mod process;
mod protocol;
mod send;
mod work;

pub use config::{Backing, Config, Cpus, Lie, Manner, Mix, PageKind, RegionConfig, Version};
pub use content::{PAGE_BYTES, checksum, image, write_image};
pub use driver::{Ended, SmallVmm, check_hook};
pub use huge_pages::HugePages;
pub use process::{EXIT_HANG, EXIT_SETUP, EXIT_WRONG_BYTE, run_by_hand, run_if_asked};
pub(crate) use process::{Vmm, fail};
pub use protocol::{Access, PageRun, RegionAddress, Report, Touched};

/// Puts the small VMM into a test binary: a test by whose name the binary is started again.
///
/// As a test of its own it sees that this works.
#[macro_export]
macro_rules! small_vmm {
    () => {
        #[test]
        fn small_vmm_process() {
            $crate::vmm::run_if_asked();
            $crate::vmm::check_hook().unwrap();
        }
    };
}
