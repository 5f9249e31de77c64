//! A commit of a 512 MiB image of which 1 % of the blocks changed.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use dormouse_image::block::BLOCK_BYTES;
use dormouse_image::codec::{Codec, Encoder};
use dormouse_image::digest::DomainKey;
use dormouse_image::pack::FRAME_BYTES;
use dormouse_image::zero::is_zero;
use dormouse_store::commit::CommitRequest;
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::Store;

use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{ROUNDS, Random, medians, processor_seconds, seconds};
use crate::scratch::{Scratch, vm};

const BLOCKS: u64 = 131_072;
const PIECE_BYTES: u64 = 512 << 10;

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let path = scratch.path("changing");
    let mut file = File::create(&path)?;
    let mut random = Random::new(2);
    for _ in 0..BLOCKS {
        file.write_all(&random.block())?;
    }
    let file = File::options().write(true).open(&path)?;
    file.sync_all()?;
    let store = scratch.store("change")?;
    commit(&store, &path)?;
    // Scattered over the whole image, which is the worst for the map; then in runs of 64 KiB.
    for (title, run) in [("scattered", 1), ("in runs of 64 KiB", 16)] {
        let mut new_bytes = 0;
        let (mut written, mut extents) = (0, 0);
        let [ours, bare] = medians(
            ROUNDS,
            [
                &mut || {
                    new_bytes = change(&file, &mut random, run)?;
                    let commit = commit(&store, &path)?;
                    written = commit.written_bytes;
                    extents = commit.manifest.figures.extents;
                    Ok(commit.seconds.total - commit.seconds.fsync)
                },
                &mut || seconds(|| read_and_hash(&path)),
            ],
        )?;
        report.row(
            Row::new(format!("1 % changed, {title}"), Value::Seconds(ours))
                .beside("reading and hashing alone", Value::Seconds(bare))
                .bar(Bar::RatioAtMost(1.2)),
        );
        // In the last round every leaf changed, so all extents were written.
        let allowed = new_bytes as f64 * 1.1 + (extents * 8 + (64 << 10)) as f64;
        report.row(
            Row::new(format!("  bytes written, {title}"), Value::Bytes(written as f64))
                .beside("1.1 × new, 8 an extent, 64 KiB", Value::Bytes(allowed))
                .bar(Bar::RatioAtMost(1.0)),
        );
    }
    let before = processor_seconds();
    commit(&store, &path)?;
    let ours = processor_seconds() - before;
    let before = processor_seconds();
    read_and_hash(&path)?;
    let bare = processor_seconds() - before;
    report.row(
        Row::new("nothing changed, processor time", Value::Seconds(ours))
            .beside("reading and hashing alone", Value::Seconds(bare)),
    );
    Ok(std::fs::remove_file(path)?)
}

fn commit(store: &Store, path: &Path) -> Result<dormouse_store::commit::CommitReport> {
    let request = CommitRequest::new(vm()?).image(ImageName::Memory, Source::File(path.to_owned()));
    Ok(store.commit(request, Job::quiet())?)
}

/// Writes new blocks in runs at random places and returns the bytes that they take, compressed
/// as a commit would.
fn change(file: &File, random: &mut Random, run: u64) -> Result<u64> {
    let mut places: Vec<u64> =
        (0..BLOCKS / 100 / run).map(|_| random.below(BLOCKS / run) * run).collect();
    places.sort_unstable();
    places.dedup();
    let mut new = Vec::new();
    for place in places {
        let begin = new.len();
        (0..run).for_each(|_| new.extend_from_slice(&random.block()));
        file.write_all_at(&new[begin..], place * BLOCK_BYTES as u64)?;
    }
    let mut encoder = Encoder::new(Codec::DEFAULT)?;
    let mut bytes = 0;
    for frame in new.chunks(FRAME_BYTES) {
        bytes += encoder.encode(frame)?.1.len() as u64;
    }
    Ok(bytes)
}

/// What nobody can do without: each block read, tested and hashed, on all cores.
fn read_and_hash(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let key = DomainKey::new([1; 32]);
    let next = AtomicU64::new(0);
    let work = || -> Result<u64> {
        let mut piece = vec![0; usize::try_from(PIECE_BYTES)?];
        let mut sum = 0;
        loop {
            let at = next.fetch_add(PIECE_BYTES, Ordering::Relaxed);
            if at >= size {
                return Ok(sum);
            }
            file.read_exact_at(&mut piece, at)?;
            for block in piece.chunks_exact(BLOCK_BYTES).filter(|block| !is_zero(block)) {
                sum ^= key.digest(block).prefix();
            }
        }
    };
    let threads = std::thread::available_parallelism()?.get();
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut sum = work()?;
        for other in others {
            sum ^= other.join().expect("reading does not panic")?;
        }
        std::hint::black_box(sum);
        Ok(())
    })
}
