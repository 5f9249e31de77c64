//! `dormouse ls`: lists snapshots.

use std::io::Write;

use anyhow::Result;
use dormouse_store::manifest::Manifest;
use dormouse_store::name::Name;
use dormouse_store::store::Store;
use serde::Serialize;

use crate::app::App;
use crate::cli::LsArgs;
use crate::exit::{Fault, Kind};
use crate::output::size::human;
use crate::output::table::{Column, Table};
use crate::output::time::utc;

/// How labels begin that we give snapshots ourselves, which tell people nothing.
const OUR_LABELS: &str = "dormouse.";

#[derive(Serialize)]
pub(crate) struct LsObject {
    snapshots: Vec<LsRow>,
    damaged: Vec<DamagedRow>,
}

#[derive(Serialize)]
struct LsRow {
    snapshot: String,
    uuid: String,
    name: String,
    number: u64,
    created: String,
    parent: Option<String>,
    images: Vec<String>,
    raw_bytes: u64,
    stored_bytes: u64,
    labels: std::collections::BTreeMap<String, String>,
}

#[derive(Serialize)]
struct DamagedRow {
    snapshot: String,
    problem: String,
}

/// All snapshots, or those of a name, of which there must be one; and their manifests.
pub(crate) fn listing(store: &Store, name: Option<&Name>) -> Result<(LsObject, Vec<Manifest>)> {
    let listing = store.list(name)?;
    if let Some(name) = name
        && listing.snapshots.is_empty()
        && listing.damaged.is_empty()
    {
        return Err(Fault::new(Kind::NotFound, format!("there is no snapshot of {name}")).into());
    }
    let snapshots = listing.snapshots.iter().map(row).collect();
    let damaged = listing
        .damaged
        .iter()
        .map(|(snapshot, error)| DamagedRow {
            snapshot: snapshot.clone(),
            problem: error.to_string(),
        })
        .collect();
    Ok((LsObject { snapshots, damaged }, listing.snapshots))
}

pub(super) fn run(app: &mut App, args: &LsArgs) -> Result<()> {
    let store = app.open()?;
    let (LsObject { snapshots: rows, damaged }, manifests) = listing(&store, args.name.as_ref())?;
    if app.json {
        app.out.json(&LsObject { snapshots: rows, damaged })?;
        return Ok(());
    }
    let columns = [
        Column::Text("SNAPSHOT"),
        Column::Text("CREATED (UTC)"),
        Column::Text("PARENT"),
        Column::Number("IMAGES"),
        Column::Number("RAW"),
        Column::Number("STORED"),
        Column::Text("LABELS"),
    ];
    let mut table = Table::new(app.palette, &columns);
    for (row, manifest) in rows.into_iter().zip(&manifests) {
        let theirs = row.labels.iter().filter(|(key, _)| !key.starts_with(OUR_LABELS));
        let labels: Vec<String> = theirs.map(|(key, value)| format!("{key}={value:?}")).collect();
        table.row([
            row.snapshot,
            utc(manifest.created),
            row.parent.unwrap_or_else(|| "-".to_owned()),
            row.images.len().to_string(),
            human(row.raw_bytes),
            human(row.stored_bytes),
            labels.join(" "),
        ]);
    }
    app.out.write_all(table.render().as_bytes())?;
    for row in damaged {
        app.warn(&format!("{}: {}", row.snapshot, row.problem));
    }
    Ok(())
}

fn row(manifest: &Manifest) -> LsRow {
    let parent = manifest.parent.as_ref();
    LsRow {
        snapshot: manifest.display_name(),
        uuid: manifest.uuid.to_string(),
        name: manifest.name.to_string(),
        number: manifest.number,
        created: manifest.created.to_string(),
        parent: parent.map(|parent| format!("{}@{}", parent.name, parent.number)),
        images: manifest.images.iter().map(|entry| entry.image.to_string()).collect(),
        raw_bytes: manifest.images.iter().map(|entry| entry.size_bytes).sum(),
        stored_bytes: manifest.figures.stored_bytes,
        labels: manifest.labels.clone(),
    }
}
