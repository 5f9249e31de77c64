//! Many generations of a disk over NBD: beside qcow2 with a chain of ten backing files, and the
//! thousandth beside the first.

use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use dormouse_image::block::{BLOCK_BYTES_U64, HoleMeaning};
use dormouse_store::commit::{CommitRequest, NewImage, Parent};
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};

use crate::base::{CACHED_BYTES, IMAGE_BYTES, cold_loads, guest_disk, read_through};
use crate::client::Client;
use crate::load::{Load, Pattern, Until};
use crate::peers::{Server, check_programs, dormouse, qemu_img};
use crate::report::{Bar, Report, Row};
use crate::rounds::{FEW_ROUNDS, Pair, Random, pairs};
use crate::scratch::{Scratch, in_memory, root_disk, vm};

/// Backing files below the newest.
const BACKING_FILES: usize = 10;

/// Blocks that a generation rewrites: one in fifty.
const REWRITTEN: u64 = IMAGE_BYTES / BLOCK_BYTES_U64 / 50;

const GENERATIONS: u64 = 1000;
const GENERATION_BYTES: u64 = 64 << 10;
const ROUND_MS: u64 = 400;

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    check_programs()?;
    chain(scratch, report)?;
    thousand(report)
}

fn chain(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let store = scratch.store("chain")?;
    let files = make_chain(scratch, &store)?;
    let top = files.last().map_or(Path::new(""), |file| file);
    let store = scratch.path("chain");
    dormouse(&store, &["disk", "create", "guest", "--from", "vm:root"])?;
    let ours = || Server::dormouse(&store, &["guest"]);
    let qemu = || Server::qemu_nbd(top, "qcow2");
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2", &ours()?.uri(), &top.display().to_string()])?;

    report.note(
        "the qcow2 files of the chain are not compressed, our generations are; cold: servers \
         started anew, files in page cache; warm: the first 32 MiB were read by both before",
    );
    let row = |what: String, load: &Load, pair: Pair| {
        Row::new(what, load.value(pair.ours)).paired(
            "qemu-nbd, 10 backing files",
            load.value(pair.other),
            pair.ratio,
        )
    };
    for load in cold_loads() {
        let pair = pairs(FEW_ROUNDS, || load.run(&ours()?), || load.run(&qemu()?))?;
        // No bar: one decompresses and checks what the other has ready in page cache.
        report.row(row(format!("generation 11, cold {}", load.title()), &load, pair));
    }
    let (ours, qemu) = (ours()?, qemu()?);
    for load in warm_loads() {
        read_through(&ours, CACHED_BYTES)?;
        read_through(&qemu, CACHED_BYTES)?;
        let pair = pairs(FEW_ROUNDS, || load.run(&ours), || load.run(&qemu))?;
        let row = row(format!("generation 11, warm {}", load.title()), &load, pair);
        report.row(row.bar(Bar::RatioAtLeast(2.0)));
    }
    drop(qemu);
    files.iter().try_for_each(fs::remove_file)?;
    Ok(())
}

fn warm_loads() -> Vec<Load> {
    let mut loads = Vec::new();
    for pattern in [Pattern::RandomRead, Pattern::SequentialRead] {
        for depth in [1, 16] {
            let until = Until::Milliseconds(ROUND_MS);
            loads.push(Load { pattern, depth, connections: 1, area_bytes: CACHED_BYTES, until });
        }
    }
    loads
}

/// Makes a chain of qcow2 files, each with some blocks rewritten, and commits what it looks like
/// from each of them.
fn make_chain(scratch: &Scratch, store: &Store) -> Result<Vec<PathBuf>> {
    let raw = guest_disk(scratch, "chain-raw")?;
    let mut random = Random::new(9);
    let mut files: Vec<PathBuf> = Vec::new();
    for number in 0..=BACKING_FILES {
        let file = scratch.path(&format!("chain-{number}"));
        let (name, raw_name) = (file.display().to_string(), raw.display().to_string());
        match files.last() {
            None => qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &raw_name, &name])?,
            Some(below) => {
                let below = below.display().to_string();
                qemu_img(&["create", "-q", "-f", "qcow2", "-b", &below, "-F", "qcow2", &name])?;
                let server = Server::qemu_nbd(&file, "qcow2")?;
                let mut client = Client::connect(&server)?;
                for _ in 0..REWRITTEN {
                    let at = random.below(IMAGE_BYTES / BLOCK_BYTES_U64) * BLOCK_BYTES_U64;
                    client.write(&random.block(), at)?;
                }
                drop(server);
                qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &name, &raw_name])?;
            }
        }
        let request = CommitRequest::new(vm()?).image(root_disk()?, Source::File(raw.clone()));
        store.commit(request, Job::quiet())?;
        files.push(file);
    }
    fs::remove_file(raw)?;
    Ok(files)
}

/// In memory, as what is measured is reading and not a thousand fsyncs.
fn thousand(report: &mut Report) -> Result<()> {
    let folder = in_memory()?;
    let dir = folder.path().join("store");
    let store = Store::init(&dir, Config::STANDARD)?;
    let mut random = Random::new(10);
    let mut blocks = |bytes: u64| -> Vec<u8> {
        (0..bytes / BLOCK_BYTES_U64).flat_map(|_| random.block()).collect()
    };
    let first = Source::Bytes(blocks(CACHED_BYTES).into());
    store.commit(CommitRequest::new(vm()?).image(root_disk()?, first), Job::quiet())?;
    let mut places = Random::new(11);
    let diff = folder.path().join("diff");
    for generation in 2..=GENERATIONS {
        let file = File::create(&diff)?;
        file.set_len(CACHED_BYTES)?;
        let place = places.below(CACHED_BYTES / GENERATION_BYTES) * GENERATION_BYTES;
        file.write_all_at(&blocks(GENERATION_BYTES), place)?;
        let request = CommitRequest {
            parent: Parent::Snapshot(format!("vm@{}", generation - 1).parse()?),
            images: vec![NewImage {
                image: root_disk()?,
                source: Source::File(diff.clone()),
                holes: HoleMeaning::Parent,
            }],
            ..CommitRequest::new(vm()?)
        };
        store.commit(request, Job::quiet())?;
    }
    drop(store);
    let newest = format!("vm@{GENERATIONS}:root");
    dormouse(&dir, &["disk", "create", "first", "--from", "vm@1:root"])?;
    dormouse(&dir, &["disk", "create", "newest", "--from", &newest])?;
    let newest = Server::dormouse(&dir, &["newest"])?;
    let first = Server::dormouse(&dir, &["first"])?;
    for load in warm_loads() {
        read_through(&newest, CACHED_BYTES)?;
        read_through(&first, CACHED_BYTES)?;
        let pair = pairs(FEW_ROUNDS, || load.run(&newest), || load.run(&first))?;
        // As fast, with room for a noisy machine.
        report.row(
            Row::new(format!("generation 1,000, {}", load.title()), load.value(pair.ours))
                .paired("generation 1", load.value(pair.other), pair.ratio)
                .bar(Bar::RatioAtLeast(0.9)),
        );
    }
    Ok(())
}
