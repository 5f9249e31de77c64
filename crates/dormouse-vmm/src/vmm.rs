//! What every driver does, in the order of a sleep: [`pause`](Vmm::pause), [`save`](Vmm::save),
//! [`resume`](Vmm::resume) or [`quit`](Vmm::quit); and of a wake, in a process that was just
//! started: [`load`](Vmm::load), [`set_drive`](Vmm::set_drive), [`resume`](Vmm::resume).
//!
//! - A call returns within its [`Timeouts`]; one that failed says whether the VMM refused it, took
//!   too long, or is gone.
//! - `pause` and `resume` of a guest that is paused or running already are no error: whoever takes
//!   a sleep up again after a crash may say them again.
//! - After a `save` that failed the guest is paused as before, unless the VMM is gone or hangs.
//! - After a `load` that failed the process is of no more use; end it.
//! - Nothing here makes a file durable but [`Saved::sync`].

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::capabilities::Capabilities;
use crate::deadline::{Deadline, Timeouts};
use crate::error::{Error, Result};
use crate::kind::{Kind, Version};
use crate::{cloud_hypervisor, firecracker, qemu};

/// Bytes of the pages that memory is handed over in.
pub const PAGE_BYTES: usize = 4096;

/// A VMM's process, through its API.
pub trait Vmm: fmt::Debug + Send {
    /// Which VMM it is.
    fn kind(&self) -> Kind;

    /// Which version of it, as it said itself.
    fn version(&self) -> Version;

    /// What this version gives and lacks.
    fn capabilities(&self) -> Capabilities {
        Capabilities::of(self.kind(), self.version())
    }

    /// What the guest does.
    fn status(&mut self) -> Result<Status>;

    /// Stops the guest's CPUs. Fine if they are.
    fn pause(&mut self) -> Result<()>;

    /// Writes the state of a paused guest, which drains its devices' I/O.
    ///
    /// `folder` is there, takes the state's files, and has none of them; the VMM has to be able to
    /// write there.
    fn save(&mut self, folder: &Path, memory: MemoryTo<'_>) -> Result<Saved>;

    /// Lets a paused guest go on. Fine if it runs.
    fn resume(&mut self) -> Result<()>;

    /// Makes a VMM that was started for it ([`crate::launch`]) the guest that was saved, paused
    /// unless `load` says otherwise.
    fn load(&mut self, load: &Load<'_>) -> Result<()>;

    /// Gives a disk of a loaded or paused guest another file. `Refused` or `Incompatible` where
    /// the VMM wants to be told earlier; see [`Capabilities::drives`].
    fn set_drive(&mut self, drive: &Drive) -> Result<()>;

    /// Asks the VMM to end; what is left for the caller.
    fn quit(&mut self) -> Result<Quit>;
}

/// What the guest in a VMM does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// There is none: the VMM was started and not told what to be.
    NotStarted,
    /// The VMM waits for a state to load, or loads it.
    Loading,
    /// It runs.
    Running,
    /// It is paused, by whomever.
    Paused,
    /// It cannot go on: the VMM's word for why.
    Stopped(String),
}

/// What becomes of a guest's memory at a save. Which VMM has which is in [`Capabilities`].
#[derive(Debug)]
pub enum MemoryTo<'a> {
    /// All of it is written to a file, which need not be there.
    File(&'a Path),

    /// What changed since the last save or load is written to a file; a hole means "as before".
    Diff(&'a Path),

    /// The VMM writes all of it to a file that keeps nothing, for somebody else takes it: a file of
    /// a mount's `discard/`. On Cloud Hypervisor, which writes where its state goes, this is an
    /// error; give a `folder` in `discard/` only if the state is taken there, too.
    DiscardFile(&'a Path),

    /// It is left out of the state as it passes, for somebody else takes it.
    Dropped,

    /// It is left out of the state as it passes, and handed over page by page.
    Pages(&'a mut dyn PageSink),

    /// It is a file of its own that the guest shares with us, and stays there.
    Shared,

    /// It stays inside the state's files: for Cloud Hypervisor a file `memory-ranges` among them.
    Inside,
}

/// Who takes a guest's memory as it passes.
///
/// A page may come twice; the later one counts. Pages come in no order that may be relied on.
pub trait PageSink: fmt::Debug + Send {
    /// A page with content, at its offset in the memory image.
    fn page(&mut self, offset: u64, bytes: &[u8; PAGE_BYTES]) -> io::Result<()>;

    /// A page of zeros.
    fn zero(&mut self, offset: u64) -> io::Result<()>;
}

/// What a save left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The files that are the state, without memory: names in the folder of the save.
    pub files: Vec<String>,

    /// The file with the memory, where the VMM wrote one.
    pub memory_file: Option<PathBuf>,

    /// How memory lies in its image, ascending by offset; empty if it is not known.
    pub memory: Vec<MemoryRegion>,

    /// How long the VMM took.
    pub vmm_time: Duration,

    /// Pages of memory that passed, where they passed us.
    pub pages: Option<PagesPassed>,
}

impl Saved {
    /// Makes the state's files and their names durable, and the memory file if there is one.
    pub fn sync(&self, folder: &Path) -> Result<()> {
        let sync = |path: &Path| {
            File::open(path)
                .and_then(|file| file.sync_all())
                .map_err(|error| Error::file(format!("cannot sync {}", path.display()), error))
        };
        for name in &self.files {
            sync(&folder.join(name))?;
        }
        if let Some(path) = &self.memory_file {
            sync(path)?;
            sync(path.parent().unwrap_or(Path::new(".")))?;
        }
        sync(folder)
    }
}

/// Pages of memory in a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagesPassed {
    /// With content.
    pub data: u64,
    /// All zero.
    pub zero: u64,
    /// Pages that the memory has, each of which passed at least once unless the guest runs on a
    /// shared file.
    pub total: u64,
}

impl PagesPassed {
    /// Whether each page passed once: then nothing wrote to any of them since the first passed, for QEMU
    /// passes those again.
    pub fn each_once(&self) -> bool {
        self.data + self.zero == self.total
    }
}

/// A part of a guest's memory: where it is in the image, and where for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// The VMM's name of it; may be empty.
    pub block: String,
    /// Its first byte in the memory image.
    pub image_offset: u64,
    /// The guest-physical address of that byte, if it is known.
    pub guest_address: Option<u64>,
    /// Bytes.
    pub length: u64,
}

/// What to load.
#[derive(Clone, Debug)]
pub struct Load<'a> {
    /// The folder with the state's files, under the names that the save gave them.
    pub folder: &'a Path,

    /// A folder of the guest's own that is there, for what a driver has to write for its VMM.
    /// What it makes there stays until the guest ends.
    pub scratch: &'a Path,

    /// Where memory comes from.
    pub memory: MemoryFrom<'a>,

    /// Disks that are elsewhere than when the guest was saved. A VMM that takes them with its
    /// start or later says so in [`Capabilities::drives`], and does not look at this.
    pub drives: &'a [Drive],

    /// Network interfaces that have another device of the host now.
    pub networks: &'a [Network],

    /// The socket of the guest's vsock device, if it is another one now.
    pub vsock: Option<&'a Path>,

    /// Whether the VMM is to note what changes, for a [`MemoryTo::Diff`].
    pub track_dirty: TrackDirty,

    /// What the guest's clock shows.
    pub clock: Clock,

    /// Whether the guest runs at the end.
    pub then: Then,
}

/// Where a guest's memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryFrom<'a> {
    /// A file that is mapped privately and read when needed. It must not change.
    File(&'a Path),

    /// A file that the VMM itself reads page by page when needed, into memory of its own
    /// (Cloud Hypervisor's `OnDemand`). It must not change while pages are missing.
    FileOnDemand(&'a Path),

    /// A file of which the VMM takes a copy before the guest goes on.
    FileCopied(&'a Path),

    /// A userfaultfd handler that listens on a socket.
    Uffd(&'a Path),

    /// What the VMM was started with (QEMU).
    AtStart,
}

/// Whether a VMM notes what its guest changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrackDirty {
    /// It does, at a cost for the first write to each page.
    Yes,
    /// It does not.
    No,
}

/// What a woken guest's clock shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Whatever the VMM does by itself.
    Default,
    /// The time that passed is added.
    Advance,
}

/// What follows a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The guest stays paused.
    StayPaused,
    /// It goes on.
    Resume,
}

/// A disk and its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// The VMM's id of the disk.
    pub id: String,
    /// Its file or block device.
    pub path: PathBuf,
}

/// A network interface and its device on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// The VMM's id of the interface.
    pub id: String,
    /// The tap device.
    pub host_device: String,
}

/// What is left to do after a VMM was asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quit {
    /// It ends by itself; wait for it, and kill it if it does not.
    Ends,
    /// There is no call for it. Kill the process.
    Kill,
}

/// Connects to a VMM that runs, and asks for its version.
pub fn connect(kind: Kind, api: &Path, timeouts: Timeouts) -> Result<Box<dyn Vmm>> {
    let stream = crate::socket::connect(api, Deadline::after(timeouts.call))?;
    driver(kind, api, stream, timeouts, Deadline::after(timeouts.call))
}

/// Connects to a VMM that was just started, as soon as its API answers.
///
/// `ended` is asked meanwhile, and says how the process ended if it has.
pub fn connect_at_start(
    kind: Kind,
    api: &Path,
    timeouts: Timeouts,
    ended: &mut dyn FnMut() -> Option<String>,
) -> Result<Box<dyn Vmm>> {
    let deadline = Deadline::after(timeouts.start);
    let stream = crate::socket::connect_when_there(api, deadline, ended)?;
    driver(kind, api, stream, timeouts, deadline).map_err(|error| match ended() {
        Some(how) => crate::socket::gone_at_start(&how),
        None => error,
    })
}

fn driver(
    kind: Kind,
    api: &Path,
    stream: std::os::unix::net::UnixStream,
    timeouts: Timeouts,
    deadline: Deadline,
) -> Result<Box<dyn Vmm>> {
    Ok(match kind {
        Kind::Qemu => Box::new(qemu::Qemu::greet(stream, timeouts, deadline)?),
        Kind::Firecracker => {
            Box::new(firecracker::Firecracker::greet(api, stream, timeouts, deadline)?)
        }
        Kind::CloudHypervisor => {
            Box::new(cloud_hypervisor::CloudHypervisor::greet(api, stream, timeouts, deadline)?)
        }
    })
}
