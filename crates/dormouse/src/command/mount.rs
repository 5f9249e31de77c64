//! `dormouse mount`: the store and its live VMs as files.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use dormouse_serve::fuse::{Mount, MountOptions, Tree, Unmounted, clear_stale};
use dormouse_store::store::Store;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::app::App;
use crate::background::{Side, split};
use crate::cli::live::MountArgs;
use crate::live::control::Control;
use crate::live::memory::Successor;
use crate::mount::{MountFigures, MountKeeping, Orphan, StoreTree};
use crate::vm::plane::{Plane, is_needed};

pub(super) fn run(app: &mut App, args: &MountArgs) -> Result<ExitCode> {
    let store = app.open()?;
    let ready = match split(args.background)? {
        Side::Started(code) => return Ok(code),
        Side::Here(ready) => ready,
    };
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("handle signals")?;
    raise_descriptors();
    // A relative one would depend on where we are, and it must not lie below the mount itself.
    let store_dir = std::path::absolute(&app.store_dir).context("find the store")?;
    let keeping = MountKeeping::of(&store_dir, &args.dir, args.hold)?;
    let orphan = match &keeping {
        Some(keeping) => keeping.take()?,
        None => None,
    };
    if args.successor && orphan.is_none() {
        // It was unmounted meanwhile, or never was mounted.
        return Ok(ExitCode::SUCCESS);
    }
    let cache = store.clone();
    let mut tree = StoreTree::new(store, &store_dir);
    let options = MountOptions {
        threads: args.threads.get(),
        read_ahead_threads: thread::available_parallelism().map_or(1, usize::from),
        allow_other: args.allow_other,
    };
    let is_held = args.hold || orphan.is_some();
    let memory;
    let (tree, mount) = match orphan {
        Some(Orphan { handover, journal }) => {
            tree.take_over(journal)?;
            let tree = Arc::new(tree);
            memory = serve_memory(&store_dir, keeping.as_ref(), &tree)?;
            // Kept from before; the journal, which is as it was, too.
            let shown = Arc::clone(&tree) as Arc<dyn Tree>;
            let mount = Mount::resume(shown, handover, &options)?;
            app.warn(&format!("took over {}, whose process was gone", mount.place().display()));
            (tree, mount)
        }
        None => {
            if clear_stale(&args.dir)? {
                let dir = args.dir.display();
                app.warn(&format!("{dir} was left behind by a crash; unmounted it"));
            }
            if args.hold {
                tree.keep_journal()?;
            }
            if let Some(keeping) = keeping.as_ref().filter(|_| args.hold) {
                keeping.start(&successor(&store_dir, args)?)?;
            }
            let tree = Arc::new(tree);
            memory = serve_memory(&store_dir, keeping.as_ref(), &tree)?;
            let shown = Arc::clone(&tree) as Arc<dyn Tree>;
            let mount = Mount::new(shown, &args.dir, &options)?;
            (tree, mount)
        }
    };
    let keeping = keeping.filter(|_| is_held);
    if let Some(keeping) = &keeping {
        tree.keep(keeping, &mount, successor(&store_dir, args)?)?;
    }
    let mount = Arc::new(mount);
    tree.mounted(mount.place());
    if app.json {
        app.out.json(&json!({ "mounted": mount.place(), "pid": std::process::id() }))?;
    } else {
        writeln!(app.out, "{}", mount.place().display())?;
    }
    app.out.flush()?;
    let figures = figures(cache, &mount, &tree);
    let sign = keeping.as_ref().map(|keeping| keeping.sign(figures)).transpose()?;
    app.say(&format!("until SIGTERM, or `umount {}`", mount.place().display()));
    ready.tell(app, args.log.as_deref())?;
    let handle = signals.handle();
    let watched = Arc::clone(&mount);
    let watcher = thread::Builder::new()
        .name("unmounted".to_owned())
        .spawn(move || {
            let result = watched.wait();
            handle.close();
            result
        })
        .context("start a thread")?;
    let mut is_detached = false;
    for _ in signals.forever() {
        if memory.is_some() && is_needed(&store_dir) {
            app.warn("VMs have their disks and memory from this process: it goes on");
            continue;
        }
        if is_detached {
            app.warn("ending with open files, which fail from now on");
            tree.flush()?;
            if let Some(keeping) = &keeping {
                keeping.forget()?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        match mount.unmount()? {
            Unmounted::Clean => {}
            Unmounted::Detached => {
                is_detached = true;
                app.warn(
                    "files are open and served until they are closed; a second signal ends that",
                );
            }
        }
    }
    match watcher.join() {
        Ok(result) => result?,
        Err(panic) => std::panic::resume_unwind(panic),
    }
    drop(memory);
    drop(sign);
    if let Some(keeping) = &keeping {
        keeping.forget()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Raises the limit of descriptors as far as it may: whoever started this may have had a few files in mind,
/// and each VM takes some.
fn raise_descriptors() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of descriptors stays as it is");
    }
}

/// Answers for the memory of VMs, if this is the store's data plane: another mount of the store shows it
/// and answers for nobody's. Before the disks are had, or a VM could be stored without its memory.
fn serve_memory(
    store_dir: &Path,
    keeping: Option<&MountKeeping>,
    tree: &StoreTree,
) -> Result<Option<Control>> {
    let plane = Plane::of(&store_dir.canonicalize().context("cannot find the store")?);
    let is_plane = keeping.is_some_and(|keeping| plane.is_at(keeping.place()));
    is_plane.then(|| tree.serve_memory(&plane.control())).transpose()
}

/// What others are told of the mount.
fn figures(
    store: Store,
    mount: &Arc<Mount>,
    tree: &Arc<StoreTree>,
) -> impl Fn() -> MountFigures + use<> {
    // Whoever asks must not keep it from being unmounted.
    let (mount, tree) = (Arc::downgrade(mount), Arc::downgrade(tree));
    move || {
        let traffic = mount.upgrade().map(|mount| mount.traffic()).unwrap_or_default();
        let faults = tree.upgrade().map(|tree| tree.fault_figures()).unwrap_or_default();
        MountFigures {
            pid: std::process::id(),
            reads: traffic.reads,
            read_bytes: traffic.read_bytes,
            read_seconds: Duration::from_nanos(traffic.read_nanoseconds).as_secs_f64(),
            writes: traffic.writes,
            written_bytes: traffic.written_bytes,
            failures: traffic.failures,
            decoded_frames: store.decoded_frames(),
            found_frames: store.found_frames(),
            cached_frame_bytes: store.cached_frame_bytes(),
            faults,
        }
    }
}

/// What serves on should this process be killed: nothing where somebody looks at it themselves.
fn successor(store_dir: &Path, args: &MountArgs) -> Result<Successor> {
    if !args.background {
        return Ok(Successor::default());
    }
    let log = args.log.as_ref().map(std::path::absolute).transpose();
    let log = log.context("cannot tell where we are")?;
    let dir = std::path::absolute(&args.dir).context("cannot tell where we are")?;
    let threads = args.threads.to_string();
    let mut arguments: Vec<OsString> = vec!["--store".into(), store_dir.into(), "mount".into()];
    arguments.extend(["--hold", "--background", "--successor", "--threads"].map(OsString::from));
    arguments.push(threads.into());
    arguments.extend(args.allow_other.then(|| "--allow-other".into()));
    if let Some(log) = &log {
        arguments.extend(["--log".into(), log.into()]);
    }
    arguments.extend(["--".into(), dir.into()]);
    Ok(Successor { arguments, log })
}
