//! `ext4 put` and `rm`: what they keep of a file, and what they do when they cannot.

use std::ffi::OsStr;
use std::fs::{self, File, FileTimes, hard_link};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::{Duration, SystemTime};

use rustix::fs::{XattrFlags, setxattr};
use serde_json::Value;

use crate::ext4::{fsck, root};
use crate::fixture::{Home, code, noise};

/// A capability as the kernel has it: `cap_net_raw`, permitted and effective.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn debugfs(home: &Home, image: &str, request: &str) -> String {
    let image = home.path(image);
    let output = Command::new("debugfs").arg("-R").arg(request).arg(image).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn mke2fs(home: &Home, image: &str, options: &[&str]) {
    let made = Command::new("mke2fs")
        .args(["-q", "-F"])
        .args(options)
        .arg("-d")
        .arg(home.path("tree"))
        .arg(home.path(image))
        .arg("16M")
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

fn entry(home: &Home, image: &str, path: &str) -> Value {
    home.json(&["ext4", "ls", image, path])["entries"][0].clone()
}

/// `put` wrote half of a file into an image that ran full, and said nothing of it.
#[test]
fn what_has_no_room_is_refused_and_changes_nothing() {
    let home = Home::new();
    root(&home);
    home.file("large", &noise(1, 5000));
    fs::create_dir(home.path("many")).unwrap();
    for number in 0..3000 {
        home.file(&format!("many/{number}"), b"");
    }
    for options in [&["-t", "ext4", "-N", "1000"][..], &["-t", "ext2", "-b", "1024", "-N", "1000"]]
    {
        mke2fs(&home, "a.ext4", options);
        let before = fs::read(home.path("a.ext4")).unwrap();
        let told = home.fails(code::REFUSED, &["ext4", "put", "a.ext4", "large:/new/large"]);
        assert!(told.contains("free") && told.contains("nothing was changed"), "{told}");
        let told = home.fails(code::REFUSED, &["ext4", "put", "a.ext4", "many:/many"]);
        assert!(told.contains("3001"), "{told}");
        assert!(fs::read(home.path("a.ext4")).unwrap() == before);
    }
    // What makes room for itself has it.
    mke2fs(&home, "a.ext4", &["-t", "ext4"]);
    home.file("large", &noise(1, 2000));
    home.ok(&["ext4", "put", "a.ext4", "large:/large"]);
    home.file("large", &noise(2, 2100));
    home.ok(&["ext4", "put", "a.ext4", "large:/large"]);
    home.fails(code::REFUSED, &["ext4", "put", "a.ext4", "large:/other"]);
    fsck(&home.path("a.ext4"));
}

/// The check is an estimate on the safe side: what passes it fits, to the last block.
#[test]
fn what_passes_the_check_fits() {
    let home = Home::new();
    root(&home);
    mke2fs(&home, "full.ext4", &["-t", "ext4", "-b", "1024"]);
    let mut put = 0;
    for number in 0..40 {
        home.file("piece", &noise(number, 120));
        let to = format!("piece:/d/{number}");
        let output = home.run(&["ext4", "put", "full.ext4", &to]);
        match output.status.code() {
            Some(0) => put += 1,
            other => assert_eq!(other, Some(code::REFUSED), "{output:?}"),
        }
    }
    assert!((10..40).contains(&put), "{put}");
    fsck(&home.path("full.ext4"));
}

/// debugfs fails for reasons that nobody sees before, too: then nothing of it stays.
#[test]
fn a_failed_run_is_taken_back() {
    let home = Home::new();
    root(&home);
    mke2fs(&home, "a.ext4", &["-t", "ext4"]);
    home.file("first", b"first");
    home.file("second", b"second");
    // A debugfs that cannot do one of the commands.
    let tools = home.path("tools");
    fs::create_dir(&tools).unwrap();
    let real = Command::new("sh").args(["-c", "command -v debugfs"]).output().unwrap().stdout;
    let real = String::from_utf8(real).unwrap();
    let script = format!(
        "#!/bin/sh\nsed 's|^write .*second.*|write /nowhere /x|' | {} \"$@\"\n",
        real.trim()
    );
    fs::write(tools.join("debugfs"), script).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(tools.join("debugfs"), mode).unwrap();
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
    let put = |files: &[&str]| {
        let output = home
            .command(&[&["ext4", "put", "a.ext4"], files].concat())
            .env("PATH", &path)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(code::IO), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let told = put(&["first:/new/first", "second:/new/second"]);
    assert!(told.contains("nothing was put") && told.contains("nowhere"), "{told}");
    home.fails(code::NOT_FOUND, &["ext4", "ls", "a.ext4", "/new"]);
    fsck(&home.path("a.ext4"));
    let told = put(&["first:/etc/hostname", "second:/etc/second"]);
    assert!(told.contains("was changed") && told.contains("may be gone"), "{told}");
    home.fails(code::NOT_FOUND, &["ext4", "ls", "a.ext4", "/etc/second"]);
    fsck(&home.path("a.ext4"));
}

/// `put` lost extended attributes, times and hard links, and `--inject` attributes; a program that had
/// its rights from a capability had none in the image.
#[test]
fn attributes_times_and_hard_links_are_kept() {
    let home = Home::new();
    root(&home);
    fs::create_dir_all(home.path("new/below")).unwrap();
    let tool = home.file("new/tool", b"#!/bin/sh\n");
    setxattr(&tool, "security.capability", &CAPABILITY, XattrFlags::empty()).unwrap();
    setxattr(&tool, "trusted.note", b"a \"quoted\"\0\n\\value\xff", XattrFlags::empty()).unwrap();
    setxattr(home.path("new/below"), "trusted.folder", b"", XattrFlags::empty()).unwrap();
    for number in 0..300 {
        let name = format!("new/below/a-name-that-takes-some-room-in-its-folder-{number}");
        hard_link(&tool, home.path(&name)).unwrap();
    }
    let when = SystemTime::UNIX_EPOCH + Duration::new(5_000_000_000, 123_456_789);
    let old = SystemTime::UNIX_EPOCH - Duration::from_millis(1500);
    for (path, when) in [("new/tool", when), ("new/below", old)] {
        let file = File::open(home.path(path)).unwrap();
        file.set_times(FileTimes::new().set_modified(when)).unwrap();
    }
    mke2fs(&home, "theirs.ext4", &["-t", "ext4"]);
    mke2fs(&home, "old.ext4", &["-t", "ext2", "-b", "1024"]);
    home.ok(&["ext4", "build", "tree", "-o", "ours.ext4", "--slack", "8M"]);
    for image in ["theirs.ext4", "ours.ext4", "old.ext4"] {
        home.ok(&["ext4", "put", image, "new:/opt/new"]);
        fsck(&home.path(image));
        let found = entry(&home, image, "/opt/new/tool");
        assert_eq!(found["links"], 301, "{image}");
        let told = debugfs(&home, image, "stat /opt/new/tool");
        assert!(told.contains("security.capability (20) = 01 00 00 02 00 20"), "{told}");
        assert!(told.contains("00 0a 5c 76 61 6c 75 65 ff"), "{told}");
        assert_eq!(found["mtime"], "2128-06-11T08:53:20.123456789Z", "{image}");
        let told = debugfs(&home, image, "stat /opt/new/below");
        assert!(told.contains("trusted.folder"), "{told}");
        let listed = home.json(&["ext4", "ls", image, "/opt/new"]);
        let below = listed["entries"].as_array().unwrap();
        let below = below.iter().find(|entry| entry["name"] == "below").unwrap();
        assert_eq!(below["mtime"], "1969-12-31T23:59:58.5Z");
    }
    home.ok(&[
        "ext4",
        "build",
        "tree",
        "-o",
        "a.ext4",
        "--inject",
        "new/tool:/bin/tool",
        "--inject",
        "new:/opt/new",
    ]);
    for path in ["/bin/tool", "/opt/new/tool"] {
        let told = debugfs(&home, "a.ext4", &format!("stat {path}"));
        assert!(told.contains("security.capability (20) = 01 00 00 02 00 20"), "{told}");
    }
    fsck(&home.path("a.ext4"));

    let large = vec![b'x'; 3000];
    setxattr(&tool, "trusted.large", &large, XattrFlags::empty()).unwrap();
    let before = fs::read(home.path("theirs.ext4")).unwrap();
    let told = home.fails(code::UNSUPPORTED, &["ext4", "put", "theirs.ext4", "new/tool:/tool"]);
    assert!(told.contains("trusted.large"), "{told}");
    assert!(fs::read(home.path("theirs.ext4")).unwrap() == before);
}

/// What is injected belongs to root, be it a file or a folder.
#[test]
fn an_injected_folder_is_roots() {
    let home = Home::new();
    root(&home);
    fs::create_dir(home.path("new")).unwrap();
    home.file("new/file", b"x");
    for path in ["new", "new/file"] {
        std::os::unix::fs::chown(home.path(path), Some(1000), Some(1000)).unwrap();
    }
    home.ok(&["ext4", "build", "tree", "-o", "a.ext4", "--inject", "new:/opt/new"]);
    assert_eq!(entry(&home, "a.ext4", "/opt/new/file")["uid"], 0);
    let told = debugfs(&home, "a.ext4", "stat /opt/new");
    assert!(told.contains("User:     0"), "{told}");
}

/// An injected folder was refused wherever it had an entry that the tree had, too.
#[test]
fn an_injected_folder_is_merged_with_what_is_there() {
    let home = Home::new();
    for folder in ["tree/etc/app/kept", "tree/etc/app/deep", "new/app/deep", "bad/app/kept"] {
        fs::create_dir_all(home.path(folder)).unwrap();
    }
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    fs::set_permissions(home.path("tree/etc/app/deep"), mode).unwrap();
    home.file("tree/etc/app/kept/file", b"kept");
    home.file("tree/etc/app/deep/both", b"old");
    home.file("tree/etc/app/deep/old", b"old");
    symlink("kept/file", home.path("tree/etc/app/link")).unwrap();
    home.file("new/app/deep/both", b"new");
    home.file("new/app/deep/new", b"new");
    home.file("new/app/link", b"no link any more");
    home.ok(&["ext4", "build", "tree", "-o", "a.ext4", "--inject", "new:/etc"]);
    fsck(&home.path("a.ext4"));
    for (path, content) in [
        ("kept/file", "kept"),
        ("deep/both", "new"),
        ("deep/old", "old"),
        ("deep/new", "new"),
        ("link", "no link any more"),
    ] {
        let path = format!("/etc/app/{path}");
        assert_eq!(home.ok(&["ext4", "cat", "a.ext4", &path]), content, "{path}");
    }
    let told = debugfs(&home, "a.ext4", "stat /etc/app/deep");
    assert!(told.contains("Mode:  0711"), "as it was: {told}");
    home.file("bad/app/deep", b"a folder in the tree");
    let bad = ["ext4", "build", "tree", "-o", "b.ext4", "--inject", "bad:/etc"];
    let told = home.fails(code::REFUSED, &bad);
    assert!(told.contains("etc/app/deep is a folder in the image"), "{told}");
}

/// An injected folder took the place of a link that its target, or a folder in it, met: of `/sbin` of every
/// Debian with one `/usr`.
#[test]
fn an_injected_folder_goes_where_links_lead() {
    let home = Home::new();
    for folder in
        ["tree/usr/sbin", "one", "all/sbin", "all/run/app", "twice/sbin", "twice/usr/sbin"]
    {
        fs::create_dir_all(home.path(folder)).unwrap();
    }
    home.file("tree/usr/sbin/init", b"init");
    home.file("tree/file", b"a file");
    for (target, link) in
        [("usr/sbin", "sbin"), ("/var/run", "run"), ("a", "b"), ("b", "a"), ("file", "to-file")]
    {
        symlink(target, home.path(&format!("tree/{link}"))).unwrap();
    }
    home.file("one/agent", b"agent");
    home.file("all/sbin/tool", b"tool");
    home.file("all/run/app/pid", b"7");
    let two = ["--inject", "one:/sbin", "--inject", "all:/"];
    home.ok(&[&["ext4", "build", "tree", "-o", "a.ext4"][..], &two].concat());
    fsck(&home.path("a.ext4"));
    assert_eq!(entry(&home, "a.ext4", "/sbin")["target"], "usr/sbin");
    assert_eq!(entry(&home, "a.ext4", "/run")["target"], "/var/run");
    for (path, content) in [
        ("/usr/sbin/init", "init"),
        ("/usr/sbin/agent", "agent"),
        ("/usr/sbin/tool", "tool"),
        ("/var/run/app/pid", "7"),
    ] {
        assert_eq!(home.ok(&["ext4", "cat", "a.ext4", path]), content, "{path}");
    }
    let refused = |exit, inject: &str| {
        home.fails(exit, &["ext4", "build", "tree", "-o", "b.ext4", "--inject", inject])
    };
    assert!(refused(code::USAGE, "one:/a").contains("in a circle"));
    assert!(refused(code::REFUSED, "one:/to-file").contains("no folder in the image"));
    assert!(refused(code::REFUSED, "one/agent:/sbin").contains("/usr/sbin is a folder"));
    assert!(refused(code::USAGE, "one/agent:/").contains("names no file"));
    for folder in ["sbin", "usr/sbin"] {
        home.file(&format!("twice/{folder}/both"), folder.as_bytes());
    }
    assert!(refused(code::REFUSED, "twice:/").contains("/usr/sbin/both is there twice"));
}

/// The folder that a target names got the mode, the times and the attributes of the injected one.
#[test]
fn a_folder_that_is_there_stays_as_it_is() {
    let home = Home::new();
    fs::create_dir_all(home.path("tree/etc")).unwrap();
    fs::create_dir_all(home.path("new")).unwrap();
    home.file("new/file", b"new");
    let with_mode = |path: &str, mode| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(home.path(path), mode).unwrap();
    };
    with_mode("tree/etc", 0o755);
    with_mode("tree", 0o751);
    with_mode("new", 0o700);
    let xattr = |path: &str, value: &[u8]| {
        setxattr(home.path(path), "user.note", value, XattrFlags::empty()).unwrap();
    };
    xattr("tree/etc", b"there");
    xattr("new", b"injected");
    let past = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    File::open(home.path("tree/etc"))
        .unwrap()
        .set_times(FileTimes::new().set_modified(past))
        .unwrap();
    let inject = ["--inject", "new:/etc", "--inject", "new:/", "--inject", "new:/made"];
    let build = ["ext4", "build", "tree", "-o", "a.ext4", "--owner", "5:6"];
    home.ok(&[&build[..], &inject].concat());
    let listed = home.json(&["ext4", "ls", "a.ext4", "/"]);
    let all = listed["entries"].as_array().unwrap();
    let called = |name: &str| all.iter().find(|entry| entry["name"] == name).unwrap();
    let etc = called("etc");
    assert_eq!((&etc["mode"], &etc["uid"], &etc["gid"]), (&0o755.into(), &5.into(), &6.into()));
    assert_eq!(etc["mtime"], "2001-09-09T01:46:40Z");
    assert!(debugfs(&home, "a.ext4", "ea_get /etc user.note").contains("there"));
    let told = debugfs(&home, "a.ext4", "stat /");
    assert!(told.contains("Mode:  0751") && told.contains("User:     5"), "{told}");
    let made = called("made");
    assert_eq!((&made["mode"], &made["uid"]), (&0o700.into(), &0.into()));
    assert!(debugfs(&home, "a.ext4", "ea_get /made user.note").contains("injected"));
}

#[test]
fn targets_that_contradict_each_other_are_refused() {
    let home = Home::new();
    root(&home);
    home.file("x", b"x");
    home.file("y", b"y");
    mke2fs(&home, "a.ext4", &["-t", "ext4"]);
    let before = fs::read(home.path("a.ext4")).unwrap();
    let told = home.fails(code::USAGE, &["ext4", "put", "a.ext4", "x:/new", "y:/new"]);
    assert!(told.contains("/new"), "{told}");
    home.fails(code::REFUSED, &["ext4", "put", "a.ext4", "x:/new", "y:/new/y"]);
    home.fails(code::REFUSED, &["ext4", "put", "a.ext4", "x:/new/y", "y:/new"]);
    assert!(fs::read(home.path("a.ext4")).unwrap() == before);
    // A folder in the place of a file.
    fs::create_dir(home.path("folder")).unwrap();
    home.file("folder/x", b"x");
    home.ok(&["ext4", "put", "a.ext4", "folder:/etc/hostname"]);
    assert_eq!(home.ok(&["ext4", "cat", "a.ext4", "/etc/hostname/x"]), "x");
}

/// JSON had names as for a terminal, and what is no UTF-8 could be neither told apart nor named.
#[test]
fn names_of_any_bytes_are_told_and_taken() {
    let home = Home::new();
    root(&home);
    let odd = OsStr::from_bytes(b"odd\xff");
    fs::write(home.path("tree").join(odd), b"odd").unwrap();
    fs::write(home.path("tree").join("a\tb\u{1b}"), b"").unwrap();
    symlink(odd, home.path("tree/link")).unwrap();
    mke2fs(&home, "a.ext4", &["-t", "ext4"]);
    let listed = home.json(&["ext4", "ls", "a.ext4"]);
    let find = |name: &str| {
        let entries = listed["entries"].as_array().unwrap();
        entries
            .iter()
            .find(|entry| entry["name"] == name)
            .unwrap_or_else(|| panic!("{name}"))
            .clone()
    };
    assert_eq!(find("a\tb\u{1b}")["name_hex"], Value::Null);
    assert_eq!(find("odd\u{fffd}")["name_hex"], "6f6464ff");
    assert_eq!(find("link")["target_hex"], "6f6464ff");
    let plain = home.ok(&["ext4", "ls", "a.ext4"]);
    assert!(plain.contains("a\\tb\\u{1b}") && !plain.contains('\u{1b}'), "{plain}");
    let path = OsStr::from_bytes(b"/odd\xff");
    let run = |verb: &str| home.command(&["ext4", verb, "a.ext4"]).arg(path).output().unwrap();
    assert_eq!(run("cat").stdout, b"odd");
    assert!(run("ls").status.success());
    let removed = run("rm");
    assert!(removed.status.success(), "{removed:?}");
    assert_eq!(run("ls").status.code(), Some(code::NOT_FOUND));
    // A folder with such a name in it goes in, too.
    fs::create_dir(home.path("folder")).unwrap();
    fs::write(home.path("folder").join(odd), b"odd").unwrap();
    home.ok(&["ext4", "put", "a.ext4", "folder:/f"]);
    assert_eq!(home.json(&["ext4", "ls", "a.ext4", "/f"])["entries"][0]["name_hex"], "6f6464ff");
    fsck(&home.path("a.ext4"));
}
