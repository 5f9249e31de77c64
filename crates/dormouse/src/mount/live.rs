//! The live VMs of a store as entries. A VM's disks are taken when one of them is opened first and
//! let go when the last file is closed; meanwhile this process answers for them, on the control
//! socket as `serve nbd` does.

use std::collections::{BTreeMap, HashMap};
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;
use std::{fs, io, mem};

use anyhow::Context as _;
use dormouse_live::overlay::{Overlay, OverlayConfig};
use dormouse_serve::device::{BlockDevice, Context, DeviceResult, Durability, Run, ZeroMode};
use dormouse_serve::fuse::{Entry, Kind, Opened, TreeError, TreeErrorKind, TreeResult};
use dormouse_store::name::{ImageName, Name};
use dormouse_store::store::Store;
use serde_json::{Value, json};
use uuid::Uuid;

use super::journal::{Change, Journal};
use super::memories::Memories;
use super::tree::{folder, missing};
use crate::command::disk::status_of;
use crate::exit::{Fault, Kind as FaultKind};
use crate::live::control::{Control, Request, Tell};
use crate::live::memory::MappedMemoryLayer;
use crate::live::turn::Turn;
use crate::live::{LiveDisks, LiveFolder, LiveRef, OverlayDevice, commit, copy_early};

/// All live VMs of a store.
#[derive(Debug)]
pub(super) struct LiveVms {
    store: Store,
    store_dir: PathBuf,
    vms: Arc<Vms>,
    /// What is written, if a successor may have to do it again.
    journal: Option<Arc<Journal>>,
    /// Where all this is mounted.
    place: Arc<OnceLock<PathBuf>>,
    memories: Arc<Memories>,
}

/// Those that were opened at some time. Taken before a VM's own lock.
type Vms = Mutex<HashMap<Name, Arc<Vm>>>;

/// A live VM, whether this process has it or not.
#[derive(Debug)]
struct Vm {
    folder: LiveFolder,
    place: Arc<OnceLock<PathBuf>>,
    journal: Option<Arc<Journal>>,
    memories: Arc<Memories>,
    /// Held while disks are opened and let go, so that who comes next waits for it.
    had: Mutex<Option<Had>>,
}

/// A live VM that this process has.
#[derive(Debug)]
struct Had {
    disks: Arc<Mutex<Arc<LiveDisks>>>,
    files: u64,
    control: Control,
}

impl LiveVms {
    pub(super) fn new(store: Store, store_dir: &Path, memories: Arc<Memories>) -> LiveVms {
        let (vms, place, store_dir) = (Arc::default(), Arc::default(), store_dir.to_owned());
        LiveVms { store, store_dir, vms, journal: None, place, memories }
    }

    pub(super) fn mounted(&self, place: &Path) {
        // It is mounted once.
        let _ = self.place.set(place.to_owned());
    }

    pub(super) fn names(&self) -> TreeResult<Vec<Name>> {
        let folders = LiveFolder::all(&self.store_dir).map_err(failed)?;
        Ok(folders.into_iter().map(|folder| folder.live).collect())
    }

    /// Makes durable what was written to all disks that this process has.
    pub(super) fn flush(&self) -> anyhow::Result<()> {
        flush(&self.vms)
    }

    /// Notes from now on what is written.
    pub(super) fn keep_journal(&mut self, journal: Journal) {
        let vms = Arc::clone(&self.vms);
        journal.flush_by(move || flush(&vms).map_err(io::Error::other));
        self.journal = Some(Arc::new(journal));
    }

    /// What is noted.
    pub(super) fn journal(&self) -> Option<&Journal> {
        self.journal.as_deref()
    }

    /// Does what a predecessor noted, durably, and forgets the notes.
    pub(super) fn replay(&self, journal: &Journal) -> anyhow::Result<()> {
        let mut taken: BTreeMap<String, Option<LiveDevice>> = BTreeMap::new();
        journal.replay(&mut |name, change| {
            if !taken.contains_key(name) {
                let reference: LiveRef = name.parse()?;
                let id = reference.disk.context("a note of no disk")?;
                let device = match self.take(&reference.live, &id) {
                    Ok(device) => Some(device),
                    Err(error) if error.kind() == TreeErrorKind::NotFound => {
                        tracing::warn!(name, "was written to and is gone");
                        None
                    }
                    Err(error) => return Err(error.into()),
                };
                taken.insert(name.to_owned(), device);
            }
            let Some(Some(LiveDevice { device, .. })) = taken.get(name) else { return Ok(()) };
            match change {
                Change::Write { offset, data } => {
                    device.write_at(data, offset, Durability::Later)?;
                }
                Change::Zero { offset, length, may_punch } => {
                    let mode = ZeroMode { may_punch, fast_only: false };
                    device.zero(offset..offset + length, mode, Durability::Later)?;
                }
                Change::LetGo => {}
            }
            Ok(())
        })?;
        for LiveDevice { device, .. } in taken.values().flatten() {
            device.flush()?;
        }
        drop(taken);
        // From now on they are had with their notes.
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(journal.clear()?)
    }

    pub(super) fn folder(&self, live: &Name) -> TreeResult<Entry> {
        let live = LiveFolder::new(&self.store_dir, live);
        live.disks().map_err(failed)?;
        Ok(folder(SystemTime::UNIX_EPOCH))
    }

    /// The ids of a VM's disks, and what tells each from others of its name.
    pub(super) fn disks(&self, live: &Name) -> TreeResult<Vec<(Name, u64)>> {
        let folder = LiveFolder::new(&self.store_dir, live);
        let labels = folder.labels().map_err(failed)?;
        let disks = labels.iter().filter(|(id, label)| label.image_name(id).is_disk());
        disks.map(|(id, _)| Ok((id.clone(), identity(&folder.disk(id))?.0))).collect()
    }

    pub(super) fn disk(&self, live: &Name, id: &Name) -> TreeResult<Entry> {
        self.find(live, &ImageName::Disk(id.clone())).map(|(_, entry)| entry)
    }

    /// The memory file of a VM that writes to it.
    pub(super) fn memory(&self, live: &Name) -> TreeResult<Entry> {
        let (_, entry) = self.find(live, &ImageName::Memory)?;
        // The kernel forgets pages of a file that changes without it; this one does not.
        Ok(Entry { modified: SystemTime::UNIX_EPOCH, ..entry })
    }

    /// Opens a disk, taking the VM if this process does not have it.
    pub(super) fn open_disk(&self, live: &Name, id: &Name) -> TreeResult<Opened> {
        let (id, _) = self.find(live, &ImageName::Disk(id.clone()))?;
        self.take(live, &id).map(|device| Opened::Disk(Arc::new(device)))
    }

    /// Opens the memory file of a VM, taking the VM if this process does not have it.
    pub(super) fn open_memory(&self, live: &Name) -> TreeResult<Opened> {
        let (id, _) = self.find(live, &ImageName::Memory)?;
        self.take(live, &id).map(|device| Opened::Memory(Arc::new(device)))
    }

    /// The overlay of an image: its id and the file it is shown as.
    fn find(&self, live: &Name, wanted: &ImageName) -> TreeResult<(Name, Entry)> {
        let folder = LiveFolder::new(&self.store_dir, live);
        let ids = folder.disks().map_err(failed)?;
        let candidates = ids.into_iter().filter(|id| match wanted {
            ImageName::Disk(wanted) => id == wanted,
            _ => true,
        });
        for id in candidates {
            let (label, size_bytes) = folder.describe(&id).map_err(failed)?;
            if label.image_name(&id) != *wanted {
                continue;
            }
            let (identity, modified, allocated_bytes) = identity(&folder.disk(&id))?;
            let entry = Entry {
                kind: Kind::File,
                identity,
                size_bytes,
                allocated_bytes,
                modified,
                permissions: 0o666,
                is_fixed: false,
            };
            return Ok((id, entry));
        }
        Err(missing())
    }

    fn take(&self, live: &Name, id: &Name) -> TreeResult<LiveDevice> {
        let folder = LiveFolder::new(&self.store_dir, live);
        let vm = {
            let mut vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
            let place = Arc::clone(&self.place);
            let journal = self.journal.clone();
            let memories = Arc::clone(&self.memories);
            let new = || Arc::new(Vm { folder, place, journal, memories, had: Mutex::default() });
            Arc::clone(vms.entry(live.clone()).or_insert_with(new))
        };
        let overlay = vm.take_disk(&self.store, id)?;
        let device = OverlayDevice::new(overlay);
        let journal = self.journal.clone().map(|journal| (journal, format!("{live}/{id}")));
        Ok(LiveDevice { device, journal, _held: Held(vm) })
    }
}

impl Had {
    /// A disk's overlay, counted as one more file.
    fn disk(&mut self, store: &Store, id: &Name) -> TreeResult<Arc<Overlay>> {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        if disks.disks.iter().all(|disk| disk.id != *id) {
            // It was made since.
            *disks = Arc::new(disks.with_new(store, OverlayConfig::STANDARD).map_err(failed)?);
        }
        let disk = disks.disks.iter().find(|disk| disk.id == *id).ok_or_else(missing)?;
        self.files += 1;
        Ok(Arc::clone(&disk.overlay))
    }
}

impl Vm {
    fn had(&self) -> MutexGuard<'_, Option<Had>> {
        self.had.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A disk's overlay, counted as one more file.
    fn take_disk(&self, store: &Store, id: &Name) -> TreeResult<Arc<Overlay>> {
        let mut had = self.had();
        if had.is_none() {
            let live = Arc::new(
                LiveDisks::open(store, &self.folder, OverlayConfig::STANDARD).map_err(failed)?,
            );
            let disks = Arc::new(Mutex::new(live));
            let control = answer(store, self, &disks).map_err(failed)?;
            *had = Some(Had { disks, files: 0, control });
        }
        let taken = had.as_mut().ok_or_else(missing).and_then(|had| had.disk(store, id));
        if had.as_ref().is_some_and(|had| had.files == 0) {
            // Taken for nothing.
            *had = None;
        }
        taken
    }

    /// One file less; the VM is let go with the last.
    fn release(&self) {
        let mut had = self.had();
        let Some(one) = had.as_mut() else { return };
        one.files = one.files.saturating_sub(1);
        if one.files > 0 {
            return;
        }
        if let Some(Had { disks, control, .. }) = had.take() {
            // A commit that is under way is finished first.
            drop(control);
            let disks = disks.lock().unwrap_or_else(PoisonError::into_inner);
            let mut is_durable = true;
            for disk in &disks.disks {
                if let Err(error) = disk.overlay.flush() {
                    is_durable = false;
                    tracing::error!(live = %self.folder.live, disk = %disk.id, %error, "not flushed");
                }
            }
            let live = self.folder.live.as_str();
            // While the disks are still had: nobody else has written to them yet.
            if let Some(journal) = self.journal.as_ref().filter(|_| is_durable)
                && let Err(error) = journal.note(live, Change::LetGo)
            {
                tracing::error!(live, %error, "a successor may write to it once more");
            }
        }
    }
}

/// Answers other commands as long as this process has the disks.
fn answer(store: &Store, vm: &Vm, disks: &Arc<Mutex<Arc<LiveDisks>>>) -> anyhow::Result<Control> {
    let (store, disks, place) = (store.clone(), Arc::clone(disks), Arc::clone(&vm.place));
    let (memories, live) = (Arc::clone(&vm.memories), vm.folder.live.clone());
    let current = {
        let store = store.clone();
        // Disks that were made since join the others.
        move || -> anyhow::Result<Arc<LiveDisks>> {
            let mut disks = disks.lock().unwrap_or_else(PoisonError::into_inner);
            *disks = Arc::new(disks.with_new(&store, OverlayConfig::STANDARD)?);
            Ok(Arc::clone(&disks))
        }
    };
    let turn = Turn::default();
    // Of a commit that is about to come.
    let copy: Mutex<Option<(Uuid, MappedMemoryLayer)>> = Mutex::new(None);
    // It comes and goes whole.
    let change_copy =
        move |new| mem::replace(&mut *copy.lock().unwrap_or_else(PoisonError::into_inner), new);
    let answerer = move |request: Request, tell: Tell<'_>| match request {
        Request::Status => {
            let mut status = status_of(&*current()?, memories.of(&live).as_deref())?;
            status["is_committing"] = turn.is_taken().into();
            status["server"] = json!({ "pid": std::process::id(), "mount": place.get() });
            Ok(status)
        }
        Request::Copy(early) => {
            // One that nobody came for.
            drop(change_copy(None));
            let copied = copy_early(&store, &live, &early.memory)?;
            let is_copied = copied.is_some();
            change_copy(copied.map(|copied| (early.id, copied)));
            Ok(json!({ "is_copied": is_copied }))
        }
        Request::DropCopy => {
            drop(change_copy(None));
            Ok(Value::Null)
        }
        Request::Commit(mut wanted) => {
            let copied = change_copy(None).filter(|(id, _)| wanted.copy == Some(*id));
            wanted.copied = Arc::new(Mutex::new(copied.map(|(_, copied)| copied)));
            let memory = memories.of(&live);
            let disks = current()?;
            turn.commit(wanted.id, &live, tell, |on_step, job| {
                if let Some(place) = place.get() {
                    bring_memory(&disks.folder, place)?;
                }
                commit(&store, &disks, memory.as_deref(), &wanted, on_step, job)
            })
        }
        Request::Cancel { commit } => {
            turn.cancel(commit);
            Ok(Value::Null)
        }
        Request::Stop => {
            let live = current()?;
            let message = format!("files below live/{} of a mount are open", live.folder.live);
            Err(Fault::new(FaultKind::Busy, message).into())
        }
    };
    Control::start(&vm.folder.control(), Arc::new(answerer))
}

/// Has the kernel write back what a VMM changed in its memory file: until then nobody else knows of
/// it. This thread answers no requests of the mount, others do.
fn bring_memory(folder: &LiveFolder, place: &Path) -> anyhow::Result<()> {
    let labels = folder.labels()?;
    if labels.iter().all(|(id, label)| label.image_name(id).is_disk()) {
        return Ok(());
    }
    let path = place.join("live").join(folder.live.as_str()).join("memory");
    let synced = fs::File::open(&path).and_then(|file| file.sync_all());
    synced.with_context(|| format!("cannot have {} written back", path.display()))
}

/// Makes durable what was written to the disks of some VMs.
fn flush(vms: &Vms) -> anyhow::Result<()> {
    let vms: Vec<Arc<Vm>> =
        vms.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
    for vm in vms {
        if let Some(had) = &*vm.had() {
            let disks = had.disks.lock().unwrap_or_else(PoisonError::into_inner);
            disks.disks.iter().try_for_each(|disk| disk.overlay.flush())?;
        }
    }
    Ok(())
}

/// What tells an overlay from others that had its path, when it was last written to, and what it
/// takes on the disk.
fn identity(folder: &Path) -> TreeResult<(u64, SystemTime, u64)> {
    let look = |path: &Path| fs::metadata(path).map_err(|error| failed(error.into()));
    let metadata = look(folder)?;
    let born =
        metadata.created().ok().and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
    let born = born.map_or(0, |age| u64::try_from(age.as_nanos()).unwrap_or(u64::MAX));
    let mut modified = SystemTime::UNIX_EPOCH;
    let mut allocated = 0;
    for entry in fs::read_dir(folder).map_err(|error| failed(error.into()))? {
        // A layer may be folded away meanwhile.
        let Ok(metadata) = entry.and_then(|entry| entry.metadata()) else { continue };
        allocated += metadata.blocks() * 512;
        modified = modified.max(metadata.modified().unwrap_or(modified));
    }
    Ok((metadata.ino().rotate_left(32) ^ born, modified, allocated))
}

pub(super) fn failed(error: anyhow::Error) -> TreeError {
    let kind = match FaultKind::of(&error) {
        FaultKind::NotFound => TreeErrorKind::NotFound,
        FaultKind::Busy => TreeErrorKind::Busy,
        FaultKind::Usage => TreeErrorKind::Invalid,
        _ => TreeErrorKind::Io,
    };
    TreeError::new(kind, error)
}

/// An open disk of a live VM, which lets go of the VM with the last of its like.
struct LiveDevice {
    /// Dropped before the VM is let go: it has the overlay.
    device: OverlayDevice,
    /// Where its changes are noted, and under which name.
    journal: Option<(Arc<Journal>, String)>,
    _held: Held,
}

/// One file of a VM that this process has.
struct Held(Arc<Vm>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl LiveDevice {
    /// Notes a change before it is answered.
    fn note(&self, change: Change<'_>) -> DeviceResult<()> {
        match &self.journal {
            Some((journal, name)) => Ok(journal.note(name, change)?),
            None => Ok(()),
        }
    }
}

impl BlockDevice for LiveDevice {
    fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.device.is_read_only()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<()> {
        self.device.read_at(buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64, durability: Durability) -> DeviceResult<()> {
        self.device.write_at(data, offset, durability)?;
        self.note(Change::Write { offset, data })
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode, durability: Durability) -> DeviceResult<()> {
        let (offset, length) = (range.start, range.end - range.start);
        self.device.zero(range, mode, durability)?;
        self.note(Change::Zero { offset, length, may_punch: mode.may_punch })
    }

    fn trim(&self, range: Range<u64>, durability: Durability) -> DeviceResult<()> {
        let (offset, length) = (range.start, range.end - range.start);
        self.device.trim(range, durability)?;
        self.note(Change::Zero { offset, length, may_punch: true })
    }

    fn flush(&self) -> DeviceResult<()> {
        self.device.flush()
    }

    fn prefetch(&self, range: Range<u64>) -> DeviceResult<()> {
        self.device.prefetch(range)
    }

    fn read_will_wait(&self, range: Range<u64>) -> bool {
        self.device.read_will_wait(range)
    }

    fn contexts(&self) -> &[Context] {
        self.device.contexts()
    }

    fn extents(
        &self,
        context: &str,
        range: Range<u64>,
        sink: &mut dyn FnMut(Run) -> ControlFlow<()>,
    ) -> DeviceResult<()> {
        self.device.extents(context, range, sink)
    }
}
