//! Firecracker, through its API.
//!
//! Bodies are those of the version at the other end: it refuses fields that it does not know. What
//! a version does not have and was asked for is an error before anything is asked.
//!
//! Firecracker writes memory whether it is wanted or not: give it a file of a mount's `discard/`
//! ([`MemoryTo::DiscardFile`]) where somebody else takes the memory. A load that fails ends its
//! process. There is no call to end it.
//!
//! Sources: Firecracker's `docs/snapshotting`, `swagger/firecracker.yaml`, its `CHANGELOG.md`.

mod layout;
pub mod compatibility;
pub mod vmstate;

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::capabilities::{Capabilities, Diff};
use crate::deadline::{Deadline, Timeouts};
use crate::error::{Answer, Error, ErrorKind, Result};
use crate::http::{Http, Method};
use crate::kind::{Kind, Version};
use crate::vmm::{
    Clock, Drive, Load, MemoryFrom, MemoryRegion, MemoryTo, Quit, Saved, Status, Then, TrackDirty,
    Vmm,
};

pub use layout::{Arch, regions};

/// The state's file.
pub const STATE: &str = "vmstate";

/// Since when a diff can be had that nobody tracked: of all pages that are in memory.
const DIFF_WITHOUT_TRACKING: Version = Version::new(1, 13, 0);

/// A Firecracker.
#[derive(Debug)]
pub struct Firecracker {
    http: Http,
    version: Version,
    timeouts: Timeouts,
}

impl Firecracker {
    pub(crate) fn greet(
        api: &Path,
        stream: UnixStream,
        timeouts: Timeouts,
        deadline: Deadline,
    ) -> Result<Firecracker> {
        let mut http = Http::new(api, stream);
        let answer = http.json(Method::Get, "/version", deadline)?;
        let version = answer["firecracker_version"].as_str();
        let version = version.ok_or_else(|| odd("GET /version", &answer))?.parse()?;
        Kind::Firecracker.check_version(version)?;
        Ok(Firecracker { http, version, timeouts })
    }

    fn get(&mut self, path: &str) -> Result<Value> {
        self.http.json(Method::Get, path, Deadline::after(self.timeouts.call))
    }

    fn set_state(&mut self, state: &str) -> Result<()> {
        let deadline = Deadline::after(self.timeouts.call);
        self.http.call(Method::Patch, "/vm", Some(&json!({ "state": state })), deadline)?;
        Ok(())
    }

    /// How memory lies in its file.
    fn memory(&mut self) -> Result<Vec<MemoryRegion>> {
        let config = self.get("/machine-config")?;
        let mib = config["mem_size_mib"].as_u64();
        let mib = mib.ok_or_else(|| odd("GET /machine-config", &config))?;
        let hotplug = match self.version >= Version::new(1, 14, 0) {
            false => 0,
            true => match self.get("/hotplug/memory") {
                Ok(status) => status["total_size_mib"]
                    .as_u64()
                    .ok_or_else(|| odd("GET /hotplug/memory", &status))?,
                // There is no such device.
                Err(error) if error.kind() == ErrorKind::Refused => 0,
                Err(error) => return Err(error),
            },
        };
        layout::regions(self.version, Arch::HERE, mib, hotplug)
    }

    /// The body of a load.
    fn load_body(&self, load: &Load<'_>) -> Result<Value> {
        let lacks = |what: &str, since: &str| {
            let context = format!(
                "Firecracker {} cannot give {what} at a load; {since} and later can",
                self.version
            );
            Error::new(ErrorKind::Incompatible, context)
        };
        let capabilities = Capabilities::of(Kind::Firecracker, self.version);
        let (backend, path) = match load.memory {
            MemoryFrom::File(path) => ("File", path),
            MemoryFrom::Uffd(path) => ("Uffd", path),
            other => {
                let context =
                    format!("Firecracker maps memory or asks for it; it has no {other:?}");
                return Err(Error::new(ErrorKind::InvalidInput, context));
            }
        };
        let mut body = json!({
            "snapshot_path": text(&load.folder.join(STATE))?,
            "mem_backend": { "backend_type": backend, "backend_path": text(path)? },
            // Disks are patched between the load and the resume.
            "resume_vm": load.then == Then::Resume && load.drives.is_empty(),
        });
        if load.track_dirty == TrackDirty::Yes {
            let is_new = self.version >= Version::new(1, 13, 0);
            let field = if is_new { "track_dirty_pages" } else { "enable_diff_snapshots" };
            body[field] = Value::Bool(true);
        }
        if !load.networks.is_empty() {
            if !capabilities.network_override {
                return Err(lacks("other network devices", "1.12"));
            }
            let overrides = load.networks.iter().map(
                |network| json!({ "iface_id": network.id, "host_dev_name": network.host_device }),
            );
            body["network_overrides"] = overrides.collect();
        }
        if let Some(vsock) = load.vsock {
            if !capabilities.vsock_override {
                return Err(lacks("another vsock socket", "1.16"));
            }
            body["vsock_override"] = json!({ "uds_path": text(vsock)? });
        }
        if load.clock == Clock::Advance {
            if !capabilities.clock_advance {
                return Err(lacks("the time that passed", "1.16"));
            }
            body["clock_realtime"] = Value::Bool(true);
        }
        Ok(body)
    }
}

impl Vmm for Firecracker {
    fn kind(&self) -> Kind {
        Kind::Firecracker
    }

    fn version(&self) -> Version {
        self.version
    }

    fn status(&mut self) -> Result<Status> {
        let answer = self.get("/")?;
        match answer["state"].as_str() {
            Some("Not started") => Ok(Status::NotStarted),
            Some("Running") => Ok(Status::Running),
            Some("Paused") => Ok(Status::Paused),
            _ => Err(odd("GET /", &answer)),
        }
    }

    fn pause(&mut self) -> Result<()> {
        match self.status()? {
            Status::Paused => Ok(()),
            _ => self.set_state("Paused"),
        }
    }

    fn save(&mut self, folder: &Path, memory: MemoryTo<'_>) -> Result<Saved> {
        let (kind, file) = match memory {
            MemoryTo::File(path) => ("Full", path),
            // Less is written: without tracking what it has of its memory, not all there is, much of
            // which it would have to ask for first. Where the bytes lie does not matter.
            MemoryTo::DiscardFile(path) if self.version >= DIFF_WITHOUT_TRACKING => ("Diff", path),
            MemoryTo::DiscardFile(path) => ("Full", path),
            MemoryTo::Diff(path) => ("Diff", path),
            MemoryTo::Dropped | MemoryTo::Pages(_) | MemoryTo::Shared | MemoryTo::Inside => {
                let context = "Firecracker writes memory to a file of its own; \
                               give it one that keeps nothing where it is not wanted";
                return Err(Error::new(ErrorKind::InvalidInput, context));
            }
        };
        let is_discarded = matches!(memory, MemoryTo::DiscardFile(_));
        if kind == "Diff" && !is_discarded && self.capabilities().diff == Diff::Broken {
            let context = format!(
                "Firecracker {} writes diffs at wrong offsets (#5705); save all of memory, \
                 or use 1.14.2 or later",
                self.version
            );
            return Err(Error::new(ErrorKind::Incompatible, context));
        }
        match self.status()? {
            Status::Paused => {}
            other => {
                let context = format!("cannot save a guest that is {other:?}; pause it first");
                return Err(Error::new(ErrorKind::Refused, context));
            }
        }
        let regions = self.memory()?;
        let path = folder.join(STATE);
        if path.exists() {
            let context = format!("there is a state {} already", path.display());
            return Err(Error::new(ErrorKind::InvalidInput, context));
        }
        let body = json!({
            "snapshot_type": kind,
            "snapshot_path": text(&path)?,
            "mem_file_path": text(file)?,
        });
        let started = Instant::now();
        let deadline = Deadline::after(self.timeouts.save);
        let saved = self.http.call(Method::Put, "/snapshot/create", Some(&body), deadline);
        let vmm_time = started.elapsed();
        let checked = saved.and_then(|_| {
            vmstate::read(&path)?;
            let bytes: u64 = regions.iter().map(|region| region.length).sum();
            if is_discarded { Ok(()) } else { check_length(file, bytes) }
        });
        checked.inspect_err(|_| {
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(%error, path = %path.display(), "cannot remove half a state");
            }
        })?;
        Ok(Saved {
            files: vec![STATE.to_owned()],
            memory_file: Some(file.to_owned()),
            memory: regions,
            vmm_time,
            pages: None,
        })
    }

    fn resume(&mut self) -> Result<()> {
        match self.status()? {
            Status::Running => Ok(()),
            _ => self.set_state("Resumed"),
        }
    }

    fn load(&mut self, load: &Load<'_>) -> Result<()> {
        let state = vmstate::read(&load.folder.join(STATE))?;
        compatibility::check(state, self.version)?;
        let body = self.load_body(load)?;
        let deadline = Deadline::after(self.timeouts.load);
        self.http.call(Method::Put, "/snapshot/load", Some(&body), deadline)?;
        for drive in load.drives {
            self.set_drive(drive)?;
        }
        match load.then {
            Then::Resume if !load.drives.is_empty() => self.set_state("Resumed"),
            Then::Resume | Then::StayPaused => Ok(()),
        }
    }

    fn set_drive(&mut self, drive: &Drive) -> Result<()> {
        let is_id = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if drive.id.is_empty() || !drive.id.chars().all(is_id) {
            let context = format!("{:?} is no id of a disk of Firecracker's", drive.id);
            return Err(Error::new(ErrorKind::InvalidInput, context));
        }
        let body = json!({ "drive_id": drive.id, "path_on_host": text(&drive.path)? });
        let deadline = Deadline::after(self.timeouts.call);
        self.http.call(Method::Patch, &format!("/drives/{}", drive.id), Some(&body), deadline)?;
        Ok(())
    }

    fn quit(&mut self) -> Result<Quit> {
        Ok(Quit::Kill)
    }
}

/// Firecracker's memory files are as long as its memory, diffs too.
fn check_length(path: &Path, expected: u64) -> Result<()> {
    let length = File::open(path).and_then(|file| file.metadata()).map(|file| file.len());
    let length =
        length.map_err(|error| Error::file(format!("no memory file {}", path.display()), error))?;
    if length != expected {
        let context =
            format!("{} has {length} bytes, expected the guest's {expected}", path.display());
        return Err(Error::new(ErrorKind::InvalidFile, context));
    }
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, format!("{} is not UTF-8", path.display()))
    })
}

fn odd(call: &str, value: &Value) -> Error {
    let answer = Answer::new(call, None, &value.to_string());
    let context = format!("Firecracker's answer to {call} is {}", answer.body);
    Error::new(ErrorKind::Protocol, context).with_answer(answer)
}
