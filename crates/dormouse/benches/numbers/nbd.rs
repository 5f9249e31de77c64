//! A live disk over NBD beside `qemu-nbd` on a raw file, both written full and in page cache.

use anyhow::Result;

use crate::load::{Load, Pattern, Until};
use crate::peers::{Server, check_programs, dormouse};
use crate::report::{Bar, Report, Row};
use crate::rounds::{FEW_ROUNDS, pairs};
use crate::scratch::Scratch;

const DISK_BYTES: u64 = 512 << 20;

/// A round of one contender; fio takes twice as long to start.
const ROUND_MS: u64 = 250;

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    check_programs()?;
    scratch.store("nbd")?;
    let store = scratch.path("nbd");
    dormouse(&store, &["disk", "create", "vm", "--size", &DISK_BYTES.to_string()])?;
    let raw = scratch.path("raw");
    std::fs::File::create(&raw)?.set_len(DISK_BYTES)?;
    {
        let ours = Server::dormouse(&store, &["vm"])?;
        let qemu = Server::qemu_nbd(&raw, "raw")?;
        let fill = Load {
            pattern: Pattern::SequentialWrite,
            depth: 4,
            connections: 1,
            area_bytes: DISK_BYTES,
            until: Until::Bytes(DISK_BYTES),
        };
        fill.run(&ours)?;
        fill.run(&qemu)?;
        report.note("dirty blocks beside a raw file, both full and in page cache");
        for load in loads(&Pattern::ALL, DISK_BYTES) {
            compare(&load, &ours, &qemu, "qemu-nbd, raw", report)?;
        }
    }
    Ok(std::fs::remove_file(raw)?)
}

/// A pattern at all depths and numbers of connections.
pub(crate) fn loads(patterns: &[Pattern], area_bytes: u64) -> Vec<Load> {
    let mut loads = Vec::new();
    for &pattern in patterns {
        for (depth, connections) in [(1, 1), (16, 1), (1, 4), (16, 4)] {
            let until = Until::Milliseconds(ROUND_MS);
            loads.push(Load { pattern, depth, connections, area_bytes, until });
        }
    }
    loads
}

/// A row of a load on both servers, which must not be slower on ours.
pub(crate) fn compare(
    load: &Load,
    ours: &Server,
    other: &Server,
    other_is: &str,
    report: &mut Report,
) -> Result<()> {
    // Whether client and server share a core decides how fast one request at a time is, and the
    // scheduler throws that die anew in each run.
    let is_single = load.depth * load.connections == 1;
    let rounds = if is_single { 9 } else { FEW_ROUNDS };
    let pair = pairs(rounds, || load.run(ours), || load.run(other))?;
    report.row(
        Row::new(load.title(), load.value(pair.ours))
            .paired(other_is, load.value(pair.other), pair.ratio)
            .bar(Bar::RatioAtLeast(1.0)),
    );
    Ok(())
}
