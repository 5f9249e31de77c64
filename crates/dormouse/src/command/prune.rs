//! `dormouse prune`: removes the snapshots that no rule keeps.

use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use crate::app::App;
use crate::cli::PruneArgs;
use crate::output::table::{Column, Table};

#[derive(Serialize)]
struct PruneObject {
    dry_run: bool,
    kept: Vec<KeptRow>,
    removed: Vec<String>,
}

#[derive(Serialize)]
struct KeptRow {
    snapshot: String,
    rules: Vec<String>,
}

pub(super) fn run(app: &mut App, args: &PruneArgs) -> Result<()> {
    let report = app.open()?.prune(&args.name, &args.keep, args.dry_run)?;
    let (kept, removed) = (report.kept.len(), report.removed.len());
    if app.json {
        let rows = report.kept.into_iter().map(|(snapshot, rules)| KeptRow { snapshot, rules });
        let object =
            PruneObject { dry_run: args.dry_run, kept: rows.collect(), removed: report.removed };
        app.out.json(&object)?;
        return Ok(());
    }
    let columns = [Column::Text("SNAPSHOT"), Column::Text("FATE"), Column::Text("BECAUSE OF")];
    let mut table = Table::new(app.palette, &columns);
    for snapshot in report.removed {
        let fate = if args.dry_run { "would go" } else { "removed" };
        table.row([snapshot, fate.to_owned(), String::new()]);
    }
    for (snapshot, rules) in report.kept {
        table.row([snapshot, "kept".to_owned(), rules.join(", ")]);
    }
    app.out.write_all(table.render().as_bytes())?;
    app.out.flush()?;
    app.say(&if args.dry_run {
        format!("{removed} would go, {kept} would stay; nothing was changed")
    } else {
        format!("{removed} removed, {kept} kept; `dormouse gc` frees the space")
    });
    Ok(())
}
