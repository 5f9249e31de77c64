//! Going to the background: the command starts itself again, without a terminal, and returns when
//! that process says that it is ready.
//!
//! The new process has a pipe for its standard input and writes a word to it when it is ready. Until
//! then it has our standard output and error, so that what it prints and why it fails is seen; after
//! that it has neither, or whoever waits for the end of our output would wait for ever.

use std::env;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};

use crate::app::App;
use crate::output::stream::Out;

/// Set for the process in the background, to nothing of interest.
pub(crate) const VARIABLE: &str = "DORMOUSE_IN_BACKGROUND";

/// The program that runs, also when its file was replaced.
pub(crate) const OURSELVES: &str = "/proc/self/exe";

const READY: &[u8] = b"ready";

/// What a verb does that was asked to go to the background.
#[derive(Debug)]
pub(crate) enum Side {
    /// The work is done by another process, and this is how starting it went.
    Started(ExitCode),

    /// This is the process that does the work.
    Here(Ready),
}

/// Something to be called when this process is ready.
#[derive(Debug)]
pub(crate) struct Ready {
    is_in_background: bool,
}

/// Goes to the background if `is_wanted`.
pub(crate) fn split(is_wanted: bool) -> Result<Side> {
    let is_in_background = env::var_os(VARIABLE).is_some();
    if !is_wanted || is_in_background {
        if is_in_background {
            // It must not be stopped with what it was started from. Failing means that it leads
            // a session already.
            let _ = rustix::process::setsid();
        }
        return Ok(Side::Here(Ready { is_in_background }));
    }
    let (mut reader, writer) = io::pipe().context("cannot make a pipe")?;
    let mut command = Command::new(OURSELVES);
    command
        .arg0(env::args_os().next().as_deref().unwrap_or(OsStr::new("dormouse")))
        .args(env::args_os().skip(1))
        .env(VARIABLE, "")
        .stdin(Stdio::from(writer));
    let mut child = command.spawn().context("cannot start a process in the background")?;
    // Its end of the pipe must be the only one.
    drop(command);
    let mut said = Vec::new();
    reader.by_ref().take(READY.len() as u64).read_to_end(&mut said)?;
    if said == READY {
        return Ok(Side::Started(ExitCode::SUCCESS));
    }
    let status = child.wait().context("cannot wait for the process in the background")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    Ok(Side::Started(ExitCode::from(code)))
}

impl Ready {
    /// Says that the work has begun, and lets go of the terminal. The log goes to `log` from now on,
    /// if that is given.
    pub(crate) fn tell(self, app: &mut App, log: Option<&Path>) -> Result<()> {
        app.out.finish()?;
        let log = log
            .map(|path| {
                let opened = OpenOptions::new().append(true).create(true).open(path);
                opened.with_context(|| format!("cannot open {}", path.display()))
            })
            .transpose()?;
        if !self.is_in_background {
            return match log {
                Some(log) => Ok(rustix::stdio::dup2_stderr(log)?),
                None => Ok(()),
            };
        }
        rustix::io::write(io::stdin(), READY).context("cannot say that it is ready")?;
        let nothing = File::options().read(true).write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdin(&nothing)?;
        rustix::stdio::dup2_stdout(&nothing)?;
        rustix::stdio::dup2_stderr(log.as_ref().unwrap_or(&nothing))?;
        app.out = Out::stdout();
        Ok(())
    }
}
