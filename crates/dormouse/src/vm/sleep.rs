//! A sleep: a VM becomes one snapshot of memory, disks and state, and ends or goes on.
//!
//! The order is what makes the three belong together: the guest is paused; its VMM writes its state,
//! which completes whatever its devices were doing; the disks, to which nobody writes any more, are
//! sealed, and so is the memory; then it may go on. All of it is captured, and published by one manifest.
//! Whatever fails before that, the guest goes on and nothing is left behind.

pub(super) mod capture;
mod descriptors;
mod early;

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dormouse_store::manifest::{MemoryRegion, Vmm as Origin};
use dormouse_store::name::{ImageName, Name, SnapRef};
use dormouse_store::progress::Job;
use dormouse_vmm::deadline::Timeouts;
use dormouse_vmm::error::{Error as VmmError, ErrorKind as VmmErrorKind};
use dormouse_vmm::kind::Kind as VmmKind;
use dormouse_vmm::vmm::{MemoryTo, Quit, Saved, Vmm, connect};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::Serialize;
use serde_json::{Value, json};

use super::guest::GUEST_STATE;
use super::lock::VmLock;
use super::phase::{Phase, Repair, Sleep, Then};
use super::plane::Plane;
use super::process::ProcessId;
use super::record::{Memory, Record, Woken};
use super::wake::write_private;
use super::{House, api_of, remove_vm};
use crate::exit::{Fault, Kind};
use crate::live::owner::{Hear, commit_wherever};
use crate::live::{LiveCommit, LiveFolder, LiveState, MemoryFrom, Scope, remove_tree};
use crate::mount::captures::TakenCapture;

/// The label that tells a snapshot which sleep it came from.
pub(crate) const ATTEMPT_LABEL: &str = "dormouse.sleep";

/// How long a guest may take to flush before it is paused.
const BEFORE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a VMM may take to restore the memory of a guest that has just woken.
const RESTORE_TIMEOUT: Duration = Duration::from_secs(60);
const RESTORE_REST: Duration = Duration::from_millis(50);

/// How Cloud Hypervisor says that it has not: "is still in progress" to one call, "is in progress" to
/// another.
const STILL_RESTORES: [&str; 2] = ["on-demand memory restore is", "in progress"];

/// How long a guest that has just woken may take until it has all of its memory: Cloud Hypervisor asks for
/// one page at a time.
const PAGES_TIMEOUT: Duration = Duration::from_secs(600);

/// How long a VMM may take to end that was asked to.
const QUIT_TIMEOUT: Duration = Duration::from_secs(5);

/// How a VM is to be stored.
#[derive(Clone, Debug)]
pub(crate) struct SleepOptions {
    /// The snapshot's name; none: that of the snapshot it lies over, else the VM's.
    pub(crate) name: Option<Name>,

    /// What becomes of the VM.
    pub(crate) then: Then,

    /// Labels of the snapshot.
    pub(crate) labels: BTreeMap<String, String>,
}

/// What came of a sleep.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Slept {
    /// The snapshot.
    pub(crate) snapshot: String,

    /// How long the guest stood still: until it went on, or until there was nothing more to take from
    /// it.
    pub(crate) frozen_seconds: f64,

    /// Of that, the VMM: pausing, writing its state, and going on.
    pub(crate) vmm_seconds: f64,

    /// From the pause until the snapshot was durable.
    pub(crate) durable_seconds: f64,

    /// What was written to the store.
    pub(crate) written_bytes: u64,

    /// Whether the VM goes on.
    pub(crate) goes_on: bool,
}

/// What the snapshot of a sleep is called, and marked with.
#[derive(Clone, Copy, Debug)]
struct Title<'a> {
    name: &'a Name,
    attempt: uuid::Uuid,
    labels: &'a BTreeMap<String, String>,
}

/// What a guest stood still for, told while the snapshot is still being made durable.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Frozen {
    pub(crate) frozen_seconds: f64,
}

/// Puts a VM to sleep. `on_frozen` is called when its guest has been let go on, or has nothing more to
/// give.
pub(crate) fn sleep(
    house: &House,
    live: &Name,
    options: &SleepOptions,
    on_frozen: &mut dyn FnMut(Frozen),
    job: Job<'_>,
) -> Result<Slept> {
    let folder = LiveFolder::new(&house.dir, live);
    let lock = VmLock::take(&folder)?;
    super::repair::repair(house, &folder, &lock)?;
    let mut record = house.record(&folder)?;
    let process = match (&record.phase, &record.process) {
        (Phase::Awake, Some(process)) => process.clone(),
        (Phase::Failed { why }, _) => {
            let message = format!(
                "the VM {live} has failed: {why}; `dormouse disk commit {live} NAME` stores its \
                     disks, and `dormouse kill {live}` removes all of it"
            );
            return Err(Fault::new(Kind::Refused, message).into());
        }
        (phase, _) => {
            let message = format!("the VM {live} is {}", phase.word());
            return Err(Fault::new(Kind::Busy, message).into());
        }
    };
    let name = match (&options.name, &record.over) {
        (Some(name), _) => name.clone(),
        (None, Some(over)) => over.parse::<SnapRef>()?.name,
        (None, None) => live.clone(),
    };
    before(&record, &folder)?;
    // Should we be killed with the guest paused, it goes on.
    let _attendance = Plane::of(&house.dir).attend();
    let api = api_of(&folder);
    let vmm = connect(record.kind(), &api, Timeouts::STANDARD).context("cannot reach the VMM")?;
    let attempt = uuid::Uuid::new_v4();
    record.phase =
        Phase::FallingAsleep(Sleep { attempt, name: name.to_string(), then: options.then });
    record.write(folder.path())?;
    let mut falling = Falling {
        house,
        folder: &folder,
        record: &record,
        process: &process,
        vmm,
        then: options.then,
        begun: Instant::now(),
        goes_on: false,
        frozen: None,
        copy: None,
        taken: None,
    };
    let title = Title { name: &name, attempt, labels: &options.labels };
    match falling.fall(title, on_frozen, job) {
        Ok(slept) => {
            let finished = falling.finish();
            finish_record(house, &folder, record, options.then, &slept.snapshot, &finished)?;
            finished.with_context(|| format!("{} is stored, but", slept.snapshot))?;
            Ok(slept)
        }
        Err(error) => {
            // It may be the data plane that failed: the guest that goes on needs one.
            if let Err(error) = Plane::find_or_start(&house.dir) {
                tracing::error!(error = &*error, "the data plane does not come back");
            }
            // The snapshot decides, before the guest goes on: who was to tell that it is there may have
            // been killed before that.
            if let Some(snapshot) = falling.published_after_all() {
                tracing::warn!(
                    snapshot,
                    error = &*error,
                    "the VM is stored, but not all went well"
                );
                let elapsed = falling.begun.elapsed();
                let slept =
                    falling.slept(&json!({ "snapshot": snapshot }), Duration::ZERO, elapsed)?;
                let finished = falling.finish();
                finish_record(house, &folder, record, options.then, &snapshot, &finished)?;
                finished.with_context(|| format!("{snapshot} is stored, but"))?;
                return Ok(slept);
            }
            falling.undo();
            drop(falling);
            // Whether the VMM lives is looked at anew.
            let repair = super::repair::repair(house, &folder, &lock)
                .context("and the sleep that failed could not be undone")
                .with_context(|| format!("{error:#}"))?;
            if repair == Repair::Fail {
                return Err(error.context("the VMM has ended, and the VM has failed"));
            }
            if Kind::of(&error) != Kind::Cancelled {
                note_trouble(house, &folder, &error);
            }
            Err(error)
        }
    }
}

/// Writes down what became of a VM that was stored.
fn finish_record(
    house: &House,
    folder: &LiveFolder,
    mut record: Record,
    then: Then,
    snapshot: &str,
    finished: &Result<()>,
) -> Result<()> {
    match (then, finished) {
        (Then::End, _) => remove_vm(house, folder),
        (Then::GoOn, Ok(())) => {
            record.phase = Phase::Awake;
            record.over = Some(snapshot.to_owned());
            record.trouble = None;
            record.write(folder.path())
        }
        (Then::GoOn, Err(error)) => {
            record.phase =
                Phase::Failed { why: format!("it was stored, and does not go on: {error:#}") };
            record.write(folder.path())
        }
    }
}

/// Writes down why a VM that goes on was not stored, for whoever did not wait for that.
fn note_trouble(house: &House, folder: &LiveFolder, error: &anyhow::Error) {
    let noted = house.record(folder).and_then(|mut record| {
        if record.phase == Phase::Awake {
            record.trouble = Some(format!("it was not stored: {error:#}"));
            record.write(folder.path())?;
        }
        Ok(())
    });
    if let Err(error) = noted {
        tracing::warn!(error = &*error, "that a sleep failed is not written down");
    }
}

/// Has the guest flush, as far as there is a way.
fn before(record: &Record, folder: &LiveFolder) -> Result<()> {
    let Some((program, args)) = record.guest.before_sleep.split_first() else { return Ok(()) };
    let place = folder.file("vmm");
    let place = place.to_str().context("a store in a path that is not UTF-8")?;
    let fill =
        |arg: &String| arg.replace("{name}", folder.live.as_str()).replace("{folder}", place);
    let args: Vec<_> = args.iter().map(fill).collect();
    run_before(program, &args, BEFORE_TIMEOUT)
}

fn run_before(program: &str, args: &[String], timeout: Duration) -> Result<()> {
    let what = || format!("before_sleep: {program}");
    let child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // What it starts is ended with it.
        .process_group(0)
        .spawn();
    let mut child = child.map_err(|error| {
        let message = format!("before_sleep: cannot start {program}: {error}; the VM runs on");
        Fault::new(Kind::Other, message)
    })?;
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().with_context(what)? {
            if status.success() {
                return Ok(());
            }
            let message = format!("before_sleep: {program} ended with {status}; the VM runs on");
            return Err(Fault::new(Kind::Other, message).into());
        }
        if begun.elapsed() > timeout {
            kill_process_group(Pid::from_child(&child), Signal::KILL)
                .map_err(io::Error::from)
                .and_then(|()| child.wait())
                .with_context(what)?;
            let message =
                format!("before_sleep: {program} took longer than {timeout:?}; the VM runs on");
            return Err(Fault::new(Kind::Other, message).into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A VM that falls asleep.
struct Falling<'a> {
    house: &'a House,
    folder: &'a LiveFolder,
    record: &'a Record,
    process: &'a ProcessId,
    vmm: Box<dyn Vmm>,
    then: Then,
    begun: Instant,
    /// Whether its guest was let go on already.
    goes_on: bool,
    frozen: Option<Duration>,
    /// The copy of its memory that was made already.
    copy: Option<uuid::Uuid>,
    /// What its VMM dumped into a capture.
    taken: Option<TakenCapture>,
}

impl Falling<'_> {
    fn fall(
        &mut self,
        title: Title<'_>,
        on_frozen: &mut dyn FnMut(Frozen),
        job: Job<'_>,
    ) -> Result<Slept> {
        let staging = self.staging()?;
        if matches!(self.record.memory, Memory::Copied(_)) {
            let plane = Plane::find_or_start(&self.house.dir)?;
            plane.wait_for_pages(&self.folder.live, PAGES_TIMEOUT)?;
        }
        job.check()?;
        self.begun = Instant::now();
        self.vmm.pause().context("pausing the guest")?;
        if self.goes_by_descriptors() {
            return self.fall_by_descriptors(title, job);
        }
        let saved = self.save_when_restored(&staging)?;
        let vmm_time = self.begun.elapsed();
        job.check()?;
        let memory = self.memory_of(&saved)?;
        let wanted = self.wanted(title, &staging, &saved, memory)?;
        let mut resumed = Ok(());
        let mut resuming = Duration::ZERO;
        let committed = {
            let (vmm, begun, then) = (&mut self.vmm, self.begun, self.then);
            let (goes_on, frozen) = (&mut self.goes_on, &mut self.frozen);
            let hear: Hear<'_> = &mut |told: Value| {
                let may_go_on = told["is_live"] == true || told["is_read"] == true;
                if !may_go_on || frozen.is_some() {
                    return;
                }
                if then == Then::GoOn {
                    let asked = Instant::now();
                    resumed = vmm.resume();
                    resuming = asked.elapsed();
                    *goes_on = resumed.is_ok();
                }
                let stood = begun.elapsed();
                *frozen = Some(stood);
                on_frozen(Frozen { frozen_seconds: stood.as_secs_f64() });
            };
            store(self.house, self.folder, &wanted, hear, job)?
        };
        let durable = self.begun.elapsed();
        if let Err(error) = resumed {
            tracing::warn!(%error, "the guest did not go on at once; it is tried again");
        }
        if self.then == Then::GoOn && !self.goes_on {
            // Where this fails the snapshot is there all the same: the caller finds it.
            self.goes_on = self.vmm.resume().is_ok();
        }
        self.frozen.get_or_insert_with(|| self.begun.elapsed());
        self.slept(&committed, vmm_time + resuming, durable)
    }

    /// What came of it, once the guest stands still no longer.
    fn slept(&self, committed: &Value, vmm_time: Duration, durable: Duration) -> Result<Slept> {
        let snapshot = committed["snapshot"].as_str().context("a commit without a snapshot")?;
        let stood = self.frozen.unwrap_or_else(|| self.begun.elapsed());
        // That was written before the commit.
        let captured = self.taken.as_ref().map(TakenCapture::written_bytes).unwrap_or_default();
        Ok(Slept {
            snapshot: snapshot.to_owned(),
            frozen_seconds: stood.as_secs_f64(),
            vmm_seconds: vmm_time.as_secs_f64(),
            durable_seconds: durable.as_secs_f64(),
            written_bytes: committed["written_bytes"].as_u64().unwrap_or(0) + captured,
            goes_on: self.then == Then::GoOn,
        })
    }

    /// Has the VMM write the state of a guest that is paused. A Cloud Hypervisor whose guest has just woken
    /// may have to restore the rest of its memory first: the guest goes on meanwhile.
    fn save_when_restored(&mut self, staging: &Path) -> Result<Saved> {
        let begun = Instant::now();
        loop {
            let saved = self.save(staging).context("having the VMM write its state");
            match saved {
                Err(error) if still_restores(&error, begun) => self.rest()?,
                saved => return saved,
            }
        }
    }

    /// Lets the guest go on for a moment in which the rest of its memory may come.
    fn rest(&mut self) -> Result<()> {
        self.vmm.resume().context("letting the guest go on")?;
        std::thread::sleep(RESTORE_REST);
        self.staging()?;
        self.begun = Instant::now();
        self.vmm.pause().context("pausing the guest")
    }

    /// The snapshot, if it was published whatever failed.
    fn published_after_all(&self) -> Option<String> {
        let Phase::FallingAsleep(sleep) = &self.record.phase else { return None };
        let published = super::repair::outcome(self.house, self.folder, sleep);
        published.unwrap_or_else(|error| {
            tracing::error!(error = &*error, "whether the VM is stored cannot be told");
            None
        })
    }

    /// A new folder for what the VMM writes.
    fn staging(&self) -> Result<PathBuf> {
        let staging = self.folder.file("vmm/save");
        remove_tree(&staging)?;
        DirBuilder::new()
            .mode(0o700)
            .create(&staging)
            .with_context(|| format!("cannot make {}", staging.display()))?;
        Ok(staging)
    }

    fn save(&mut self, staging: &Path) -> Result<Saved> {
        match (self.record.kind(), &self.record.memory) {
            (VmmKind::Qemu, Memory::Mapped(woken)) => {
                let memory = self.mapped(woken)?;
                self.save_and_copy(staging, &memory)
            }
            (VmmKind::Qemu, _) => Ok(self.vmm.save(staging, MemoryTo::Shared)?),
            (VmmKind::Firecracker, Memory::Mapped(_) | Memory::Served(_)) => {
                self.save_and_discard(staging)
            }
            _ if self.then == Then::End => self.save_into_capture(staging),
            (VmmKind::Firecracker, _) => {
                Ok(self.vmm.save(staging, MemoryTo::File(&staging.join("memory")))?)
            }
            (VmmKind::CloudHypervisor, _) => Ok(self.vmm.save(staging, MemoryTo::Inside)?),
        }
    }

    /// Has a VMM write its state whose memory somebody else takes, though it writes that, too.
    fn save_and_discard(&mut self, staging: &Path) -> Result<Saved> {
        let discard = Plane::find_or_start(&self.house.dir)?.discard(&self.folder.live);
        let saved = self.vmm.save(staging, MemoryTo::DiscardFile(&discard));
        if let Err(error) = fs::remove_file(&discard) {
            tracing::debug!(%error, "what was swallowed leaves its name");
        }
        Ok(saved?)
    }

    fn memory_of(&self, saved: &Saved) -> Result<MemoryFrom> {
        Ok(match &self.record.memory {
            // There is nothing more to be taken.
            _ if self.taken.is_some() => MemoryFrom::default(),
            Memory::Mapped(woken) => self.mapped(woken)?,
            Memory::Served(_) => MemoryFrom::Served,
            Memory::File => MemoryFrom::File { path: self.folder.file("vmm/memory") },
            Memory::Own | Memory::Copied(_) => {
                let path = saved.memory_file.clone();
                MemoryFrom::Dump { path: path.context("the VMM wrote no memory")? }
            }
        })
    }

    fn mapped(&self, woken: &Woken) -> Result<MemoryFrom> {
        Ok(MemoryFrom::Mapped {
            pid: self.process.pid,
            path: Plane::of(&self.house.dir).memory(&woken.snapshot.parse()?),
            image: woken.image.clone(),
            layout: woken.layout.clone(),
        })
    }

    fn wanted(
        &self,
        title: Title<'_>,
        staging: &Path,
        saved: &Saved,
        memory: MemoryFrom,
    ) -> Result<LiveCommit> {
        let mut labels = title.labels.clone();
        labels.insert(ATTEMPT_LABEL.to_owned(), title.attempt.to_string());
        let captured = self.taken.as_ref().map(TakenCapture::images).unwrap_or_default();
        let mut states = Vec::new();
        for file in &saved.files {
            let (name, path) = (Name::new(file.as_str())?, staging.join(file));
            if !captured.iter().any(|one| one.image == ImageName::State(name.clone())) {
                states.push(LiveState { name, path });
            }
        }
        let guest = staging.join(GUEST_STATE);
        write_private(&guest, &self.record.guest.to_bytes()?)?;
        states.push(LiveState { name: Name::new(GUEST_STATE)?, path: guest });
        let seen = saved.memory.iter().map(|region| MemoryRegion {
            block: region.block.clone(),
            image_offset: region.image_offset,
            guest_address: region.guest_address,
            length: region.length,
            page_size: 4096,
            plugged: true,
        });
        let mut memory_layout: Vec<MemoryRegion> = seen.collect();
        if let (true, Some(woken)) = (memory_layout.is_empty(), self.record.woken()) {
            memory_layout.clone_from(&woken.layout);
        }
        Ok(LiveCommit {
            states,
            captured: captured.to_vec(),
            // What it lies over is its lineage, whatever others committed under the name meanwhile.
            parent: self.record.over.clone().unwrap_or_else(|| "none".to_owned()),
            memory,
            memory_layout,
            is_whole: true,
            copy: self.copy,
            vmm: Origin {
                kind: Some(self.record.kind().name().to_owned()),
                version: Some(self.vmm.version().to_string()),
                host_kernel: kernel_release(),
                arch: Some(std::env::consts::ARCH.to_owned()),
                ..Origin::default()
            },
            labels,
            ..LiveCommit::new(Scope::All, title.name.clone())
        })
    }

    /// After the snapshot is there: the VM ends or has gone on.
    fn finish(&mut self) -> Result<()> {
        if let Err(error) = remove_tree(&self.folder.file("vmm/save")) {
            tracing::warn!(error = &*error, "what the VMM wrote stays");
        }
        if self.taken.take().is_some() {
            capture::forget(self.house, self.folder);
        }
        match self.then {
            Then::End => self.end(),
            Then::GoOn if self.goes_on => Ok(()),
            Then::GoOn => Ok(self.vmm.resume()?),
        }
    }

    fn end(&mut self) -> Result<()> {
        let asked = self.vmm.quit();
        // One that handed its guest over ends by itself, and may be gone.
        let ends = match &asked {
            Ok(quit) => *quit == Quit::Ends,
            Err(error) => is_gone(error),
        };
        if ends && self.process.ends_within(QUIT_TIMEOUT)? {
            return Ok(());
        }
        self.process.end()
    }

    /// Lets the guest go on after a failure, and takes away what the VMM wrote.
    fn undo(&mut self) {
        if let Err(error) = self.vmm.resume()
            && !is_gone(&error)
        {
            tracing::error!(%error, "the guest cannot be let go on");
        }
        if let Err(error) = remove_tree(&self.folder.file("vmm/save")) {
            tracing::warn!(error = &*error, "what the VMM wrote stays");
        }
        capture::forget(self.house, self.folder);
        early::forget(self.folder);
    }
}

/// Whether a save failed because memory is still to come, and it is worth while to try again.
fn still_restores(error: &anyhow::Error, begun: Instant) -> bool {
    let said = format!("{error:#}");
    STILL_RESTORES.iter().all(|words| said.contains(words)) && begun.elapsed() < RESTORE_TIMEOUT
}

/// Commits a VM.
fn store(
    house: &House,
    folder: &LiveFolder,
    wanted: &LiveCommit,
    hear: Hear<'_>,
    job: Job<'_>,
) -> Result<Value> {
    commit_wherever(&house.store, folder, wanted, hear, job)
        .context("storing memory, disks and state")
}

fn is_gone(error: &VmmError) -> bool {
    error.kind() == VmmErrorKind::Gone
}

fn kernel_release() -> Option<String> {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_too_long_is_ended_with_all_that_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let number = folder.path().join("number");
        let script = format!("sleep 1000 & echo $! > {}; sleep 1000", number.display());
        let args = ["-c".to_owned(), script];
        let failed = run_before("sh", &args, Duration::from_millis(500)).unwrap_err();
        assert!(failed.to_string().contains("took longer than 500ms"), "{failed:#}");
        let number = fs::read_to_string(number).unwrap();
        let begun = Instant::now();
        let stat = format!("/proc/{}/stat", number.trim());
        // One that nobody waits for may stay as a name.
        while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            std::thread::sleep(Duration::from_millis(5));
            assert!(begun.elapsed() < Duration::from_secs(5), "it lives on");
        }
        run_before("true", &[], Duration::from_secs(5)).unwrap();
        assert!(run_before("false", &[], Duration::from_secs(5)).is_err());
    }
}
