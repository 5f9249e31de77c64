//! The threads that answer page faults, of any number of guests.
//!
//! All guests share one epoll instance and the threads that wait for it, of which one listens at a time
//! ([`Lead`]); a guest at rest has none. Each message of a guest wakes that thread (edge-triggered): it
//! reads all there are, and answers the first fault; further ones go to a backlog that the others work
//! off.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dormouse_live::pages::{PAGE_BYTES, Pages};
use dormouse_sys::peer::Peer;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::answer::{Answered, Scratch, Zeros};
use super::faults::{Fault, Faults};
use super::handshake::{Handshake, SocketEnd};
use super::lead::Lead;
use super::prefetch::{Prefetcher, Queue};
use super::source::MemorySource;
use super::stats::VmStats;
use super::vm::{End, Vm, VmConfig};
use crate::error::{Error, ErrorKind, Result};

/// Rest after an error of the kernel that should not be.
const AFTER_FAILURE: Duration = Duration::from_millis(1);

/// Attempts made at once before waiting: the guest's thread needs a moment to run.
const RETRIES_AT_ONCE: u32 = 4;

/// Retries after which a guest whose mapping stays busy is asked whether it still lives.
const ALIVE_CHECK_RETRIES: u64 = 1024;

/// How many threads there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagerConfig {
    /// Threads that answer faults, at least 2: one may wait for what another answers.
    pub threads: usize,

    /// Threads that decode and install what nobody asked for yet.
    pub prefetch_threads: usize,
}

impl PagerConfig {
    /// One thread of each kind for each processor, at most 8, and at least 2 that answer. A guest whose
    /// trace is replayed waits for what is decoded: then those that answer have nothing to do.
    pub fn standard() -> PagerConfig {
        let processors = thread::available_parallelism().map_or(2, usize::from);
        PagerConfig { threads: processors.clamp(2, 8), prefetch_threads: processors.clamp(1, 8) }
    }
}

/// Serves the memory of guests.
pub struct Pager {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    prefetcher: Prefetcher,
}

impl fmt::Debug for Pager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pager").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

pub(super) struct Shared {
    epoll: OwnedFd,
    guests: RwLock<HashMap<u64, Arc<Guest>>>,
    /// What was done for guests that are no more among those; held to add one, under the lock of those.
    gone: Mutex<VmStats>,
    next_id: AtomicU64,
    pub(super) faults: Arc<Faults>,
    pub(super) ahead: Arc<Queue>,
    lead: Arc<Lead>,
    is_stopping: AtomicBool,
}

/// A guest as the threads see it.
struct Guest {
    id: u64,
    vm: Arc<Vm>,
    socket: Option<UnixStream>,
    on_end: Mutex<Option<OnEnd>>,
}

/// What is to be done when serving a guest has ended.
type OnEnd = Box<dyn FnOnce(&Vm, End) + Send>;

/// What a guest is served with.
struct Given {
    handshake: Handshake,
    socket: Option<UnixStream>,
    source: Arc<dyn MemorySource>,
    pages: Pages,
    config: VmConfig,
}

/// Which descriptor of a guest an event is about.
const KINDS: u64 = 4;
const OF_UFFD: u64 = 0;
const OF_PROCESS: u64 = 1;
const OF_SOCKET: u64 = 2;

/// The events of [`Faults`]; guests count from 1.
const WAKEUP: u64 = 0;
const RETRY: u64 = 1;

impl Pager {
    /// Starts the threads.
    pub fn start(config: PagerConfig) -> Result<Pager> {
        let cannot = |error: Errno| Error::io("cannot watch for page faults", error.into());
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(cannot)?;
        let faults = Arc::new(Faults::new()?);
        let of = EventData::new_u64;
        epoll::add(&epoll, faults.wakeup(), of(WAKEUP), EventFlags::IN).map_err(cannot)?;
        epoll::add(&epoll, faults.retry(), of(RETRY), EventFlags::IN).map_err(cannot)?;
        let shared = Arc::new(Shared {
            epoll,
            guests: RwLock::default(),
            gone: Mutex::default(),
            next_id: AtomicU64::new(1),
            faults,
            ahead: Arc::default(),
            lead: Arc::default(),
            is_stopping: AtomicBool::new(false),
        });
        let prefetcher = Prefetcher::start(&shared, config.prefetch_threads)?;
        let mut pager = Pager { shared, threads: Vec::new(), prefetcher };
        for number in 0..config.threads.max(2) {
            let shared = Arc::clone(&pager.shared);
            let thread = thread::Builder::new()
                .name(format!("pager-{number}"))
                .spawn(move || shared.work())
                .map_err(|error| Error::io("cannot start a thread", error))?;
            pager.threads.push(thread);
        }
        Ok(pager)
    }

    /// Serves a guest whose VMM has just handed over its memory, over `socket`. Its regions were checked
    /// against the image ([`check`](fn@super::handshake::check)).
    ///
    /// `on_end` is called once, when serving has ended, on one of the pager's threads or by whoever ends
    /// it. A VMM that cannot be served after all is stopped, as its memory is nobody's.
    pub fn serve(
        &self,
        handshake: Handshake,
        socket: UnixStream,
        source: Arc<dyn MemorySource>,
        config: VmConfig,
        on_end: impl FnOnce(&Vm, End) + Send + 'static,
    ) -> Result<Arc<Vm>> {
        let pages = Pages::new(source.size_bytes().div_ceil(PAGE_BYTES).max(1))
            .map_err(|error| Error::with_source(ErrorKind::InvalidInput, "page states", error))?;
        self.serve_with(handshake, socket, source, pages, config, on_end)
    }

    /// The same with page states that a holder keeps already. They are of all of the image's pages, and
    /// all missing.
    pub fn serve_with(
        &self,
        handshake: Handshake,
        socket: UnixStream,
        source: Arc<dyn MemorySource>,
        pages: Pages,
        config: VmConfig,
        on_end: impl FnOnce(&Vm, End) + Send + 'static,
    ) -> Result<Arc<Vm>> {
        let pidfd = handshake.peer.pidfd().try_clone();
        let given = Given { handshake, socket: Some(socket), source, pages, config };
        self.attach(given, |_| Ok(()), Box::new(on_end)).inspect_err(|_| {
            if let Err(error) = pidfd.and_then(|pidfd| kill(&pidfd)) {
                tracing::error!(%error, "a VMM that is not served cannot be stopped");
            }
        })
    }

    /// Goes on serving a guest whose server has ended without saying goodbye: `pages` is what it knew.
    ///
    /// Threads of the guest that waited are woken and ask again. A guest of which pages are lost is
    /// stopped; after any other error somebody else may try.
    pub fn take_over(
        &self,
        handshake: Handshake,
        socket: Option<UnixStream>,
        source: Arc<dyn MemorySource>,
        pages: Pages,
        config: VmConfig,
        on_end: impl FnOnce(&Vm, End) + Send + 'static,
    ) -> Result<Arc<Vm>> {
        let given = Given { handshake, socket, source, pages, config };
        let prepare = |vm: &Vm| {
            vm.reconcile().inspect_err(|error| {
                if error.kind() == ErrorKind::Lost
                    && let Err(error) = vm.peer.kill()
                {
                    tracing::error!(%error, "a VMM whose memory is lost cannot be stopped");
                }
            })
        };
        self.attach(given, prepare, Box::new(on_end))
    }

    fn attach(
        &self,
        given: Given,
        prepare: impl FnOnce(&Vm) -> Result<()>,
        on_end: OnEnd,
    ) -> Result<Arc<Vm>> {
        let Given { handshake, socket, source, pages, config } = given;
        let Handshake { regions, uffd, peer, socket_end, .. } = handshake;
        let socket = socket.filter(|_| socket_end == SocketEnd::VmGone);
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let own = (id, Arc::clone(&self.shared.faults));
        let vm = Arc::new(Vm::new(uffd, peer, regions, source, pages, config, own)?);
        prepare(&vm)?;
        let guest =
            Arc::new(Guest { id, vm: Arc::clone(&vm), socket, on_end: Mutex::new(Some(on_end)) });
        self.shared.guests_mut().insert(id, Arc::clone(&guest));
        if let Err(error) = self.shared.watch(&guest) {
            self.shared.forget(&guest);
            return Err(error);
        }
        Ok(vm)
    }

    /// Installs the ranges of the image, in their order, before the guest asks for them. Faults go first;
    /// what is outside of the image is left out. Guests take turns.
    pub fn prefetch(&self, vm: &Arc<Vm>, ranges: Vec<std::ops::Range<u64>>) {
        self.shared.ahead.install(Arc::clone(vm), ranges, Zeros::Left);
    }

    /// The same for ranges that the guest will ask for, as it did before: zeros are installed, too, each
    /// of which takes a page where changes are tracked.
    pub fn replay(&self, vm: &Arc<Vm>, ranges: Vec<std::ops::Range<u64>>) {
        self.shared.ahead.install(Arc::clone(vm), ranges, Zeros::Installed);
    }

    /// Has ranges of an image decoded in their order, before the guest comes that will ask for them. They
    /// are not kept: what the source's cache cannot hold is decoded for nothing. Ends when something is
    /// to be installed from the same source.
    pub fn decode(&self, source: Arc<dyn MemorySource>, ranges: Vec<std::ops::Range<u64>>) {
        self.shared.ahead.decode(source, ranges);
    }

    /// Lets go of a guest: its faults are answered by nobody until somebody takes over. When this
    /// returns nothing is done to its memory any more.
    pub fn release(&self, vm: &Arc<Vm>) {
        let guest =
            self.shared.guests_mut().values().find(|guest| Arc::ptr_eq(&guest.vm, vm)).cloned();
        if let Some(guest) = guest {
            self.shared.end(&guest, End::Released);
        }
    }

    /// What was done for all guests there were; it never becomes less.
    pub fn stats(&self) -> VmStats {
        let guests = self.shared.guests.read().unwrap_or_else(PoisonError::into_inner);
        let mut sum = *self.shared.gone.lock().unwrap_or_else(PoisonError::into_inner);
        guests.values().for_each(|guest| sum.add(&guest.vm.stats()));
        sum
    }

    /// The guests that are served.
    pub fn guests(&self) -> Vec<Arc<Vm>> {
        let guests = self.shared.guests.read().unwrap_or_else(PoisonError::into_inner);
        let served = guests.values().filter(|guest| !guest.vm.has_ended());
        served.map(|guest| Arc::clone(&guest.vm)).collect()
    }
}

impl Drop for Pager {
    /// Ends the threads. Guests that are still served are released.
    fn drop(&mut self) {
        self.shared.is_stopping.store(true, Ordering::Release);
        self.prefetcher.stop();
        self.shared.faults.wake(self.threads.len());
        for thread in self.threads.drain(..) {
            // A panic of a thread has been told where it happened.
            let _ = thread.join();
        }
        let guests: Vec<_> = self.shared.guests_mut().values().cloned().collect();
        for guest in guests {
            self.shared.end(&guest, End::Released);
        }
    }
}

impl Shared {
    fn guests_mut(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<u64, Arc<Guest>>> {
        self.guests.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn guest(&self, id: u64) -> Option<Arc<Guest>> {
        self.guests.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }

    fn watch(&self, guest: &Guest) -> Result<()> {
        let cannot = |error: Errno| Error::io("cannot watch a guest", error.into());
        let once = EventFlags::IN | EventFlags::ONESHOT;
        let of = |kind| EventData::new_u64(guest.id * KINDS + kind);
        epoll::add(&self.epoll, guest.vm.peer.pidfd(), of(OF_PROCESS), once).map_err(cannot)?;
        if let Some(socket) = &guest.socket {
            epoll::add(&self.epoll, socket, of(OF_SOCKET), once).map_err(cannot)?;
        }
        let each = EventFlags::IN | EventFlags::ET;
        epoll::add(&self.epoll, &*guest.vm, of(OF_UFFD), each).map_err(cannot)
    }

    /// Has a guest's messages told again that are still unread.
    fn arm(&self, guest: &Guest) {
        let data = EventData::new_u64(guest.id * KINDS + OF_UFFD);
        let flags = EventFlags::IN | EventFlags::ET;
        // Fails where the guest was let go of meanwhile.
        if let Err(error) = epoll::modify(&self.epoll, &*guest.vm, data, flags) {
            tracing::debug!(%error, "a guest is not watched any more");
        }
    }

    /// A thread's life.
    fn work(&self) {
        let mut scratch = Scratch::default();
        let mut faults = Vec::new();
        loop {
            if scratch.lead.is_none() {
                scratch.lead = Some(self.lead.take());
            }
            if self.is_stopping() {
                return;
            }
            match self.next_event() {
                Some(WAKEUP) => self.faults.woken(),
                Some(RETRY) => {
                    scratch.lead = None;
                    for (id, fault) in self.faults.take_deferred() {
                        self.answer_of(id, fault, &mut scratch);
                    }
                }
                Some(event) => {
                    if let Some(guest) = self.guest(event / KINDS) {
                        if event % KINDS == OF_UFFD {
                            self.hear(&guest, &mut faults, &mut scratch);
                        } else {
                            // What is to be done at a guest's end is for others to say.
                            scratch.lead = None;
                            self.hear_of_end(&guest, event % KINDS);
                        }
                    }
                }
                None => {}
            }
            while let Some((id, fault)) = self.faults.next() {
                self.answer_of(id, fault, &mut scratch);
            }
        }
    }

    fn next_event(&self) -> Option<u64> {
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }];
        match epoll::wait(&self.epoll, &mut events, None) {
            Ok(0) | Err(Errno::INTR) => None,
            Ok(_) => Some(events[0].data.u64()),
            Err(error) => {
                tracing::error!(%error, "cannot wait for page faults");
                thread::sleep(AFTER_FAILURE);
                None
            }
        }
    }

    /// Reads a guest's messages and answers the first fault.
    fn hear(&self, guest: &Arc<Guest>, faults: &mut Vec<Fault>, scratch: &mut Scratch) {
        faults.clear();
        match guarded(|| guest.vm.read_messages(faults)) {
            Ok(true) => {}
            Ok(false) => self.arm(guest),
            Err(error) => {
                scratch.lead = None;
                return self.fail(guest, error);
            }
        }
        if faults.len() > 1 {
            scratch.lead = None;
            self.faults.pass_on(guest.id, faults.drain(1..));
        }
        if let Some(fault) = faults.pop() {
            self.answer(guest, fault, scratch);
        }
    }

    fn answer_of(&self, id: u64, fault: Fault, scratch: &mut Scratch) {
        // None: it has ended.
        if let Some(guest) = self.guest(id) {
            self.answer(&guest, fault, scratch);
        }
    }

    fn answer(&self, guest: &Arc<Guest>, fault: Fault, scratch: &mut Scratch) {
        let is_over = self.try_to_answer(guest, fault, scratch);
        scratch.pieces.clear();
        if let Some(ahead) = scratch.ahead.take() {
            self.ahead.decode_for(&guest.vm, ahead);
        }
        if !is_over {
            self.faults.defer(guest.id, fault);
        }
    }

    /// False if the guest is giving back memory and the fault has to wait for that.
    fn try_to_answer(&self, guest: &Arc<Guest>, fault: Fault, scratch: &mut Scratch) -> bool {
        let begun = Instant::now();
        let vm = &guest.vm;
        for _ in 0..RETRIES_AT_ONCE {
            if vm.has_ended() {
                return true;
            }
            let answered = guarded(|| vm.answer(fault, scratch));
            if !matches!(answered, Ok(Answered::Done)) {
                scratch.lead = None;
            }
            match answered {
                Ok(Answered::Done) => {
                    vm.counters.answered(begun - fault.read, begun.elapsed());
                    return true;
                }
                Ok(Answered::Gone) => {
                    // Unless it was let go of or stopped meanwhile.
                    if !vm.has_ended() {
                        self.end(guest, End::Gone);
                    }
                    return true;
                }
                Ok(Answered::Busy) => {
                    // A message that gives pages back waits, or its thread has not run yet.
                    if vm.counters.retried().is_multiple_of(ALIVE_CHECK_RETRIES) {
                        self.look_after(guest);
                    }
                    let mut faults = Vec::new();
                    if let Err(error) = guarded(|| vm.read_messages(&mut faults)) {
                        self.fail(guest, error);
                        return true;
                    }
                    vm.pass_on(faults);
                    thread::yield_now();
                }
                Err(error) => {
                    self.fail(guest, error);
                    return true;
                }
            }
        }
        false
    }

    fn hear_of_end(&self, guest: &Arc<Guest>, kind: u64) {
        match kind {
            OF_SOCKET => self.end_of_socket(guest),
            _ => self.look_after(guest),
        }
    }

    /// Looks after a guest whose VMM closed the socket. One that lives on, against what its kind does,
    /// still waits for its pages: its end is told by the process.
    fn end_of_socket(&self, guest: &Arc<Guest>) {
        let Some(socket) = &guest.socket else { return };
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(socket, &mut byte, flags) {
            Ok((0, _)) | Err(Errno::CONNRESET) => self.look_after(guest),
            // Nothing else is ever said there.
            Ok(_) | Err(_) => {}
        }
    }

    /// Ends a guest whose process has ended.
    fn look_after(&self, guest: &Arc<Guest>) {
        match guest.vm.peer.has_ended() {
            Ok(false) => {}
            Ok(true) => self.end(guest, End::Gone),
            Err(error) => self.fail(guest, Error::io("cannot look after a VMM", error)),
        }
    }

    fn fail(&self, guest: &Arc<Guest>, error: Error) {
        if guest.vm.peer.has_ended().unwrap_or(false) {
            self.end(guest, End::Gone);
        } else {
            guest.vm.fail(error);
            self.tell(guest);
        }
    }

    /// A guest that has ended is forgotten when its process has ended as well: only then whoever reads
    /// its memory from outside can be told that nobody serves it any more.
    fn end(&self, guest: &Arc<Guest>, end: End) {
        let is_released = matches!(end, End::Released);
        guest.vm.finish(end);
        if is_released {
            self.forget(guest);
            guest.vm.settle();
        } else if guest.vm.peer.has_ended().unwrap_or(false) {
            self.forget(guest);
            guest.vm.abandon();
        }
        self.tell(guest);
    }

    /// Tells how a guest ended; once.
    fn tell(&self, guest: &Arc<Guest>) {
        let on_end = guest.on_end.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(on_end) = on_end else { return };
        let Some(end) = guest.vm.take_end() else { return };
        if catch_unwind(AssertUnwindSafe(|| on_end(&guest.vm, end))).is_err() {
            tracing::error!(pid = guest.vm.peer.pid(), "telling the end of a guest panicked");
        }
    }

    fn forget(&self, guest: &Guest) {
        let mut guests = self.guests_mut();
        if guests.remove(&guest.id).is_some() {
            let mut gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
            gone.add(&guest.vm.stats());
        }
        drop(guests);
        // What was never watched cannot be forgotten, and closing forgets as well.
        let _ = epoll::delete(&self.epoll, &*guest.vm);
        let _ = epoll::delete(&self.epoll, guest.vm.peer.pidfd());
        if let Some(socket) = &guest.socket {
            let _ = epoll::delete(&self.epoll, socket);
        }
    }
}

/// Stops the process that a descriptor stands for.
fn kill(pidfd: &OwnedFd) -> std::io::Result<()> {
    Peer::from_pidfd(pidfd.try_clone()?)?.kill()
}

/// Runs what must not panic; if it does, its guest fails and no other.
pub(super) fn guarded<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        Err(Error::new(ErrorKind::Panicked, format!("serving page faults panicked: {what}")))
    })
}
