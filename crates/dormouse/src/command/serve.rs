//! `dormouse serve`: live disks and images over the Network Block Device protocol, and memory to VMMs
//! that wake snapshots.

mod announce;
pub(crate) mod attach;
mod background;
mod memory;
mod metrics;

use std::fs::File;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dormouse_live::overlay::{OverlayConfig, ZeroBlocks};
use dormouse_serve::nbd::{Export, Limits, Server, TlsConfig, TlsMode};
use dormouse_store::name::{ImageRef, Name};
use dormouse_store::store::Store;
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;
use signal_hook::iterator::{Handle, Signals};

use super::disk::status_of;
use crate::app::App;
use crate::cli::live::{DetectZeroes, ServeCommand, ServeNbdArgs};
use crate::exit::{Fault, Kind};
use crate::live::control::{Control, Request, Tell, ask};
use crate::live::memory::LiveMemory;
use crate::live::turn::Turn;
use crate::live::{
    ImageDevice, LiveDisk, LiveDisks, LiveFolder, LiveRef, OverlayDevice, ServedDisks, commit,
};

/// How long a stop waits for the process that was asked to let go of its disks: it answers what is
/// under way, and flushes.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) fn run(app: &mut App, command: ServeCommand) -> Result<ExitCode> {
    match command {
        ServeCommand::Nbd(args) if args.process.background => background::start(app),
        ServeCommand::Nbd(args) => nbd(app, &args).map(|()| ExitCode::SUCCESS),
        ServeCommand::Memory(args) if args.process.background => background::start(app),
        ServeCommand::Memory(args) => memory::run(app, &args).map(|()| ExitCode::SUCCESS),
        ServeCommand::Stop { live } => stop(app, &live).map(|()| ExitCode::SUCCESS),
    }
}

/// What a server exports, and which live VMs it has for that.
#[derive(Debug)]
struct Exports {
    list: Vec<Exported>,
    lives: Vec<Arc<LiveDisks>>,
    config: OverlayConfig,
}

/// An export as the user named it.
#[derive(Debug)]
struct Exported {
    name: String,
    device: Device,
}

#[derive(Debug)]
enum Device {
    Live(LiveDisk),
    Image(dormouse_store::reader::ImageReader),
}

impl Exported {
    fn export(&self) -> Export {
        match &self.device {
            Device::Live(disk) => {
                let device = OverlayDevice::new(Arc::clone(&disk.overlay));
                Export::new(&self.name, Arc::new(device)).description("live disk")
            }
            Device::Image(image) => {
                let device = ImageDevice::new(image.clone());
                Export::new(&self.name, Arc::new(device)).description("read-only")
            }
        }
    }

    fn size_bytes(&self) -> u64 {
        match &self.device {
            Device::Live(disk) => disk.overlay.size_bytes(),
            Device::Image(image) => image.size_bytes(),
        }
    }

    fn is_read_only(&self) -> bool {
        matches!(self.device, Device::Image(_))
    }
}

impl Exports {
    fn new(config: OverlayConfig) -> Exports {
        Exports { list: Vec::new(), lives: Vec::new(), config }
    }

    fn open(app: &App, store: &Store, args: &ServeNbdArgs) -> Result<Exports> {
        let zero_blocks = match args.detect_zeroes {
            DetectZeroes::On => ZeroBlocks::Found,
            DetectZeroes::Off => ZeroBlocks::Written,
        };
        let config = OverlayConfig { zero_blocks, ..OverlayConfig::STANDARD };
        let mut exports = Exports::new(config);
        for name in &args.exports {
            let device = match name.parse::<ImageRef>() {
                Ok(image) => Device::Image(store.snapshot(&image.snap)?.image(&image.image)?),
                Err(error) if name.contains(':') => return Err(error.into()),
                Err(_) if name.contains('@') => {
                    let message =
                        format!("{name} is a snapshot; give one of its images, {name}:IMAGE");
                    return Err(Fault::usage(message).into());
                }
                Err(_) => {
                    let wanted: LiveRef = name.parse()?;
                    let live = exports.live(app, store, &wanted.live, config)?;
                    let [disk] = live.chosen(wanted.disk.as_ref())?[..] else {
                        let message = format!("{name} has several disks; give LIVE/ID");
                        return Err(Fault::usage(message).into());
                    };
                    Device::Live(disk.clone())
                }
            };
            exports.list.push(Exported { name: name.clone(), device });
        }
        Ok(exports)
    }

    /// The disks of a live VM, opened once however many of them are served.
    fn live(
        &mut self,
        app: &App,
        store: &Store,
        name: &Name,
        config: OverlayConfig,
    ) -> Result<Arc<LiveDisks>> {
        if let Some(live) = self.lives.iter().find(|live| live.folder.live == *name) {
            return Ok(Arc::clone(live));
        }
        let folder = LiveFolder::new(&app.store_dir, name);
        let live = Arc::new(LiveDisks::open(store, &folder, config)?);
        self.lives.push(Arc::clone(&live));
        Ok(live)
    }
}

fn nbd(app: &mut App, args: &ServeNbdArgs) -> Result<()> {
    if args.process.detached {
        background::leave_session()?;
    } else if args.process.log.is_some() {
        return Err(Fault::usage("--log is for --background; else messages go to stderr").into());
    }
    let store = app.open()?;
    let mut signals = signals()?;
    let exports = Exports::open(app, &store, args)?;
    let log = args.process.detached.then(|| open_log(args, &exports)).transpose()?;
    let server = Arc::new(listen(args, &exports)?);
    let attached = attach::attach(args, &server, &exports)?;
    let device = attached.as_ref().map(attach::Attached::path);
    let places = announce::places(args, &server, &exports, device);
    let cancel = Arc::new(AtomicBool::new(false));
    let mut controls = Vec::new();
    for live in &exports.lives {
        let owner = Owner {
            store: store.clone(),
            live: ServedDisks::new(Arc::clone(live), exports.config),
            memory: None,
            turn: Turn::until(Arc::clone(&cancel)),
            ending: signals.handle(),
            server: json!({ "pid": std::process::id(), "uris": places.uris }),
        };
        let path = live.folder.control();
        controls.push(Control::start(
            &path,
            Arc::new(move |request, tell| owner.answer(request, tell)),
        )?);
    }
    announce::tell(app, args, &places)?;
    if let Some((log, _)) = &log {
        background::detach(app, log)?;
    }
    for signal in signals.forever() {
        if signal != SIGUSR1 {
            break;
        }
        print_metrics(&metrics::object(&server.stats(), &exports));
    }
    drop(attached);
    let stopped = server.stop();
    // A commit under way ends as if it had failed: the next one has what it sealed.
    cancel.store(true, Ordering::Relaxed);
    drop(controls);
    if args.process.metrics {
        print_metrics(&metrics::object(&server.stats(), &exports));
    }
    flush_all(app, &exports.lives, stopped.map_err(Into::into))
}

/// Flushes all disks, whatever went wrong before and becomes of any of them. Gives the first failure
/// and tells the others.
fn flush_all(app: &App, lives: &[Arc<LiveDisks>], before: Result<()>) -> Result<()> {
    let mut result = before;
    for live in lives {
        for disk in &live.disks {
            let context = || format!("cannot flush disk {}/{}", live.folder.live, disk.id);
            let flushed = disk.overlay.flush().with_context(context);
            match (&result, flushed) {
                (_, Ok(())) => {}
                (Ok(()), failed) => result = failed,
                (Err(_), Err(error)) => app.warn(&format!("{error:#}")),
            }
        }
    }
    result
}

/// The signals that a server waits for. Of those that end it, a second one ends the process at once.
fn signals() -> Result<Signals> {
    let ending = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the flag is still unset when the first signal passes the shutdown.
        let code = Kind::Cancelled.code().into();
        flag::register_conditional_shutdown(signal, code, Arc::clone(&ending))
            .and_then(|_| flag::register(signal, Arc::clone(&ending)))
            .context("handle signals")?;
    }
    Signals::new([SIGINT, SIGTERM, SIGUSR1]).context("handle signals")
}

fn listen(args: &ServeNbdArgs, exports: &Exports) -> Result<Server> {
    let mut builder = Server::builder(Limits::STANDARD);
    for exported in &exports.list {
        builder = builder.export(exported.export());
    }
    if let Some(socket) = &args.socket {
        builder = builder.listen_unix(socket);
    }
    if let Some(address) = args.tcp {
        let mode = if args.tls_optional { TlsMode::Optional } else { TlsMode::Required };
        let tls = args.tls.as_deref().map(|folder| TlsConfig::from_folder(folder, mode));
        builder = builder.listen_tcp(address, tls.transpose()?);
    }
    Ok(builder.start()?)
}

/// The file that a background server's messages go to: in the folder of its first live VM.
fn open_log(args: &ServeNbdArgs, exports: &Exports) -> Result<(File, std::path::PathBuf)> {
    let path = match (&args.process.log, exports.lives.first()) {
        (Some(path), _) => path.clone(),
        (None, Some(live)) => live.folder.log(),
        (None, None) => {
            let message = "a background server of nothing but snapshots has no folder for its \
                           log; give --log FILE";
            return Err(Fault::usage(message).into());
        }
    };
    Ok((background::open_log(&path)?, path))
}

/// What answers other commands in the process that has a live VM.
#[derive(Debug)]
struct Owner {
    store: Store,
    live: ServedDisks,
    memory: Option<Arc<LiveMemory>>,

    /// Whose commit is under way.
    turn: Turn,

    /// Ends the wait for signals, as the first SIGTERM does.
    ending: Handle,

    /// Who we are, as `disk status` tells it.
    server: Value,
}

impl Owner {
    fn answer(&self, request: Request, tell: Tell<'_>) -> Result<Value> {
        match request {
            Request::Status => {
                let mut status =
                    status_of(&*self.live.current(&self.store)?, self.memory.as_deref())?;
                status["server"] = self.server.clone();
                status["is_committing"] = self.turn.is_taken().into();
                Ok(status)
            }
            Request::Commit(wanted) => {
                let live = self.live.current(&self.store)?;
                let memory = self.memory.as_deref();
                self.turn.commit(wanted.id, &live.folder.live, tell, |on_step, job| {
                    commit(&self.store, &live, memory, &wanted, on_step, job)
                })
            }
            Request::Cancel { commit } => {
                self.turn.cancel(commit);
                Ok(Value::Null)
            }
            Request::Copy(_) | Request::DropCopy => {
                let message = "only the data plane copies the memory of a VM";
                Err(Fault::new(Kind::Unsupported, message).into())
            }
            Request::Stop => {
                // No signal: after another one it would end the process at once.
                self.ending.close();
                Ok(Value::Null)
            }
        }
    }
}

fn stop(app: &mut App, live: &Name) -> Result<()> {
    let folder = LiveFolder::new(&app.store_dir, live);
    app.open()?;
    folder.check()?;
    let was_served = stop_server(&folder)?;
    if app.json {
        app.out.json(&json!({ "live": live.as_str(), "stopped": was_served }))?;
    } else if was_served {
        app.say(&format!("{live} is not served any more"));
    } else {
        app.say(&format!("nobody serves {live}"));
    }
    Ok(())
}

/// Asks the process that has the disks to end, if there is one, and waits until it let go of them.
pub(super) fn stop_server(folder: &LiveFolder) -> Result<bool> {
    if ask(&folder.control(), &Request::Stop)?.is_none() {
        return Ok(false);
    }
    let begun = Instant::now();
    while !folder.is_free()? {
        if begun.elapsed() > STOP_TIMEOUT {
            let message = format!("the process that serves {} does not end", folder.live);
            return Err(Fault::new(Kind::Busy, message).into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(true)
}

#[expect(clippy::print_stderr, reason = "the one place that prints statistics")]
fn print_metrics(object: &Value) {
    eprintln!("{object}");
}
