//! Other people's snapshots: headers of a million records, imports beside plain commits, and what a
//! chain of wrenn's takes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use dormouse_formats::detect::look;
use dormouse_formats::e2b::header::Header as E2bHeader;
use dormouse_formats::export::{ExportRequest, export};
use dormouse_formats::format::Format;
use dormouse_formats::import::{ImportRequest, LookOptions, import};
use dormouse_formats::page_map::PageMap;
use dormouse_formats::replay::DataCodec;
use dormouse_formats::wrenn::Header as WrennHeader;
use dormouse_image::codec::Codec;
use dormouse_store::commit::{CommitRequest, Parent};
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_testkit::foreign::e2b;
use dormouse_testkit::foreign::random::PAGE;
use dormouse_testkit::foreign::wrenn::{self, Generation};

use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{ROUNDS, Random, median, medians, processor_seconds, seconds};
use crate::scratch::{Scratch, files_below, pauses, remove_dir, state, vm};

const RECORDS: u64 = 1_000_000;
const LOOKUPS: u64 = 1 << 20;

/// Generations of the chain: the five pauses, and before each one halfway.
const GENERATIONS: usize = 10;

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    headers(report)?;
    speed(scratch, report)?;
    chain(scratch, report)
}

/// A million records, each of one page, of two builds and zeros in turn.
fn headers(report: &mut Report) -> Result<()> {
    let mut random = Random::new(1);
    let mut storage = [0; 3];
    let mappings: Vec<e2b::Mapping> = (0..RECORDS)
        .map(|page| {
            // Never the same build twice in a row, so that no two become one run.
            let (build, id) = [(0, 0_u8), (1, 1), (2, 2)][(page % 3) as usize];
            let at: u64 = storage[build];
            storage[build] += 1 + random.below(3);
            (page, 1, [id; 16], if build == 0 { 0 } else { at })
        })
        .collect();
    let head = |version| e2b::Head {
        version,
        block: 4096,
        size: RECORDS * PAGE as u64,
        generation: 1,
        build: [1; 16],
        base: [2; 16],
    };
    let no_builds = std::collections::BTreeMap::new();
    let [v3, v4, v5] = [3, 4, 5].map(|version| e2b::header(&head(version), &no_builds, &mappings));
    // wrenn's is the same but for the version.
    let mut v1 = v3.clone();
    v1[0] = 1;
    let [one, three, four, five] = medians(
        ROUNDS,
        [
            &mut || processor(|| Ok(WrennHeader::parse(&v1)?)),
            &mut || processor(|| Ok(E2bHeader::parse(&v3)?)),
            &mut || processor(|| Ok(E2bHeader::parse(&v4)?)),
            &mut || processor(|| Ok(E2bHeader::parse(&v5)?)),
        ],
    )?;
    for (what, time) in [
        ("wrenn's header of a million records, parsed and checked, processor time", one),
        ("E2B's, version 3", three),
        ("E2B's, version 4", four),
        ("E2B's, version 5", five),
    ] {
        report.row(Row::new(what, Value::Seconds(time)).bar(Bar::AtMost(0.050)));
    }
    let map = E2bHeader::parse(&v5)?.map;
    ensure!(map.len() as u64 == RECORDS, "{} runs", map.len());
    let [lookup] = medians(ROUNDS, [&mut || lookups(&map)])?;
    let each = lookup / LOOKUPS as f64;
    report.row(
        Row::new("a lookup in it, random, warm", Value::Seconds(each)).bar(Bar::AtMost(200e-9)),
    );
    Ok(())
}

/// Seconds of one thread's work, which the machine's other users do not lengthen so much.
fn processor<T>(work: impl FnOnce() -> Result<T>) -> Result<f64> {
    let before = processor_seconds();
    std::hint::black_box(work()?);
    Ok(processor_seconds() - before)
}

fn lookups(map: &PageMap) -> Result<f64> {
    let mut random = Random::new(2);
    processor(|| {
        let mut sum = 0;
        for _ in 0..LOOKUPS {
            let run = map.lookup(random.below(RECORDS)).context("inside the device")?;
            sum ^= run.place.map_or(0, |place| place.page);
        }
        std::hint::black_box(sum);
        Ok(())
    })
}

/// A pause's memory as other systems have it, beside a commit of the sparse file.
fn speed(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let memory = pauses()?[1].memory.clone();
    let folder = scratch.path("foreign");
    remove_dir(&folder)?;
    fs::create_dir_all(&folder)?;
    // The formats' files are written by our own exporter; tests hold it against other writers.
    let store = scratch.store("exporter")?;
    let request = CommitRequest::new(vm()?)
        .image(ImageName::Memory, Source::File(memory.clone()))
        .image(state()?, Source::Bytes((&b"state"[..]).into()));
    store.commit(request, Job::quiet())?;
    let mut contenders: Vec<(&str, Format, PathBuf)> = Vec::new();
    let build = "11111111-1111-1111-1111-111111111111";
    for (what, format, codec) in [
        ("wrenn", Format::Wrenn, None),
        ("E2B, version 3", Format::E2b, None),
        ("E2B, version 5, LZ4", Format::E2b, Some(DataCodec::Lz4)),
        ("E2B, version 5, zstd", Format::E2b, Some(DataCodec::Zstd)),
    ] {
        let dir = folder.join(contenders.len().to_string());
        let request = ExportRequest {
            version: codec.map(|_| "5".to_owned()),
            data_codec: codec,
            build_id: Some(build.parse()?),
            ..ExportRequest::default()
        };
        export(&store, &"vm".parse()?, &dir, format, &request, Job::quiet())?;
        let path = if format == Format::E2b { dir.join(build) } else { dir };
        contenders.push((what, format, path));
    }
    for (what, format, path) in contenders {
        let (theirs, ours, ratio) = beside(&mut || plain_commit(scratch, &memory), &mut || {
            one_import(scratch, format, &path)
        })?;
        // A ratio of speeds, so that of times upside down.
        report.row(
            Row::new(format!("import of {what}, pause 2, lz4, fsync apart"), Value::Seconds(ours))
                .paired("a plain commit of the bytes", Value::Seconds(theirs), ratio)
                .bar(Bar::RatioAtMost(1.0 / 0.7)),
        );
    }
    remove_dir(&folder)
}

/// Medians of both, and of their ratio within a round.
fn beside(
    theirs: &mut dyn FnMut() -> Result<f64>,
    ours: &mut dyn FnMut() -> Result<f64>,
) -> Result<(f64, f64, f64)> {
    let (mut a, mut b, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (plain, import) = (theirs()?, ours()?);
        a.push(plain);
        b.push(import);
        ratios.push(import / plain);
    }
    Ok((median(a), median(b), median(ratios)))
}

fn plain_commit(scratch: &Scratch, memory: &Path) -> Result<f64> {
    let store = scratch.store("plain")?;
    let mut request = CommitRequest::new(vm()?)
        .image(ImageName::Memory, Source::File(memory.to_owned()))
        .image(state()?, Source::Bytes((&b"state"[..]).into()));
    request.codec = Codec::Lz4;
    let commit = store.commit(request, Job::quiet())?;
    Ok(commit.seconds.total - commit.seconds.fsync)
}

/// The header is read within the time, too.
fn one_import(scratch: &Scratch, format: Format, path: &Path) -> Result<f64> {
    let store = scratch.store("import")?;
    let mut fsync = 0.0;
    let time = seconds(|| {
        let found = look(format, path, &LookOptions::default())?;
        let report = import(&store, found, &quick(false)?, Job::quiet())?;
        fsync = report.snapshots.iter().map(|one| one.commit.seconds.fsync).sum();
        Ok(())
    })?;
    Ok(time - fsync)
}

fn quick(verify: bool) -> Result<ImportRequest> {
    Ok(ImportRequest { name: vm()?, parent: Parent::Auto, codec: Codec::Lz4, verify })
}

/// Folders as wrenn leaves them when a guest sleeps again and again.
fn chain(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let folder = scratch.path("chain");
    remove_dir(&folder)?;
    let mut generations: Vec<Generation> = Vec::new();
    for (number, files) in (1_u8..).zip(pauses()?) {
        let memory = fs::read(&files.memory)?;
        let empty = Generation { build: [0; 16], memory: vec![0; memory.len()] };
        let before = generations.last().unwrap_or(&empty);
        generations.push(halfway(before, &memory));
        generations.push(Generation { build: [number; 16], memory });
    }
    ensure!(generations.len() == GENERATIONS, "{} generations", generations.len());
    let (mut imported, mut all) = (0, 0);
    for count in 1..=GENERATIONS {
        let dir = folder.join(format!("pause-{count}"));
        wrenn::write(&dir, &generations[..count])?;
        imported = 0;
        for file in files_below(&dir)? {
            imported += fs::metadata(file)?.len();
        }
        all += imported;
        // Only the newest data is new; wrenn copies the rest, and here it would take 10 GiB.
        if count < GENERATIONS {
            link_data(&folder, count)?;
        }
    }
    let store = scratch.store("chained")?;
    let found = look(Format::Wrenn, &folder, &LookOptions::default())?;
    let mut request = quick(true)?;
    request.codec = Codec::DEFAULT;
    let done = import(&store, found, &request, Job::quiet())?;
    ensure!(done.snapshots.len() == GENERATIONS, "{} snapshots", done.snapshots.len());
    let mut stored = 0;
    for file in files_below(&scratch.path("chained").join("packs"))? {
        stored += fs::metadata(file)?.len();
    }
    report.row(
        Row::new(
            format!("{GENERATIONS} generations of wrenn's, memory, stored"),
            Value::Bytes(stored as f64),
        )
        .beside("the files of all folders", Value::Bytes(all as f64))
        .bar(Bar::RatioAtMost(0.2)),
    );
    report.row(
        Row::new("  the same, each data file counted once", Value::Bytes(stored as f64))
            .beside("the files of the newest folder", Value::Bytes(imported as f64)),
    );
    report.note("wrenn copies the data of all generations into every later folder");
    remove_dir(&folder)
}

/// The earlier one with the first half of what changed until the later one.
fn halfway(before: &Generation, after: &[u8]) -> Generation {
    let mut memory = before.memory.clone();
    let changed: Vec<usize> = (0..memory.len().min(after.len()) / PAGE)
        .filter(|page| {
            let range = page * PAGE..(page + 1) * PAGE;
            memory[range.clone()] != after[range]
        })
        .collect();
    for page in &changed[..changed.len() / 2] {
        let range = page * PAGE..(page + 1) * PAGE;
        memory[range.clone()].copy_from_slice(&after[range]);
    }
    Generation { build: before.build.map(|byte| byte + 100), memory }
}

/// Makes the data files of folder `count` one with those of the folder before.
fn link_data(folder: &Path, count: usize) -> Result<()> {
    if count < 2 {
        return Ok(());
    }
    let [before, dir] = [count - 1, count].map(|count| folder.join(format!("pause-{count}")));
    for file in files_below(&before)? {
        let name = file.file_name().context("a file has a name")?;
        let same = dir.join(name);
        if name.to_string_lossy().starts_with("memfile.")
            && name != "memfile.header"
            && same.exists()
        {
            fs::remove_file(&same)?;
            fs::hard_link(&file, &same)?;
        }
    }
    Ok(())
}
