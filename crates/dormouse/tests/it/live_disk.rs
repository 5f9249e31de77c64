//! Live disks from outside: made over a snapshot, served over NBD, committed while they are served.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use dormouse_testkit::guest::{Assets, Config, Disk, Guest, cache_dir};

use crate::fixture::{Home, code};

/// A server that ends with the test.
pub(crate) struct Served(pub(crate) Child);

impl Served {
    pub(crate) fn start(home: &Home, exports: &[&str]) -> Served {
        let mut child = Command::new(env!("CARGO_BIN_EXE_dormouse"))
            .current_dir(home.path("."))
            .env_remove("DORMOUSE_STORE")
            .args(["serve", "nbd", "--socket", "s.nbd"])
            .args(exports)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("nbd+unix:///"), "{line}");
        Served(child)
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn tool(home: &Home, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .current_dir(home.path("."))
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn qemu_io(home: &Home, export: &str, commands: &[&str]) -> String {
    let uri = format!("nbd+unix:///{export}?socket=s.nbd");
    let mut arguments = vec!["-f", "raw", &uri];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    let said = tool(home, "qemu-io", &arguments);
    assert!(!said.contains("failed"), "{said}");
    said
}

fn base(home: &Home) -> Vec<u8> {
    let bytes: Vec<u8> =
        (0..8_u32 << 20).map(|at| (at / 4096 % 250 + 1).to_le_bytes()[0]).collect();
    home.file("d", &bytes);
    home.ok(&["commit", "vm", "--disk", "d"]);
    bytes
}

#[test]
fn a_disk_is_written_over_nbd_and_committed_while_it_is_served() {
    let home = Home::with_store();
    let mut expected = base(&home);
    assert_eq!(
        home.ok(&["disk", "create", "box", "--from", "vm:root", "--size", "16MiB"]),
        "box/root\n"
    );
    home.fails(code::ALREADY_EXISTS, &["disk", "create", "box", "--from", "vm:root"]);
    let mut server = Served::start(&home, &["box", "vm@1:root"]);
    qemu_io(&home, "box", &["write -P 254 1M 64k", "write -z -u 2M 1M", "discard 4M 64k", "flush"]);
    expected[1 << 20..][..64 << 10].fill(254);
    expected[2 << 20..][..1 << 20].fill(0);
    expected[4 << 20..][..64 << 10].fill(0);
    expected.resize(16 << 20, 0);
    let status = home.json(&["disk", "status", "box"]);
    assert_eq!(status["disks"][0]["dirty_bytes"], 64 << 10);
    assert_eq!(status["disks"][0]["zero_bytes"], (1 << 20) + (64 << 10));
    let committed = home.json(&["disk", "commit", "box", "vm"]);
    assert_eq!(committed["snapshot"], "vm@2");
    assert_eq!(committed["figures"]["new_bytes"], 4096, "sixteen equal blocks are one");
    assert_eq!(home.run(&["cat", "vm@2:root"]).stdout, expected);
    assert_eq!(home.json(&["disk", "status", "box"])["disks"][0]["dirty_bytes"], 0);
    assert_eq!(home.json(&["disk", "status", "box"])["disks"][0]["base"], "vm@2:disk/root");
    // What is flushed survives a kill; the base survives rm and gc.
    qemu_io(&home, "box", &["write -P 9 0 4k", "flush"]);
    expected[..4096].fill(9);
    server.kill();
    home.ok(&["rm", "vm@1", "vm@2"]);
    home.ok(&["gc"]);
    let mut server = Served::start(&home, &["box"]);
    tool(&home, "nbdcopy", &["nbd+unix:///box?socket=s.nbd", "copy"]);
    assert!(fs::read(home.path("copy")).unwrap() == expected);
    assert_eq!(home.ok(&["disk", "commit", "box", "vm", "--parent", "none"]), "vm@3\n");
    assert_eq!(home.run(&["cat", "vm@3:root"]).stdout, expected);
    home.ok(&["disk", "rm", "box"]);
    server.0.wait().unwrap();
    assert_eq!(home.ok(&["disk", "ls"]), "");
    home.ok(&["verify", "--deep"]);
}

#[test]
fn what_cannot_be_done_with_live_disks_is_told() {
    let home = Home::with_store();
    base(&home);
    home.fails(code::USAGE, &["disk", "create", "box"]);
    home.fails(code::USAGE, &["disk", "create", "../box", "--size", "1MiB"]);
    home.fails(code::USAGE, &["disk", "create", "box", "--from", "vm:state/vmstate"]);
    home.fails(code::NOT_FOUND, &["disk", "create", "box", "--from", "vm:memory"]);
    home.fails(code::USAGE, &["disk", "create", "box", "--from", "vm:root", "--size", "1MiB"]);
    home.fails(code::NOT_FOUND, &["disk", "create", "box", "--from", "none:root"]);
    home.fails(code::NOT_FOUND, &["disk", "status", "box"]);
    home.fails(code::NOT_FOUND, &["serve", "nbd", "box", "--socket", "s.nbd"]);
    home.ok(&["disk", "create", "box/a", "--size", "1MiB"]);
    home.ok(&["disk", "create", "box/b", "--from", "vm:root"]);
    home.fails(code::USAGE, &["serve", "nbd", "box", "--socket", "s.nbd"]);
    let _server = Served::start(&home, &["box/a", "box/b"]);
    home.fails(10, &["serve", "nbd", "box/a", "--socket", "t.nbd"]);
    home.fails(10, &["disk", "discard", "box"]);
    qemu_io(&home, "box/a", &["write -P 1 0 64k"]);
    assert_eq!(home.ok(&["disk", "commit", "box", "pair"]), "pair@1\n");
    let show = home.json(&["show", "pair"]);
    assert_eq!(show["manifest"]["images"].as_array().unwrap().len(), 2);
}

#[test]
fn a_discarded_disk_is_as_its_base() {
    let home = Home::with_store();
    let expected = base(&home);
    home.ok(&["disk", "create", "box", "--from", "vm:root"]);
    let mut server = Served::start(&home, &["box"]);
    qemu_io(&home, "box", &["write -P 5 0 1M", "flush"]);
    server.kill();
    home.ok(&["disk", "discard", "box"]);
    assert_eq!(home.ok(&["disk", "commit", "box", "vm"]), "vm@2\n");
    assert_eq!(home.run(&["cat", "vm@2:root"]).stdout, expected);
}

/// A real guest runs on a live disk, is killed, and what it synced is in the commit; the file system
/// is clean after its journal is replayed.
#[test]
fn a_real_guest_on_a_live_disk() {
    let assets = Assets::prepare(&cache_dir(), &mut |_| {}).unwrap();
    let home = Home::with_store();
    home.ok(&["commit", "base", "--disk", assets.disk().to_str().unwrap()]);
    home.ok(&["disk", "create", "box", "--from", "base:root"]);
    let _server = Served::start(&home, &["box"]);
    let disk = Disk::Nbd { socket: home.path("s.nbd"), export: "box".to_owned() };
    let config = Config { disk, ..Config::in_dir(&home.path(".")) };
    let mut guest = Guest::boot(&assets, &config).unwrap();
    guest.check("head -c 8388608 /dev/urandom > /root/kept && sync").unwrap();
    guest.check("cp -r /usr/share/doc /root/gone && sync && rm -r /root/gone && fstrim /").unwrap();
    // What is deleted and trimmed is free, in the states and in the file that has the blocks; but
    // for some blocks that the journal holds back from trims, and writes of its own.
    let space = || {
        let status = home.json(&["disk", "status", "box"]);
        let [dirty, allocated] =
            ["dirty_bytes", "allocated_bytes"].map(|key| status["disks"][0][key].as_u64().unwrap());
        assert!(allocated >= dirty, "{status}");
        allocated
    };
    let before = space();
    guest.check("head -c 50331648 /dev/urandom > /root/large && sync").unwrap();
    let filled = space();
    assert!(filled >= before + (32 << 20), "{before} and {filled}");
    guest.check("rm /root/large && sync && fstrim /").unwrap();
    let trimmed = space();
    assert!(trimmed + (40 << 20) <= filled, "{filled} and {trimmed}");
    // Not all that is written is synced: two files are, one after the other, and one is not.
    guest.check("head -c 4194304 /dev/urandom > /root/unsynced").unwrap();
    let fsync = "dd if=/dev/urandom of=/root/fsynced bs=64k count=40 conv=fsync";
    guest.check(fsync).unwrap();
    let again = "dd if=/dev/urandom of=/root/kept bs=4k count=3 seek=7 conv=notrunc,fsync";
    guest.check(again).unwrap();
    let files = ["/root/kept", "/root/fsynced"];
    let sums = files.map(|file| guest.check(&format!("sha256sum < {file}")).unwrap());
    guest.kill().unwrap();
    assert_eq!(home.ok(&["disk", "commit", "box", "vm"]), "vm@1\n");
    home.ok(&["export", "vm:root", "img"]);
    // The journal is replayed, which changes the image and so is not exit code 0 everywhere.
    let replay = Command::new("e2fsck").arg("-p").arg(home.path("img")).output().unwrap();
    assert!(replay.status.code().is_some_and(|code| code <= 1), "{replay:?}");
    tool(&home, "e2fsck", &["-fn", "img"]);
    for (file, sum) in files.iter().zip(&sums) {
        let expected = sum.split_whitespace().next().unwrap();
        assert_eq!(sum_in_image(&home.path("img"), file), expected, "{file}");
    }
    let listed = tool(&home, "debugfs", &["-R", "ls -p /root", "img"]);
    assert!(!listed.contains("/gone/") && !listed.contains("/large/"), "{listed}");
}

fn sum_in_image(image: &Path, file: &str) -> String {
    let command = format!("debugfs -R 'cat {file}' {} 2>/dev/null | sha256sum", image.display());
    let output = Command::new("sh").args(["-c", &command]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}
