//! A real Firecracker, where this machine has one and a KVM that runs it: its guest checks its memory all
//! the time, through sleeps, wakes, forks and the death of the data plane.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use dormouse_vmm::kind::Kind;
use dormouse_vmm::program;
use serde_json::json;

use crate::fixture::Home;
use crate::mounted::path;
use crate::vm_fixture::Vms;

const GUEST: &str = include_str!("vm_real.c");

/// How the guest is made: nothing but itself, in one piece, from the first MiB on.
const COMPILER_OPTIONS: [&str; 14] = [
    "-O1",
    "-ffreestanding",
    "-nostdlib",
    "-static",
    "-fno-stack-protector",
    "-fno-pic",
    "-no-pie",
    "-mno-red-zone",
    "-mno-sse",
    "-fno-asynchronous-unwind-tables",
    "-Wl,-N",
    "-Wl,-Ttext=0x100000",
    "-Wl,--build-id=none",
    "-Wl,--no-warn-rwx-segments",
];

impl Vms {
    /// How far a guest has come; it has never found anything wrong.
    fn count_of(&self, live: &str) -> u64 {
        let log = fs::read(self.folder(live).join("vmm/log")).unwrap();
        let log = String::from_utf8_lossy(&log);
        assert!(!log.contains("BAD"), "{live}: {log}");
        // The last line may be half there.
        let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let last = whole.lines().rev().find_map(|line| line.strip_prefix("count "));
        last.map_or(0, |count| count.trim().parse().unwrap_or(0))
    }

    fn goes_on(&self, live: &str) {
        let (before, begun) = (self.count_of(live), Instant::now());
        while self.count_of(live) < before + 100 {
            std::thread::sleep(Duration::from_millis(10));
            assert!(begun.elapsed() < Duration::from_secs(60), "{live} does not go on");
        }
    }
}

#[test]
fn a_real_firecracker_sleeps_wakes_is_forked_and_outlives_the_data_plane() {
    let Ok(firecracker) = program::find(Kind::Firecracker, None) else {
        eprintln!("NOT TESTED: there is no firecracker (PATH, {})", Kind::Firecracker.variable());
        return;
    };
    if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("NOT TESTED: {} needs /dev/kvm", firecracker.display());
        return;
    }
    let home = Home::with_store();
    let (source, kernel) = (home.file("guest.c", GUEST.as_bytes()), home.path("guest"));
    let mut compiler = Command::new("cc");
    compiler.args(COMPILER_OPTIONS).arg("-o").arg(&kernel).arg(&source);
    let compiled = compiler.output().unwrap();
    assert!(compiled.status.success(), "{compiled:?}");
    let guest = |backend: &str| {
        json!({
            "launch": { "vmm": "firecracker", "program": firecracker, "args": ["--no-seccomp"], "config": {
                "machine-config": { "vcpu_count": 1, "mem_size_mib": 64 },
                "boot-source": { "kernel_image_path": kernel },
                "drives": [{
                    "drive_id": "root", "path_on_host": "{disk:root}", "is_root_device": false,
                    "is_read_only": false,
                }],
            } },
            "memory_backend": backend,
            "disks": [{ "id": "root", "size": 1 << 20 }],
        })
        .to_string()
    };
    home.file("file.json", guest("file").as_bytes());
    let asking = home.file("uffd.json", guest("uffd").as_bytes());
    let vms = Vms { home };
    let home = &vms.home;
    home.ok(&["run", "file.json", "box"]);
    vms.goes_on("box");
    home.ok(&["sleep", "box", "--as", "vm", "--keep-running"]);
    vms.goes_on("box");
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["wake", "vm", "--as", "mapped"]);
    home.ok(&["wake", "vm", "--as", "asking", "--guest", path(&asking)]);
    for round in 0..3 {
        for live in ["mapped", "asking"] {
            vms.goes_on(live);
            let slept = home.json(&["sleep", live, "--as", live, "--keep-running"]);
            eprintln!("{live}: {slept}");
            assert!(slept["written_bytes"].as_u64().unwrap() < 4 << 20, "what changed: {slept}");
            vms.goes_on(live);
            if round > 0 {
                vms.kill_plane();
            }
        }
    }
    for live in ["mapped", "asking"] {
        home.ok(&["sleep", live, "--as", live]);
        home.ok(&["fork", live, "one", "two"]);
        for fork in ["one", "two"] {
            vms.goes_on(fork);
            home.ok(&["sleep", fork, "--as", fork]);
            home.ok(&["wake", fork, "--as", "grandchild"]);
            vms.goes_on("grandchild");
            home.ok(&["kill", "grandchild"]);
        }
    }
    home.ok(&["verify", "--deep"]);
}
