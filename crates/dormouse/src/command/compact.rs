//! `dormouse compact`: writes pack files again that are mostly dead, or many and small.

use std::io::Write;

use anyhow::Result;
use dormouse_store::gc::{CompactOptions, CompactReport};
use serde::Serialize;

use crate::app::App;
use crate::cli::CompactArgs;
use crate::output::size::human;

#[derive(Serialize)]
struct CompactObject {
    dry_run: bool,
    #[serde(flatten)]
    report: CompactReport,
}

pub(super) fn run(app: &mut App, args: &CompactArgs) -> Result<()> {
    let standard = CompactOptions::STANDARD;
    let options = CompactOptions {
        dead_ratio: args.dead_percent.map_or(standard.dead_ratio, |part| f64::from(part) / 100.0),
        small_bytes: args.small.unwrap_or(standard.small_bytes),
        bundle_bytes: args.bundle.unwrap_or(standard.bundle_bytes),
        dry_run: args.dry_run,
    };
    let store = app.open()?;
    let work = app.work()?;
    let report = store.compact(&options, work.job())?;
    drop(work);
    if app.json {
        app.out.json(&CompactObject { dry_run: args.dry_run, report })?;
        return Ok(());
    }
    writeln!(
        app.out,
        "{} {} packs: {} files of {} {} {} of {}",
        if args.dry_run { "would rewrite" } else { "rewrote" },
        report.rewritten_packs,
        report.files_before,
        human(report.bytes_before),
        if args.dry_run { "would become about" } else { "became" },
        report.files_after,
        human(report.bytes_after),
    )?;
    Ok(())
}
