//! Blocks of a live disk's base over NBD: decoded in our cache beside a raw file, and compressed
//! with nothing in our caches beside a compressed qcow2.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use dormouse_store::commit::CommitRequest;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_testkit::baseline::qemu_qcow2;

use crate::load::{Load, Pattern, SMALL_BYTES, Until};
use crate::nbd::{compare, loads};
use crate::peers::{Server, check_programs, dormouse};
use crate::report::{Bar, Report, Row};
use crate::rounds::{FEW_ROUNDS, pairs};
use crate::scratch::{Scratch, pauses, root_disk, vm};

/// Half of the frame cache that the command has.
pub(crate) const CACHED_BYTES: u64 = 32 << 20;

/// Most of what is not zero on the guest's disk.
pub(crate) const IMAGE_BYTES: u64 = 256 << 20;

/// Few enough that most of them meet a frame for the first time: there are 4,096.
const COLD_READS: u64 = 1000;

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    check_programs()?;
    let raw = guest_disk(scratch, "base-raw")?;
    scratch.store("base")?.commit(
        CommitRequest::new(vm()?).image(root_disk()?, Source::File(raw.clone())),
        Job::quiet(),
    )?;
    let store = scratch.path("base");
    dormouse(&store, &["disk", "create", "guest", "--from", "vm:root"])?;
    {
        let ours = Server::dormouse(&store, &["guest"])?;
        let qemu = Server::qemu_nbd(&raw, "raw")?;
        let patterns = [Pattern::RandomRead, Pattern::SequentialRead];
        report.note("warm: blocks of the base decoded in our cache, the raw file in page cache");
        for load in loads(&patterns, CACHED_BYTES) {
            read_through(&ours, CACHED_BYTES)?;
            compare(&load, &ours, &qemu, "qemu-nbd, raw", report)?;
        }
    }
    let qcow2 = scratch.path("base.qcow2");
    qemu_qcow2::compress(&raw, &qcow2)?;
    report.note(
        "cold: both servers started anew for each round, their files in page cache; all of 256 MiB \
         in order, each block of 32 MiB once in random order, or 1,000 random reads of 256 MiB, \
         nine in ten of which meet 64 KiB that nobody decoded before",
    );
    let working_set =
        working_set_loads().into_iter().map(|load| ("a working set of 32 MiB, ", load));
    for (what, load) in working_set.chain(cold_loads().into_iter().map(|load| ("", load))) {
        let pair = pairs(
            FEW_ROUNDS,
            || load.run(&Server::dormouse(&store, &["guest"])?),
            || load.run(&Server::qemu_nbd(&qcow2, "qcow2")?),
        )?;
        report.row(
            Row::new(format!("cold {what}{}", load.title()), load.value(pair.ours))
                .paired("qemu-nbd, zstd qcow2", load.value(pair.other), pair.ratio)
                .bar(Bar::RatioAtLeast(2.0)),
        );
    }
    std::fs::remove_file(qcow2)?;
    Ok(std::fs::remove_file(raw)?)
}

/// What a guest does that starts: small pieces of a working set, in no order, until all of it was
/// read. It begins with nothing decoded.
fn working_set_loads() -> Vec<Load> {
    let load = |depth| Load {
        pattern: Pattern::RandomRead,
        depth,
        connections: 1,
        area_bytes: CACHED_BYTES,
        until: Until::EachBlockOnce,
    };
    vec![load(1), load(16)]
}

/// Reads of an image that was never read, on one connection.
pub(crate) fn cold_loads() -> Vec<Load> {
    let load = |pattern, depth, bytes| {
        let until = Until::Bytes(bytes);
        Load { pattern, depth, connections: 1, area_bytes: IMAGE_BYTES, until }
    };
    vec![
        load(Pattern::RandomRead, 1, COLD_READS * SMALL_BYTES),
        load(Pattern::RandomRead, 16, COLD_READS * SMALL_BYTES),
        load(Pattern::SequentialRead, 1, IMAGE_BYTES),
        load(Pattern::SequentialRead, 16, IMAGE_BYTES),
    ]
}

/// Brings the beginning of a disk into a server's caches.
pub(crate) fn read_through(server: &Server, bytes: u64) -> Result<()> {
    let pattern = Pattern::SequentialRead;
    let until = Until::Bytes(bytes);
    Load { pattern, depth: 1, connections: 1, area_bytes: bytes, until }.run(server).map(drop)
}

/// What is not zero of the disk of pause 3, in pieces of 64 KiB, without holes.
pub(crate) fn guest_disk(scratch: &Scratch, name: &str) -> Result<PathBuf> {
    let path: PathBuf = scratch.path(name);
    let mut from = File::open(&pauses()?[2].disk)?;
    let mut to = File::create(&path)?;
    let mut piece = vec![0; 64 << 10];
    let mut left = IMAGE_BYTES;
    while left > 0 {
        from.read_exact(&mut piece)?;
        if piece.iter().any(|&byte| byte != 0) {
            to.write_all(&piece)?;
            left -= piece.len() as u64;
        }
    }
    to.sync_all()?;
    ensure!(Path::new(&path).metadata()?.len() == IMAGE_BYTES, "too little on the disk");
    Ok(path)
}
