//! VMs, whole: a real guest runs, sleeps, wakes, is forked, and its forks sleep.

use std::fs;
use std::path::PathBuf;

use dormouse_testkit::guest::{Assets, Console, Machine, cache_dir, guest_for_run};
use serde_json::Value;

use crate::fixture::{Home, code};
use crate::mounted::path;

/// A store with VMs, all of which are ended at the end, and its data plane with them.
pub(crate) struct Vms {
    pub(crate) home: Home,
}

impl Vms {
    pub(crate) fn new(machine: Machine) -> Vms {
        let assets = Assets::prepare(&cache_dir(), &mut |_| {}).unwrap();
        let home = Home::with_store();
        home.ok(&["commit", "base", "--disk", path(&assets.disk())]);
        let guest = guest_for_run(&assets, machine, 256, "base:root").unwrap();
        home.file("guest.json", guest.to_string().as_bytes());
        Vms { home }
    }

    pub(crate) fn folder(&self, live: &str) -> PathBuf {
        self.home.store().join("live").join(live)
    }

    pub(crate) fn console(&self, live: &str) -> Console {
        Console::connect(&self.folder(live).join("vmm/serial")).unwrap()
    }

    pub(crate) fn state(&self, live: &str) -> Option<Value> {
        let all = self.home.json(&["ps"]);
        all["vms"].as_array().unwrap().iter().find(|vm| vm["name"] == live).cloned()
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
        let _ = std::process::Command::new("umount").arg(mount).output();
    }
}

#[test]
fn a_guest_sleeps_wakes_is_forked_and_its_forks_sleep() {
    let vms = Vms::new(Machine::Q35);
    let home = &vms.home;
    home.json(&["run", "guest.json", "box"]);
    let mut guest = vms.console("box");
    guest.wait_ready().unwrap();
    guest.check("mount -t tmpfs tmp /mnt && head -c 3000000 /dev/urandom > /mnt/note").unwrap();
    let sum = guest.check("cat /mnt/note > /root/note; sync; sha256sum < /mnt/note").unwrap();
    let stopped_at = guest.wait_counter().unwrap();
    let slept = home.json(&["sleep", "box", "--as", "vm"]);
    assert_eq!(slept["snapshot"], "vm@1");
    assert!(vms.state("box").is_none(), "it ended");
    assert!(!vms.folder("box").exists());

    let woken = home.json(&["wake", "vm", "--as", "box"]);
    assert_eq!(woken["over"], "vm@1");
    let mut guest = vms.console("box");
    let goes_on_at = guest.wait_counter().unwrap();
    assert!(goes_on_at > stopped_at && goes_on_at < stopped_at + 60, "{goes_on_at} {stopped_at}");
    assert_eq!(guest.check("sha256sum < /mnt/note").unwrap(), sum);
    assert_eq!(guest.check("sha256sum < /root/note").unwrap(), sum);
    guest.check("echo second | tee /mnt/second > /root/second; sync").unwrap();
    // It goes on, and is stored all the same.
    let slept = home.json(&["sleep", "box", "--keep-running"]);
    assert_eq!(slept["snapshot"], "vm@2");
    assert_eq!(slept["goes_on"], true);
    assert!(slept["frozen_seconds"].as_f64() <= slept["durable_seconds"].as_f64(), "{slept}");
    guest.wait_counter().unwrap();
    guest.check("rm /mnt/second /root/second; sync").unwrap();
    let state = vms.state("box").unwrap();
    assert_eq!((&state["state"], &state["over"]), (&"awake".into(), &"vm@2".into()));

    let forks = home.json(&["fork", "vm@2", "one", "two"]);
    assert_eq!(forks["forks"].as_array().unwrap().len(), 2);
    for live in ["one", "two"] {
        let mut fork = vms.console(live);
        fork.wait_counter().unwrap();
        assert_eq!(fork.check("cat /mnt/second /root/second").unwrap(), "second\nsecond\n");
        fork.check(&format!("echo {live} | tee /mnt/own > /root/own; sync")).unwrap();
    }
    for live in ["one", "two"] {
        let slept = home.json(&["sleep", live, "--as", live]);
        assert_eq!(slept["snapshot"], format!("{live}@1"));
    }
    // A grandchild, with both what it had and what it did not.
    home.ok(&["wake", "two"]);
    let mut grandchild = vms.console("two");
    grandchild.wait_counter().unwrap();
    assert_eq!(grandchild.check("cat /mnt/own /root/own").unwrap(), "two\ntwo\n");
    assert_eq!(grandchild.check("sha256sum < /mnt/note").unwrap(), sum);
    home.ok(&["kill", "two"]);
    home.ok(&["kill", "box"]);
    assert!(vms.state("box").is_none());
    let left: Vec<_> = fs::read_dir(home.store().join("live")).unwrap().collect();
    assert_eq!(left.len(), 1, "the data plane alone: {left:?}");
    home.ok(&["verify", "--deep"]);
    home.fails(code::NOT_FOUND, &["sleep", "box"]);
    home.fails(code::NOT_FOUND, &["kill", "box"]);
}
