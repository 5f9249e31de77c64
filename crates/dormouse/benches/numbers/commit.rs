//! The first commit of a dump, beside wrenn's compact diff of it.

use std::fs::File;
use std::path::Path;

use anyhow::Result;
use dormouse_image::codec::Codec;
use dormouse_store::commit::CommitRequest;
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_testkit::baseline::wrenn_diff;

use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{ROUNDS, median, medians, processor_seconds, seconds};
use crate::scratch::{Scratch, pauses, vm};

/// The one that the bar is for; one between; and the default, which stores least.
const CODECS: [Codec; 3] = [Codec::Lz4, Codec::Zstd(1), Codec::DEFAULT];

/// What a contender used besides time.
#[derive(Default)]
struct Side {
    fsync: Vec<f64>,
    processor: Vec<f64>,
    written_bytes: u64,
}

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    // Firecracker and Cloud Hypervisor write every byte, also the zeros.
    let dump = scratch.dense(&pauses()?[1].memory, "dump")?;
    let mut sides: [Side; 4] = Default::default();
    let [side, lz4, zstd1, zstd3] = &mut sides;
    let [wrenn, times @ ..] = medians(
        ROUNDS,
        [
            &mut || wrenn(scratch, &dump, side),
            &mut || ours(scratch, &dump, CODECS[0], lz4),
            &mut || ours(scratch, &dump, CODECS[1], zstd1),
            &mut || ours(scratch, &dump, CODECS[2], zstd3),
        ],
    )?;
    let [theirs, sides @ ..] = sides;
    let (their_fsync, their_processor) = (median(theirs.fsync), median(theirs.processor));
    for ((codec, time), side) in CODECS.into_iter().zip(times).zip(sides) {
        let row = Row::new(format!("first commit of pause 2, {codec}"), Value::Seconds(time))
            .beside("wrenn's compact diff", Value::Seconds(wrenn));
        report.row(if codec == CODECS[0] { row.bar(Bar::RatioAtMost(1.0)) } else { row });
        report.row(
            Row::new(
                format!("  its processor time, {codec}"),
                Value::Seconds(median(side.processor)),
            )
            .beside("wrenn's", Value::Seconds(their_processor)),
        );
        report.row(
            Row::new(format!("  its fsyncs, apart, {codec}"), Value::Seconds(median(side.fsync)))
                .beside("one of wrenn's diff", Value::Seconds(their_fsync)),
        );
        report.row(
            Row::new(format!("  bytes written, {codec}"), Value::Bytes(side.written_bytes as f64))
                .beside("wrenn's", Value::Bytes(theirs.written_bytes as f64)),
        );
    }
    Ok(std::fs::remove_file(dump)?)
}

fn ours(scratch: &Scratch, dump: &Path, codec: Codec, side: &mut Side) -> Result<f64> {
    let store = scratch.store("first")?;
    let mut request =
        CommitRequest::new(vm()?).image(ImageName::Memory, Source::File(dump.to_owned()));
    request.codec = codec;
    let before = processor_seconds();
    let commit = store.commit(request, Job::quiet())?;
    side.processor.push(processor_seconds() - before);
    side.fsync.push(commit.seconds.fsync);
    side.written_bytes = commit.written_bytes;
    Ok(commit.seconds.total - commit.seconds.fsync)
}

fn wrenn(scratch: &Scratch, dump: &Path, side: &mut Side) -> Result<f64> {
    let (diff, header) = (scratch.path("diff"), scratch.path("header"));
    let before = processor_seconds();
    let time = seconds(|| {
        let written = wrenn_diff::compact(dump, &diff, &header)?;
        side.written_bytes = written.diff_bytes + written.header_bytes;
        Ok(())
    })?;
    side.processor.push(processor_seconds() - before);
    side.fsync.push(seconds(|| Ok(File::open(&diff)?.sync_all()?))?);
    std::fs::remove_file(diff)?;
    std::fs::remove_file(header)?;
    Ok(time)
}
