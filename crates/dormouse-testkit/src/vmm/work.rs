//! The threads of a small VMM, and the one that sees whether they get on.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::config::Mix;
use super::content::{PAGE_WORDS, page_sum};
use super::cpu::Cpu;
use super::gate::Gate;
use super::memory::Memory;
use super::oracle::{Check, Oracle};
use super::process::{EXIT_HANG, EXIT_SETUP, EXIT_WRONG_BYTE, fail};
use super::protocol::{Access, Report, Touched};
use crate::sim_disk::random::SplitMix64;

/// Pages given back at once, at most.
const GIVE_BACK_PAGES_MAX: u64 = 64;

/// How often the threads are looked after.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What a thread is to do.
#[derive(Debug)]
pub(super) enum Job {
    Operations(u64),
    Until(Instant),
    Touch(Vec<u64>, Access),
    Verify(Range<u64>),
    Sum(Range<u64>),
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Outcome {
    Worked(Report),
    Touched(Report, Touched),
    Sum(u64),
}

/// What all threads share.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(super) seed: u64,
    pub(super) variation: u64,
    pub(super) mix: Mix,
    pub(crate) memory: Memory,
    pub(crate) oracle: Oracle,
    pub(super) gate: Gate,
    pub(super) started: Instant,
    /// For each thread when its access began, in milliseconds since the start, plus one; 0 if it
    /// is in none.
    pub(super) accesses: Vec<AtomicU64>,
    /// And of which page.
    pub(super) accessed: Vec<AtomicU64>,
}

impl Guest {
    /// An access to a page by thread `number`, under the eye of the watch.
    fn access<T>(&self, number: usize, page: u64, access: impl FnOnce(&Guest) -> T) -> T {
        self.accessed[number].store(page, Ordering::Relaxed);
        self.accesses[number].store(self.now_ms() + 1, Ordering::Release);
        let result = access(self);
        self.accesses[number].store(0, Ordering::Release);
        result
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Ends the process when an access takes too long.
    pub(super) fn watch(&self, hang_ms: u64) -> ! {
        loop {
            thread::sleep(LOOK_EVERY);
            for (number, access) in self.accesses.iter().enumerate() {
                let since = access.load(Ordering::Acquire);
                let now = self.now_ms() + 1;
                if since != 0 && now.saturating_sub(since) > hang_ms {
                    let page = self.accessed[number].load(Ordering::Relaxed);
                    fail(
                        EXIT_HANG,
                        &format!("thread {number} has waited for page {page} for {hang_ms} ms"),
                    );
                }
            }
        }
    }
}

/// A thread.
#[derive(Debug)]
pub(super) struct Worker {
    guest: Arc<Guest>,
    cpu: Cpu,
    number: usize,
    random: SplitMix64,
    last_page: u64,
    last_write: u32,
    report: Report,
}

impl Worker {
    pub(super) fn new(guest: Arc<Guest>, cpu: Cpu, number: usize) -> Worker {
        let random = SplitMix64::new(guest.seed ^ guest.variation ^ (number as u64 + 1) << 40);
        let last_write = guest.oracle.last_write(number);
        Worker { guest, cpu, number, random, last_page: 0, last_write, report: Report::default() }
    }

    /// Does jobs until there can be none any more.
    pub(super) fn run(mut self, jobs: &Receiver<Job>, outcomes: &Sender<Outcome>) {
        while let Ok(job) = jobs.recv() {
            self.guest.gate.enter();
            let outcome = self.work(job);
            self.guest.gate.leave();
            if outcomes.send(outcome).is_err() {
                return;
            }
        }
    }

    fn work(&mut self, job: Job) -> Outcome {
        self.report = Report::default();
        match job {
            Job::Operations(count) => {
                for _ in 0..count {
                    self.operation();
                }
            }
            Job::Until(end) => {
                while Instant::now() < end {
                    self.operation();
                }
            }
            Job::Touch(pages, access) => {
                let touched = self.touch(&pages, access);
                return Outcome::Touched(self.report, touched);
            }
            Job::Verify(pages) => {
                for page in pages {
                    self.read(page);
                }
            }
            Job::Sum(pages) => return Outcome::Sum(self.sum(pages)),
        }
        Outcome::Worked(self.report)
    }

    fn operation(&mut self) {
        self.guest.gate.pass();
        self.report.operations += 1;
        let page = self.choose();
        let mix = self.guest.mix;
        let mut drawn = self.random.next() % u64::from(mix.total());
        let mut is = |weight: u32| {
            let chosen = drawn < u64::from(weight);
            drawn = drawn.wrapping_sub(u64::from(weight));
            chosen
        };
        if is(mix.read) {
            self.read(page);
        } else if is(mix.kernel_read) {
            self.kernel_read(page);
        } else if is(mix.write) {
            self.write(page);
        } else if is(mix.fill) {
            self.fill(page, false);
        } else if is(mix.fill_zero) {
            self.fill(page, true);
        } else {
            self.give_back(page);
        }
    }

    /// Half of all accesses anywhere, a quarter in a sixteenth of memory, a quarter near the last.
    fn choose(&mut self) -> u64 {
        let pages = self.guest.oracle.pages();
        let drawn = self.random.next();
        self.last_page = match self.random.next() % 4 {
            0 | 1 => drawn % pages,
            2 => drawn % (pages / 16).max(1),
            _ => (self.last_page + drawn % 8) % pages,
        };
        self.last_page
    }

    fn read(&mut self, page: u64) {
        let cpu = &mut self.cpu;
        let check = self.guest.access(self.number, page, |guest| {
            guest.oracle.check(page, |words| sound(cpu.read(&guest.memory, page, words)))
        });
        self.judge(page, check, "read");
    }

    fn kernel_read(&mut self, page: u64) {
        let check = self.guest.access(self.number, page, |guest| {
            guest.oracle.check(page, |words| sound(guest.memory.kernel_read(page, words)))
        });
        self.judge(page, check, "read by the kernel");
    }

    fn judge(&mut self, page: u64, check: Check, how: &str) {
        self.report.reads += 1;
        match check {
            Check::Right => {}
            Check::Changed => self.report.unjudged += 1,
            Check::Wrong(wrong) => {
                let address = self.guest.memory.address(page) + wrong.word as u64 * 8;
                let number = self.number;
                fail(
                    EXIT_WRONG_BYTE,
                    &format!(
                        "wrong bytes in page {page}, word {} (address {address:#x}), {how} by \
                         thread {number}: got {:#018x}, expected {:#018x}",
                        wrong.word, wrong.got, wrong.expected
                    ),
                );
            }
        }
    }

    fn write(&mut self, page: u64) {
        self.last_write = self.last_write.wrapping_add(2).max(2);
        let (lane, number) = (self.number, self.last_write);
        let cpu = &mut self.cpu;
        let written = self.guest.access(self.number, page, |guest| {
            let store = |word, value| sound(cpu.write(&guest.memory, page, word, value));
            guest.oracle.write(page, lane, number, store)
        });
        self.report.writes += u64::from(written);
    }

    fn fill(&mut self, page: u64, zero: bool) {
        if self.guest.oracle.try_alone(page) {
            self.guest.access(self.number, page, |guest| {
                guest.oracle.fill(page, zero, guest.memory.words(page));
            });
            self.guest.oracle.leave(page);
            self.report.fills += 1;
        }
    }

    fn give_back(&mut self, page: u64) {
        let wanted = self.random.next() % GIVE_BACK_PAGES_MAX + 1;
        let wanted = self.guest.memory.units_around(page, wanted);
        let oracle = &self.guest.oracle;
        // As many as are free, but only whole pages of the region.
        let free = wanted.clone().take_while(|page| oracle.try_alone(*page)).count() as u64;
        let taken = wanted.start..wanted.start + free;
        let given = taken.start..taken.end - free % self.guest.memory.unit_pages(page);
        if !given.is_empty() {
            let result = self.guest.access(self.number, given.start, |guest| {
                guest.oracle.give_back(given.clone(), || guest.memory.give_back(given.clone()))
            });
            if let Err(error) = result {
                fail(EXIT_SETUP, &format!("{error:#}"));
            }
            self.report.given_back += given.end - given.start;
        }
        taken.for_each(|page| self.guest.oracle.leave(page));
    }

    fn touch(&mut self, pages: &[u64], access: Access) -> Touched {
        let mut latencies_ns = Vec::with_capacity(pages.len());
        let start = Instant::now();
        for &page in pages {
            self.guest.gate.pass();
            let before = Instant::now();
            match access {
                Access::Read => {
                    let cpu = &mut self.cpu;
                    self.guest.access(self.number, page, |guest| {
                        sound(cpu.read(&guest.memory, page, &mut [0]));
                        guest.oracle.note_touched(page);
                    });
                    latencies_ns.push(nanoseconds(before.elapsed()));
                    self.read(page);
                }
                Access::Write => {
                    self.write(page);
                    latencies_ns.push(nanoseconds(before.elapsed()));
                }
            }
        }
        Touched { elapsed_ns: nanoseconds(start.elapsed()), latencies_ns }
    }

    fn sum(&mut self, pages: Range<u64>) -> u64 {
        pages.fold(0, |sum: u64, page| {
            let (cpu, mut words) = (&mut self.cpu, [0; PAGE_WORDS]);
            self.guest.access(self.number, page, |guest| {
                sound(cpu.read(&guest.memory, page, &mut words));
            });
            sum.wrapping_add(page_sum(page, |word| words[word]))
        })
    }
}

/// Ends the process where an access was refused: memory is always there.
fn sound(accessed: anyhow::Result<()>) {
    if let Err(error) = accessed {
        fail(EXIT_WRONG_BYTE, &format!("{error:#}"));
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
