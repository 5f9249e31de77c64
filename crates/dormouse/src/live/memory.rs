//! A live VM's memory: an image that a VMM's page faults are answered from, and what the guest
//! changed since.
//!
//! ```text
//! live/NAME/memory/description   what the memory lies over and how it is served
//! live/NAME/memory/owner.lock    locked by the process that serves it
//! live/NAME/memory/holder        the socket of the process that keeps the VMM's descriptors
//! ```
//!
//! What the guest changed is in the VMM's memory alone; what is known of it is in shared memory that
//! the holder keeps. So the folder means something as long as the VMM lives, and no longer.

mod captured;
mod description;
mod door;
mod hosting;
mod image;
mod keeping;
mod mapped;
mod minding;
mod succession;
mod touches;

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result};
use dormouse_live::files::{Folder, FolderLock, RealFolder};
use dormouse_serve::uffd::{Vm, VmConfig};
use dormouse_store::name::{ImageName, SnapRef};
use dormouse_store::reader::ImageReader;
use dormouse_store::store::{Durable, Store};
use serde_json::{Value, json};

use super::{BaseLabel, LiveFolder, make_private_later, names_in};
use crate::exit::{Fault, Kind};

pub(crate) use captured::CapturedMemory;
pub(crate) use description::{Description, Prefetch, TrackChanges};
pub(crate) use door::Door;
pub(crate) use hosting::{adopt, is_lost, keep, serve};
pub(crate) use image::ImageMemory;
pub(crate) use keeping::{Keeping, KeptPages, Orphan, hold};
pub(crate) use mapped::{MappedMemoryLayer, mapped_memory};
pub(crate) use succession::Successor;
pub(crate) use touches::{RECORD_FOR, Touches, start_of_order};

/// A live VM's memory, had by this process.
pub(crate) struct LiveMemory {
    folder: LiveFolder,
    /// As it is in the file. Changed by commits, of which there is one at a time.
    description: Mutex<Description>,
    source: Arc<ImageMemory>,
    vm: OnceLock<Arc<Vm>>,
    /// Whether the file may name one of two bases.
    is_in_doubt: AtomicBool,
    _lock: Box<dyn FolderLock>,
}

impl fmt::Debug for LiveMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveMemory")
            .field("live", &self.folder.live)
            .field("vm", &self.vm)
            .finish_non_exhaustive()
    }
}

/// How a live VM's memory is to be served.
#[derive(Clone, Debug)]
pub(crate) struct NewMemory {
    pub(crate) tracking: TrackChanges,
    pub(crate) window_bytes: u64,
    pub(crate) prefetch: Prefetch,
    pub(crate) nbd: Option<PathBuf>,

    /// Whether it is of a VM that was begun, and none is to be made if that was removed meanwhile.
    pub(crate) of_vm: bool,
}

impl LiveMemory {
    /// Makes the memory of a live VM that is about to wake from a snapshot. Nothing may rely on it
    /// before it is [settled](LiveMemory::settle).
    pub(crate) fn create(
        store: &Store,
        folder: &LiveFolder,
        snap: &SnapRef,
        new: NewMemory,
    ) -> Result<LiveMemory> {
        let snapshot = store.snapshot(snap)?;
        let image = snapshot.image(&ImageName::Memory)?;
        let label = format!("{}:memory", snapshot.manifest().display_name());
        let cannot = || format!("cannot make {}", folder.path.display());
        // Without a sync, as all here: who waits for the socket does not wait for the disk.
        make_private_later(&folder.path).with_context(cannot)?;
        let pin = folder.lock_pin()?;
        if new.of_vm && !folder.has_vm() {
            drop(pin);
            folder.remove_if_never_made()?;
            let message = format!("the VM {} was removed", folder.live);
            return Err(Fault::new(Kind::NotFound, message).into());
        }
        let path = folder.memory();
        let lock = match path.exists() {
            false => None,
            true => Some(lock(folder)?),
        };
        if lock.is_some() {
            if keeping::has_vm(&folder.holder())? {
                let live = &folder.live;
                let message = format!(
                    "the VM {live} runs and nobody serves it; \
                     `dormouse serve memory --take-over {live}` does"
                );
                return Err(Fault::new(Kind::AlreadyExists, message).into());
            }
            // A VM of before: its process and all that was known of it are gone.
            remove_if_there(&path.join(description::NAME))?;
        }
        make_private_later(&path).with_context(cannot)?;
        let lock = lock.map_or_else(|| self::lock(folder), Ok)?;
        let description = Description::new(BaseLabel::of(&image, label), new);
        description.begin(&path)?;
        Ok(LiveMemory::of(folder, description, image, lock))
    }

    /// Pins the image for as long as the live VM lives, whatever becomes of this process, and makes
    /// durable what was made.
    pub(crate) fn settle(&self, store: &Store) -> Result<()> {
        let folder = &self.folder;
        {
            let _pin = folder.lock_pin()?;
            store.hold_for_live_too(&folder.live, &[&self.source.image()], Durable::AtOnce)?;
        }
        let memory = folder.memory();
        let paths = [&memory.join(description::NAME), &memory, &folder.path];
        for path in paths.into_iter().map(PathBuf::as_path).chain(folder.path.parent()) {
            File::open(path)
                .and_then(|file| file.sync_all())
                .with_context(|| format!("cannot sync {}", path.display()))?;
        }
        Ok(())
    }

    /// Takes the memory of a live VM whose server is gone.
    pub(crate) fn open(store: &Store, folder: &LiveFolder) -> Result<LiveMemory> {
        let path = folder.memory();
        if !path.exists() {
            let message = format!("no VM {} is served from a snapshot's memory", folder.live);
            return Err(Fault::new(Kind::NotFound, message).into());
        }
        let lock = lock(folder)?;
        let description = Description::read(&path)?;
        let image = description
            .base
            .open(store, &folder.live)?
            .context("memory that lies over nothing is not ours")?;
        Ok(LiveMemory::of(folder, description, image, lock))
    }

    fn of(
        folder: &LiveFolder,
        description: Description,
        image: ImageReader,
        lock: Box<dyn FolderLock>,
    ) -> LiveMemory {
        LiveMemory {
            folder: folder.clone(),
            description: Mutex::new(description),
            source: Arc::new(ImageMemory::new(image)),
            vm: OnceLock::new(),
            is_in_doubt: AtomicBool::new(false),
            _lock: lock,
        }
    }

    /// What it is served from.
    pub(crate) fn source(&self) -> &Arc<ImageMemory> {
        &self.source
    }

    /// What it lies over and how it is served.
    pub(crate) fn description(&self) -> Description {
        self.description.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How the pager is to serve it.
    pub(crate) fn config(&self) -> VmConfig {
        let description = self.description();
        VmConfig { window_bytes: description.window_bytes, tracking: description.tracking.into() }
    }

    /// Notes the VM that woke; there is one.
    pub(crate) fn woke(&self, vm: Arc<Vm>) {
        // A second one is never accepted.
        let _ = self.vm.set(vm);
    }

    /// The VM, once its VMM has connected.
    pub(crate) fn vm(&self) -> Option<&Arc<Vm>> {
        self.vm.get()
    }

    /// Seals what the guest changed. It must be paused.
    pub(crate) fn seal(&self) -> Result<CapturedMemory> {
        let Some(vm) = self.vm.get().filter(|vm| !vm.has_ended()) else {
            let message = format!("the VM {} has not woken, or is gone", self.folder.live);
            return Err(Fault::new(Kind::NotFound, message).into());
        };
        CapturedMemory::seal(vm, self.source.image())
    }

    /// Lays the memory over the image that was committed from it, and ends the capture. If this fails
    /// the capture comes to nothing: what it took is dirty again, over either image.
    pub(crate) fn rebase(
        &self,
        image: &ImageReader,
        name: String,
        captured: &CapturedMemory,
    ) -> Result<()> {
        let capture = captured.take().context("a capture is used twice")?;
        let mut description = self.description.lock().unwrap_or_else(PoisonError::into_inner);
        let next = description.over(BaseLabel::of(image, name));
        self.is_in_doubt.store(true, Ordering::Release);
        next.write(&self.folder.memory())?;
        *description = next;
        self.is_in_doubt.store(false, Ordering::Release);
        // What the guest never touched is the same there, and the old image need not be kept.
        self.source.replace(image.clone());
        capture.finish();
        Ok(())
    }

    /// Whether its description may name one of two bases.
    pub(crate) fn is_in_doubt(&self) -> bool {
        self.is_in_doubt.load(Ordering::Acquire)
    }

    /// Removes it, as its VM is gone; the live VM's folder, too, if nothing else is in it but what
    /// `keep_log` spares.
    pub(crate) fn remove(&self, store: &Store, keep_log: bool) -> Result<()> {
        let folder = &self.folder;
        let _pin = folder.lock_pin()?;
        folder.remove_memory()?;
        if !names_in(&folder.path.join("disk"))?.is_empty() {
            let held = folder.bases(store)?;
            return Ok(store.hold_for_live(&folder.live, &held.iter().collect::<Vec<_>>())?);
        }
        if keep_log {
            return remove_if_there(&folder.path.join("pin"));
        }
        fs::remove_dir_all(&folder.path)
            .with_context(|| format!("cannot remove {}", folder.path.display()))
    }

    /// Figures, as `disk status --json` prints them.
    pub(crate) fn figures(&self) -> Value {
        let description = self.description();
        let mut object = json!({
            "base": description.base.display(),
            "size_bytes": self.source.image().size_bytes(),
            "tracking": description.tracking,
            "window_bytes": description.window_bytes,
            "prefetch": description.prefetch,
            "state": "waiting",
        });
        let Some(vm) = self.vm.get() else { return object };
        let (pages, stats) = (vm.pages().counts(), vm.stats());
        object["state"] = json!(if vm.has_ended() { "ended" } else { "served" });
        object["pid"] = json!(vm.peer().pid());
        object["is_tracked"] = json!(vm.is_tracked());
        object["pages"] = json!({
            "missing": pages.missing,
            "clean": pages.clean,
            "dirty": pages.dirty,
            "zero": pages.zero,
            "removed": pages.removed,
        });
        object["faults"] = json!(stats.faults);
        object["first_writes"] = json!(stats.first_writes);
        object["installed_bytes"] = json!(stats.installed_bytes);
        object["around_bytes"] = json!(stats.around_bytes);
        object["prefetched_bytes"] = json!(stats.prefetched_bytes);
        object["removed_bytes"] = json!(stats.removed_bytes);
        object["retries"] = json!(stats.retries);
        object["captures_lost"] = json!(stats.captures_lost);
        object["serving_seconds"] = json!(stats.serving.as_secs_f64());
        object
    }
}

impl LiveFolder {
    /// The folder of its memory.
    pub(crate) fn memory(&self) -> PathBuf {
        self.path.join("memory")
    }

    /// The socket of the process that keeps its VMM's descriptors.
    pub(crate) fn holder(&self) -> PathBuf {
        self.memory().join("holder")
    }

    /// Whether its VM wakes, or woke, from a snapshot's memory.
    pub(crate) fn has_memory(&self) -> Result<bool> {
        let path = self.memory().join(description::NAME);
        path.try_exists().with_context(|| format!("cannot look for {}", path.display()))
    }

    /// What its memory lies over, if it has any.
    pub(crate) fn memory_label(&self) -> Result<Option<BaseLabel>> {
        if !self.has_memory()? {
            return Ok(None);
        }
        Description::read(&self.memory()).map(|description| Some(description.base))
    }

    /// Whether no process serves its memory.
    pub(super) fn is_memory_free(&self) -> Result<bool> {
        let path = self.memory();
        if !path.exists() {
            return Ok(true);
        }
        let lock = RealFolder::new(&path).lock();
        Ok(lock.with_context(|| format!("cannot lock {}", path.display()))?.is_some())
    }

    /// Fails if it is a VM with a VMM of its own, whose disks are those of its snapshot or guest.
    pub(crate) fn check_is_no_vm(&self) -> Result<()> {
        if self.has_vm() {
            let message =
                format!("{0} is a VM; `dormouse kill {0}` ends it and removes all", self.live);
            return Err(Fault::new(Kind::Busy, message).into());
        }
        Ok(())
    }

    /// Fails if its VM runs.
    pub(crate) fn check_no_vm(&self) -> Result<()> {
        self.check_is_no_vm()?;
        if keeping::has_vm(&self.holder())? {
            let message = format!("the VM {} runs; end it first", self.live);
            return Err(Fault::new(Kind::Busy, message).into());
        }
        Ok(())
    }

    pub(super) fn remove_memory(&self) -> Result<()> {
        match fs::remove_dir_all(self.memory()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.memory().display()))
            }
            _ => Ok(()),
        }
    }
}

fn lock(folder: &LiveFolder) -> Result<Box<dyn FolderLock>> {
    let path = folder.memory();
    let lock = RealFolder::new(&path).lock();
    let lock = lock.with_context(|| format!("cannot lock {}", path.display()))?;
    lock.ok_or_else(|| {
        let message = format!("another process serves the memory of {}", folder.live);
        Fault::new(Kind::Busy, message).into()
    })
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
