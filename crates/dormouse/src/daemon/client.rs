//! How commands reach the daemon of their store, and have it do what they were asked.

mod wire;

use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::api::answer::ErrorObject;
use super::place::{self, STORE_HEADER, store_mark};
use crate::app::App;
use crate::exit::{Fault, Kind, Told};
use crate::progress::Display;
use dormouse_store::progress::Progress;
use wire::Conversation;

/// The status of a daemon that is another store's.
const MISDIRECTED: u16 = 421;

/// The longest answer that is no stream.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// The longest event.
const EVENT_BYTES_MAX: usize = 8 << 20;

/// How long the daemon may be silent of a job: it says something every 15 seconds, if only that there is
/// nothing.
const SILENCE: Duration = Duration::from_secs(90);

/// How long it may be silent where something is but looked up: who looks can do that without it.
const LOOK_UP_SILENCE: Duration = Duration::from_secs(10);

/// The daemon of a store, which answers.
#[derive(Debug)]
pub(crate) struct Client {
    socket: PathBuf,
    mark: String,
    patience: Duration,
}

/// What is looked at while a job is done.
pub(crate) struct Watch<'a> {
    /// Shows how far it is, and says when it is to stop.
    pub(crate) display: Option<&'a Display>,

    /// Told of each VM that is awake.
    pub(crate) on_awake: &'a mut dyn FnMut(&Value) -> Result<()>,

    /// Until when it is waited for.
    pub(crate) until: Until,
}

/// Until when a job is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// Until its guest stands still no longer.
    Frozen,

    /// Until its end.
    End,
}

impl Client {
    /// The daemon of the command's store; none if it has none, or is not to be asked.
    pub(crate) fn find(app: &App) -> Result<Option<Client>> {
        Client::find_patiently(app, SILENCE)
    }

    /// The same for who is soon done or does without.
    pub(crate) fn find_to_look(app: &App) -> Result<Option<Client>> {
        Client::find_patiently(app, LOOK_UP_SILENCE)
    }

    fn find_patiently(app: &App, patience: Duration) -> Result<Option<Client>> {
        if app.no_daemon {
            return Ok(None);
        }
        let dir = std::path::absolute(&app.store_dir).context("cannot tell where the store is")?;
        let Some(socket) = place::find(&dir)? else { return Ok(None) };
        let mark = store_mark(&dir).context("cannot look at the store")?;
        let client = Client { socket, mark, patience };
        let Some(mut conversation) = client.send("GET", "/v1", None)? else { return Ok(None) };
        // Its address is of a daemon that there was, and somebody else's is there now.
        if conversation.status() == MISDIRECTED {
            return Ok(None);
        }
        client.body(&mut conversation)?;
        Ok(Some(client))
    }

    fn send(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Option<Conversation>> {
        let Some(stream) = dormouse_serve::unix_socket::connect(&self.socket)? else {
            return Ok(None);
        };
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nhost: dormouse\r\nconnection: close\r\n{STORE_HEADER}: {}\r\n",
            self.mark
        );
        let body = body.map(Value::to_string).unwrap_or_default();
        if !body.is_empty() {
            // Writing to a string cannot fail.
            let _ = write!(
                head,
                "content-type: application/json\r\ncontent-length: {}\r\n",
                body.len()
            );
        }
        head.push_str("\r\n");
        head.push_str(&body);
        let begun = Conversation::begin(stream, head.as_bytes(), self.patience);
        begun.map(Some).with_context(|| self.trouble())
    }

    fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Conversation> {
        self.send(method, path, body)?.with_context(|| self.trouble())
    }

    fn trouble(&self) -> String {
        format!(
            "the daemon at {} does not answer; `--no-daemon` does without",
            self.socket.display()
        )
    }

    /// The whole of an answer; a failure where it is one.
    fn body(&self, conversation: &mut Conversation) -> Result<Vec<u8>> {
        let status = conversation.status();
        let mut bytes = Vec::new();
        while let Some(piece) = conversation.next(&mut || Ok(())).with_context(|| self.trouble())? {
            bytes.extend_from_slice(&piece);
            if bytes.len() > ANSWER_BYTES_MAX {
                anyhow::bail!("the daemon's answer has more than {ANSWER_BYTES_MAX} bytes");
            }
        }
        if status < 400 {
            return Ok(bytes);
        }
        let told: ErrorObject = serde_json::from_slice(&bytes)
            .with_context(|| format!("the daemon answered with status {status}"))?;
        Err(told.told().into())
    }

    fn value(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let bytes = self.body(&mut self.ask(method, path, body)?)?;
        serde_json::from_slice(&bytes).context("the daemon's answer is not JSON")
    }

    /// Looks something up.
    pub(crate) fn get(&self, path: &str) -> Result<Value> {
        self.value("GET", path, None)
    }

    /// Copies an answer as it is.
    pub(crate) fn copy(&self, path: &str, to: &mut impl Write) -> Result<()> {
        let mut conversation = self.ask("GET", path, None)?;
        if conversation.status() >= 400 {
            self.body(&mut conversation)?;
        }
        while let Some(piece) = conversation.next(&mut || Ok(())).with_context(|| self.trouble())? {
            to.write_all(&piece)?;
        }
        Ok(())
    }

    /// Has a job done, and gives what came of it. It goes on if this process ends.
    pub(crate) fn job(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        mut watch: Watch<'_>,
    ) -> Result<Value> {
        let job = self.value(method, path, body)?;
        let id = job["id"].as_str().context("the daemon's answer is no job")?.to_owned();
        let mut events = self.ask("GET", &format!("/v1/jobs/{id}/events"), None)?;
        if events.status() >= 400 {
            self.body(&mut events)?;
        }
        let (mut text, mut seen) = (Vec::new(), Seen::default());
        let mut is_stopped = false;
        // Whoever waits for less than the end can look after the rest.
        let until = watch.until;
        let with_id = |mut told: Value| {
            if until == Until::Frozen {
                told["job"] = id.as_str().into();
            }
            told
        };
        loop {
            let display = watch.display;
            let mut on_idle = || {
                if !is_stopped && display.is_some_and(Display::is_cancelled) {
                    is_stopped = true;
                    self.value("POST", &format!("/v1/jobs/{id}/cancel"), None)?;
                }
                Ok(())
            };
            let piece = events.next(&mut on_idle).with_context(|| self.trouble())?;
            let Some(piece) = piece else {
                let message = format!("the daemon ended before its job {id} did");
                return Err(Fault::new(Kind::Other, message))
                    .context("`dormouse ps` shows what became of the VM");
            };
            text.extend_from_slice(&piece);
            while let Some(end) = text.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = text.drain(..end + 2).collect();
                let Some(job) = data_of(&event)? else { continue };
                seen.show(&job, &mut watch)?;
                match job["state"].as_str().unwrap_or_default() {
                    "done" => return Ok(with_id(job["result"].clone())),
                    "failed" | "cancelled" => return Err(told(&job)?.into()),
                    _ if until == Until::Frozen && job["frozen"].is_object() => {
                        return Ok(with_id(job["frozen"].clone()));
                    }
                    _ => {}
                }
            }
            if text.len() > EVENT_BYTES_MAX {
                anyhow::bail!("an event of the daemon has more than {EVENT_BYTES_MAX} bytes");
            }
        }
    }
}

/// The job that an event tells of; none for one that is a pulse.
fn data_of(event: &[u8]) -> Result<Option<Value>> {
    let mut lines = event.split(|byte| *byte == b'\n');
    let Some(data) = lines.find_map(|line| line.strip_prefix(b"data: ")) else { return Ok(None) };
    Ok(Some(serde_json::from_slice(data).context("an event of the daemon is not JSON")?))
}

fn told(job: &Value) -> Result<Told> {
    let object = serde_json::json!({ "error": job["error"], "awake": job["awake"] });
    let object: ErrorObject =
        serde_json::from_value(object).context("a job that failed does not say why")?;
    Ok(object.told())
}

/// What of a job was shown already.
#[derive(Default)]
struct Seen {
    stage: Option<String>,
    done_bytes: u64,
    awake: usize,
}

impl Seen {
    fn show(&mut self, job: &Value, watch: &mut Watch<'_>) -> Result<()> {
        for awake in job["awake"].as_array().into_iter().flatten().skip(self.awake) {
            self.awake += 1;
            (watch.on_awake)(awake)?;
        }
        let Some(display) = watch.display else { return Ok(()) };
        let Some(stage) = job["stage"].as_str() else { return Ok(()) };
        if self.stage.as_deref() != Some(stage) {
            self.stage = Some(stage.to_owned());
            self.done_bytes = 0;
            display.begin(stage, job["total_bytes"].as_u64());
        }
        let done = job["done_bytes"].as_u64().unwrap_or_default();
        display.advance(done.saturating_sub(self.done_bytes));
        self.done_bytes = done;
        Ok(())
    }
}

/// A path as it is for a process that runs in another folder.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot tell where {} is", path.display()))
}
