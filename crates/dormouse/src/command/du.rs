//! `dormouse du`: who uses how much.

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use dormouse_store::disk_usage::disk_usage;
use dormouse_store::name::SnapRef;
use dormouse_store::usage::{SnapshotUsage, Usage};
use serde::Serialize;

use crate::app::App;
use crate::cli::{DuArgs, DuTarget};
use crate::exit::{Fault, Kind};
use crate::output::size::human;
use crate::output::table::{Column, Table};

#[derive(Serialize)]
struct PathObject {
    path: String,
    allocated_bytes: u64,
    apparent_bytes: u64,
    files: u64,
}

pub(super) fn run(app: &mut App, args: &DuArgs) -> Result<()> {
    match &args.target {
        Some(DuTarget::Path(path)) => path_usage(app, path),
        Some(DuTarget::Snap(snap)) => snapshot_usage(app, snap),
        None => store_usage(app),
    }
}

fn path_usage(app: &mut App, path: &Path) -> Result<()> {
    let usage = disk_usage(path)?;
    if app.json {
        app.out.json(&PathObject {
            path: path.to_string_lossy().into_owned(),
            allocated_bytes: usage.allocated_bytes,
            apparent_bytes: usage.apparent_bytes,
            files: usage.files,
        })?;
        return Ok(());
    }
    let columns = [
        Column::Text("PATH"),
        Column::Number("FILES"),
        Column::Number("LENGTH"),
        Column::Number("ON DISK"),
    ];
    let mut table = Table::new(app.palette, &columns);
    table.row([
        path.display().to_string(),
        usage.files.to_string(),
        human(usage.apparent_bytes),
        human(usage.allocated_bytes),
    ]);
    app.out.write_all(table.render().as_bytes())?;
    Ok(())
}

fn usage(app: &App) -> Result<Usage> {
    let store = app.open()?;
    let work = app.work()?;
    Ok(store.usage(work.job())?)
}

fn snapshot_usage(app: &mut App, snap: &SnapRef) -> Result<()> {
    let wanted = app.open()?.manifest(snap)?.display_name();
    let usage = usage(app)?;
    let row = usage.snapshots.iter().find(|row| row.snapshot == wanted).ok_or_else(|| {
        Fault::new(Kind::NotFound, format!("{wanted} was removed while it was measured"))
    })?;
    if app.json {
        app.out.json(row)?;
    } else {
        print_snapshots(app, std::slice::from_ref(row))?;
    }
    Ok(())
}

fn store_usage(app: &mut App) -> Result<()> {
    let usage = usage(app)?;
    if app.json {
        app.out.json(&usage)?;
        return Ok(());
    }
    print_snapshots(app, &usage.snapshots)?;
    let columns = [Column::Text("STORE"), Column::Number("BYTES")];
    let mut table = Table::new(app.palette, &columns);
    for (what, bytes) in [
        (format!("{} pack files", usage.pack_files), usage.pack_bytes),
        ("index".to_owned(), usage.index_bytes),
        ("used by snapshots".to_owned(), usage.live_bytes),
        ("reclaimable".to_owned(), usage.reclaimable_bytes),
    ] {
        table.row([what, human(bytes)]);
    }
    writeln!(app.out, "\n{}", table.render().trim_end())?;
    app.out.flush()?;
    for snapshot in &usage.damaged {
        app.warn(&format!(
            "{snapshot} cannot be read whole, so nobody knows what is reclaimable; `dormouse verify` \
             tells more"
        ));
    }
    Ok(())
}

fn print_snapshots(app: &mut App, rows: &[SnapshotUsage]) -> Result<()> {
    let columns = [
        Column::Text("SNAPSHOT"),
        Column::Number("RAW"),
        Column::Number("UNIQUE"),
        Column::Number("SHARED"),
    ];
    let mut table = Table::new(app.palette, &columns);
    for row in rows {
        table.row([
            row.snapshot.clone(),
            human(row.raw_bytes),
            human(row.unique_bytes),
            human(row.shared_bytes),
        ]);
    }
    app.out.write_all(table.render().as_bytes())?;
    Ok(())
}
