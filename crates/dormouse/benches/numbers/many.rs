//! Many snapshots: listing ten thousand, and reading the last of 2,500 generations.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use dormouse_image::block::{BLOCK_BYTES, HoleMeaning};
use dormouse_store::commit::{CommitRequest, NewImage, Parent};
use dormouse_store::gc::CompactOptions;
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};

use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{FEW_ROUNDS, ROUNDS, Random, median, medians, processor_seconds, seconds};
use crate::scratch::{Scratch, files_below, in_memory, vm};

const NAMES: u64 = 100;
const SNAPSHOTS_EACH: u64 = 100;
const GENERATIONS: u64 = 2500;
const IMAGE_BLOCKS: usize = 16 << 10;
const CHANGED_BLOCKS: usize = 16;
const READS: u64 = 4096;

/// Frames of which one block in ten is still in use take ten times the image; a cache that cannot
/// hold them measures decoding.
const CONFIG: Config = Config { frame_cache_bytes: 256 << 20, ..Config::STANDARD };

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    listing(scratch, report)?;
    SHAPES.iter().try_for_each(|shape| generations(shape, report))
}

fn listing(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let store = scratch.store("listed")?;
    let request = CommitRequest::new(vm()?)
        .image(ImageName::Memory, Source::Bytes(vec![1; 8192].into()))
        .image(crate::scratch::root_disk()?, Source::Bytes(vec![2; 8192].into()))
        .image(crate::scratch::state()?, Source::Bytes(vec![3; 8192].into()));
    let mut manifest = store.commit(request, Job::quiet())?.manifest;
    let dir = scratch.path("listed");
    for name in 0..NAMES {
        manifest.name = Name::new(format!("sandbox-{name}"))?;
        let folder = dir.join("snapshots").join(manifest.name.as_str());
        fs::create_dir(&folder)?;
        for number in 1..=SNAPSHOTS_EACH {
            manifest.number = number;
            fs::write(folder.join(format!("{number}.json")), manifest.encode()?)?;
        }
    }
    let mut processor = Vec::new();
    let [library, command] = medians(
        ROUNDS,
        [
            &mut || {
                let before = processor_seconds();
                let time = seconds(|| {
                    let listing = Store::open(&dir, Config::STANDARD)?.list(None)?;
                    ensure!(listing.snapshots.len() as u64 > NAMES * SNAPSHOTS_EACH, "too few");
                    Ok(())
                })?;
                processor.push(processor_seconds() - before);
                Ok(time)
            },
            &mut || seconds(|| list_by_command(&dir)),
        ],
    )?;
    let bar = Bar::AtMost(0.1);
    report.row(Row::new("listing 10,000 snapshots, library", Value::Seconds(library)).bar(bar));
    report.row(Row::new("  its processor time", Value::Seconds(median(processor))));
    report.row(Row::new("listing 10,000 snapshots, dormouse ls", Value::Seconds(command)).bar(bar));
    Ok(())
}

fn list_by_command(store: &Path) -> Result<()> {
    let status = Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .arg("--store")
        .arg(store)
        .arg("ls")
        .stdout(Stdio::null())
        .status()?;
    ensure!(status.success(), "dormouse ls failed");
    Ok(())
}

/// How the blocks that a generation changes lie.
struct Shape {
    title: &'static str,
    run: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { title: "one run of 64 KiB", run: CHANGED_BLOCKS },
    Shape { title: "16 scattered blocks", run: 1 },
];

/// In memory, as what is measured is reading and not 10,000 fsyncs.
fn generations(shape: &Shape, report: &mut Report) -> Result<()> {
    let folder = in_memory()?;
    let dir = folder.path().join("store");
    let store = Store::init(&dir, CONFIG)?;
    let mut random = Random::new(7);
    let mut image = Vec::with_capacity(IMAGE_BLOCKS * BLOCK_BYTES);
    (0..IMAGE_BLOCKS).for_each(|_| image.extend_from_slice(&random.block()));
    let first = CommitRequest::new(vm()?).image(ImageName::Memory, Source::Bytes(image.into()));
    store.commit(first, Job::quiet())?;
    let mut times = Vec::new();
    for generation in 2..=GENERATIONS {
        let diff = write_diff(&folder.path().join("diff"), shape.run, &mut random)?;
        let request = CommitRequest {
            parent: Parent::Snapshot(format!("vm@{}", generation - 1).parse()?),
            images: vec![NewImage {
                image: ImageName::Memory,
                source: Source::File(diff),
                holes: HoleMeaning::Parent,
            }],
            ..CommitRequest::new(vm()?)
        };
        times.push(seconds(|| Ok(store.commit(request, Job::quiet())?))?);
    }
    let title = shape.title;
    let early = median(times[..100].to_vec());
    let late = median(times[times.len() - 100..].to_vec());
    report.row(
        Row::new(format!("diff of {title}, late commit"), Value::Seconds(late))
            .beside("an early commit", Value::Seconds(early)),
    );
    compare(&dir, &format!("{title}, before compact"), report)?;
    let files = |what: &str| -> Result<Value> {
        Ok(Value::Count(files_below(&dir.join(what))?.len() as f64))
    };
    let before = files("packs")?;
    let time = seconds(|| Ok(store.compact(&CompactOptions::STANDARD, Job::quiet())?))?;
    report.row(Row::new(format!("compact, {title}"), Value::Seconds(time)));
    report.row(
        Row::new(format!("pack files after compact, {title}"), files("packs")?)
            .beside("before", before)
            .bar(Bar::AtMost(16.0)),
    );
    compare(&dir, &format!("{title}, after compact"), report)
}

/// A diff as Firecracker writes it: a hole is what did not change.
fn write_diff(path: &Path, run: usize, random: &mut Random) -> Result<PathBuf> {
    let file = File::create(path)?;
    file.set_len((IMAGE_BLOCKS * BLOCK_BYTES) as u64)?;
    for _ in 0..CHANGED_BLOCKS / run {
        let place = random.below((IMAGE_BLOCKS / run) as u64) * (run * BLOCK_BYTES) as u64;
        let blocks: Vec<u8> = (0..run).flat_map(|_| random.block()).collect();
        file.write_all_at(&blocks, place)?;
    }
    Ok(path.to_owned())
}

/// Reads the newest and the first generation, each from a store opened anew.
fn compare(dir: &Path, when: &str, report: &mut Report) -> Result<()> {
    let newest = format!("vm@{GENERATIONS}");
    let (mut whole, mut single) = ([0.0; 2], [0.0; 2]);
    for (pattern, times) in [(Pattern::Whole, &mut whole), (Pattern::Random, &mut single)] {
        *times = medians(
            FEW_ROUNDS,
            [&mut || read(dir, &newest, pattern), &mut || read(dir, "vm@1", pattern)],
        )?;
    }
    // As fast, with room for a noisy machine. Cold, a thousand packs are opened instead of one.
    let row = |title: &str, [newest, first]: [f64; 2]| {
        Row::new(format!("newest read {title}, {when}"), Value::Seconds(newest))
            .beside("the first of 2,500", Value::Seconds(first))
    };
    report.row(row("4 KiB at random, warm", single).bar(Bar::RatioAtMost(1.2)));
    report.row(row("whole, nothing cached", whole));
    Ok(())
}

#[derive(Clone, Copy)]
enum Pattern {
    Whole,
    Random,
}

fn read(dir: &Path, snap: &str, pattern: Pattern) -> Result<f64> {
    let store = Store::open(dir, CONFIG)?;
    let image = store.snapshot(&snap.parse()?)?.image(&ImageName::Memory)?;
    let mut random = Random::new(8);
    let mut block = vec![0; BLOCK_BYTES];
    let whole = || seconds(|| Ok(image.write_to(&mut std::io::sink(), Job::quiet())?));
    match pattern {
        Pattern::Whole => whole(),
        Pattern::Random => {
            whole()?;
            seconds(|| {
                for _ in 0..READS {
                    let at = random.below(IMAGE_BLOCKS as u64) * BLOCK_BYTES as u64;
                    image.read_at(&mut block, at)?;
                }
                Ok(())
            })
        }
    }
}
