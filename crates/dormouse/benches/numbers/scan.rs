//! The zero scan and `punch` on dense files of 512 MiB in page cache.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use dormouse_store::punch::{HolesMean, PunchMode, PunchOptions, punch_file};
use dormouse_testkit::baseline::wrenn_scan;

use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{FEW_ROUNDS, Random, medians, seconds};
use crate::scratch::Scratch;

const FILE_BLOCKS: u64 = 131_072;

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let path = scratch.path("punched");
    for kind in KINDS {
        measure_kind(&path, &kind, report)?;
    }
    Ok(std::fs::remove_file(&path)?)
}

/// One kind of file: so many percent of zero blocks, and so many percent of the file in which
/// blocks are zero or not each for itself instead of in runs of up to 1 MiB.
struct Kind {
    title: &'static str,
    zeros: u64,
    scattered: u64,
}

const KINDS: [Kind; 3] = [
    Kind { title: "40 % zero in runs", zeros: 40, scattered: 0 },
    Kind { title: "40 % zero, a tenth scattered", zeros: 40, scattered: 10 },
    Kind { title: "all zero", zeros: 100, scattered: 0 },
];

fn measure_kind(path: &Path, kind: &Kind, report: &mut Report) -> Result<()> {
    let title = kind.title;
    let file = make_file(path, kind)?;
    let runs = wrenn_scan::zero_runs(&file)?;
    let mut options = PunchOptions::new(HolesMean::Zero);
    options.mode = PunchMode::DryRun;
    let [scan, wrenn] = medians(
        FEW_ROUNDS,
        [&mut || seconds(|| Ok(punch_file(path, &options, &())?)), &mut || {
            seconds(|| Ok(wrenn_scan::zero_runs(&file)?))
        }],
    )?;
    report.row(
        Row::new(format!("zero scan, {title}"), Value::Seconds(scan))
            .beside("wrenn", Value::Seconds(wrenn))
            .bar(Bar::RatioAtMost(0.25)),
    );
    options.mode = PunchMode::Punch;
    let [punch, calls, dig] = medians(
        FEW_ROUNDS,
        [
            &mut || {
                make_file(path, kind)?;
                seconds(|| Ok(punch_file(path, &options, &())?))
            },
            &mut || {
                let file = make_file(path, kind)?;
                seconds(|| punch_runs(&file, &runs))
            },
            &mut || {
                make_file(path, kind)?;
                seconds(|| dig_holes(path))
            },
        ],
    )?;
    report.row(
        Row::new(format!("punch, {title}"), Value::Seconds(punch))
            .beside("scan + the calls alone", Value::Seconds(scan + calls))
            .bar(Bar::RatioAtMost(1.2)),
    );
    report.row(
        Row::new(format!("punch, {title}"), Value::Seconds(punch))
            .beside("fallocate --dig-holes", Value::Seconds(dig))
            .bar(Bar::RatioAtMost(0.25)),
    );
    Ok(())
}

fn punch_runs(file: &File, runs: &[Range<u64>]) -> Result<()> {
    for run in runs {
        dormouse_sys::sparse::punch_hole(file, run.start, run.end - run.start)?;
    }
    Ok(())
}

fn dig_holes(path: &Path) -> Result<()> {
    let status = Command::new("fallocate").arg("--dig-holes").arg(path).status()?;
    ensure!(status.success(), "fallocate failed");
    Ok(())
}

/// Writes the file anew and waits for the disk; it stays in page cache.
fn make_file(path: &Path, kind: &Kind) -> Result<File> {
    let mut random = Random::new(1);
    let _ = std::fs::remove_file(path); // Not there the first time.
    let mut file = File::options().read(true).write(true).create_new(true).open(path)?;
    let mut buf = Vec::with_capacity(1 << 20);
    let (mut left, mut is_zero) = (0, false);
    for index in 0..FILE_BLOCKS {
        if left == 0 {
            is_zero = random.below(100) < kind.zeros;
            left = if index % 1000 < 10 * kind.scattered { 1 } else { 1 + random.below(256) };
        }
        left -= 1;
        if is_zero {
            buf.resize(buf.len() + 4096, 0);
        } else {
            buf.extend_from_slice(&random.block());
        }
        if buf.len() == 1 << 20 {
            file.write_all(&buf)?;
            buf.clear();
        }
    }
    file.sync_all()?;
    Ok(file)
}
