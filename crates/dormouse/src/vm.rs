//! VMs: a guest with its VMM, its disks and its memory, that sleeps as one snapshot and wakes from one.
//!
//! ```text
//! live/NAME/vm         what the VM is and what it is doing; see `record` and `phase`
//! live/NAME/vm.lock    locked by whoever does something to it
//! live/NAME/vmm/       the VMM's: `api`, `log`, a booted QEMU's `memory`, its sockets
//! live/NAME/disk/      its disks; see the module `live`
//! live/.plane/         the process that all VMs have their disks and memory from; see `plane`
//! ```
//!
//! Each verb works with or without the daemon: what it needs is in these folders, and the data plane is
//! a process of its own that outlives both.

pub(crate) mod guest;
mod lock;
pub(crate) mod phase;
pub(crate) mod plane;
mod process;
mod record;
pub(crate) mod repair;
pub(crate) mod sleep;
mod sockets;
mod versions;
pub(crate) mod wake;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dormouse_store::name::Name;
use dormouse_store::store::Store;
use serde_json::{Value, json};

use crate::exit::{Fault, Kind};
use crate::live::LiveFolder;
use lock::VmLock;
pub(crate) use record::{Memory, Record, Woken};
use versions::Versions;

/// How long the data plane may take to let go of the disks of a VM whose VMM has ended.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long whoever is at a VM may take to find that its VMM was ended.
const INTERRUPT_TIMEOUT: Duration = Duration::from_secs(30);

/// A store with its VMs.
#[derive(Debug)]
pub(crate) struct House {
    pub(crate) store: Store,

    /// The store's folder; absolute.
    pub(crate) dir: PathBuf,

    versions: Versions,
}

impl House {
    /// Of a store that is open.
    pub(crate) fn new(store: Store, dir: &Path) -> Result<House> {
        // As the kernel tells it in its list of mounts, without links.
        let dir = dir.canonicalize().context("cannot tell where the store is")?;
        let versions = Versions::of(&dir);
        Ok(House { store, dir, versions })
    }

    /// The record of a VM; not found if there is none.
    pub(crate) fn record(&self, folder: &LiveFolder) -> Result<Record> {
        Record::read(folder.path())?.ok_or_else(|| {
            let message = format!("there is no VM {}; `dormouse ps` lists all", folder.live);
            Fault::new(Kind::NotFound, message).into()
        })
    }

    /// All VMs, as `ps --json` prints them.
    pub(crate) fn list(&self) -> Result<Vec<Value>> {
        let mut vms = Vec::new();
        for folder in LiveFolder::all(&self.dir)? {
            match Record::read(folder.path()) {
                Ok(Some(record)) => vms.push(self.summary(&folder, &record)?),
                Ok(None) => {}
                // One that is damaged keeps nobody from seeing the others.
                Err(error) => vms.push(json!({
                    "name": folder.live.as_str(),
                    "state": "damaged",
                    "problem": format!("{error:#}"),
                })),
            }
        }
        Ok(vms)
    }

    /// One VM, as `inspect --json` prints it.
    pub(crate) fn inspect(&self, live: &Name) -> Result<Value> {
        let folder = LiveFolder::new(&self.dir, live);
        let record = self.record(&folder)?;
        let mut object = self.summary(&folder, &record)?;
        let disks: Vec<Value> = folder
            .labels()?
            .into_iter()
            .map(|(id, label)| json!({ "id": id.as_str(), "base": label.display() }))
            .collect();
        object["disks"] = json!(disks);
        object["api"] = json!(api_of(&folder));
        object["log"] = json!(log_of(&folder));
        object["guest"] = json!(record.guest);
        Ok(object)
    }

    fn summary(&self, folder: &LiveFolder, record: &Record) -> Result<Value> {
        let lives = match &record.process {
            Some(process) => process.find()?.is_some(),
            None => false,
        };
        let problem = match &record.phase {
            phase::Phase::Failed { why } => Some(why.clone()),
            phase::Phase::Awake if !lives => Some("its VMM has ended".to_owned()),
            _ => None,
        };
        let state = if problem.is_some() { "failed" } else { record.phase.word() };
        Ok(json!({
            "name": folder.live.as_str(),
            "state": state,
            "vmm": record.kind().name(),
            "vmm_version": record.version,
            "over": record.over,
            "pid": record.process.as_ref().filter(|_| lives).map(|process| process.pid),
            "since": record.since.to_string(),
            "problem": problem.or_else(|| record.trouble.clone()),
        }))
    }

    /// Ends a VM at once, like a power cut for the guest, and removes all of it.
    pub(crate) fn kill(&self, live: &Name) -> Result<()> {
        let folder = LiveFolder::new(&self.dir, live);
        let _lock = match VmLock::take(&folder) {
            Err(error) if Kind::of(&error) == Kind::Busy => match interrupt(&folder) {
                // Whoever was at it has removed it.
                Err(error) if Kind::of(&error) == Kind::NotFound => return Ok(()),
                lock => lock?,
            },
            lock => lock?,
        };
        let record = match Record::read(folder.path()) {
            Ok(record) => record,
            // A damaged one does not say which process it was.
            Err(error) if Kind::of(&error) == Kind::Corrupt => {
                tracing::warn!(error = &*error, "what is left of the VM is removed");
                None
            }
            Err(error) => return Err(error),
        };
        if let Some(process) = record.as_ref().and_then(|record| record.process.as_ref()) {
            process.end()?;
        }
        if record.is_none_or(|record| matches!(record.phase, phase::Phase::FallingAsleep(_))) {
            sleep::capture::forget(self, &folder);
        }
        remove_vm(self, &folder)
    }
}

/// Ends the VMM of a VM that somebody is at, who has no more to wait for then. The lock, once it is free.
fn interrupt(folder: &LiveFolder) -> Result<VmLock> {
    // One that is damaged, or has none yet, is waited for all the same.
    if let Ok(Some(Record { process: Some(process), .. })) = Record::read(folder.path()) {
        process.end()?;
    }
    VmLock::take_within(folder, INTERRUPT_TIMEOUT)
}

/// The socket on which a VM's VMM answers.
pub(crate) fn api_of(folder: &LiveFolder) -> PathBuf {
    folder.file("vmm/api")
}

/// What a VM's VMM has said.
pub(crate) fn log_of(folder: &LiveFolder) -> PathBuf {
    folder.file("vmm/log")
}

/// Removes a VM whose VMM is gone, as soon as the data plane has noticed.
fn remove_vm(house: &House, folder: &LiveFolder) -> Result<()> {
    let begun = Instant::now();
    loop {
        // Its door may be open, or just be made, for a VMM that will not come. What comes of it is seen
        // below.
        if folder.has_memory()?
            && let Err(error) = plane::Plane::of(&house.dir).stop_memory(&folder.live)
        {
            tracing::debug!(live = %folder.live, error = &*error, "its memory is not let go of yet");
        }
        match folder.remove() {
            Err(error) if Kind::of(&error) == Kind::Busy && begun.elapsed() < RELEASE_TIMEOUT => {
                std::thread::sleep(Duration::from_millis(2));
            }
            removed => return removed,
        }
    }
}
