//! The data plane of a store: one `dormouse mount` in a process of its own, in which every VM finds its
//! disks and its memory. It outlives whoever started it, and is shared by all VMs of the store, so that
//! forks share what is decoded and cached.
//!
//! ```text
//! live/.plane/files/   the mount
//! live/.plane/lock     locked by whoever looks for it and starts it
//! live/.plane/control  its socket for who wants memory served; see `mount::memories`
//! live/.plane/log      what it has to tell
//! live/.plane/versions those of VMMs' programs; see `versions`
//! ```

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dormouse_store::name::{Name, SnapRef};
use dormouse_sys::peer::Peer;
use dormouse_vmm::cloud_hypervisor::offload::PageRequests;
use serde_json::Value;

use super::phase::Phase;
use super::record::Record;
use crate::background::OURSELVES;
use crate::exit::{Fault, Kind};
use crate::live::control::ask_within;
use crate::live::{LiveFolder, spread};
use crate::mount::memories::MountRequest;
use crate::mount::{Attendance, MountFigures, MountKeeping};

/// How long it is tried to start it: what a killed one had answered may have to be done again first.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The same where nobody is in its way: one that cannot mount will not a minute later.
const FAILURE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long it is waited for that serves a VMM's memory which has handed it over.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How often it is asked whether a VM has all of its pages.
const PAGES_REST: Duration = Duration::from_millis(5);

/// Rest between tries.
const REST_MIN: Duration = Duration::from_millis(2);
const REST_MAX: Duration = Duration::from_millis(200);

/// Whether a VM of a store has something from its data plane, or is about to. One that cannot be told counts.
pub(crate) fn is_needed(store_dir: &Path) -> bool {
    let needs = |folder: &LiveFolder| match Record::read(folder.path()) {
        Ok(None) => false,
        Ok(Some(record)) => {
            let lives = record.process.is_some_and(|process| !matches!(process.find(), Ok(None)));
            lives || record.phase == Phase::Waking
        }
        Err(_) => true,
    };
    LiveFolder::all(store_dir).map_or(true, |folders| folders.iter().any(needs))
}

/// The data plane of a store.
#[derive(Clone, Debug)]
pub(crate) struct Plane {
    store_dir: PathBuf,
}

impl Plane {
    /// The one of the store in `store_dir`, an absolute path, whether it runs or not.
    pub(crate) fn of(store_dir: &Path) -> Plane {
        Plane { store_dir: store_dir.to_owned() }
    }

    /// The same; started if it does not run.
    pub(crate) fn find_or_start(store_dir: &Path) -> Result<Plane> {
        let plane = Plane::of(store_dir);
        let folder = plane.folder();
        if plane.figures()?.is_some() {
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
        // Its holder starts another one when one is killed, and somebody else may have done so; and one
        // that is killed is in the way for a moment.
        let begun = Instant::now();
        let mut rest = REST_MIN;
        loop {
            if plane.figures()?.is_some() {
                return Ok(plane);
            }
            let started = plane.start()?;
            if plane.figures()?.is_some() {
                return Ok(plane);
            }
            let waits = started.success() || started.code() == Some(Kind::Busy.code().into());
            let timeout = if waits { START_TIMEOUT } else { FAILURE_TIMEOUT };
            if begun.elapsed() > timeout {
                let (log, said) = (folder.join("log"), plane.last_words());
                let message = format!(
                    "the data plane did not start ({started}): {said}; {} has all",
                    log.display()
                );
                return Err(Fault::new(Kind::Other, message).into());
            }
            thread::sleep(rest);
            rest = (rest * 2).min(REST_MAX);
        }
    }

    /// The last line that it has said.
    fn last_words(&self) -> String {
        let log = fs::read(self.folder().join("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let mut lines = log.lines().map(str::trim).filter(|line| !line.is_empty());
        let last = lines.next_back().unwrap_or("it said nothing");
        last.strip_prefix("because: ").unwrap_or(last).to_owned()
    }

    /// Starts it, and tells how that ended: it fails where another one runs.
    fn start(&self) -> Result<ExitStatus> {
        let files = self.files();
        match fs::create_dir(&files) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("cannot make {}", files.display()));
            }
            _ => {}
        }
        if let Some(lives) = self.folder().parent() {
            spread(lives);
        }
        let log = self.folder().join("log");
        let said = File::options().append(true).create(true).mode(0o600).open(&log);
        let said = said.with_context(|| format!("cannot open {}", log.display()))?;
        Command::new(OURSELVES)
            .arg0("dormouse")
            .arg("--store")
            .arg(&self.store_dir)
            .arg("mount")
            .arg(&files)
            // Should it be killed, the next one goes on with what it had, and no guest sees an error.
            .args(["--hold", "--background", "--log"])
            .arg(&log)
            .stdin(Stdio::null())
            // No pipe: it must not end with us, should we be killed while it starts.
            .stdout(Stdio::null())
            .stderr(said)
            .status()
            .context("cannot start the data plane")
    }

    /// Whether it is what is mounted there.
    pub(crate) fn is_at(&self, place: &Path) -> bool {
        self.files() == place
    }

    /// Where it is asked for memory.
    pub(crate) fn control(&self) -> PathBuf {
        self.folder().join("control")
    }

    /// Has it mind us until what is returned is dropped; none if it does not run, or is of an earlier version
    /// that does not do that.
    pub(crate) fn attend(&self) -> Option<Attendance> {
        let minded = Attendance::new()
            .and_then(|(attendance, request)| Ok(self.ask(&request)?.map(|_| attendance)));
        minded.unwrap_or_else(|error| {
            tracing::debug!(
                error = &*error,
                "what we leave if we are killed waits for the next command"
            );
            None
        })
    }

    /// Has it let a VM's VMM in that asks for its memory page by page.
    pub(crate) fn serve_memory(&self, live: &Name) -> Result<()> {
        let told = self.ask(&MountRequest::Serve { live: live.clone() })?;
        told.map(drop).context("the data plane has ended")
    }

    /// Fails unless it serves a VM's memory: the guest would find nothing in it.
    pub(crate) fn check_memory(&self, live: &Name) -> Result<()> {
        let begun = Instant::now();
        loop {
            let told = self.ask(&MountRequest::Status { live: live.clone() });
            match &told {
                Ok(Some(told)) if told["is_served"] == true => return Ok(()),
                Ok(Some(told)) if told["may_come"] != true => {
                    return Err(not_served(live, told["failed"].as_str()));
                }
                // One that was killed has a successor, who may have it.
                _ if begun.elapsed() > MEMORY_TIMEOUT => {
                    let told = told?.unwrap_or_default();
                    return Err(not_served(live, told["failed"].as_str()));
                }
                _ => thread::sleep(REST_MIN),
            }
        }
    }

    /// Why it could not serve a VM's memory, if that is so: a VMM whose memory is not served is stopped, and
    /// says nothing of it.
    pub(crate) fn memory_failure(&self, live: &Name) -> Option<anyhow::Error> {
        let told = self.ask(&MountRequest::Status { live: live.clone() }).ok()??;
        told["failed"].as_str().map(|why| not_served(live, Some(why)))
    }

    /// Has it serve the pages that a VM's Cloud Hypervisor asks for, and stop that process where it cannot.
    pub(crate) fn serve_pages(&self, live: &Name, pid: u32, requests: &PageRequests) -> Result<()> {
        let cannot = "cannot copy a descriptor";
        let vmm = Peer::by_pid(pid).context("the VMM is gone")?;
        let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().context(cannot);
        let mut descriptors: Vec<OwnedFd> =
            requests.descriptors().into_iter().map(copy).collect::<Result<_>>()?;
        descriptors.push(copy(vmm.pidfd().as_fd())?);
        let (live, slots) = (live.clone(), requests.slots().to_vec());
        let told = self.ask(&MountRequest::ServePages { live, slots, descriptors })?;
        told.map(drop).context("the data plane has ended")
    }

    /// Waits until a VM has all of its pages.
    pub(crate) fn wait_for_pages(&self, live: &Name, timeout: Duration) -> Result<()> {
        let begun = Instant::now();
        loop {
            let told = self.ask(&MountRequest::PagesStatus { live: live.clone() })?;
            // One that does not run has a successor before long.
            if told.is_some_and(|told| told["is_served"] != true) {
                return Ok(());
            }
            if begun.elapsed() > timeout {
                let message = format!("{live} has not all of its memory yet");
                return Err(Fault::new(Kind::Busy, message).into());
            }
            thread::sleep(PAGES_REST);
        }
    }

    /// Has it let go of a VM's memory, if it runs.
    pub(crate) fn stop_memory(&self, live: &Name) -> Result<()> {
        self.ask(&MountRequest::Stop { live: live.clone() }).map(drop)
    }

    fn ask(&self, request: &MountRequest) -> Result<Option<Value>> {
        ask_within(&self.control(), request, ANSWER_TIMEOUT).context("cannot ask the data plane")
    }

    /// What it tells of itself; none if it does not run.
    pub(crate) fn figures(&self) -> Result<Option<MountFigures>> {
        if !self.folder().exists() {
            return Ok(None);
        }
        MountKeeping::figures(&self.store_dir, &self.files())
    }

    /// Where a VM's disk is.
    pub(crate) fn disk(&self, live: &Name, id: &Name) -> PathBuf {
        self.files().join("live").join(live.as_str()).join("disk").join(id.as_str())
    }

    /// Where a snapshot's memory is, also when it was removed since, for VMs that woke from it.
    pub(crate) fn memory(&self, snap: &SnapRef) -> PathBuf {
        let number = snap.number.unwrap_or_default().to_string();
        self.files().join(snap.name.as_str()).join(number).join("memory")
    }

    /// Where a dump goes that nobody needs.
    pub(crate) fn discard(&self, live: &Name) -> PathBuf {
        self.files().join("discard").join(live.as_str())
    }

    /// Where a dump goes that is to be stored.
    pub(crate) fn capture(&self, live: &Name) -> PathBuf {
        self.files().join("capture").join(live.as_str())
    }

    fn folder(&self) -> PathBuf {
        self.store_dir.join("live/.plane")
    }

    /// The mount.
    fn files(&self) -> PathBuf {
        self.folder().join("files")
    }
}

fn not_served(live: &Name, why: Option<&str>) -> anyhow::Error {
    let why = why.map(|why| format!(": {why}")).unwrap_or_default();
    let message = format!("the data plane does not serve the memory of {live}{why}");
    Fault::new(Kind::Other, message).into()
}
