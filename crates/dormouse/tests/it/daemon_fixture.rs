//! A daemon beside a test, and plain HTTP to it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::fixture::Home;

/// How long a daemon may take for something that it does at once.
const SOON: Duration = Duration::from_secs(30);

/// A daemon of a home's store; it is killed at the end of the test. VMs are not.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) socket: PathBuf,
    log: PathBuf,
}

impl Running {
    /// Starts one and waits until it answers.
    pub(crate) fn start(home: &Home, args: &[&str]) -> Running {
        Running::start_by(home, args, command(home, args))
    }

    /// The same, with another way to start it.
    pub(crate) fn start_by(home: &Home, args: &[&str], mut command: Command) -> Running {
        let log = home.path("daemon.log");
        let child = command.stderr(File::create(&log).unwrap()).spawn().unwrap();
        let given = args.iter().position(|arg| *arg == "--socket").map(|at| args[at + 1]);
        let socket = match given {
            Some(socket) => home.path(socket),
            None => home.store().join("live/.daemon/api"),
        };
        let mut daemon = Running { child, socket, log };
        let address = home.store().join("live/.daemon/address");
        daemon.wait_for("it answers", |daemon| {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                panic!("{status}: {}", daemon.log());
            }
            // One that was left by another daemon is of a socket on which nobody answers yet.
            address.exists()
                && daemon.try_ask("GET", "/v1").is_some_and(|(status, _)| status == 200)
        });
        daemon
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn wait_for(&mut self, what: &str, is_so: impl Fn(&mut Running) -> bool) {
        let begun = Instant::now();
        while !is_so(self) {
            assert!(begun.elapsed() < SOON, "not within {SOON:?}: {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        stream
    }

    /// The status and all of the body.
    pub(crate) fn send(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, String) {
        exchange(self.connect(), method, path, body).unwrap()
    }

    fn try_ask(&self, method: &str, path: &str) -> Option<(u16, String)> {
        exchange(UnixStream::connect(&self.socket).ok()?, method, path, None)
    }

    pub(crate) fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let (status, body) = self.send(method, path, body);
        (status, serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}")))
    }

    /// An answer that must be no failure.
    pub(crate) fn get(&self, path: &str) -> Value {
        let (status, value) = self.ask("GET", path, None);
        assert_eq!(status, 200, "{path}: {value}");
        value
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Value {
        let (status, value) = self.ask("POST", path, Some(body));
        assert!(status == 200 || status == 202, "{path}: {status} {value}");
        value
    }

    /// All events of a job, up to its end: their names and data.
    pub(crate) fn events(&self, job: &Value) -> Vec<(String, Value)> {
        let path = format!("/v1/jobs/{}/events", job["id"].as_str().unwrap());
        let (status, text) = self.send("GET", &path, None);
        assert_eq!(status, 200, "{text}");
        let mut events = Vec::new();
        for event in text.split_terminator("\n\n").filter(|event| !event.starts_with(':')) {
            let field = |name: &str| {
                let found = event.lines().find_map(|line| line.strip_prefix(name));
                found.unwrap_or_else(|| panic!("no {name} in {event:?}")).to_owned()
            };
            events.push((field("event: "), serde_json::from_str(&field("data: ")).unwrap()));
            assert_eq!(field("id: "), events.len().to_string());
        }
        events
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it as an administrator does.
    pub(crate) fn terminate(mut self) -> (ExitStatus, String) {
        self.signal(Signal::TERM);
        let status = self.child.wait().unwrap();
        (status, self.log())
    }

    pub(crate) fn count(&self, what: &str) -> usize {
        fs::read_dir(format!("/proc/{}/{what}", self.child.id())).unwrap().count()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The daemon's command, to be run in the home.
pub(crate) fn command(home: &Home, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
    command.current_dir(home.path(".")).env_remove("DORMOUSE_STORE").arg("daemon").args(args);
    command
}

/// One request; with HTTP/1.0 the answer ends with the connection. None if there is no answer.
pub(crate) fn exchange(
    mut stream: UnixStream,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> Option<(u16, String)> {
    let body = body.map_or_else(String::new, Value::to_string);
    let request = format!(
        "{method} {path} HTTP/1.0\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    parse(&answer)
}

/// The status and the body of an answer.
pub(crate) fn parse(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.to_owned()))
}

/// What a store's live folder holds beside the places of daemon and data plane.
pub(crate) fn live(store: &Path) -> Vec<String> {
    let entries = fs::read_dir(store.join("live")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !name.starts_with('.')).collect()
}
