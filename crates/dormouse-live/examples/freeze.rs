//! How long a seal freezes a disk, and how fast its requests are, at 10 MB and at 2 GB dirty.
//!
//! `cargo run --release -p dormouse-live --example freeze [FOLDER]`
#![allow(clippy::print_stdout, reason = "an example prints what it measures")]

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dormouse_live::base::BlankBase;
use dormouse_live::files::RealFolder;
use dormouse_live::overlay::{NewOverlay, Overlay, OverlayConfig};

const DISK_BYTES: u64 = 8 << 30;
const REQUESTS: u32 = 100_000;

fn main() -> Result<(), Box<dyn Error>> {
    let parent = std::env::args().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(parent)?;
    for (name, dirty_bytes) in [("10 MB", 10_000_000), ("2 GB", 2_000_000_000)] {
        let path = folder.path().join(name);
        std::fs::create_dir(&path)?;
        let new = NewOverlay {
            size_bytes: DISK_BYTES,
            base: Arc::new(BlankBase),
            base_label: String::new(),
        };
        let folder = Arc::new(RealFolder::new(&path));
        let disk = Overlay::create(folder, new, OverlayConfig::STANDARD)?;
        let bytes = vec![0x5a; 1 << 20];
        // Every second block of each MiB, so that there are as many runs as can be.
        let begin = Instant::now();
        for at in (0..dirty_bytes * 2).step_by(8192) {
            disk.write_at(&bytes[..4096], at)?;
        }
        let rate = dirty_bytes as f64 / begin.elapsed().as_secs_f64() / 1e6;
        println!("{name} dirty: written at {rate:.0} MB/s in blocks of 4 KiB");
        let begin = Instant::now();
        disk.flush()?;
        println!("  flush of all of it: {:.2?}", begin.elapsed());
        requests(&disk)?;
        for number in 0..3 {
            seal(&disk, number)?;
        }
    }
    Ok(())
}

/// Seals while two threads write, and measures what these notice.
fn seal(disk: &Overlay, number: u32) -> Result<(), Box<dyn Error>> {
    let stop = AtomicBool::new(false);
    let longest = AtomicU64::new(0);
    let (sealed, took) = std::thread::scope(|scope| {
        for thread in 0..2_u64 {
            let (stop, longest) = (&stop, &longest);
            scope.spawn(move || {
                let mut at = 0;
                while !stop.load(Ordering::Relaxed) {
                    let begin = Instant::now();
                    at = (at + 1_048_573 * 4096) % (DISK_BYTES / 2);
                    disk.write_at(&[7; 4096], at + thread * DISK_BYTES / 2).expect("it has room");
                    let nanos = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
                    longest.fetch_max(nanos, Ordering::Relaxed);
                }
            });
        }
        std::thread::sleep(Duration::from_millis(20));
        let before = Duration::from_nanos(longest.swap(0, Ordering::Relaxed));
        let begin = Instant::now();
        let sealed = disk.seal();
        let took = begin.elapsed();
        stop.store(true, Ordering::Relaxed);
        println!("  longest write in the 20 ms before seal {number}: {before:.2?}");
        (sealed, took)
    });
    println!(
        "  seal {number}: frozen {:.2?}, of {took:.2?} in all; longest write meanwhile {:.2?}",
        sealed?.freeze(),
        Duration::from_nanos(longest.load(Ordering::Relaxed))
    );
    Ok(())
}

fn requests(disk: &Overlay) -> Result<(), Box<dyn Error>> {
    let mut buf = vec![0; 4096];
    let mut at = 0;
    let mut next = || {
        at = (at + 1_048_573 * 4096) % DISK_BYTES;
        at
    };
    let begin = Instant::now();
    for _ in 0..REQUESTS {
        disk.read_at(&mut buf, next())?;
    }
    let blank = begin.elapsed() / REQUESTS;
    let begin = Instant::now();
    for _ in 0..REQUESTS {
        disk.read_at(&mut buf, next() % (1 << 24) / 8192 * 8192)?;
    }
    let read = begin.elapsed() / REQUESTS;
    buf.fill(0x77);
    let begin = Instant::now();
    for _ in 0..REQUESTS / 10 {
        disk.write_at(&buf, next() % (1 << 24))?;
    }
    let write = begin.elapsed() / (REQUESTS / 10);
    let begin = Instant::now();
    for _ in 0..100 {
        disk.write_durably(&buf, next() % (1 << 24))?;
    }
    let durable = begin.elapsed() / 100;
    println!(
        "  4 KiB: read blank {blank:.2?}, read {read:.2?}, write {write:.2?}, write and flush {durable:.2?}"
    );
    Ok(())
}
