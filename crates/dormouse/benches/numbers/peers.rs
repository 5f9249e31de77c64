//! Servers as users start them: the command of ours, and `qemu-nbd`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// How long a server may take to start, and to stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// What live disks are measured with, and the Debian packages that have it.
const PROGRAMS: [(&str, &str); 3] =
    [("qemu-nbd", "qemu-utils"), ("qemu-img", "qemu-utils"), ("fio", "fio")];

/// Fails if a program is missing, and says how to get it.
pub(crate) fn check_programs() -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = |name: &str| std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
    let missing: Vec<String> = PROGRAMS
        .iter()
        .filter(|(name, _)| !is_there(name))
        .map(|(name, package)| format!("{name} (Debian package {package})"))
        .collect();
    ensure!(
        missing.is_empty(),
        "{} not found; `cargo xtask packages` installs what the benches need",
        missing.join(", ")
    );
    let engines = output(Command::new("fio").arg("--enghelp"))?;
    let has_nbd = String::from_utf8_lossy(&engines).lines().any(|line| line.trim() == "nbd");
    ensure!(has_nbd, "this fio was built without libnbd; Debian's package has its engine nbd");
    Ok(())
}

/// Runs the command on a store and returns what it printed.
pub(crate) fn dormouse<S: AsRef<OsStr>>(store: &Path, arguments: &[S]) -> Result<Vec<u8>> {
    output(command(store).args(arguments))
}

/// Runs the command on a store with `--json`.
pub(crate) fn dormouse_json<S: AsRef<OsStr>>(store: &Path, arguments: &[S]) -> Result<Value> {
    Ok(serde_json::from_slice(&output(command(store).arg("--json").args(arguments))?)?)
}

/// Runs `qemu-img`.
pub(crate) fn qemu_img<S: AsRef<OsStr>>(arguments: &[S]) -> Result<()> {
    output(Command::new("qemu-img").args(arguments)).map(drop)
}

/// The command on a store.
pub(crate) fn command(store: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
    command.arg("--store").arg(store);
    command
}

fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {message}");
    Ok(output.stdout)
}

/// A server on a unix socket of its own; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    dir: TempDir,
    export: String,
}

impl Server {
    /// `dormouse serve nbd EXPORT…`; the first one is what is asked for.
    pub(crate) fn dormouse(store: &Path, exports: &[&str]) -> Result<Server> {
        let dir = tempfile::tempdir()?;
        let mut command = command(store);
        command.args(["--quiet", "serve", "nbd"]).args(exports);
        command.arg("--socket").arg(dir.path().join("nbd"));
        Server::start(command, dir, exports[0])
    }

    /// `qemu-nbd` with four clients, write-back caching and its default engine, which was faster
    /// than `io_uring` on files in page cache at depth 16 and as fast at depth 1.
    pub(crate) fn qemu_nbd(image: &Path, format: &str) -> Result<Server> {
        let dir = tempfile::tempdir()?;
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "-e", "4", "--cache=writeback", "--aio=threads"]);
        command.args(["--discard=unmap", "-f", format, "--socket"]);
        command.arg(dir.path().join("nbd")).arg(image);
        Server::start(command, dir, "")
    }

    fn start(mut command: Command, dir: TempDir, export: &str) -> Result<Server> {
        let errors = File::create(dir.path().join("errors"))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let mut server = Server { child, dir, export: export.to_owned() };
        let begin = Instant::now();
        while UnixStream::connect(server.socket()).is_err() {
            let ended = server.child.try_wait()?;
            if ended.is_some() || begin.elapsed() > PATIENCE {
                let mut message = String::new();
                File::open(server.dir.path().join("errors"))?.read_to_string(&mut message)?;
                bail!("{command:?} does not serve: {}", message.trim());
            }
            sleep(Duration::from_micros(200));
        }
        Ok(server)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd")
    }

    pub(crate) fn export(&self) -> &str {
        &self.export
    }

    /// Another export of the same server.
    pub(crate) fn uri_of(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub(crate) fn uri(&self) -> String {
        self.uri_of(&self.export)
    }

    /// Bytes of memory that the process has in use, and the most it ever had.
    pub(crate) fn memory(&self) -> Result<[u64; 2]> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let field = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|line| line.split_whitespace().next());
            Ok(kib.with_context(|| format!("no {name} in /proc"))?.parse::<u64>()? << 10)
        };
        Ok([field("VmRSS:")?, field("VmHWM:")?])
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        // What fails here has ended by itself.
        let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
        let begin = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if begin.elapsed() > PATIENCE {
                let _ = self.child.kill();
            }
            sleep(Duration::from_millis(1));
        }
    }
}
