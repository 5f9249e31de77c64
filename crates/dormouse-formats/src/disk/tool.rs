//! Running qemu-img and qemu-nbd.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

use super::nbd::Connection;
use crate::error::{Context, Error, ErrorKind, Result};

/// What qemu-img may print: a map of 16 TiB in clusters of 64 KiB would be longer, and is refused.
const OUTPUT_BYTES_MAX: u64 = 256 << 20;

/// How long qemu-img may take: it reads tables, no data.
const PATIENCE: Duration = Duration::from_secs(300);

/// How often a program is looked at.
const POLL: Duration = Duration::from_millis(2);

/// How long a server may take until it listens.
const START: Duration = Duration::from_secs(20);

/// What `qemu-img info` tells.
#[derive(Clone, Debug)]
pub struct Info {
    /// The length of the disk.
    pub size_bytes: u64,

    /// The file that it lies over.
    pub backing: Option<String>,

    /// What format the disk says that one has.
    pub backing_format: Option<String>,

    /// A file beside it that has its data.
    pub other_file: Option<String>,

    /// Whether its data is encrypted.
    pub is_encrypted: bool,

    /// The names of the snapshots inside of it.
    pub internal_snapshots: Vec<String>,
}

/// A run of `qemu-img map`.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct MapEntry {
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) depth: u32,
    pub(super) zero: bool,
    pub(super) data: bool,
}

pub(super) fn info(path: &Path, format: &str) -> Result<Info> {
    // Of a file whose name begins with a protocol QEMU would take it for one.
    let node = serde_json::json!({
        "driver": format,
        "file": {"driver": "file", "filename": path.display().to_string()},
    });
    let node = if matches!(format, "qcow2" | "qed" | "vmdk") {
        let mut node = node;
        node["backing"] = Value::Null;
        node
    } else {
        node
    };
    Info::parse(&run(&["info", "--output=json"], &node)?, &path.display().to_string())
}

impl Info {
    /// Reads what qemu-img printed of the disk at `own`.
    pub fn parse(bytes: &[u8], own: &str) -> Result<Info> {
        let json: Value = parse(bytes)?;
        let size_bytes = json["virtual-size"]
            .as_u64()
            .ok_or_else(|| Error::new(ErrorKind::Tool, "qemu-img info tells no virtual-size"))?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let data = &json["format-specific"]["data"];
        let extents = data["extents"].as_array().map(Vec::as_slice).unwrap_or_default();
        let other_extent = extents
            .iter()
            .filter_map(|extent| extent["filename"].as_str())
            .find(|name| *name != own && !name.starts_with("json:"))
            .map(str::to_owned);
        let snapshots = json["snapshots"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(Info {
            size_bytes,
            backing: text(&json["backing-filename"])
                .or_else(|| text(&json["full-backing-filename"])),
            backing_format: text(&json["backing-filename-format"]),
            other_file: text(&data["data-file"]).or(other_extent),
            is_encrypted: json["encrypted"].as_bool().unwrap_or(false),
            internal_snapshots: snapshots
                .iter()
                .map(|snapshot| text(&snapshot["name"]).unwrap_or_default())
                .collect(),
        })
    }
}

pub(super) fn map(node: &Value) -> Result<Vec<u8>> {
    run(&["map", "--output=json"], node)
}

pub(super) fn parse_map(bytes: &[u8]) -> Result<Vec<MapEntry>> {
    parse(bytes)
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| {
        Error::new(ErrorKind::Tool, format!("what qemu-img printed is not understood: {error}"))
    })
}

fn run(arguments: &[&str], node: &Value) -> Result<Vec<u8>> {
    let mut command = Command::new("qemu-img");
    command.args(arguments).arg(format!("json:{node}"));
    let what = format!("qemu-img {}", arguments[0]);
    output(&mut command, &what, PATIENCE, OUTPUT_BYTES_MAX)
}

/// What a program prints, if it ends well and in time. It is killed when it does not, or when it
/// prints too much.
fn output(command: &mut Command, what: &str, patience: Duration, max: u64) -> Result<Vec<u8>> {
    let begin = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| missing(&command.get_program().to_string_lossy(), error))?;
    // Each pipe has a thread of its own, which ends with the program: were one pipe read after the
    // other, a program that fills the second would wait for ever.
    let readers = (read_pipe(child.stdout.take(), max), read_pipe(child.stderr.take(), 4096));
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Ok(status),
            Ok(None) if begin.elapsed() > patience => {
                break Err(Error::new(
                    ErrorKind::Tool,
                    format!(
                        "{what} did not end within {} s and was killed; is its file on a disk that \
                         does not answer?",
                        patience.as_secs()
                    ),
                ));
            }
            Ok(None) => std::thread::sleep(POLL),
            Err(error) => break Err(Error::io(format!("cannot wait for {what}"), error)),
        }
    };
    if status.is_err() {
        for done in [child.kill(), child.wait().map(drop)] {
            if let Err(error) = done {
                tracing::debug!(%error, what, "cannot end a program");
            }
        }
    }
    let status = status?;
    let context = || format!("cannot read what {what} prints");
    // A process that it started may hold the pipes open: it is waited for no longer than for itself.
    let take = |reader: Receiver<io::Result<Vec<u8>>>| {
        let left = patience.saturating_sub(begin.elapsed()).max(POLL);
        reader.recv_timeout(left).map_err(|_| {
            Error::new(ErrorKind::Tool, format!("{what} ended and left its output open"))
        })
    };
    let bytes = take(readers.0)?.context(context)?;
    let message = take(readers.1)?.context(context)?;
    if bytes.len() as u64 > max {
        let why = format!("{what} prints more than {max} bytes; its disk is in too many pieces");
        return Err(Error::new(ErrorKind::Unsupported, why));
    }
    if !status.success() {
        let message = String::from_utf8_lossy(&message);
        return Err(Error::new(ErrorKind::Tool, format!("{what} failed: {}", message.trim())));
    }
    Ok(bytes)
}

/// Reads a pipe to its end, keeping at most `max` bytes and one more.
fn read_pipe(pipe: Option<impl Read + Send + 'static>, max: u64) -> Receiver<io::Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel();
    if let Some(mut pipe) = pipe {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let read = pipe
                .by_ref()
                .take(max + 1)
                .read_to_end(&mut bytes)
                // What is too much is thrown away, so that the program ends.
                .and_then(|_| io::copy(&mut pipe, &mut io::sink()))
                .map(|_| bytes);
            // Whoever waited has gone when its patience ended.
            let _ = sender.send(read);
        });
    }
    receiver
}

fn missing(program: &str, error: std::io::Error) -> Error {
    Error::new(
        ErrorKind::Tool,
        format!("cannot start {program} ({error}); install the package qemu-utils"),
    )
}

/// A qemu-nbd that reads one disk, started when it is first needed and ended with this.
pub(super) struct Server {
    node: String,
    running: Mutex<Option<Running>>,
    idle: Mutex<Vec<Connection>>,
}

struct Running {
    child: Child,
    folder: std::path::PathBuf,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Server {
    pub(super) fn new(node: &Value) -> Server {
        Server {
            node: format!("json:{node}"),
            running: Mutex::new(None),
            idle: Mutex::new(Vec::new()),
        }
    }

    /// Reads through a connection that nobody else uses.
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut connection = match idle {
            Some(connection) => connection,
            None => self.connect()?,
        };
        connection.read_at(buf, offset)?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        Ok(())
    }

    fn connect(&self) -> Result<Connection> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let server = match &mut *running {
            Some(server) => server,
            none => none.insert(self.start()?),
        };
        let socket = server.folder.join("nbd");
        let begin = Instant::now();
        loop {
            match Connection::open(&socket) {
                Ok(connection) => return Ok(connection),
                Err(error) => {
                    let ended = server.child.try_wait().context(|| "cannot wait".to_owned())?;
                    if let Some(status) = ended {
                        let why = format!("qemu-nbd ended with {status} before it listened");
                        return Err(Error::new(ErrorKind::Tool, why));
                    }
                    if begin.elapsed() > START {
                        return Err(error.within("qemu-nbd does not answer"));
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
    }

    fn start(&self) -> Result<Running> {
        let name = format!("dormouse-nbd-{}", uuid::Uuid::new_v4().simple());
        let folder = std::env::temp_dir().join(name);
        // Nobody else shall connect to what may be a tenant's disk.
        std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700)
            .create(&folder)
            .context(|| format!("cannot make {}", folder.display()))?;
        let child = Command::new("qemu-nbd")
            .args(["--read-only", "--persistent", "--shared=64", "--socket"])
            .arg(folder.join("nbd"))
            .arg(&self.node)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        match child {
            Ok(child) => Ok(Running { child, folder }),
            Err(error) => {
                std::fs::remove_dir(&folder).context(|| "cannot clean up".to_owned())?;
                Err(missing("qemu-nbd", error))
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for done in
            [self.child.kill(), self.child.wait().map(drop), std::fs::remove_dir_all(&self.folder)]
        {
            if let Err(error) = done {
                tracing::debug!(%error, "cannot end a qemu-nbd");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, patience_ms: u64, max: u64) -> Result<Vec<u8>> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        output(&mut command, "the tool", Duration::from_millis(patience_ms), max)
    }

    /// An image on a mount that does not answer held an import for ever.
    #[test]
    fn a_tool_that_does_not_end_is_killed() {
        let begin = Instant::now();
        let error = shell("echo some; exec sleep 600", 300, 1000).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Tool);
        assert!(error.to_string().contains("did not end within"), "{error}");
        // One that ends and leaves a child with its output.
        let error = shell("sleep 30 & exit 0", 300, 1000).unwrap_err();
        assert!(error.to_string().contains("left its output open"), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    }

    #[test]
    fn output_is_bounded_and_a_full_pipe_of_messages_holds_nothing_up() {
        let noise = "head -c 1000000 /dev/zero >&2; echo fine";
        assert_eq!(shell(noise, 60_000, 100).unwrap(), b"fine\n");
        let error = shell("head -c 1000000 /dev/zero", 60_000, 1000).unwrap_err();
        assert!(error.to_string().contains("prints more than 1000 bytes"), "{error}");
        let error = shell("echo why >&2; exit 3", 60_000, 1000).unwrap_err();
        assert_eq!(error.to_string(), "the tool failed: why");
    }
}
