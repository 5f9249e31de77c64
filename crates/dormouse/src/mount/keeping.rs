//! What a mount cannot do without, kept by a process that does nothing else (`dormouse hold`), so that
//! the one that serves it may die: files that are open wait for a successor instead of failing.
//!
//! ```text
//! mounts/HASH/owner.lock   locked by the process that serves the mount on a folder
//! mounts/HASH/holder       the socket of the process that keeps its descriptors
//! mounts/HASH/alive        a socket: who connects is told figures by the process that serves it
//! ```
//!
//! The lock alone does not tell a server that lives from one that is being killed and has it until the
//! kernel is done with that; an answer does.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use dormouse_serve::fuse::{Handover, Mount};
use dormouse_serve::holder::Until;
use dormouse_serve::unix_socket::{self, SocketFile};
use serde::{Deserialize, Serialize};

use super::journal::Journal;
use crate::exit::{Fault, Kind};
use crate::live::memory::{Keeping, Successor};

/// The name under which a mount's descriptors are kept.
const MOUNT: &str = "mount";

/// Of the device, the ledger and the journal.
const DESCRIPTORS: usize = 4;

/// The longest answer.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// How long a server that lives may take to say so.
const SIGN_TIMEOUT: Duration = Duration::from_secs(30);

/// Rest after a connection that failed: descriptors may be short for a while.
const AFTER_FAILURE: Duration = Duration::from_millis(10);

/// The process that keeps a mount's descriptors, and this process' turn to serve it.
#[derive(Debug)]
pub(crate) struct MountKeeping {
    keeping: Keeping,
    folder: PathBuf,
    place: PathBuf,
    _lock: File,
}

/// What a process that serves a mount tells of itself; it counts from its beginning.
///
/// One of another version may know less.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct MountFigures {
    pub(crate) pid: u32,
    pub(crate) reads: u64,
    pub(crate) read_bytes: u64,
    pub(crate) read_seconds: f64,
    pub(crate) writes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) failures: u64,
    pub(crate) decoded_frames: u64,
    pub(crate) found_frames: u64,
    pub(crate) cached_frame_bytes: u64,
    pub(crate) faults: FaultFigures,
}

/// Of that, what was done for guests that ask for their memory page by page (`dormouse_serve::uffd`).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct FaultFigures {
    pub(crate) answered: u64,
    pub(crate) first_writes: u64,
    pub(crate) waiting_seconds: f64,
    pub(crate) serving_seconds: f64,
    pub(crate) asked_bytes: u64,
    pub(crate) around_bytes: u64,
    pub(crate) prefetched_bytes: u64,
    pub(crate) zero_bytes: u64,
    pub(crate) removed_bytes: u64,
}

/// What tells others that this process serves a mount, until it is dropped.
#[derive(Debug)]
pub(crate) struct SignOfLife {
    _file: SocketFile,
}

/// A mount whose process is gone.
#[derive(Debug)]
pub(crate) struct Orphan {
    pub(crate) handover: Handover,
    pub(crate) journal: Journal,
}

impl MountKeeping {
    /// That of the mount on a folder; none where there never was one and `is_new` is not wanted. Busy
    /// if a process serves it. The folder itself is not looked at: it may wait for a successor.
    pub(crate) fn of(store_dir: &Path, dir: &Path, is_new: bool) -> Result<Option<MountKeeping>> {
        let place = place_of(dir)?;
        let folder = folder_of(store_dir, &place);
        if !is_new && !folder.exists() {
            return Ok(None);
        }
        let cannot = || format!("cannot use {}", folder.display());
        DirBuilder::new().recursive(true).mode(0o700).create(&folder).with_context(cannot)?;
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(folder.join("owner.lock"))
            .with_context(cannot)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let message = format!("another process serves {} already", place.display());
                return Err(Fault::new(Kind::Busy, message).into());
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(cannot),
        }
        let keeping = Keeping::at(folder.join("holder"));
        Ok(Some(MountKeeping { keeping, folder, place, _lock: lock }))
    }

    /// The mount, if its process is gone and it still is one.
    pub(crate) fn take(&self) -> Result<Option<Orphan>> {
        let Some(kept) = self.keeping.take_back(MOUNT)? else { return Ok(None) };
        if !is_mounted(&self.place)? {
            self.forget()?;
            return Ok(None);
        }
        let few = || Fault::new(Kind::Other, "the holder of a mount keeps other things");
        let [device, state, first, second] =
            <[OwnedFd; DESCRIPTORS]>::try_from(kept.descriptors).map_err(|_| few())?;
        let handover = Handover { device, state };
        Ok(Some(Orphan { handover, journal: Journal::adopt([first, second]) }))
    }

    /// Where the mount is.
    pub(crate) fn place(&self) -> &Path {
        &self.place
    }

    /// Starts the process that will keep a new mount's descriptors.
    pub(crate) fn start(&self, successor: &Successor) -> Result<()> {
        self.keeping.start(successor)
    }

    /// Tells whoever asks that this process serves the mount, and these figures.
    pub(crate) fn sign(
        &self,
        figures: impl Fn() -> MountFigures + Send + 'static,
    ) -> Result<SignOfLife> {
        let (listener, file) = unix_socket::listen(&self.folder.join("alive"))?;
        thread::Builder::new()
            .name("alive".to_owned())
            .spawn(move || {
                loop {
                    // It fits the socket's buffer; one that does not wait for it has gone.
                    let told = listener.accept().and_then(|(mut peer, _)| {
                        let mut line = serde_json::to_vec(&figures())?;
                        line.push(b'\n');
                        peer.write_all(&line)
                    });
                    if told.is_err() {
                        thread::sleep(AFTER_FAILURE);
                    }
                }
            })
            .context("cannot start a thread")?;
        Ok(SignOfLife { _file: file })
    }

    /// What the process that serves the mount on a folder tells; none if no process does. The folder
    /// itself is not looked at.
    pub(crate) fn figures(store_dir: &Path, dir: &Path) -> Result<Option<MountFigures>> {
        let place = place_of(dir)?;
        let path = folder_of(store_dir, &place).join("alive");
        let Some(stream) = unix_socket::connect(&path)? else { return Ok(None) };
        stream.set_read_timeout(Some(SIGN_TIMEOUT)).context("cannot limit a wait")?;
        let mut line = Vec::new();
        match stream.take(LINE_BYTES_MAX).read_to_end(&mut line) {
            Ok(_) if line.last() == Some(&b'\n') => {
                let said = serde_json::from_slice(&line);
                let said = said.with_context(|| format!("{} tells no figures", path.display()))?;
                Ok(is_mounted(&place)?.then_some(said))
            }
            // It ended before it had said it.
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let message = format!("the process that serves {} is stuck", place.display());
                Err(Fault::new(Kind::Busy, message).into())
            }
            Err(error) => Err(error).with_context(|| format!("cannot ask {}", path.display())),
        }
    }

    /// Has what a successor needs kept, whatever becomes of the one that keeps it.
    pub(super) fn keep(
        &self,
        mount: &Mount,
        journal: &Journal,
        successor: Successor,
    ) -> Result<()> {
        self.keeping.mind_us()?;
        let Handover { device, state } = mount.handover()?;
        let [first, second] = journal.descriptors();
        let kept = [device.as_fd(), state.as_fd(), first, second];
        self.keeping.give(MOUNT, "", &kept, Until::Dropped)?;
        self.keeping.mind(successor);
        Ok(())
    }

    /// Has nothing kept any more: the mount has ended.
    pub(crate) fn forget(&self) -> Result<()> {
        self.keeping.forget(MOUNT)
    }
}

/// The folder's path, found without asking whatever is mounted on it.
fn place_of(dir: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(dir).context("cannot tell where we are")?;
    let cannot = || format!("cannot find {}", dir.display());
    match (absolute.parent(), absolute.file_name()) {
        (Some(above), Some(name)) => Ok(above.canonicalize().with_context(cannot)?.join(name)),
        _ => absolute.canonicalize().with_context(cannot),
    }
}

fn folder_of(store_dir: &Path, place: &Path) -> PathBuf {
    store_dir.join("mounts").join(format!("{:016x}", hash(place)))
}

/// Whether a file system of ours is mounted there.
fn is_mounted(place: &Path) -> io::Result<bool> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(text.lines().any(|line| {
        let mut words = line.split(' ');
        let is_there =
            words.nth(4).is_some_and(|at| unescaped(at) == place.as_os_str().as_encoded_bytes());
        let mut words = words.skip_while(|word| *word != "-").skip(1);
        is_there
            && words.next().is_some_and(|kind| kind.starts_with("fuse"))
            && words.next() == Some("dormouse")
    }))
}

/// A path as the kernel writes it there: a backslash and three octal digits for what would be odd.
fn unescaped(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

/// FNV-1a of a path: the same for every build, and as good as unique for the mounts of one store.
fn hash(path: &Path) -> u64 {
    path.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// It could be read, and so locked, by every user of a host whose store let them in.
    #[test]
    fn the_lock_of_a_mount_is_its_owners_alone() {
        let store = tempfile::tempdir().unwrap();
        let keeping = MountKeeping::of(store.path(), Path::new("/nowhere"), true).unwrap().unwrap();
        let lock = fs::metadata(keeping.folder.join("owner.lock")).unwrap();
        assert_eq!(lock.permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn paths_of_mounts_are_read_as_they_are() {
        assert_eq!(unescaped("/mnt/a\\040b\\134"), b"/mnt/a b\\");
        assert_eq!(unescaped("/mnt"), b"/mnt");
        assert!(!is_mounted(Path::new("/")).unwrap());
    }
}
