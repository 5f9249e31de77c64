//! Mounting, unmounting, and taking a mount over.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use dormouse_sys::descriptor;
use fuser::{Config, InitFlags, MountOption, Session, SessionACL};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::filesystem::TreeFilesystem;
use super::handover::{Handover, Ledger, Negotiated};
use super::read_ahead::ReadAheadPool;
use super::traffic::{Counters, Traffic};
use super::tree::Tree;
use crate::error::{Error, ErrorKind, Result};

/// The program that mounts and unmounts for those who may not.
const HELPER: &str = "fusermount3";

/// `FUSE_INIT` of the protocol (`include/uapi/linux/fuse.h`).
const OPCODE_INIT: u32 = 26;

/// `FUSE_NOTIFY_RESEND`: give requests out again that were read and not answered. Since Linux 6.9.
const NOTIFY_RESEND: i32 = 7;

/// How a tree is mounted.
#[derive(Clone, Copy, Debug)]
pub struct MountOptions {
    /// Threads that answer requests; one that waits for a disk keeps no other waiting.
    pub threads: usize,

    /// Threads that decode ahead of sequential readers.
    pub read_ahead_threads: usize,

    /// Whether other users may look at it, as permissions allow.
    pub allow_other: bool,
}

/// How an unmount went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// Nobody used it any more.
    Clean,

    /// Its name is gone, but files are open, and served until they are closed.
    Detached,
}

/// A tree that is mounted. It is unmounted when this is dropped.
#[derive(Debug)]
pub struct Mount {
    place: PathBuf,
    ledger: Arc<Ledger>,
    device: OwnedFd,
    counters: Arc<Counters>,
    session: Mutex<Option<JoinHandle<io::Result<()>>>>,
}

impl Mount {
    /// Mounts `tree` on the folder `place`.
    pub fn new(tree: Arc<dyn Tree>, place: &Path, options: &MountOptions) -> Result<Mount> {
        let cannot = |error| Error::io(format!("cannot mount on {}", place.display()), error);
        let place = place.canonicalize().map_err(cannot)?;
        if is_mount_point(&place).map_err(cannot)? {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("something is mounted on {} already", place.display()),
            ));
        }
        // What is in it would be hidden.
        if fs::read_dir(&place).map_err(cannot)?.next().is_some() {
            let message = format!("{} is not empty", place.display());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let ledger = Arc::new(Ledger::new(&place)?);
        let counters = Arc::default();
        let filesystem = filesystem(tree, &ledger, &counters, options)?;
        let session = Session::new(filesystem, &place, &config(options)).map_err(cannot)?;
        Mount::run(session, place, ledger, counters)
    }

    /// Goes on with a mount whose process is gone, or stops answering. Requests that it had read
    /// and not answered are answered now.
    pub fn resume(
        tree: Arc<dyn Tree>,
        handover: Handover,
        options: &MountOptions,
    ) -> Result<Mount> {
        let ledger = Arc::new(Ledger::open(handover.state)?);
        let place = ledger.place().to_owned();
        let cannot =
            |error| Error::io(format!("cannot take over the mount on {}", place.display()), error);
        let negotiated = ledger
            .what_was_negotiated()
            .filter(|said| said.major != 0)
            .ok_or_else(|| cannot(io::Error::other("its first process never came to serve it")))?;
        if !InitFlags::from_bits_retain(negotiated.capabilities)
            .contains(InitFlags::FUSE_HAS_RESEND)
        {
            // Requests that the predecessor had read would never be answered.
            return Err(cannot(io::Error::other("that needs Linux 6.9 or later")));
        }
        let counters = Arc::default();
        let filesystem = filesystem(tree, &ledger, &counters, options)?;
        filesystem.reopen();
        // The crate insists on a handshake, which the kernel had with the predecessor. So it has one
        // with us, and then finds the kernel at the descriptor it had it on.
        let (kernel, ours) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|error| cannot(error.into()))?;
        rustix::io::write(&kernel, &init_request(negotiated))
            .map_err(|error| cannot(error.into()))?;
        let acl = config(options).acl;
        let session = Session::from_fd(filesystem, ours, acl, config(options)).map_err(cannot)?;
        descriptor::replace(session.as_fd(), handover.device.as_fd()).map_err(cannot)?;
        // Before a request is read here, or it would be given out twice.
        let mut resend = [0; 16];
        resend[..4].copy_from_slice(&16_u32.to_ne_bytes());
        resend[4..8].copy_from_slice(&NOTIFY_RESEND.to_ne_bytes());
        rustix::io::write(&handover.device, &resend).map_err(|error| cannot(error.into()))?;
        Mount::run(session, place.clone(), ledger, counters)
    }

    /// Where it is.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Copies of the descriptors that a successor needs. As long as one of the device exists, the
    /// mount waits for a successor instead of failing.
    pub fn handover(&self) -> Result<Handover> {
        let cannot = |error| Error::io("cannot copy a descriptor", error);
        let device = self.device.as_fd().try_clone_to_owned().map_err(cannot)?;
        Ok(Handover { device, state: self.ledger.descriptor().map_err(cannot)? })
    }

    /// What went through it since this process serves it.
    pub fn traffic(&self) -> Traffic {
        self.counters.traffic()
    }

    /// Returns when it was unmounted, by us or by somebody else, and its last file is closed.
    pub fn wait(&self) -> Result<()> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(session) = session else { return Ok(()) };
        let cannot = |error| Error::io(format!("serving {} failed", self.place.display()), error);
        match session.join() {
            Ok(result) => its_end(result).map_err(cannot),
            Err(_) => Err(cannot(io::Error::other("a thread panicked"))),
        }
    }

    /// Unmounts it; if it is in use, takes its name away and serves what is open on.
    pub fn unmount(&self) -> Result<Unmounted> {
        unmount(&self.place)
            .map_err(|error| Error::io(format!("cannot unmount {}", self.place.display()), error))
    }

    fn run(
        session: Session<TreeFilesystem>,
        place: PathBuf,
        ledger: Arc<Ledger>,
        counters: Arc<Counters>,
    ) -> Result<Mount> {
        let cannot = |error| Error::io(format!("cannot serve {}", place.display()), error);
        let device = session.as_fd().try_clone_to_owned().map_err(cannot)?;
        let session = thread::Builder::new()
            .name("fuse".to_owned())
            .spawn(move || session.run())
            .map_err(cannot)?;
        let session = Mutex::new(Some(session));
        let mount = Mount { place: place.clone(), ledger, device, counters, session };
        tune(&place);
        Ok(mount)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.session.get_mut().unwrap_or_else(PoisonError::into_inner).is_none() {
            return;
        }
        if let Err(error) = self.unmount() {
            tracing::warn!(%error, "the mount is left behind");
        }
    }
}

/// Clears away what a process left behind that crashed while something was mounted here; whether
/// there was such a thing. Nothing else is ever unmounted by this.
pub fn clear_stale(place: &Path) -> Result<bool> {
    match fs::metadata(place) {
        Err(error) if error.raw_os_error() == Some(Errno::NOTCONN.raw_os_error()) => {
            let cannot = |error| {
                Error::io(format!("cannot clear the dead mount on {}", place.display()), error)
            };
            detach(place).map_err(cannot)?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

fn filesystem(
    tree: Arc<dyn Tree>,
    ledger: &Arc<Ledger>,
    counters: &Arc<Counters>,
    options: &MountOptions,
) -> Result<TreeFilesystem> {
    let pool = ReadAheadPool::start(options.read_ahead_threads)
        .map_err(|error| Error::io("cannot start a thread", error))?;
    Ok(TreeFilesystem::new(tree, Arc::clone(ledger), Arc::new(pool), Arc::clone(counters)))
}

fn config(options: &MountOptions) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("dormouse".to_owned()),
        MountOption::Subtype("dormouse".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoAtime,
    ];
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(options.threads.max(1));
    // One descriptor for all threads: a clone that is closed takes the requests with it that were
    // read from it, which a successor could then not answer.
    config.clone_fd = false;
    config
}

/// A request as the kernel's first one.
fn init_request(said: Negotiated) -> Vec<u8> {
    const HEADER_BYTES: usize = 40;
    const INIT_BYTES: usize = 64;
    let mut bytes = vec![0; HEADER_BYTES + INIT_BYTES];
    let mut put = |at: usize, word: u32| bytes[at..at + 4].copy_from_slice(&word.to_ne_bytes());
    put(0, u32::try_from(HEADER_BYTES + INIT_BYTES).unwrap_or(0));
    put(4, OPCODE_INIT);
    put(8, 1);
    let body = HEADER_BYTES;
    put(body, said.major);
    put(body + 4, said.minor);
    put(body + 8, 128 << 10);
    let flags = said.capabilities | InitFlags::FUSE_INIT_EXT.bits();
    put(body + 12, u32::try_from(flags & u64::from(u32::MAX)).unwrap_or(0));
    put(body + 16, u32::try_from(flags >> 32).unwrap_or(0));
    bytes
}

/// Lets the kernel hold as many dirty pages of a mapped memory as of any other file: by default a
/// FUSE file system gets a hundredth. Only an administrator may, and without it is only slower.
fn tune(place: &Path) {
    let Ok(metadata) = fs::metadata(place) else { return };
    let (major, minor) = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
    let folder = PathBuf::from(format!("/sys/class/bdi/{major}:{minor}"));
    for (name, value) in [("strict_limit", "0"), ("max_ratio", "100")] {
        let written = fs::OpenOptions::new()
            .write(true)
            .open(folder.join(name))
            .and_then(|mut file| file.write_all(value.as_bytes()));
        if let Err(error) = written {
            tracing::debug!(name, %error, "left as it is");
        }
    }
}

/// How serving ended. The kernel says "connection aborted" instead of "no such device" where the
/// last file is closed in the instant in which a thread takes a request: the crate knows only the
/// second as the end.
fn its_end(served: io::Result<()>) -> io::Result<()> {
    match served {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::CONNABORTED) => Ok(()),
        served => served,
    }
}

fn is_mount_point(place: &Path) -> io::Result<bool> {
    let above = place.parent().unwrap_or(place);
    Ok(place != above && fs::metadata(place)?.dev() != fs::metadata(above)?.dev())
}

fn unmount(place: &Path) -> io::Result<Unmounted> {
    match rustix::mount::unmount(place, UnmountFlags::NOFOLLOW) {
        // Somebody else unmounted it.
        Ok(()) | Err(Errno::INVAL) => Ok(Unmounted::Clean),
        Err(Errno::PERM) if helper(place, &[])? => Ok(Unmounted::Clean),
        Err(Errno::BUSY | Errno::PERM) => detach(place).map(|()| Unmounted::Detached),
        Err(error) => Err(error.into()),
    }
}

fn detach(place: &Path) -> io::Result<()> {
    match rustix::mount::unmount(place, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
        Err(Errno::PERM) if helper(place, &["-z"])? => Ok(()),
        result => Ok(result?),
    }
}

/// Asks the helper, which may do what we may not; whether it did.
fn helper(place: &Path, options: &[&str]) -> io::Result<bool> {
    let status = Command::new(HELPER)
        .arg("-u")
        .args(options)
        .arg("--")
        .arg(place)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    Ok(status.success())
}
