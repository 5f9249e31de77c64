//! `dormouse gc`: deletes what no snapshot needs.

use std::io::Write;

use anyhow::Result;
use dormouse_store::gc::{GcOptions, GcReport};
use serde::Serialize;

use crate::app::App;
use crate::cli::GcArgs;
use crate::live::remove_leftovers;
use crate::output::size::human;

#[derive(Serialize)]
pub(crate) struct GcObject {
    pub(crate) dry_run: bool,
    #[serde(flatten)]
    pub(crate) report: GcReport,
}

pub(super) fn run(app: &mut App, args: &GcArgs) -> Result<()> {
    let store = app.open()?;
    let work = app.work()?;
    if !args.dry_run {
        remove_leftovers(&app.store_dir)?;
    }
    let report = store.gc(&GcOptions { dry_run: args.dry_run }, work.job())?;
    drop(work);
    if app.json {
        app.out.json(&GcObject { dry_run: args.dry_run, report })?;
        return Ok(());
    }
    let deleted = if args.dry_run { "would delete" } else { "deleted" };
    writeln!(
        app.out,
        "{deleted} {} in {} pack files; {} packs stay, with {} of dead blocks",
        human(report.deleted_bytes),
        report.deleted_files,
        report.live_packs,
        human(report.dead_bytes),
    )?;
    writeln!(
        app.out,
        "{} {} leftovers; index runs: {} before, {} after",
        if args.dry_run { "would sweep" } else { "swept" },
        report.swept,
        report.index_runs_before,
        report.index_runs_after,
    )?;
    Ok(())
}
