//! A `dormouse serve nbd` that ends with its test, and the tools that talk to it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::fixture::Home;

/// A server in the foreground, killed at the end. Its messages are in the file `messages`.
pub(crate) struct Served {
    pub(crate) child: Child,
}

impl Served {
    /// Serves on the socket `s.nbd`.
    pub(crate) fn start(home: &Home, arguments: &[&str]) -> Served {
        let messages = File::create(home.path("messages")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_dormouse"))
            .current_dir(home.path("."))
            .env_remove("DORMOUSE_STORE")
            .args(["serve", "nbd", "--socket", "s.nbd"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(messages)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let served = Served { child };
        assert!(line.starts_with("nbd+unix:///"), "{line}{}", messages_of(home));
        served
    }

    /// Sends SIGTERM or another signal.
    pub(crate) fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the server said on standard error.
pub(crate) fn messages_of(home: &Home) -> String {
    fs::read_to_string(home.path("messages")).unwrap()
}

/// Sends a signal to a process.
pub(crate) fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args(["-s", name, &pid.to_string()]).status().unwrap();
    assert!(sent.success());
}

/// Waits until `is_so`, half a minute at most.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{what} never came to be");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a program that must succeed, and gives what it printed.
pub(crate) fn tool(home: &Home, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .current_dir(home.path("."))
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Writes to an export, discards a part, kills the server as soon as all of it is answered, before
/// anything was flushed, has it followed by another one with `follow`, and reads through that.
pub(crate) fn kill_before_any_flush<T>(home: &Home, pid: u32, follow: impl FnOnce() -> T) -> T {
    let export = "";
    let script = format!(
        "import os\n\
         h.pwrite(b'answered' * 8192, 0)\n\
         h.pwrite(b'part of a block', 100001)\n\
         h.trim(8192, 4096)\n\
         os.kill({pid}, 9)\n"
    );
    nbdsh(home, export, "", &script);
    let next = follow();
    let script = "want = bytearray(b'answered' * 8192)\n\
                  want[4096:12288] = bytes(8192)\n\
                  print(h.pread(65536, 0) == want, h.pread(15, 100001))\n\
                  h.flush()\n";
    assert_eq!(nbdsh(home, export, "", script).trim(), "True bytearray(b'part of a block')");
    next
}

/// The URI of an export on the socket `s.nbd`.
pub(crate) fn uri(export: &str) -> String {
    format!("nbd+unix:///{export}?socket=s.nbd")
}

/// Runs commands of qemu-io, whose failures are in what it says.
pub(crate) fn qemu_io(home: &Home, export: &str, commands: &[&str]) -> String {
    let uri = uri(export);
    let mut arguments = vec!["-f", "raw", uri.as_str()];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    let output =
        Command::new("qemu-io").current_dir(home.path(".")).args(arguments).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8(said).unwrap()
}

/// Runs a script of libnbd's Python shell, connected to an export, and gives what it printed.
pub(crate) fn nbdsh(home: &Home, export: &str, before_connecting: &str, script: &str) -> String {
    let connect = format!("h.connect_uri(\"{}\")", uri(export));
    let text = format!("h.set_strict_mode(0)\n{before_connecting}\n{connect}\n{script}");
    // Debian's Python has the module, whatever Python is first in PATH.
    tool(home, "/usr/bin/python3", &["-m", "nbd", "-c", &text])
}
