//! The commit of a live disk: how long it is frozen, what its writers notice, and how fast what was
//! sealed is stored.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_image::block::{BLOCK_BYTES, BLOCK_BYTES_U64};
use dormouse_live::base::BlankBase;
use dormouse_live::error::Error as LiveError;
use dormouse_live::files::RealFolder;
use dormouse_live::overlay::{NewOverlay, Overlay, OverlayConfig, Sealed, SealedRun};
use dormouse_store::commit::CommitRequest;
use dormouse_store::progress::Job;
use dormouse_store::source::{LayerRun, LayerSource, Source};

use crate::client::Client;
use crate::peers::{Server, dormouse, dormouse_json};
use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{FEW_ROUNDS, Random, pairs};
use crate::scratch::{Scratch, pauses, remove_dir, root_disk, vm};

const DISK_BYTES: u64 = 4 << 30;
const SIZES: [(&str, u64); 2] = [("10 MB", 10_000_000), ("2 GB", 2_000_000_000)];
const SEALS: usize = 3;

/// How long writers write before a seal and after it.
const AROUND: Duration = Duration::from_millis(300);

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    for (title, bytes) in SIZES {
        seals(scratch, title, bytes, report)?;
    }
    served(scratch, report)?;
    commit_speed(scratch, report)
}

/// Seals disks while a thread writes 4 KiB at random.
fn seals(scratch: &Scratch, title: &str, bytes: u64, report: &mut Report) -> Result<()> {
    let (mut freezes, mut during, mut before) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..SEALS {
        let overlay = new_overlay(&scratch.path("frozen"), DISK_BYTES)?;
        fill(bytes, &mut |data, at| Ok(overlay.write_at(data, at)?))?;
        overlay.flush()?;
        let mut write = |data: &[u8], at: u64| Ok(overlay.write_at(data, at)?);
        let (sealed, writes) = with_writer(bytes, &mut write, || {
            let begin = Instant::now();
            let sealed = overlay.seal()?;
            Ok((sealed, begin..Instant::now()))
        })?;
        let (sealed, seal) = sealed;
        freezes.push(sealed.freeze().as_secs_f64());
        during.push(worst(&writes, &seal));
        let earlier = writes.first().map_or(seal.start, |write| write.start)..seal.start;
        before.push(worst(&writes, &earlier));
    }
    let longest = |figures: &[f64]| figures.iter().copied().fold(0.0, f64::max);
    report.row(
        Row::new(
            format!("freeze, {title} dirty, longest of {SEALS}"),
            Value::Seconds(longest(&freezes)),
        )
        .bar(Bar::AtMost(1e-3)),
    );
    report.row(
        Row::new(
            "  worst write during the whole seal, its syncs included",
            Value::Seconds(longest(&during)),
        )
        .beside("worst in 300 ms before", Value::Seconds(longest(&before))),
    );
    Ok(())
}

/// Commits a served disk by the command while a client writes.
fn served(scratch: &Scratch, report: &mut Report) -> Result<()> {
    for (title, bytes) in SIZES {
        scratch.store("served")?;
        let store = scratch.path("served");
        dormouse(&store, &["disk", "create", "guest", "--size", &DISK_BYTES.to_string()])?;
        let server = Server::dormouse(&store, &["guest"])?;
        let mut client = Client::connect(&server)?;
        fill(bytes, &mut |data, at| client.write(data, at))?;
        client.flush()?;
        let mut write = |data: &[u8], at: u64| client.write(data, at);
        let ((printed, commit), writes) = with_writer(bytes, &mut write, || {
            let begin = Instant::now();
            let printed = dormouse_json(&store, &["disk", "commit", "guest", "snap"])?;
            Ok((printed, begin..Instant::now()))
        })?;
        let freeze = printed["freeze_seconds"].as_f64().context("no freeze_seconds")?;
        report.row(
            Row::new(
                format!("freeze, {title} dirty, served, by the command"),
                Value::Seconds(freeze),
            )
            .bar(Bar::AtMost(1e-3)),
        );
        let time = commit.end - commit.start;
        report.row(Row::new("  the whole commit", Value::Seconds(time.as_secs_f64())));
        report.row(Row::new(
            "  a client's worst write meanwhile",
            Value::Seconds(worst(&writes, &commit)),
        ));
    }
    Ok(())
}

/// The same bytes from sealed layers and from a file, each into an empty store.
fn commit_speed(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let dump = scratch.dense(&pauses()?[1].memory, "dump")?;
    let bytes = fs::read(&dump)?;
    let overlay = new_overlay(&scratch.path("committed"), bytes.len() as u64)?;
    for (number, piece) in bytes.chunks(1 << 20).enumerate() {
        overlay.write_at(piece, (number << 20) as u64)?;
    }
    overlay.flush()?;
    let layer = Arc::new(SealedLayer(overlay.seal()?));
    let mut commit = |source: Source| -> Result<f64> {
        let store = scratch.store("speed")?;
        let request = CommitRequest::new(vm()?).image(root_disk()?, source);
        let seconds = store.commit(request, Job::quiet())?.seconds;
        Ok(bytes.len() as f64 / (seconds.total - seconds.fsync))
    };
    let commit = std::cell::RefCell::new(&mut commit);
    let pair = pairs(
        FEW_ROUNDS,
        || {
            let layer = Arc::clone(&layer) as Arc<dyn LayerSource>;
            commit.borrow_mut()(Source::Layer { layer, base: None })
        },
        || commit.borrow_mut()(Source::File(dump.clone())),
    )?;
    report.row(
        Row::new("commit of what was sealed, 512 MiB", Value::BytesPerSecond(pair.ours))
            .paired("of a file with these bytes", Value::BytesPerSecond(pair.other), pair.ratio)
            .bar(Bar::RatioAtLeast(0.9)),
    );
    Ok(fs::remove_file(dump)?)
}

fn new_overlay(path: &Path, size_bytes: u64) -> Result<Overlay> {
    remove_dir(path)?;
    fs::create_dir(path)?;
    let new = NewOverlay { size_bytes, base: Arc::new(BlankBase), base_label: String::new() };
    Ok(Overlay::create(Arc::new(RealFolder::new(path)), new, OverlayConfig::STANDARD)?)
}

type Write<'a> = dyn FnMut(&[u8], u64) -> Result<()> + Send + 'a;

/// Writes so many bytes from the beginning on.
fn fill(bytes: u64, write: &mut Write<'_>) -> Result<()> {
    let mut random = Random::new(12);
    let blocks = 256;
    let piece: Vec<u8> = (0..blocks).flat_map(|_| random.block()).collect();
    let mut at = 0;
    while at < bytes {
        let len = usize::try_from(bytes - at)?.next_multiple_of(BLOCK_BYTES).min(piece.len());
        write(&piece[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

/// Runs `work` while a thread writes blocks of the first `bytes`; when each write began and ended.
fn with_writer<T>(
    bytes: u64,
    write: &mut Write<'_>,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Vec<Range<Instant>>)> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| -> Result<_> {
            let mut random = Random::new(13);
            let block = random.block();
            let mut writes = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let at = random.below(bytes / BLOCK_BYTES_U64) * BLOCK_BYTES_U64;
                let begin = Instant::now();
                write(&block, at)?;
                writes.push(begin..Instant::now());
            }
            Ok(writes)
        });
        std::thread::sleep(AROUND);
        let result = work();
        std::thread::sleep(AROUND);
        done.store(true, Ordering::Relaxed);
        let writes = writer.join().expect("writing does not panic")?;
        ensure!(!writes.is_empty(), "nothing was written meanwhile");
        Ok((result?, writes))
    })
}

/// The longest write that had to do with a time.
fn worst(writes: &[Range<Instant>], time: &Range<Instant>) -> f64 {
    let touching = writes.iter().filter(|write| write.start < time.end && write.end > time.start);
    touching.map(|write| (write.end - write.start).as_secs_f64()).fold(0.0, f64::max)
}

/// Sealed layers as the command hands them to a commit.
#[derive(Debug)]
struct SealedLayer(Sealed);

impl LayerSource for SealedLayer {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset).map_err(io::Error::other)
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()> {
        let walked = self.0.for_each_run(&mut |range, run| {
            let kind = match run {
                SealedRun::Dirty => LayerRun::Data,
                SealedRun::Zero => LayerRun::Zero,
            };
            visit(range, kind).map_err(|error| LiveError::io("cannot hand on a run", error))
        });
        walked.map_err(io::Error::other)
    }
}
