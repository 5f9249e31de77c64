//! Page faults of a guest: one by one, in order, by a trace; and what tracking costs.
//!
//! The guest is a thread of this process, for us and for those beside us alike. Those are bare ioctls:
//! a thread that polls, reads and copies, and `UFFDIO_COPY` of all there is in windows. They copy the
//! right bytes, from a flat copy of the image in memory, and protect what they install, as we do.

mod guest;
mod ready;
mod single;
mod wake;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Result, ensure};
use dormouse_image::codec::Codec;
use dormouse_live::pages::{PAGE_BYTES, PageState, Tracking};
use dormouse_serve::uffd::{Effort, MemorySource, Pager, PagerConfig, VmConfig};
use dormouse_store::commit::CommitRequest;
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};
use dormouse_sys::mapping::{Mapping, PageSize};
use dormouse_sys::page_map::{PageMap, Wanted};
use dormouse_sys::userfaultfd::{Protection, Register};

use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{FEW_ROUNDS, Random, median, pairs, seconds};
use crate::scratch::{Scratch, pauses, vm};
use guest::{Guest, Stored, observed};

const PAGES: u64 = 131_072;
const BYTES: u64 = PAGES * PAGE_BYTES;
const WINDOW: u64 = 64 << 10;

/// Pages that are touched one by one.
const SINGLE: usize = 1500;

/// Memory that is touched in order.
const ORDER: u64 = 128 << 20;

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let image = pauses()?[1].memory.clone();
    let bytes = std::fs::metadata(&image)?.len();
    ensure!(bytes == BYTES, "{bytes} bytes of memory, not {BYTES}");
    for (name, codec) in [("faults-lz4", Codec::Lz4), ("faults-zstd", Codec::Zstd(3))] {
        let store = scratch.store(name)?;
        let mut request =
            CommitRequest::new(vm()?).image(ImageName::Memory, Source::File(image.clone()));
        request.codec = codec;
        store.commit(request, Job::quiet())?;
    }
    let flat = std::fs::read(&image)?;
    let warm = decoded(scratch, "faults-zstd", 0..BYTES)?;
    single::measure(scratch, &warm, &flat, report)?;
    let pager = Pager::start(PagerConfig::standard())?;
    in_order(scratch, &pager, &warm, &flat, report)?;
    wake::measure(scratch, &pager, &flat, report)?;
    tracking(&pager, &warm, report)?;
    scan(report)?;
    ready::measure(report)
}

/// An image of which nothing is decoded.
fn cold(scratch: &Scratch, name: &str) -> Result<Arc<Stored>> {
    let config = Config { frame_cache_bytes: 1 << 30, ..Config::STANDARD };
    let store = Store::open(&scratch.path(name), config)?;
    Ok(Arc::new(Stored(store.snapshot(&"vm".parse()?)?.image(&ImageName::Memory)?)))
}

/// The same with a part decoded and checked.
fn decoded(scratch: &Scratch, name: &str, range: std::ops::Range<u64>) -> Result<Arc<Stored>> {
    let source = cold(scratch, name)?;
    decode(&source, range)?;
    Ok(source)
}

fn decode(source: &Stored, range: std::ops::Range<u64>) -> Result<()> {
    let mut pieces = Vec::new();
    for at in (range.start..range.end).step_by(1 << 20) {
        pieces.clear();
        let end = range.end.min(at + (1 << 20));
        source.pieces(at..end, Effort::All, &mut pieces).map_err(anyhow::Error::from_boxed)?;
    }
    Ok(())
}

/// Pages with content, none twice, in no order.
fn scattered(source: &Stored, count: usize) -> Result<Vec<u64>> {
    let mut random = Random::new(3);
    let mut seen = std::collections::HashSet::new();
    let mut pages = Vec::new();
    while pages.len() < count {
        let page = random.below(PAGES);
        let extent = source.0.extent_at(page * PAGE_BYTES)?;
        // One of a group, so that a cold one is never in a frame that was decoded for another.
        if extent.source != dormouse_image::map::Source::Zero && seen.insert(page / 32) {
            pages.push(page);
        }
    }
    Ok(pages)
}

fn quantile(times: &mut [f64], part: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
    let index = (times.len() as f64 * part) as usize;
    times[index.min(times.len() - 1)]
}

/// Some of an image.
fn at(start: u64, len: u64, flat: &[u8]) -> &[u8] {
    let start = usize::try_from(start).unwrap_or(usize::MAX);
    &flat[start..start + usize::try_from(len).unwrap_or(usize::MAX)]
}

/// Installs all of some ranges in windows, and nothing else.
fn bulk(ranges: &[std::ops::Range<u64>], flat: &[u8]) -> Result<f64> {
    let (memory, uffd) = observed(BYTES, Register::MissingAndProtected)?;
    let base = memory.addresses().start;
    seconds(|| {
        for range in ranges {
            for start in (range.start..range.end).step_by(usize::try_from(WINDOW)?) {
                let content = at(start, WINDOW.min(range.end - start), flat);
                let copied = uffd.copy(base + start, content, Protection::Protected);
                ensure!(copied.stop.is_none(), "{copied:?}");
            }
        }
        Ok(())
    })
}

fn in_order(
    scratch: &Scratch,
    pager: &Pager,
    warm: &Arc<Stored>,
    flat: &[u8],
    report: &mut Report,
) -> Result<()> {
    let pages = ORDER / PAGE_BYTES;
    let touch = |source: Arc<Stored>| -> Result<f64> {
        let guest = Guest::wake(pager, source, VmConfig::STANDARD)?;
        let took = guest.read(0..pages)?;
        pager.release(&guest.vm);
        Ok(ORDER as f64 / took)
    };
    let pair = pairs(
        FEW_ROUNDS,
        || touch(Arc::clone(warm)),
        || {
            let all = 0..ORDER;
            Ok(ORDER as f64 / bulk(std::slice::from_ref(&all), flat)?)
        },
    )?;
    report.row(
        Row::new("touched in order, decoded", Value::BytesPerSecond(pair.ours))
            .paired("bulk copy, same windows", Value::BytesPerSecond(pair.other), pair.ratio)
            .bar(Bar::RatioAtLeast(0.7)),
    );
    for name in ["faults-lz4", "faults-zstd"] {
        let pair = pairs(
            FEW_ROUNDS,
            || touch(cold(scratch, name)?),
            || {
                let source = cold(scratch, name)?;
                Ok(ORDER as f64 / seconds(|| decode(&source, 0..ORDER))?)
            },
        )?;
        report.row(
            Row::new(format!("touched in order, cold, {name}"), Value::BytesPerSecond(pair.ours))
                .paired("decoding alone", Value::BytesPerSecond(pair.other), pair.ratio),
        );
    }
    Ok(())
}

fn tracking(pager: &Pager, warm: &Arc<Stored>, report: &mut Report) -> Result<()> {
    let pages = scattered(warm, SINGLE)?;
    let config = VmConfig { window_bytes: PAGE_BYTES, tracking: Tracking::Exact };
    let (mut firsts, mut missing, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..FEW_ROUNDS {
        let guest = Guest::wake(pager, Arc::clone(warm) as _, config)?;
        let first = quantile(&mut guest.latencies(&pages, false)?, 0.5);
        let write = quantile(&mut guest.latencies(&pages, true)?, 0.5);
        // Sealing waits for answers that are under way.
        let capture = guest.vm.seal()?;
        let dirty = capture.changes().dirty.len();
        ensure!(dirty == SINGLE as u64, "{dirty} pages are dirty, not {SINGLE}");
        drop(capture);
        missing.push(first);
        firsts.push(write);
        ratios.push(write / first);
        pager.release(&guest.vm);
    }
    report.row(
        Row::new("first write to a page that is there, p50", Value::Seconds(median(firsts)))
            .paired("missing fault", Value::Seconds(median(missing)), median(ratios))
            .bar(Bar::RatioAtMost(2.0)),
    );
    // A fifth of memory dirty, in runs of 1 to 24 pages.
    let guest = Guest::wake(pager, Arc::clone(warm) as _, VmConfig::STANDARD)?;
    let mut random = Random::new(9);
    let mut dirty = Vec::new();
    for _ in 0..PAGES / 60 {
        let (first, count) = (random.below(PAGES - 32), random.below(24) + 1);
        dirty.extend(first..first + count);
    }
    dirty.sort_unstable();
    dirty.dedup();
    guest.latencies(&dirty, true)?;
    let base = guest.memory.addresses().start;
    let mut runs = Vec::new();
    guest.vm.pages().for_each_run(0..PAGES, &mut |run, state| {
        if state == PageState::Dirty {
            runs.push(base + run.start * PAGE_BYTES..base + run.end * PAGE_BYTES);
        }
    });
    let bare = |protection| -> Result<()> {
        runs.iter().try_for_each(|run| {
            let done = guest.copy.protect(run, protection);
            done.map_err(|stop| anyhow::anyhow!("cannot protect: {stop:?}"))
        })
    };
    let pair = pairs(
        FEW_ROUNDS,
        || {
            bare(Protection::Writable)?;
            let begin = Instant::now();
            let capture = guest.vm.seal()?;
            let took = begin.elapsed().as_secs_f64();
            ensure!(capture.changes().dirty.len() == dirty.len() as u64, "other pages are dirty");
            // Dropped, everything counts as dirty again.
            Ok(took)
        },
        || {
            bare(Protection::Writable)?;
            seconds(|| bare(Protection::Protected))
        },
    )?;
    let what = format!("re-arming {} dirty pages in {} runs", dirty.len(), runs.len());
    report.row(
        Row::new(what, Value::Seconds(pair.ours))
            .paired("bare ioctls", Value::Seconds(pair.other), pair.ratio)
            .bar(Bar::RatioAtMost(1.2)),
    );
    pager.release(&guest.vm);
    Ok(())
}

/// Of 1 GiB every fourth page is there, in runs of 16.
fn scan(report: &mut Report) -> Result<()> {
    let memory = Mapping::anonymous(1 << 30, PageSize::Small)?;
    for run in (0..1 << 30).step_by(64 * 4096) {
        for page in 0..16 {
            memory.bytes()[run + page * 4096].store(1, Ordering::Relaxed);
        }
    }
    let tables = PageMap::of(std::process::id())?;
    let mut times = Vec::new();
    for _ in 0..FEW_ROUNDS {
        let mut runs = 0;
        let count = &mut |_, _| runs += 1;
        times.push(seconds(|| Ok(tables.scan(memory.addresses(), Wanted::OWN, count)?))?);
        ensure!(runs == 4096, "{runs} runs");
    }
    let what = "PAGEMAP_SCAN of 1 GiB, 4,096 runs";
    report.row(Row::new(what, Value::Seconds(median(times))).bar(Bar::AtMost(5e-3)));
    Ok(())
}
