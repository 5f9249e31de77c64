//! The process of a small VMM: takes commands, sets threads to work, answers.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::config::{Backing, Config, Cpus};
use super::cpu::Cpu;
use super::gate::Gate;
use super::memory::Memory;
use super::oracle::{GIVEN_BACK, Oracle, TOUCHED, WRITTEN};
use super::protocol::{Access, Answer, Command, PageRun, Report, Touched, Work};
use super::send::hand_over;
use super::work::{Guest, Job, Outcome, Worker};

/// Memory was not what it must be.
pub const EXIT_WRONG_BYTE: i32 = 3;
/// An access was not answered.
pub const EXIT_HANG: i32 = 4;
/// The VMM could not be made, or its memory not handed over.
pub const EXIT_SETUP: i32 = 5;

/// Set for a process that is to be a small VMM.
pub(super) const ASKED: &str = "DORMOUSE_SMALL_VMM";

/// Becomes a small VMM and never returns, if this process was started as one.
///
/// Its configuration and commands come on standard input, which its starter made a socket.
pub fn run_if_asked() {
    if std::env::var_os(ASKED).is_some() {
        let run = || {
            let control = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
            run_by_hand(control.try_clone()?, control)
        };
        match run() {
            Ok(()) => std::process::exit(0),
            Err(error) => fail(EXIT_SETUP, &format!("{error:#}")),
        }
    }
}

/// Is a small VMM: takes its configuration as the first line of `input` and commands as the
/// following ones, and writes a line for each to `output`. All are JSON.
///
/// Does not return where memory turns out to be wrong: the process ends.
pub fn run_by_hand(input: impl Read, output: impl Write) -> Result<()> {
    let mut lines = BufReader::new(input).lines();
    let mut output = BufWriter::new(output);
    let mut answer = |answer: &Answer| -> Result<()> {
        serde_json::to_writer(&mut output, answer)?;
        output.write_all(b"\n")?;
        output.flush().map_err(Into::into)
    };
    let config = lines.next().context("no configuration")??;
    let config: Config = serde_json::from_str(&config).context("not a configuration")?;
    let mut vmm = Vmm::start(&config)?;
    answer(&Answer::Ready(vmm.guest.memory.addresses()))?;
    // The end of the input is the end of who gave it.
    for line in lines {
        let command = serde_json::from_str(&line?).context("not a command")?;
        let is_end = matches!(command, Command::Quit);
        let done = vmm.obey(command);
        answer(&done.unwrap_or_else(|error| Answer::Failed(format!("{error:#}"))))?;
        if is_end {
            break;
        }
    }
    Ok(())
}

/// Ends the process with a message on standard error. The first who fails is heard.
pub(crate) fn fail(code: i32, message: &str) -> ! {
    static FIRST: Mutex<()> = Mutex::new(());
    let _first = FIRST.lock().unwrap_or_else(PoisonError::into_inner);
    // Nothing can be done if nobody listens; the code says it as well.
    drop(writeln!(std::io::stderr(), "small-vmm: {message}"));
    std::process::exit(code)
}

pub(crate) struct Vmm {
    pub(crate) guest: Arc<Guest>,
    jobs: Vec<Sender<Job>>,
    outcomes: Receiver<Outcome>,
    pending: usize,
    total: Report,
    // Firecracker keeps both as long as it lives.
    _held: Box<dyn std::any::Any + Send>,
}

impl Vmm {
    fn start(config: &Config) -> Result<Vmm> {
        Vmm::start_from(config, None)
    }

    /// One whose memory is not the image any more but what another one's oracle knew.
    pub(crate) fn start_from(config: &Config, oracle: Option<&[u8]>) -> Result<Vmm> {
        config.check()?;
        let (memory, uffd) = Memory::map(config)?;
        let socket = match (&config.backing, &uffd) {
            (Backing::Uffd { socket, version, manner }, Some(uffd)) => {
                hand_over(socket, *version, *manner, &memory.addresses(), uffd)?
            }
            _ => None,
        };
        let known = Oracle::new(config.seed, config.pages());
        if let Some(saved) = oracle {
            known.restore(saved)?;
        }
        let guest = Arc::new(Guest {
            seed: config.seed,
            variation: config.variation,
            mix: config.mix,
            memory,
            oracle: known,
            gate: Gate::default(),
            started: Instant::now(),
            accesses: (0..config.threads).map(|_| AtomicU64::new(0)).collect(),
            accessed: (0..config.threads).map(|_| AtomicU64::new(0)).collect(),
        });
        let cpus = match config.cpus {
            Cpus::Threads => (0..config.threads).map(|_| Cpu::Thread).collect(),
            Cpus::Kvm => Cpu::virtual_ones(&guest.memory, config.threads)?,
        };
        let (to_us, outcomes) = channel();
        let mut jobs = Vec::new();
        for (number, cpu) in cpus.into_iter().enumerate() {
            let (sender, receiver) = channel();
            jobs.push(sender);
            let worker = Worker::new(Arc::clone(&guest), cpu, number);
            let to_us = to_us.clone();
            thread::Builder::new().name(format!("guest-{number}")).spawn(move || {
                let run = AssertUnwindSafe(|| worker.run(&receiver, &to_us));
                if std::panic::catch_unwind(run).is_err() {
                    fail(EXIT_SETUP, "a thread of the guest panicked");
                }
            })?;
        }
        let (watched, hang_ms) = (Arc::clone(&guest), config.hang_ms);
        thread::Builder::new().name("watch".to_owned()).spawn(move || watched.watch(hang_ms))?;
        let held = Box::new((uffd, socket));
        Ok(Vmm { guest, jobs, outcomes, pending: 0, total: Report::default(), _held: held })
    }

    pub(super) fn obey(&mut self, command: Command) -> Result<Answer> {
        match command {
            Command::Start(work) => {
                self.start_work(work)?;
                return Ok(Answer::Done);
            }
            Command::Pause => {
                self.guest.gate.pause();
                return Ok(Answer::Done);
            }
            Command::Resume => {
                self.guest.gate.resume();
                return Ok(Answer::Done);
            }
            Command::Pages => return Ok(Answer::Pages(self.pages())),
            Command::Mark => {
                self.guest.oracle.mark();
                return Ok(Answer::Done);
            }
            Command::WriteExpected(path) => {
                self.write_expected(&path)?;
                return Ok(Answer::Done);
            }
            Command::Quit => return Ok(Answer::Report(self.total)),
            Command::Idle | Command::Touch { .. } | Command::Verify | Command::Checksum => {}
        }
        anyhow::ensure!(!self.guest.gate.paused(), "the VMM is paused");
        self.finish()?;
        match command {
            Command::Touch { pages, access } => {
                let end = self.guest.oracle.pages();
                let beyond = pages.iter().find(|page| **page >= end);
                anyhow::ensure!(beyond.is_none(), "page {beyond:?} is beyond memory");
                self.give(0, Job::Touch(pages, access))?;
                let (_, touched) = self.finish()?;
                Ok(Answer::Touched(touched.context("one thread touched pages")?))
            }
            Command::Verify => {
                self.divide(Job::Verify)?;
                self.finish()?;
                Ok(Answer::Report(self.total))
            }
            Command::Checksum => {
                self.divide(Job::Sum)?;
                Ok(Answer::Checksum(self.finish()?.0))
            }
            _ => Ok(Answer::Report(self.total)),
        }
    }

    /// Does some operations, and waits for them.
    pub(crate) fn work(&mut self, operations: u64) -> Result<()> {
        self.start_work(Work::Operations(operations))?;
        self.finish()?;
        Ok(())
    }

    /// Reads some pages one by one and checks them; what each first access took.
    pub(crate) fn touch(&mut self, pages: Vec<u64>) -> Result<Touched> {
        match self.obey(Command::Touch { pages, access: Access::Read })? {
            Answer::Touched(touched) => Ok(touched),
            other => anyhow::bail!("touching pages ended with {other:?}"),
        }
    }

    /// Reads and checks all of memory.
    pub(crate) fn verify(&mut self) -> Result<()> {
        self.obey(Command::Verify).map(drop)
    }

    fn start_work(&mut self, work: Work) -> Result<()> {
        let threads = self.jobs.len() as u64;
        for number in 0..self.jobs.len() {
            let job = match work {
                Work::Operations(count) => {
                    Job::Operations(count / threads + u64::from((number as u64) < count % threads))
                }
                Work::Milliseconds(ms) => Job::Until(Instant::now() + Duration::from_millis(ms)),
            };
            self.give(number, job)?;
        }
        Ok(())
    }

    fn give(&mut self, number: usize, job: Job) -> Result<()> {
        self.jobs[number].send(job).context("a thread has ended")?;
        self.pending += 1;
        Ok(())
    }

    /// Gives each thread a part of memory.
    fn divide(&mut self, job: fn(Range<u64>) -> Job) -> Result<()> {
        let (threads, pages) = (self.jobs.len() as u64, self.guest.oracle.pages());
        for number in 0..self.jobs.len() {
            let at = number as u64;
            self.give(number, job(pages * at / threads..pages * (at + 1) / threads))?;
        }
        Ok(())
    }

    /// Waits until all threads are done; the sum of sums, and what was touched.
    fn finish(&mut self) -> Result<(u64, Option<Touched>)> {
        let (mut sum, mut touched) = (0_u64, None);
        while self.pending > 0 {
            match self.outcomes.recv().context("all threads have ended")? {
                Outcome::Worked(report) => self.total += report,
                Outcome::Touched(report, pages) => {
                    self.total += report;
                    touched = Some(pages);
                }
                Outcome::Sum(part) => sum = sum.wrapping_add(part),
            }
            self.pending -= 1;
        }
        Ok((sum, touched))
    }

    fn pages(&self) -> Vec<PageRun> {
        let oracle = &self.guest.oracle;
        let mut runs: Vec<PageRun> = Vec::new();
        for page in 0..oracle.pages() {
            let history = oracle.history(page);
            let run = PageRun {
                first: page,
                pages: 1,
                written: history & WRITTEN != 0,
                given_back: history & GIVEN_BACK != 0,
                touched: history & TOUCHED != 0,
            };
            match runs.last_mut() {
                Some(last) if (PageRun { first: page, pages: 1, ..*last }) == run => {
                    last.pages += 1;
                }
                _ => runs.push(run),
            }
        }
        runs
    }

    fn write_expected(&self, path: &Path) -> Result<()> {
        let failed = || format!("cannot write {}", path.display());
        let mut file = BufWriter::new(File::create(path).with_context(failed)?);
        for page in 0..self.guest.oracle.pages() {
            file.write_all(&self.guest.oracle.expected(page)).with_context(failed)?;
        }
        file.flush().with_context(failed)
    }
}
