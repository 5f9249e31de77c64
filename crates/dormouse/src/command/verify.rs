//! `dormouse verify`: checks the store, and mends what can be mended.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use dormouse_store::verify::{Problem, VerifyOptions, VerifyReport};
use serde::Serialize;

use crate::app::App;
use crate::cli::VerifyArgs;
use crate::exit::Kind;
use crate::output::size::human;

#[derive(Serialize)]
struct VerifyObject<'a> {
    sound: bool,
    #[serde(flatten)]
    report: &'a VerifyReport,
}

pub(super) fn run(app: &mut App, args: VerifyArgs) -> Result<ExitCode> {
    let store = app.open()?;
    let work = app.work()?;
    let options = VerifyOptions { snap: args.snap, deep: args.deep, repair: args.repair };
    let report = store.verify(&options, work.job())?;
    drop(work);
    let left = report.problems.iter().filter(|problem| !problem.repaired).count();
    if app.json {
        app.out.json(&VerifyObject { sound: left == 0, report: &report })?;
    } else {
        for problem in &report.problems {
            print_problem(app, problem)?;
        }
        app.out.flush()?;
        report.notes.iter().for_each(|note| app.say(&format!("note: {note}")));
        app.say(&summary(&report, left, &options));
    }
    Ok(if left == 0 { ExitCode::SUCCESS } else { ExitCode::from(Kind::Corrupt.code()) })
}

fn print_problem(app: &mut App, problem: &Problem) -> Result<()> {
    let fate = if problem.repaired { "mended" } else { "DAMAGED" };
    writeln!(app.out, "{} {}: {}", app.palette.bold(fate), problem.path, problem.what)?;
    for damage in &problem.touches {
        writeln!(
            app.out,
            "  {}:{} at {:#x}, {}",
            damage.snapshot,
            damage.image,
            damage.offset,
            human(damage.length)
        )?;
    }
    Ok(())
}

fn summary(report: &VerifyReport, left: usize, options: &VerifyOptions) -> String {
    let mut text = format!(
        "checked {} snapshots and {} packs ({} frames decoded, {} read): ",
        report.snapshots,
        report.packs,
        report.frames,
        human(report.read_bytes)
    );
    let mended = report.problems.len() - left;
    if report.problems.is_empty() {
        text.push_str("all is sound");
    } else {
        text.push_str(&format!("{left} problems, {mended} mended"));
    }
    if left > 0 && !options.repair {
        text.push_str("; --repair mends what it can");
    }
    text
}
