//! A `dormouse serve memory` that ends with its test, and small VMMs that wake over it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use dormouse_testkit::vmm::{Backing, Config, SmallVmm, Version, write_image};

use crate::fixture::Home;
use crate::nbd_fixture::{signal, wait_until};

pub(crate) const SEED: u64 = 5;

/// 16 MiB.
pub(crate) const PAGES: u64 = 4096;

/// A store with the snapshot `vm@1`, of a small VMM's memory before it did anything.
pub(crate) fn with_snapshot() -> Home {
    let home = Home::with_store();
    write_image(SEED, PAGES, &home.path("mem")).unwrap();
    home.file("state", b"of the VMM");
    home.ok(&["commit", "vm", "--memory", "mem", "--state", "state"]);
    home
}

/// A server in the foreground; killed at the end, as is the holder that it started.
pub(crate) struct Memory {
    pub(crate) child: Child,
    messages: PathBuf,
    holder: String,
}

impl Memory {
    /// Serves `snap` as the live VM `live`, at the socket `LIVE.uffd`.
    pub(crate) fn wake(home: &Home, snap: &str, live: &str, options: &[&str]) -> Memory {
        let socket = format!("{live}.uffd");
        let arguments = [&[snap, "--as", live, "--uffd", &socket], options].concat();
        Memory::start(home, live, &arguments)
    }

    /// Takes over `live`.
    pub(crate) fn take_over(home: &Home, live: &str) -> Memory {
        Memory::start(home, live, &["--take-over", live])
    }

    /// The same by a process that another program starts.
    pub(crate) fn wake_by(home: &Home, program: &[&str], snap: &str, live: &str) -> Memory {
        let socket = format!("{live}.uffd");
        Memory::start_by(home, program, live, &[snap, "--as", live, "--uffd", &socket])
    }

    fn start(home: &Home, live: &str, arguments: &[&str]) -> Memory {
        Memory::start_by(home, &[], live, arguments)
    }

    fn start_by(home: &Home, program: &[&str], live: &str, arguments: &[&str]) -> Memory {
        let messages = home.path(&format!("{live}.messages"));
        let words = [program, &[env!("CARGO_BIN_EXE_dormouse")]].concat();
        let mut child = Command::new(words[0])
            .current_dir(home.path("."))
            .env_remove("DORMOUSE_STORE")
            .args(&words[1..])
            .args(["--json", "serve", "memory"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(File::create(&messages).unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let holder = home.path(&format!("dormouse-store/live/{live}/memory/holder"));
        let holder = holder.to_str().unwrap().replace("/./", "/");
        let memory = Memory { child, messages, holder };
        assert!(line.starts_with('{'), "{line}{}", memory.messages());
        memory
    }

    /// What it said on standard error.
    pub(crate) fn messages(&self) -> String {
        fs::read_to_string(&self.messages).unwrap()
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // The holder must live.
        self.holder.clear();
    }

    /// Its exit code, once it has ended by itself.
    pub(crate) fn code(&mut self) -> i32 {
        let mut status = None;
        wait_until("the server's end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().code().unwrap_or_else(|| panic!("a signal: {}", self.messages()))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !self.holder.is_empty() {
            holders(&self.holder).into_iter().for_each(|pid| signal(pid, "KILL"));
        }
    }
}

/// The processes that keep descriptors at a socket.
pub(crate) fn holders(socket: &str) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap();
    let pids = processes.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        let mut words = line.split('\0').skip(1);
        words.next() == Some("hold") && words.any(|word| word.ends_with(socket))
    })
    .collect()
}

/// A VMM over the socket of `live`.
pub(crate) fn config(home: &Home, live: &str) -> Config {
    let socket = home.path(&format!("{live}.uffd"));
    Config::small(SEED, PAGES, Backing::firecracker(&socket, Version::V1_12))
}

pub(crate) fn spawn(home: &Home, live: &str) -> SmallVmm {
    SmallVmm::spawn(&config(home, live)).unwrap()
}

/// Commits `live` as `name` while its VM is paused, and checks every byte of it.
pub(crate) fn commit_paused(home: &Home, live: &str, name: &str, vmm: &mut SmallVmm) -> String {
    let expected = home.path("expected");
    vmm.write_expected(&expected).unwrap();
    let object = home.json(&["commit", name, "--live", live, "--state", "state"]);
    let snapshot = object["snapshot"].as_str().unwrap().to_owned();
    assert_memory(home, &snapshot);
    snapshot
}

/// The memory of a snapshot is what the VMM said last that it must be.
pub(crate) fn assert_memory(home: &Home, snapshot: &str) {
    home.ok(&["export", &format!("{snapshot}:memory"), "got", "--force"]);
    let (got, expected) =
        (fs::read(home.path("got")).unwrap(), fs::read(home.path("expected")).unwrap());
    let page =
        got.chunks(4096).zip(expected.chunks(4096)).position(|(got, expected)| got != expected);
    assert_eq!((got.len(), page), (expected.len(), None), "a wrong page in {snapshot}");
}
