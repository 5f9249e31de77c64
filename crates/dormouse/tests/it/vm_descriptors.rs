//! Cloud Hypervisors that hand their snapshots over by descriptors, and take them back.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::{Duration, Instant};

use dormouse_testkit::double::{Action, Program, Rule};
use serde_json::json;

use crate::daemon_fixture::Running;
use crate::fixture::{code, errors};
use crate::vm_fixture::Vms;

/// One whose guest is to be handed over by descriptors, its memory in two slots.
fn by_descriptors(version: &str) -> Vms {
    of(&Program::cloud_hypervisor(version))
}

/// The same, asleep as `vm`, which asks for a page behind its guest's back every so many microseconds.
fn filling_slowly(rest_us: u64) -> Vms {
    let vms = of(&Program::cloud_hypervisor("54.0").prefault_rest_us(rest_us));
    vms.home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    vms.home.ok(&["sleep", "box", "--as", "vm"]);
    vms
}

fn of(program: &Program) -> Vms {
    let program = program.clone().regions_mib("10,6");
    let vms = Vms::of_doubles(&program, "cloud-hypervisor");
    vms.change_guest("guest.json", |guest| guest["launch"]["transfer"] = json!("descriptors"));
    vms
}

fn images(vms: &Vms, snap: &str) -> Vec<String> {
    let shown = vms.home.json(&["show", snap]);
    let rows = shown["manifest"]["images"].as_array().unwrap();
    let mut names: Vec<_> =
        rows.iter().map(|row| row["image"].as_str().unwrap().to_owned()).collect();
    names.sort_unstable();
    names
}

/// A guest that woke from files goes to sleep by descriptors before all of its memory was read: it is waited
/// for that, while it goes on.
#[test]
fn a_sleep_waits_for_memory_that_is_still_read() {
    let vms = by_descriptors("53.0");
    let home = &vms.home;
    let files = vms.change_guest("files.json", |guest| {
        guest["launch"]["transfer"] = json!("files");
    });
    home.ok(&["run", files.to_str().unwrap(), "box"]);
    vms.work("box");
    home.ok(&["sleep", "box", "--as", "vm"]);
    for _ in 0..4 {
        home.ok(&["wake", "vm@1", "--guest", "guest.json", "--as", "one"]);
        home.ok(&["sleep", "one", "--as", "other"]);
    }
    home.ok(&["wake", "other", "--as", "one"]);
    vms.work("one");
}

/// A guest that knows all its memory and disks sleeps, wakes, is forked, and its grandchildren do the
/// same; no dump of its memory lies anywhere.
#[test]
fn it_lives_and_is_forked() {
    for version in ["53.0", "54.0"] {
        let vms = by_descriptors(version);
        let home = &vms.home;
        home.ok(&["run", "guest.json", "box"]);
        vms.work("box");
        home.ok(&["sleep", "box", "--as", "vm", "--keep-running"]);
        vms.work("box");
        // 53 ends when it has handed its guest over, and writes files for one that goes on.
        let has_descriptors =
            images(&vms, "vm@1").contains(&"state/migration-config.json".to_owned());
        assert_eq!(has_descriptors, version == "54.0", "{version}");
        assert_eq!(home.json(&["sleep", "box"])["snapshot"], "vm@2");
        assert_eq!(vms.state("box"), None);
        assert!(vms.processes_of("box").is_empty());
        assert_eq!(
            images(&vms, "vm@2"),
            [
                "disk/root",
                "memory",
                "state/dormouse-guest.json",
                "state/migration-config.json",
                "state/state.json"
            ]
        );
        let told =
            home.fails(code::UNSUPPORTED, &["export", "vm@2", "out", "--as", "cloud-hypervisor"]);
        assert!(told.contains("by descriptors") && !home.path("out").exists(), "{told}");
        home.ok(&["fork", "vm", "one", "two"]);
        for live in ["one", "two"] {
            vms.work(live);
            home.ok(&["sleep", live, "--as", live]);
        }
        home.ok(&["wake", "one", "--as", "grandchild"]);
        vms.work("grandchild");
        home.ok(&["sleep", "grandchild", "--as", "late"]);
        home.ok(&["wake", "late", "--as", "last"]);
        vms.work("last");
        home.ok(&["wake", "vm@1", "--as", "first"]);
        vms.work("first");
        home.ok(&["verify", "--deep"]);
    }
}

/// Pages that were asked for by descriptors were in no figure.
#[test]
fn its_pages_are_counted() {
    let vms = filling_slowly(0);
    let daemon = Running::start(&vms.home, &[]);
    daemon.post("/v1/snapshots/vm/wake?wait=durable", &json!({ "name": "box" }));
    // It waits until the guest has all of them.
    daemon.post("/v1/vms/box/sleep?wait=durable", &json!({ "keep_running": true }));
    let (_, page) = daemon.send("GET", "/metrics", None);
    let plane = |name: &str| -> f64 {
        let name = format!("dormouse_plane_{name} ");
        let line = page.lines().find_map(|line| line.strip_prefix(&name));
        line.unwrap_or_else(|| panic!("{name}: {page}")).parse().unwrap()
    };
    assert_eq!(plane("faults_total"), 4096.0, "{page}");
    let installed = plane("fault_installed_bytes_total{why=\"asked\"}");
    assert_eq!(installed, f64::from(16 << 20), "{page}");
    assert!(plane("fault_service_seconds_total") > 0.0, "{page}");
}

/// A wake waits for the pages that the guest wants, and no others; whoever serves them may be killed; and
/// a sleep waits until the guest has all of them.
#[test]
fn its_pages_come_while_it_runs_whoever_is_killed() {
    let vms = filling_slowly(500);
    let home = &vms.home;
    let begun = Instant::now();
    home.ok(&["fork", "vm", "one", "two"]);
    let woke = begun.elapsed();
    for round in 0..6_u64 {
        vms.kill_plane();
        for live in ["one", "two"] {
            let pages: Vec<u64> = (0..8).map(|page| (page * 501 + round * 97) % 4096).collect();
            vms.call(live, "PUT", "touch", &json!(pages).to_string());
        }
        std::thread::sleep(Duration::from_micros(round * 7919 % 60_000));
    }
    let slept = home.json(&["sleep", "one", "--as", "one", "--keep-running"]);
    let filled = begun.elapsed();
    // 4,096 pages, 500 µs and more apart.
    assert!(filled > Duration::from_secs(2) && woke < filled / 2, "{woke:?} {filled:?}");
    assert!(slept["frozen_seconds"].as_f64().unwrap() < 1.5, "it waited while it ran: {slept}");
    for live in ["one", "two"] {
        vms.work(live);
        home.ok(&["sleep", live, "--as", live]);
        vms.wait_for_ends(live, "nobody keeps anything of it");
        home.ok(&["wake", live, "--as", live]);
        vms.work(live);
    }
    home.ok(&["verify", "--deep"]);
}

/// A page that cannot be read ends its guest, which never sees anything else in it.
#[test]
fn a_page_that_is_lost_ends_the_guest() {
    let vms = filling_slowly(2000);
    let home = &vms.home;
    home.ok(&["wake", "vm", "--as", "box"]);
    let folders = fs::read_dir(home.store().join("packs")).unwrap();
    let packs = folders.flat_map(|folder| fs::read_dir(folder.unwrap().path()).unwrap());
    for pack in packs {
        let path = pack.unwrap().path();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        for at in (0..file.metadata().unwrap().len()).step_by(512) {
            file.write_all_at(&[0x5a; 16], at).unwrap();
        }
    }
    let begun = Instant::now();
    while vms.word("box").as_deref() == Some("awake") {
        assert!(begun.elapsed() < Duration::from_secs(30), "the guest goes on");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(vms.word("box").as_deref(), Some("failed"));
    let log = fs::read_to_string(vms.folder("box").join("vmm/log")).unwrap();
    assert!(!log.contains("wrong bytes"), "{log}");
    home.ok(&["kill", "box"]);
    vms.wait_for_ends("box", "nobody keeps anything of it");
}

/// A commit that fails is told to the VMM before it may forget anything: the guest goes on, also in a
/// version that ends when it was told of success.
#[test]
fn a_commit_that_fails_leaves_the_guest() {
    for version in ["53.0", "54.0"] {
        let vms = by_descriptors(version);
        let home = &vms.home;
        home.ok(&["run", "guest.json", "box"]);
        vms.work("box");
        // Nothing can be stored where a file is in the way of the packs.
        let (packs, away) = (home.store().join("packs"), home.store().join("packs-away"));
        fs::rename(&packs, &away).unwrap();
        fs::write(&packs, b"in the way").unwrap();
        let said = home.run(&["sleep", "box", "--as", "vm"]);
        fs::remove_file(&packs).unwrap();
        fs::rename(&away, &packs).unwrap();
        assert!(!said.status.success(), "{said:?}");
        assert_eq!(vms.word("box").as_deref(), Some("awake"), "{said:?}");
        assert!(!vms.folder("box").join("vmm/save").exists());
        assert!(!vms.folder("box").join("vmm/offload").exists());
        vms.work("box");
        home.ok(&["sleep", "box", "--as", "vm"]);
        home.ok(&["wake", "vm", "--as", "box"]);
        vms.work("box");
    }
}

/// Whatever the VMM does instead of what a sleep asks of it costs that sleep alone; one that ends behind
/// its last command has been stored.
#[test]
fn a_vmm_that_fails_while_it_hands_over_costs_that_sleep_alone() {
    let vms = by_descriptors("54.0");
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    home.ok(&["sleep", "box", "--as", "vm"]);
    let call = "PUT /api/v1/vm.send-migration".to_owned();
    let refuse = Action::Refuse(500, "[\"no\"]".to_owned());
    for (action, lives) in [(refuse, true), (Action::Close, true), (Action::Die, false)] {
        let what = format!("{action:?}");
        home.ok(&["wake", "vm@1", "--as", "box"]);
        vms.work("box");
        vms.rules("box", &[Rule { call: call.clone(), skip: 0, times: Some(1), action }]);
        let said = home.run(&["sleep", "box", "--as", "vm"]);
        assert!(!said.status.success(), "{what}: {said:?}");
        assert_eq!(home.snapshots(), ["vm@1"], "{what}");
        assert_eq!(vms.word("box").as_deref(), Some(if lives { "awake" } else { "failed" }));
        if lives {
            vms.work("box");
        }
        home.ok(&["kill", "box"]);
    }
    home.ok(&["wake", "vm@1", "--as", "box"]);
    vms.rules("box", &[Rule { call, skip: 0, times: Some(1), action: Action::DieAfter }]);
    home.ok(&["sleep", "box", "--as", "vm"]);
    assert_eq!(vms.state("box"), None);
    home.ok(&["wake", "vm@2", "--as", "box"]);
    vms.work("box");
}

/// Sleeps and wakes are killed at any moment: the guest is never wrong, and nothing is left behind.
#[test]
fn commands_that_are_killed_cost_nothing() {
    let vms = by_descriptors("53.0");
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["wake", "vm@1", "--as", "box"]);
    let mut slept = 0;
    for round in 0..24_u64 {
        let all = home.snapshots();
        let newest = all.last().unwrap();
        let arguments: &[&str] = match round % 2 {
            0 => &["sleep", "box", "--as", "vm"],
            _ => &["wake", newest, "--as", "fork"],
        };
        vms.kill_after(arguments, Duration::from_micros(round * 7919 % 200_000), || {});
        let said = vms.at_rest();
        match vms.word("box").as_deref() {
            Some("awake") => {}
            None => {
                slept += 1;
                assert!(!all.contains(&home.snapshots().pop().unwrap()), "round {round}: lost");
                assert!(vms.processes_of("box").is_empty(), "round {round}");
                let newest = home.snapshots().pop().unwrap();
                home.ok(&["wake", &newest, "--as", "box"]);
            }
            other => panic!("round {round}: {other:?}: {said}"),
        }
        vms.work("box");
        match vms.word("fork").as_deref() {
            Some("awake") => {
                vms.work("fork");
                home.ok(&["kill", "fork"]);
            }
            None => assert!(!vms.folder("fork").exists(), "round {round}: {said}"),
            other => panic!("round {round}: {other:?}: {said}"),
        }
    }
    assert!(slept > 0, "some sleeps were carried through");
    vms.nothing_is_left();
}

#[test]
fn versions_and_guests_without_it_are_refused() {
    let vms = by_descriptors("52.0");
    let said = vms.home.run(&["run", "guest.json", "box"]);
    assert!(errors(&said).contains("53 and later can"), "{said:?}");
    assert_eq!(vms.state("box"), None);
    assert!(!vms.folder("box").exists());
    let vms = by_descriptors("53.0");
    vms.home.ok(&["run", "guest.json", "box"]);
    vms.home.ok(&["sleep", "box", "--as", "vm"]);
    // The same snapshot, and a program of before.
    Program::cloud_hypervisor("52.0").install(&vms.home.path(".")).unwrap();
    vms.change_guest("guest.json", |guest| guest["launch"]["transfer"] = json!("files"));
    let said = vms.home.run(&["wake", "vm", "--as", "box", "--guest", "guest.json"]);
    assert!(errors(&said).contains("53 and later can"), "{said:?}");
    assert!(!vms.folder("box").exists());
    vms.change_guest("guest.json", |guest| {
        guest["launch"]["transfer"] = json!("descriptors");
        guest["launch"]["args"][1] = json!("size=16M");
    });
    let said = vms.home.fails(code::USAGE, &["run", "guest.json", "box"]);
    assert!(said.contains("shared=on"), "{said}");
}
