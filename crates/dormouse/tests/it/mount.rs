//! Snapshots as files: what stock tools make of them, what comes and goes, what damage does, and how
//! a mount ends.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::fixture::{Home, code, noise, set_block, walk};
use crate::mounted::{Looped, Mounted, detach, path, run, wait_for};

/// An ext4 file system of 64 MiB with files in it, and the folder they came from.
fn ext4(home: &Home) {
    let tree = home.path("tree");
    fs::create_dir_all(tree.join("deep/er")).unwrap();
    fs::write(tree.join("small"), b"small").unwrap();
    fs::write(tree.join("deep/noise"), noise(11, 2000)).unwrap();
    fs::write(tree.join("deep/er/zeros"), vec![0; 1 << 20]).unwrap();
    run("mke2fs", &["-q", "-t", "ext4", "-d", path(&tree), path(&home.path("root.img")), "64M"]);
}

/// Bytes that a file says are data, by walking it.
fn data_bytes(file: &Path) -> u64 {
    let file = File::open(file).unwrap();
    let (mut at, mut bytes) = (0, 0);
    loop {
        let data = match seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return bytes,
            Err(error) => panic!("{error}"),
        };
        at = seek(&file, SeekFrom::Hole(data)).unwrap();
        bytes += at - data;
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_snapshot_is_a_folder_of_plain_files() {
    let home = Home::with_store();
    ext4(&home);
    let mut memory = noise(1, 3000);
    memory[100 * 4096..900 * 4096].fill(0);
    home.file("mem", &memory);
    home.file("state", b"{\"vmm\":\"state\"}");
    home.ok(&[
        "commit",
        "vm",
        "--memory",
        "mem",
        "--disk",
        "root.img",
        "--state",
        "config.json=state",
    ]);
    // A diff, and a disk that is taken over as it was.
    let diff = File::create(home.path("diff")).unwrap();
    diff.set_len(memory.len() as u64).unwrap();
    diff.write_all_at(&noise(2, 1), 200 * 4096).unwrap();
    diff.write_all_at(&[0; 8192], 20 * 4096).unwrap();
    home.ok(&[
        "commit",
        "vm",
        "--parent",
        "vm@1",
        "--memory-diff",
        "diff",
        "--state",
        "config.json=state",
    ]);
    let mounted = Mounted::start(&home);
    assert_eq!(names(&mounted.path("")), ["capture", "discard", "live", "vm"]);
    assert_eq!(names(&mounted.path("vm")), ["1", "2"]);
    assert_eq!(names(&mounted.path("vm/2")), ["disk", "manifest.json", "memory", "state"]);
    assert_eq!(names(&mounted.path("vm/2/state")), ["config.json"]);

    run("cmp", &[path(&mounted.path("vm/1/memory")), path(&home.path("mem"))]);
    run("cmp", &[path(&mounted.path("vm/1/disk/root")), path(&home.path("root.img"))]);
    run("cmp", &[path(&mounted.path("vm/2/disk/root")), path(&home.path("root.img"))]);
    assert_eq!(fs::read(mounted.path("vm/1/state/config.json")).unwrap(), b"{\"vmm\":\"state\"}");
    set_block(&mut memory, 200, &noise(2, 1));
    memory[20 * 4096..22 * 4096].fill(0);
    assert!(fs::read(mounted.path("vm/2/memory")).unwrap() == memory);
    let manifest = fs::read_to_string(mounted.path("vm/2/manifest.json")).unwrap();
    assert!(manifest.contains("\"images\""), "{manifest}");

    // Blocks as counted by the commit, or by walking the map, are those that the file has.
    for image in ["vm/1/memory", "vm/2/memory", "vm/1/disk/root", "vm/2/disk/root"] {
        let metadata = fs::metadata(mounted.path(image)).unwrap();
        assert_eq!(metadata.blocks() * 512, data_bytes(&mounted.path(image)), "{image}");
        assert_eq!(metadata.uid(), rustix::process::getuid().as_raw());
    }
    assert!(data_bytes(&mounted.path("vm/1/memory")) == 2200 * 4096);

    // Large requests past the page cache, a part in the middle, and reading sparse.
    let (of, input) = (home.path("of"), format!("if={}", path(&mounted.path("vm/2/memory"))));
    let of_option = format!("of={}", path(&of));
    run("dd", &[&input, &of_option, "bs=4M", "iflag=direct", "status=none"]);
    assert!(fs::read(&of).unwrap() == memory);
    run("dd", &[&input, &of_option, "bs=1000", "skip=1234", "count=777", "status=none"]);
    assert!(fs::read(&of).unwrap() == memory[1_234_000..2_011_000]);
    run("cp", &["--sparse=always", path(&mounted.path("vm/2/memory")), path(&of)]);
    assert!(fs::read(&of).unwrap() == memory);

    // The guest's file system: by a tool that reads it itself, and by the kernel.
    let dump = format!("dump /deep/noise {}", path(&home.path("dumped")));
    run("debugfs", &["-R", &dump, path(&mounted.path("vm/1/disk/root"))]);
    assert!(fs::read(home.path("dumped")).unwrap() == noise(11, 2000));
    let looped = Looped::mount(&mounted.path("vm/2/disk/root"), &home.path("root"), "ro");
    run("diff", &["-r", "--exclude=lost+found", path(&home.path("tree")), path(looped.dir())]);
    looped.unmount();
    let refused = fs::OpenOptions::new().write(true).open(mounted.path("vm/1/disk/root"));
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(Errno::ROFS.raw_os_error()));
    mounted.terminate();
    assert!(names(&home.path("mnt")).is_empty());
}

#[test]
fn what_is_committed_and_removed_is_seen_at_once_and_what_is_open_stays() {
    let home = Home::with_store();
    let mounted = Mounted::start(&home);
    assert!(!mounted.path("vm").exists());
    let expected = noise(3, 500);
    home.file("mem", &expected);
    home.ok(&["commit", "vm", "--memory", "mem"]);
    assert!(fs::read(mounted.path("vm/1/memory")).unwrap() == expected);
    assert!(!mounted.path("vm/2").exists());
    home.file("mem", &noise(4, 500));
    home.ok(&["commit", "vm", "--memory", "mem"]);
    assert_eq!(names(&mounted.path("vm")), ["1", "2"]);
    let file = File::open(mounted.path("vm/1/memory")).unwrap();
    let mut first = vec![0; 4096];
    file.read_exact_at(&mut first, 0).unwrap();
    home.ok(&["rm", "vm@1", "vm@2"]);
    home.ok(&["gc"]);
    assert!(!mounted.path("vm/1/memory").exists());
    assert!(!mounted.path("vm").exists());
    assert_eq!(names(&mounted.path("")), ["capture", "discard", "live"]);
    // Read past the cache, so that it comes from the packs.
    drop_page_cache(&file);
    let mut all = vec![0; expected.len()];
    file.read_exact_at(&mut all, 0).unwrap();
    assert!(all == expected, "an open image keeps its blocks");
    drop(file);
    wait_for("letting go of the pin", || {
        home.ok(&["gc"]);
        let mut packs = Vec::new();
        walk(&home.store().join("packs"), &mut packs);
        packs.is_empty()
    });
}

fn drop_page_cache(file: &File) {
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// A flipped bit in a pack is an error to whoever needs it; what lies in other frames is served.
#[test]
fn damage_is_an_input_error_and_never_other_bytes() {
    let home = Home::with_store();
    let expected = noise(5, 2048);
    home.file("mem", &expected);
    home.ok(&["commit", "vm", "--memory", "mem"]);
    let mut packs = Vec::new();
    walk(&home.store().join("packs"), &mut packs);
    let [(pack, len)] = &packs[..] else { panic!("{packs:?}") };
    let file = File::options().read(true).write(true).open(pack).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, len / 2).unwrap();
    file.write_all_at(&[byte[0] ^ 4], len / 2).unwrap();
    let mounted = Mounted::start(&home);
    let image = File::open(mounted.path("vm/1/memory")).unwrap();
    let mut failed = 0;
    for (number, page) in expected.chunks(4096).enumerate() {
        let mut read = vec![0; 4096];
        match image.read_exact_at(&mut read, number as u64 * 4096) {
            Ok(()) => assert!(read == page, "page {number}"),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()));
                failed += 1;
            }
        }
    }
    assert!((1..=16).contains(&failed), "one frame is lost, {failed} pages are");
    let read = fs::read(mounted.path("vm/1/memory")).unwrap_err();
    assert_eq!(read.raw_os_error(), Some(Errno::IO.raw_os_error()));
    let log = fs::read_to_string(home.path("mount.log")).unwrap();
    assert!(log.contains("vm/1/memory") && log.contains("vm@1"), "{log}");
}

#[test]
fn a_mount_goes_to_the_background_and_a_crashed_one_is_cleared_away() {
    let home = Home::with_store();
    home.file("mem", &noise(6, 10));
    home.ok(&["commit", "vm", "--memory", "mem"]);
    fs::create_dir(home.path("mnt")).unwrap();
    let guard = Detached(home.path("mnt"));
    let started = home.json(&["mount", "mnt", "--background", "--log", "log"]);
    let pid = i32::try_from(started["pid"].as_i64().unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    assert_eq!(fs::read(home.path("mnt/vm/1/memory")).unwrap(), noise(6, 10));
    let errors = home.fails(10, &["mount", "mnt", "--background"]);
    assert!(errors.contains("mounted") && errors.contains("already"), "{errors}");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    wait_for("the crash", || {
        fs::metadata(home.path("mnt"))
            .is_err_and(|error| error.raw_os_error() == Some(Errno::NOTCONN.raw_os_error()))
    });
    // The next one clears it away, says so, and is there.
    let output = home.command(&["mount", "mnt", "--background", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(code::OK));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("left behind by a crash"), "{errors}");
    assert_eq!(fs::read(home.path("mnt/vm/1/memory")).unwrap(), noise(6, 10));
    run("umount", &[path(&home.path("mnt"))]);
    let started: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let proc = format!("/proc/{}", started["pid"]);
    wait_for("the end after an unmount", || !Path::new(&proc).exists());
    home.fails(code::NOT_FOUND, &["mount", "nowhere"]);
    drop(guard);
}

struct Detached(std::path::PathBuf);

impl Drop for Detached {
    fn drop(&mut self) {
        detach(&self.0);
    }
}

/// A signal while files are open: names are gone, the files go on, the process ends with the last.
#[test]
fn a_signal_while_files_are_open_waits_for_them() {
    let home = Home::with_store();
    home.file("mem", &noise(7, 300));
    home.ok(&["commit", "vm", "--memory", "mem"]);
    fs::create_dir(home.path("mnt")).unwrap();
    let _guard = Detached(home.path("mnt"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .current_dir(home.path("."))
        .args(["mount", "mnt"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the mount", || home.path("mnt/vm").exists());
    let file = File::open(home.path("mnt/vm/1/memory")).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    wait_for("the name to go", || !home.path("mnt/vm").exists());
    assert!(child.try_wait().unwrap().is_none());
    let mut all = vec![0; 300 * 4096];
    file.read_exact_at(&mut all, 0).unwrap();
    assert!(all == noise(7, 300));
    drop(file);
    assert!(child.wait().unwrap().success());
}

/// A second signal does not wait for open files, and keeps what was written to live disks.
#[test]
fn a_second_signal_ends_at_once_and_keeps_what_was_written() {
    let home = Home::with_store();
    home.ok(&["disk", "create", "box", "--size", "1MiB"]);
    fs::create_dir(home.path("mnt")).unwrap();
    let _guard = Detached(home.path("mnt"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .current_dir(home.path("."))
        .args(["mount", "mnt"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the mount", || home.path("mnt/live/box").exists());
    let file = File::options().write(true).open(home.path("mnt/live/box/disk/root")).unwrap();
    file.write_all_at(&noise(9, 5), 4096).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    let signal = || rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    signal();
    wait_for("the name to go", || !home.path("mnt/live").exists());
    signal();
    assert!(child.wait().unwrap().success());
    let written = file.write_all_at(b"x", 0).unwrap_err();
    assert_eq!(written.raw_os_error(), Some(Errno::NOTCONN.raw_os_error()));
    drop(file);
    home.ok(&["disk", "commit", "box", "vm"]);
    assert!(home.run(&["cat", "vm:root"]).stdout[4096..6 * 4096] == noise(9, 5));
}

/// A dump that nobody needs, as Firecracker and Cloud Hypervisor write one: made, given its length,
/// written in order over holes, synced.
#[test]
fn what_is_discarded_keeps_its_size_and_nothing_else() {
    let home = Home::with_store();
    let mounted = Mounted::start(&home);
    let file = File::create(mounted.path("discard/memory")).unwrap();
    file.set_len(64 << 20).unwrap();
    for at in (0..60).step_by(7) {
        file.write_all_at(&noise(at, 256), at << 20).unwrap();
    }
    file.sync_all().unwrap();
    let metadata = fs::metadata(mounted.path("discard/memory")).unwrap();
    assert_eq!((metadata.len(), metadata.blocks()), (64 << 20, 0));
    file.write_all_at(&[1; 4096], 65 << 20).unwrap();
    drop(file);
    assert_eq!(fs::metadata(mounted.path("discard/memory")).unwrap().len(), (65 << 20) + 4096);
    assert!(fs::read(mounted.path("discard/memory")).is_err(), "never zeros");
    // Truncated by whoever opens it anew, or refused.
    File::create(mounted.path("discard/memory")).unwrap();
    assert_eq!(fs::metadata(mounted.path("discard/memory")).unwrap().len(), 0);
    let again = File::create_new(mounted.path("discard/memory")).unwrap_err();
    assert_eq!(again.kind(), std::io::ErrorKind::AlreadyExists);
    fs::create_dir(mounted.path("discard/vm")).unwrap();
    fs::write(mounted.path("discard/vm/state.json"), b"{}").unwrap();
    assert_eq!(names(&mounted.path("discard")), ["memory", "vm"]);
    assert_eq!(names(&mounted.path("discard/vm")), ["state.json"]);
    assert!(fs::remove_dir(mounted.path("discard/vm")).is_err(), "it is not empty");
    fs::remove_dir_all(mounted.path("discard/vm")).unwrap();
    fs::remove_file(mounted.path("discard/memory")).unwrap();
    assert!(names(&mounted.path("discard")).is_empty());
    assert!(fs::write(mounted.path("live/x"), b"x").is_err());
    assert!(fs::create_dir(mounted.path("vm")).is_err());
}
