//! VMs of Firecracker and Cloud Hypervisor, played by doubles of their versions whose guests know what
//! every byte of their memory and disks must be: one that is alive is one that is right.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use dormouse_sys::block_device::kernel_name;
use dormouse_testkit::double::{Action, Program, Rule, ask};
use rustix::fs::IFlags;
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process};
use serde_json::{Value, json};

use crate::daemon_fixture::Running;
use crate::fixture::{Home, code, errors};
use crate::mounted::path;
use crate::vm_fixture::Vms;

dormouse_testkit::vmm_doubles!();

const MIB: u64 = 16;

impl Vms {
    /// Of doubles.
    pub(crate) fn of_doubles(program: &Program, vmm: &str) -> Vms {
        let home = Home::with_store();
        let program = program.install(&home.path(".")).unwrap();
        let mut launch = json!({ "vmm": vmm, "program": program });
        if vmm == "firecracker" {
            launch["config"] = json!({
                "machine-config": { "vcpu_count": 2, "mem_size_mib": MIB },
                "boot-source": { "kernel_image_path": "/vmlinux" },
                "drives": [{
                    "drive_id": "root", "path_on_host": "{disk:root}", "is_root_device": true,
                    "is_read_only": false, "io_engine": "Async",
                }],
            });
        } else {
            let disk = "path={disk:root},id=root";
            launch["args"] =
                json!(["--memory", "size=16M,shared=on", "--kernel", "/vmlinux", "--disk", disk]);
        }
        let guest = json!({ "launch": launch, "disks": [{ "id": "root", "size": 1 << 20 }] });
        home.file("guest.json", guest.to_string().as_bytes());
        Vms { home }
    }

    /// Of doubles that ask for their memory page by page.
    pub(crate) fn of_asking_doubles(version: &str) -> Vms {
        let vms = Vms::of_doubles(&Program::firecracker(version), "firecracker");
        vms.change_guest("guest.json", |guest| guest["memory_backend"] = "uffd".into());
        vms
    }

    /// Writes the guest anew, changed, to a file.
    pub(crate) fn change_guest(&self, file: &str, change: impl FnOnce(&mut Value)) -> PathBuf {
        let text = fs::read_to_string(self.home.path("guest.json")).unwrap();
        let mut guest = serde_json::from_str(&text).unwrap();
        change(&mut guest);
        self.home.file(file, guest.to_string().as_bytes())
    }

    pub(crate) fn call(&self, live: &str, method: &str, what: &str, body: &str) -> String {
        self.api(live, method, &format!("/double/{what}"), body)
    }

    /// Asks a VMM behind our back.
    pub(crate) fn api(&self, live: &str, method: &str, what: &str, body: &str) -> String {
        let answer = ask(&self.folder(live).join("vmm/api"), method, what, body).unwrap();
        assert!(answer.starts_with("HTTP/1.1 20"), "{live}: {method} {what}: {answer:?}");
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    fn count(&self, live: &str) -> u64 {
        let report: Value = serde_json::from_str(&self.call(live, "GET", "report", "")).unwrap();
        report["count"].as_u64().unwrap()
    }

    /// Lets the guest work, and checks all it has.
    pub(crate) fn work(&self, live: &str) {
        let (before, begun) = (self.count(live), Instant::now());
        while self.count(live) < before + 20 {
            std::thread::sleep(Duration::from_millis(5));
            assert!(begun.elapsed() < Duration::from_secs(60), "{live} does not work");
        }
        self.call(live, "PUT", "verify", "");
    }

    pub(crate) fn rules(&self, live: &str, rules: &[Rule]) {
        self.call(live, "PUT", "behaviour", &serde_json::to_string(rules).unwrap());
    }

    /// A keeper that nobody gave anything ends a while after.
    pub(crate) fn wait_for_ends(&self, live: &str, what: &str) {
        let begun = Instant::now();
        while !self.processes_of(live).is_empty() {
            std::thread::sleep(Duration::from_millis(20));
            assert!(begun.elapsed() < Duration::from_secs(45), "{what}");
        }
    }

    /// Wakes a VM whose VMM does something else at a call; nothing may be left of it.
    fn wake_badly(&self, call: &str, action: Action) -> Output {
        let (home, what) = (&self.home, format!("{call} {action:?}"));
        let bad = Program::firecracker("1.13.1").rule(rule(call, action));
        let folder = home.path("bad");
        fs::create_dir_all(&folder).unwrap();
        let program = bad.install(&folder).unwrap();
        let said = home.run(&["wake", "vm", "--as", "fork", "--vmm", path(&program)]);
        assert!(!said.status.success(), "{what}");
        assert_eq!(self.state("fork"), None, "{what}: {said:?}");
        assert!(!self.folder("fork").exists(), "{what}: {said:?}");
        assert!(self.processes_of("fork").is_empty(), "{what}");
        said
    }

    /// The word for what a VM does.
    pub(crate) fn word(&self, live: &str) -> Option<String> {
        self.state(live).map(|vm| vm["state"].as_str().unwrap().to_owned())
    }
}

fn rule(call: &str, action: Action) -> Rule {
    Rule { call: call.to_owned(), skip: 0, times: Some(1), action }
}

/// Runs, sleeps and goes on, wakes twice, and the forks sleep and wake.
fn lives(vms: &Vms) {
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    let slept = home.json(&["sleep", "box", "--as", "vm", "--keep-running"]);
    assert_eq!(slept["snapshot"], "vm@1");
    vms.work("box");
    assert_eq!(home.json(&["sleep", "box"])["snapshot"], "vm@2");
    assert_eq!(vms.state("box"), None);
    home.json(&["fork", "vm", "one", "two"]);
    for live in ["one", "two"] {
        vms.work(live);
        home.ok(&["sleep", live, "--as", live, "--keep-running"]);
        vms.work(live);
        home.ok(&["sleep", live, "--as", live]);
    }
    home.ok(&["wake", "one@1", "--as", "box"]);
    home.ok(&["wake", "two@2", "--as", "two"]);
    vms.work("box");
    vms.work("two");
    home.ok(&["wake", "vm@1", "--as", "first"]);
    vms.work("first");
    home.ok(&["verify", "--deep"]);
}

#[test]
fn firecracker_of_each_version_lives_and_is_forked() {
    for version in ["1.7.0", "1.13.1", "1.16.1"] {
        lives(&Vms::of_doubles(&Program::firecracker(version), "firecracker"));
    }
}

#[test]
fn cloud_hypervisor_of_each_version_lives_and_is_forked() {
    for version in ["51.0", "53.0"] {
        lives(&Vms::of_doubles(&Program::cloud_hypervisor(version), "cloud-hypervisor"));
    }
}

/// A sleep and an import called the same files by different names, so that neither was of use to the other:
/// no folder could be made of a guest that slept, and none that came in could wake.
#[test]
fn cloud_hypervisor_goes_out_as_its_own_folder_and_comes_in_again() {
    let vms = Vms::of_doubles(&Program::cloud_hypervisor("53.0"), "cloud-hypervisor");
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    home.ok(&["sleep", "box", "--as", "files"]);
    home.ok(&["export", "files", "out", "--as", "cloud-hypervisor"]);
    // As on another host.
    fs::rename(home.path("out"), home.path("moved")).unwrap();
    let import = home.json(&["import", "cloud-hypervisor", "moved", "came", "--verify"]);
    let images = &home.json(&["show", "came"])["manifest"]["images"];
    let names: Vec<_> = images.as_array().unwrap().iter().map(|row| &row["image"]).collect();
    assert_eq!(names, ["disk/root", "memory", "state/config.json", "state/state.json"], "{import}");
    home.fails(code::REFUSED, &["wake", "came", "--as", "box"]);
    home.ok(&["wake", "came", "--as", "box", "--guest", "guest.json"]);
    vms.work("box");
    assert_eq!(home.json(&["sleep", "box", "--as", "came"])["snapshot"], "came@2");
    home.ok(&["export", "came@2", "again", "--as", "cloud-hypervisor"]);
    home.ok(&["wake", "came", "--as", "box"]);
    vms.work("box");
}

#[test]
fn firecracker_that_asks_for_its_memory_lives_and_is_forked() {
    for version in ["1.7.0", "1.13.1", "1.16.1"] {
        lives(&Vms::of_asking_doubles(version));
    }
}

/// However few descriptors the data plane has left, a VM wakes, or whoever wakes it is told what is missing;
/// nothing stays of one that did not wake, and the next one does.
#[test]
fn a_data_plane_without_descriptors_says_so_and_has_them_again() {
    let vms = Vms::of_asking_doubles("1.13.1");
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    home.ok(&["sleep", "box", "--as", "vm"]);
    let plane = vms.plane().unwrap();
    let has = fs::read_dir(format!("/proc/{plane}/fd")).unwrap().count() as u64;
    let plane = Pid::from_raw(plane.cast_signed());
    let (mut woke, mut without_keeper) = (0, 0);
    for more in 0..40 {
        let plenty = rustix::process::getrlimit(Resource::Nofile);
        let few = Rlimit { current: Some(has + more), ..plenty };
        rustix::process::prlimit(plane, Resource::Nofile, few).unwrap();
        let said = home.run(&["wake", "vm", "--as", "box"]);
        rustix::process::prlimit(plane, Resource::Nofile, plenty).unwrap();
        if said.status.success() {
            woke += 1;
            home.ok(&["kill", "box"]);
        } else {
            let text = String::from_utf8_lossy(&said.stderr);
            without_keeper += u32::from(text.contains("keeps descriptors: Too many open files"));
            assert!(!vms.folder("box").exists(), "{more}: {text}");
        }
    }
    assert!(woke > 0 && without_keeper > 0, "{woke} {without_keeper}");
    home.ok(&["wake", "vm", "--as", "box"]);
    vms.work("box");
    vms.nothing_is_left();
}

/// The process that answers page faults is killed with guests at work, some of which it has not given
/// most of their memory yet: they wait, and go on.
#[test]
fn guests_that_ask_for_their_memory_outlive_the_data_plane() {
    let vms = Vms::of_asking_doubles("1.13.1");
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["fork", "vm", "one", "two"]);
    let status = home.json(&["disk", "status", "one"]);
    assert_eq!(status["memory"]["state"], "served", "{status}");
    for round in 0..6 {
        vms.kill_plane();
        if round % 2 == 0 {
            vms.work("one");
        }
        let slept = home.json(&["sleep", "two", "--as", "two", "--keep-running"]);
        assert!(slept["written_bytes"].as_u64().unwrap() < 8 << 20, "what changed alone: {slept}");
        vms.work("two");
    }
    home.ok(&["rm", "vm@1"]);
    home.ok(&["gc"]);
    vms.kill_plane();
    vms.work("one");
    home.ok(&["sleep", "one"]);
    home.ok(&["kill", "two"]);
    for snap in home.snapshots() {
        home.ok(&["wake", &snap, "--as", "last"]);
        vms.work("last");
        home.ok(&["kill", "last"]);
    }
    let left: Vec<_> = fs::read_dir(home.store().join("live")).unwrap().collect();
    assert_eq!(left.len(), 1, "the data plane alone: {left:?}");
    let left: Vec<_> = fs::read_dir(vms.captures()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Whatever a VMM does instead of what a sleep asks of it, the VM runs on if its VMM lives, and what was
/// stored before is as it was.
#[test]
fn a_vmm_that_fails_at_any_call_of_a_sleep_costs_that_sleep_alone() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    home.ok(&["sleep", "box", "--as", "vm"]);
    let refuse = || Action::Refuse(400, "{\"fault_message\":\"no\"}".to_owned());
    let cases = [
        ("PATCH /vm", refuse(), true),
        ("PATCH /vm", Action::Close, true),
        ("PATCH /vm", Action::Garbage, true),
        ("PATCH /vm", Action::Die, false),
        ("PATCH /vm", Action::DieAfter, false),
        ("PUT /snapshot/create", refuse(), true),
        ("PUT /snapshot/create", Action::Close, true),
        ("PUT /snapshot/create", Action::CutFile("vmstate".to_owned()), true),
        ("PUT /snapshot/create", Action::Die, false),
        ("PUT /snapshot/create", Action::DieAfter, false),
    ];
    for (call, action, lives) in cases {
        let what = format!("{call} {action:?}");
        home.ok(&["wake", "vm@1", "--as", "box"]);
        vms.work("box");
        vms.rules("box", &[rule(call, action)]);
        let said = home.run(&["sleep", "box", "--as", "vm"]);
        assert!(!said.status.success(), "{what}: {said:?}");
        assert_eq!(home.snapshots(), ["vm@1"], "{what}");
        assert!(!vms.folder("box").join("vmm/save").exists(), "{what}");
        if lives {
            assert_eq!(vms.word("box").as_deref(), Some("awake"), "{what}: {said:?}");
            vms.work("box");
            home.ok(&["kill", "box"]);
        } else {
            assert_eq!(vms.word("box").as_deref(), Some("failed"), "{what}: {said:?}");
            // Its disks are there for whoever wants them.
            home.ok(&["disk", "commit", "box", "wreck", "--parent", "none"]);
            home.ok(&["rm", "wreck"]);
            home.ok(&["kill", "box"]);
        }
        assert!(vms.processes_of("box").is_empty(), "{what}");
    }
}

/// A VMM that hangs is given up after a while; one that comes back runs on, as it was.
#[test]
fn a_vmm_that_hangs_costs_that_sleep_and_that_wake_alone() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    home.ok(&["sleep", "box", "--as", "vm", "--keep-running"]);
    vms.rules("box", &[rule("PATCH /vm", Action::Hang)]);
    let begun = Instant::now();
    let said = home.run(&["sleep", "box", "--as", "vm"]);
    assert!(!said.status.success() && begun.elapsed() < Duration::from_secs(50), "{said:?}");
    assert!(errors(&said).contains("no answer within"), "{said:?}");
    assert_eq!(vms.word("box").as_deref(), Some("awake"), "{said:?}");
    vms.work("box");
    assert_eq!(home.snapshots(), ["vm@1"]);
    let said = vms.wake_badly("PATCH /vm", Action::Hang);
    assert!(errors(&said).contains("no answer within"), "{said:?}");
}

/// A VMM that fails while it wakes leaves nothing.
#[test]
fn a_vmm_that_fails_at_any_call_of_a_wake_leaves_nothing() {
    let good = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    good.home.ok(&["run", "guest.json", "box"]);
    good.home.ok(&["sleep", "box", "--as", "vm"]);
    let home = &good.home;
    for (call, action) in [
        ("PUT /snapshot/load", Action::Die),
        ("PUT /snapshot/load", Action::DieAfter),
        ("PUT /snapshot/load", Action::Close),
        ("PUT /snapshot/load", Action::Refuse(400, "{\"fault_message\":\"no\"}".to_owned())),
        ("PATCH /drives", Action::Die),
        ("PATCH /drives", Action::Refuse(400, "{\"fault_message\":\"no\"}".to_owned())),
        ("PUT /snapshot/load", Action::Garbage),
        ("PATCH /vm", Action::Close),
        ("PATCH /vm", Action::Die),
        ("PATCH /vm", Action::DieAfter),
        ("PATCH /vm", Action::Refuse(400, "{\"fault_message\":\"no\"}".to_owned())),
        ("GET /", Action::Die),
        ("GET /", Action::Garbage),
    ] {
        good.wake_badly(call, action);
    }
    home.ok(&["wake", "vm", "--as", "fork"]);
    good.work("fork");
}

/// Every process of ours is killed at any moment of sleeps and wakes, again and again, with the guest at
/// work: it is never wrong, no snapshot is, and nothing is left behind.
#[test]
fn a_hundred_crashes_cost_nothing() {
    crashes(&Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker"), 100);
}

#[test]
fn crashes_cost_nothing_with_memory_that_is_asked_for() {
    crashes(&Vms::of_asking_doubles("1.13.1"), 60);
}

/// Its memory goes through a capture each time.
#[test]
fn crashes_cost_nothing_with_memory_that_is_dumped() {
    crashes(&Vms::of_doubles(&Program::cloud_hypervisor("51.0"), "cloud-hypervisor"), 60);
}

/// Whole memory of a guest that ends is stored as its VMM writes it, and lies in no file; a kill after that
/// leaves nothing of it, and the guest goes on.
#[test]
fn memory_that_is_dumped_is_stored_as_it_comes() {
    for (program, vmm, call, files) in [
        (Program::firecracker("1.13.1"), "firecracker", "PUT /snapshot/create", &["memory"][..]),
        (
            Program::cloud_hypervisor("53.0"),
            "cloud-hypervisor",
            "PUT /api/v1/vm.snapshot",
            &["config.json", "memory-ranges", "state.json"],
        ),
    ] {
        let vms = Vms::of_doubles(&program, vmm);
        let home = &vms.home;
        home.ok(&["run", "guest.json", "box"]);
        vms.work("box");
        vms.rules("box", &[rule(call, Action::HangAfter)]);
        let capture = vms.captures().join("box");
        let begun = Instant::now();
        vms.kill_after(&["sleep", "box", "--as", "vm"], Duration::ZERO, || {
            let memory = capture.join(files.iter().find(|file| file.starts_with('m')).unwrap());
            let all = || files.iter().all(|file| capture.join(file).exists());
            // It is told when all of it is durable.
            while !(all() && fs::read(capture.join("captured.json")).is_ok()) {
                std::thread::sleep(Duration::from_millis(5));
                assert!(begun.elapsed() < Duration::from_secs(20), "{vmm}: {capture:?}");
            }
            assert_eq!(fs::metadata(memory).unwrap().len(), MIB << 20);
            let saved = fs::read_dir(vms.folder("box").join("vmm/save")).unwrap();
            let saved: Vec<_> = saved.map(|entry| entry.unwrap().file_name()).collect();
            assert!(saved.iter().all(|name| name == "vmstate"), "{vmm}: {saved:?}");
        });
        vms.at_rest();
        assert!(!capture.exists(), "{vmm}");
        assert_eq!(home.snapshots(), [""; 0], "{vmm}");
        vms.work("box");
        let slept = home.json(&["sleep", "box", "--as", "vm"]);
        assert!(slept["written_bytes"].as_u64().unwrap() > 512 << 10, "with its memory: {slept}");
        assert!(!capture.exists(), "{vmm}");
        home.ok(&["wake", "vm", "--as", "box"]);
        vms.work("box");
    }
}

/// Whoever sleeps is told to stop, while the VMM dumps and while the data plane stores: the guest goes on, and
/// nothing was stored.
#[test]
fn a_sleep_is_stopped() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    vms.change_guest("guest.json", |guest| {
        guest["launch"]["config"]["machine-config"]["mem_size_mib"] = 512.into();
    });
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    let stop = |while_what: &str, when: &mut dyn FnMut()| {
        let mut sleep = Command::new(env!("CARGO_BIN_EXE_dormouse"));
        sleep.current_dir(home.path(".")).args(["sleep", "box", "--as", "vm", "--keep-running"]);
        let child = sleep.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let number = Pid::from_child(&child);
        when();
        kill_process(number, Signal::INT).unwrap();
        let plane = Pid::from_raw(vms.plane().unwrap().try_into().unwrap()).unwrap();
        // Asked by now, where it stands still.
        std::thread::sleep(Duration::from_millis(500));
        kill_process(plane, Signal::CONT).unwrap();
        let said = child.wait_with_output().unwrap();
        assert_eq!(said.status.code(), Some(code::CANCELLED), "{while_what}: {said:?}");
        assert_eq!(vms.word("box").as_deref(), Some("awake"), "{while_what}");
        assert!(!vms.folder("box").join("vmm/save").exists(), "{while_what}");
        assert_eq!(home.snapshots(), [""; 0], "{while_what}");
        vms.work("box");
    };
    vms.rules("box", &[rule("PUT /snapshot/create", Action::Slow(1000))]);
    stop("dumping", &mut || {
        while vms.word("box").as_deref() != Some("falling_asleep") {
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    stop("storing", &mut || {
        while home.json(&["disk", "status", "box"])["is_committing"] != true {
            std::thread::sleep(Duration::from_millis(5));
        }
        let plane = Pid::from_raw(vms.plane().unwrap().try_into().unwrap()).unwrap();
        kill_process(plane, Signal::STOP).unwrap();
    });
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["wake", "vm", "--as", "box"]);
    vms.work("box");
}

/// The data plane is killed at any moment of a sleep: it has failed, or there is a snapshot, and never both.
#[test]
fn a_sleep_has_failed_or_there_is_a_snapshot() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    let mut ends = [0; 2];
    for round in 0..40 {
        let before = home.snapshots().len();
        let mut sleep = Command::new(env!("CARGO_BIN_EXE_dormouse"));
        sleep.current_dir(home.path(".")).args(["sleep", "box", "--as", "vm", "--keep-running"]);
        let child = sleep.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(round * 7919 % 120_000));
        vms.kill_plane();
        let said = child.wait_with_output().unwrap();
        let more = home.snapshots().len() - before;
        assert_eq!(usize::from(said.status.success()), more, "round {round}: {said:?}");
        ends[more] += 1;
        vms.work("box");
    }
    assert!(ends.iter().all(|count| *count > 0), "both were seen: {ends:?}");
}

/// Why a VM that goes on was not stored can be asked for, until it is.
#[test]
fn a_sleep_that_failed_is_told_with_the_vm() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    let refuse = Action::Refuse(400, "{\"fault_message\":\"no, not today\"}".to_owned());
    vms.rules("box", &[rule("PUT /snapshot/create", refuse)]);
    let sleep = ["sleep", "box", "--as", "vm", "--keep-running"];
    assert!(!home.run(&sleep).status.success());
    assert_eq!(home.json(&["inspect", "box"])["vmm_version"], "1.13.1");
    let problem = vms.state("box").unwrap()["problem"].as_str().unwrap().to_owned();
    assert!(problem.contains("not stored") && problem.contains("not today"), "{problem}");
    assert_eq!(vms.word("box").as_deref(), Some("awake"));
    home.ok(&sleep);
    assert_eq!(vms.state("box").unwrap()["problem"], Value::Null);
}

/// A disk that the VMM has not open keeps its guest waiting no longer than the others.
#[test]
fn a_disk_that_nobody_opened_is_stored_at_once() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    let home = &vms.home;
    vms.change_guest("guest.json", |guest| {
        guest["launch"]["config"]["drives"] = json!([]);
        guest["launch"]["config"]["boot-source"]["boot_args"] = "root={disk:root}".into();
    });
    home.ok(&["run", "guest.json", "box"]);
    let slept = home.json(&["sleep", "box", "--as", "vm", "--keep-running"]);
    let waited = slept["frozen_seconds"].as_f64().unwrap() - slept["vmm_seconds"].as_f64().unwrap();
    assert!(waited < 4.0, "{slept}");
}

/// ext4 gives folders below one with this flag parts of the disk far from each other. Without it, and without
/// a journal, each file of a VM takes the longer the more were removed of others in the last minutes.
#[test]
fn folders_of_vms_lie_far_from_each_other_without_a_journal() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    vms.home.ok(&["run", "guest.json", "box"]);
    let lives = fs::File::open(vms.home.store().join("live")).unwrap();
    let name = kernel_name(lives.metadata().unwrap().dev()).unwrap_or_default();
    // It names the mode of its journal, if it has one.
    match fs::read_to_string(PathBuf::from("/proc/fs/ext4").join(name).join("options")) {
        Ok(options) => {
            let flags = rustix::fs::ioctl_getflags(&lives).unwrap();
            assert_eq!(flags.contains(IFlags::TOPDIR), !options.contains("data="), "{options}");
        }
        Err(_) => eprintln!("NOT TESTED: this is not ext4"),
    }
}

/// Whoever wakes VMs is told to stop: those that do not run yet are gone, with all that was theirs.
#[test]
fn a_fork_is_stopped() {
    stop_wakes(None);
}

/// The daemon did them to their end, though whoever asked was told that nothing came of it.
#[test]
fn a_fork_is_stopped_that_the_daemon_does() {
    stop_wakes(Some(&[]));
}

fn stop_wakes(daemon: Option<&[&str]>) {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    let home = &vms.home;
    let _daemon = daemon.map(|args| Running::start(home, args));
    home.ok(&["run", "guest.json", "box"]);
    home.ok(&["sleep", "box", "--as", "vm"]);
    let slow = Program::firecracker("1.13.1").rule(rule("PUT /snapshot/load", Action::Slow(1000)));
    let folder = home.path("slow");
    fs::create_dir_all(&folder).unwrap();
    let program = slow.install(&folder).unwrap();
    for arguments in [&["wake", "vm", "--as", "one"][..], &["fork", "vm", "one", "two", "three"]] {
        let mut wake = Command::new(env!("CARGO_BIN_EXE_dormouse"));
        wake.current_dir(home.path(".")).args(arguments).args(["--vmm", path(&program)]);
        let child = wake.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let number = Pid::from_child(&child);
        let begun = Instant::now();
        while !vms.folder("one").join("vmm/api").exists() {
            std::thread::sleep(Duration::from_millis(5));
            assert!(begun.elapsed() < Duration::from_secs(30), "no VMM was started");
        }
        kill_process(number, Signal::INT).unwrap();
        let said = child.wait_with_output().unwrap();
        assert_eq!(said.status.code(), Some(code::CANCELLED), "{said:?}");
        for live in ["one", "two", "three"] {
            assert!(!vms.folder(live).exists(), "{live}: {said:?}");
            assert!(vms.processes_of(live).is_empty(), "{live}: {said:?}");
        }
    }
}

/// A guest that could not be woken as it slept: it was run, it slept, and no wake brought it back.
#[test]
fn a_guest_with_disks_that_a_wake_would_not_find_is_refused() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    let home = &vms.home;
    let drives = |drives: Value| {
        vms.change_guest("other.json", |guest| guest["launch"]["config"]["drives"] = drives);
        let said = home.fails(code::USAGE, &["run", "other.json", "box"]);
        assert!(!vms.folder("box").exists(), "{said}");
        said
    };
    let drive = json!({ "drive_id": "rootfs", "path_on_host": "{disk:root}", "is_root_device": true,
        "is_read_only": false });
    let said = drives(json!([drive]));
    assert!(said.contains("\"rootfs\" has disk \"root\""), "{said}");
    let said = drives(json!([]));
    assert!(said.contains("{disk:root} stands nowhere"), "{said}");
    let mut right = drive.clone();
    right["drive_id"] = "root".into();
    let foreign = json!({ "drive_id": "data", "path_on_host": "/data", "is_root_device": false,
        "is_read_only": false });
    let said = drives(json!([right, foreign]));
    assert!(said.contains("/data is written to"), "{said}");
}

/// Cloud Hypervisor calls a disk `_disk0` that is given no id, and no wake found it.
#[test]
fn a_cloud_hypervisor_disk_without_an_id_has_ours() {
    let vms = Vms::of_doubles(&Program::cloud_hypervisor("51.0"), "cloud-hypervisor");
    let home = &vms.home;
    vms.change_guest("guest.json", |guest| {
        let args = guest["launch"]["args"].as_array_mut().unwrap();
        *args.last_mut().unwrap() = "path={disk:root}".into();
    });
    home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["wake", "vm", "--as", "box"]);
    vms.work("box");
}

/// What is asked of a VMM that has no way to be told, or would be the same for several, is refused.
#[test]
fn overrides_that_cannot_be_are_refused() {
    let vms = Vms::of_doubles(&Program::firecracker("1.16.0"), "firecracker");
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    home.ok(&["sleep", "box", "--as", "vm"]);
    for (options, what) in
        [(["--vsock", "/tmp/v"], "vsock socket"), (["--network", "eth0=tap0"], "the device of 2")]
    {
        let said = home.fails(code::USAGE, &["fork", "vm", "one", "two", options[0], options[1]]);
        assert!(said.contains(what) && said.contains("{name}"), "{said}");
        assert!(!vms.folder("one").exists());
    }
    let guest = json!({ "launch": { "vmm": "qemu", "program": "/bin/true", "memory_bytes": 4096,
        "args": ["-machine", "q35", "-hda", "{disk:root}"] }, "disks": [{ "id": "root", "size": 1 }] });
    home.file("qemu.json", guest.to_string().as_bytes());
    for options in [["--vsock", "v"], ["--network", "eth0=tap0"]] {
        let arguments = ["wake", "vm", "--guest", "qemu.json", "--as", "q", options[0], options[1]];
        let said = home.fails(code::REFUSED, &arguments);
        assert!(said.contains("by its arguments"), "{said}");
    }
}

/// A sleep hangs at its VMM: the VM is ended at once all the same, and the sleep with it.
#[test]
fn a_vm_that_hangs_in_a_sleep_is_killed() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    home.ok(&["sleep", "box", "--as", "vm", "--keep-running"]);
    vms.rules("box", &[rule("PATCH /vm", Action::Hang)]);
    let mut sleep = Command::new(env!("CARGO_BIN_EXE_dormouse"));
    sleep.current_dir(home.path(".")).args(["sleep", "box"]).stderr(Stdio::piped());
    let child = sleep.spawn().unwrap();
    let begun = Instant::now();
    while vms.word("box").as_deref() != Some("falling_asleep") {
        std::thread::sleep(Duration::from_millis(5));
        assert!(begun.elapsed() < Duration::from_secs(30));
    }
    // Its name is not another VM's: it is free before long.
    let said = home.fails(code::BUSY, &["wake", "vm", "--as", "box"]);
    assert!(said.contains("falls asleep"), "{said}");
    let begun = Instant::now();
    home.ok(&["kill", "box"]);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let said = child.wait_with_output().unwrap();
    assert!(!said.status.success() && errors(&said).contains("the VMM has ended"), "{said:?}");
    assert!(!vms.folder("box").exists() && home.snapshots() == ["vm@1"]);
}

/// What runs before a sleep is missing: it is no VM that is not found.
#[test]
fn a_program_that_is_not_there_before_a_sleep_leaves_the_vm_running() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    let home = &vms.home;
    vms.change_guest("guest.json", |guest| guest["before_sleep"] = json!(["/none/there"]));
    home.ok(&["run", "guest.json", "box"]);
    let said = home.fails(1, &["sleep", "box"]);
    assert!(said.contains("/none/there") && said.contains("the VM runs on"), "{said}");
    vms.work("box");
}

/// What cannot be is refused before anything is made.
#[test]
fn a_vmm_that_would_not_load_a_state_is_not_started() {
    let vms = Vms::of_doubles(&Program::firecracker("1.7.0"), "firecracker");
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    home.ok(&["sleep", "box", "--as", "vm"]);
    let folder = home.path("other");
    fs::create_dir_all(&folder).unwrap();
    let program = Program::firecracker("1.8.0").install(&folder).unwrap();
    let said = home.run(&["wake", "vm", "--vmm", path(&program)]);
    assert!(!said.status.success());
    assert!(!errors(&said).contains("VMM said"), "it was started: {said:?}");
    assert!(errors(&said).contains("1.8.0"), "{said:?}");
    let long = "x".repeat(100);
    let said = home.fails(code::USAGE, &["wake", "vm", "--as", &long]);
    assert!(said.contains("the kernel takes 107"), "{said}");
    assert!(!vms.folder(&long).exists());
}

fn crashes(vms: &Vms, count: u64) {
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    home.ok(&["sleep", "box", "--as", "vm", "--keep-running"]);
    let mut rounds = [0; 3];
    for round in 0..count {
        // Some sleeps shall come to their end, also on a machine that does much else.
        let longest = if round % 4 == 1 { 400_000 } else { 150_000 };
        let delay = Duration::from_micros(round * 7919 % longest);
        let all = home.snapshots();
        let newest = all.last().unwrap();
        let arguments: &[&str] = match round % 4 {
            0 => &["sleep", "box", "--as", "vm", "--keep-running"],
            1 => &["sleep", "box", "--as", "vm"],
            _ => &["wake", newest, "--as", "fork"],
        };
        vms.kill_after(arguments, delay, || {
            if round % 5 == 4 {
                vms.kill_plane();
            }
        });
        if round % 10 == 3 {
            vms.kill_keepers();
        }
        // Whatever was left in the middle of something is brought to rest.
        let said = vms.at_rest();
        match vms.word("box").as_deref() {
            Some("awake") => rounds[0] += 1,
            None => {
                assert_eq!(round % 4, 1, "round {round}: {said}");
                assert!(!all.contains(&home.snapshots().pop().unwrap()), "round {round}: lost");
                assert!(vms.processes_of("box").is_empty(), "round {round}");
                rounds[1] += 1;
                let newest = home.snapshots().pop().unwrap();
                home.ok(&["wake", &newest, "--as", "box"]);
            }
            other => panic!("round {round}: {other:?}: {said}"),
        }
        assert!(!vms.folder("box").join("vmm/save").exists(), "round {round}: {said}");
        vms.work("box");
        match vms.word("fork").as_deref() {
            Some("awake") => {
                rounds[2] += 1;
                vms.work("fork");
                home.ok(&["kill", "fork"]);
            }
            None => {
                assert!(!vms.folder("fork").exists(), "round {round}: {said}");
                vms.wait_for_ends("fork", &format!("round {round}: {said}"));
            }
            other => panic!("round {round}: {other:?}: {said}"),
        }
    }
    assert!(rounds.iter().all(|count| *count > 0), "all outcomes were seen: {rounds:?}");
    vms.nothing_is_left();
}
