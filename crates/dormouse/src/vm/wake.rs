//! How a VM comes to be: booted from a guest's description, or woken from a snapshot.
//!
//! The record is written first and says that the VM is waking; so whatever a crash leaves is found and
//! removed. Disks, data plane, VMM, state: each step may fail, and then all of it is undone.

mod descriptors;
mod options;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_store::manifest::Manifest;
use dormouse_store::name::{ImageName, ImageRef, Name, SnapRef};
use dormouse_store::progress::Job;
use dormouse_store::store::{Durable, Snapshot};
use dormouse_vmm::capabilities::{Drives, FileRestore};
use dormouse_vmm::deadline::Timeouts;
use dormouse_vmm::firecracker::{compatibility, vmstate};
use dormouse_vmm::kind::{Kind as VmmKind, Version};
use dormouse_vmm::launch::{DiskPlace, Memory as MemoryPlace, Places, Sharing};
use dormouse_vmm::program;
use dormouse_vmm::vmm::{
    Clock, Drive, Load, MemoryFrom, Status, Then as AfterLoad, TrackDirty, Vmm, connect_at_start,
};

use serde::Serialize;
use serde_json::json;

use super::guest::{Disk, GUEST_BYTES_MAX, GUEST_STATE, Guest, MemoryBackend};
use super::lock::VmLock;
use super::phase::Phase;
use super::plane::Plane;
use super::process::Started;
use super::record::{self, Memory, Record, Woken};
use super::{House, api_of, remove_vm};
use crate::exit::{Fault, Kind, SomeAwake};
use crate::live::{BaseLabel, LiveDisks, LiveFolder, NewBase};
use crate::mount::Attendance;
use crate::mount::memories::faults_socket;
pub(crate) use descriptors::MIGRATION_CONFIG;
pub(crate) use options::WakeOptions;

/// The longest state file: Firecracker's own limit is 10 MB, QEMU's devices take less than one.
const STATE_BYTES_MAX: u64 = 256 << 20;

/// The longest path of a socket (`unix(7)`), without its end.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Of a VMM that did not let its guest wake.
const LAST_LINES: usize = 10;

/// VMs of one fork that are woken at a time: most of the time of each is waiting for the disk and for its
/// VMM.
pub(crate) const FORKS_AT_ONCE: usize = 8;

/// A VM that runs, as `run --json` and `wake --json` print it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Awake {
    #[serde(rename = "name")]
    pub(crate) live: Name,
    pub(crate) over: Option<String>,
    pub(crate) pid: u32,
    pub(crate) api: PathBuf,
    pub(crate) seconds: WakeSeconds,
}

/// VMs of one snapshot, as `fork --json` prints them.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Forks {
    pub(crate) snapshot: String,
    pub(crate) forks: Vec<Awake>,
}

/// How long a wake took, from the request.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct WakeSeconds {
    /// Everything.
    pub(crate) total: f64,

    /// Until disks and memory were there for the VMM; of a fork, for those of all of its VMs that are
    /// prepared at once. Of memory that is asked for page by page the socket is there, and whoever keeps
    /// its descriptors is started beside the VMM.
    pub(crate) ready: f64,

    /// Of the VMM: its start, loading the state, and letting the guest go on.
    pub(crate) vmm: f64,
}

/// VMs of a fork that are prepared before the first of their VMMs is started: each holds a descriptor.
pub(crate) const PREPARED_MAX: usize = 128;

/// Boots a guest as `live`.
pub(crate) fn run(house: &House, guest: Guest, live: &Name, job: Job<'_>) -> Result<Awake> {
    let begun = Instant::now();
    guest.check_disks()?;
    let (loads, attendance) = (OnceLock::new(), OnceLock::new());
    let options = &WakeOptions::default();
    let wanted = Wanted { guest, from: None, options, job, loads, attendance };
    Waking::begin(house, live, begun)?.prepare(&wanted)?.wake(&wanted)
}

/// Wakes a snapshot as `live`.
pub(crate) fn wake(
    house: &House,
    snap: &SnapRef,
    live: &Name,
    options: &WakeOptions,
    job: Job<'_>,
) -> Result<Awake> {
    let begun = Instant::now();
    let snapshot = house.store.snapshot(snap)?;
    let wanted = Wanted::of(&snapshot, options, job)?;
    options.check(&wanted.guest, std::slice::from_ref(live))?;
    Waking::begin(house, live, begun)?.prepare(&wanted)?.wake(&wanted)
}

/// Wakes one snapshot as many VMs, whatever is committed or removed meanwhile. `on_awake` is told of each;
/// those that are awake stay so if another one fails, or the job is stopped.
///
/// All that their VMMs need is made before the first of them is started: a guest that works takes
/// processor and disk from whoever prepares the next one. Then several are woken at a time.
pub(crate) fn fork(
    house: &House,
    snap: &SnapRef,
    names: &[Name],
    options: &WakeOptions,
    job: Job<'_>,
    on_awake: &mut dyn FnMut(&Awake) -> Result<()>,
) -> Result<Forks> {
    let begun = Instant::now();
    check_names(names)?;
    let snapshot = house.store.snapshot(snap)?;
    let wanted = Wanted::of(&snapshot, options, job)?;
    options.check(&wanted.guest, names)?;
    let mut forks: Vec<Awake> = Vec::new();
    let mut wake = || -> Result<()> {
        for names in names.chunks(PREPARED_MAX) {
            let mut prepared = Vec::new();
            for live in names {
                job.check()?;
                let waking = Waking::begin(house, live, begun);
                let ready = waking.and_then(|waking| waking.prepare(&wanted));
                prepared.push(ready.with_context(|| format!("cannot wake {live}"))?);
            }
            wake_all(prepared, &wanted, &mut |awake| {
                on_awake(&awake)?;
                forks.push(awake);
                Ok(())
            })?;
        }
        Ok(())
    };
    let woken = wake();
    forks.sort_by_key(|awake| names.iter().position(|live| *live == awake.live));
    let Err(error) = woken else {
        return Ok(Forks { snapshot: snapshot.manifest().display_name(), forks });
    };
    Err(match forks[..] {
        [] => error,
        _ => error.context(SomeAwake { awake: forks.iter().map(|fork| json!(fork)).collect() }),
    })
}

/// Refuses a name that is there twice: the second VM would find the first in its way.
pub(crate) fn check_names(names: &[Name]) -> Result<()> {
    let mut seen = BTreeSet::new();
    match names.iter().find(|name| !seen.insert(name.as_str())) {
        Some(name) => Err(Fault::usage(format!("the name {name} is given twice")).into()),
        None => Ok(()),
    }
}

/// Lets VMs wake, several at a time, and tells of each. No more are begun once one has failed, `on_awake`
/// says so or the job is to stop: those do not stay.
fn wake_all(
    prepared: Vec<Prepared<'_>>,
    wanted: &Wanted<'_>,
    on_awake: &mut dyn FnMut(Awake) -> Result<()>,
) -> Result<()> {
    let count = FORKS_AT_ONCE.min(prepared.len());
    let waiting = Mutex::new(prepared.into_iter());
    // Iterators of vectors do not break where somebody panics.
    let rest = || waiting.lock().unwrap_or_else(PoisonError::into_inner);
    let next = || rest().next();
    let mut failed = None;
    thread::scope(|scope| {
        let (sender, woken) = mpsc::channel();
        for _ in 0..count {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                while let Some(ready) = next() {
                    let live = ready.waking.folder.live.clone();
                    let awake = ready.wake(wanted);
                    let awake = awake.with_context(|| format!("cannot wake {live}"));
                    if sender.send(awake).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for awake in woken {
            if let Err(error) = awake.and_then(&mut *on_awake) {
                failed.get_or_insert(error);
                let dropped: Vec<_> = rest().by_ref().collect();
                drop(dropped);
            }
        }
    });
    failed.map_or(Ok(()), Err)
}

/// What is to be woken or booted, the same for all forks.
struct Wanted<'a> {
    guest: Guest,
    from: Option<&'a Snapshot>,
    options: &'a WakeOptions,
    /// Asked before each step that takes long.
    job: Job<'a>,
    /// The VMM's version that was found to load the state: it is read once for all forks.
    loads: OnceLock<Version>,
    /// Should we be killed, what is not awake goes.
    attendance: OnceLock<Option<Attendance>>,
}

impl<'a> Wanted<'a> {
    fn of(snapshot: &'a Snapshot, options: &'a WakeOptions, job: Job<'a>) -> Result<Wanted<'a>> {
        let mut guest = match &options.guest {
            Some(guest) => {
                // Others are told by their states what disks they have.
                if guest.launch.vmm == VmmKind::Qemu {
                    guest.check_disks()?;
                }
                guest.clone()
            }
            None => guest_of(snapshot)?,
        };
        if let Some(program) = &options.vmm {
            guest.launch.program = Some(program.clone());
        }
        let (loads, attendance) = (OnceLock::new(), OnceLock::new());
        Ok(Wanted { guest, from: Some(snapshot), options, job, loads, attendance })
    }
}

/// The guest that a snapshot was stored with.
pub(crate) fn guest_of(snapshot: &Snapshot) -> Result<Guest> {
    let name = ImageName::State(Name::new(GUEST_STATE)?);
    let display = snapshot.manifest().display_name();
    if snapshot.manifest().image(&name).is_none() {
        let message = format!(
            "{display} was not stored by `dormouse sleep` and does not say what VMM it needs; \
             give --guest FILE"
        );
        return Err(Fault::new(Kind::Refused, message).into());
    }
    Guest::parse(&read_state(snapshot, &name, GUEST_BYTES_MAX as u64)?)
        .with_context(|| format!("the guest of {display}"))
}

fn read_state(snapshot: &Snapshot, name: &ImageName, bytes_max: u64) -> Result<Vec<u8>> {
    let image = snapshot.image(name)?;
    let bytes = image.size_bytes();
    if bytes > bytes_max {
        let message = format!("{name} has {bytes} bytes; at most {bytes_max} are read");
        return Err(Fault::new(Kind::Refused, message).into());
    }
    let mut state = vec![0; usize::try_from(bytes)?];
    image.read_at(&mut state, 0)?;
    Ok(state)
}

/// A VM that is being made. Dropped before it is awake, nothing of it stays.
struct Waking<'a> {
    house: &'a House,
    folder: LiveFolder,
    begun: Instant,
    is_awake: bool,
    _lock: VmLock,
}

/// One with all that its VMM needs.
struct Prepared<'a> {
    waking: Waking<'a>,
    record: Record,
    version: Version,
    plane: Plane,
    places: Places,
    options: WakeOptions,
    ready: Duration,
}

impl Drop for Waking<'_> {
    fn drop(&mut self) {
        if !self.is_awake
            && let Err(error) = remove_vm(self.house, &self.folder)
        {
            // What failed first is what the user has to know; the rest is found by its record.
            tracing::warn!(error = &*error, "a VM that did not wake left something");
        }
    }
}

impl<'a> Waking<'a> {
    /// Takes the name.
    fn begin(house: &'a House, live: &Name, begun: Instant) -> Result<Waking<'a>> {
        let folder = LiveFolder::new(&house.dir, live);
        check_path(&api_of(&folder))?;
        let lock = VmLock::make(&folder).map_err(|error| match Record::read(folder.path()) {
            Ok(Some(Record { phase: Phase::FallingAsleep(_), .. })) => {
                let message = format!("the VM {live} falls asleep; its name is free when it has");
                Fault::new(Kind::Busy, message).into()
            }
            _ => error,
        })?;
        Ok(Waking { house, folder, begun, is_awake: false, _lock: lock })
    }

    /// Makes all that the VMM needs. Nothing of it has to survive a power cut, which ends the VM, before
    /// its guest goes on.
    fn prepare(self, wanted: &Wanted<'_>) -> Result<Prepared<'a>> {
        let guest = wanted.guest.clone();
        let from = wanted.from;
        let kind = guest.launch.vmm;
        let program = program::find(kind, guest.launch.program.as_deref())?;
        let version = self.house.versions.get(kind, &program)?;
        if let Some(snapshot) = from {
            check_vmm(snapshot.manifest(), kind)?;
            if wanted.loads.get() != Some(&version) {
                check_state(snapshot, kind, version)?;
                // Another one's of another version is as right.
                let _ = wanted.loads.set(version);
            }
            descriptors::check(snapshot.manifest(), version)?;
        }
        let memory = memory_of(&guest, from)?;
        let record = Record {
            phase: Phase::Waking,
            guest,
            version: version.to_string(),
            over: from.map(|snapshot| snapshot.manifest().display_name()),
            memory,
            process: None,
            since: jiff::Timestamp::now(),
            trouble: None,
        };
        record.write_unsettled(self.folder.path())?;
        if let Some(snapshot) = from {
            let memory = snapshot.image(&ImageName::Memory)?;
            let live = &self.folder.live;
            self.house.store.hold_for_live_too(live, &[&memory], Durable::Later)?;
        }
        for disk in &record.guest.disks {
            self.make_disk(disk, from).with_context(|| format!("disk {}", disk.id))?;
        }
        let plane = Plane::find_or_start(&self.house.dir)?;
        if wanted.attendance.get().is_none() {
            // VMs of one request are prepared one after the other.
            let _ = wanted.attendance.set(plane.attend());
        }
        let run_dir = self.folder.file("vmm");
        DirBuilder::new()
            .mode(0o700)
            .create(&run_dir)
            .with_context(|| format!("cannot make {}", run_dir.display()))?;
        let mut places = self.places(&record, &plane, from)?;
        let options = wanted.options.of_one(&places)?;
        places.vsock.clone_from(&options.vsock);
        if record.is_served() {
            plane.serve_memory(&self.folder.live)?;
        }
        let ready = self.begun.elapsed();
        Ok(Prepared { waking: self, record, version, plane, places, options, ready })
    }

    fn make_disk(&self, disk: &Disk, from: Option<&Snapshot>) -> Result<()> {
        let store = &self.house.store;
        let later = Durable::Later;
        let other;
        let (snapshot, id) = match (from, &disk.from) {
            (Some(snapshot), _) => (Some(snapshot), disk.id.clone()),
            (None, Some(over)) => {
                let over: ImageRef = over.parse()?;
                let ImageName::Disk(id) = over.image else {
                    return Err(Fault::usage(format!("{over} is not a disk")).into());
                };
                other = store.snapshot(&over.snap)?;
                (Some(&other), id)
            }
            (None, None) => (None, disk.id.clone()),
        };
        let folder = &self.folder;
        let Some(snapshot) = snapshot else {
            let Some(path) = &disk.from_file else {
                let size = disk.size.context("a blank disk without a size")?;
                return LiveDisks::create(store, folder, &disk.id, NewBase::Blank, size, later);
            };
            let bytes = fs::metadata(path)
                .with_context(|| format!("cannot look at {}", path.display()))?
                .len();
            let size = disk.size.unwrap_or(bytes);
            return LiveDisks::create(store, folder, &disk.id, NewBase::File(path), size, later);
        };
        let name = ImageName::Disk(id);
        let image = snapshot.image(&name)?;
        let called = format!("{}:{name}", snapshot.manifest().display_name());
        // A guest that wakes knows how large its disk is.
        let size = disk.size.filter(|_| from.is_none()).unwrap_or(image.size_bytes());
        ensure!(
            size >= image.size_bytes(),
            "{called} has {} bytes and can only grow",
            image.size_bytes()
        );
        LiveDisks::create(store, folder, &disk.id, NewBase::Image(&image, called), size, later)
    }

    fn places(&self, record: &Record, plane: &Plane, from: Option<&Snapshot>) -> Result<Places> {
        let run_dir = self.folder.file("vmm");
        let memory = match (record.kind(), from) {
            (VmmKind::Qemu, None) => {
                let path = run_dir.join("memory");
                let bytes = record.guest.launch.memory_bytes.unwrap_or_default();
                new_private(&path)
                    .and_then(|file| file.set_len(bytes))
                    .with_context(|| format!("cannot make {}", path.display()))?;
                Some(MemoryPlace { path, sharing: Sharing::Shared })
            }
            (VmmKind::Qemu, Some(snapshot)) => {
                let path = plane.memory(&snapshot.manifest().snap_ref());
                Some(MemoryPlace { path, sharing: Sharing::Private })
            }
            _ => None,
        };
        let mut disks = BTreeMap::new();
        for disk in &record.guest.disks {
            let mut path = plane.disk(&self.folder.live, &disk.id);
            if record.kind() == VmmKind::Firecracker {
                path = link_disk(&run_dir, &disk.id, &path)?;
            }
            disks.insert(disk.id.to_string(), DiskPlace::File(path));
        }
        Ok(Places {
            name: self.folder.live.to_string(),
            folder: run_dir.clone(),
            api: run_dir.join("api"),
            memory,
            disks,
            vsock: None,
        })
    }

    /// Where the VMM finds the snapshot's state.
    fn state_dir(&self) -> PathBuf {
        self.folder.file("vmm/load")
    }

    /// Waits for the VMM and gives it the snapshot's state. The guest stays paused.
    fn load(
        &self,
        record: &Record,
        started: &mut Started,
        places: &Places,
        plane: &Plane,
        snapshot: &Snapshot,
        options: &WakeOptions,
    ) -> Result<Box<dyn Vmm>> {
        let ended = &mut || started.ended();
        let mut vmm = connect_at_start(record.kind(), &places.api, Timeouts::STANDARD, ended)?;
        let state_dir = self.state_dir();
        fs::create_dir(&state_dir)
            .with_context(|| format!("cannot make {}", state_dir.display()))?;
        let images = snapshot.manifest().images.iter().map(|entry| &entry.image);
        let states: Vec<&ImageName> = images.filter(|image| is_of_vmm(image)).collect();
        for &image in &states {
            let ImageName::State(name) = image else { continue };
            // Whoever stored it without us may have called it anything.
            let file = match (record.kind(), states.len()) {
                (VmmKind::Qemu, 1) => dormouse_vmm::qemu::STATE,
                (VmmKind::Firecracker, 1) => dormouse_vmm::firecracker::STATE,
                _ => name.as_str(),
            };
            let bytes = read_state(snapshot, image, STATE_BYTES_MAX)?;
            write_private(&state_dir.join(file), &bytes)?;
        }
        let memory_path = plane.memory(&snapshot.manifest().snap_ref());
        let faults = faults_socket(&self.folder);
        let drives: Vec<Drive> = places
            .disks
            .iter()
            .filter_map(|(id, place)| match place {
                DiskPlace::File(path) => Some(Drive { id: id.clone(), path: path.clone() }),
                DiskPlace::Nbd { .. } => None,
            })
            .collect();
        let by_descriptors = descriptors::is_in(&state_dir);
        let memory = match &record.memory {
            Memory::Served(_) => MemoryFrom::Uffd(&faults),
            Memory::Copied(_) => match vmm.capabilities().file_restore {
                FileRestore::OnDemand => MemoryFrom::FileOnDemand(&memory_path),
                FileRestore::Copy | FileRestore::Mapped => MemoryFrom::FileCopied(&memory_path),
            },
            _ if record.kind() == VmmKind::Qemu => MemoryFrom::AtStart,
            _ => MemoryFrom::File(&memory_path),
        };
        let scratch = self.folder.file("vmm/scratch");
        fs::create_dir(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
        if by_descriptors {
            let image = snapshot.image(&ImageName::Memory)?;
            let (live, pid) = (&self.folder.live, started.id.pid);
            let vm = descriptors::Loading { live, pid, plane, places };
            descriptors::load(&state_dir, image, &vm, &drives, options)?;
        } else {
            let loaded = vmm.load(&Load {
                folder: &state_dir,
                scratch: &scratch,
                memory,
                drives: &drives,
                networks: &options.networks,
                vsock: options.vsock.as_deref(),
                track_dirty: TrackDirty::No,
                clock: Clock::Default,
                then: AfterLoad::StayPaused,
            });
            loaded.map_err(|error| {
                let served = record.is_served().then(|| plane.memory_failure(&self.folder.live));
                served.flatten().unwrap_or_else(|| error.into())
            })?;
        }
        if vmm.capabilities().drives == Drives::AfterLoad {
            drives.iter().try_for_each(|drive| vmm.set_drive(drive))?;
        }
        if record.is_served() {
            // Whoever took the VMM in may have been killed before it could keep what it was given.
            plane.check_memory(&self.folder.live)?;
        }
        Ok(vmm)
    }
}

impl Prepared<'_> {
    /// Starts the VMM and lets the guest go on.
    fn wake(self, wanted: &Wanted<'_>) -> Result<Awake> {
        wanted.job.check()?;
        let from = wanted.from;
        let Prepared { mut waking, mut record, version, plane, places, options, ready } = self;
        let run_dir = waking.folder.file("vmm");
        let path = waking.folder.path().to_owned();
        let start = match from {
            None => record.guest.launch.boot(&places, version)?,
            Some(_) => record.guest.launch.wake(&places, version)?,
        };
        for (path, bytes) in &start.files {
            write_private(path, bytes)?;
        }
        if from.is_none() {
            // This guest goes on as soon as its VMM does.
            waking.folder.settle()?;
        }
        let vmm_begun = Instant::now();
        let mut started = Started::start(start.command(), &run_dir.join("log"))?;
        record.process = Some(started.id.clone());
        record.write_unsettled(&path)?;
        let woken = match from {
            None => wait_until_running(&record, &places, &mut started),
            Some(snapshot) => thread::scope(|scope| {
                // What the guest is told is durable has to be; until then it waits.
                let settling = scope.spawn(|| waking.folder.settle());
                let loaded =
                    waking.load(&record, &mut started, &places, &plane, snapshot, &options);
                let settled = settling.join().unwrap_or_else(|_| {
                    Err(Fault::new(Kind::Other, "making a VM durable panicked").into())
                });
                let mut vmm = loaded?;
                settled?;
                wanted.job.check()?;
                Ok(vmm.resume()?)
            }),
        };
        if let Err(error) = woken {
            started.id.end()?;
            return Err(with_last_words(error, &run_dir));
        }
        let vmm = vmm_begun.elapsed();
        // What was loaded is not needed any more; what stays of it goes with the VM.
        if from.is_some()
            && let Err(error) = fs::remove_dir_all(waking.state_dir())
        {
            tracing::debug!(%error, "the state's files stay");
        }
        record.phase = Phase::Awake;
        record.write(&path)?;
        waking.is_awake = true;
        if let Err(error) = record::settled(&path) {
            tracing::warn!(error = &*error, "whoever repairs the VM says that it is settled");
        }
        let pid = started.id.pid;
        started.let_go();
        Ok(Awake {
            live: waking.folder.live.clone(),
            over: record.over,
            pid,
            api: places.api,
            seconds: WakeSeconds {
                total: waking.begun.elapsed().as_secs_f64(),
                ready: ready.as_secs_f64(),
                vmm: vmm.as_secs_f64(),
            },
        })
    }
}

/// How a VM's memory will be had.
fn memory_of(guest: &Guest, from: Option<&Snapshot>) -> Result<Memory> {
    let kind = guest.launch.vmm;
    let Some(snapshot) = from else {
        return Ok(if kind == VmmKind::Qemu { Memory::File } else { Memory::Own });
    };
    let display = snapshot.manifest().display_name();
    let image = snapshot.image(&ImageName::Memory).with_context(|| {
        format!("{display} has no memory to wake from; `dormouse run` boots from its disks")
    })?;
    let image = BaseLabel::of(&image, format!("{display}:memory"));
    let manifest = snapshot.manifest();
    let layout = manifest.memory_layout.clone();
    let woken = Woken { snapshot: display, image, layout, created: manifest.created };
    Ok(match kind {
        VmmKind::CloudHypervisor => Memory::Copied(woken),
        VmmKind::Firecracker if guest.memory_backend == MemoryBackend::Uffd => {
            Memory::Served(woken)
        }
        VmmKind::Firecracker | VmmKind::Qemu => Memory::Mapped(woken),
    })
}

/// Whether an image is a state of the VMM's.
fn is_of_vmm(image: &ImageName) -> bool {
    matches!(image, ImageName::State(name) if name.as_str() != GUEST_STATE)
}

/// A disk's path for a VMM that writes it into its state and opens it at a load, before it can be told
/// another: one that is the same for every VM, from the folder that its VMM runs in.
fn link_disk(run_dir: &Path, id: &Name, disk: &Path) -> Result<PathBuf> {
    let path = Path::new("disks").join(id.as_str());
    let link = run_dir.join(&path);
    fs::create_dir_all(run_dir.join("disks"))
        .and_then(|()| std::os::unix::fs::symlink(disk, &link))
        .with_context(|| format!("cannot make {}", link.display()))?;
    Ok(path)
}

fn check_vmm(manifest: &Manifest, kind: VmmKind) -> Result<()> {
    match &manifest.vmm.kind {
        Some(stored) if *stored != kind.name() => {
            let display = manifest.display_name();
            let message = format!("{display} was stored by {stored}, and {kind} cannot load it");
            Err(Fault::new(Kind::Refused, message).into())
        }
        _ => Ok(()),
    }
}

/// Fails where a VMM of this version would not load the state: a Firecracker ends when it does not.
fn check_state(snapshot: &Snapshot, kind: VmmKind, version: Version) -> Result<()> {
    let states = snapshot.manifest().images.iter().map(|entry| &entry.image);
    let mut states = states.filter(|image| is_of_vmm(image));
    let (VmmKind::Firecracker, Some(image), None) = (kind, states.next(), states.next()) else {
        return Ok(());
    };
    let state = read_state(snapshot, image, STATE_BYTES_MAX)?;
    // One that cannot be made out is the load's to judge.
    match vmstate::parse(&state) {
        Some(header) => Ok(compatibility::check(header, version)?),
        None => Ok(()),
    }
}

/// Fails where no VMM could have its socket there.
fn check_path(socket: &Path) -> Result<()> {
    let length = socket.as_os_str().len();
    if length <= SOCKET_PATH_BYTES_MAX {
        return Ok(());
    }
    let message = format!(
        "the VMM's socket would be {}, of {length} bytes, and the kernel takes \
         {SOCKET_PATH_BYTES_MAX}: a shorter name is wanted, or a store in a shorter path",
        socket.display()
    );
    Err(Fault::usage(message).into())
}

/// Waits for a VMM whose guest boots.
fn wait_until_running(record: &Record, places: &Places, started: &mut Started) -> Result<()> {
    let (begun, timeouts) = (Instant::now(), Timeouts::STANDARD);
    let ended = &mut || started.ended();
    let mut vmm = connect_at_start(record.kind(), &places.api, timeouts, ended)?;
    let timeout = timeouts.start;
    loop {
        match vmm.status()? {
            Status::Running => return Ok(()),
            Status::Stopped(why) => anyhow::bail!("the VMM stopped its guest: {why}"),
            status if begun.elapsed() > timeout => {
                anyhow::bail!("the guest does not run after {timeout:?}: {status:?}")
            }
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// A new file for nobody else's eyes.
fn new_private(path: &Path) -> io::Result<fs::File> {
    fs::File::options().write(true).create_new(true).mode(0o600).open(path)
}

pub(super) fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    new_private(path)
        .and_then(|mut file| file.write_all(bytes))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Puts the last words of a VMM below everything that is wrong, for whoever has to find out why: its log
/// goes with the VM.
fn with_last_words(error: anyhow::Error, run_dir: &Path) -> anyhow::Error {
    let kind = Kind::of(&error);
    let log = fs::read(run_dir.join("log")).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    if kind == Kind::Cancelled || lines.is_empty() {
        return error;
    }
    let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
    let words = Fault::new(kind, format!("the VMM's last words: {last}"));
    let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
    causes.into_iter().rev().fold(words.into(), |error: anyhow::Error, cause| error.context(cause))
}
