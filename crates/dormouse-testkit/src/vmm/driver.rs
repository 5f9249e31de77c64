//! A small VMM as its test sees it.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command as Program, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::config::{Backing, Config};
use super::content::{checksum, image};
use super::process::ASKED;
use super::protocol::{Access, Answer, Command, PageRun, RegionAddress, Report, Touched, Work};

/// A process with a small VMM; killed when dropped.
#[derive(Debug)]
pub struct SmallVmm {
    child: Child,
    control: BufReader<UnixStream>,
    stderr: Option<JoinHandle<String>>,
    regions: Vec<RegionAddress>,
}

/// How a small VMM ended. As an error: it was not asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code, unless a signal ended it.
    pub code: Option<i32>,

    /// The signal.
    pub signal: Option<i32>,

    /// What it said last.
    pub message: String,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "the small VMM exited with {code}: {}", self.message),
            (None, Some(signal)) => write!(f, "signal {signal} ended the small VMM"),
            (None, None) => write!(f, "the small VMM ended"),
        }
    }
}

impl std::error::Error for Ended {}

impl SmallVmm {
    /// Starts one, and returns when its memory is there and its handshake sent. Nobody needs to
    /// have answered that.
    ///
    /// An [`Ended`] where it could not be made, as in all that follows.
    pub fn spawn(config: &Config) -> Result<SmallVmm> {
        config.check()?;
        let (ours, theirs) = UnixStream::pair()?;
        let program = std::env::current_exe().context("a program without a file")?;
        let mut child = Program::new(&program)
            .args(["small_vmm_process", "--nocapture", "--test-threads=1"])
            .env(ASKED, "1")
            .stdin(OwnedFd::from(theirs))
            // What a test runner says is of no use.
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut stderr = child.stderr.take().context("stderr was piped")?;
        let stderr = std::thread::spawn(move || {
            let mut text = Vec::new();
            match stderr.read_to_end(&mut text) {
                Ok(_) => String::from_utf8_lossy(&text).into_owned(),
                Err(error) => format!("(its words cannot be read: {error})"),
            }
        });
        let (control, stderr) = (BufReader::new(ours), Some(stderr));
        let mut vmm = SmallVmm { child, control, stderr, regions: Vec::new() };
        match vmm.say(config)? {
            Answer::Ready(regions) => vmm.regions = regions,
            other => bail!("instead of being ready it says {other:?}"),
        }
        Ok(vmm)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its memory is.
    pub fn regions(&self) -> &[RegionAddress] {
        &self.regions
    }

    /// Works for `operations` of all threads together, and waits for them.
    pub fn run(&mut self, operations: u64) -> Result<Report> {
        self.start(operations)?;
        self.idle()
    }

    /// Works for some time, and waits for the end of it.
    pub fn run_for(&mut self, time: Duration) -> Result<Report> {
        self.start_for(time)?;
        self.idle()
    }

    /// Works for `operations`, and does not wait.
    pub fn start(&mut self, operations: u64) -> Result<()> {
        self.done(&Command::Start(Work::Operations(operations)))
    }

    /// Works for some time, and does not wait.
    pub fn start_for(&mut self, time: Duration) -> Result<()> {
        let ms = u64::try_from(time.as_millis())?;
        self.done(&Command::Start(Work::Milliseconds(ms)))
    }

    /// Waits until all threads are done; what they did since the start. Not while paused.
    pub fn idle(&mut self) -> Result<Report> {
        self.report(&Command::Idle)
    }

    /// Stops all threads between two operations: memory stands still from then on.
    pub fn pause(&mut self) -> Result<()> {
        self.done(&Command::Pause)
    }

    /// Lets them go on.
    pub fn resume(&mut self) -> Result<()> {
        self.done(&Command::Resume)
    }

    /// Reads pages one after the other, and checks them. Work under way is waited for first.
    pub fn touch(&mut self, pages: &[u64]) -> Result<Touched> {
        self.touch_with(pages, Access::Read)
    }

    /// Touches pages one after the other.
    pub fn touch_with(&mut self, pages: &[u64], access: Access) -> Result<Touched> {
        match self.ask(&Command::Touch { pages: pages.to_vec(), access })? {
            Answer::Touched(touched) => Ok(touched),
            other => bail!("asked to touch pages, it says {other:?}"),
        }
    }

    /// Reads and checks all of memory, on all threads.
    pub fn verify(&mut self) -> Result<Report> {
        self.report(&Command::Verify)
    }

    /// Sums all of memory up, as [`checksum`] does. Touches all of it.
    pub fn checksum(&mut self) -> Result<u64> {
        match self.ask(&Command::Checksum)? {
            Answer::Checksum(sum) => Ok(sum),
            other => bail!("asked for a sum, it says {other:?}"),
        }
    }

    /// What happened to its pages since the last mark, in runs. Touches no memory.
    pub fn pages(&mut self) -> Result<Vec<PageRun>> {
        match self.ask(&Command::Pages)? {
            Answer::Pages(runs) => Ok(runs),
            other => bail!("asked for its pages, it says {other:?}"),
        }
    }

    /// Forgets what happened to pages.
    pub fn mark(&mut self) -> Result<()> {
        self.done(&Command::Mark)
    }

    /// Writes what memory must be to a flat file. For a VMM that is paused or idle; touches no
    /// memory.
    pub fn write_expected(&mut self, path: &Path) -> Result<()> {
        self.done(&Command::WriteExpected(path.to_owned()))
    }

    /// Ends it, and says what it did.
    pub fn quit(mut self) -> Result<Report> {
        let report = self.report(&Command::Quit)?;
        match self.wait()? {
            Ended { code: Some(0), .. } => Ok(report),
            ended => Err(ended.into()),
        }
    }

    /// Waits until it ends by itself.
    pub fn wait(mut self) -> Result<Ended> {
        let status = self.child.wait()?;
        Ok(self.ended(status))
    }

    /// Ends it as a power cut would.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn done(&mut self, command: &Command) -> Result<()> {
        match self.ask(command)? {
            Answer::Done => Ok(()),
            other => bail!("instead of being done it says {other:?}"),
        }
    }

    fn report(&mut self, command: &Command) -> Result<Report> {
        match self.ask(command)? {
            Answer::Report(report) => Ok(report),
            other => bail!("instead of a report it says {other:?}"),
        }
    }

    fn ask(&mut self, command: &Command) -> Result<Answer> {
        match self.say(command)? {
            Answer::Failed(why) => bail!("the small VMM cannot: {why}"),
            answer => Ok(answer),
        }
    }

    /// Says a line and hears the answer, or how it ended.
    fn say(&mut self, line: &impl serde::Serialize) -> Result<Answer> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        // Where it has ended, that is what there is to say, not how we came to know.
        let said = self.control.get_mut().write_all(&text);
        let mut answer = String::new();
        let heard = said.and_then(|()| self.control.read_line(&mut answer));
        match heard {
            Ok(1..) => Ok(serde_json::from_str(&answer)?),
            Ok(0) | Err(_) => {
                let status = self.child.wait()?;
                Err(self.ended(status).into())
            }
        }
    }

    fn ended(&mut self, status: ExitStatus) -> Ended {
        let text = self.stderr.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
        Ended { code: status.code(), signal: status.signal(), message: text.trim().to_owned() }
    }
}

impl Drop for SmallVmm {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Sees that this binary can be started as a small VMM, and works.
pub fn check_hook() -> Result<()> {
    let config = Config::small(1, 256, Backing::Own);
    let mut vmm = SmallVmm::spawn(&config)?;
    let before = checksum(config.pages(), image(config.seed, config.pages()));
    anyhow::ensure!(vmm.checksum()? == before, "memory is not the image");
    let report = vmm.run(2000)?;
    anyhow::ensure!(report.operations == 2000, "{report:?}");
    anyhow::ensure!(vmm.checksum()? != before, "memory is still the image");
    vmm.verify()?;
    vmm.quit()?;
    Ok(())
}
