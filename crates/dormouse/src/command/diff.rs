//! `dormouse diff`: what changed between two snapshots.

use std::io::Write;

use anyhow::Result;
use dormouse_store::usage::ImageDiff;
use serde::Serialize;

use crate::app::App;
use crate::cli::DiffArgs;
use crate::output::size::human;
use crate::output::table::{Column, Table};

/// Regions of an image that are printed without `--regions`.
const REGIONS_SHOWN: usize = 8;

#[derive(Serialize)]
struct DiffObject<'a> {
    old: String,
    new: String,
    images: &'a [ImageDiff],
}

pub(super) fn run(app: &mut App, args: &DiffArgs) -> Result<()> {
    let store = app.open()?;
    let old = store.snapshot(&args.old)?;
    let new = store.snapshot(&args.new)?;
    let work = app.work()?;
    let images = store.diff(&old, &new, work.job())?;
    drop(work);
    if app.json {
        let (old, new) = (old.manifest().display_name(), new.manifest().display_name());
        app.out.json(&DiffObject { old, new, images: &images })?;
        return Ok(());
    }
    let columns = [
        Column::Text("IMAGE"),
        Column::Number("OLD SIZE"),
        Column::Number("NEW SIZE"),
        Column::Number("CHANGED"),
        Column::Number("NOW ZERO"),
        Column::Number("WAS ZERO"),
        Column::Number("REGIONS"),
    ];
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), human);
    let mut table = Table::new(app.palette, &columns);
    for diff in &images {
        table.row([
            diff.image.to_string(),
            size(diff.old_size_bytes),
            size(diff.new_size_bytes),
            human(diff.changed_bytes),
            human(diff.now_zero_bytes),
            human(diff.was_zero_bytes),
            diff.regions.len().to_string(),
        ]);
    }
    app.out.write_all(table.render().as_bytes())?;
    for diff in images.iter().filter(|diff| !diff.regions.is_empty()) {
        print_regions(app, diff, args.regions)?;
    }
    Ok(())
}

fn print_regions(app: &mut App, diff: &ImageDiff, all: bool) -> Result<()> {
    writeln!(app.out, "\n{}", app.palette.bold(&diff.image.to_string()))?;
    let shown = if all { diff.regions.len() } else { REGIONS_SHOWN };
    for &(offset, length) in diff.regions.iter().take(shown) {
        writeln!(app.out, "  {offset:#014x} + {}", human(length))?;
    }
    let left_out = diff.regions.len().saturating_sub(shown);
    if left_out > 0 {
        writeln!(app.out, "  … and {left_out} more (--regions prints all)")?;
    }
    Ok(())
}
