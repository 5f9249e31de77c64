//! All five pauses of the testkit's guest: what is stored, beside E2B's ways and `qemu-img`.

use std::fs;

use anyhow::{Context, Result};
use comfy_table::Table;
use dormouse_store::commit::CommitReport;
use dormouse_store::manifest::Figures;
use dormouse_store::name::ImageName;
use dormouse_testkit::baseline::{e2b_diff, qemu_qcow2};

use crate::report::{Bar, Report, Row, Value};
use crate::scratch::{FIVE, Scratch, files_below, pauses};

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let commits = scratch.five_pauses()?;
    let memory = commits.iter().map(memory_figures).collect::<Result<Vec<_>>>()?;
    print_pauses(commits, &memory);

    let (mut best, mut plain, mut qcow2) = (0, 0, 0);
    let mut parent: Option<Vec<u8>> = None;
    let target = scratch.path("qcow2");
    for files in pauses()? {
        let image = fs::read(&files.memory)?;
        if let Some(parent) = &parent {
            best += e2b_diff::best_bytes(parent, &image)?;
            plain += e2b_diff::default_bytes(parent, &image);
        }
        parent = Some(image);
        for image in [&files.memory, &files.disk, &files.state] {
            qcow2 += qemu_qcow2::compress(image, &target)?;
            fs::remove_file(&target)?;
        }
    }
    let ours: u64 =
        memory[1..].iter().map(|figures| figures.stored_bytes + figures.map_bytes).sum();
    let nonzero = memory[1..].iter().map(|figures| figures.nonzero_bytes).sum();
    let what = "memory stored by pauses 2 to 5";
    let bytes = |bytes: u64| Value::Bytes(bytes as f64);
    report.row(
        Row::new(what, bytes(ours))
            .beside("E2B's best mode", bytes(best))
            .bar(Bar::RatioAtMost(0.2)),
    );
    report.row(Row::new(what, bytes(ours)).beside("E2B's defaults", bytes(plain)));
    report.row(Row::new(what, bytes(ours)).beside("wrenn", bytes(nonzero)));
    report.note("the others' headers are not counted, our maps and digests are");

    let mut packs = 0;
    for file in files_below(&scratch.path(FIVE).join("packs"))? {
        packs += fs::metadata(file)?.len();
    }
    report.row(
        Row::new("everything stored, five pauses", bytes(packs))
            .beside("qemu-img, zstd, per image", bytes(qcow2))
            .bar(Bar::RatioAtMost(0.25)),
    );
    let idle = commits.last().context("no idle pause")?.written_bytes;
    report.row(
        Row::new("idle pause, everything written", bytes(idle)).bar(Bar::AtMost((1 << 20) as f64)),
    );
    Ok(())
}

fn memory_figures(commit: &CommitReport) -> Result<Figures> {
    let memory = commit.images.iter().find(|(image, _)| *image == ImageName::Memory);
    Ok(memory.context("a pause without memory")?.1)
}

/// What is in the pauses, as the store saw it.
fn print_pauses(commits: &[CommitReport], memory: &[Figures]) {
    let mut table = Table::new();
    table.set_header([
        "pause",
        "RAM non-zero",
        "changed",
        "on the disk",
        "elsewhere",
        "itself",
        "new",
        "stored",
        "map",
        "all images written",
        "seconds",
    ]);
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    for (number, (commit, figures)) in commits.iter().zip(memory).enumerate() {
        let found = figures.elsewhere_bytes + figures.self_bytes;
        let own = figures.self_bytes.saturating_sub(figures.from_disks_bytes);
        table.add_row([
            (number + 1).to_string(),
            mib(figures.nonzero_bytes),
            mib(figures.changed_bytes),
            mib(figures.from_disks_bytes),
            mib(found.saturating_sub(figures.from_disks_bytes + own)),
            mib(own),
            mib(figures.new_bytes),
            mib(figures.stored_bytes),
            mib(figures.map_bytes),
            mib(commit.written_bytes),
            format!("{:.2}", commit.seconds.total),
        ]);
    }
    println!("{table}");
}
