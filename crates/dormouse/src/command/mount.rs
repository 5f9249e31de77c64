//! `dormouse mount`: the store and its live VMs as files.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use dormouse_serve::fuse::{Mount, MountOptions, Tree, Unmounted, clear_stale};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::app::App;
use crate::background::{Side, split};
use crate::cli::MountArgs;
use crate::mount::StoreTree;

pub(super) fn run(app: &mut App, args: &MountArgs) -> Result<ExitCode> {
    let store = app.open()?;
    let ready = match split(args.background)? {
        Side::Started(code) => return Ok(code),
        Side::Here(ready) => ready,
    };
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("handle signals")?;
    if clear_stale(&args.dir)? {
        app.warn(&format!("{} was left behind by a crash; unmounted it", args.dir.display()));
    }
    // A relative one would depend on where we are, and it must not lie below the mount itself.
    let store_dir = std::path::absolute(&app.store_dir).context("find the store")?;
    let tree = Arc::new(StoreTree::new(store, &store_dir));
    let options = MountOptions {
        threads: args.threads.get(),
        read_ahead_threads: thread::available_parallelism().map_or(1, usize::from),
        allow_other: args.allow_other,
    };
    let mount = Arc::new(Mount::new(Arc::clone(&tree) as Arc<dyn Tree>, &args.dir, &options)?);
    if app.json {
        app.out.json(&json!({ "mounted": mount.place(), "pid": std::process::id() }))?;
    } else {
        writeln!(app.out, "{}", mount.place().display())?;
    }
    app.out.flush()?;
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
        if is_detached {
            app.warn("ending with open files, which fail from now on");
            tree.flush()?;
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
    Ok(ExitCode::SUCCESS)
}
