//! `dormouse serve nbd`: live disks and images over the Network Block Device protocol.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use dormouse_serve::nbd::{Export, Limits, Server, ServerStats, TlsConfig, TlsMode};
use dormouse_store::name::ImageRef;
use dormouse_store::progress::Job;
use dormouse_store::store::Store;
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use super::disk::{committed, status_of};
use crate::app::App;
use crate::cli::ServeNbdArgs;
use crate::exit::Fault;
use crate::live::control::{Control, Request};
use crate::live::{ImageDevice, LiveDisks, LiveFolder, LiveRef, OverlayDevice, commit};

pub(super) fn nbd(app: &mut App, args: &ServeNbdArgs) -> Result<()> {
    let store = app.open()?;
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1]).context("handle signals")?;
    let mut builder = Server::builder(Limits::STANDARD);
    let mut names = Vec::new();
    let mut owned: Vec<Arc<LiveDisks>> = Vec::new();
    for name in &args.exports {
        let export = match name.parse::<ImageRef>() {
            Ok(image) => {
                let device = store.snapshot(&image.snap)?.image(&image.image)?;
                Export::new(name, Arc::new(ImageDevice(device))).description("read-only")
            }
            Err(_) => {
                let wanted: LiveRef = name.parse()?;
                let live = live_disks(app, &store, &wanted, &mut owned)?;
                let [disk] = live.chosen(wanted.disk.as_ref())?[..] else {
                    let message = format!("{name} has several disks; give LIVE/ID");
                    return Err(Fault::usage(message).into());
                };
                Export::new(name, Arc::new(OverlayDevice(Arc::clone(&disk.overlay))))
                    .description("live disk")
            }
        };
        names.push(name.clone());
        builder = builder.export(export);
    }
    if let [only] = &names[..] {
        builder = builder.default_export(only.as_str());
    }
    if let Some(socket) = &args.socket {
        builder = builder.listen_unix(socket);
    }
    if let Some(address) = args.tcp {
        let mode = if args.tls_optional { TlsMode::Optional } else { TlsMode::Required };
        let tls = args.tls.as_deref().map(|folder| TlsConfig::from_folder(folder, mode));
        builder = builder.listen_tcp(address, tls.transpose()?);
    }
    let server = Arc::new(builder.start()?);
    for live in &owned {
        let control = Control::bind(&live.folder.control())?;
        let (store, live) = (store.clone(), Arc::clone(live));
        thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || answer(&control, &store, &live))
            .context("start the control socket")?;
    }
    announce(app, args, &server, &names)?;
    for signal in signals.forever() {
        if signal != SIGUSR1 {
            break;
        }
        app.warn(&stats_json(&server.stats()).to_string());
    }
    server.stop()?;
    for live in &owned {
        live.disks.iter().try_for_each(|disk| disk.overlay.flush())?;
        // The control thread ends with the process; its socket must not outlive it.
        let _ = std::fs::remove_file(live.folder.control());
    }
    if args.metrics {
        app.warn(&stats_json(&server.stats()).to_string());
    }
    Ok(())
}

/// The disks of a live VM, opened once however many of them are served.
fn live_disks(
    app: &App,
    store: &Store,
    wanted: &LiveRef,
    owned: &mut Vec<Arc<LiveDisks>>,
) -> Result<Arc<LiveDisks>> {
    if let Some(live) = owned.iter().find(|live| live.folder.live == wanted.live) {
        return Ok(Arc::clone(live));
    }
    let folder = LiveFolder::new(&app.store_dir, &wanted.live);
    let live = Arc::new(LiveDisks::open(store, &folder)?);
    owned.push(Arc::clone(&live));
    Ok(live)
}

/// Answers other commands until one asks to stop, which this does by the signal that a user sends.
fn answer(control: &Control, store: &Store, live: &LiveDisks) {
    control.serve(&mut |request| match request {
        Request::Status => Some(status_of(live)),
        Request::Commit(wanted) => Some(
            commit(store, live, &wanted, Job::quiet())
                .map(|(report, freeze)| committed(&report, freeze)),
        ),
        Request::Stop => {
            if let Err(error) = signal_hook::low_level::raise(SIGTERM) {
                tracing::warn!(%error, "cannot stop");
            }
            None
        }
    });
}

/// Prints where the exports are and how to use them.
fn announce(app: &mut App, args: &ServeNbdArgs, server: &Server, names: &[String]) -> Result<()> {
    let mut uris = Vec::new();
    for name in names {
        if let Some(socket) = &args.socket {
            uris.push(format!("nbd+unix:///{name}?socket={}", absolute(socket).display()));
        }
        let scheme = if args.tls.is_some() { "nbds" } else { "nbd" };
        uris.extend(server.tcp_addresses().iter().map(|at| format!("{scheme}://{at}/{name}")));
    }
    if app.json {
        app.out.json(&json!({ "uris": uris }))?;
    } else {
        uris.iter().try_for_each(|uri| writeln!(app.out, "{uri}"))?;
    }
    app.out.flush()?;
    if let Some(uri) = uris.first() {
        app.say(&format!(
            "QEMU:    -drive file={uri},format=raw,discard=unmap,detect-zeroes=unmap"
        ));
        app.say(&format!("copy:    nbdcopy '{uri}' FILE"));
        app.say(&format!("kernel:  nbd-client with the socket, or nbdkit's nbd plugin; {uri}"));
    }
    Ok(())
}

fn absolute(path: &Path) -> std::path::PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn stats_json(stats: &ServerStats) -> Value {
    let command = |stats: &dormouse_serve::nbd::CommandStats| {
        json!({
            "requests": stats.requests,
            "bytes": stats.bytes,
            "errors": stats.errors,
            "waiting_seconds": stats.waiting.as_secs_f64(),
            "serving_seconds": stats.serving.as_secs_f64(),
        })
    };
    let exports: Vec<Value> = stats
        .exports
        .iter()
        .map(|export| {
            json!({
                "name": export.name,
                "connections": export.connections,
                "read": command(&export.read),
                "write": command(&export.write),
                "flush": command(&export.flush),
                "trim": command(&export.trim),
                "zero": command(&export.zero),
                "cache": command(&export.cache),
                "block_status": command(&export.block_status),
                "refused": export.refused,
            })
        })
        .collect();
    json!({ "version": 1, "exports": exports, "accepted": stats.accepted, "failed": stats.failed })
}
