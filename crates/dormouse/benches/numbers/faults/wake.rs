//! A guest that wakes and touches what it touched before, with its trace and without.

use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use dormouse_live::pages::PAGE_BYTES;
use dormouse_serve::uffd::{MemorySource, Pager, VmConfig};

use super::guest::{Guest, Stored};
use super::{PAGES, bulk, cold, decode};
use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{FEW_ROUNDS, Random, pairs, seconds};
use crate::scratch::Scratch;

const STORE: &str = "faults-zstd";

/// What is done with the trace.
#[derive(Clone, Copy)]
enum Trace {
    /// Nothing.
    None,
    /// It is replayed from the moment at which the guest runs.
    Replayed,
    /// It was decoded before the guest ran, as a server does that waits for its VMM.
    Decoded,
}

pub(super) fn measure(
    scratch: &Scratch,
    pager: &Pager,
    flat: &[u8],
    report: &mut Report,
) -> Result<()> {
    let trace = recorded();
    let touch = |with: Trace| -> Result<f64> {
        let source = cold(scratch, STORE)?;
        if let Trace::Decoded = with {
            all_decoded(&source, &trace)?;
        }
        let guest = Guest::wake(pager, source as Arc<dyn MemorySource>, VmConfig::STANDARD)?;
        if !matches!(with, Trace::None) {
            pager.replay(&guest.vm, trace.clone());
        }
        let pages = trace.iter().flat_map(|run| run.start / PAGE_BYTES..run.end / PAGE_BYTES);
        let took = guest.read(pages)?;
        pager.release(&guest.vm);
        Ok(took)
    };
    let once = once(&trace);
    let bare = |is_decoded: bool| -> Result<f64> {
        let source = cold(scratch, STORE)?;
        let decoding = match is_decoded {
            true => 0.0,
            false => seconds(|| all_decoded(&source, &trace))?,
        };
        Ok(decoding + bulk(&once, flat)?)
    };
    let row = |what: &str, ours: f64| Row::new(what, Value::Seconds(ours));
    let pair = pairs(FEW_ROUNDS, || touch(Trace::Replayed), || touch(Trace::None))?;
    report.row(
        row("wake that touches 5 % of 512 MiB, by its trace", pair.ours)
            .paired("without", Value::Seconds(pair.other), pair.ratio)
            .bar(Bar::RatioAtMost(1.0 / 3.0)),
    );
    let pair = pairs(FEW_ROUNDS, || touch(Trace::Replayed), || bare(false))?;
    report.row(
        row("  the same", pair.ours)
            .paired("decoding and bulk copy", Value::Seconds(pair.other), pair.ratio)
            .bar(Bar::RatioAtMost(1.3)),
    );
    let pair = pairs(FEW_ROUNDS, || touch(Trace::Decoded), || touch(Trace::None))?;
    report.row(row("  decoded before the VMM came", pair.ours).paired(
        "without",
        Value::Seconds(pair.other),
        pair.ratio,
    ));
    let pair = pairs(FEW_ROUNDS, || touch(Trace::Decoded), || bare(true))?;
    report.row(row("  decoded before the VMM came", pair.ours).paired(
        "bulk copy",
        Value::Seconds(pair.other),
        pair.ratio,
    ));
    Ok(())
}

/// 5 % of memory, in runs of 1 to 24 pages, in the order a guest touched them.
fn recorded() -> Vec<Range<u64>> {
    let (mut random, mut trace, mut pages) = (Random::new(5), Vec::new(), 0);
    while pages < PAGES / 20 {
        let (first, count) = (random.below(PAGES - 32), random.below(24) + 1);
        trace.push(first * PAGE_BYTES..(first + count) * PAGE_BYTES);
        pages += count;
    }
    trace
}

/// Which runs there are once, for the kernel installs none twice.
fn once(trace: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut once = trace.to_vec();
    once.sort_by_key(|run| run.start);
    once.dedup_by(|next, last| {
        let joins = next.start <= last.end;
        last.end = if joins { last.end.max(next.end) } else { last.end };
        joins
    });
    once
}

fn all_decoded(source: &Stored, trace: &[Range<u64>]) -> Result<()> {
    trace.iter().try_for_each(|run| decode(source, run.clone()))
}
