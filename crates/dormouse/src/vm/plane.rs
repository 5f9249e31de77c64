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
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use dormouse_store::manifest::Manifest;
use dormouse_store::name::Name;

use crate::exit::{Fault, Kind};

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
        if is_served(&plane.files)? {
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
        // Somebody else may have started it meanwhile.
        if !is_served(&plane.files)? {
            plane.start(store_dir, &folder)?;
        }
        Ok(plane)
    }

    fn start(&self, store_dir: &Path, folder: &Path) -> Result<()> {
        let made = fs::create_dir(&self.files);
        if let Err(error) = made
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            // One that lost its server is there and says something else.
            tracing::debug!(%error, "the mount's folder is not new");
        }
        let started = Command::new(env::current_exe().context("cannot find this program")?)
            .arg("--store")
            .arg(store_dir)
            .arg("mount")
            .arg(&self.files)
            .args(["--background", "--log"])
            .arg(folder.join("log"))
            .stdin(Stdio::null())
            .output()
            .context("cannot start the data plane")?;
        if started.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&started.stderr);
        let message = format!("the data plane did not start: {}", said.trim());
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

/// Whether the folder is a mount that is served.
fn is_served(files: &Path) -> Result<bool> {
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev());
    let above = files.parent().context("a mount has a folder above it")?;
    match (device(files), device(above)) {
        (Ok(files), Ok(above)) => Ok(files != above),
        // Not there; or there and its server is gone.
        _ => Ok(false),
    }
}
