//! The index of 100 GiB of unique blocks: 26 million made-up entries.

use std::path::Path;

use anyhow::Result;
use dormouse_image::digest::Digest;
use dormouse_image::pack::PackId;
use dormouse_store::disk::{Disk, RealDisk};
use dormouse_store::index::{IndexHit, IndexRun, RunWriter};
use dormouse_store::store::Config;

use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{FEW_ROUNDS, Random, medians, seconds};
use crate::scratch::{Scratch, remove_dir};

const ENTRIES: u64 = 26_000_000;
const QUESTIONS: u64 = 200_000;
const PACKS: u64 = 1000;

/// Entries of each run, as sixteenths of all.
struct Shape {
    title: &'static str,
    runs: &'static [u64],
}

/// After `gc` there is one run; between two collections commits merge what is small.
const SHAPES: [Shape; 2] = [
    Shape { title: "one run, as after gc", runs: &[1024] },
    Shape {
        title: "19 runs, as between two gcs",
        runs: &[768, 40, 40, 40, 40, 40, 24, 8, 8, 4, 2, 2, 1, 1, 1, 1, 1, 1, 2],
    },
];

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let dir = scratch.path("index");
    for shape in SHAPES {
        std::fs::create_dir(&dir)?;
        measure_shape(&dir, &shape, report)?;
        remove_dir(&dir)?;
    }
    Ok(())
}

fn measure_shape(dir: &Path, shape: &Shape, report: &mut Report) -> Result<()> {
    let disk = RealDisk::new(dir);
    for (number, parts) in (0..).zip(shape.runs) {
        write_run(&disk, number, ENTRIES * parts / 1024)?;
    }
    let title = shape.title;
    let count = shape.runs.len() as u64;
    let mut resident = 0;
    let [open] = medians(
        FEW_ROUNDS,
        [&mut || {
            let before = resident_bytes()?;
            let mut runs = Vec::new();
            let time = seconds(|| {
                runs = open_runs(&disk, count)?;
                Ok(())
            })?;
            resident = resident_bytes()?.saturating_sub(before);
            Ok(time)
        }],
    )?;
    report.row(Row::new(format!("opening {title}"), Value::Seconds(open)).bar(Bar::AtMost(0.1)));
    let runs = open_runs(&disk, count)?;
    let held: u64 = runs.iter().map(IndexRun::resident_bytes).sum();
    report.row(
        Row::new(format!("memory held, {title}"), Value::Bytes(held.max(resident) as f64))
            .bar(Bar::AtMost((256 << 20) as f64)),
    );
    let (mut absent, mut present) = (Random::new(5), Random::new(6));
    let [miss, hit] = medians(
        FEW_ROUNDS,
        [
            &mut || {
                seconds(|| (0..QUESTIONS).try_for_each(|_| ask(&runs, absent.next()).map(drop)))
            },
            &mut || {
                seconds(|| {
                    for _ in 0..QUESTIONS {
                        let run = usize::try_from(present.below(count))?;
                        let entry = present.below(runs[run].entries());
                        let found = ask(&runs, prefix(run as u64, entry, runs[run].entries()))?;
                        anyhow::ensure!(found > 0, "an entry was not found");
                    }
                    Ok(())
                })
            },
        ],
    )?;
    let each = |time: f64| Value::Seconds(time / QUESTIONS as f64);
    report.row(Row::new(format!("a miss, {title}"), each(miss)).bar(Bar::AtMost(2e-6)));
    report.row(Row::new(format!("a hit, {title}"), each(hit)).bar(Bar::AtMost(10e-6)));
    Ok(())
}

/// As a commit asks: every run, the newest first.
fn ask(runs: &[IndexRun], prefix: u64) -> Result<u64> {
    let mut digest = Digest::default();
    digest.0[..8].copy_from_slice(&prefix.to_be_bytes());
    let mut found = 0;
    for run in runs.iter().rev() {
        run.lookup(&digest, &mut |_| found += 1)?;
    }
    Ok(found)
}

fn open_runs(disk: &dyn Disk, count: u64) -> Result<Vec<IndexRun>> {
    let mut room = Config::STANDARD.index_filter_bytes;
    let mut runs = Vec::new();
    for number in 0..count {
        let run = IndexRun::open(disk, &path(number), room)?;
        room = room.saturating_sub(run.resident_bytes());
        runs.push(run);
    }
    Ok(runs)
}

fn write_run(disk: &dyn Disk, number: u64, entries: u64) -> Result<()> {
    let mut writer = RunWriter::create(disk, &path(number), entries, &[])?;
    for entry in 0..entries {
        let mut id = [u8::try_from(number % 256)?; 16];
        id[..8].copy_from_slice(&(entry % PACKS + 1).to_le_bytes());
        let slot = u32::try_from(entry / PACKS)?;
        writer.push(prefix(number, entry, entries), IndexHit { pack: PackId(id), slot })?;
    }
    writer.finish()?;
    Ok(())
}

/// The prefix of an entry: spread evenly as digests are, and ascending.
fn prefix(run: u64, entry: u64, entries: u64) -> u64 {
    let step = u64::MAX / entries;
    entry * step + Random::new(run << 40 | entry).below(step)
}

fn path(number: u64) -> String {
    format!("{number:04}.run")
}

fn resident_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    let kib: u64 = line.split_whitespace().nth(1).unwrap_or("0").parse()?;
    Ok(kib << 10)
}
