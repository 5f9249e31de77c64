//! Who does something to a VM: one at a time, told by a lock on `live/NAME/vm.lock`. A lock that nobody
//! holds beside a phase that somebody should be at is a crash.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::exit::{Fault, Kind};
use crate::live::LiveFolder;

/// How long somebody else may have the lock who does nothing but look.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
const LOOK_REST: Duration = Duration::from_millis(5);

/// The right to do something to a VM, until it is dropped.
#[derive(Debug)]
pub(crate) struct VmLock {
    _file: File,
}

impl VmLock {
    /// Takes a name that nobody has.
    pub(crate) fn make(folder: &LiveFolder) -> Result<VmLock> {
        Ok(VmLock { _file: folder.make_new()? })
    }

    /// Takes the lock of a VM that is there; `NotFound` if it is not, busy if somebody else has it for
    /// longer than it takes to look at the VM, as every command does.
    pub(crate) fn take(folder: &LiveFolder) -> Result<VmLock> {
        VmLock::take_within(folder, LOOK_TIMEOUT)
    }

    /// The same, where somebody else may have it for so long.
    pub(crate) fn take_within(folder: &LiveFolder, timeout: Duration) -> Result<VmLock> {
        let begun = Instant::now();
        loop {
            if let Some(lock) = VmLock::try_take(folder)? {
                return Ok(lock);
            }
            if begun.elapsed() > timeout {
                let message = format!("another command is at the VM {}", folder.live);
                return Err(Fault::new(Kind::Busy, message).into());
            }
            thread::sleep(LOOK_REST);
        }
    }

    /// The same; none if somebody else has it.
    pub(crate) fn try_take(folder: &LiveFolder) -> Result<Option<VmLock>> {
        let path = path(folder);
        let cannot = || format!("cannot lock {}", path.display());
        let mut options = File::options();
        // Only whoever makes a VM makes its lock.
        options.write(true);
        loop {
            let file = match options.open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let message =
                        format!("there is no VM {}; `dormouse ps` lists all", folder.live);
                    return Err(Fault::new(Kind::NotFound, message).into());
                }
                file => file.with_context(cannot)?,
            };
            match file.try_lock() {
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error).with_context(cannot),
                Ok(()) => {}
            }
            // Whoever had it before may have removed the VM.
            match fs::metadata(&path) {
                Ok(named) if named.ino() == file.metadata().with_context(cannot)?.ino() => {
                    return Ok(Some(VmLock { _file: file }));
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(cannot);
                }
                _ => {}
            }
        }
    }
}

fn path(folder: &LiveFolder) -> PathBuf {
    folder.file("vm.lock")
}
