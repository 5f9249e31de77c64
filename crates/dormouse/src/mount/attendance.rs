//! Whoever has a VM in its hands may be killed, and there may be no daemon: the process that the VM has
//! its disks from minds it, and has undone what it left half-made. A guest that it paused goes on.
//!
//! It is told by a pipe. Who comes to an end, well or not, says a byte before it closes its end; the
//! kernel closes that of who was killed.

use std::io::{self, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result};

use super::memories::MountRequest;
use crate::background::OURSELVES;

/// Somebody who is minded until this is dropped.
#[derive(Debug)]
pub(crate) struct Attendance {
    pipe: PipeWriter,
}

impl Attendance {
    /// One that is about to begin, and what is to be asked for that.
    pub(crate) fn new() -> Result<(Attendance, MountRequest)> {
        let (reader, pipe) = io::pipe().context("cannot make a pipe")?;
        Ok((Attendance { pipe }, MountRequest::Attend { pipe: Some(reader.into()) }))
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        // What a panic leaves is what a kill leaves. And nobody may listen: who minded us was killed.
        if !thread::panicking() {
            let _ = self.pipe.write_all(b".");
        }
    }
}

/// Minds whoever has the other end of a pipe.
pub(super) fn attend(store_dir: &Path, pipe: OwnedFd) -> Result<()> {
    let store_dir = store_dir.to_owned();
    let minding = move || {
        let mut said = Vec::new();
        let read = io::PipeReader::from(pipe).take(1).read_to_end(&mut said);
        if read.is_ok() && said.is_empty() {
            tracing::warn!("a command was killed; what it left half-made is undone");
            if let Err(error) = recover(&store_dir) {
                tracing::error!(error = &*error, "what a killed command left may be half-made");
            }
        }
    };
    thread::Builder::new()
        .name("attend".to_owned())
        .spawn(minding)
        .map(drop)
        .context("cannot start a thread")
}

/// In a process of its own, for it asks this one, too.
fn recover(store_dir: &Path) -> Result<()> {
    let status = Command::new(OURSELVES)
        .arg0("dormouse")
        .arg("--store")
        .arg(store_dir)
        .arg("recover")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("cannot start another process")?;
    anyhow::ensure!(status.success(), "it ended with {status}");
    Ok(())
}
