//! `dormouse serve memory`: the process that a VM lives off which woke from a snapshot. It answers
//! the page faults, has the disks, and commits both.
//!
//! It ends with its VM. When it is told to end, or killed, the VM's threads wait for pages until
//! another process takes over: its descriptors and all that is known of its pages are kept by a
//! holder ([`Keeping`]).

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result};
use dormouse_live::overlay::OverlayConfig;
use dormouse_serve::error::Error as ServeError;
use dormouse_serve::nbd::{Limits, Server};
use dormouse_serve::uffd::{End, MemorySource, Pager, PagerConfig, Vm};
use dormouse_store::name::{Name, SnapRef};
use dormouse_store::store::Store;
use serde_json::{Value, json};
use signal_hook::consts::SIGUSR1;
use signal_hook::iterator::{Handle, Signals};

use super::announce::Place;
use super::{
    Device, Exported, Exports, Owner, background, flush_all, metrics, print_metrics, signals,
};
use crate::app::App;
use crate::cli::live::ServeMemoryArgs;
use crate::exit::{Fault, Kind};
use crate::live::control::Control;
use crate::live::memory::{
    Door, Keeping, LiveMemory, NewMemory, Prefetch, RECORD_FOR, Successor, Touches, adopt, is_lost,
    keep, serve,
};
use crate::live::turn::Turn;
use crate::live::{LiveDisks, LiveFolder, ServedDisks};

pub(super) fn run(app: &mut App, args: &ServeMemoryArgs) -> Result<()> {
    if args.process.detached {
        background::leave_session()?;
    } else if args.process.log.is_some() {
        return Err(Fault::usage("--log is for --background; else messages go to stderr").into());
    }
    let store = app.open()?;
    let signals = signals()?;
    match (&args.take_over, &args.snap, &args.live, &args.uffd) {
        (Some(live), ..) => take_over(app, &store, args, live, signals),
        (None, Some(snap), Some(live), Some(socket)) => {
            wake(app, &store, args, (snap, live, socket), signals)
        }
        _ => Err(Fault::usage("give SNAP, --uffd and --as; or --take-over").into()),
    }
}

/// What the main thread waits for.
enum Event {
    /// A signal.
    Signal(i32),
    /// Another command asks for the end.
    Told,
    /// All that a VM relies on is there, or will never be.
    Settled(Result<()>),
    /// A VMM has handed over its memory, and is served.
    Woke(Arc<Vm>),
    /// Nobody can be served.
    Failed(anyhow::Error),
    /// The VM's memory is not served any more.
    Ended(End),
}

/// Why serving is over.
enum Over {
    Told,
    Gone,
    Stopped(ServeError),
    Failed(anyhow::Error),
}

/// Everything that serves a live VM.
struct Serving<'a> {
    store: &'a Store,
    args: &'a ServeMemoryArgs,
    folder: LiveFolder,
    memory: Arc<LiveMemory>,
    keeping: Keeping,
    pager: Arc<Pager>,
    disks: Arc<LiveDisks>,
    nbd: Option<(Server, Exports)>,
    uris: Vec<String>,
    /// What the guest touches first, if that is noted.
    touches: Option<Arc<Touches>>,
    /// Ends the commit under way.
    cancel: Arc<AtomicBool>,
    control: Control,
    sender: Sender<Event>,
    events: Receiver<Event>,
}

impl<'a> Serving<'a> {
    fn start(
        store: &'a Store,
        args: &'a ServeMemoryArgs,
        folder: &LiveFolder,
        memory: &Arc<LiveMemory>,
        ending: Handle,
    ) -> Result<Serving<'a>> {
        let disks = Arc::new(LiveDisks::open_any(store, folder, OverlayConfig::STANDARD)?);
        let nbd = match memory.description().nbd {
            Some(socket) => Some(listen(&socket, &disks)?),
            None => None,
        };
        let uris: Vec<String> = nbd.iter().flat_map(|(_, _, uris)| uris.clone()).collect();
        let cancel = Arc::new(AtomicBool::new(false));
        let owner = Owner {
            store: store.clone(),
            live: ServedDisks::new(Arc::clone(&disks), OverlayConfig::STANDARD),
            memory: Some(Arc::clone(memory)),
            turn: Turn::until(Arc::clone(&cancel)),
            ending,
            server: json!({ "pid": std::process::id(), "uris": uris }),
        };
        let path = folder.control();
        let control =
            Control::start(&path, Arc::new(move |request, tell| owner.answer(request, tell)))?;
        let (sender, events) = channel();
        Ok(Serving {
            store,
            args,
            folder: folder.clone(),
            memory: Arc::clone(memory),
            keeping: Keeping::at(folder.holder()),
            pager: Arc::new(Pager::start(PagerConfig::standard())?),
            disks,
            nbd: nbd.map(|(server, exports, _)| (server, exports)),
            uris,
            touches: None,
            cancel,
            control,
            sender,
            events,
        })
    }

    /// What is to be called when the VM's memory is not served any more.
    fn on_end(&self) -> impl FnOnce(&Vm, End) + Send + 'static {
        on_end(self.sender.clone())
    }

    fn prefetch(&self, vm: &Arc<Vm>) {
        match self.memory.description().prefetch {
            Prefetch::None => {}
            Prefetch::Trace => {
                if let Some(touches) = &self.touches {
                    self.pager.replay(vm, touches.take_order());
                }
            }
            Prefetch::All => {
                let all = 0..self.memory.source().size_bytes();
                self.pager.prefetch(vm, Vec::from([all]));
            }
        }
    }

    /// Prints where things are; then lets go of the terminal, if there is one to let go of.
    fn announce(&self, app: &mut App, socket: Option<&Path>) -> Result<()> {
        let (live, pid) = (&self.folder.live, std::process::id());
        if app.json {
            app.out.json(&json!({
                "live": live.as_str(),
                "socket": socket,
                "uris": self.uris,
                "pid": pid,
            }))?;
        } else {
            if let Some(socket) = socket {
                writeln!(app.out, "{}", socket.display())?;
            }
            self.uris.iter().try_for_each(|uri| writeln!(app.out, "{uri}"))?;
            if self.args.process.detached {
                writeln!(app.out, "pid {pid}")?;
            }
        }
        if let Some(socket) = socket {
            app.say(&format!(
                "Firecracker: PUT /snapshot/load {{\"snapshot_path\":STATE,\"mem_backend\":\
                 {{\"backend_type\":\"Uffd\",\"backend_path\":\"{}\"}}}}",
                socket.display()
            ));
        } else {
            app.say(&format!("{live} goes on"));
        }
        app.out.flush()?;
        if self.args.process.detached {
            let path = self.args.process.log.clone().unwrap_or_else(|| self.folder.log());
            background::detach(app, &background::open_log(&path)?)?;
        }
        Ok(())
    }

    /// Waits until serving is over. `door` is where a VMM comes in.
    fn wait(&self, mut signals: Signals, mut door: Option<&mut Door>) -> Result<Over> {
        let sender = self.sender.clone();
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for signal in signals.forever() {
                    if sender.send(Event::Signal(signal)).is_err() {
                        return;
                    }
                }
                // Somebody asked for the end. Nobody listens any more where it has come.
                let _ = sender.send(Event::Told);
            })
            .context("cannot wait for signals")?;
        let mut recorded_at = None;
        loop {
            let event = match recorded_at {
                None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => {
                    let left = Instant::saturating_duration_since(&at, Instant::now());
                    self.events.recv_timeout(left)
                }
            };
            let event = match event {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => {
                    recorded_at = None;
                    self.store_touches();
                    continue;
                }
                // One sender is ours.
                Err(RecvTimeoutError::Disconnected) => return Ok(Over::Told),
            };
            match event {
                Event::Signal(SIGUSR1) => print_metrics(&self.figures()),
                Event::Signal(_) | Event::Told => return Ok(Over::Told),
                Event::Settled(Ok(())) => {
                    if let Some(door) = &mut door {
                        self.open(door)?;
                    }
                }
                Event::Settled(Err(error)) | Event::Failed(error) => {
                    return Ok(Over::Failed(error));
                }
                Event::Woke(vm) => {
                    self.prefetch(&vm);
                    recorded_at = self.touches.as_ref().map(|_| Instant::now() + RECORD_FOR);
                    if let Some(door) = &mut door {
                        door.close();
                    }
                }
                Event::Ended(End::Gone) => return Ok(Over::Gone),
                Event::Ended(End::Stopped(error)) => return Ok(Over::Stopped(error)),
                Event::Ended(End::Released) => return Ok(Over::Told),
            }
        }
    }

    fn store_touches(&self) {
        if let Some(touches) = &self.touches {
            touches.store(self.store);
        }
    }

    /// Lets VMMs in, one of which will be served.
    fn open(&self, door: &mut Door) -> Result<()> {
        let (pager, keeping) = (Arc::clone(&self.pager), self.keeping.clone());
        let (memory, sender) = (Arc::clone(&self.memory), self.sender.clone());
        door.open(move |arrival| {
            let pages = match keep(&keeping, &arrival) {
                Ok(pages) => pages,
                Err(error) => {
                    let why = format!("{error:#}");
                    // Nobody listens any more where the end has come.
                    let _ = sender.send(Event::Failed(error));
                    return Err(Fault::new(Kind::Other, why).into());
                }
            };
            let vm = serve(&pager, &memory, arrival, pages, on_end(sender.clone()))?;
            let _ = sender.send(Event::Woke(vm));
            Ok(())
        })
    }

    fn figures(&self) -> Value {
        json!({
            "version": 1,
            "live": self.folder.live.as_str(),
            "memory": self.memory.figures(),
            "nbd": self.nbd.as_ref().map(|(server, exports)| {
                metrics::object(&server.stats(), exports)
            }),
        })
    }

    fn end(self, app: &App, over: Over) -> Result<()> {
        let stopped = self.nbd.as_ref().map_or(Ok(()), |(server, _)| server.stop());
        // A commit under way ends as if it had failed: the next one has what it sealed.
        self.cancel.store(true, Ordering::Relaxed);
        if self.args.process.metrics {
            print_metrics(&self.figures());
        }
        let Serving { store, args, folder, memory, pager, disks, control, touches, .. } = self;
        drop(control);
        let flushed = flush_all(app, &[disks], stopped.map_err(Into::into));
        if let (Over::Stopped(_) | Over::Failed(_), Err(error)) = (&over, &flushed) {
            app.warn(&format!("{error:#}"));
        }
        if let Some(touches) = &touches {
            touches.store(store);
        }
        let keep_log = args.process.detached && args.process.log.is_none();
        match over {
            Over::Told => match memory.vm().filter(|vm| !vm.has_ended()) {
                Some(vm) => {
                    pager.release(vm);
                    let live = &folder.live;
                    app.say(&format!(
                        "{live} runs on until it needs a page that it has not; \
                         `dormouse serve memory --take-over {live}` gives it one"
                    ));
                }
                None => memory.remove(store, false)?,
            },
            Over::Gone => memory.remove(store, false)?,
            Over::Stopped(error) => {
                memory.remove(store, keep_log)?;
                return Err(error.into());
            }
            Over::Failed(error) => {
                memory.remove(store, keep_log)?;
                return Err(error);
            }
        }
        flushed
    }
}

fn on_end(sender: Sender<Event>) -> impl FnOnce(&Vm, End) + Send + 'static {
    move |_, end| {
        // Nobody listens any more where the end has come.
        let _ = sender.send(Event::Ended(end));
    }
}

/// Waits for the VMM of a snapshot that wakes, and serves it.
fn wake(
    app: &mut App,
    store: &Store,
    args: &ServeMemoryArgs,
    (snap, live, socket): (&SnapRef, &Name, &Path),
    signals: Signals,
) -> Result<()> {
    let folder = LiveFolder::new(&app.store_dir, live);
    let nbd = args.nbd.as_ref().map(std::path::absolute).transpose().context("no such folder")?;
    let new = NewMemory {
        tracking: args.track_dirty,
        window_bytes: args.window,
        prefetch: args.prefetch,
        nbd,
        of_vm: false,
    };
    let memory = Arc::new(LiveMemory::create(store, &folder, snap, new)?);
    let served = wait_and_serve(app, store, args, &folder, &memory, (snap, socket), signals);
    // What cannot be served does not stay; where it was, it is gone already.
    if served.is_err() && memory.vm().is_none() && folder.memory().exists() {
        memory.remove(store, args.process.detached && args.process.log.is_none())?;
    }
    served
}

fn wait_and_serve(
    app: &mut App,
    store: &Store,
    args: &ServeMemoryArgs,
    folder: &LiveFolder,
    memory: &Arc<LiveMemory>,
    (snap, socket): (&SnapRef, &Path),
    signals: Signals,
) -> Result<()> {
    let mut serving = Serving::start(store, args, folder, memory, signals.handle())?;
    if args.prefetch == Prefetch::Trace {
        serving.touches = Some(Arc::new(Touches::begin(store.resolve(snap)?, memory)));
    }
    let mut door = Door::listen(socket, memory.source().size_bytes())?;
    let path = std::path::absolute(socket).unwrap_or_else(|_| socket.to_owned());
    serving.announce(app, Some(&path))?;
    let settling = settle(&serving)?;
    let over = serving.wait(signals, Some(&mut door));
    door.close();
    // A holder that is being started is told what to mind before we end: our end is what it waits for.
    let _ = settling.join();
    serving.end(app, over?)
}

/// Does what a VM relies on and a VMM that is being started need not wait for.
fn settle(serving: &Serving<'_>) -> Result<JoinHandle<()>> {
    let (keeping, sender) = (serving.keeping.clone(), serving.sender.clone());
    let (memory, store) = (Arc::clone(&serving.memory), serving.store.clone());
    let (touches, pager) = (serving.touches.clone(), Arc::clone(&serving.pager));
    thread::Builder::new()
        .name("settling".to_owned())
        .spawn(move || {
            if let Some(touches) = &touches {
                touches.read_order(&store);
                // What the guest will ask for first, while its VMM is being started.
                let source = Arc::clone(memory.source()) as Arc<dyn MemorySource>;
                pager.decode(source, touches.start_of_order());
            }
            let settled = keeping.start(&Successor::default()).and_then(|()| memory.settle(&store));
            // Nobody listens any more where the end has come.
            let _ = sender.send(Event::Settled(settled));
        })
        .context("cannot start a thread")
}

/// Goes on where a server left off.
fn take_over(
    app: &mut App,
    store: &Store,
    args: &ServeMemoryArgs,
    live: &Name,
    signals: Signals,
) -> Result<()> {
    let folder = LiveFolder::new(&app.store_dir, live);
    let memory = Arc::new(LiveMemory::open(store, &folder)?);
    let keeping = Keeping::at(folder.holder());
    let gone = || -> Result<()> {
        memory.remove(store, false)?;
        let message = format!("the VM {live} is gone; what was left of it is removed");
        Err(Fault::new(Kind::NotFound, message).into())
    };
    let Some(orphan) = keeping.take()? else { return gone() };
    keeping.mind_us()?;
    let serving = Serving::start(store, args, &folder, &memory, signals.handle())?;
    let peer_has_ended = match adopt(&serving.pager, &memory, orphan, serving.on_end()) {
        Ok(vm) => {
            serving.prefetch(&vm);
            false
        }
        Err((error, peer)) if peer.has_ended().unwrap_or(false) => {
            tracing::debug!(error = &*error, "the VM ended while it was taken over");
            true
        }
        Err((error, peer)) => {
            if is_lost(&error) {
                tracing::error!(pid = peer.pid(), error = &*error, "the guest is stopped");
                peer.kill().context("the guest cannot be stopped")?;
                memory.remove(store, args.process.detached && args.process.log.is_none())?;
            }
            return Err(error);
        }
    };
    if peer_has_ended {
        drop(serving);
        return gone();
    }
    // A guest is served already: nobody hearing of it must not end that.
    if let Err(error) = serving.announce(app, None) {
        tracing::warn!(error = &*error, "cannot tell that the VM is served");
    }
    let over = serving.wait(signals, None)?;
    serving.end(app, over)
}

/// Serves all disks of a live VM at a socket.
fn listen(socket: &Path, disks: &LiveDisks) -> Result<(Server, Exports, Vec<String>)> {
    let live = &disks.folder.live;
    if disks.disks.is_empty() {
        let message = format!("{live} has no disks for --nbd; `dormouse disk create {live}`");
        return Err(Fault::usage(message).into());
    }
    let mut exports = Exports::new(OverlayConfig::STANDARD);
    for disk in &disks.disks {
        let name = match &disks.disks[..] {
            [_] => live.to_string(),
            _ => format!("{live}/{}", disk.id),
        };
        exports.list.push(Exported { name, device: Device::Live(disk.clone()) });
    }
    let mut builder = Server::builder(Limits::STANDARD).listen_unix(socket);
    for exported in &exports.list {
        builder = builder.export(exported.export());
    }
    let place = Place::Unix(PathBuf::from(socket));
    let uris = exports.list.iter().map(|exported| place.uri(&exported.name)).collect();
    Ok((builder.start()?, exports, uris))
}
