//! `dormouse rm`: removes snapshots.

use std::io::Write;

use anyhow::Result;
use dormouse_store::error::ErrorKind;
use dormouse_store::name::SnapRef;
use serde::Serialize;

use crate::app::App;
use crate::cli::RmArgs;

#[derive(Serialize)]
struct RmObject {
    removed: Vec<String>,
}

pub(super) fn run(app: &mut App, args: &RmArgs) -> Result<()> {
    let store = app.open()?;
    // All are looked up first: `rm vm vm@3` with vm@3 as the newest must not take vm@2 along, and
    // a wrong name among them removes nothing.
    let mut wanted: Vec<SnapRef> = Vec::new();
    for snap in &args.snaps {
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
    let mut removed = Vec::new();
    for snap in &wanted {
        store.remove(snap)?;
        let name = snap.to_string();
        if !app.json {
            writeln!(app.out, "{name}")?;
        }
        removed.push(name);
    }
    if app.json {
        app.out.json(&RmObject { removed })?;
    } else {
        app.out.flush()?;
        app.say("removed; `dormouse gc` frees the space");
    }
    Ok(())
}
