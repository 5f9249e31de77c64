//! What a served live disk costs: memory while 32 GiB are read and dirtied, and time to the first
//! byte.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use dormouse_store::commit::CommitRequest;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;

use crate::client::Client;
use crate::load::{Load, Pattern, SMALL_BYTES, Until};
use crate::peers::{Server, check_programs, dormouse};
use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{Random, median, seconds};
use crate::scratch::{Scratch, root_disk, vm};

const DISK_BYTES: u64 = 32 << 30;

/// The base has so many bytes of data, in as many places as the disk has times 4 MiB: 16 times what
/// the frame cache holds.
const PLACE_BYTES: u64 = 4 << 20;
const DATA_BYTES: usize = 128 << 10;

/// Random blocks that are dirtied, over all of the disk.
const DIRTIED: u64 = 50_000;

/// Three bits for a block.
const BITS_BYTES: u64 = DISK_BYTES / 4096 * 3 / 8;

/// Caches of frames and of nodes as the command has them, and what a connection, the state log and
/// the allocator take.
const FIXED_BYTES: u64 = (64 << 20) + (64 << 20) + (32 << 20);

const CONNECTS: usize = 500;
const STARTS: usize = 15;

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    check_programs()?;
    let image = scratch.path("large");
    make_image(&image)?;
    let store = scratch.store("overlay")?;
    let request = CommitRequest::new(vm()?).image(root_disk()?, Source::File(image.clone()));
    store.commit(request, Job::quiet())?;
    drop(store);
    std::fs::remove_file(image)?;
    let store = scratch.path("overlay");
    dormouse(&store, &["disk", "create", "guest", "--from", "vm:root"])?;
    dormouse(&store, &["disk", "create", "blank", "--size", &DISK_BYTES.to_string()])?;
    dormouse(&store, &["disk", "create", "new", "--from", "vm:root"])?;
    let budget = (FIXED_BYTES + BITS_BYTES) as f64;
    for (live, title) in [("guest", "over 1 GiB of data"), ("blank", "over nothing")] {
        let grown = scan(&store, live)? as f64;
        report.row(
            Row::new(format!("memory for 32 GiB {title}, read and dirtied"), Value::Bytes(grown))
                .bar(Bar::AtMost(budget)),
        );
    }
    report.note(format_args!(
        "the budget is {} MiB of bits, 128 MiB of caches of the store and 32 MiB for the rest",
        BITS_BYTES >> 20
    ));
    first_byte(&store, scratch, report)
}

/// By how much the server's memory grew at most.
fn scan(store: &Path, live: &str) -> Result<u64> {
    let server = Server::dormouse(store, &[live])?;
    Client::connect(&server)?.read(&mut [0; 4096], 0)?;
    let [before, _] = server.memory()?;
    let load = |pattern, bytes| {
        let until = Until::Bytes(bytes);
        Load { pattern, depth: 16, connections: 1, area_bytes: DISK_BYTES, until }
    };
    load(Pattern::SequentialRead, DISK_BYTES).run(&server)?;
    load(Pattern::RandomWrite, DIRTIED * SMALL_BYTES).run(&server)?;
    load(Pattern::RandomMixed, DIRTIED / 10 * SMALL_BYTES).run(&server)?;
    let [_, most] = server.memory()?;
    Ok(most.saturating_sub(before))
}

fn make_image(path: &Path) -> Result<()> {
    let mut random = Random::new(14);
    let file = File::create(path)?;
    file.set_len(DISK_BYTES)?;
    let mut data = Vec::with_capacity(DATA_BYTES);
    for place in 0..DISK_BYTES / PLACE_BYTES {
        data.clear();
        while data.len() < DATA_BYTES {
            data.extend_from_slice(&random.block());
        }
        file.write_all_at(&data, place * PLACE_BYTES)?;
    }
    Ok(())
}

/// From connecting, and from starting the server, to the first 4 KiB.
fn first_byte(store: &Path, scratch: &Scratch, report: &mut Report) -> Result<()> {
    let raw = scratch.path("first-raw");
    File::create(&raw)?.set_len(DISK_BYTES)?;
    {
        let (ours, qemu) = (Server::dormouse(store, &["guest"])?, Server::qemu_nbd(&raw, "raw")?);
        let (mut our_times, mut qemu_times) = (Vec::new(), Vec::new());
        for _ in 0..CONNECTS {
            our_times.push(seconds(|| read_first(&ours))?);
            qemu_times.push(seconds(|| read_first(&qemu))?);
        }
        for (title, part) in [("median", 500), ("p99", 990)] {
            report.row(
                Row::new(format!("connect to first byte, {title}"), quantile(&mut our_times, part))
                    .beside("qemu-nbd", quantile(&mut qemu_times, part))
                    .bar(Bar::AtMost(5e-3)),
            );
        }
    }
    for (live, title) in [("new", "a new disk"), ("guest", "50,000 scattered blocks dirty")] {
        let (mut our_times, mut qemu_times) = (Vec::new(), Vec::new());
        for _ in 0..STARTS {
            our_times.push(start(&|| Server::dormouse(store, &[live]))?);
            qemu_times.push(start(&|| Server::qemu_nbd(&raw, "raw"))?);
        }
        report.row(
            Row::new(
                format!("start of the server to first byte, {title}"),
                Value::Seconds(median(our_times)),
            )
            .beside("qemu-nbd, raw", Value::Seconds(median(qemu_times))),
        );
    }
    Ok(std::fs::remove_file(raw)?)
}

fn start(start: &dyn Fn() -> Result<Server>) -> Result<f64> {
    let begin = Instant::now();
    let server = start()?;
    read_first(&server)?;
    Ok(begin.elapsed().as_secs_f64())
}

fn read_first(server: &Server) -> Result<()> {
    Client::connect(server)?.read(&mut [0; 4096], 0)
}

/// The figure below which so many in a thousand are.
fn quantile(times: &mut [f64], thousandths: usize) -> Value {
    times.sort_by(f64::total_cmp);
    Value::Seconds(times[times.len() * thousandths / 1000])
}
