//! Real guests on roots that were built here: they boot, grow their disk while it is in use, write,
//! are killed, and their file systems are whole.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use dormouse_testkit::guest::{Assets, Config, Disk, Guest, cache_dir};
use serde_json::json;

use crate::fixture::Home;

const MIB: u64 = 1 << 20;

/// The testkit's root disk, mounted, until the end.
struct Mounted(PathBuf);

impl Mounted {
    fn new(disk: &Path, at: PathBuf) -> Mounted {
        fs::create_dir(&at).unwrap();
        let mut mount = Command::new("mount");
        let status = mount.args(["-o", "loop,ro,noload"]).arg(disk).arg(&at).status();
        assert!(status.unwrap().success());
        Mounted(at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily, should a failed test's child still be in it.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn status(command: &mut Command) -> Option<i32> {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    output.status.code().filter(|code| *code <= 1).or_else(|| panic!("{command:?}: {said}"))
}

/// Boots a root, grows it, writes, kills; then looks at what is left.
fn lives(assets: &Assets, home: &Home, image: &str) {
    let dir = home.path(&format!("guest-{image}"));
    fs::create_dir(&dir).unwrap();
    let disk = home.path(image);
    let size = disk.metadata().unwrap().len();
    let config = Config { disk: Disk::File(disk.clone()), ..Config::in_dir(&dir) };
    let mut guest = Guest::boot(assets, &config).unwrap();
    guest.check("test -x /usr/bin/python3 && cd / && python3 -c 'import json'").unwrap();
    let blocks = guest.qmp().execute("query-block", json!({})).unwrap();
    let device = blocks[0]["device"].as_str().unwrap().to_owned();
    let arguments = json!({ "device": device, "size": 10 * size });
    guest.qmp().execute("block_resize", arguments).unwrap();
    guest.check("resize2fs /dev/vda").unwrap();
    let kib = guest.check("df -k --output=size / | tail -1").unwrap();
    let grown = kib.trim().parse::<u64>().unwrap() * 1024;
    assert!(grown > 9 * size, "{grown} of {}", 10 * size);
    guest
        .check("cp -a /usr/lib/python3 /root/copy && head -c 50000000 /dev/urandom > /root/r")
        .unwrap();
    guest.check("md5sum < /root/r > /root/sum; rm -rf /usr/share/doc; sync").unwrap();
    let sum = guest.check("cat /root/sum").unwrap();
    // Not synced: lost or not, the file system is whole.
    guest.check("cp -a /usr/lib/python3 /root/another").unwrap();
    guest.kill().unwrap();

    // What the journal has is read without a kernel.
    let path = format!("guest-{image}/../{image}");
    assert_eq!(home.ok(&["ext4", "cat", &path, "/root/sum"]), sum);
    assert!(home.ok(&["ext4", "free", &path]).contains("are free"));
    status(Command::new("e2fsck").arg("-fp").arg(&disk));
    let second = status(Command::new("e2fsck").arg("-fn").arg(&disk));
    assert_eq!(second, Some(0), "the journal was replayed by the first run");
}

#[test]
fn a_root_from_a_tar_boots_grows_and_survives() {
    let assets = Assets::prepare(&cache_dir(), &mut |_| ()).unwrap();
    let home = Home::new();
    let mounted = Mounted::new(&assets.disk(), home.path("mounted"));
    let mut pack = Command::new("tar");
    pack.arg("-C").arg(&mounted.0).args(["--format=posix", "--numeric-owner", "--xattrs"]);
    let mut child =
        pack.args(["--xattrs-include=*", "-c", "."]).stdout(Stdio::piped()).spawn().unwrap();
    let built = Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .args(["-q", "ext4", "build", "-", "--label", "root", "-o"])
        .arg(home.path("tar.ext4"))
        .stdin(child.stdout.take().unwrap())
        .status();
    assert!(built.unwrap().success() && child.wait().unwrap().success());
    assert_eq!(status(Command::new("e2fsck").arg("-fn").arg(home.path("tar.ext4"))), Some(0));
    assert!(home.path("tar.ext4").metadata().unwrap().len() < 1024 * MIB);
    lives(&assets, &home, "tar.ext4");
}

/// umoci makes a layer of the root and a second one with whiteouts.
#[test]
fn a_root_from_an_oci_layout_boots_grows_and_survives() {
    let assets = Assets::prepare(&cache_dir(), &mut |_| ()).unwrap();
    let home = Home::new();
    let mounted = Mounted::new(&assets.disk(), home.path("mounted"));
    let umoci = |arguments: &[&str]| {
        let mut command = Command::new("umoci");
        let output = command.current_dir(home.path(".")).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "umoci {arguments:?}: {said}");
    };
    umoci(&["init", "--layout", "image"]);
    umoci(&["new", "--image", "image:v1"]);
    umoci(&["unpack", "--image", "image:v1", "bundle"]);
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(mounted.0.join(".")).arg(home.path("bundle/rootfs"));
    assert!(copy.status().unwrap().success());
    drop(mounted);
    umoci(&["repack", "--refresh-bundle", "--image", "image:v1", "bundle"]);
    fs::remove_dir_all(home.path("bundle/rootfs/usr/share/man")).unwrap();
    home.file("bundle/rootfs/etc/hostname", b"from-oci\n");
    umoci(&["repack", "--refresh-bundle", "--image", "image:v1", "bundle"]);
    home.ok(&["ext4", "build", "oci:image:v1", "-o", "oci.ext4"]);
    assert_eq!(status(Command::new("e2fsck").arg("-fn").arg(home.path("oci.ext4"))), Some(0));
    assert_eq!(home.ok(&["ext4", "cat", "oci.ext4", "/etc/hostname"]), "from-oci\n");
    assert_ne!(home.run(&["ext4", "ls", "oci.ext4", "/usr/share/man"]).status.code(), Some(0));
    lives(&assets, &home, "oci.ext4");
}
