//! The serving process dies; another one goes on where it was.

use std::time::Duration;

use crate::fixture::{Home, code};
use crate::memory_fixture::{Memory, commit_paused, config, holders, spawn, with_snapshot};
use crate::nbd_fixture::{kill_before_any_flush, signal, wait_until};
use dormouse_testkit::vmm::{Backing, Config, SmallVmm, Version};

fn status(home: &Home, live: &str) -> serde_json::Value {
    home.json(&["disk", "status", live])["memory"].clone()
}

/// Under load, again and again, for VMMs that keep their socket and for those that do not.
#[test]
fn a_killed_server_is_taken_over_and_the_vm_goes_on() {
    for version in [Version::V1_12, Version::V1_7] {
        let home = with_snapshot();
        let memory = Memory::wake(&home, "vm", "box", &["--window", "16KiB"]);
        let backing = Backing::firecracker(&home.path("box.uffd"), version);
        let mut vmm = SmallVmm::spawn(&Config { backing, ..config(&home, "box") }).unwrap();
        vmm.start_for(Duration::from_millis(1500)).unwrap();
        wait_until("some faults", || status(&home, "box")["faults"].as_u64() > Some(50));
        memory.kill();
        assert_eq!(status(&home, "box")["state"], "unserved");
        home.fails(4, &["serve", "memory", "vm", "--as", "box", "--uffd", "x"]);
        home.fails(10, &["disk", "rm", "box"]);
        home.fails(code::NOT_FOUND, &["commit", "vm", "--live", "box", "--state", "state"]);
        let memory = Memory::take_over(&home, "box");
        assert_eq!(status(&home, "box")["window_bytes"], 16384);
        std::thread::sleep(Duration::from_millis(100));
        memory.kill();
        let mut memory = Memory::take_over(&home, "box");
        vmm.idle().unwrap();
        for _ in 0..2 {
            vmm.run(300).unwrap();
            vmm.pause().unwrap();
            commit_paused(&home, "box", "vm", &mut vmm);
            vmm.resume().unwrap();
        }
        vmm.verify().unwrap();
        vmm.quit().unwrap();
        assert_eq!(memory.code(), code::OK, "{}", memory.messages());
        assert!(!home.store().join("live/box").exists());
    }
}

/// Writes to its disk that were answered and not flushed were lost with the server, and the guest went
/// on over a disk that had forgotten them.
#[test]
fn a_disk_keeps_what_a_killed_server_answered() {
    let home = with_snapshot();
    home.file("d", &crate::fixture::noise(3, 256));
    home.ok(&["commit", "vm", "--disk", "d", "--memory", "mem", "--state", "state"]);
    home.ok(&["disk", "create", "box", "--from", "vm:root"]);
    let memory = Memory::wake(&home, "vm", "box", &["--nbd", "s.nbd"]);
    let mut vmm = spawn(&home, "box");
    vmm.run(500).unwrap();
    let pid = memory.child.id();
    let follow = || {
        memory.kill();
        Memory::take_over(&home, "box")
    };
    let mut memory = kill_before_any_flush(&home, pid, follow);
    vmm.run(500).unwrap();
    vmm.verify().unwrap();
    vmm.quit().unwrap();
    assert_eq!(memory.code(), code::OK, "{}", memory.messages());
}

/// What the commit had sealed is dirty again for the one that takes over.
#[test]
fn a_server_killed_in_the_middle_of_a_commit_loses_no_change() {
    let home = with_snapshot();
    let mut memory = Memory::wake(&home, "vm", "box", &[]);
    let mut vmm = spawn(&home, "box");
    for round in 0..6 {
        vmm.run(1_500).unwrap();
        vmm.pause().unwrap();
        let store = home.store();
        let commit = std::process::Command::new(env!("CARGO_BIN_EXE_dormouse"))
            .arg("--store")
            .arg(&store)
            .args(["commit", "vm", "--live", "box", "--state"])
            .arg(home.path("state"))
            .output_after(Duration::from_millis(round * 12), || memory.kill());
        // Some of them are done before they are killed; some never begin.
        drop(commit);
        memory = Memory::take_over(&home, "box");
        commit_paused(&home, "box", "vm", &mut vmm);
        vmm.resume().unwrap();
    }
    vmm.verify().unwrap();
    home.ok(&["gc"]);
    home.ok(&["verify", "--deep"]);
}

trait OutputAfter {
    /// Runs it, and something else after a while.
    fn output_after(&mut self, wait: Duration, then: impl FnOnce()) -> std::process::Output;
}

impl OutputAfter for std::process::Command {
    fn output_after(&mut self, wait: Duration, then: impl FnOnce()) -> std::process::Output {
        let child = self
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(wait);
        then();
        child.wait_with_output().unwrap()
    }
}

#[test]
fn nobody_takes_over_a_vm_that_died_meanwhile() {
    let home = with_snapshot();
    let memory = Memory::wake(&home, "vm", "box", &[]);
    let mut vmm = spawn(&home, "box");
    vmm.run(500).unwrap();
    memory.kill();
    let holder = home.store().join("live/box/memory/holder");
    assert_eq!(holders(holder.to_str().unwrap()).len(), 1);
    vmm.kill().unwrap();
    wait_until("the holder's end", || holders(holder.to_str().unwrap()).is_empty());
    let said = home.fails(code::NOT_FOUND, &["serve", "memory", "--take-over", "box"]);
    assert!(said.contains("is gone"), "{said}");
    assert!(!home.store().join("live/box").exists());
    // The name can be used again, also if nobody cleaned up.
    let memory = Memory::wake(&home, "vm", "box", &[]);
    let mut vmm = spawn(&home, "box");
    vmm.run(500).unwrap();
    memory.kill();
    vmm.kill().unwrap();
    wait_until("the holder's end", || holders(holder.to_str().unwrap()).is_empty());
    let _memory = Memory::wake(&home, "vm", "box", &[]);
    spawn(&home, "box").run(500).unwrap();
}

/// An update of the server, say: it ends in order, and its VM waits for the next one.
#[test]
fn a_server_that_is_told_to_end_leaves_its_vm_to_the_next() {
    let home = with_snapshot();
    let mut memory = Memory::wake(&home, "vm", "box", &[]);
    let mut vmm = spawn(&home, "box");
    vmm.run(500).unwrap();
    vmm.start(2_000).unwrap();
    signal(memory.child.id(), "TERM");
    assert_eq!(memory.code(), code::OK, "{}", memory.messages());
    let started = home.json(&["serve", "memory", "--take-over", "box", "--background"]);
    assert!(started["pid"].is_u64());
    vmm.idle().unwrap();
    assert_eq!(home.json(&["serve", "stop", "box"])["stopped"], true);
    let mut memory = Memory::take_over(&home, "box");
    vmm.run(500).unwrap();
    vmm.verify().unwrap();
    vmm.quit().unwrap();
    assert_eq!(memory.code(), code::OK);
}
