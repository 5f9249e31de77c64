//! Live disks as files: file systems of the kernel on them, work, crashes, commits, and who has them.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::fixture::{Home, noise};
use crate::mounted::{Looped, Mounted, path, run, wait_for};

fn read_write(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

#[test]
fn a_live_disk_is_written_as_a_file_and_committed_while_it_is_open() {
    let home = Home::with_store();
    let mut expected = noise(1, 2048);
    home.file("d", &expected);
    home.ok(&["commit", "vm", "--disk", "d"]);
    let mounted = Mounted::start(&home);
    home.ok(&["disk", "create", "box", "--from", "vm:root", "--size", "16MiB"]);
    expected.resize(16 << 20, 0);
    let place = mounted.path("live/box/disk/root");
    assert_eq!(fs::metadata(&place).unwrap().len(), 16 << 20);
    let file = read_write(&place);
    file.write_all_at(&noise(2, 3), 5000).unwrap();
    expected[5000..5000 + 3 * 4096].copy_from_slice(&noise(2, 3));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 1 << 20, 1 << 20).unwrap();
    fallocate(&file, FallocateFlags::ZERO_RANGE, 3 << 20, 10_000).unwrap();
    expected[1 << 20..2 << 20].fill(0);
    expected[3 << 20..(3 << 20) + 10_000].fill(0);
    file.sync_all().unwrap();
    // The process that has the disk is the mount's, and others ask it.
    let status = home.json(&["disk", "status", "box"]);
    assert_eq!(status["disks"][0]["base"], "vm@1:disk/root");
    assert!(status["disks"][0]["dirty_bytes"].as_u64().unwrap() >= 4 * 4096);
    assert_eq!(home.json(&["disk", "commit", "box", "vm"])["snapshot"], "vm@2");
    assert!(fs::read(mounted.path("vm/2/disk/root")).unwrap() == expected);
    file.write_all_at(b"after the commit", 0).unwrap();
    expected[..16].copy_from_slice(b"after the commit");
    assert!(fs::read(&place).unwrap() == expected);
    assert!(fs::metadata(&place).unwrap().blocks() < 1024, "only what was written takes room");
    let later = home.fails(10, &["disk", "rm", "box"]);
    assert!(later.contains("are open"), "{later}");
    drop(file);
    // A truncation by path opens it for no longer than that.
    run("truncate", &["-s", "16M", path(&place)]);
    // Nobody has it any more.
    wait_for("letting go", || home.run(&["disk", "discard", "box"]).status.success());
    assert!(fs::read(&place).unwrap() == fs::read(mounted.path("vm/2/disk/root")).unwrap());
    home.ok(&["disk", "rm", "box"]);
    assert!(!place.exists());
    mounted.terminate();
}

#[test]
fn one_process_has_a_live_disk_and_new_ones_join_it() {
    let home = Home::with_store();
    home.ok(&["disk", "create", "box/a", "--size", "1MiB"]);
    let mounted = Mounted::start(&home);
    let server = serve_nbd(&home, "box/a");
    let refused = File::open(mounted.path("live/box/disk/a")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(Errno::BUSY.raw_os_error()));
    drop(server);
    let mut a = None;
    wait_for("the server's end", || {
        a = File::options().write(true).open(mounted.path("live/box/disk/a")).ok();
        a.is_some()
    });
    home.fails(10, &["serve", "nbd", "box/a", "--socket", "t.nbd"]);
    home.ok(&["disk", "create", "box/b", "--size", "2MiB"]);
    let b = read_write(&mounted.path("live/box/disk/b"));
    b.write_all_at(&[7; 4096], 8192).unwrap();
    a.take().unwrap().write_all_at(&[6; 4096], 0).unwrap();
    assert_eq!(home.ok(&["disk", "commit", "box", "pair"]), "pair@1\n");
    assert_eq!(fs::read(mounted.path("pair/1/disk/a")).unwrap()[..4096], [6; 4096]);
    assert_eq!(fs::read(mounted.path("pair/1/disk/b")).unwrap()[8192..12288], [7; 4096]);
    drop(b);
    wait_for("letting go", || home.run(&["disk", "rm", "box"]).status.success());
    // One of the same name is another one.
    home.ok(&["disk", "create", "box/a", "--size", "3MiB"]);
    let bytes = fs::read(mounted.path("live/box/disk/a")).unwrap();
    assert!(bytes == vec![0; 3 << 20]);
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve_nbd(home: &Home, export: &str) -> Server {
    let child = Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .current_dir(home.path("."))
        .args(["serve", "nbd", export, "--socket", "s.nbd"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let server = Server(child);
    wait_for("the server", || home.path("s.nbd").exists());
    server
}

/// Work of a few programs on a file system at once: verified random writes, files that come and go.
fn work(dir: &Path) {
    let fio = {
        let dir = dir.to_owned();
        thread::spawn(move || {
            run(
                "fio",
                &[
                    "--name=work",
                    &format!("--directory={}", path(&dir)),
                    "--rw=randwrite",
                    "--bsrange=512-64k",
                    "--bs_unaligned=1",
                    "--size=24m",
                    "--ioengine=psync",
                    "--fsync=64",
                    "--verify=crc32c",
                    "--do_verify=1",
                    "--verify_state_save=0",
                    "--randrepeat=0",
                    "--minimal",
                ],
            );
        })
    };
    for round in 0..12_u64 {
        let folder = dir.join(format!("round-{round}"));
        fs::create_dir(&folder).unwrap();
        for number in 0..20 {
            fs::write(folder.join(format!("file-{number}")), noise(round * 100 + number, 17))
                .unwrap();
        }
        if round % 3 == 2 {
            fs::remove_dir_all(dir.join(format!("round-{}", round - 1))).unwrap();
            run("fstrim", &[path(dir)]);
        }
    }
    fio.join().unwrap();
}

/// A file system of the kernel on a live disk: worked on, committed while it is worked on, killed with
/// its server, checked, and its synced files are there, on the disk and in the commit.
fn file_system_survives(name: &str, size: &str, make: &[&str], check: &dyn Fn(&Path)) {
    let home = Home::with_store();
    home.ok(&["disk", "create", "box", "--size", size]);
    let mut mounted = Mounted::start(&home);
    let place = mounted.path("live/box/disk/root");
    let (program, options) = make.split_first().unwrap();
    run(program, &[options, &[path(&place)]].concat());
    let looped = Looped::mount(&place, &home.path("fs"), "rw,discard");
    work(looped.dir());
    let kept = looped.dir().join("kept");
    fs::write(&kept, noise(77, 1500)).unwrap();
    run("sync", &["-f", path(looped.dir())]);
    assert_eq!(home.ok(&["disk", "commit", "box", name]), format!("{name}@1\n"));
    let newer = looped.dir().join("newer");
    fs::write(&newer, noise(78, 500)).unwrap();
    run("sync", &["-f", path(looped.dir())]);
    fs::write(looped.dir().join("unsynced"), noise(79, 500)).unwrap();
    mounted.kill();
    drop(looped);
    drop(mounted);

    let mounted = Mounted::start(&home);
    let looped = Looped::mount(&place, &home.path("fs"), "rw");
    assert!(fs::read(&kept).unwrap() == noise(77, 1500));
    assert!(fs::read(&newer).unwrap() == noise(78, 500));
    assert!(fs::read(looped.dir().join("round-11/file-19")).unwrap() == noise(1119, 17));
    run(
        "fio",
        &[
            "--name=work",
            &format!("--directory={}", path(looped.dir())),
            "--rw=randread",
            "--bsrange=512-64k",
            "--bs_unaligned=1",
            "--size=24m",
            "--ioengine=psync",
            "--minimal",
        ],
    );
    looped.unmount();
    check(&place);
    assert_eq!(home.ok(&["disk", "commit", "box", name]), format!("{name}@2\n"));
    check(&mounted.path(&format!("{name}/2/disk/root")));

    // The first commit is a file system of its own, as after a power cut: its journal is replayed.
    home.ok(&["disk", "create", "first", "--from", &format!("{name}@1:root")]);
    let looped = Looped::mount(&mounted.path("live/first/disk/root"), &home.path("first"), "rw");
    assert!(fs::read(looped.dir().join("kept")).unwrap() == noise(77, 1500));
    assert!(!looped.dir().join("newer").exists());
    looped.unmount();
    check(&mounted.path("live/first/disk/root"));
    home.ok(&["verify", "--deep"]);
}

#[test]
fn ext4_on_a_live_disk_survives() {
    file_system_survives("ext4", "192MiB", &["mkfs.ext4", "-q"], &|file| {
        run("e2fsck", &["-fn", path(file)]);
    });
}

#[test]
fn xfs_on_a_live_disk_survives() {
    file_system_survives("xfs", "320MiB", &["mkfs.xfs", "-q", "-f"], &|file| {
        run("xfs_repair", &["-n", "-f", path(file)]);
    });
}
