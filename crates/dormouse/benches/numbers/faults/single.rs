//! Pages that are touched one by one, here and there.
//!
//! What a fault costs depends on whether the guest's thread and the one that answers share a processor:
//! waking a thread of another one takes several times as long as all else. So both contenders are put
//! on the same processors, and each way is a row of its own.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use dormouse_live::pages::PAGE_BYTES;
use dormouse_serve::uffd::{Pager, PagerConfig, VmConfig};
use dormouse_sys::userfaultfd::{Event, MESSAGE_BYTES, Protection, Register, Userfaultfd};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::guest::{Guest, Stored, latencies, observed};
use super::{BYTES, SINGLE, WINDOW, at, cold, quantile, scattered};
use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{FEW_ROUNDS, median, pairs};
use crate::scratch::Scratch;

/// Where the guest's thread runs, and where those run that answer it.
#[derive(Debug)]
struct Places {
    title: &'static str,
    guest: String,
    server: String,
}

/// All that there are here.
fn places() -> Result<Vec<Places>> {
    let processors: Vec<String> = allowed()?
        .split(',')
        .flat_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let numbers = first.parse::<u32>().unwrap_or(0)..=last.parse::<u32>().unwrap_or(0);
            numbers.map(|number| number.to_string()).collect::<Vec<_>>()
        })
        .collect();
    let last = processors.last().context("no processors")?;
    let mut places =
        vec![Places { title: "one processor", guest: last.clone(), server: last.clone() }];
    if let [first, _, ..] = &processors[..] {
        places.push(Places { title: "two processors", guest: first.clone(), server: last.clone() });
    }
    Ok(places)
}

/// The processors of this thread, as a list.
fn allowed() -> Result<String> {
    let status = std::fs::read_to_string("/proc/thread-self/status")?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    Ok(list.context("no Cpus_allowed_list in /proc")?.trim().to_owned())
}

/// Puts this thread, and those that it starts from now on, on some processors.
fn stay_on(list: &str) -> Result<()> {
    let link = std::fs::read_link("/proc/thread-self")?;
    let thread = link.file_name().context("no thread in /proc")?;
    let mut taskset = Command::new("taskset");
    let output = taskset.args(["--cpu-list", "--pid", list]).arg(thread).output()?;
    ensure!(output.status.success(), "{taskset:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

pub(super) fn measure(
    scratch: &Scratch,
    warm: &Arc<Stored>,
    flat: &[u8],
    report: &mut Report,
) -> Result<()> {
    let pages = scattered(warm, SINGLE)?;
    let all = allowed()?;
    for places in places()? {
        stay_on(&places.server)?;
        let pager = Pager::start(PagerConfig::standard())?;
        for window in [PAGE_BYTES, WINDOW] {
            warm_faults(&pager, warm, flat, &pages, (&places, window), report)?;
        }
    }
    stay_on(&all)?;
    let pager = Pager::start(PagerConfig::standard())?;
    let config = VmConfig { window_bytes: PAGE_BYTES, ..VmConfig::STANDARD };
    for (name, limit) in [("faults-lz4", 100e-6), ("faults-zstd", 150e-6)] {
        let mut more = Vec::new();
        for _ in 0..FEW_ROUNDS {
            let median_of = |source: &Arc<Stored>| -> Result<f64> {
                let guest = Guest::wake(&pager, Arc::clone(source) as _, config)?;
                let mut times = guest.latencies(&pages, false)?;
                pager.release(&guest.vm);
                Ok(quantile(&mut times, 0.5))
            };
            let cold = median_of(&cold(scratch, name)?)?;
            more.push(cold - median_of(warm)?);
        }
        let what = format!("cold fault, {name}, p50 above a warm one");
        report.row(Row::new(what, Value::Seconds(median(more))).bar(Bar::AtMost(limit)));
    }
    Ok(())
}

/// Faults of pages that are decoded.
fn warm_faults(
    pager: &Pager,
    warm: &Arc<Stored>,
    flat: &[u8],
    pages: &[u64],
    (places, window): (&Places, u64),
    report: &mut Report,
) -> Result<()> {
    let ours = |part: f64| -> Result<f64> {
        stay_on(&places.guest)?;
        let config = VmConfig { window_bytes: window, ..VmConfig::STANDARD };
        let guest = Guest::wake(pager, Arc::clone(warm) as _, config)?;
        let mut times = guest.latencies(pages, false)?;
        pager.release(&guest.vm);
        Ok(quantile(&mut times, part))
    };
    let other = |part: f64| -> Result<f64> {
        let (memory, uffd) = observed(BYTES, Register::MissingAndProtected)?;
        let base = memory.addresses().start;
        stay_on(&places.server)?;
        let times = bare(&uffd, base, window, flat, || {
            stay_on(&places.guest)?;
            latencies(&memory, pages, false)
        });
        Ok(quantile(&mut times?, part))
    };
    for (name, part, limit) in [("p50", 0.5, 1.3), ("p99", 0.99, 2.0)] {
        let pair = pairs(FEW_ROUNDS, || ours(part), || other(part))?;
        let what = format!("warm fault, {} KiB, {}, {name}", window >> 10, places.title);
        let row = Row::new(what, Value::Seconds(pair.ours))
            .paired("bare poll and copy", Value::Seconds(pair.other), pair.ratio)
            .bar(Bar::RatioAtMost(limit));
        report.row(row);
    }
    Ok(())
}

/// A thread that polls, reads, and copies the window around each fault out of an image.
fn bare<T>(
    uffd: &Userfaultfd,
    base: u64,
    window: u64,
    flat: &[u8],
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut messages = [[0; MESSAGE_BYTES]; 16];
            while !done.load(Ordering::Relaxed) {
                let mut poll = [PollFd::new(uffd, PollFlags::IN)];
                let timeout = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
                let Ok(1..) = rustix::event::poll(&mut poll, Some(&timeout)) else { continue };
                let Ok(count) = uffd.read(&mut messages) else { return };
                for message in &messages[..count] {
                    if let Event::Fault { address, .. } = Event::parse(message) {
                        let start = (address - base) / window * window;
                        let content = at(start, window, flat);
                        let copied = uffd.copy(base + start, content, Protection::Protected);
                        assert!(copied.stop.is_none(), "{copied:?}");
                    }
                }
            }
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        result
    })
}
