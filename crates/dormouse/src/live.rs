//! Live VMs: overlays of disks and changed memory below `live/NAME/` of a store, over images that they
//! pin.
//!
//! ```text
//! live/NAME/pin        what the store's collections must keep; see the store's module `live`
//! live/NAME/pin.lock   locked by whoever changes the pin
//! live/NAME/control    the socket of the process that has the disks and the memory
//! live/NAME/log        what it has to tell, if it runs in the background
//! live/NAME/disk/ID/   an overlay; see `lifetime`
//! live/NAME/memory/    of a VM that woke from a snapshot; see `memory`
//! live/NAME/vm         of a VM with a VMM that we started; see the module `vm`
//! ```

mod base;
mod commit;
pub(crate) mod control;
mod device;
mod lifetime;
pub(crate) mod memory;
pub(crate) mod owner;
mod trace;
pub(crate) mod turn;
mod unsynced;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use dormouse_live::files::{Folder, RealFolder};
use dormouse_live::overlay::{Overlay, OverlayConfig};
use dormouse_store::error::Error;
use dormouse_store::name::Name;
use dormouse_store::reader::ImageReader;
use dormouse_store::store::Store;
use dormouse_sys::block_device::kernel_name;
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use crate::exit::{Fault, Kind};
use crate::vm::Record;

pub(crate) use base::BaseLabel;
pub(crate) use commit::{
    Committed, DescribedSlot, EarlyCopy, LiveCommit, LiveState, MemoryFrom, Scope, Step, commit,
    copy_early,
};
pub(crate) use device::{ImageDevice, OverlayDevice};
pub(crate) use lifetime::{NewBase, remove_leftovers, remove_tree};
pub(crate) use trace::read_trace;

/// A live VM, or one of its disks: `LIVE` or `LIVE/ID`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LiveRef {
    pub(crate) live: Name,
    pub(crate) disk: Option<Name>,
}

impl FromStr for LiveRef {
    type Err = Error;

    fn from_str(text: &str) -> Result<LiveRef, Error> {
        match text.split_once('/') {
            None => Ok(LiveRef { live: Name::new(text)?, disk: None }),
            Some((live, disk)) => {
                Ok(LiveRef { live: Name::new(live)?, disk: Some(Name::new(disk)?) })
            }
        }
    }
}

impl fmt::Display for LiveRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.disk {
            None => self.live.fmt(f),
            Some(disk) => write!(f, "{}/{disk}", self.live),
        }
    }
}

/// The folder of a live VM.
#[derive(Clone, Debug)]
pub(crate) struct LiveFolder {
    pub(crate) live: Name,
    path: PathBuf,
}

impl LiveFolder {
    /// The folder of `live`, which need not be there.
    pub(crate) fn new(store_dir: &Path, live: &Name) -> LiveFolder {
        LiveFolder { live: live.clone(), path: store_dir.join("live").join(live.as_str()) }
    }

    /// All live VMs of a store, by name.
    pub(crate) fn all(store_dir: &Path) -> Result<Vec<LiveFolder>> {
        let names = names_in(&store_dir.join("live"))?;
        Ok(names.iter().map(|live| LiveFolder::new(store_dir, live)).collect())
    }

    /// The ids of the disks, of which there may be none.
    pub(crate) fn ids(&self) -> Result<Vec<Name>> {
        names_in(&self.path.join("disk"))
    }

    /// The ids of the disks; not found if there is no such live VM.
    pub(crate) fn disks(&self) -> Result<Vec<Name>> {
        let disks = self.ids()?;
        if disks.is_empty() {
            let message = format!(
                "there is no live disk {}; `dormouse disk ls` shows what there is",
                self.live
            );
            return Err(Fault::new(Kind::NotFound, message).into());
        }
        Ok(disks)
    }

    /// Not found if there is no such live VM.
    pub(crate) fn check(&self) -> Result<()> {
        let is_there = self.memory().exists() || self.has_vm();
        if is_there { Ok(()) } else { self.disks().map(drop) }
    }

    /// Whether it is a VM with a VMM of its own; see [`crate::vm`].
    pub(crate) fn has_vm(&self) -> bool {
        self.path.join("vm").exists()
    }

    /// The folder of the store that it belongs to.
    pub(crate) fn store_dir(&self) -> PathBuf {
        self.path.ancestors().nth(2).unwrap_or(&self.path).to_owned()
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A file or folder in it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The socket of the process that has the disks.
    pub(crate) fn control(&self) -> PathBuf {
        self.path.join("control")
    }

    /// The log of that process, if it runs in the background.
    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Whether no process has any of the disks, or the memory.
    pub(crate) fn is_free(&self) -> Result<bool> {
        if !self.is_memory_free()? {
            return Ok(false);
        }
        for id in self.ids()? {
            let folder = RealFolder::new(self.disk(&id));
            if folder.lock().with_context(|| format!("cannot lock disk {id}"))?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The folder of an overlay.
    pub(crate) fn disk(&self, disk: &Name) -> PathBuf {
        self.path.join("disk").join(disk.as_str())
    }
}

/// A live disk that this process has.
#[derive(Clone, Debug)]
pub(crate) struct LiveDisk {
    pub(crate) id: Name,
    pub(crate) overlay: Arc<Overlay>,
}

/// All disks of a live VM, had by this process: others are told that they are busy.
#[derive(Debug)]
pub(crate) struct LiveDisks {
    pub(crate) folder: LiveFolder,
    pub(crate) disks: Vec<LiveDisk>,

    /// Disks whose description may name one of two bases after a power cut: nothing that the live
    /// VM holds is let go of while there are any.
    in_doubt: Arc<Mutex<BTreeSet<Name>>>,
}

/// The disks of a live VM that a process has as long as it serves it: disks that are made meanwhile
/// join the others when they are looked at.
#[derive(Debug)]
pub(crate) struct ServedDisks {
    disks: Mutex<Arc<LiveDisks>>,
    config: OverlayConfig,
}

impl ServedDisks {
    pub(crate) fn new(disks: Arc<LiveDisks>, config: OverlayConfig) -> ServedDisks {
        ServedDisks { disks: Mutex::new(disks), config }
    }

    /// All disks as of now.
    pub(crate) fn current(&self, store: &Store) -> Result<Arc<LiveDisks>> {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let ids = disks.folder.ids()?;
        if ids.iter().any(|id| disks.disks.iter().all(|disk| disk.id != *id)) {
            *disks = Arc::new(disks.with_new(store, self.config)?);
        }
        Ok(Arc::clone(&disks))
    }
}

impl LiveDisks {
    /// Opens all disks of a live VM, of which there may be none; busy if another process has one.
    pub(crate) fn open_any(
        store: &Store,
        folder: &LiveFolder,
        config: OverlayConfig,
    ) -> Result<LiveDisks> {
        if folder.ids()?.is_empty() {
            let (folder, disks) = (folder.clone(), Vec::new());
            return Ok(LiveDisks { folder, disks, in_doubt: Arc::default() });
        }
        LiveDisks::open(store, folder, config)
    }

    /// Opens all disks of a live VM; busy if another process has one.
    pub(crate) fn open(
        store: &Store,
        folder: &LiveFolder,
        config: OverlayConfig,
    ) -> Result<LiveDisks> {
        let none =
            LiveDisks { folder: folder.clone(), disks: Vec::new(), in_doubt: Arc::default() };
        folder.disks()?;
        none.with_new(store, config)
    }

    /// These disks and those that were made since; busy if another process has one of them.
    pub(crate) fn with_new(&self, store: &Store, config: OverlayConfig) -> Result<LiveDisks> {
        let mut disks = Vec::new();
        for id in self.folder.ids()? {
            let known = self.disks.iter().find(|disk| disk.id == id);
            let overlay = match known {
                Some(disk) => Arc::clone(&disk.overlay),
                None => {
                    self.folder.describe(&id)?.0.check()?;
                    let live = &self.folder.live;
                    let files = Arc::new(RealFolder::new(self.folder.disk(&id)));
                    let overlay = Overlay::open(files, config, |description| {
                        base::open(store, live, &description.base_label)
                    });
                    Arc::new(overlay.with_context(|| format!("cannot open disk {live}/{id}"))?)
                }
            };
            disks.push(LiveDisk { id, overlay });
        }
        Ok(LiveDisks { folder: self.folder.clone(), disks, in_doubt: Arc::clone(&self.in_doubt) })
    }

    /// The disks that a reference means: one by its id, the only one, or all.
    pub(crate) fn chosen(&self, disk: Option<&Name>) -> Result<Vec<&LiveDisk>> {
        let chosen: Vec<_> =
            self.disks.iter().filter(|one| disk.is_none_or(|id| one.id == *id)).collect();
        if chosen.is_empty() {
            let ids: Vec<_> = self.disks.iter().map(|one| one.id.to_string()).collect();
            let has = if ids.is_empty() { "none".to_owned() } else { ids.join(", ") };
            let message = format!("{} has no such disk; it has {has}", self.folder.live);
            return Err(Fault::new(Kind::NotFound, message).into());
        }
        Ok(chosen)
    }
}

impl LiveFolder {
    /// What the disks lie over.
    pub(crate) fn labels(&self) -> Result<BTreeMap<Name, BaseLabel>> {
        self.ids()?.into_iter().map(|id| Ok((id.clone(), self.describe(&id)?.0))).collect()
    }

    /// What a disk lies over, and its bytes.
    pub(crate) fn describe(&self, id: &Name) -> Result<(BaseLabel, u64)> {
        let description = Overlay::describe(&RealFolder::new(self.disk(id)))?;
        Ok((BaseLabel::from_text(&description.base_label)?, description.size_bytes))
    }

    /// The images that the disks and the memory lie over; none where there are neither yet.
    fn bases(&self, store: &Store) -> Result<Vec<ImageReader>> {
        let mut bases = Vec::new();
        let labels = self.labels()?;
        let vm = Record::read(&self.path)?;
        let of_memory = self.memory_label()?;
        // Memory that is served is described on its own, as soon as somebody serves it.
        let of_vm = vm.as_ref().and_then(|vm| match &of_memory {
            Some(_) => vm.relies_on(),
            None => vm.woken(),
        });
        let of_vm = of_vm.map(|woken| &woken.image);
        for label in labels.values().chain(&of_memory).chain(of_vm) {
            bases.extend(label.open(store, &self.live)?);
        }
        Ok(bases)
    }
}

/// Makes a folder and those above it for nobody else's eyes; they are there after a power cut.
fn make_private(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let above = path.parent().ok_or(error)?;
            make_private(above)?;
            return make_private(path);
        }
        made => made?,
    }
    match path.parent() {
        Some(above) => File::open(above)?.sync_all(),
        None => Ok(()),
    }
}

/// Makes a folder and those above it for nobody else's eyes.
fn make_private_later(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Has the folders of live VMs lie far apart from each other on an ext4 without a journal. That looks at each
/// inode of a part of the disk that was freed in the last minutes when it makes a file there: where VMs come
/// and go side by side a file takes half a millisecond, and a VM has twenty. With a journal folders that lie
/// together are made sooner.
pub(crate) fn spread(lives: &Path) {
    let spread = File::open(lives).and_then(|lives| {
        if has_no_journal(&lives)? {
            let flags = ioctl_getflags(&lives)?;
            ioctl_setflags(&lives, flags | IFlags::TOPDIR)?;
        }
        Ok(())
    });
    if let Err(error) = spread {
        tracing::debug!(%error, "the folders of VMs lie where they lie");
    }
}

/// Whether a file is on an ext4 that says that it has no journal.
fn has_no_journal(file: &File) -> io::Result<bool> {
    let Some(name) = kernel_name(file.metadata()?.dev()) else { return Ok(false) };
    let task = fs::read_to_string(Path::new("/sys/fs/ext4").join(name).join("journal_task"));
    Ok(task.is_ok_and(|task| task.trim_end() == "<none>"))
}

/// The folders of a folder that are names; none if it is not there.
fn names_in(path: &Path) -> Result<Vec<Name>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot list {}", path.display())),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().into_string().ok().and_then(|name| Name::new(name).ok());
        if let Some(name) = name.filter(|_| entry.path().is_dir()) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}
