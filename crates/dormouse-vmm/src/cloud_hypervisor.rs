//! Cloud Hypervisor, through its API.
//!
//! A save leaves a folder: `config.json`, `state.json`, `memory-ranges`. Cloud Hypervisor writes the
//! first two with one `write` whose count it does not look at, and syncs none of them; so both are
//! read back and have to be whole. [`Saved::sync`] makes them durable.
//!
//! A load wants such a folder again. It is made in [`Load::scratch`]: the configuration rewritten for
//! new disks and devices, with every field that is not known here as it was, and links to the rest.
//!
//! Since version 53 a snapshot can be [handed over by descriptors](offload) instead.
//!
//! Sources: Cloud Hypervisor's `docs/snapshot_restore.md`, `cloud-hypervisor.yaml`.

pub mod config;
pub mod offload;
pub mod state;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use crate::capabilities::FileRestore;
use crate::deadline::{Deadline, Timeouts};
use crate::error::{Answer, Error, ErrorKind, Result};
use crate::http::{Http, Method};
use crate::kind::{Kind, Version};
use crate::vmm::{
    Clock, Drive, Load, MemoryFrom, MemoryTo, Quit, Saved, Status, Then, TrackDirty, Vmm,
};
use state::MemoryRange;

/// The file of the configuration.
pub const CONFIG: &str = "config.json";
/// The file of the state.
pub const STATE: &str = "state.json";
/// The file of the memory, if there is any to save.
pub const MEMORY: &str = "memory-ranges";

/// Bytes of a configuration or state. Those of real guests have some hundreds of KiB.
pub const JSON_BYTES_MAX: u64 = 64 << 20;

/// `resume` and `memory_restore_mode` are there since.
const RESTORE_FIELDS: Version = Version::new(52, 0, 0);

/// A Cloud Hypervisor.
#[derive(Debug)]
pub struct CloudHypervisor {
    http: Http,
    api: PathBuf,
    version: Version,
    timeouts: Timeouts,
}

impl CloudHypervisor {
    pub(crate) fn greet(
        api: &Path,
        stream: UnixStream,
        timeouts: Timeouts,
        deadline: Deadline,
    ) -> Result<CloudHypervisor> {
        let mut http = Http::new(api, stream);
        let answer = http.json(Method::Get, "/api/v1/vmm.ping", deadline)?;
        let version = answer["version"].as_str();
        let version = version.ok_or_else(|| odd("GET /api/v1/vmm.ping", &answer))?.parse()?;
        Kind::CloudHypervisor.check_version(version)?;
        Ok(CloudHypervisor { http, api: api.to_owned(), version, timeouts })
    }

    /// Connects to one that runs; for what [`Vmm`] has no word for.
    pub fn connect(api: &Path, timeouts: Timeouts) -> Result<CloudHypervisor> {
        let deadline = Deadline::after(timeouts.call);
        let stream = crate::socket::connect(api, deadline)?;
        CloudHypervisor::greet(api, stream, timeouts, deadline)
    }

    /// Its API's socket.
    pub fn api(&self) -> &Path {
        &self.api
    }

    fn put(&mut self, name: &str, body: Option<&Value>, deadline: Deadline) -> Result<()> {
        self.http.call(Method::Put, &format!("/api/v1/{name}"), body, deadline)?;
        Ok(())
    }

    fn call(&mut self, name: &str) -> Result<()> {
        self.put(name, None, Deadline::after(self.timeouts.call))
    }

    /// The folder that a load reads.
    fn make_folder(&self, load: &Load<'_>, memory: &Path) -> Result<PathBuf> {
        let folder = load.scratch.join("restore");
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("cannot remove {}", folder.display()), error));
            }
            _ => {}
        }
        let made = |what: &Path, result: std::io::Result<()>| {
            result.map_err(|error| Error::io(format!("cannot make {}", what.display()), error))
        };
        made(&folder, fs::create_dir(&folder))?;
        let text = read_json(&load.folder.join(CONFIG))?;
        let rewritten = config::rewrite(&text, load.drives, load.networks, load.vsock)?;
        let path = folder.join(CONFIG);
        made(&path, fs::write(&path, rewritten))?;
        let ranges = state::memory_ranges(&read_json(&load.folder.join(STATE))?)?;
        let links = [(STATE, load.folder.join(STATE)), (MEMORY, memory.to_owned())];
        let count = if ranges.is_empty() { 1 } else { 2 };
        for (name, target) in &links[..count] {
            let target = fs::canonicalize(target)
                .map_err(|error| Error::file(format!("no {}", target.display()), error))?;
            let link = folder.join(name);
            made(&link, std::os::unix::fs::symlink(target, &link))?;
        }
        if !ranges.is_empty() {
            check_memory(memory, &ranges)?;
        }
        Ok(folder)
    }
}

impl Vmm for CloudHypervisor {
    fn kind(&self) -> Kind {
        Kind::CloudHypervisor
    }

    fn version(&self) -> Version {
        self.version
    }

    fn status(&mut self) -> Result<Status> {
        let deadline = Deadline::after(self.timeouts.call);
        let answer = match self.http.json(Method::Get, "/api/v1/vm.info", deadline) {
            Ok(answer) => answer,
            // It has no VM: 404 or 500, as the version has it.
            Err(error) if error.kind() == ErrorKind::Refused => return Ok(Status::NotStarted),
            Err(error) => return Err(error),
        };
        Ok(match answer["state"].as_str() {
            Some("Created") => Status::NotStarted,
            Some("Running") => Status::Running,
            Some("Paused" | "BreakPoint") => Status::Paused,
            Some("Shutdown") => Status::Stopped("Shutdown".to_owned()),
            _ => return Err(odd("GET /api/v1/vm.info", &answer)),
        })
    }

    fn pause(&mut self) -> Result<()> {
        match self.status()? {
            Status::Paused => Ok(()),
            _ => self.call("vm.pause"),
        }
    }

    fn save(&mut self, folder: &Path, memory: MemoryTo<'_>) -> Result<Saved> {
        match memory {
            MemoryTo::Inside => {}
            MemoryTo::Diff(_) => {
                let context = "Cloud Hypervisor has no diffs of memory";
                return Err(Error::new(ErrorKind::Incompatible, context));
            }
            _ => {
                let context = "Cloud Hypervisor writes memory beside its state, nowhere else; \
                               save it inside, or take a snapshot by descriptors";
                return Err(Error::new(ErrorKind::InvalidInput, context));
            }
        }
        match self.status()? {
            Status::Paused => {}
            other => {
                let context = format!("cannot save a guest that is {other:?}; pause it first");
                return Err(Error::new(ErrorKind::Refused, context));
            }
        }
        for name in [CONFIG, STATE, MEMORY] {
            if folder.join(name).symlink_metadata().is_ok() {
                let context = format!(
                    "there is a {name} in {} already, where Cloud Hypervisor makes a new one",
                    folder.display()
                );
                return Err(Error::new(ErrorKind::InvalidInput, context));
            }
        }
        let body = json!({ "destination_url": url(folder)? });
        let started = Instant::now();
        let saved = self.put("vm.snapshot", Some(&body), Deadline::after(self.timeouts.save));
        let vmm_time = started.elapsed();
        let checked = saved.and_then(|()| {
            config::check(&read_json(&folder.join(CONFIG))?)?;
            let ranges = state::memory_ranges(&read_json(&folder.join(STATE))?)?;
            if !ranges.is_empty() {
                check_memory(&folder.join(MEMORY), &ranges)?;
            }
            Ok(ranges)
        });
        let ranges = checked.inspect_err(|_| {
            for name in [CONFIG, STATE, MEMORY] {
                let path = folder.join(name);
                if let Err(error) = fs::remove_file(&path)
                    && error.kind() != std::io::ErrorKind::NotFound
                {
                    tracing::warn!(%error, path = %path.display(), "cannot remove half a state");
                }
            }
        })?;
        Ok(Saved {
            files: vec![CONFIG.to_owned(), STATE.to_owned()],
            memory_file: (!ranges.is_empty()).then(|| folder.join(MEMORY)),
            memory: state::regions(&ranges),
            vmm_time,
            pages: None,
        })
    }

    fn resume(&mut self) -> Result<()> {
        match self.status()? {
            Status::Running => Ok(()),
            _ => self.call("vm.resume"),
        }
    }

    fn load(&mut self, load: &Load<'_>) -> Result<()> {
        let (memory, mode) = match load.memory {
            MemoryFrom::FileCopied(path) => (path, "Copy"),
            MemoryFrom::FileOnDemand(path) => {
                if self.capabilities().file_restore == FileRestore::Copy {
                    let context = format!(
                        "Cloud Hypervisor {} copies memory before its guest goes on; \
                         52 and later can read it on demand",
                        self.version
                    );
                    return Err(Error::new(ErrorKind::Incompatible, context));
                }
                (path, "OnDemand")
            }
            other => {
                let context =
                    format!("Cloud Hypervisor copies memory or reads it; it has no {other:?}");
                return Err(Error::new(ErrorKind::InvalidInput, context));
            }
        };
        if load.track_dirty == TrackDirty::Yes || load.clock == Clock::Advance {
            let context = "Cloud Hypervisor neither tracks dirty pages for a save \
                           nor advances the clock at a load";
            return Err(Error::new(ErrorKind::Incompatible, context));
        }
        let folder = self.make_folder(load, memory)?;
        let mut body = json!({ "source_url": url(&folder)?, "prefault": false });
        let has_fields = self.version >= RESTORE_FIELDS;
        if has_fields {
            body["memory_restore_mode"] = Value::String(mode.to_owned());
            body["resume"] = Value::Bool(load.then == Then::Resume);
        }
        self.put("vm.restore", Some(&body), Deadline::after(self.timeouts.load))?;
        match load.then {
            Then::Resume if !has_fields => self.resume(),
            Then::Resume | Then::StayPaused => Ok(()),
        }
    }

    fn set_drive(&mut self, drive: &Drive) -> Result<()> {
        let context = format!("Cloud Hypervisor is given disk {} with the load", drive.id);
        Err(Error::new(ErrorKind::Incompatible, context))
    }

    fn quit(&mut self) -> Result<Quit> {
        match self.call("vmm.shutdown") {
            Ok(()) => Ok(Quit::Ends),
            // It may be gone before its answer is out.
            Err(error) if error.kind() == ErrorKind::Gone => Ok(Quit::Ends),
            Err(error) => Err(error),
        }
    }
}

/// Reads one of the two files of JSON, of bounded length.
fn read_json(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(JSON_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|error| Error::file(format!("cannot read {}", path.display()), error))?;
    if bytes.len() as u64 > JSON_BYTES_MAX {
        let context = format!("{} has more than {JSON_BYTES_MAX} bytes", path.display());
        return Err(Error::new(ErrorKind::InvalidFile, context));
    }
    Ok(bytes)
}

/// The memory's file is as long as its ranges together.
fn check_memory(path: &Path, ranges: &[MemoryRange]) -> Result<()> {
    let length = fs::metadata(path).map(|file| file.len());
    let length =
        length.map_err(|error| Error::file(format!("no memory {}", path.display()), error))?;
    let expected: u64 = ranges.iter().map(|range| range.length).sum();
    if length != expected {
        let context = format!(
            "{} has {length} bytes, expected the {expected} of the ranges in {STATE}",
            path.display()
        );
        return Err(Error::new(ErrorKind::InvalidFile, context));
    }
    Ok(())
}

fn url(folder: &Path) -> Result<String> {
    let text = folder.to_str().filter(|_| folder.is_absolute());
    text.map(|text| format!("file://{text}")).ok_or_else(|| {
        let context = format!("{} is no absolute path in UTF-8", folder.display());
        Error::new(ErrorKind::InvalidInput, context)
    })
}

fn odd(call: &str, value: &Value) -> Error {
    let answer = Answer::new(call, None, &value.to_string());
    let context = format!("Cloud Hypervisor's answer to {call} is {}", answer.body);
    Error::new(ErrorKind::Protocol, context).with_answer(answer)
}
