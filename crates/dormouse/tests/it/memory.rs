//! A VM wakes from a snapshot, works, is committed and wakes again; it forks, and what goes wrong
//! stops it and nobody else.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use dormouse_testkit::vmm::{
    Backing, Config, Ended, HugePages, Lie, Manner, Mix, PageKind, RegionConfig, SmallVmm, Version,
};

use crate::fixture::{Home, code, walk};
use crate::memory_fixture::{
    Memory, PAGES, SEED, commit_paused, config, holders, spawn, with_snapshot,
};
use crate::nbd_fixture::{qemu_io, signal, wait_until};

fn status(home: &Home, live: &str) -> serde_json::Value {
    home.json(&["disk", "status", live])["memory"].clone()
}

fn woke(home: &Home, live: &str) {
    wait_until("a VM that is served", || status(home, live)["state"] == "served");
}

#[test]
fn a_vm_wakes_works_sleeps_and_wakes_again() {
    let home = with_snapshot();
    let mut memory = Memory::wake(&home, "vm", "box", &[]);
    let folder = home.store().join("live/box/memory");
    let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(folder.clone()), mode(home.path("box.uffd"))), (0o700, 0o600));
    assert_eq!(status(&home, "box")["state"], "waiting");
    home.fails(code::NOT_FOUND, &["commit", "vm", "--live", "box", "--state", "state"]);
    let mut vmm = spawn(&home, "box");
    vmm.run(5_000).unwrap();
    assert!(!home.path("box.uffd").exists(), "one VM, then the door is closed");
    for round in 2..5 {
        vmm.start_for(Duration::from_millis(150)).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        vmm.pause().unwrap();
        assert_eq!(commit_paused(&home, "box", "vm", &mut vmm), format!("vm@{round}"));
        assert_eq!(status(&home, "box")["base"], format!("vm@{round}:memory"));
        vmm.resume().unwrap();
        vmm.run(500).unwrap();
    }
    let seen = status(&home, "box");
    assert!(seen["faults"].as_u64() > Some(100) && seen["is_tracked"] == true, "{seen}");
    vmm.verify().unwrap();

    // What it changed is the difference to the snapshot before, and not more.
    vmm.pause().unwrap();
    let before = home.json(&["commit", "vm", "--live", "box", "--state", "state"]);
    let idle = home.json(&["commit", "vm", "--live", "box", "--state", "state"]);
    assert!(before["figures"].is_object());
    assert_eq!(idle["figures"]["new_bytes"], 0, "{idle}");
    vmm.quit().unwrap();
    assert_eq!(memory.code(), code::OK, "{}", memory.messages());
    assert!(!home.store().join("live/box").exists(), "nothing is left of a VM that is gone");
    home.ok(&["verify", "--deep"]);

    // The new snapshot wakes as well as the old one did; nothing else is needed.
    for old in ["vm@1", "vm@2", "vm@3", "vm@4", "vm@5"] {
        home.ok(&["rm", old]);
    }
    home.ok(&["gc"]);
    home.ok(&["export", "vm@6:memory", "mem6"]);
    let mut memory = Memory::wake(&home, "vm@6", "again", &[]);
    let mut vmm = spawn(&home, "again");
    let expected = fs::read(home.path("mem6")).unwrap();
    let sum = dormouse_testkit::vmm::checksum(PAGES, |page| {
        let mut bytes = [0; 4096];
        bytes.copy_from_slice(&expected[usize::try_from(page).unwrap() * 4096..][..4096]);
        bytes
    });
    assert_eq!(vmm.checksum().unwrap(), sum);
    drop(vmm);
    assert_eq!(memory.code(), code::OK);
}

#[test]
fn two_forks_of_a_snapshot_go_their_own_ways() {
    let home = with_snapshot();
    let mut servers: Vec<Memory> = Vec::new();
    let mut vmms = Vec::new();
    for live in ["one", "two"] {
        servers.push(Memory::wake(&home, "vm@1", live, &["--prefetch", "all"]));
        vmms.push(spawn(&home, live));
    }
    home.fails(10, &["serve", "memory", "vm", "--as", "one", "--uffd", "x"]);
    for vmm in &mut vmms {
        vmm.start(30_000).unwrap();
    }
    for (number, (vmm, live)) in vmms.iter_mut().zip(["one", "two"]).enumerate() {
        vmm.idle().unwrap();
        let prefetched = || status(&home, live)["pages"]["missing"].as_u64() < Some(PAGES / 2);
        wait_until("prefetching", prefetched);
        vmm.run(500 + number as u64).unwrap();
        vmm.pause().unwrap();
        let fork = commit_paused(&home, live, live, vmm);
        assert_eq!(fork, format!("{live}@1"));
        vmm.resume().unwrap();
    }
    for (vmm, server) in vmms.into_iter().zip(&mut servers) {
        vmm.quit().unwrap();
        assert_eq!(server.code(), code::OK, "{}", server.messages());
    }
}

/// Each connection had ten seconds to say something before the next was looked at.
#[test]
fn whoever_says_nothing_at_the_socket_holds_up_nobody() {
    let home = with_snapshot();
    let mut memory = Memory::wake(&home, "vm@1", "box", &[]);
    let silent: Vec<_> =
        (0..3).map(|_| UnixStream::connect(home.path("box.uffd")).unwrap()).collect();
    let begun = Instant::now();
    let vmm = spawn(&home, "box");
    woke(&home, "box");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    vmm.quit().unwrap();
    assert_eq!(memory.code(), code::OK, "{}", memory.messages());
    drop(silent);
}

/// What the first wake touched is there before the second one asks.
#[test]
fn a_wake_replays_what_the_one_before_touched() {
    let home = with_snapshot();
    home.fails(code::NOT_FOUND, &["trace", "show", "vm"]);
    let pages: Vec<u64> = (0..200).map(|at| at * 977 % PAGES).collect();
    let wake = || {
        let mut memory = Memory::wake(&home, "vm@1", "box", &["--prefetch", "trace"]);
        let mut vmm = spawn(&home, "box");
        woke(&home, "box");
        if home.run(&["trace", "show", "vm"]).status.success() {
            let is_there = || status(&home, "box")["prefetched_bytes"].as_u64() >= Some(100 * 4096);
            wait_until("the trace's pages", is_there);
        }
        vmm.touch(&pages).unwrap();
        let faults = status(&home, "box")["faults"].as_u64().unwrap();
        vmm.quit().unwrap();
        assert_eq!(memory.code(), code::OK, "{}", memory.messages());
        faults
    };
    let first = wake();
    let trace = home.json(&["trace", "show", "vm"]);
    assert_eq!(trace["wakes"][0]["kind"], "whole");
    assert_eq!(trace["runs"][0]["offset"], pages[0] * 4096);
    assert!(trace["touched_bytes"].as_u64() >= Some(100 * 4096), "{trace}");
    let second = wake();
    assert!(second * 2 < first, "{second} faults after {first}");
}

#[test]
fn untracked_memory_is_committed_while_it_stands_still() {
    let home = with_snapshot();
    let _memory = Memory::wake(&home, "vm", "box", &["--track-dirty", "off"]);
    let mut vmm = spawn(&home, "box");
    vmm.run(3_000).unwrap();
    vmm.pause().unwrap();
    let object = home.json(&["commit", "x", "--live", "box", "--state", "state"]);
    assert_eq!(object["is_live"], false);
    commit_paused(&home, "box", "vm", &mut vmm);
    vmm.resume().unwrap();
    vmm.verify().unwrap();
}

#[test]
fn huge_pages_wake_and_are_committed() {
    let _reserved = match HugePages::reserve(16) {
        Ok(reserved) => reserved,
        Err(error) => {
            eprintln!("SKIPPED: this host has no huge pages to give: {error:#}");
            return;
        }
    };
    let home = with_snapshot();
    let _memory = Memory::wake(&home, "vm", "box", &[]);
    let regions = vec![
        RegionConfig { pages: 1024, kind: PageKind::Small },
        RegionConfig { pages: PAGES - 1024, kind: PageKind::Huge },
    ];
    let mut vmm = SmallVmm::spawn(&Config { regions, ..config(&home, "box") }).unwrap();
    vmm.run(3_000).unwrap();
    vmm.pause().unwrap();
    commit_paused(&home, "box", "vm", &mut vmm);
    vmm.resume().unwrap();
    vmm.run(1_000).unwrap();
    vmm.pause().unwrap();
    commit_paused(&home, "box", "vm", &mut vmm);
}

/// One commit has disks and memory of the same moment.
#[test]
fn disks_and_memory_are_one_snapshot() {
    let home = with_snapshot();
    home.file("d", &crate::fixture::noise(3, 256));
    home.ok(&["commit", "vm", "--disk", "d", "--memory", "mem", "--state", "state"]);
    home.ok(&["disk", "create", "box", "--from", "vm:root"]);
    let mut memory = Memory::wake(&home, "vm", "box", &["--nbd", "s.nbd"]);
    let mut vmm = spawn(&home, "box");
    vmm.run(1_000).unwrap();
    qemu_io(&home, "box", &["write -P 7 0 64k"]);
    home.file("state", b"later");
    vmm.pause().unwrap();
    let snapshot = commit_paused(&home, "box", "vm", &mut vmm);
    assert_eq!(snapshot, "vm@3");
    let shown = home.json(&["show", "vm@3"]).to_string();
    for image in ["disk/root", "memory", "state/vmstate"] {
        assert!(shown.contains(image), "{shown}");
    }
    assert_eq!(home.ok(&["cat", "vm:state/vmstate"]), "later");
    home.ok(&["export", "vm:root", "disk"]);
    assert!(fs::read(home.path("disk")).unwrap()[..65536].iter().all(|&byte| byte == 7));
    home.ok(&["rm", "vm@1", "vm@2"]);
    home.ok(&["gc"]);
    vmm.resume().unwrap();
    vmm.verify().unwrap();
    vmm.quit().unwrap();
    assert_eq!(memory.code(), code::OK, "{}", memory.messages());
    let folder = home.store().join("live/box");
    assert!(!folder.join("memory").exists() && folder.join("disk/root").exists());
    assert_eq!(home.json(&["disk", "status", "box"])["memory"], serde_json::Value::Null);
    home.ok(&["disk", "commit", "box", "disks"]);
}

/// A VMM that handed over its memory and got nobody to serve it would wait for ever.
#[test]
fn a_vmm_that_is_refused_is_stopped_and_the_next_one_is_served() {
    let home = with_snapshot();
    let memory = Memory::wake(&home, "vm", "box", &[]);
    for lie in [Lie::NoTable, Lie::CutShort, Lie::BeyondImage, Lie::Overlap, Lie::Elsewhere] {
        let (socket, version) = (home.path("box.uffd"), Version::V1_12);
        let backing = Backing::Uffd { socket, version, manner: Manner::Lie(lie) };
        let spawned = SmallVmm::spawn(&Config { backing, ..config(&home, "box") });
        // It may be stopped before it has said that it is there.
        let ended = match spawned {
            Ok(vmm) => vmm.wait().unwrap(),
            Err(error) => error.downcast::<Ended>().unwrap(),
        };
        assert_eq!(ended.signal, Some(9), "{lie:?}: {}", memory.messages());
    }
    // Whoever looks whether somebody listens is let be.
    let socket = home.path("box.uffd");
    drop(std::os::unix::net::UnixStream::connect(&socket).unwrap());
    let mut vmm = spawn(&home, "box");
    vmm.run(1_000).unwrap();
    let messages = memory.messages();
    assert_eq!(messages.matches("the VMM is refused, and stopped").count(), 5, "{messages}");
    assert!(messages.contains("does not fit the image"), "{messages}");
}

#[test]
fn a_server_without_a_vm_leaves_nothing() {
    let home = with_snapshot();
    let mut memory = Memory::wake(&home, "vm", "box", &[]);
    let holder = "live/box/memory/holder";
    signal(memory.child.id(), "TERM");
    assert_eq!(memory.code(), code::OK, "{}", memory.messages());
    assert!(!home.path("box.uffd").exists() && !home.store().join("live/box").exists());
    let full = home.store().join(holder);
    wait_until("the holder's end", || holders(full.to_str().unwrap()).is_empty());
    home.fails(code::NOT_FOUND, &["serve", "memory", "none", "--as", "box", "--uffd", "x"]);
    home.fails(code::NOT_FOUND, &["serve", "memory", "--take-over", "box"]);
    home.fails(code::USAGE, &["serve", "memory", "vm", "--as", "box"]);
    home.fails(code::USAGE, &["serve", "memory", "vm", "--as", "b", "--uffd", "x", "--nbd", "y"]);
    home.fails(
        code::USAGE,
        &["serve", "memory", "vm", "--as", "b", "--uffd", "x", "--window", "5k"],
    );
    assert!(!home.store().join("live/b").exists() && !home.path("x").exists());
}

/// Damage is told by the exit code and stops the one VM that met it.
#[test]
fn damage_stops_its_vm_and_no_other() {
    let home = with_snapshot();
    dormouse_testkit::vmm::write_image(SEED + 1, PAGES, &home.path("other")).unwrap();
    home.ok(&["commit", "other", "--memory", "other", "--state", "state"]);
    let mut damaged = Memory::wake(&home, "vm", "box", &[]);
    let well = Memory::wake(&home, "other", "well", &[]);
    let mut vmm = spawn(&home, "box");
    let healthy = Config { seed: SEED + 1, ..config(&home, "well") };
    let mut healthy = SmallVmm::spawn(&healthy).unwrap();
    woke(&home, "box");
    // All packs but the other VM's, whose commit came last.
    let mut packs = Vec::new();
    walk(&home.store().join("packs"), &mut packs);
    packs.sort_by_key(|(path, _)| fs::metadata(path).unwrap().modified().unwrap());
    let (pack, bytes) = &packs[0];
    let file = fs::File::options().write(true).open(pack).unwrap();
    for at in (8192..bytes - 8192).step_by(512) {
        file.write_all_at(&[0x5a; 64], at).unwrap();
    }
    let error = vmm.run(50_000).and_then(|_| vmm.verify()).unwrap_err();
    let ended = error.downcast::<Ended>().unwrap();
    assert_eq!(ended.signal, Some(9), "{ended}");
    assert_eq!(damaged.code(), code::CORRUPT, "{}", damaged.messages());
    let messages = damaged.messages();
    assert!(messages.contains("the guest is stopped"), "{messages}");
    assert!(messages.contains("\"kind\":\"corrupt\""), "{messages}");
    assert!(!home.store().join("live/box").exists());
    healthy.run(5_000).unwrap();
    healthy.verify().unwrap();
    assert_eq!(well.messages(), "");
}

/// Reading another process's memory is a right of its own.
#[test]
fn without_the_right_to_read_memory_a_commit_says_what_to_allow() {
    let home = with_snapshot();
    let prepare = Config { mix: Mix::KEEPING, ..config(&home, "box") };
    let without = ["setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"];
    let _memory = Memory::wake_by(&home, &without, "vm", "box");
    let mut vmm = SmallVmm::spawn(&prepare).unwrap();
    vmm.run(1_000).unwrap();
    vmm.pause().unwrap();
    let said = home.fails(code::IO, &["commit", "vm", "--live", "box", "--state", "state"]);
    assert!(said.contains("CAP_SYS_PTRACE"), "{said}");
    vmm.resume().unwrap();
    vmm.verify().unwrap();
}
