//! `dormouse punch`: gives the zero blocks of memory files back to the file system.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Error, Result};
use dormouse_store::progress::Progress;
use dormouse_store::punch::{
    FolderFiles, HolesMean, PunchMode, PunchOptions, PunchOutcome, PunchReport, PunchWatch,
    punch_paths,
};
use serde::Serialize;

use crate::app::App;
use crate::cli::{Holes, PunchArgs};
use crate::exit::Kind;
use crate::output::size::human;
use crate::output::table::{Column, Table};
use crate::progress::Display;

#[derive(Serialize)]
struct PunchObject {
    dry_run: bool,
    before_bytes: u64,
    after_bytes: u64,
    reclaimed_bytes: u64,
    failed: u64,
    files: Vec<FileRow>,
}

#[derive(Serialize)]
struct FileRow {
    path: String,
    #[serde(flatten)]
    result: FileResult,
}

#[derive(Serialize)]
#[serde(untagged)]
enum FileResult {
    Done {
        before_bytes: u64,
        after_bytes: u64,
        reclaimed_bytes: u64,
        zero_bytes: u64,
        punched_bytes: u64,
        runs: u64,
    },
    Failed {
        error: FileError,
    },
}

#[derive(Serialize)]
struct FileError {
    kind: &'static str,
    message: String,
}

pub(super) fn run(app: &mut App, args: &PunchArgs) -> Result<ExitCode> {
    let options = PunchOptions {
        mode: if args.dry_run { PunchMode::DryRun } else { PunchMode::Punch },
        holes: match args.holes {
            Some(Holes::Zero) => HolesMean::Zero,
            None => HolesMean::Unknown,
        },
        folder_files: if args.all { FolderFiles::All } else { FolderFiles::Memory },
        min_run_bytes: args.min_run,
        threads: args.threads,
    };
    let work = app.work()?;
    work.begin("punch", None);
    let outcomes = punch_paths(&args.paths, &options, &work);
    drop(work);
    show(app, outcomes, args.dry_run)
}

fn show(app: &mut App, outcomes: Vec<PunchOutcome>, dry_run: bool) -> Result<ExitCode> {
    let columns = [
        Column::Text("FILE"),
        Column::Number("BEFORE"),
        Column::Number("AFTER"),
        Column::Number(if dry_run { "WOULD FREE" } else { "FREED" }),
    ];
    let mut table = Table::new(app.palette, &columns);
    let mut sum = PunchReport::default();
    let mut rows = Vec::new();
    let mut failures = Vec::new();
    for PunchOutcome { path, result } in outcomes {
        let path = path.display().to_string();
        let result = match result {
            Ok(report) => {
                sum.before_bytes += report.before_bytes;
                sum.after_bytes += report.after_bytes;
                sum.reclaimed_bytes += report.reclaimed_bytes;
                table.row(cells(path.clone(), &report));
                done(&report)
            }
            Err(error) => {
                let error = Error::new(error);
                let (kind, message) = (Kind::of(&error), format!("{error:#}"));
                failures.push((kind, message.clone()));
                FileResult::Failed { error: FileError { kind: kind.word(), message } }
            }
        };
        rows.push(FileRow { path, result });
    }
    let code = exit_kind(&failures).map_or(ExitCode::SUCCESS, |kind| ExitCode::from(kind.code()));
    if app.json {
        app.out.json(&PunchObject {
            dry_run,
            before_bytes: sum.before_bytes,
            after_bytes: sum.after_bytes,
            reclaimed_bytes: sum.reclaimed_bytes,
            failed: failures.len() as u64,
            files: rows,
        })?;
        return Ok(code);
    }
    let punched = rows.len() - failures.len();
    if punched > 1 {
        table.row(cells("all".to_owned(), &sum));
    }
    if punched > 0 {
        app.out.write_all(table.render().as_bytes())?;
        app.out.flush()?;
    } else if failures.is_empty() {
        app.say("no file of the wanted name; --all takes all files of a folder");
    }
    for (_, message) in failures {
        app.warn(&message);
    }
    Ok(code)
}

/// The kind that all failures have in common, if there are any.
fn exit_kind(failures: &[(Kind, String)]) -> Option<Kind> {
    let (first, _) = failures.first()?;
    let is_cancelled = failures.iter().any(|(kind, _)| *kind == Kind::Cancelled);
    let is_common = failures.iter().all(|(kind, _)| kind == first);
    Some(match (is_cancelled, is_common) {
        (true, _) => Kind::Cancelled,
        (_, true) => *first,
        _ => Kind::Other,
    })
}

fn cells(path: String, report: &PunchReport) -> [String; 4] {
    [path, human(report.before_bytes), human(report.after_bytes), human(report.reclaimed_bytes)]
}

fn done(report: &PunchReport) -> FileResult {
    FileResult::Done {
        before_bytes: report.before_bytes,
        after_bytes: report.after_bytes,
        reclaimed_bytes: report.reclaimed_bytes,
        zero_bytes: report.zero_bytes,
        punched_bytes: report.punched_bytes,
        runs: report.runs,
    }
}

impl PunchWatch for Display {
    fn began(&self, _path: &Path, len_bytes: u64) {
        self.expect_more(len_bytes);
    }

    fn advanced(&self, _path: &Path, bytes: u64) {
        self.advance(bytes);
    }

    fn is_cancelled(&self) -> bool {
        Display::is_cancelled(self)
    }
}
