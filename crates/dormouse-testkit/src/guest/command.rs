//! Running other programs: their output as progress, their errors as ours.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// How much of a failed program's stderr is worth repeating.
const STDERR_TAIL_BYTES: usize = 2000;

/// A command that runs as root: directly, or through `sudo`.
pub(super) fn privileged(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        Command::new(program)
    } else {
        let mut command = Command::new("sudo");
        // sudo's own PATH may lack the sbin folders, ours surely may.
        command.args(["env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", program]);
        command
    }
}

/// Runs `command` to its end and returns its stdout.
pub(super) fn output_of(command: &mut Command) -> Result<String> {
    let mut text = String::new();
    run(command, &mut |line| {
        text.push_str(line);
        text.push('\n');
    })?;
    Ok(text)
}

/// Runs `command` to its end, handing each line of its stdout to `each_line`.
pub(super) fn run(command: &mut Command, each_line: &mut dyn FnMut(&str)) -> Result<()> {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| {
            format!("cannot start {shown}; `cargo xtask packages` installs what the guests need")
        })?;
    let stderr = child.stderr.take().context("stderr was piped")?;
    let errors = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let result = BufReader::new(stderr).read_to_end(&mut bytes);
        result.map(|_| bytes)
    });
    let stdout = child.stdout.take().context("stdout was piped")?;
    for line in BufReader::new(stdout).split(b'\n') {
        each_line(&String::from_utf8_lossy(&line?));
    }
    let status = child.wait()?;
    let errors = match errors.join() {
        Ok(bytes) => bytes.with_context(|| format!("reading the errors of {shown}"))?,
        Err(_) => bail!("the reader of {shown} panicked"),
    };
    if !status.success() {
        let tail = &errors[errors.len().saturating_sub(STDERR_TAIL_BYTES)..];
        bail!("{shown}: {status}\n{}", String::from_utf8_lossy(tail).trim_end());
    }
    Ok(())
}
