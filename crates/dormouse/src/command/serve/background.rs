//! `--background`: the command starts itself again, waits until that one serves, and ends.
//!
//! The other one, `--detached`, gets pipes as standard output and error. What it prints until it
//! serves is passed on, and so is its exit code if it never does. Then it lets go of the pipes,
//! whose ends say that it is ready.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

use crate::app::App;
use crate::background::OURSELVES;
use crate::output::stream::Out;

/// Starts the same command line as a process of its own and returns when it serves or failed.
pub(super) fn start(app: &mut App) -> Result<ExitCode> {
    let mut arguments = std::env::args_os();
    let mut command = Command::new(OURSELVES);
    command.arg0(arguments.next().unwrap_or_else(|| OsString::from("dormouse")));
    command.args(detached(arguments));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start the background process")?;
    let (Some(mut stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
        bail!("the background process has no pipes");
    };
    let messages = thread::spawn(move || io::copy(&mut stderr, &mut io::stderr()));
    let mut announced = Vec::new();
    stdout.read_to_end(&mut announced).context("cannot listen to the background process")?;
    // What cannot be passed on to standard error cannot be told there either.
    let _ = messages.join();
    if !announced.is_empty() {
        app.out.write_all(&announced)?;
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait().context("cannot wait for the background process")?;
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(0) | None => bail!("the background process ended before it served: {status}"),
        Some(code) => Ok(ExitCode::from(code)),
    }
}

/// The arguments with `--background` exchanged. An export or file cannot be called that: the first
/// is no name, and the parser took no option for the second.
fn detached(arguments: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    arguments
        .map(|argument| if argument == "--background" { "--detached".into() } else { argument })
}

/// Makes this process the first of a session of its own, without a terminal.
pub(super) fn leave_session() -> Result<()> {
    rustix::process::setsid().context("cannot begin a session")?;
    Ok(())
}

/// Opens the log, which is written on from where it ends.
pub(super) fn open_log(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot open the log {}", path.display()))
}

/// Says that all is well by letting go of the pipes; messages go to the log from here on.
pub(super) fn detach(app: &mut App, log: &File) -> Result<()> {
    let null = OpenOptions::new().write(true).open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stderr(log).context("cannot write to the log")?;
    rustix::stdio::dup2_stdout(&null).context("cannot let go of standard output")?;
    // It has a descriptor of its own.
    app.out = Out::stdout();
    Ok(())
}
