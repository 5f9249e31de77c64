//! A live disk whose file system is full: told to whoever wrote, until it is made good.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::fixture::{Home, code, noise};
use crate::nbd_fixture::{Served, nbdsh, qemu_io};

/// A small file system in memory, gone with the test.
pub(crate) struct Tmpfs(PathBuf);

impl Tmpfs {
    pub(crate) fn mount(at: &Path, mebibytes: u32) -> Tmpfs {
        fs::create_dir_all(at).unwrap();
        let options = format!("size={mebibytes}m,mode=0700");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).status();
        assert!(mounted.unwrap().success(), "mounting a tmpfs needs root");
        Tmpfs(at.to_owned())
    }

    pub(crate) fn resize(&self, mebibytes: u32) {
        let options = format!("remount,size={mebibytes}m");
        assert!(
            Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap().success()
        );
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: the server may be about to end.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// The overlay's file system fills while a client writes: that client is told ENOSPC, others are
/// served, flushes and commits refuse until what is missing is written again.
#[test]
fn a_full_file_system_reaches_who_wrote_and_every_commit_until_it_is_made_good() {
    let home = Home::with_store();
    home.file("d", &noise(1, 4096));
    home.ok(&["commit", "vm", "--disk", "d"]);
    let tmpfs = Tmpfs::mount(&home.store().join("live"), 4);
    home.ok(&["disk", "create", "box", "--from", "vm:root"]);
    let served = Served::start(&home, &["box", "vm@1:root"]);

    let fill = "\
import errno, os
told = None
at = 0
try:
    while at < 8 << 20:
        h.pwrite(os.urandom(1 << 20), at)
        at += 1 << 20
except nbd.Error as e:
    told = e.errnum
assert told == errno.ENOSPC, told
try:
    h.flush()
    print('flushed')
except nbd.Error as e:
    print(at >> 20, os.strerror(e.errnum))
# The same connection goes on, on what is there and on what is not written.
assert len(h.pread(1 << 20, 0)) == 1 << 20
assert len(h.pread(1 << 20, 12 << 20)) == 1 << 20";
    let said = nbdsh(&home, "box", "", fill);
    let (at, flushed) = said.trim().split_once(' ').unwrap();
    let at: u64 = at.parse().unwrap();
    assert!((1..4).contains(&at), "{said}");
    assert_ne!(flushed, "flushed");

    let said = nbdsh(&home, "vm@1:root", "", "print(len(h.pread(1 << 20, 0)))");
    assert_eq!(said, "1048576\n");
    let status = home.json(&["disk", "status", "box"]);
    assert_eq!(status["disks"][0]["has_failed"], true);
    assert_eq!(status["disks"][0]["is_poisoned"], false);
    assert!(status["disks"][0]["problem"].as_str().unwrap().contains("could not be written"));
    let text = home.ok(&["disk", "status", "box"]);
    assert!(text.contains("FAILED: bytes"), "{text}");
    let told = home.fails(code::IO, &["disk", "commit", "box", "vm"]);
    assert!(told.contains("could not be written"), "{told}");

    // Space alone mends nothing: the bytes are still missing.
    tmpfs.resize(64);
    home.fails(code::IO, &["disk", "commit", "box", "vm"]);
    let write = format!("write -P 7 {at}M 1M");
    let said = qemu_io(&home, "box", &[&write, "flush"]);
    assert!(!said.contains("failed"), "{said}");
    let status = home.json(&["disk", "status", "box"]);
    assert_eq!(status["disks"][0]["has_failed"], false);
    assert_eq!(home.ok(&["disk", "commit", "box", "vm"]), "vm@2\n");
    let committed = home.run(&["cat", "vm@2:root"]).stdout;
    let from = usize::try_from(at << 20).unwrap();
    assert!(committed[from..][..1 << 20].iter().all(|&byte| byte == 7));
    assert!(committed[from + (1 << 20)..] == noise(1, 4096)[from + (1 << 20)..]);
    drop(served);
    home.ok(&["verify", "--deep"]);
}

/// The file system is so full that a flush cannot note what was written; the next one can.
#[test]
fn a_flush_that_finds_no_room_for_its_notes_can_be_tried_again() {
    let home = Home::with_store();
    let tmpfs = Tmpfs::mount(&home.store().join("live"), 4);
    home.ok(&["disk", "create", "box", "--size", "16MiB"]);
    let _served = Served::start(&home, &["box"]);
    let said = qemu_io(&home, "box", &["write -P 1 0 64k", "flush"]);
    assert!(!said.contains("failed"), "{said}");
    let script = "import os\nh.pwrite(os.urandom(1 << 20), 1 << 20)";
    nbdsh(&home, "box", "", script);
    // Every block that is left is taken by somebody else.
    let mut ballast = vec![0_u8; 4 << 20];
    ballast.fill(9);
    fs::write(home.store().join("live/ballast"), &ballast).unwrap_err();
    let scattered = "\
try:
    for block in range(0, 256, 2):
        h.zero(4096, (1 << 20) + block * 4096)
    h.flush()
    print('flushed')
except nbd.Error as e:
    print(e.string)";
    // Zeroing frees space, so the flush may succeed; what matters is that it does afterwards.
    nbdsh(&home, "box", "", scattered);
    fs::remove_file(home.store().join("live/ballast")).unwrap();
    tmpfs.resize(32);
    let said = qemu_io(&home, "box", &["write -P 2 64k 64k", "flush"]);
    assert!(!said.contains("failed"), "{said}");
    assert_eq!(home.ok(&["disk", "commit", "box", "vm"]), "vm@1\n");
}
