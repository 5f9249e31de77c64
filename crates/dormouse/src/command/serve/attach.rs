//! `--attach /dev/nbdN`: an export as a block device of this machine, by the kernel's own driver.
//!
//! The kernel gets one end of some socket pairs, the server serves the other ends as it serves its
//! clients. When the server ends it flushes and disconnects the device first.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result};
use dormouse_serve::nbd::Server;
use dormouse_sys::nbd_device::{self, NbdDevice};

use super::Exports;
use crate::cli::live::ServeNbdArgs;
use crate::exit::{Fault, Kind};

/// Seconds that a request of the kernel may take. A flush of gigabytes to a slow disk is within it;
/// a server that was stopped for longer counts as dead, so that nobody waits for ever.
const REQUEST_TIMEOUT_S: u64 = 120;

/// The blocks of the device, where its size allows: those of images and overlays.
const BLOCK_BYTES: u64 = 4096;

/// The smallest blocks that the driver takes.
const SECTOR_BYTES: u64 = 512;

/// `/dev/nbdN`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NbdPath {
    path: PathBuf,
    index: u32,
}

impl FromStr for NbdPath {
    type Err = String;

    fn from_str(text: &str) -> Result<NbdPath, String> {
        let index = text.strip_prefix("/dev/nbd").and_then(|number| number.parse().ok());
        let index = index.ok_or_else(|| format!("{text:?} is not /dev/nbdN"))?;
        Ok(NbdPath { path: PathBuf::from(text), index })
    }
}

/// A connected device; dropping it disconnects.
#[derive(Debug)]
pub(super) struct Attached(NbdPath);

impl Attached {
    pub(super) fn path(&self) -> &Path {
        &self.0.path
    }
}

/// Attaches the only export.
pub(super) fn attach(
    args: &ServeNbdArgs,
    server: &Server,
    exports: &Exports,
) -> Result<Option<Attached>> {
    let Some(path) = &args.attach else { return Ok(None) };
    let [exported] = &exports.list[..] else {
        return Err(Fault::usage("--attach is for one export").into());
    };
    let size_bytes = exported.size_bytes();
    let block_bytes = [BLOCK_BYTES, SECTOR_BYTES].into_iter().find(|&it| size_bytes % it == 0);
    let Some(block_bytes) = block_bytes.filter(|_| size_bytes > 0) else {
        let message = format!(
            "{} has {size_bytes} bytes, and the kernel wants whole sectors of {SECTOR_BYTES}",
            exported.name
        );
        return Err(Fault::usage(message).into());
    };
    let mut kernel_ends = Vec::new();
    let mut server_flags = 0;
    for _ in 0..args.connections {
        let (ours, kernels) = UnixStream::pair().context("cannot make a socket pair")?;
        server_flags = server.attach(&exported.name, ours)?;
        kernel_ends.push(kernels);
    }
    let device = NbdDevice {
        index: path.index,
        size_bytes,
        block_bytes,
        server_flags,
        request_timeout_s: REQUEST_TIMEOUT_S,
        dead_timeout_s: args.dead_timeout,
        sockets: kernel_ends.iter().map(AsFd::as_fd).collect(),
    };
    device.connect().map_err(|error| refused(&path.path, error))?;
    Ok(Some(Attached(path.clone())))
}

/// What the kernel's refusal means, and what to do.
fn refused(path: &Path, error: io::Error) -> anyhow::Error {
    let path = path.display();
    match error.kind() {
        io::ErrorKind::NotFound => Fault::new(
            Kind::NotFound,
            format!(
                "cannot attach {path}: this kernel has no nbd driver loaded; load it with \
                 `modprobe nbd`, or use the export without it, by QEMU or nbdcopy"
            ),
        )
        .into(),
        io::ErrorKind::ResourceBusy => Fault::new(
            Kind::Busy,
            format!("cannot attach {path}: it is connected already; take another one"),
        )
        .into(),
        _ => anyhow::Error::from(error).context(format!("cannot attach {path}")),
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let NbdPath { path, index } = &self.0;
        // What the kernel still has to write goes to the server while it is there.
        let flushed = File::open(path).and_then(|device| device.sync_all());
        if let Err(error) = flushed {
            tracing::warn!(device = %path.display(), %error, "cannot flush");
        }
        if let Err(error) = nbd_device::disconnect(*index) {
            tracing::warn!(device = %path.display(), %error, "cannot disconnect");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_by_their_number() {
        assert_eq!("/dev/nbd12".parse::<NbdPath>().unwrap().index, 12);
        for text in ["/dev/nbd", "/dev/sda", "nbd0", "/dev/nbd0p1", "/dev/nbd-1", ""] {
            assert!(text.parse::<NbdPath>().is_err(), "{text}");
        }
    }

    #[test]
    fn refusals_say_what_to_do() {
        let refused = |error| refused(Path::new("/dev/nbd0"), error);
        let missing = refused(io::Error::from_raw_os_error(2));
        assert_eq!(Kind::of(&missing), Kind::NotFound);
        assert!(missing.to_string().contains("modprobe nbd"));
        assert_eq!(Kind::of(&refused(io::Error::from_raw_os_error(16))), Kind::Busy);
        assert_eq!(Kind::of(&refused(io::Error::from_raw_os_error(1))), Kind::Io);
    }
}
