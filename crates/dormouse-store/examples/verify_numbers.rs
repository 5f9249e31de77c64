//! How long usage and verification take on a long lineage.
//!
//! `cargo run --release -p dormouse-store --example verify_numbers [GENERATIONS [FOLDER]]`

#![expect(clippy::print_stdout, reason = "printing is what it is for")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Instant;

use dormouse_image::block::HoleMeaning;
use dormouse_store::commit::{CommitRequest, NewImage, Parent};
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};
use dormouse_store::verify::VerifyOptions;

/// Blocks of the image: 256 MiB in eight leaves.
const BLOCKS: u64 = 65_536;

/// Blocks that change from one generation to the next.
const CHANGES: u64 = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let generations: u64 = arguments.next().map_or(Ok(2_500), |text| text.parse())?;
    let folder = arguments.next().map_or_else(
        || std::env::temp_dir().join(format!("verify-numbers-{}", std::process::id())),
        PathBuf::from,
    );
    let is_new = !folder.exists();
    let keep = std::env::args().len() > 2;
    let store = if is_new {
        Store::init(&folder, Config::STANDARD)?
    } else {
        Store::open(&folder, Config::STANDARD)?
    };
    if is_new {
        fill(&store, generations)?;
    }
    drop(store);
    type Work<'a> = &'a dyn Fn(&Store) -> Result<String, Box<dyn std::error::Error>>;
    let time = |what: &str, run: Work<'_>| {
        let store = Store::open(&folder, Config::STANDARD)?;
        let begin = Instant::now();
        let said = run(&store)?;
        println!("{what}: {:.2} s, {said}", begin.elapsed().as_secs_f64());
        Ok::<_, Box<dyn std::error::Error>>(())
    };
    time("usage", &|store| {
        let usage = store.usage(Job::quiet())?;
        Ok(format!("{} snapshots, {} live bytes", usage.snapshots.len(), usage.live_bytes))
    })?;
    for (what, deep, snap) in
        [("verify", false, None), ("verify --deep", true, None), ("verify vm", false, Some("vm"))]
    {
        time(what, &|store| {
            let snap = snap.map(str::parse).transpose()?;
            let options = VerifyOptions { snap, deep, repair: false };
            let report = store.verify(&options, Job::quiet())?;
            Ok(format!(
                "{} packs, {} frames, {} bytes read, {} problems",
                report.packs,
                report.frames,
                report.read_bytes,
                report.problems.len()
            ))
        })?;
    }
    time("packs of vm", &|store| {
        let rows = store.snapshot(&"vm".parse()?)?.packs(Job::quiet())?;
        Ok(format!("{} packs", rows.len()))
    })?;
    if is_new && !keep {
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(())
}

/// Commits an image and diffs over it; no block compresses well.
fn fill(store: &Store, generations: u64) -> Result<(), Box<dyn std::error::Error>> {
    let begin = Instant::now();
    let mut seed = 1_u64;
    let mut next = || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let path = std::env::temp_dir().join(format!("verify-numbers-{}.image", std::process::id()));
    for generation in 0..generations {
        let file = File::create(&path)?;
        let changes = if generation == 0 { BLOCKS } else { CHANGES };
        for number in 0..changes {
            let block = if generation == 0 { number } else { next() % BLOCKS };
            let word = next().to_le_bytes();
            file.write_all_at(&word.repeat(512), block * 4096)?;
        }
        file.set_len(BLOCKS * 4096)?;
        let (parent, holes) = match generation {
            0 => (Parent::None, HoleMeaning::Zero),
            number => (Parent::Snapshot(format!("vm@{number}").parse()?), HoleMeaning::Parent),
        };
        let image = ImageName::Disk(Name::new("root")?);
        let images = vec![NewImage { image, source: Source::File(path.clone()), holes }];
        let request = CommitRequest { parent, images, ..CommitRequest::new(Name::new("vm")?) };
        store.commit(request, Job::quiet())?;
    }
    std::fs::remove_file(&path)?;
    println!("{generations} generations: {:.1} s", begin.elapsed().as_secs_f64());
    Ok(())
}
