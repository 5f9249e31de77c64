//! Captures: dumps that go into the store while a VMM writes them, as Firecracker and Cloud Hypervisor
//! do, and what becomes of those that come in another order, fail, or are never taken.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::fixture::{Home, code, noise, set_block, walk};
use crate::mounted::{Mounted, detach, path, run, wait_for};

const PAGES: usize = 4096;

/// As Firecracker opens the file of a memory dump: made, not truncated.
fn open_dump(path: &Path) -> File {
    OpenOptions::new().write(true).create(true).truncate(false).open(path).unwrap()
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap()
}

/// A store with vm@1, whose memory is returned.
fn with_memory(home: &Home) -> Vec<u8> {
    let mut memory = noise(1, PAGES);
    memory[100 * 4096..900 * 4096].fill(0);
    home.file("mem", &memory);
    home.file("state", b"first");
    home.ok(&["commit", "vm", "--memory", "mem", "--state", "state"]);
    memory
}

/// All regular files of the store, by bytes.
fn stored_bytes(home: &Home) -> u64 {
    let mut files = Vec::new();
    walk(&home.store(), &mut files);
    files.iter().map(|(_, len)| len).sum()
}

#[test]
fn a_diff_is_captured_as_firecracker_writes_it() {
    let home = Home::with_store();
    let mut expected = with_memory(&home);
    let mounted = Mounted::start(&home);
    let capture = mounted.path("capture/box");
    fs::create_dir(&capture).unwrap();
    // What never was written is as in the parent: without one there is no diff.
    let error = File::create(capture.join("memory-diff")).unwrap_err();
    assert_eq!(errno(&error), Errno::INVAL);
    fs::write(capture.join("parent"), "vm@1\n").unwrap();
    assert_eq!(fs::read_to_string(capture.join("parent")).unwrap(), "vm@1\n");
    fs::write(capture.join("vmstate"), b"second").unwrap();

    let file = open_dump(&capture.join("memory-diff"));
    assert_eq!(file.metadata().unwrap().len(), 0);
    file.set_len(0).unwrap();
    file.set_len(expected.len() as u64).unwrap();
    // New data, a page that is zero now and was not, and the last page; holes between them.
    for (page, bytes) in [(7, noise(2, 3)), (50, vec![0; 4096]), (300, noise(3, 200))] {
        file.write_all_at(&bytes, page * 4096).unwrap();
        let at = usize::try_from(page).unwrap() * 4096;
        expected[at..][..bytes.len()].copy_from_slice(&bytes);
    }
    file.write_all_at(&noise(4, 1), (PAGES as u64 - 1) * 4096).unwrap();
    set_block(&mut expected, PAGES - 1, &noise(4, 1));
    let early = fs::read(capture.join("captured.json")).unwrap_err();
    assert_eq!(errno(&early), Errno::BUSY, "it is being written");
    let busy = home.fails(10, &["commit", "vm", "--capture", path(&capture)]);
    assert!(busy.contains("is open"), "{busy}");
    let before = stored_bytes(&home);
    file.sync_all().unwrap();
    drop(file);
    // 204 pages of noise, and nothing else: no copy of the dump lies anywhere.
    assert!(stored_bytes(&home) < before + 230 * 4096);

    let committed = home.json(&["commit", "vm", "--capture", path(&capture)]);
    assert_eq!(committed["snapshot"], "vm@2");
    assert_eq!(committed["parent"], "vm@1");
    assert_eq!(committed["images"]["memory"]["new_bytes"], 204 * 4096);
    assert!(!capture.exists(), "the snapshot has it");
    assert!(fs::read(mounted.path("vm/2/memory")).unwrap() == expected);
    assert_eq!(fs::read(mounted.path("vm/2/state/vmstate")).unwrap(), b"second");
    home.ok(&["gc"]);
    home.ok(&["verify", "--deep"]);
    assert!(home.run(&["cat", "vm@2:memory"]).stdout == expected);
    mounted.terminate();
}

#[test]
fn a_folder_is_captured_as_cloud_hypervisor_writes_it() {
    let home = Home::with_store();
    let mounted = Mounted::start(&home);
    let capture = mounted.path("capture/ch");
    fs::create_dir(&capture).unwrap();
    let create =
        |name: &str| OpenOptions::new().write(true).create_new(true).open(capture.join(name));
    let mut expected = noise(5, 3000);
    expected[4096 * 1000..4096 * 2000].fill(0);
    let file = create("memory-ranges").unwrap();
    assert_eq!(create("memory-ranges").unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
    for chunk in [0..1500 * 4096, 1500 * 4096..expected.len()] {
        file.write_all_at(&expected[chunk.clone()], chunk.start as u64).unwrap();
    }
    drop(file);
    fs::write(capture.join("config.json"), b"{\"cpus\":1}").unwrap();
    fs::write(capture.join("state.json"), b"{}").unwrap();
    assert!(fs::read(capture.join("memory-ranges")).unwrap() == expected, "it can be compared");
    // Two files of one image make no sense.
    let error = create("memory").unwrap_err();
    assert_eq!(errno(&error), Errno::EXIST);
    home.ok(&["commit", "ch", "--capture", path(&capture), "--vmm", "cloud-hypervisor"]);
    assert!(fs::read(mounted.path("ch/1/memory")).unwrap() == expected);
    assert_eq!(fs::read(mounted.path("ch/1/state/config.json")).unwrap(), b"{\"cpus\":1}");
    assert_eq!(fs::read(mounted.path("ch/1/state/state.json")).unwrap(), b"{}");
    mounted.terminate();
}

/// Whatever the order and the lengths, what is captured is what a file would be.
#[test]
fn writes_in_any_order_and_of_any_length_are_those_of_a_file() {
    let home = Home::with_store();
    with_memory(&home);
    let mounted = Mounted::start(&home);
    for (round, is_diff) in [(1_u64, false), (2, true), (3, false), (4, true)] {
        let capture = mounted.path(&format!("capture/round-{round}"));
        fs::create_dir(&capture).unwrap();
        fs::write(capture.join("parent"), "vm@1").unwrap();
        fs::write(capture.join("vmstate"), b"state").unwrap();
        let name = if is_diff { "memory-diff" } else { "memory" };
        let file = open_dump(&capture.join(name));
        // The model: a plain file, that began as the parent where holes mean that.
        let model = home.path(&format!("model-{round}"));
        if is_diff {
            fs::copy(home.path("mem"), &model).unwrap();
        }
        let model = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&model)
            .unwrap();
        let size = PAGES as u64 * 4096;
        let files = [&file, &model];
        files.iter().for_each(|file| file.set_len(size).unwrap());
        let mut state = round.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut random = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut at = 0;
        for step in 0..120 {
            // Mostly onwards; now and then back, over what was written, or made durable.
            at = match random(12) {
                0 => random(size - 300_000),
                _ => (at + random(200_000)).min(size - 300_000),
            };
            let len = random(if step % 10 == 0 { 300_000 } else { 9000 });
            let bytes = noise(step * 7 + round, 74);
            let bytes = &bytes[..usize::try_from(len).unwrap()];
            files.iter().for_each(|file| file.write_all_at(bytes, at).unwrap());
            at += len;
            match random(40) {
                0 => file.sync_all().unwrap(),
                1 => {
                    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    files.iter().for_each(|file| fallocate(file, mode, at / 2, 50_001).unwrap());
                }
                2 if !is_diff => {
                    // What is cut off is not there when the file grows again.
                    let cut = at.max(12_345) - 12_345;
                    files.iter().for_each(|file| file.set_len(cut).unwrap());
                    files.iter().for_each(|file| file.set_len(size).unwrap());
                }
                _ => {}
            }
        }
        file.sync_all().unwrap();
        drop(file);
        home.ok(&["commit", &format!("round-{round}"), "--capture", path(&capture)]);
        let got = fs::read(mounted.path(&format!("round-{round}/1/memory"))).unwrap();
        let mut expected = vec![0; usize::try_from(size).unwrap()];
        model.read_exact_at(&mut expected, 0).unwrap();
        let differs = got.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!((got.len(), differs), (expected.len(), None), "round {round}");
    }
    home.ok(&["verify", "--deep"]);
    mounted.terminate();
}

#[test]
fn what_is_odd_is_refused_and_says_so() {
    let home = Home::with_store();
    let memory = with_memory(&home);
    let mounted = Mounted::start(&home);
    let capture = mounted.path("capture/odd");
    fs::create_dir(&capture).unwrap();
    assert_eq!(fs::create_dir(&capture).unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
    for parent in ["nobody@1", "vm@9", "no name", "vm@1 and more"] {
        let error = fs::write(capture.join("parent"), parent).unwrap_err();
        assert_eq!(errno(&error), Errno::INVAL, "{parent}");
    }
    fs::write(capture.join("parent"), "vm").unwrap();
    let error = File::create(capture.join(".hidden")).unwrap_err();
    assert_eq!(errno(&error), Errno::INVAL);
    assert!(fs::create_dir(capture.join("folder")).is_err());
    // A diff of another length than the parent's memory is none against it.
    let file = open_dump(&capture.join("memory-diff"));
    file.write_all_at(&noise(1, 1), 0).unwrap();
    assert_eq!(errno(&file.sync_all().unwrap_err()), Errno::INVAL);
    file.set_len(memory.len() as u64).unwrap();
    file.sync_all().unwrap();
    let error = fs::write(capture.join("parent"), "vm@1").unwrap_err();
    assert_eq!(errno(&error), Errno::INVAL, "it lies over its parent already");
    // Whoever goes back all the time is told in time.
    let error = (0..100)
        .find_map(|number| file.write_all_at(&noise(number, 1), (200 - number) * 4096).err())
        .expect("so many packs are not made");
    assert_eq!(errno(&error), Errno::INVAL);
    assert_eq!(errno(&file.sync_all().unwrap_err()), Errno::INVAL, "it is not forgotten");
    drop(file);
    let log = fs::read_to_string(home.path("mount.log")).unwrap();
    assert!(log.contains("write it in ascending order"), "{log}");
    let failed = home.fails(code::IO, &["commit", "vm", "--capture", path(&capture)]);
    assert!(failed.contains("is not stored; the mount's log says why"), "{failed}");
    // Truncated, it is as new.
    let file = OpenOptions::new().write(true).truncate(true).open(capture.join("memory-diff"));
    let file = file.unwrap();
    file.set_len(memory.len() as u64).unwrap();
    file.sync_all().unwrap();
    drop(file);
    // Another store's mount holds nothing for this one.
    let other = Home::with_store();
    let refused = other.fails(code::REFUSED, &["commit", "x", "--capture", path(&capture)]);
    assert!(refused.contains("another store"), "{refused}");
    other.fails(code::NOT_FOUND, &["commit", "x", "--capture", "."]);
    // Never taken: it goes, and gc frees what it held.
    assert!(fs::remove_dir(&capture).is_err(), "it is not empty");
    fs::remove_dir_all(&capture).unwrap();
    home.ok(&["gc"]);
    home.ok(&["verify", "--deep"]);
    mounted.terminate();
}

/// What was captured and not yet taken is held against a collection; what goes with its folder is not.
#[test]
fn a_collection_spares_what_waits_for_its_commit() {
    let home = Home::with_store();
    let mounted = Mounted::start(&home);
    let capture = mounted.path("capture/box");
    fs::create_dir(&capture).unwrap();
    let expected = noise(9, 500);
    fs::write(capture.join("memory"), &expected).unwrap();
    fs::write(capture.join("vmstate"), b"state").unwrap();
    home.ok(&["gc"]);
    home.ok(&["commit", "vm", "--capture", path(&capture)]);
    home.ok(&["gc"]);
    assert!(home.run(&["cat", "vm:memory"]).stdout == expected);
    let capture = mounted.path("capture/gone");
    fs::create_dir(&capture).unwrap();
    fs::write(capture.join("memory"), noise(10, 500)).unwrap();
    let before = stored_bytes(&home);
    fs::remove_dir_all(&capture).unwrap();
    wait_for("letting go", || {
        home.ok(&["gc"]);
        stored_bytes(&home) + 400 * 4096 < before
    });
    mounted.terminate();
}

/// Disks, memory and state of one moment: the VM's disks are in the mount, too.
#[test]
fn a_live_vm_is_committed_with_what_was_captured_of_it() {
    let home = Home::with_store();
    home.ok(&["disk", "create", "box", "--size", "4MiB"]);
    let mounted = Mounted::start(&home);
    let disk = OpenOptions::new().write(true).open(mounted.path("live/box/disk/root")).unwrap();
    disk.write_all_at(&noise(20, 10), 0).unwrap();
    let capture = mounted.path("capture/box");
    for (number, seed) in [(1, 21), (2, 22)] {
        fs::create_dir(&capture).unwrap();
        fs::write(capture.join("memory"), noise(seed, 300)).unwrap();
        fs::write(capture.join("vmstate"), b"state").unwrap();
        disk.write_all_at(&noise(seed, 1), 0).unwrap();
        let committed = home.json(&["commit", "vm", "--live", "box", "--capture", path(&capture)]);
        assert_eq!(committed["snapshot"], format!("vm@{number}"));
        assert!(!capture.exists());
        let place = mounted.path(&format!("vm/{number}"));
        assert!(fs::read(place.join("memory")).unwrap() == noise(seed, 300));
        assert!(fs::read(place.join("disk/root")).unwrap()[..4096] == noise(seed, 1));
        assert_eq!(fs::read(place.join("state/vmstate")).unwrap(), b"state");
    }
    let twice = home.path("twice");
    fs::write(&twice, b"x").unwrap();
    fs::create_dir(&capture).unwrap();
    fs::write(capture.join("vmstate"), b"state").unwrap();
    home.fails(
        code::USAGE,
        &["commit", "vm", "--live", "box", "--capture", path(&capture), "--state", "twice"],
    );
    drop(disk);
    mounted.terminate();
}

/// A store without room: the dump fails at the latest when it is closed, and the mount goes on.
#[test]
fn a_full_store_fails_the_dump_and_nothing_else() {
    let home = Home::new();
    let disk = home.path("small");
    fs::create_dir(&disk).unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=24m", "none", path(&disk)]);
    let _guard = Unmounted(disk.clone());
    home.ok(&["--store", "small/store", "init"]);
    home.file("mem", &noise(1, 500));
    home.ok(&["--store", "small/store", "commit", "vm", "--memory", "mem"]);
    fs::create_dir(home.path("mnt")).unwrap();
    let _mount = Unmounted(home.path("mnt"));
    home.ok(&["--store", "small/store", "mount", "mnt", "--background"]);
    let capture = home.path("mnt/capture/box");
    fs::create_dir(&capture).unwrap();
    let file = open_dump(&capture.join("memory"));
    let mut failed = None;
    for at in 0..12_000_u64 {
        if let Err(error) = file.write_all_at(&noise(at, 1), at * 4096) {
            failed = Some(error);
            break;
        }
    }
    let failed = failed.unwrap_or_else(|| file.sync_all().unwrap_err());
    assert_eq!(errno(&failed), Errno::NOSPC);
    assert!(file.sync_all().is_err(), "it stays so");
    drop(file);
    assert!(fs::read(capture.join("captured.json")).is_err());
    assert!(fs::read(home.path("mnt/vm/1/memory")).unwrap() == noise(1, 500));
    fs::remove_dir_all(&capture).unwrap();
    // The room is there again.
    wait_for("room", || {
        home.ok(&["--store", "small/store", "gc"]);
        fs::create_dir(&capture)
            .is_ok_and(|()| fs::write(capture.join("memory"), noise(2, 500)).is_ok())
    });
    run("umount", &[path(&home.path("mnt"))]);
}

struct Unmounted(std::path::PathBuf);

impl Drop for Unmounted {
    fn drop(&mut self) {
        detach(&self.0);
    }
}

/// A dump past the page cache, as some VMMs write it.
#[test]
fn a_dump_with_direct_requests_is_the_same() {
    let home = Home::with_store();
    let mounted = Mounted::start(&home);
    let capture = mounted.path("capture/box");
    fs::create_dir(&capture).unwrap();
    let bytes = noise(30, 3000);
    home.file("dump", &bytes);
    let of = format!("of={}", path(&capture.join("memory")));
    let input = format!("if={}", path(&home.path("dump")));
    run("dd", &[&input, &of, "bs=4M", "oflag=direct", "conv=fsync", "status=none"]);
    let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    assert!(OpenOptions::new().read(true).custom_flags(flags).open(capture.join("memory")).is_ok());
    run("cmp", &[path(&capture.join("memory")), path(&home.path("dump"))]);
    mounted.terminate();
}
