//! From the start of `dormouse serve memory` to its socket, over a first and a thousandth snapshot.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Result, ensure};
use dormouse_image::block::{BLOCK_BYTES_U64, HoleMeaning};
use dormouse_store::commit::{CommitRequest, NewImage, Parent};
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};

use crate::peers::command;
use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{Random, median};
use crate::scratch::{in_memory, vm};

const GENERATIONS: u64 = 1000;
const MEMORY_BYTES: u64 = 64 << 20;
const CHANGED_BYTES: u64 = 64 << 10;
const STARTS: usize = 15;

/// In memory, as a thousand commits sync a thousand times.
pub(super) fn measure(report: &mut Report) -> Result<()> {
    let folder = in_memory()?;
    let dir = folder.path().join("store");
    generations(&dir, folder.path())?;
    for number in [1, GENERATIONS] {
        let mut times = Vec::new();
        for _ in 0..STARTS {
            times.push(start(&dir, &format!("vm@{number}"), folder.path())?);
        }
        let what = format!("start of serve memory to its socket, generation {number}");
        report.row(Row::new(what, Value::Seconds(median(times))).bar(Bar::AtMost(5e-3)));
    }
    Ok(())
}

/// Memory, and what changed in it a thousand times.
fn generations(dir: &Path, scratch: &Path) -> Result<()> {
    let store = Store::init(dir, Config::STANDARD)?;
    let (mut random, mut places) = (Random::new(21), Random::new(22));
    let mut blocks = |bytes: u64| -> Vec<u8> {
        (0..bytes / BLOCK_BYTES_U64).flat_map(|_| random.block()).collect()
    };
    let first = Source::Bytes(blocks(MEMORY_BYTES).into());
    store.commit(CommitRequest::new(vm()?).image(ImageName::Memory, first), Job::quiet())?;
    let diff = scratch.join("diff");
    for generation in 2..=GENERATIONS {
        let file = File::create(&diff)?;
        file.set_len(MEMORY_BYTES)?;
        let place = places.below(MEMORY_BYTES / CHANGED_BYTES) * CHANGED_BYTES;
        file.write_all_at(&blocks(CHANGED_BYTES), place)?;
        let request = CommitRequest {
            parent: Parent::Snapshot(format!("vm@{}", generation - 1).parse()?),
            images: vec![NewImage {
                image: ImageName::Memory,
                source: Source::File(diff.clone()),
                holes: HoleMeaning::Parent,
            }],
            ..CommitRequest::new(vm()?)
        };
        store.commit(request, Job::quiet())?;
    }
    Ok(())
}

/// Seconds until it says where its socket is. Whoever connects then is answered.
fn start(store: &Path, snapshot: &str, scratch: &Path) -> Result<f64> {
    let socket = scratch.join("uffd");
    let begin = Instant::now();
    let mut child = command(store)
        .args(["--quiet", "serve", "memory", snapshot, "--as", "guest", "--uffd"])
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    let took = begin.elapsed().as_secs_f64();
    let is_ready = line.trim_end() == socket.to_string_lossy();
    let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
    // What fails here has ended by itself.
    let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::TERM));
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut said)?;
    }
    let status = child.wait()?;
    ensure!(is_ready && status.success(), "serve memory: {line:?}, {status}: {said}");
    Ok(took)
}
