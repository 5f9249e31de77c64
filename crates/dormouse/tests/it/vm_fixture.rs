//! A store with VMs, whoever plays their VMM.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::fixture::{Home, code};
use crate::mounted::path;

/// How long what nobody needs any more may take to end.
const ENDS: Duration = Duration::from_secs(45);

/// A store with VMs, all of which are ended at the end, and its data plane with them.
pub(crate) struct Vms {
    pub(crate) home: Home,
}

impl Vms {
    pub(crate) fn folder(&self, live: &str) -> PathBuf {
        self.home.store().join("live").join(live)
    }

    /// What `ps` tells of a VM.
    pub(crate) fn state(&self, live: &str) -> Option<Value> {
        let all = self.home.json(&["ps"]);
        all["vms"].as_array().unwrap().iter().find(|vm| vm["name"] == live).cloned()
    }

    /// Processes that have to do with a live VM: its VMM.
    pub(crate) fn processes_of(&self, live: &str) -> Vec<u32> {
        let folder = self.folder(live);
        let mine = |line: &[String]| line.iter().any(|arg| arg.contains(path(&folder)));
        processes().into_iter().filter(|(_, line)| mine(line)).map(|(pid, _)| pid).collect()
    }
}

impl Vms {
    /// The process that serves all disks and memory, or is about to.
    pub(crate) fn plane(&self) -> Option<u32> {
        let files = self.home.store().join("live/.plane/files");
        let is_one = |line: &[String]| {
            let has = |word: &str| line.iter().any(|arg| arg == word);
            has("mount") && has(path(&files)) && !has("hold")
        };
        let all = processes().into_iter().filter(|(_, line)| is_one(line));
        // The last of several: it was started by another, which ends.
        all.map(|(pid, _)| pid).max()
    }

    /// The processes that keep what a successor needs.
    pub(crate) fn holders(&self) -> Vec<u32> {
        let store = self.home.store();
        let is_one = |line: &[String]| {
            line.iter().any(|arg| arg == "hold")
                && line.iter().any(|arg| arg.contains(path(&store)))
        };
        processes().into_iter().filter(|(_, line)| is_one(line)).map(|(pid, _)| pid).collect()
    }

    /// Kills the processes that keep what a successor needs, and waits until others do.
    pub(crate) fn kill_keepers(&self) {
        let keepers = self.holders();
        keepers.iter().for_each(|keeper| kill(*keeper));
        let begun = Instant::now();
        while self.holders().iter().all(|keeper| keepers.contains(keeper)) {
            std::thread::sleep(Duration::from_millis(20));
            assert!(begun.elapsed() < ENDS, "nobody keeps what a successor needs");
        }
        // Each is given what there is after its start.
        std::thread::sleep(Duration::from_millis(700));
    }

    /// Brings all VMs to rest that a kill left in the middle of something; what the command said. A child
    /// that was about to be a VMM has the lock of whoever was killed until it is one.
    pub(crate) fn at_rest(&self) -> String {
        let begun = Instant::now();
        loop {
            let said = self.home.fails(code::NOT_FOUND, &["sleep", "nobody"]);
            let all = self.home.json(&["ps"]);
            let is_busy = |vm: &Value| vm["state"] == "waking" || vm["state"] == "falling_asleep";
            if !all["vms"].as_array().unwrap().iter().any(is_busy) {
                return said;
            }
            assert!(begun.elapsed() < ENDS, "{all}: {said}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Where the data plane captures what VMMs dump.
    pub(crate) fn captures(&self) -> PathBuf {
        self.home.store().join("live/.plane/files/capture")
    }

    /// Starts a command and kills it after a while, if it has not ended; `before` is done just before.
    pub(crate) fn kill_after(&self, arguments: &[&str], delay: Duration, before: impl FnOnce()) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_dormouse"))
            .current_dir(self.home.path("."))
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(delay);
        before();
        // It may have ended.
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Kills the data plane as soon as there is one.
    pub(crate) fn kill_plane(&self) {
        loop {
            if let Some(plane) = self.plane() {
                return kill(plane);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Vms {
    /// Ends all VMs: there is the data plane alone then, with whoever keeps it alive; one mount; and no file
    /// that belongs to nothing.
    pub(crate) fn nothing_is_left(&self) {
        let home = &self.home;
        let all = home.json(&["ps"]);
        for vm in all["vms"].as_array().unwrap() {
            home.ok(&["kill", vm["name"].as_str().unwrap()]);
        }
        home.ok(&["verify", "--deep"]);
        home.ok(&["gc"]);
        let begun = Instant::now();
        let store = home.store();
        let left = loop {
            let left = self.left();
            if left.is_empty() || begun.elapsed() > ENDS {
                break left;
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        assert!(left.is_empty(), "left of {}: {left:#?}", store.display());
    }

    fn left(&self) -> Vec<String> {
        let store = self.home.store();
        let names = |folder: &str| -> Vec<String> {
            let entries = fs::read_dir(store.join(folder)).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        let live = names("live").into_iter().filter(|name| name != ".plane");
        let mut left: Vec<_> = live.map(|name| format!("live/{name}")).collect();
        left.extend(names("tmp").into_iter().map(|name| format!("tmp/{name}")));
        let known = ["control", "files", "lock", "log", "versions"];
        let plane = names("live/.plane").into_iter().filter(|name| !known.contains(&name.as_str()));
        left.extend(plane.map(|name| format!("live/.plane/{name}")));
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mounts: Vec<_> = mounts.lines().filter(|line| line.contains(path(&store))).collect();
        if mounts.len() != 1 {
            left.extend(mounts.iter().map(|line| format!("mount {line}")));
        }
        let of_store = |line: &[String]| line.iter().any(|arg| arg.contains(path(&store)));
        // The holder is told how to start the next one.
        let mut expected = vec!["hold", "mount"];
        for (pid, line) in processes().into_iter().filter(|(_, line)| of_store(line)) {
            match expected.iter().position(|verb| line.iter().any(|arg| arg == verb)) {
                Some(at) => drop(expected.remove(at)),
                None => left.push(format!("process {pid} {line:?}")),
            }
            // One may be closed while it is looked at.
            let descriptors =
                fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            let files = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok());
            let files = files.map(|file| file.display().to_string());
            left.extend(files.filter(|file| file.contains("/live/") && !file.contains("/.plane")));
        }
        left.extend(
            names("live/.plane/files/capture").into_iter().map(|name| format!("capture/{name}")),
        );
        left.extend(names("pins").into_iter().map(|name| format!("pins/{name}")));
        left
    }
}

impl Drop for Vms {
    fn drop(&mut self) {
        let all = self.home.run(&["ps", "--json"]);
        if let Ok(all) = serde_json::from_slice::<Value>(&all.stdout) {
            for vm in all["vms"].as_array().into_iter().flatten() {
                self.home.run(&["kill", vm["name"].as_str().unwrap_or_default()]);
            }
        }
        let mount = self.home.store().join("live/.plane/files");
        // Not there where the test ended early.
        let _ = Command::new("umount").arg(mount).output();
    }
}

/// Kills a process, if it is there.
fn kill(pid: u32) {
    signal(pid, rustix::process::Signal::KILL);
}

/// Signals a process, if it is there.
pub(crate) fn signal(pid: u32, signal: rustix::process::Signal) {
    let number = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    match rustix::process::kill_process(number, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => panic!("{error}"),
    }
}

/// All processes with their arguments.
pub(crate) fn processes() -> Vec<(u32, Vec<String>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        // It may have ended.
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let args = line.split(|byte| *byte == 0).map(|arg| String::from_utf8_lossy(arg).into());
        all.push((pid, args.collect()));
    }
    all
}
