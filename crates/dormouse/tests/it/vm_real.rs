//! A real Firecracker and a real Cloud Hypervisor, where this machine has one and a KVM that runs it: its
//! guest checks its memory all the time, through sleeps, wakes, forks and the death of the data plane.

use std::fs;
use std::path::PathBuf;
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

    /// Two VMs of one snapshot go on, sleep, and what wakes of each goes on, too.
    fn forks_have_grandchildren(&self, snap: &str) {
        let home = &self.home;
        home.ok(&["fork", snap, "one", "two"]);
        for fork in ["one", "two"] {
            self.goes_on(fork);
            home.ok(&["sleep", fork, "--as", fork]);
            home.ok(&["wake", fork, "--as", "grandchild"]);
            self.goes_on("grandchild");
            home.ok(&["kill", "grandchild"]);
        }
    }
}

/// Finds a VMM, and a KVM for it; else what is missing.
fn find(kind: Kind) -> Result<PathBuf, String> {
    let missing = |_| format!("there is no {kind} (PATH, {})", kind.variable());
    let program = program::find(kind, None).map_err(missing)?;
    match fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok(program),
        Err(error) => Err(format!("{} needs /dev/kvm: {error}", program.display())),
    }
}

/// Compiles the guest, with more options.
fn kernel(home: &Home, more: &[&str]) -> PathBuf {
    let (source, kernel) = (home.file("guest.c", GUEST.as_bytes()), home.path("guest"));
    let mut compiler = Command::new("cc");
    compiler.args(COMPILER_OPTIONS).args(more).arg("-o").arg(&kernel).arg(&source);
    let compiled = compiler.output().unwrap();
    assert!(compiled.status.success(), "{compiled:?}");
    kernel
}

#[test]
fn a_real_cloud_hypervisor_sleeps_wakes_is_forked_and_outlives_the_data_plane() {
    let program = match find(Kind::CloudHypervisor) {
        Ok(program) => program,
        Err(missing) => return eprintln!("NOT TESTED: {missing}"),
    };
    let home = Home::with_store();
    // PVH begins in 32 bits, and its loader wants a file of 64.
    let guest32 = kernel(&home, &["-m32", "-Wl,--section-start=.note.pvh=0x110000"]);
    let guest = home.path("guest64");
    let mut objcopy = Command::new("objcopy");
    objcopy.args(["-I", "elf32-i386", "-O", "elf64-x86-64"]).args([&guest32, &guest]);
    let converted = objcopy.output().unwrap();
    assert!(converted.status.success(), "{converted:?}");
    for transfer in ["files", "descriptors"] {
        let guest = json!({
            "launch": {
                "vmm": "cloud-hypervisor", "program": program, "transfer": transfer,
                "args": [
                    "--kernel", guest, "--memory", "size=64M,shared=on", "--cpus", "boot=1",
                    "--serial", "tty", "--console", "off", "--seccomp", "false",
                    "--disk", "path={disk:root},id=root,image_type=raw",
                ],
                "wake_args": ["--seccomp", "false"],
            },
            "disks": [{ "id": "root", "size": 1 << 20 }],
        });
        home.file(&format!("{transfer}.json"), guest.to_string().as_bytes());
    }
    let vms = Vms { home };
    let home = &vms.home;
    for transfer in ["files", "descriptors"] {
        home.ok(&["run", &format!("{transfer}.json"), "box"]);
        vms.goes_on("box");
        let said = home.run(&["sleep", "box", "--as", transfer]);
        if !said.status.success() {
            let log = fs::read_to_string(vms.folder("box").join("vmm/log")).unwrap();
            assert!(log.contains("GetNestedState"), "{said:?}\n{log}");
            vms.goes_on("box");
            eprintln!("NOT TESTED: this KVM does not tell the state of nested guests");
            return;
        }
        home.ok(&["wake", transfer, "--as", "box"]);
        for round in 0..3 {
            vms.goes_on("box");
            if round > 0 {
                vms.kill_plane();
            }
            let slept = home.json(&["sleep", "box", "--as", transfer, "--keep-running"]);
            eprintln!("{transfer}: {slept}");
            vms.goes_on("box");
            home.ok(&["sleep", "box", "--as", transfer]);
            home.ok(&["wake", transfer, "--as", "box"]);
            // It has not all of its memory yet.
            vms.kill_plane();
        }
        vms.goes_on("box");
        vms.forks_have_grandchildren(transfer);
        home.ok(&["kill", "box"]);
    }
    home.ok(&["verify", "--deep"]);
}

#[test]
fn a_real_firecracker_sleeps_wakes_is_forked_and_outlives_the_data_plane() {
    let firecracker = match find(Kind::Firecracker) {
        Ok(program) => program,
        Err(missing) => return eprintln!("NOT TESTED: {missing}"),
    };
    let home = Home::with_store();
    let kernel = kernel(&home, &[]);
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
    // Its files are those that an import knows.
    home.ok(&["export", "vm", "out", "--as", "firecracker"]);
    let imported = home.json(&["import", "auto", "out", "imported", "--layout", "standard"]);
    assert_eq!(imported["format"], "firecracker");
    eprintln!("imported: {}", imported["format_version"]);
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
        vms.forks_have_grandchildren(live);
    }
    home.ok(&["verify", "--deep"]);
}
