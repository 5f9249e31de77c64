//! Live disks that are half made, half removed, damaged, or made while others are served: what the
//! commands say of them, and how they are got rid of.

use std::fs;
use std::path::PathBuf;

use crate::fixture::{Home, code, noise, walk};
use crate::nbd_fixture::{Served, qemu_io};

const BUSY: i32 = 10;

/// A store with `vm@1`: disks `root` and `data` of sixteen blocks each.
fn home() -> Home {
    let home = Home::with_store();
    home.file("r", &noise(1, 16));
    home.file("d", &noise(2, 16));
    home.ok(&["commit", "vm", "--disk", "root=r", "--disk", "data=d"]);
    home
}

fn live(home: &Home, path: &str) -> PathBuf {
    home.store().join("live").join(path)
}

fn cut(path: &std::path::Path) {
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(4096).unwrap();
}

/// The same disk, served by another process after the first one was killed.
#[test]
fn a_disk_that_is_served_again_keeps_what_was_answered() {
    let home = Home::with_store();
    home.ok(&["disk", "create", "box", "--size", "16MiB"]);
    let served = Served::start(&home, &["box"]);
    let pid = served.child.id();
    let follow = || {
        drop(served);
        Served::start(&home, &["box"])
    };
    drop(crate::nbd_fixture::kill_before_any_flush(&home, pid, follow));
}

/// A size that no disk can have was refused when its folder and pin were there already; from then
/// on `disk ls` failed for the whole store, and `disk rm` did not find what to remove.
#[test]
fn a_disk_that_cannot_be_made_leaves_nothing() {
    let home = home();
    home.ok(&["disk", "create", "good", "--from", "vm:root"]);
    for size in ["100000T", "0"] {
        let create = ["disk", "create", "big", "--from", "vm:root", "--size", size];
        home.fails(code::USAGE, &create);
        home.fails(code::USAGE, &["disk", "create", "big", "--size", size]);
        assert!(!live(&home, "big").exists(), "{size}");
        home.fails(code::USAGE, &["disk", "create", "good/more", "--size", size]);
        assert_eq!(fs::read_dir(live(&home, "good/disk")).unwrap().count(), 1);
    }
    assert_eq!(home.ok(&["disk", "ls"]).lines().count(), 1);
    home.ok(&["disk", "commit", "good/root", "vm"]);
}

/// A process that was killed between a disk's folder and its description left what `disk ls` failed
/// at, for all other live VMs, too, and what no command removed.
#[test]
fn half_made_and_half_removed_disks_are_listed_and_removed() {
    let home = home();
    home.ok(&["disk", "create", "good", "--from", "vm:root"]);
    home.ok(&["disk", "create", "half", "--from", "vm:root"]);
    fs::remove_file(live(&home, "half/disk/root/overlay")).unwrap();
    home.ok(&["disk", "create", "bare", "--from", "vm:root"]);
    fs::remove_dir_all(live(&home, "bare/disk")).unwrap();
    let listed = home.json(&["disk", "ls"]);
    let rows = listed["disks"].as_array().unwrap();
    let told: Vec<_> =
        rows.iter().map(|row| (row["disk"].as_str().unwrap(), row["problem"].is_null())).collect();
    assert_eq!(told, [("bare", false), ("good/root", true), ("half/root", false)]);
    assert!(home.ok(&["disk", "ls"]).contains("half/root  DAMAGED: "));
    for name in ["half", "bare"] {
        home.ok(&["disk", "rm", name]);
        assert!(!live(&home, name).exists());
        home.fails(code::NOT_FOUND, &["disk", "rm", name]);
    }
    // What was being made or removed when a process was killed is no disk, and goes with the next.
    let hidden = ["new-data", "gone-data"].map(|name| live(&home, &format!("good/disk/.{name}")));
    hidden.iter().for_each(|path| fs::create_dir(path).unwrap());
    assert_eq!(home.ok(&["disk", "ls"]).lines().count(), 1);
    home.ok(&["disk", "create", "good/data", "--size", "1MiB"]);
    home.ok(&["disk", "rm", "good/data"]);
    hidden.iter().for_each(|path| assert!(!path.exists(), "{}", path.display()));
    home.ok(&["disk", "rm", "good"]);
    home.ok(&["rm", "vm"]);
    home.ok(&["gc"]);
    let mut packs = Vec::new();
    walk(&home.store().join("packs"), &mut packs);
    assert!(packs.is_empty(), "no pin holds anything: {packs:?}");
}

/// A live disk whose data file was cut short could neither be removed nor discarded: both opened it
/// first. The advice was to verify the store, which has nothing to do with it.
#[test]
fn a_damaged_disk_can_be_discarded_and_removed() {
    let home = home();
    home.ok(&["disk", "create", "box", "--from", "vm:root"]);
    let served = Served::start(&home, &["box"]);
    qemu_io(&home, "box", &["write -P 9 0 8k", "flush"]);
    drop(served);
    cut(&live(&home, "box/disk/root/1.data"));
    let said = home.fails(code::CORRUPT, &["disk", "status", "box"]);
    assert!(said.contains("disk discard"), "{said}");
    home.ok(&["disk", "discard", "box"]);
    assert_eq!(home.json(&["disk", "status", "box"])["disks"][0]["dirty_bytes"], 0);
    assert!(!live(&home, "box/disk/root/1.data").exists());
    assert_eq!(home.ok(&["disk", "commit", "box", "vm"]), "vm@2\n");
    assert!(home.run(&["cat", "vm@2:root"]).stdout == noise(1, 16));
    let data = fs::read_dir(live(&home, "box/disk/root")).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        path.extension().is_some_and(|end| end == "data").then_some(path)
    });
    cut(&data.unwrap());
    home.fails(code::CORRUPT, &["serve", "nbd", "box", "--socket", "s.nbd"]);
    home.ok(&["disk", "rm", "box"]);
    assert_eq!(home.ok(&["disk", "ls"]), "");
}

/// `disk discard` and `disk rm` of one disk let go of the lock first, so that a server that started
/// then lost its files. They need all disks for themselves, and touch nothing that is served.
#[test]
fn what_is_served_is_not_taken_away() {
    let home = home();
    home.ok(&["disk", "create", "box/root", "--from", "vm:root"]);
    home.ok(&["disk", "create", "box/data", "--from", "vm:data"]);
    let served = Served::start(&home, &["box/root"]);
    qemu_io(&home, "box/root", &["write -P 9 0 8k", "flush"]);
    for wanted in ["box", "box/root", "box/data"] {
        let told = home.fails(BUSY, &["disk", "discard", wanted]);
        assert!(told.contains("dormouse serve stop box"), "{told}");
    }
    let told = home.fails(BUSY, &["serve", "nbd", "box/root", "--socket", "t.nbd"]);
    assert!(told.contains("cannot open disk box/"), "{told}");
    home.fails(BUSY, &["disk", "rm", "box/data"]);
    assert_eq!(home.json(&["disk", "status", "box/root"])["disks"][0]["dirty_bytes"], 8192);
    drop(served);
    home.ok(&["disk", "discard", "box/data"]);
    home.fails(code::NOT_FOUND, &["disk", "discard", "box/none"]);
    assert_eq!(home.json(&["disk", "status", "box/root"])["disks"][0]["dirty_bytes"], 8192);
}

/// One disk of several could not be removed, and what only it lay over was held for ever.
#[test]
fn one_disk_of_several_is_removed_and_lets_go_of_its_base() {
    let home = home();
    home.ok(&["disk", "create", "box/root", "--from", "vm:root"]);
    home.ok(&["disk", "create", "box/data", "--from", "vm:data"]);
    let roots = || {
        let pin = fs::read_to_string(live(&home, "box/pin")).unwrap();
        pin.lines().filter(|line| line.starts_with("root ")).count()
    };
    assert_eq!(roots(), 2);
    home.fails(code::NOT_FOUND, &["disk", "rm", "box/none"]);
    home.ok(&["disk", "rm", "box/data"]);
    assert_eq!(roots(), 1);
    assert_eq!(home.json(&["disk", "ls"])["disks"][0]["disk"], "box/root");
    home.ok(&["disk", "rm", "box/root"]);
    assert!(!live(&home, "box").exists(), "the last disk takes the live VM with it");
}

/// A disk that was made while others of its VM were served was left out of commits of all its disks,
/// without a word, and `disk status` did not know it.
#[test]
fn a_disk_made_while_others_are_served_belongs_to_the_live_vm() {
    let home = home();
    home.ok(&["disk", "create", "box/root", "--from", "vm:root"]);
    let served = Served::start(&home, &["box/root"]);
    home.ok(&["disk", "create", "box/extra", "--from", "vm:data"]);
    let status = home.json(&["disk", "status", "box"]);
    let ids = status["disks"].as_array().unwrap().iter().map(|disk| disk["id"].as_str().unwrap());
    assert_eq!(ids.collect::<Vec<_>>(), ["extra", "root"]);
    assert!(status["server"]["pid"].is_u64());
    home.ok(&["disk", "create", "box/more", "--size", "1MiB"]);
    assert_eq!(home.ok(&["disk", "commit", "box", "pair"]), "pair@1\n");
    assert!(home.run(&["cat", "pair@1:extra"]).stdout == noise(2, 16));
    let show = home.json(&["show", "pair"]);
    assert_eq!(show["manifest"]["images"].as_array().unwrap().len(), 3);
    assert_eq!(home.ok(&["disk", "commit", "box/extra", "pair"]), "pair@2\n");
    drop(served);
    assert_eq!(home.json(&["disk", "status", "box/more"])["disks"][0]["base"], "pair@1:disk/more");
}

/// Two forks of one snapshot were committed under one name: the second commit, of one disk only,
/// took the other disk over from the first fork, without a word.
#[test]
fn forks_are_not_mixed() {
    let home = home();
    for fork in ["f", "g"] {
        home.ok(&["disk", "create", &format!("{fork}/root"), "--from", "vm:root"]);
        home.ok(&["disk", "create", &format!("{fork}/data"), "--from", "vm:data"]);
    }
    let served = Served::start(&home, &["f/root"]);
    qemu_io(&home, "f/root", &["write -P 9 0 8k", "flush"]);
    drop(served);
    assert_eq!(home.ok(&["disk", "commit", "f", "vm"]), "vm@2\n");
    let said = home.fails(code::REFUSED, &["disk", "commit", "g/data", "vm"]);
    assert!(said.contains("disk/root") && said.contains("--parent vm@1"), "{said}");
    assert_eq!(home.snapshots().len(), 2);
    // Named, it is the user's; all disks take nothing over; nor does a chain of one's own.
    assert_eq!(home.ok(&["disk", "commit", "g/data", "vm", "--parent", "vm@1"]), "vm@3\n");
    assert!(home.run(&["cat", "vm@3:root"]).stdout == noise(1, 16));
    assert_eq!(home.ok(&["disk", "commit", "g/root", "vm"]), "vm@4\n");
    assert_eq!(home.ok(&["disk", "commit", "g/data", "vm"]), "vm@5\n");
    home.fails(code::REFUSED, &["disk", "commit", "f/data", "vm"]);
    assert_eq!(home.ok(&["disk", "commit", "f", "vm"]), "vm@6\n");
    assert_eq!(home.ok(&["disk", "commit", "f/root", "vm"]), "vm@7\n");
}

/// There was no way to a live disk over a raw file. It is committed whole, and lies over the snapshot
/// from then on; a file that changed under it is refused.
#[test]
fn a_disk_over_a_raw_file() {
    let home = home();
    let mut expected = noise(5, 32);
    expected[8192..65536].fill(0);
    home.file("raw", &expected);
    home.ok(&["disk", "create", "box", "--from-file", "raw", "--size", "1MiB"]);
    home.fails(code::USAGE, &["disk", "create", "no", "--from-file", "raw", "--size", "4096"]);
    home.fails(code::NOT_FOUND, &["disk", "create", "no", "--from-file", "none"]);
    let served = Served::start(&home, &["box"]);
    qemu_io(&home, "box", &["write -P 9 4k 4k", "write -z -u 100k 4k", "flush"]);
    expected.resize(1 << 20, 0);
    expected[4096..8192].fill(9);
    expected[102_400..106_496].fill(0);
    assert_eq!(home.ok(&["disk", "commit", "box", "file"]), "file@1\n");
    assert!(home.run(&["cat", "file@1:root"]).stdout == expected);
    drop(served);
    home.file("raw", b"nothing looks at it any more");
    assert_eq!(home.json(&["disk", "ls"])["disks"][0]["base"], "file@1:disk/root");
    home.ok(&["disk", "status", "box"]);

    home.file("raw", &noise(6, 4));
    home.ok(&["disk", "create", "other", "--from-file", "raw"]);
    home.ok(&["disk", "status", "other"]);
    home.file("raw", &noise(7, 5));
    let said = home.fails(code::REFUSED, &["disk", "status", "other"]);
    assert!(said.contains("was changed"), "{said}");
    home.ok(&["disk", "rm", "other"]);
}
