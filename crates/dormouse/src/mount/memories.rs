//! The memory of live VMs whose VMMs ask for it page by page (userfaultfd), served by the process that
//! has their disks, so that one commit has both.
//!
//! A VM is asked for before its VMM is started; it hands its memory over at `live/NAME/vmm/faults`. Its
//! descriptors are kept by a holder of its own, and a successor of this process goes on with them.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dormouse_serve::uffd::{End, MemorySource, Pager, PagerConfig, Vm};
use dormouse_store::name::Name;
use dormouse_store::store::Store;
use dormouse_vmm::cloud_hypervisor::offload::PagesOfSlot;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::FaultFigures;
use super::attendance::attend;
use super::page_requests::{self, Restores};
use crate::exit::{Fault, Kind};
use crate::live::LiveFolder;
use crate::live::control::Asked;
use crate::live::memory::{
    Door, Keeping, LiveMemory, NewMemory, Prefetch, RECORD_FOR, Successor, Touches, TrackChanges,
    adopt, is_lost, keep, serve,
};
use crate::vm::{Memory, Record};

/// Bytes looked at around a fault.
const WINDOW_BYTES: u64 = 64 << 10;

/// How long, and how often, a VM is tried to be taken over.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(60);
const TAKE_OVER_REST: Duration = Duration::from_millis(200);

/// What is asked of the process that serves a mount.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MountRequest {
    /// Let the VMM of a VM in that is waking.
    Serve { live: Name },

    /// Whether its memory is served. If not, what its guest finds there is nothing.
    Status { live: Name },

    /// Let go of what was made for a VMM that did not come, or is gone.
    Stop { live: Name },

    /// Serve the pages that a Cloud Hypervisor asks for. With it come what [`PageRequests`] names, and the
    /// VMM's pidfd.
    ///
    /// [`PageRequests`]: dormouse_vmm::cloud_hypervisor::offload::PageRequests
    ServePages {
        live: Name,
        slots: Vec<PagesOfSlot>,
        #[serde(skip)]
        descriptors: Vec<OwnedFd>,
    },

    /// Whether pages of a VM are still to come.
    PagesStatus { live: Name },

    /// Mind whoever has the other end of the pipe that comes with it, and has VMs in its hands.
    Attend {
        #[serde(skip)]
        pipe: Option<OwnedFd>,
    },
}

impl Asked for MountRequest {
    fn descriptors(&self) -> &[OwnedFd] {
        match self {
            MountRequest::ServePages { descriptors, .. } => descriptors,
            MountRequest::Attend { pipe } => pipe.as_slice(),
            _ => &[],
        }
    }

    fn take(&mut self, came: Vec<OwnedFd>) {
        match self {
            MountRequest::ServePages { descriptors, .. } => *descriptors = came,
            MountRequest::Attend { pipe } => *pipe = came.into_iter().next(),
            _ => {}
        }
    }
}

/// All of a store.
#[derive(Debug)]
pub(super) struct Memories {
    store: Store,
    store_dir: PathBuf,
    /// Started with the first VM.
    pager: Mutex<Option<Arc<Pager>>>,
    served: Arc<Mutex<HashMap<Name, Served>>>,
    /// Held over the start of a keeper: those of a fork take one processor from whoever prepares its next
    /// VMs, and not all. Taken before `served`.
    starting: Arc<Mutex<()>>,
    restores: Restores,
}

/// Dropped in this order: with its memory let go of, a VM's folder may be gone, and the way to its keeper
/// with that.
struct Served {
    /// Where its VMM comes in, until it has.
    door: Option<Door>,
    settling: Option<Settling>,
    /// Why none could come in, or the last one could not.
    failed: Option<String>,
    /// Once its keeper has been started.
    minded: Option<Minded>,
    memory: Arc<LiveMemory>,
}

/// What a guest relies on is made by a thread, and a VMM that is being started does not wait for it. Whoever
/// drops this does: nothing of it comes to be afterwards.
struct Settling(Option<JoinHandle<()>>);

impl Drop for Settling {
    fn drop(&mut self) {
        // A panic was reported by its hook.
        let _ = self.0.take().map(JoinHandle::join);
    }
}

/// A VM's keeper, which keeps this process in mind as long as this is there: the process may live on for
/// long.
struct Minded(Keeping);

impl Drop for Minded {
    fn drop(&mut self) {
        if let Err(error) = self.0.forget_us() {
            tracing::debug!(error = &*error, "a keeper stays as long as this process");
        }
    }
}

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl Memories {
    pub(super) fn new(store: Store, store_dir: &Path) -> Memories {
        let (pager, served, starting) = (Mutex::default(), Arc::default(), Arc::default());
        let restores = Restores::new(store.clone(), store_dir);
        Memories { store, store_dir: store_dir.to_owned(), pager, served, starting, restores }
    }

    /// The memory of a VM, if it is served.
    pub(super) fn of(&self, live: &Name) -> Option<Arc<LiveMemory>> {
        self.served().get(live).map(|served| Arc::clone(&served.memory))
    }

    /// What was done for all VMs there were.
    pub(super) fn fault_figures(&self) -> FaultFigures {
        let pager = self.pager.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let stats = pager.map(|pager| pager.stats()).unwrap_or_default();
        let asked = self.restores.asked();
        let pages_time = Duration::from_nanos(asked.nanoseconds.load(Ordering::Relaxed));
        FaultFigures {
            answered: stats.faults + asked.pages.load(Ordering::Relaxed),
            first_writes: stats.first_writes,
            waiting_seconds: stats.waiting.as_secs_f64(),
            serving_seconds: (stats.serving + pages_time).as_secs_f64(),
            asked_bytes: stats.installed_bytes + asked.bytes.load(Ordering::Relaxed),
            around_bytes: stats.around_bytes,
            prefetched_bytes: stats.prefetched_bytes,
            zero_bytes: stats.zero_bytes,
            removed_bytes: stats.removed_bytes,
        }
    }

    pub(super) fn answer(&self, request: MountRequest) -> Result<Value> {
        match request {
            MountRequest::Serve { live } => self.begin(&live),
            MountRequest::Status { live } => {
                let all = self.served();
                let served = all.get(&live);
                let vm = served.and_then(|served| served.memory.vm());
                let is_served = vm.is_some_and(|vm| !vm.has_ended());
                // Its VMM stands in the door, perhaps.
                let may_come = vm.is_none() && served.is_some_and(|served| served.door.is_some());
                let failed = served.and_then(|served| served.failed.as_deref());
                Ok(json!({ "is_served": is_served, "may_come": may_come, "failed": failed }))
            }
            MountRequest::Stop { live } => self.stop(&live),
            MountRequest::ServePages { live, slots, descriptors } => {
                self.restores.begin(&live, slots, descriptors)?;
                Ok(Value::Null)
            }
            MountRequest::PagesStatus { live } => {
                Ok(json!({ "is_served": self.restores.has(&live) }))
            }
            MountRequest::Attend { pipe } => {
                attend(&self.store_dir, pipe.context("no pipe comes with it")?)?;
                Ok(Value::Null)
            }
        }
    }

    /// Makes a door for the VMM of a VM.
    fn begin(&self, live: &Name) -> Result<Value> {
        let folder = LiveFolder::new(&self.store_dir, live);
        let record = Record::read(folder.path())?;
        let woken = record.as_ref().and_then(Record::woken);
        let woken = woken.with_context(|| format!("the VM {live} does not wake"))?;
        if self.served().contains_key(live) {
            let message = format!("the memory of {live} is served already");
            return Err(Fault::new(Kind::Busy, message).into());
        }
        let snap = woken.snapshot.parse()?;
        let new = NewMemory {
            tracking: TrackChanges::On,
            window_bytes: WINDOW_BYTES,
            prefetch: Prefetch::Trace,
            nbd: None,
            of_vm: true,
        };
        let memory = Arc::new(LiveMemory::create(&self.store, &folder, &snap, new)?);
        let touches = Arc::new(Touches::begin(snap, &memory));
        // Whoever connects now waits until the door is opened.
        let door = Door::listen(&faults_socket(&folder), memory.source().size_bytes())?;
        let arriving = Arriving {
            store: self.store.clone(),
            served: Arc::clone(&self.served),
            starting: Arc::clone(&self.starting),
            pager: self.pager()?,
            keeping: Keeping::at(folder.holder()),
            live: live.clone(),
            memory: Arc::clone(&memory),
            touches,
        };
        let on_end = self.on_end(live);
        let mut all = self.served();
        // It waits for its entry.
        let settling = thread::Builder::new()
            .name("settling".to_owned())
            .spawn(move || arriving.settle(on_end))
            .context("cannot start a thread")?;
        let settling = Some(Settling(Some(settling)));
        let (door, failed, minded) = (Some(door), None, None);
        let served = Served { door, settling, failed, minded, memory };
        all.insert(live.clone(), served);
        Ok(Value::Null)
    }

    fn stop(&self, live: &Name) -> Result<Value> {
        let taken = {
            let mut all = self.served();
            let is_served = |served: &Served| served.memory.vm().is_some_and(|vm| !vm.has_ended());
            if all.get(live).is_some_and(is_served) {
                let message = format!("the VMM of {live} runs");
                return Err(Fault::new(Kind::Busy, message).into());
            }
            all.remove(live)
        };
        // Its door waits for whoever stands in it.
        drop(taken);
        Ok(Value::Null)
    }

    /// Goes on with all VMs that a predecessor served. One that cannot be had at once, whose predecessor
    /// is not gone entirely, is tried again for a while, and then stopped: its guest would wait for ever.
    pub(super) fn take_over(self: &Arc<Self>) -> Result<()> {
        let mut left = LiveFolder::all(&self.store_dir)?;
        left.retain(|folder| !self.has_taken_over(folder));
        if left.is_empty() {
            return Ok(());
        }
        let memories = Arc::clone(self);
        thread::Builder::new()
            .name("take-over".to_owned())
            .spawn(move || {
                let begun = Instant::now();
                while !left.is_empty() && begun.elapsed() < TAKE_OVER_TIMEOUT {
                    thread::sleep(TAKE_OVER_REST);
                    left.retain(|folder| !memories.has_taken_over(folder));
                }
                left.iter().for_each(give_up);
            })
            .context("cannot start a thread")?;
        Ok(())
    }

    fn has_taken_over(&self, folder: &LiveFolder) -> bool {
        let taken = self.take_over_one(folder);
        if let Err(error) = &taken {
            tracing::error!(live = %folder.live, error = &**error, "its memory is not served yet");
        }
        taken.is_ok()
    }

    fn take_over_one(&self, folder: &LiveFolder) -> Result<()> {
        let Some(record) = Record::read(folder.path())? else { return Ok(()) };
        if matches!(record.memory, Memory::Copied(_)) {
            return self.restores.take_over(folder);
        }
        if !record.is_served() || !folder.has_memory()? {
            return Ok(());
        }
        let keeping = Keeping::at(folder.holder());
        // None where its VMM did not come, or is gone.
        let Some(orphan) = keeping.take()? else { return Ok(()) };
        let memory = Arc::new(LiveMemory::open(&self.store, folder)?);
        keeping.mind_us()?;
        keeping.mind(Successor::default());
        let minded = Minded(keeping);
        let pager = self.pager()?;
        match adopt(&pager, &memory, orphan, self.on_end(&folder.live)) {
            Ok(vm) => {
                let minded = Some(minded);
                let (door, settling, failed) = (None, None, None);
                let served = Served { door, settling, failed, minded, memory };
                let mut all = self.served();
                all.insert(folder.live.clone(), served);
                // Its end may have been told before.
                let ended = vm.has_ended().then(|| all.remove(&folder.live)).flatten();
                drop(all);
                drop_later(ended);
                Ok(())
            }
            Err((_, peer)) if peer.has_ended().unwrap_or(false) => Ok(()),
            Err((error, peer)) => {
                if is_lost(&error) {
                    peer.kill().context("the guest cannot be stopped")?;
                }
                Err(error)
            }
        }
    }

    /// What is to be done when a VM's memory is not served any more: whoever removes it finds it free.
    fn on_end(&self, live: &Name) -> impl FnOnce(&Vm, End) + Clone + Send + 'static {
        let (served, live) = (Arc::clone(&self.served), live.clone());
        move |vm, end| {
            if let End::Stopped(error) = &end {
                tracing::error!(%live, %error, "the guest was stopped");
            }
            let mut all = locked(&served);
            // Another VM may have the name by now.
            let is_it = |served: &Served| served.memory.vm().is_some_and(|it| ptr::eq(&**it, vm));
            let ended = all.get(&live).is_some_and(is_it).then(|| all.remove(&live)).flatten();
            drop(all);
            drop_later(ended);
        }
    }

    fn pager(&self) -> Result<Arc<Pager>> {
        let mut pager = self.pager.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pager) = &*pager {
            return Ok(Arc::clone(pager));
        }
        let started = Arc::new(Pager::start(PagerConfig::standard())?);
        *pager = Some(Arc::clone(&started));
        Ok(started)
    }

    fn served(&self) -> MutexGuard<'_, HashMap<Name, Served>> {
        locked(&self.served)
    }
}

fn locked(served: &Mutex<HashMap<Name, Served>>) -> MutexGuard<'_, HashMap<Name, Served>> {
    // Entries come and go whole.
    served.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A VM whose VMM is being started.
struct Arriving {
    store: Store,
    served: Arc<Mutex<HashMap<Name, Served>>>,
    starting: Arc<Mutex<()>>,
    pager: Arc<Pager>,
    keeping: Keeping,
    live: Name,
    memory: Arc<LiveMemory>,
    touches: Arc<Touches>,
}

impl Arriving {
    /// Makes what the guest relies on, and lets its VMM in; where that fails, the VMM is stopped.
    fn settle(self, on_end: impl FnOnce(&Vm, End) + Clone + Send + 'static) {
        let (served, live) = (Arc::clone(&self.served), self.live.clone());
        // A VMM at a door that is never opened waits for minutes.
        let settled = panic::catch_unwind(AssertUnwindSafe(|| self.try_to_settle(on_end)));
        let error = match settled {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(_) => Fault::new(Kind::Other, "the thread that was to do it panicked").into(),
        };
        tracing::error!(%live, error = &*error, "its memory cannot be served");
        let mut all = locked(&served);
        // It is ours: nobody else has the memory before we let go of it.
        let door = all.get_mut(&live).and_then(|served| {
            served.failed = Some(format!("{error:#}"));
            served.door.take()
        });
        drop(all);
        // Who stands in it is stopped.
        drop(door);
    }

    fn try_to_settle(self, on_end: impl FnOnce(&Vm, End) + Clone + Send + 'static) -> Result<()> {
        let Arriving { store, served, starting, pager, keeping, live, memory, touches } = self;
        let is_it = |served: &Served| Arc::ptr_eq(&served.memory, &memory);
        touches.read_order(&store);
        let source = Arc::clone(memory.source()) as Arc<dyn MemorySource>;
        pager.decode(source, touches.start_of_order());
        {
            let _one = starting.lock().unwrap_or_else(PoisonError::into_inner);
            let is_wanted = locked(&served).get(&live).is_some_and(is_it);
            if !is_wanted {
                // It was stopped while others had their turn.
                return Ok(());
            }
            keeping.start(&Successor::default())?;
        }
        keeping.mind(Successor::default());
        let minded = Minded(keeping.clone());
        let mut all = locked(&served);
        let Some(entry) = all.get_mut(&live).filter(|served| is_it(served)) else {
            // It was stopped meanwhile, and its keeper ends.
            drop(all);
            drop(minded);
            return Ok(());
        };
        entry.minded = Some(minded);
        // Nobody but us and whoever comes in takes it.
        let door = entry.door.as_mut().context("the door is gone")?;
        let (served, arriving) = (Arc::clone(&served), Arc::clone(&memory));
        door.open(move |arrival| {
            let admitted = keep(&keeping, &arrival)
                .and_then(|pages| serve(&pager, &arriving, arrival, pages, on_end.clone()));
            if let Ok(vm) = &admitted {
                pager.replay(vm, touches.take_order());
                store_later(&touches, &store);
            }
            let mut all = locked(&served);
            let mut taken = None;
            match (all.get_mut(&live), &admitted) {
                // It has no more to let in, and nothing is left to be made.
                (Some(entry), Ok(_)) => taken = Some((entry.door.take(), entry.settling.take())),
                (Some(entry), Err(error)) => entry.failed = Some(format!("{error:#}")),
                (None, _) => {}
            }
            drop(all);
            drop(taken);
            admitted.map(drop)
        })
    }
}

/// Stops a VM that nobody could take over.
fn give_up(folder: &LiveFolder) {
    page_requests::give_up(folder);
    match Keeping::at(folder.holder()).take() {
        Ok(Some(orphan)) => {
            tracing::error!(live = %folder.live, "its memory cannot be served; its guest is stopped");
            if let Err(error) = orphan.peer.kill() {
                tracing::error!(live = %folder.live, %error, "and cannot be stopped");
            }
        }
        Ok(None) => {}
        Err(error) => {
            tracing::error!(live = %folder.live, error = &*error, "its guest waits for its memory");
        }
    }
}

/// Where the VMM of a VM hands its memory over.
pub(crate) fn faults_socket(folder: &LiveFolder) -> PathBuf {
    folder.file("vmm/faults")
}

/// Drops what was served on another thread: its door, if it is still open, waits for whoever stands in it.
fn drop_later(ended: Option<Served>) {
    let Some(ended) = ended else { return };
    let dropped = thread::Builder::new().name("ended".to_owned()).spawn(|| drop(ended));
    if let Err(error) = dropped {
        tracing::warn!(%error, "something ends late");
    }
}

/// Stores what a guest touched first, once it has woken.
fn store_later(touches: &Arc<Touches>, store: &Store) {
    let (touches, store) = (Arc::clone(touches), store.clone());
    let started = thread::Builder::new().name("touches".to_owned()).spawn(move || {
        thread::sleep(RECORD_FOR);
        touches.store(&store);
    });
    if let Err(error) = started {
        tracing::warn!(%error, "the trace is not stored");
    }
}
