//! Finding a block in a map of a million extents, and what extents take on the disk.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use dormouse_image::block::{BLOCK_BYTES, BLOCK_BYTES_U64};
use dormouse_image::map::Node;
use dormouse_image::pack::{PackReader, ReadAt};
use dormouse_store::commit::CommitRequest;
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::reader::ImageReader;
use dormouse_store::source::Source;

use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{ROUNDS, Random, medians, seconds};
use crate::scratch::{FIVE, Scratch, files_below, vm};

const EXTENTS: u64 = 1 << 20;
const LOOKUPS: u64 = 1 << 20;

/// Different blocks of the image: in random order, each is an extent of its own.
const DIFFERENT: u64 = 4096;

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let image = shuffled_image(scratch)?;
    let mut starts = Vec::new();
    image.for_each_extent(0..image.size_bytes(), &mut |extent| {
        starts.push(extent.range.start);
        Ok(())
    })?;
    ensure!(starts.len() as u64 > EXTENTS * 99 / 100, "only {} extents", starts.len());
    let (mut ours, mut plain) = (Random::new(3), Random::new(3));
    let [ours, plain] = medians(
        ROUNDS,
        [
            &mut || {
                seconds(|| {
                    let mut sum = 0;
                    for _ in 0..LOOKUPS {
                        let at = ours.below(EXTENTS) * BLOCK_BYTES_U64;
                        sum ^= image.extent_at(at)?.range.start;
                    }
                    std::hint::black_box(sum);
                    Ok(())
                })
            },
            &mut || {
                seconds(|| {
                    let mut sum = 0;
                    for _ in 0..LOOKUPS {
                        let at = plain.below(EXTENTS) * BLOCK_BYTES_U64;
                        sum ^= starts.partition_point(|&start| start <= at);
                    }
                    std::hint::black_box(sum);
                    Ok(())
                })
            },
        ],
    )?;
    let each = |time: f64| Value::Seconds(time / LOOKUPS as f64);
    report.row(
        Row::new(format!("lookup among {} extents", starts.len()), each(ours))
            .beside("a sorted array of them", each(plain))
            .bar(Bar::AtMost(200e-9)),
    );

    scratch.five_pauses()?;
    let (mut extents, mut bytes) = (0_u64, 0_u64);
    for path in files_below(&scratch.path(FIVE).join("packs"))? {
        let file = PackFile(std::fs::File::open(path)?);
        let len = file.0.metadata()?.len();
        let pack = PackReader::open(Arc::new(file), 0, len)?;
        for (number, entry) in (0..).zip(&pack.toc().nodes) {
            bytes += u64::from(entry.bytes);
            if let Node::Leaf(leaf) = pack.node(number)? {
                extents += leaf.extents() as u64;
            }
        }
    }
    report.row(
        Row::new(
            format!("node bytes an extent, {extents} extents of the five pauses"),
            Value::Bytes(bytes as f64 / extents as f64),
        )
        .bar(Bar::AtMost(8.0)),
    );
    Ok(())
}

/// An image of a million blocks, each followed by one from another place. It comes through a pipe,
/// as it is never needed whole.
fn shuffled_image(scratch: &Scratch) -> Result<ImageReader> {
    let pipe = scratch.path("pipe");
    let status = Command::new("mkfifo").arg(&pipe).status().context("cannot run mkfifo")?;
    ensure!(status.success(), "mkfifo failed");
    let store = scratch.store("lookup")?;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| -> Result<()> {
            let mut random = Random::new(4);
            let blocks: Vec<_> = (0..DIFFERENT).map(|_| random.block()).collect();
            let mut file = std::fs::File::options().write(true).open(&pipe)?;
            let mut buf = Vec::with_capacity(64 * BLOCK_BYTES);
            for _ in 0..EXTENTS / 64 {
                buf.clear();
                for _ in 0..64 {
                    buf.extend_from_slice(&blocks[usize::try_from(random.below(DIFFERENT))?]);
                }
                file.write_all(&buf)?;
            }
            Ok(())
        });
        let request =
            CommitRequest::new(vm()?).image(ImageName::Memory, Source::File(pipe.clone()));
        store.commit(request, Job::quiet())?;
        writer.join().expect("writing does not panic")
    })?;
    Ok(store.snapshot(&"vm".parse()?)?.image(&ImageName::Memory)?)
}

#[derive(Debug)]
struct PackFile(std::fs::File);

impl ReadAt for PackFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }
}
