//! The control socket: how other commands reach the process that has a live VM's disks.
//!
//! One request and one answer a connection, each a line of JSON.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::LiveCommit;

/// The longest line that is read.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// How long a peer may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// What a command asks of the process that has the disks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Figures of all disks.
    Status,

    /// A commit.
    Commit(LiveCommit),

    /// Stop serving, let go of the disks and end.
    Stop,
}

/// The answer: a result, or why there is none.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// What was asked for.
    Done(Value),

    /// A failure, with its causes.
    Failed(Vec<String>),
}

/// A bound control socket; its file goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Control {
    listener: UnixListener,
    path: PathBuf,
}

impl Control {
    /// Binds the socket of a live VM whose disks this process has, so a file that is there is stale.
    pub(crate) fn bind(path: &Path) -> Result<Control> {
        let cannot = || format!("cannot listen on {}", path.display());
        match fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(cannot);
            }
            _ => {}
        }
        let listener = UnixListener::bind(path).with_context(cannot)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(cannot)?;
        Ok(Control { listener, path: path.to_owned() })
    }

    /// Answers requests, one after the other, until one was answered by `None`.
    pub(crate) fn serve(&self, answer: &mut dyn FnMut(Request) -> Option<Result<Value>>) {
        for stream in self.listener.incoming() {
            let Ok(stream) = stream else { continue };
            match answer_one(stream, answer) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => tracing::debug!(%error, "a control connection failed"),
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, "control socket left");
        }
    }
}

fn answer_one(
    stream: UnixStream,
    answer: &mut dyn FnMut(Request) -> Option<Result<Value>>,
) -> Result<bool> {
    stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
    let mut line = String::new();
    BufReader::new((&stream).take(LINE_BYTES_MAX)).read_line(&mut line)?;
    let answered = match serde_json::from_str(&line) {
        Ok(request) => answer(request),
        Err(error) => Some(Err(error.into())),
    };
    let (reply, goes_on) = match answered {
        Some(Ok(value)) => (Answer::Done(value), true),
        Some(Err(error)) => {
            (Answer::Failed(error.chain().map(ToString::to_string).collect()), true)
        }
        None => (Answer::Done(Value::Null), false),
    };
    let mut text = serde_json::to_string(&reply)?;
    text.push('\n');
    (&stream).write_all(text.as_bytes())?;
    Ok(goes_on)
}

/// Asks the process that has a live VM's disks; `None` if there is no such process.
pub(crate) fn ask(path: &Path, request: &Request) -> Result<Option<Value>> {
    let Ok(stream) = UnixStream::connect(path) else { return Ok(None) };
    let mut text = serde_json::to_string(request)?;
    text.push('\n');
    (&stream).write_all(text.as_bytes())?;
    let mut line = String::new();
    BufReader::new((&stream).take(LINE_BYTES_MAX)).read_line(&mut line)?;
    match serde_json::from_str(&line).context("the process that has the disk did not answer")? {
        Answer::Done(value) => Ok(Some(value)),
        Answer::Failed(causes) => {
            let mut causes = causes.into_iter().rev();
            let Some(first) = causes.next() else { bail!("it failed and did not say why") };
            Err(causes.fold(anyhow::anyhow!(first), |error, context| error.context(context)))
        }
    }
}
