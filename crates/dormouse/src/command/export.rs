//! `dormouse export`: an image to a file, or a whole snapshot to a folder.

use std::path::Path;

use anyhow::Result;
use dormouse_store::error::{Error, ErrorKind};
use dormouse_store::name::{ImageRef, SnapRef};
use dormouse_store::reader::{ExportReport, ExportTarget};
use serde::Serialize;

use super::export_as;
use crate::app::App;
use crate::cli::{ExportArgs, ExportWhat};
use crate::exit::{Fault, Kind};
use crate::output::size::human;

#[derive(Serialize)]
struct ExportObject {
    snapshot: String,
    diff_from: Option<String>,
    path: String,
    size_bytes: u64,
    written_bytes: u64,
    images: Vec<ImageRow>,
}

#[derive(Serialize)]
struct ImageRow {
    image: String,
    path: String,
    size_bytes: u64,
    written_bytes: u64,
}

pub(super) fn run(app: &mut App, args: &ExportArgs) -> Result<()> {
    if let Some(format) = &args.other.format {
        return match &args.what {
            ExportWhat::Snapshot(snap) => export_as::run(app, args, snap, format),
            ExportWhat::Image(image) => Err(Fault::usage(format!(
                "--as writes a snapshot: name {}, and a disk with --disk",
                image.snap
            ))
            .into()),
        };
    }
    let object = match &args.what {
        ExportWhat::Image(image) => one_image(app, args, image)?,
        ExportWhat::Snapshot(snap) => whole_snapshot(app, args, snap)?,
    };
    if app.json {
        app.out.json(&object)?;
        return Ok(());
    }
    app.say(&format!(
        "wrote {} of {} to {} ({} of it data)",
        human(object.size_bytes),
        object.snapshot,
        object.path,
        human(object.written_bytes),
    ));
    Ok(())
}

fn one_image(app: &App, args: &ExportArgs, wanted: &ImageRef) -> Result<ExportObject> {
    if args.path.as_os_str() == "-" {
        return Err(Fault::usage(format!(
            "export writes a file; `dormouse cat {wanted}` writes to standard output"
        ))
        .into());
    }
    let store = app.open()?;
    let snapshot = store.snapshot(&wanted.snap)?;
    let image = snapshot.image(&wanted.image)?;
    let target = if args.force { ExportTarget::Replace } else { ExportTarget::New };
    let work = app.work()?;
    let (report, base) = match &args.diff_from {
        None => {
            let report = image.export(&args.path, target, work.job());
            (report.map_err(|error| taken_or(error, &args.path))?, None)
        }
        Some(base) => {
            let base = store.snapshot(base)?;
            let base_image = base.image(&wanted.image)?;
            let report = image.export_diff(&base_image, &args.path, target, work.job());
            let report = report.map_err(|error| taken_or(error, &args.path))?;
            (report, Some(base.manifest().display_name()))
        }
    };
    let row = image_row(wanted.image.to_string(), &args.path, report);
    Ok(object(snapshot.manifest().display_name(), base, &args.path, vec![row]))
}

/// A name that is taken, with what to do about it, or the error as it is.
fn taken_or(error: Error, path: &Path) -> anyhow::Error {
    if error.kind() == ErrorKind::AlreadyExists {
        let message = format!("{} is there already; --force replaces it", path.display());
        Fault::new(Kind::AlreadyExists, message).into()
    } else {
        error.into()
    }
}

fn whole_snapshot(app: &App, args: &ExportArgs, snap: &SnapRef) -> Result<ExportObject> {
    if args.diff_from.is_some() || args.force {
        return Err(Fault::usage(format!(
            "--diff-from and --force are for one image: name it as {snap}:IMAGE"
        ))
        .into());
    }
    let snapshot = app.open()?.snapshot(snap)?;
    let dir = &args.path;
    let work = app.work()?;
    let rows = snapshot
        .export(dir, work.job())?
        .into_iter()
        .map(|(image, report)| {
            let image = image.to_string();
            image_row(image.clone(), &dir.join(&image), report)
        })
        .collect();
    Ok(object(snapshot.manifest().display_name(), None, dir, rows))
}

fn image_row(image: String, path: &Path, report: ExportReport) -> ImageRow {
    ImageRow {
        image,
        path: path.display().to_string(),
        size_bytes: report.size_bytes,
        written_bytes: report.written_bytes,
    }
}

fn object(
    snapshot: String,
    diff_from: Option<String>,
    path: &Path,
    images: Vec<ImageRow>,
) -> ExportObject {
    ExportObject {
        snapshot,
        diff_from,
        path: path.display().to_string(),
        size_bytes: images.iter().map(|row| row.size_bytes).sum(),
        written_bytes: images.iter().map(|row| row.written_bytes).sum(),
        images,
    }
}
