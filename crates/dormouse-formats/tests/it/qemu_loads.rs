//! Files that we wrote, loaded by a real QEMU.

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dormouse_formats::export::ExportRequest;
use dormouse_formats::format::Format;
use dormouse_store::commit::CommitRequest;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_testkit::foreign::random::Random;
use dormouse_testkit::guest::Qmp;
use serde_json::json;

use crate::world::{World, assert_same};

/// Memory of the guests, which have no disk and never leave their firmware.
const MEMORY: u64 = 64 << 20;

/// Where tests write to in a guest: behind the firmware's own.
const PLACE: u64 = 32 << 20;

/// The QEMU to ask; a machine may carry a newer one beside Debian's.
fn program() -> String {
    std::env::var("DORMOUSE_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned())
}

struct Qemu {
    child: Child,
    qmp: Qmp,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.child.kill().unwrap_or_default();
        self.child.wait().map(drop).unwrap_or_default();
    }
}

impl Qemu {
    #[expect(clippy::zombie_processes, reason = "whoever drops it waits; a panic ends the test")]
    fn start(folder: &Path, arguments: &[&str]) -> Qemu {
        let socket = folder.join("qmp");
        fs::remove_file(&socket).unwrap_or_default();
        let mut command = Command::new(program());
        if let Ok(data) = std::env::var("DORMOUSE_QEMU_DATA") {
            command.args(["-L", &data]);
        }
        let child = command
            .args(["-accel", "tcg", "-nodefaults", "-display", "none", "-S"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 of the package qemu-system-x86");
        let begin = Instant::now();
        loop {
            if let Ok(stream) = UnixStream::connect(&socket) {
                return Qemu { child, qmp: Qmp::new(stream).unwrap() };
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "QEMU does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn capability(&mut self, name: &str) {
        let wanted = json!({"capabilities": [{"capability": name, "state": true}]});
        self.qmp.execute("migrate-set-capabilities", wanted).unwrap();
    }

    /// The first bytes of guest memory, as the guest sees them.
    fn memory(&mut self, folder: &Path, from: u64, bytes: u64) -> Vec<u8> {
        let file = folder.join("saved");
        let arguments = json!({"val": from, "size": bytes, "filename": file.to_str().unwrap()});
        self.qmp.execute("pmemsave", arguments).unwrap();
        fs::read(file).unwrap()
    }
}

/// A guest with marks in its memory, saved by QEMU; we take it in, change its memory, write the file
/// out, and QEMU loads that.
#[test]
fn host_a_mapped_ram_file_that_we_made_up_loads() {
    if std::env::var_os("DORMOUSE_TEST_HOST").is_none() {
        eprintln!("SKIPPED: `make test-host` runs what needs QEMU 9.0 or later (DORMOUSE_QEMU)");
        return;
    }
    let world = World::new();
    let folder = world.folder.path().to_owned();
    let machine = ["-machine", "q35", "-m", "64M"];
    let state = world.path("mapped");
    let uri = |path: &Path| json!({"uri": format!("file:{}", path.display())});
    {
        let mut qemu = Qemu::start(&folder, &machine);
        qemu.qmp.execute("cont", json!({})).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        qemu.qmp.execute("stop", json!({})).unwrap();
        qemu.capability("mapped-ram");
        qemu.qmp.execute("migrate", uri(&state)).unwrap();
        qemu.qmp.wait_for_migration().unwrap();
    }
    let report = world.import(Format::MappedRam, &state).unwrap();
    let layout = &report.snapshots[0].commit.manifest.memory_layout;
    let ram = layout.iter().find(|row| row.block == "pc.ram").expect("the guest's RAM");
    assert_eq!(ram.length, MEMORY);
    // Pages where there were zeros, and zeros where there was firmware.
    let mut memory = world.bytes("vm@1", "memory");
    let mut random = Random::new(1);
    let at = usize::try_from(ram.image_offset).unwrap();
    let place = at + usize::try_from(PLACE).unwrap();
    for number in 0..50 {
        let page = random.page();
        memory[place + number * 8192..][..4096].copy_from_slice(&page);
    }
    let taken = (0..4096).find(|page| memory[at + page * 4096..][..4096].iter().any(|&b| b != 0));
    let taken = taken.expect("the firmware wrote something");
    memory[at + taken * 4096..][..4096].fill(0);
    let state_now = world.bytes("vm@1", "state/mapped-ram");
    let request = CommitRequest::new("vm".parse().unwrap())
        .image("memory".parse().unwrap(), Source::Bytes(memory.clone().into()))
        .image("state/mapped-ram".parse().unwrap(), Source::Bytes(state_now.into()));
    world.store.commit(request, Job::quiet()).unwrap();
    let made = world.path("made");
    world.export("vm@2", &made, Format::MappedRam, &ExportRequest::default()).unwrap();
    let incoming = [&machine[..], &["-incoming", "defer"]].concat();
    let mut qemu = Qemu::start(&folder, &incoming);
    qemu.capability("mapped-ram");
    qemu.qmp.execute("migrate-incoming", uri(&made)).unwrap();
    qemu.qmp.wait_for_migration().unwrap();
    // Below 640 KiB and above 1 MiB guest-physical memory is RAM as it is.
    let got = qemu.memory(&folder, 1 << 20, MEMORY - (1 << 20));
    assert_same(&got, &memory[at + (1 << 20)..at + usize::try_from(MEMORY).unwrap()], "the guest");
    qemu.qmp.execute("cont", json!({})).unwrap();
}

/// A guest whose RAM is a file, saved without it; both go in and out, and QEMU goes on from them.
#[test]
fn a_memory_backend_file_and_its_stream_load() {
    let world = World::new();
    let folder = world.folder.path().to_owned();
    let dir = world.path("saved-guest");
    fs::create_dir(&dir).unwrap();
    let machine = |memory: &Path, share: &str| {
        let object = format!(
            "memory-backend-file,id=mem0,size=64M,mem-path={},share={share}",
            memory.display()
        );
        [
            "-machine".to_owned(),
            "q35,memory-backend=mem0".to_owned(),
            "-m".to_owned(),
            "64M".to_owned(),
            "-object".to_owned(),
            object,
        ]
    };
    let (memory, stream) = (dir.join("mem.bin"), dir.join("stream"));
    let arguments = machine(&memory, "on");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    {
        let mut qemu = Qemu::start(&folder, &arguments);
        qemu.qmp.execute("cont", json!({})).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        qemu.qmp.execute("stop", json!({})).unwrap();
        let mark = [0x5a; 4096];
        fs::File::options().write(true).open(&memory).unwrap().write_all_at(&mark, PLACE).unwrap();
        qemu.capability("x-ignore-shared");
        let uri = json!({"uri": format!("exec:cat>{}", stream.display())});
        qemu.qmp.execute("migrate", uri).unwrap();
        qemu.qmp.wait_for_migration().unwrap();
    }
    let report = world.import(Format::Qemu, &dir).unwrap();
    let rows = &report.snapshots[0].commit.manifest.memory_layout;
    assert_eq!((rows.len(), rows[0].guest_address, rows[0].length), (1, Some(0), MEMORY));
    let out = world.path("out");
    world.export("vm", &out, Format::Qemu, &ExportRequest::default()).unwrap();
    let arguments = machine(&out.join("memory"), "off");
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    arguments.extend(["-incoming", "defer"]);
    let mut qemu = Qemu::start(&folder, &arguments);
    qemu.capability("x-ignore-shared");
    let uri = json!({"uri": format!("exec:cat {}", out.join("stream").display())});
    qemu.qmp.execute("migrate-incoming", uri).unwrap();
    qemu.qmp.wait_for_migration().unwrap();
    assert_same(&qemu.memory(&folder, PLACE, 4096), &[0x5a; 4096], "the mark");
    qemu.qmp.execute("cont", json!({})).unwrap();
}
