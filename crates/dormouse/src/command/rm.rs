//! `dormouse rm`: removes snapshots.

use std::io::Write;

use anyhow::Result;
use dormouse_store::error::ErrorKind;
use dormouse_store::name::SnapRef;
use dormouse_store::store::Store;
use serde::Serialize;

use crate::app::App;
use crate::cli::RmArgs;

#[derive(Serialize)]
struct RmObject {
    removed: Vec<String>,
}

/// Removes snapshots; `on_removed` is told of each.
pub(crate) fn remove(
    store: &Store,
    snaps: &[SnapRef],
    on_removed: &mut dyn FnMut(String) -> Result<()>,
) -> Result<()> {
    // All are looked up first: `rm vm vm@3` with vm@3 as the newest must not take vm@2 along, and
    // a wrong name among them removes nothing.
    let mut wanted: Vec<SnapRef> = Vec::new();
    for snap in snaps {
        let snap = store.resolve(snap)?;
        match store.manifest(&snap) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(error.into()),
            // One that is damaged can be removed, too.
            _ => {}
        }
        if !wanted.contains(&snap) {
            wanted.push(snap);
        }
    }
    for snap in &wanted {
        store.remove(snap)?;
        on_removed(snap.to_string())?;
    }
    Ok(())
}

pub(super) fn run(app: &mut App, args: &RmArgs) -> Result<()> {
    let store = app.open()?;
    let mut removed = Vec::new();
    remove(&store, &args.snaps, &mut |name| {
        if !app.json {
            writeln!(app.out, "{name}")?;
        }
        removed.push(name);
        Ok(())
    })?;
    if app.json {
        app.out.json(&RmObject { removed })?;
    } else {
        app.out.flush()?;
        app.say("removed; `dormouse gc` frees the space");
    }
    Ok(())
}
