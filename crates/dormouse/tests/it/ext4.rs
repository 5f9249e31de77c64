//! `dormouse ext4`, `work-disk` and `clone` from outside, judged by e2fsck and debugfs.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::fixture::{Home, code, errors};

pub(crate) fn fsck(image: &Path) {
    let output = Command::new("e2fsck").arg("-fn").arg(image).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.lines().count() <= 6, "{said}");
}

fn debugfs(image: &Path, request: &str) -> String {
    let output = Command::new("debugfs").arg("-R").arg(request).arg(image).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn json(home: &Home, arguments: &[&str]) -> Value {
    let all = [&["--json"], arguments].concat();
    serde_json::from_str(&home.ok(&all)).unwrap()
}

/// A folder like a small root.
pub(crate) fn root(home: &Home) {
    for folder in ["tree/etc", "tree/root/.config", "tree/bin"] {
        fs::create_dir_all(home.path(folder)).unwrap();
    }
    home.file("tree/etc/hostname", b"box\n");
    home.file("tree/root/notes", b"remember\n");
    home.file("tree/root/.config/large", &vec![b'x'; 300_000]);
    home.file("tree/bin/tool", &vec![7; 1 << 20]);
    symlink("hostname", home.path("tree/etc/name")).unwrap();
}

#[test]
fn a_folder_becomes_an_image_that_can_be_read() {
    let home = Home::with_store();
    root(&home);
    home.file("agent", b"#!/bin/sh\n");
    home.file("inject.list", b"# what to add\r\nagent:/usr/bin/agent\r\n\r\n");
    home.file("exclude.list", b"/root/.config\n");
    let object = json(
        &home,
        &[
            "ext4",
            "build",
            "tree",
            "-o",
            "a.ext4",
            "--size",
            "64M",
            "--label",
            "box",
            "--owner",
            "70000:5",
            "--inject-from",
            "inject.list",
            "--exclude-from",
            "exclude.list",
        ],
    );
    assert_eq!(object["size_bytes"], 64 << 20);
    fsck(&home.path("a.ext4"));
    assert_eq!(home.ok(&["ext4", "cat", "a.ext4", "/etc/hostname"]), "box\n");
    let listed = json(&home, &["ext4", "ls", "a.ext4", "/root"]);
    let names: Vec<&str> =
        listed["entries"].as_array().unwrap().iter().map(|e| e["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["notes"]);
    assert_eq!(listed["entries"][0]["uid"], 70_000);
    let agent = json(&home, &["ext4", "ls", "a.ext4", "/usr/bin/agent"]);
    assert_eq!(agent["entries"][0]["uid"], 0);

    let again = home.run(&["ext4", "build", "tree", "-o", "a.ext4"]);
    assert_eq!(again.status.code(), Some(code::ALREADY_EXISTS));
    home.file("empty.list", b"# nothing\n");
    let empty =
        home.run(&["ext4", "build", "tree", "-o", "b.ext4", "--exclude-from", "empty.list"]);
    assert_eq!(empty.status.code(), Some(code::USAGE));
    assert!(errors(&empty).contains("empty.list"));
    let small = home.run(&["ext4", "build", "tree", "-o", "b.ext4", "--size", "1M"]);
    assert_eq!(small.status.code(), Some(code::REFUSED));
    assert!(!home.path("b.ext4").exists());
}

#[test]
fn a_commit_has_the_bytes_of_the_file() {
    let home = Home::with_store();
    root(&home);
    home.ok(&["ext4", "build", "tree", "-o", "a.ext4", "--size", "1G"]);
    assert_eq!(home.ok(&["ext4", "build", "tree", "--commit", "base", "--size", "1G"]), "base@1\n");
    home.ok(&["export", "base:root", "back.ext4"]);
    assert!(same(&home.path("a.ext4"), &home.path("back.ext4")));
    assert_eq!(home.ok(&["ext4", "cat", "base:root", "/root/notes"]), "remember\n");

    // From a stream as well, and what changed is all that is new.
    home.file("tree/root/notes", b"remember more\n");
    let pack = Command::new("tar")
        .arg("-C")
        .arg(home.path("tree"))
        .args(["--format=posix", "-zcf"])
        .arg(home.path("tree.tar.gz"))
        .arg(".")
        .status();
    assert!(pack.unwrap().success());
    let object = json(&home, &["ext4", "build", "tree.tar.gz", "--commit", "base", "--size", "1G"]);
    assert_eq!(object["snapshot"], "base@2");
    // What is read once and what is read by the commit counts as well.
    let content_bytes = 4 + 14 + 300_000 + (1 << 20);
    assert_eq!(object["copied_bytes"], content_bytes);
    home.ok(&["export", "base:root", "stream.ext4"]);
    fsck(&home.path("stream.ext4"));
    assert_eq!(home.ok(&["ext4", "cat", "base:root", "/root/notes"]), "remember more\n");
    let again = json(&home, &["ext4", "build", "tree", "--commit", "again", "--size", "1G"]);
    assert!(again["new_bytes"].as_u64().unwrap() < 400_000, "{again}");
}

pub(crate) fn same(a: &Path, b: &Path) -> bool {
    Command::new("cmp").arg(a).arg(b).status().unwrap().success()
}

/// Whatever is wrong with an archive, there is no image and nothing else of it, in a folder or a
/// store, and the message says where.
#[test]
fn every_hostile_archive_leaves_nothing() {
    let home = Home::with_store();
    let before = home.published();
    let mut header = [0u8; 512];
    let mut archive = |name: &str, flag: u8, link: &str| {
        header.fill(0);
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        for (at, text) in [(100, "0000644"), (124, "00000000000"), (136, "00000000001")] {
            header[at..at + text.len()].copy_from_slice(text.as_bytes());
        }
        header[156] = flag;
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        [&header[..], &[0; 1024]].concat()
    };
    let gzip_bomb = Command::new("sh")
        .args(["-c", "head -c 100000000 /dev/zero | gzip"])
        .output()
        .unwrap()
        .stdout;
    let gzip = Command::new("sh")
        .args(["-c", "head -c 300000 /dev/urandom | tar -c -f - -C / etc/hostname | gzip"])
        .output()
        .unwrap()
        .stdout;
    let trailing = [&gzip[..], b"trailing"].concat();
    for (bytes, expected, word) in [
        (gzip[..gzip.len() - 9].to_vec(), code::CORRUPT, "cut"),
        (trailing, code::CORRUPT, "follow"),
        (archive("a/../../b", b'0', ""), code::CORRUPT, "a/../../b"),
        (archive("/etc/passwd", b'0', ""), code::CORRUPT, "/etc/passwd"),
        (archive("h", b'1', "../../etc/passwd"), code::CORRUPT, "entry \"h\""),
        (archive("cut", b'0', "")[..300].to_vec(), code::CORRUPT, "bad.tar"),
        (archive("odd", b'?', ""), code::UNSUPPORTED, "odd"),
        (gzip_bomb, code::REFUSED, "bad.tar"),
    ] {
        home.file("bad.tar", &bytes);
        let limit = ["--limit-bytes", "10M"];
        let told = home
            .fails(expected, &[&["ext4", "build", "bad.tar", "-o", "x.ext4"][..], &limit].concat());
        assert!(told.contains("bad.tar") && told.contains(word), "{told}");
        assert!(!home.path("x.ext4").exists());
        home.fails(
            expected,
            &[&["ext4", "build", "bad.tar", "--commit", "x"][..], &limit].concat(),
        );
    }
    assert_eq!(home.published(), before);
    let left: Vec<_> = fs::read_dir(home.path(".")).unwrap().collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn a_hostile_stream_leaves_nothing() {
    let home = Home::new();
    home.file("bad.tar", &[b'x'; 2048]);
    let output = home.run(&["ext4", "build", "bad.tar", "-o", "a.ext4"]);
    assert_eq!(output.status.code(), Some(code::CORRUPT), "{}", errors(&output));
    assert!(errors(&output).contains("bad.tar"));
    let left: Vec<_> = fs::read_dir(home.path(".")).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn images_are_patched_in_place() {
    let home = Home::new();
    root(&home);
    home.file("new", b"new content");
    fs::create_dir(home.path("folder")).unwrap();
    home.file("folder/a b", b"with a space");
    symlink("a b", home.path("folder/link")).unwrap();
    home.ok(&["ext4", "build", "tree", "-o", "ours.ext4", "--slack", "8M"]);
    let made = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(home.path("tree"))
        .arg(home.path("theirs.ext4"))
        .arg("16M")
        .status();
    assert!(made.unwrap().success());
    for image in ["ours.ext4", "theirs.ext4"] {
        let put = ["ext4", "put", image, "new:/etc/hostname", "folder:/opt/deep/folder"];
        home.ok(&[&put[..], &["--mode", "4755", "--owner", "70000:3"]].concat());
        assert_eq!(home.ok(&["ext4", "cat", image, "/etc/hostname"]), "new content");
        assert_eq!(home.ok(&["ext4", "cat", image, "/opt/deep/folder/a b"]), "with a space");
        let told = debugfs(&home.path(image), "stat /etc/hostname");
        assert!(told.contains("Mode:  04755") && told.contains("70000"), "{told}");
        home.ok(&["ext4", "rm", image, "/root", "/bin/tool"]);
        fsck(&home.path(image));
        let gone = home.run(&["ext4", "ls", image, "/root"]);
        assert_eq!(gone.status.code(), Some(code::NOT_FOUND));
        let twice = home.run(&["ext4", "rm", image, "/root"]);
        assert_eq!(twice.status.code(), Some(code::NOT_FOUND));
    }
}

/// `/bin` is a link in most images; what is put there goes where it leads.
#[test]
fn links_on_the_way_are_followed_in_the_image() {
    let home = Home::with_store();
    for folder in ["tree/usr/bin", "tree/opt"] {
        fs::create_dir_all(home.path(folder)).unwrap();
    }
    symlink("usr/bin", home.path("tree/bin")).unwrap();
    symlink("../../../bin", home.path("tree/opt/out")).unwrap();
    symlink("circle", home.path("tree/circle")).unwrap();
    home.file("agent", b"agent");
    home.ok(&["ext4", "build", "tree", "-o", "a.ext4", "--inject", "agent:/bin/injected"]);
    home.ok(&["ext4", "put", "a.ext4", "agent:/bin/put", "agent:/opt/out/again"]);
    let listed = json(&home, &["ext4", "ls", "a.ext4", "/bin/"]);
    let names: Vec<&str> =
        listed["entries"].as_array().unwrap().iter().map(|e| e["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["again", "injected", "put"]);
    home.ok(&["ext4", "rm", "a.ext4", "/bin/put", "/bin"]);
    fsck(&home.path("a.ext4"));
    assert_eq!(home.ok(&["ext4", "cat", "a.ext4", "/usr/bin/again"]), "agent");
    home.fails(code::NOT_FOUND, &["ext4", "cat", "a.ext4", "/usr/bin/put"]);
    home.fails(code::USAGE, &["ext4", "put", "a.ext4", "agent:/circle/x"]);
    home.fails(code::USAGE, &["ext4", "build", "tree", "-o", "b", "--inject", "agent:/circle/x"]);

    home.ok(&["ext4", "build", "tree", "--commit", "base"]);
    let told = home.fails(code::REFUSED, &["ext4", "put", "base:root", "agent:/x"]);
    assert!(told.contains("dormouse export base:root"), "{told}");
    let told = home.fails(code::USAGE, &["ext4", "build", "tree"]);
    assert!(told.contains("--output") && told.contains("--commit"), "{told}");
}

#[test]
fn work_disks_have_the_home_folder() {
    let home = Home::new();
    root(&home);
    fs::create_dir(home.path("tree/lost+found")).unwrap();
    home.ok(&["ext4", "build", "tree", "-o", "root.ext4"]);
    home.ok(&["work-disk", "seed", "root.ext4"]);
    fsck(&home.path("root.work-seed.ext4"));
    home.ok(&[
        "work-disk",
        "make",
        "root.work-seed.ext4",
        "-o",
        "work.ext4",
        "--size",
        "64G",
        "--owner",
        "1000:1000",
    ]);
    let work = home.path("work.ext4");
    fsck(&work);
    assert_eq!(work.metadata().unwrap().len(), 64 << 30);
    assert!(work.metadata().unwrap().blocks() * 512 < 8 << 20);
    assert_eq!(home.ok(&["ext4", "cat", "work.ext4", "/notes"]), "remember\n");
    let listed = json(&home, &["ext4", "ls", "work.ext4", "/.config"]);
    assert_eq!(listed["entries"][0]["uid"], 1000);

    home.ok(&[
        "work-disk",
        "seed",
        "root.ext4",
        "--path",
        "/nowhere",
        "-o",
        "empty",
        "--sizing",
        "roomy",
    ]);
    fsck(&home.path("empty"));
    assert_eq!(home.path("empty").metadata().unwrap().len(), 512 << 20);
    let outside = home.run(&["work-disk", "seed", "root.ext4"]);
    assert_eq!(outside.status.code(), Some(code::ALREADY_EXISTS));
}

#[test]
fn a_clone_says_how_and_refuses_what_is_there() {
    let home = Home::new();
    let source = home.file("a", &[5; 100_000]);
    fs::File::options().write(true).open(&source).unwrap().set_len(1 << 30).unwrap();
    let told = json(&home, &["clone", "a", "b"]);
    assert!(["reflink", "copy_file_range", "copy"].contains(&told["way"].as_str().unwrap()));
    assert!(same(&home.path("a"), &home.path("b")));
    assert!(home.path("b").metadata().unwrap().blocks() * 512 < 1 << 20);
    let again = home.run(&["clone", "a", "b"]);
    assert_eq!(again.status.code(), Some(code::ALREADY_EXISTS));
    let missing = home.run(&["clone", "none", "c"]);
    assert_eq!(missing.status.code(), Some(code::NOT_FOUND));
    assert!(!home.path("c").exists());
}

/// What a guest deleted and never trimmed costs nothing, but only where nobody can miss it.
#[test]
fn free_blocks_are_dropped_unless_memory_may_own_them() {
    let home = Home::with_store();
    root(&home);
    home.ok(&["ext4", "build", "tree", "-o", "a.ext4", "--size", "256M"]);
    let free = json(&home, &["ext4", "free", "a.ext4", "--ranges"]);
    let free_bytes = free["free_bytes"].as_u64().unwrap();
    assert!(free_bytes > 200 << 20, "{free}");
    // What deleted files leave behind.
    let file = fs::File::options().write(true).open(home.path("a.ext4")).unwrap();
    let last = free["ranges"].as_array().unwrap().last().unwrap();
    let (begin, end) = (last[0].as_u64().unwrap(), last[1].as_u64().unwrap());
    let junk: Vec<u8> =
        (0..16u32 << 20).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    assert!(end - begin > junk.len() as u64);
    file.write_all_at(&junk, begin).unwrap();

    let kept = json(&home, &["commit", "kept", "--disk", "a.ext4"]);
    let dropped = json(&home, &["commit", "dropped", "--disk", "a.ext4", "--drop-free-blocks"]);
    let bytes = |object: &Value| object["figures"]["nonzero_bytes"].as_u64().unwrap();
    assert!(bytes(&kept) >= bytes(&dropped) + (16 << 20), "{kept} {dropped}");
    home.ok(&["export", "dropped:root", "b.ext4"]);
    fsck(&home.path("b.ext4"));
    assert_eq!(home.ok(&["ext4", "cat", "dropped:root", "/root/notes"]), "remember\n");

    home.file("memory", &[1; 8192]);
    let with_memory = ["commit", "vm", "--memory", "memory", "--disk", "a.ext4"];
    let refused = home.run(&[&with_memory[..], &["--drop-free-blocks"]].concat());
    assert_eq!(refused.status.code(), Some(code::REFUSED), "{}", errors(&refused));
    home.ok(&[&with_memory[..], &["--drop-free-blocks", "--fs-frozen"]].concat());
    // Inherited memory is memory, too.
    let refused = home.run(&["commit", "vm", "--disk", "a.ext4", "--drop-free-blocks"]);
    assert_eq!(refused.status.code(), Some(code::REFUSED));
    home.ok(&["commit", "vm", "--disk", "a.ext4", "--drop-free-blocks", "--drop", "memory"]);
}

#[test]
fn a_stream_is_built_from_standard_input() {
    let home = Home::new();
    root(&home);
    let mut pack = Command::new("tar");
    pack.arg("-C").arg(home.path("tree")).args(["-c", "."]).stdout(Stdio::piped());
    let mut child = pack.spawn().unwrap();
    let stdin = child.stdout.take().unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .args(["ext4", "build", "-", "-o"])
        .arg(home.path("a.ext4"))
        .env("SOURCE_DATE_EPOCH", "1000000000")
        .stdin(stdin)
        .status()
        .unwrap();
    assert!(status.success() && child.wait().unwrap().success());
    fsck(&home.path("a.ext4"));
    let listed = json(&home, &["ext4", "ls", "a.ext4", "/root/notes"]);
    assert_eq!(listed["entries"][0]["mtime"], "2001-09-09T01:46:40Z");
}

/// Nobody in particular makes a root image with owners, devices and capabilities in it.
#[test]
fn no_rights_are_needed() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65_534;
    let home = Home::new();
    root(&home);
    let made = Command::new("mknod").arg(home.path("tree/null")).args(["c", "1", "3"]).status();
    assert!(made.unwrap().success());
    std::os::unix::fs::chown(home.path("tree/etc/hostname"), Some(70_000), Some(5)).unwrap();
    let mut pack = Command::new("tar");
    pack.arg("-C").arg(home.path("tree")).arg("-cf").arg(home.path("tree.tar")).arg(".");
    assert!(pack.status().unwrap().success());
    fs::copy(env!("CARGO_BIN_EXE_dormouse"), home.path("dormouse")).unwrap();
    fs::set_permissions(home.path("dormouse"), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(home.path("."), Some(NOBODY), Some(NOBODY)).unwrap();
    let mut build = Command::new(home.path("dormouse"));
    build.current_dir(home.path(".")).uid(NOBODY).gid(NOBODY);
    build.args(["ext4", "build", "tree.tar", "-o", "a.ext4", "--size", "64M"]);
    let output = build.output().unwrap();
    assert!(output.status.success(), "{}", errors(&output));
    fsck(&home.path("a.ext4"));
    let listed = json(&home, &["ext4", "ls", "a.ext4", "/null"]);
    assert_eq!(listed["entries"][0]["kind"], "c");
    let listed = json(&home, &["ext4", "ls", "a.ext4", "/etc/hostname"]);
    assert_eq!(listed["entries"][0]["uid"], 70_000);

    // Owners of a folder by a map and by a manifest.
    home.file("manifest", b"./etc/hostname uid=7 gid=8 mode=4711\n");
    let maps = ["--uid-map", "0:100:1", "--uid-map", "70000:200:1", "--gid-map", "0:0:10"];
    let base = ["ext4", "build", "tree", "-o", "b.ext4"];
    home.ok(&[&base[..], &maps].concat());
    let listed = json(&home, &["ext4", "ls", "b.ext4", "/etc/hostname"]);
    assert_eq!(
        (&listed["entries"][0]["uid"], &listed["entries"][0]["gid"]),
        (&200.into(), &5.into())
    );
    let base = ["ext4", "build", "tree", "-o", "c.ext4", "--mtree", "manifest"];
    home.ok(&base);
    let listed = json(&home, &["ext4", "ls", "c.ext4", "/etc/hostname"]);
    assert_eq!(
        (&listed["entries"][0]["uid"], &listed["entries"][0]["mode"]),
        (&7.into(), &0o4711.into())
    );
    let base = ["ext4", "build", "tree", "-o", "d.ext4", "--uid-map", "0:0:1"];
    let uncovered = home.run(&base);
    assert_eq!(uncovered.status.code(), Some(code::USAGE));
    assert!(errors(&uncovered).contains("/etc/hostname"), "{}", errors(&uncovered));
}

/// What is an image in a form of its own is taken as files if nothing says so, with a warning.
#[test]
fn a_layout_taken_as_files_is_warned_of() {
    let home = Home::new();
    root(&home);
    fs::create_dir_all(home.path("layout/blobs")).unwrap();
    home.file("layout/oci-layout", b"{}");
    home.file("layout/index.json", b"{}");
    fs::create_dir(home.path("saved")).unwrap();
    home.file("saved/manifest.json", b"[]");
    home.file("saved/0123.json", b"{}");
    for name in ["layout", "saved", "tree"] {
        let tar = Command::new("tar")
            .arg("-C")
            .arg(home.path(name))
            .arg("-cf")
            .arg(home.path(&format!("{name}.tar")))
            .arg(".")
            .status();
        assert!(tar.unwrap().success());
    }
    for (source, told) in [
        ("layout", "oci:layout"),
        ("layout.tar", "oci-archive:layout.tar"),
        ("saved.tar", "docker-archive:saved.tar"),
        ("tree", ""),
        ("tree.tar", ""),
    ] {
        let output = home.run(&["ext4", "build", source, "-o", "a.ext4"]);
        assert_eq!(output.status.code(), Some(code::OK));
        let said = errors(&output);
        assert_eq!(said.contains("warning"), !told.is_empty(), "{source}: {said}");
        assert!(said.contains(told), "{source}: {said}");
        fs::remove_file(home.path("a.ext4")).unwrap();
    }
}

#[test]
fn what_says_nothing_is_refused() {
    let home = Home::new();
    root(&home);
    home.file("empty", b"# nothing\n");
    let build = ["ext4", "build", "tree", "-o", "a.ext4"];
    let told = home.fails(code::USAGE, &[&build[..], &["--mtree", "empty"]].concat());
    assert!(told.contains("empty"), "{told}");
    home.ok(&build);
    let told = home.fails(code::USAGE, &["work-disk", "seed", "a.ext4", "--path", ""]);
    assert!(told.contains("--path"), "{told}");
    home.fails(code::CORRUPT, &["ext4", "ls", "tree/bin/tool"]);
}
