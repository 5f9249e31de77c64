//! The data plane of a store: one `dormouse mount` in a process of its own, in which every VM finds its
//! disks and its memory. It outlives whoever started it, and is shared by all VMs of the store, so that
//! forks share what is decoded and cached.
//!
//! ```text
//! live/.plane/files/   the mount
//! live/.plane/lock     locked by whoever looks for it and starts it
//! live/.plane/log      what it has to tell
//! ```

use std::env;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use dormouse_store::manifest::Manifest;
use dormouse_store::name::Name;

use crate::exit::{Fault, Kind};
use crate::mount::{MountKeeping, is_mounted};

/// How often, and how long apart, a mount that is about to be served, or to end, is looked at again.
const BEGUN_ATTEMPTS: u32 = 500;
const BEGUN_REST: Duration = Duration::from_millis(10);

/// The data plane, which runs.
#[derive(Clone, Debug)]
pub(crate) struct Plane {
    files: PathBuf,
}

impl Plane {
    /// The one of the store in `store_dir`, an absolute path; started if it does not run.
    pub(crate) fn find_or_start(store_dir: &Path) -> Result<Plane> {
        let folder = store_dir.join("live/.plane");
        let plane = Plane { files: folder.join("files") };
        if find(store_dir, &plane.files)? == Found::Served {
            return Ok(plane);
        }
        let mut make = DirBuilder::new();
        make.recursive(true).mode(0o700);
        make.create(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let path = folder.join("lock");
        let mut options = File::options();
        let lock = options.write(true).create(true).truncate(false).mode(0o600).open(&path);
        let lock = lock.with_context(|| format!("cannot open {}", path.display()))?;
        lock.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        // Somebody else may have started it meanwhile. One that ends just now is begun for a moment.
        for _ in 0..BEGUN_ATTEMPTS {
            match find(store_dir, &plane.files)? {
                Found::Served => return Ok(plane),
                Found::Begun => std::thread::sleep(BEGUN_REST),
                Found::Nobody => plane.start(store_dir, &folder)?,
            }
        }
        Err(Fault::new(Kind::Busy, "the data plane neither serves nor ends").into())
    }

    fn start(&self, store_dir: &Path, folder: &Path) -> Result<()> {
        match fs::create_dir(&self.files) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("cannot make {}", self.files.display()));
            }
            _ => {}
        }
        let log = folder.join("log");
        let said = File::options().append(true).create(true).mode(0o600).open(&log);
        let said = said.with_context(|| format!("cannot open {}", log.display()))?;
        let started = Command::new(env::current_exe().context("cannot find this program")?)
            .arg("--store")
            .arg(store_dir)
            .arg("mount")
            .arg(&self.files)
            // Should it be killed, the next one goes on with what it had, and no guest sees an error.
            .args(["--hold", "--background", "--log"])
            .arg(&log)
            .stdin(Stdio::null())
            // No pipe: it must not end with us, should we be killed while it starts.
            .stdout(Stdio::null())
            .stderr(said)
            .status()
            .context("cannot start the data plane")?;
        if started.success() {
            return Ok(());
        }
        let message = format!("the data plane did not start; {} says why", log.display());
        Err(Fault::new(Kind::Other, message).into())
    }

    /// Where a VM's disk is.
    pub(crate) fn disk(&self, live: &Name, id: &Name) -> PathBuf {
        self.files.join("live").join(live.as_str()).join("disk").join(id.as_str())
    }

    /// Where a snapshot's memory is.
    pub(crate) fn memory(&self, manifest: &Manifest) -> PathBuf {
        self.files.join(manifest.name.as_str()).join(manifest.number.to_string()).join("memory")
    }

    /// Where a dump goes that nobody needs.
    pub(crate) fn discard(&self, live: &Name) -> PathBuf {
        self.files.join("discard").join(live.as_str())
    }
}

/// What became of the mount on a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// It is served.
    Served,

    /// A process serves it, or is about to.
    Begun,

    /// No process does. The folder must not be looked at: who does may have to wait for one.
    Nobody,
}

fn find(store_dir: &Path, files: &Path) -> Result<Found> {
    if !files.parent().is_some_and(Path::exists) {
        return Ok(Found::Nobody);
    }
    match MountKeeping::of(store_dir, files, false) {
        Ok(_) => return Ok(Found::Nobody),
        Err(error) if Kind::of(&error) == Kind::Busy => {}
        Err(error) => return Err(error),
    }
    // Told by the kernel's list: asking the mount itself would wait for a server that may just end.
    Ok(if is_mounted(files)? { Found::Served } else { Found::Begun })
}
