//! VMs whose store changes under them: snapshots that are removed, collections, sleeps and wakes at the
//! same time, states that somebody else stored, and file systems that fill.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dormouse_testkit::double::Program;
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::process::Signal;

use crate::fixture::{code, errors};
use crate::live_full::Tmpfs;
use crate::mounted::path;
use crate::vm_fixture::{Vms, signal};

fn firecracker() -> Vms {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    vms.home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    vms
}

/// The snapshot that a VM woke from is removed and collected, and the data plane is killed: the guest's
/// memory is there all the same, and it sleeps and wakes as any other.
#[test]
fn a_vm_outlives_the_snapshot_it_woke_from() {
    let vms = firecracker();
    let home = &vms.home;
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["fork", "vm@1", "box", "other"]);
    home.ok(&["rm", "vm@1"]);
    home.ok(&["gc"]);
    vms.kill_plane();
    // All of its memory, most of which it has not touched since it woke.
    vms.work("box");
    home.ok(&["sleep", "box", "--as", "kept", "--keep-running"]);
    vms.work("box");
    assert_eq!(home.json(&["sleep", "box"])["snapshot"], "kept@2");
    home.ok(&["gc"]);
    assert_eq!(home.json(&["sleep", "other"])["snapshot"], "vm@2");
    assert_eq!(home.snapshots(), ["kept@1", "kept@2", "vm@2"]);
    for (snap, live) in [("kept@1", "one"), ("kept@2", "two"), ("vm@2", "three")] {
        home.ok(&["wake", snap, "--as", live]);
        vms.work(live);
        home.ok(&["kill", live]);
    }
    home.ok(&["rm", "kept@1", "kept@2", "vm@2"]);
    home.ok(&["gc"]);
    let packs = home.published();
    assert!(packs.iter().all(|(file, _)| !path(file).contains("/packs/")), "{packs:?}");
}

/// A snapshot is durable, and the VM cannot be laid over it, for something is in the way of the list of what
/// it holds: it is stored all the same, and goes on over what it lay over.
#[test]
fn a_vm_that_cannot_be_laid_over_its_snapshot_is_stored_all_the_same() {
    let vms = firecracker();
    let home = &vms.home;
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["wake", "vm", "--as", "box"]);
    let (pin, away) = (vms.folder("box").join("pin"), home.path("pin"));
    fs::rename(&pin, &away).unwrap();
    fs::create_dir(&pin).unwrap();
    vms.work("box");
    let slept = home.run(&["--json", "sleep", "box", "--as", "vm", "--keep-running"]);
    fs::remove_dir(&pin).unwrap();
    fs::rename(&away, &pin).unwrap();
    assert!(slept.status.success(), "{slept:?}");
    assert!(errors(&slept).contains("not all went well"), "{slept:?}");
    assert_eq!(home.snapshots(), ["vm@1", "vm@2"]);
    vms.work("box");
    home.ok(&["sleep", "box", "--as", "vm"]);
    for snap in ["vm@2", "vm@3"] {
        home.ok(&["wake", snap, "--as", "box"]);
        vms.work("box");
        home.ok(&["kill", "box"]);
    }
    home.ok(&["verify", "--deep"]);
}

/// A guest that changes nothing of its disk: what it woke from is of the snapshot's memory alone, which no
/// disk keeps for it.
#[test]
fn a_vm_keeps_the_memory_that_it_woke_from_by_itself() {
    for backend in ["file", "uffd"] {
        let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
        let home = &vms.home;
        vms.change_guest("guest.json", |guest| {
            guest["launch"]["config"]["drives"][0]["is_read_only"] = true.into();
            guest["memory_backend"] = backend.into();
        });
        home.ok(&["run", "guest.json", "box"]);
        home.ok(&["sleep", "box", "--as", "vm"]);
        home.ok(&["wake", "vm@1", "--as", "box"]);
        vms.work("box");
        home.ok(&["sleep", "box", "--as", "vm"]);
        home.ok(&["wake", "vm@2", "--as", "box"]);
        let shown = home.json(&["show", "vm@2"]);
        let images = shown["manifest"]["images"].as_array().unwrap();
        let root = &images.iter().find(|row| row["image"] == "memory").unwrap()["root"];
        let held = format!("root {} {} ", root["pack"].as_str().unwrap(), root["node"]);
        // Whoever reads it keeps it, too, but only until he is killed.
        let pin = fs::read_to_string(vms.folder("box").join("pin")).unwrap();
        assert!(pin.contains(&held), "{held}\n{pin}");
        home.ok(&["rm", "vm@1", "vm@2"]);
        home.ok(&["gc"]);
        vms.kill_plane();
        vms.work("box");
        home.ok(&["sleep", "box", "--as", "kept"]);
        home.ok(&["wake", "kept", "--as", "box"]);
        vms.work("box");
        home.ok(&["kill", "box"]);
        home.ok(&["verify", "--deep"]);
    }
}

/// A data plane that was killed has the disks of a guest again that does nothing, before anybody else may
/// take them: a guest's next write would find them taken.
#[test]
fn a_successor_has_the_disks_of_a_guest_that_stands_still() {
    let vms = firecracker();
    let home = &vms.home;
    vms.api("box", "PATCH", "/vm", "{\"state\":\"Paused\"}");
    vms.kill_plane();
    home.fails(code::NOT_FOUND, &["sleep", "nobody"]);
    UnixStream::connect(vms.folder("box").join("control")).unwrap();
    home.ok(&["disk", "commit", "box", "disks"]);
    vms.api("box", "PATCH", "/vm", "{\"state\":\"Resumed\"}");
    vms.work("box");
}

/// A data plane that VMs need is told to end, and goes on; one that nobody needs ends.
#[test]
fn a_data_plane_ends_when_no_vm_needs_it() {
    let vms = firecracker();
    let home = &vms.home;
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["wake", "vm", "--as", "box"]);
    let plane = vms.plane().unwrap();
    for _ in 0..2 {
        signal(plane, Signal::TERM);
        vms.work("box");
        home.ok(&["sleep", "box", "--as", "vm", "--keep-running"]);
    }
    assert_eq!(vms.plane(), Some(plane));
    home.ok(&["kill", "box"]);
    signal(plane, Signal::TERM);
    let begun = Instant::now();
    while vms.plane().is_some() || !vms.holders().is_empty() {
        thread::sleep(Duration::from_millis(10));
        assert!(begun.elapsed() < Duration::from_secs(20), "it goes on");
    }
    home.ok(&["wake", "vm", "--as", "box"]);
    vms.work("box");
}

/// Where nothing can be mounted that is told, at once and with its cause.
#[test]
fn a_data_plane_that_cannot_mount_says_why() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    let home = &vms.home;
    let script = format!(
        "mount --bind /dev/null /dev/fuse && exec {} run guest.json box",
        env!("CARGO_BIN_EXE_dormouse")
    );
    let begun = Instant::now();
    let said = Command::new("unshare")
        .current_dir(home.path("."))
        .args(["--mount", "sh", "-c", &script])
        .output()
        .unwrap();
    assert!(!said.status.success() && begun.elapsed() < Duration::from_secs(20), "{said:?}");
    let said = errors(&said);
    assert!(said.contains("the data plane did not start") && said.contains("EINVAL"), "{said}");
    assert!(!vms.folder("box").exists());
}

/// The processes that keep what a successor needs are killed: others keep it, and the data plane may be
/// killed after that as before.
#[test]
fn what_is_kept_for_a_successor_outlives_its_keepers() {
    for backend in ["file", "uffd"] {
        let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
        let home = &vms.home;
        vms.change_guest("guest.json", |guest| guest["memory_backend"] = backend.into());
        home.ok(&["run", "guest.json", "box"]);
        vms.work("box");
        home.ok(&["sleep", "box", "--as", "vm"]);
        home.ok(&["fork", "vm", "one", "two"]);
        let count = if backend == "uffd" { 3 } else { 1 };
        for _ in 0..2 {
            assert_eq!(vms.holders().len(), count, "{backend}");
            vms.kill_keepers();
            assert_eq!(vms.holders().len(), count, "{backend}");
            vms.kill_plane();
            for live in ["one", "two"] {
                vms.work(live);
                home.ok(&["sleep", live, "--as", "vm", "--keep-running"]);
            }
        }
        for live in ["one", "two"] {
            home.ok(&["kill", live]);
            vms.wait_for_ends(live, "its keeper stays");
        }
    }
}

/// The program is upgraded while VMs run: what keeps a data plane alive is still the old one, and starts it.
#[test]
fn a_data_plane_whose_program_was_replaced_is_started_again() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    let home = &vms.home;
    let (program, other) = (home.path("program"), home.path("other"));
    for copy in [&program, &other] {
        fs::copy(env!("CARGO_BIN_EXE_dormouse"), copy).unwrap();
    }
    let mut run = Command::new(&program);
    run.current_dir(home.path(".")).args(["run", "guest.json", "box"]);
    assert!(run.output().unwrap().status.success());
    vms.work("box");
    fs::rename(&other, &program).unwrap();
    for _ in 0..2 {
        vms.kill_plane();
        vms.work("box");
    }
}

/// A snapshot whose states somebody else named: its VM sleeps over it with its own, and inherits nothing
/// that it does not have.
#[test]
fn a_vm_that_others_stored_sleeps_with_its_own_states() {
    let vms = firecracker();
    let home = &vms.home;
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["export", "vm", "files"]);
    let state = home.path("files/state/vmstate");
    let states = format!("cpu={}", path(&state));
    let disk = format!("root={}", path(&home.path("files/disk/root")));
    let extra = format!("swap={}", path(&home.file("swap", &[7; 8192])));
    home.ok(&[
        "commit",
        "hand",
        "--memory",
        "files/memory",
        "--disk",
        &disk,
        "--disk",
        &extra,
        "--state",
        &states,
    ]);
    home.ok(&["wake", "hand", "--guest", "guest.json", "--as", "box"]);
    vms.work("box");
    assert_eq!(home.json(&["sleep", "box"])["snapshot"], "hand@2");
    let shown = home.json(&["show", "hand@2"]);
    let images: Vec<_> = shown["manifest"]["images"].as_array().unwrap().iter().collect();
    let mut names: Vec<_> = images.iter().map(|row| row["image"].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["disk/root", "memory", "state/dormouse-guest.json", "state/vmstate"]);
    home.ok(&["wake", "hand@2", "--as", "box"]);
    vms.work("box");
}

#[must_use]
fn is_clean(output: &Output, allowed: &[i32]) -> bool {
    let code = output.status.code().unwrap();
    assert!(!errors(output).contains("panicked"), "{output:?}");
    code == code::OK || allowed.contains(&code)
}

/// Sleeps of one VM and of several, wakes and forks of what they store, removals and collections, all at
/// once: each is done or refused, and every snapshot that is left is right.
#[test]
fn sleeps_wakes_removals_and_collections_at_once_are_done_or_refused() {
    let vms = firecracker();
    let home = &vms.home;
    home.ok(&["sleep", "box", "--as", "vm", "--keep-running"]);
    home.ok(&["fork", "vm@1", "other"]);
    let is_over = AtomicBool::new(false);
    let [slept, other_slept, forked, removed, collected] = [const { AtomicUsize::new(0) }; 5];
    let done = |count: &AtomicUsize, said: &Output| {
        count.fetch_add(usize::from(said.status.success()), Ordering::Relaxed);
    };
    let until_over = |each: &mut dyn FnMut(u64)| {
        for round in 0.. {
            if is_over.load(Ordering::Relaxed) {
                return;
            }
            each(round);
        }
    };
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                until_over(&mut |_| {
                    let said = home.run(&["sleep", "box", "--as", "vm", "--keep-running"]);
                    assert!(is_clean(&said, &[code::BUSY]), "{said:?}");
                    done(&slept, &said);
                });
            });
        }
        scope.spawn(|| {
            until_over(&mut |_| {
                let said = home.run(&["sleep", "other", "--as", "vm", "--keep-running"]);
                assert!(is_clean(&said, &[code::BUSY]), "{said:?}");
                done(&other_slept, &said);
            });
        });
        scope.spawn(|| {
            until_over(&mut |round| {
                let live = format!("fork-{round}");
                let said = home.run(&["fork", "vm", &live]);
                // The newest may be removed before it is opened.
                assert!(is_clean(&said, &[code::NOT_FOUND]), "{said:?}");
                done(&forked, &said);
                if said.status.success() {
                    vms.work(&live);
                    home.ok(&["kill", &live]);
                } else {
                    assert!(!vms.folder(&live).exists(), "{said:?}");
                }
            });
        });
        scope.spawn(|| {
            until_over(&mut |_| {
                let all = home.snapshots();
                for snap in all.iter().rev().skip(1).step_by(2) {
                    let said = home.run(&["rm", snap]);
                    assert!(is_clean(&said, &[code::NOT_FOUND]), "{said:?}");
                    done(&removed, &said);
                }
                let said = home.run(&["gc"]);
                assert!(is_clean(&said, &[code::BUSY]), "{said:?}");
                done(&collected, &said);
            });
        });
        for _ in 0..10 {
            for live in ["box", "other"] {
                vms.work(live);
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let counts = [slept, other_slept, forked, removed, collected].map(AtomicUsize::into_inner);
    assert!(counts.iter().all(|count| *count > 1), "each was done at times: {counts:?}");
    home.ok(&["verify", "--deep"]);
    for snap in home.snapshots() {
        home.ok(&["wake", &snap, "--as", "last"]);
        vms.work("last");
        home.ok(&["kill", "last"]);
    }
}

/// The store's file system has less and less left while a VM sleeps, so that every step of it meets the
/// end at some time: the VM runs on, and what was stored is as it was.
#[test]
fn a_sleep_that_finds_no_room_at_any_step_costs_that_sleep_alone() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    // Its guest must not meet the end itself.
    vms.change_guest("guest.json", |guest| {
        let disk = &mut guest["launch"]["config"]["drives"][0]["is_read_only"];
        assert_eq!(*disk, false);
        *disk = true.into();
    });
    finds_no_room(&vms, &["sleep", "box", "--as", "vm", "--keep-running"]);
}

/// The same where its VMM dumps its memory into a capture.
#[test]
fn a_dump_that_finds_no_room_costs_that_sleep_alone() {
    let vms = Vms::of_doubles(&Program::cloud_hypervisor("51.0"), "cloud-hypervisor");
    vms.change_guest("guest.json", |guest| {
        let disk = guest["launch"]["args"].as_array_mut().unwrap().last_mut().unwrap();
        *disk = format!("{},readonly=on", disk.as_str().unwrap()).into();
    });
    finds_no_room(&vms, &["sleep", "box", "--as", "vm"]);
}

fn finds_no_room(vms: &Vms, sleep: &[&str]) {
    let home = &vms.home;
    let _tmpfs = Tmpfs::mount(&home.store(), 96);
    home.ok(&["init"]);
    home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    // Its VMM keeps memory to itself from the first wake on.
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["wake", "vm", "--as", "box"]);
    let filler = home.store().join("filler");
    let (mut failed, mut left) = (0, 0);
    loop {
        let before = home.snapshots();
        let file = File::create(&filler).unwrap();
        let room = statvfs(home.store()).unwrap();
        let fill = (room.f_bavail * room.f_frsize).saturating_sub(left);
        if fill > 0 {
            fallocate(&file, FallocateFlags::empty(), 0, fill).unwrap();
        }
        let said = home.run(sleep);
        fs::remove_file(&filler).unwrap();
        // Whatever could not be written down for want of room is, with the next command.
        home.fails(code::NOT_FOUND, &["sleep", "nobody"]);
        assert!(!vms.folder("box").join("vmm/save").exists(), "{left} bytes left: {said:?}");
        let captures = fs::read_dir(vms.captures()).unwrap().count();
        assert_eq!(captures, 0, "{left} bytes left: {said:?}");
        if said.status.success() {
            break;
        }
        assert_eq!(vms.word("box").as_deref(), Some("awake"), "{left} bytes left: {said:?}");
        vms.work("box");
        assert!(is_clean(&said, &[code::IO, code::REFUSED]), "{left} bytes left: {said:?}");
        assert_eq!(home.snapshots(), before, "{left} bytes left: {said:?}");
        failed += 1;
        // In between lies the pack, written bit by bit.
        left += if (128 << 10..5 << 20).contains(&left) { 700 << 10 } else { 32 << 10 };
    }
    assert!(failed >= 5, "{failed} sleeps found no room");
    home.ok(&["verify", "--deep"]);
    if vms.word("box").is_some() {
        vms.work("box");
        home.ok(&["sleep", "box", "--as", "vm"]);
    }
    home.ok(&["wake", "vm", "--as", "box"]);
    vms.work("box");
    home.ok(&["kill", "box"]);
}

/// The same of wakes: there is a VM that is right, or nothing of it.
#[test]
fn a_wake_that_finds_no_room_at_any_step_leaves_nothing() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    let home = &vms.home;
    // Its guest must not meet the end itself.
    vms.change_guest("guest.json", |guest| {
        guest["launch"]["config"]["drives"][0]["is_read_only"] = true.into();
    });
    let _tmpfs = Tmpfs::mount(&home.store(), 96);
    home.ok(&["init"]);
    home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    home.ok(&["sleep", "box", "--as", "vm"]);
    let filler = home.store().join("filler");
    let mut failed = 0;
    for left in (0..).step_by(4 << 10) {
        let file = File::create(&filler).unwrap();
        let room = statvfs(home.store()).unwrap();
        let fill = (room.f_bavail * room.f_frsize).saturating_sub(left);
        if fill > 0 {
            fallocate(&file, FallocateFlags::empty(), 0, fill).unwrap();
        }
        let said = home.run(&["wake", "vm", "--as", "fork"]);
        fs::remove_file(&filler).unwrap();
        home.fails(code::NOT_FOUND, &["sleep", "nobody"]);
        if said.status.success() {
            vms.work("fork");
            home.ok(&["kill", "fork"]);
            break;
        }
        assert!(is_clean(&said, &[code::IO, code::REFUSED]), "{left} bytes left: {said:?}");
        assert_eq!(vms.word("fork"), None, "{left} bytes left: {said:?}");
        assert!(!vms.folder("fork").exists(), "{left} bytes left: {said:?}");
        assert!(vms.processes_of("fork").is_empty(), "{left} bytes left: {said:?}");
        failed += 1;
    }
    assert!(failed >= 5, "{failed} wakes found no room");
    home.ok(&["verify", "--deep"]);
    home.ok(&["wake", "vm", "--as", "fork"]);
    vms.work("fork");
    home.ok(&["kill", "fork"]);
}
