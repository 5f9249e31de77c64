//! `dormouse import`, `dormouse detect` and `dormouse have`: other people's snapshots, taken in.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use dormouse_formats::carry::ORIGIN_LABEL;
use dormouse_formats::detect;
use dormouse_formats::format::Format;
use dormouse_formats::import::{ImportReport, ImportRequest, LookOptions, import};
use dormouse_store::commit::CommitSeconds;
use dormouse_store::manifest::Figures;
use serde::Serialize;

use crate::app::App;
use crate::cli::formats::{DetectArgs, ImportArgs, LookArgs};
use crate::exit::{Fault, Kind, causes};
use crate::output::size::human;

#[derive(Serialize)]
struct ImportObject {
    format: &'static str,
    format_version: String,
    snapshots: Vec<SnapshotRow>,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct SnapshotRow {
    snapshot: String,
    source: String,
    figures: Figures,
    written_bytes: u64,
    verified_bytes: Option<u64>,
    seconds: CommitSeconds,
}

#[derive(Serialize)]
struct DetectObject {
    path: String,
    format: &'static str,
    format_version: Option<String>,
    facts: Vec<String>,
    problem: Option<String>,
}

#[derive(Serialize)]
struct HaveObject {
    uuids: Vec<String>,
}

pub(super) fn run(app: &mut App, args: ImportArgs) -> Result<()> {
    let options = look_options(&args.look);
    let is_pipe = args.path.as_os_str() == "-";
    let format = match args.format.0 {
        Some(format) => format,
        None => detect::guess(&args.path, &options)?,
    };
    if is_pipe && format != Format::Carry {
        return Err(Fault::usage(format!(
            "{format} is not read from standard input: its parts are found by place; give a path"
        ))
        .into());
    }
    if is_pipe && args.verify {
        return Err(Fault::usage(
            "standard input is read once, so nothing is left for --verify; its blocks and its end \
             are checked as they come",
        )
        .into());
    }
    let store = app.open()?;
    let found = detect::look(format, &args.path, &options)?;
    let request = ImportRequest {
        name: args.name,
        parent: args.parent.0,
        codec: args.codec,
        verify: args.verify,
    };
    let work = app.work()?;
    let report = import(&store, found, &request, work.job())?;
    drop(work);
    if app.json {
        app.out.json(&object(report))?;
        return Ok(());
    }
    for imported in &report.snapshots {
        writeln!(app.out, "{}", imported.commit.manifest.display_name())?;
    }
    app.out.flush()?;
    report.notes.iter().for_each(|note| app.say(note));
    app.say(&summary(&report));
    Ok(())
}

fn summary(report: &ImportReport) -> String {
    let mut figures = Figures::default();
    let (mut written, mut seconds, mut verified) = (0, 0.0, None);
    for imported in &report.snapshots {
        figures.add(&imported.commit.manifest.figures);
        written += imported.commit.written_bytes;
        seconds += imported.commit.seconds.total;
        verified = verified.or(Some(0)).zip(imported.verified_bytes).map(|(sum, one)| sum + one);
    }
    let verified = match verified {
        Some(bytes) => format!(", {} compared with the source", human(bytes)),
        None => String::new(),
    };
    format!(
        "{} {}: {} of {} written in {seconds:.1} s, {} as before, {} found elsewhere{verified}",
        report.format,
        report.version,
        human(written),
        human(figures.raw_bytes),
        human(figures.unchanged_bytes),
        human(figures.elsewhere_bytes + figures.self_bytes),
    )
}

fn object(report: ImportReport) -> ImportObject {
    ImportObject {
        format: report.format.word(),
        format_version: report.version,
        snapshots: report
            .snapshots
            .into_iter()
            .map(|imported| SnapshotRow {
                snapshot: imported.commit.manifest.display_name(),
                source: imported.title,
                figures: imported.commit.manifest.figures,
                written_bytes: imported.commit.written_bytes,
                verified_bytes: imported.verified_bytes,
                seconds: imported.commit.seconds,
            })
            .collect(),
        notes: report.notes,
    }
}

fn look_options(args: &LookArgs) -> LookOptions {
    LookOptions {
        builds: args.builds.clone(),
        state: args.state.clone(),
        origin: args.origin.clone(),
        is_diff: args.diff,
        low_memory_bytes: args.low_memory,
        layout: args.layout.clone(),
        vmm_version: args.vmm_version.clone(),
        disk: args.disk.clone(),
    }
}

/// Says what is at a path; the exit code is that of what is wrong with it, if anything is.
pub(super) fn detect(app: &mut App, args: &DetectArgs) -> Result<ExitCode> {
    let found = detect::detect(&args.path, &look_options(&args.look))?;
    let problem = found.problem.map(anyhow::Error::from);
    let code = problem.as_ref().map_or(0, |problem| Kind::of(problem).code());
    let object = DetectObject {
        path: args.path.display().to_string(),
        format: found.format.word(),
        format_version: found.version,
        facts: found.facts,
        problem: problem.as_ref().map(causes),
    };
    if app.json {
        app.out.json(&object)?;
        return Ok(ExitCode::from(code));
    }
    let version = object.format_version.map(|version| format!(", {version}")).unwrap_or_default();
    writeln!(app.out, "{}{version}", object.format)?;
    for fact in &object.facts {
        writeln!(app.out, "  {fact}")?;
    }
    if let Some(problem) = &object.problem {
        writeln!(app.out, "  problem: {problem}")?;
    }
    app.out.flush()?;
    Ok(ExitCode::from(code))
}

/// Prints what a sender of a carry may leave out.
pub(super) fn have(app: &mut App) -> Result<()> {
    let store = app.open()?;
    let uuids: Vec<String> = store
        .list(None)?
        .snapshots
        .iter()
        .map(|manifest| {
            manifest.labels.get(ORIGIN_LABEL).cloned().unwrap_or_else(|| manifest.uuid.to_string())
        })
        .collect();
    if app.json {
        app.out.json(&HaveObject { uuids })?;
        return Ok(());
    }
    for uuid in uuids {
        writeln!(app.out, "{uuid}")?;
    }
    app.out.flush()?;
    Ok(())
}
