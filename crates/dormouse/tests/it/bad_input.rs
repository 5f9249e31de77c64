//! Sources, stores and names that are not what they should be: a clear error, and the store as it
//! was before.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use crate::fixture::{Home, code, errors, noise};

#[test]
fn without_a_store_every_verb_says_how_to_make_one() {
    let home = Home::new();
    home.file("disk", &noise(1, 1));
    for arguments in [
        &["ls"][..],
        &["commit", "vm", "--disk", "disk"],
        &["show", "vm"],
        &["log", "vm"],
        &["diff", "a", "b"],
        &["du"],
        &["du", "vm"],
        &["map", "vm:memory"],
        &["export", "vm", "out"],
        &["export", "vm:memory", "out"],
        &["cat", "vm:memory"],
        &["verify"],
        &["rm", "vm"],
        &["prune", "vm", "--keep", "last=1"],
        &["gc"],
        &["compact"],
    ] {
        let errors = home.fails(code::NOT_FOUND, arguments);
        assert!(errors.contains("dormouse-store"), "{arguments:?}: {errors}");
        assert!(errors.contains("init"), "{arguments:?}: {errors}");
    }
    assert!(!home.store().exists());
    assert!(!home.path("out").exists());
}

#[test]
fn a_store_is_made_once_and_only_in_an_empty_folder() {
    let home = Home::with_store();
    home.fails(code::ALREADY_EXISTS, &["init"]);
    fs::create_dir(home.path("full")).unwrap();
    home.file("full/something", b"x");
    home.fails(code::REFUSED, &["init", "--store", "full"]);
    fs::create_dir(home.path("empty")).unwrap();
    home.ok(&["--store", "empty", "init"]);
    home.command(&["ls"]).env("DORMOUSE_STORE", "empty").assert().success();
}

#[test]
fn a_store_of_a_later_version_is_left_alone() {
    let home = Home::with_store();
    let path = home.store().join("dormouse.json");
    let text = fs::read_to_string(&path).unwrap();
    let later = text.replacen("\"version\":1", "\"version\":999", 1);
    let later = later.replacen("\"version\": 1", "\"version\": 999", 1);
    assert_ne!(text, later);
    fs::write(&path, later).unwrap();
    let errors = home.fails(code::UNSUPPORTED, &["ls"]);
    assert!(errors.contains("999"), "{errors}");
}

#[test]
fn a_lost_key_is_told() {
    let home = Home::with_store();
    home.file("disk", &noise(1, 4));
    home.ok(&["commit", "vm", "--disk", "disk"]);
    fs::remove_dir_all(home.store().join("keys")).unwrap();
    for arguments in [&["commit", "vm", "--disk", "disk"][..], &["cat", "vm:root"]] {
        let errors = home.fails(code::KEY, arguments);
        assert!(errors.contains("keys"), "{errors}");
        assert!(errors.contains("what to do: bring back"), "{errors}");
    }
    assert_eq!(home.snapshots(), ["vm@1"]);
}

/// The command as a user who is not root, whom no permission stops.
fn as_nobody(home: &Home, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
    command.current_dir(home.path("")).env_remove("DORMOUSE_STORE").args(arguments);
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        // Where the build lies nobody may be let in: the program is found by its descriptor.
        let program = fs::File::open(env!("CARGO_BIN_EXE_dormouse")).unwrap();
        let mut shell = Command::new("/bin/sh");
        shell.current_dir(home.path("")).env_remove("DORMOUSE_STORE");
        shell.args(["-c", "exec /proc/self/fd/0 \"$@\"", "sh"]).args(arguments);
        shell.stdin(program).uid(NOBODY).gid(NOBODY);
        command = shell;
    }
    command.output().unwrap()
}

const NOBODY: u32 = 65534;

/// Changes permissions of a folder and all in it, and gives it to nobody if we are root.
fn hand_over(path: &Path, folder_mode: u32, file_mode: u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let mode = if metadata.is_dir() { folder_mode } else { file_mode };
    if metadata.is_dir() {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        for entry in fs::read_dir(path).unwrap() {
            hand_over(&entry.unwrap().path(), folder_mode, file_mode);
        }
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn an_unreadable_source_is_told() {
    let home = Home::with_store();
    let secret = home.file("secret", &noise(1, 4));
    hand_over(&home.path(""), 0o755, 0o644);
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o0)).unwrap();
    let before = home.published();
    let output = as_nobody(&home, &["commit", "vm", "--disk", "secret"]);
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(code::IO), "{errors}");
    assert!(errors.contains("cannot open secret: Permission denied"), "{errors}");
    assert!(errors.contains("what to do: "), "{errors}");
    assert_eq!(home.published(), before);
}

#[test]
fn a_read_only_store_is_read_and_not_changed() {
    let home = Home::with_store();
    let content = noise(1, 4);
    home.file("disk", &content);
    home.ok(&["commit", "vm", "--disk", "disk"]);
    home.ok(&["commit", "vm", "--disk", "disk"]);
    hand_over(&home.store(), 0o555, 0o444);
    fs::set_permissions(home.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let before = home.published();
    for arguments in [
        &["commit", "vm", "--disk", "disk"][..],
        &["rm", "vm@1"],
        &["prune", "vm", "--keep", "last=1"],
        &["gc"],
        &["compact"],
        &["verify", "--repair"],
    ] {
        let output = as_nobody(&home, arguments);
        let errors = errors(&output);
        assert_eq!(output.status.code(), Some(code::IO), "{arguments:?}: {errors}");
        assert!(errors.contains("Permission denied"), "{arguments:?}: {errors}");
    }
    for arguments in [
        &["ls"][..],
        &["show", "vm"],
        &["log", "vm"],
        &["diff", "vm@1", "vm"],
        &["du"],
        &["map", "vm:root"],
        &["verify", "--deep"],
    ] {
        let output = as_nobody(&home, arguments);
        assert_eq!(output.status.code(), Some(code::OK), "{arguments:?}: {}", errors(&output));
    }
    assert_eq!(as_nobody(&home, &["cat", "vm:root"]).stdout, content);
    assert_eq!(home.published(), before);
    // Or the folder could not be removed.
    hand_over(&home.store(), 0o755, 0o644);
}

/// Lost, cut, flipped, another's, and bytes that never were a pack: an error, no file, no bytes
/// that nobody committed.
#[test]
fn a_damaged_pack_gives_an_error_and_no_file() {
    let home = Home::with_store();
    home.file("disk", &noise(1, 64));
    home.file("other", &noise(2, 64));
    home.ok(&["commit", "vm", "--disk", "disk"]);
    home.ok(&["commit", "other", "--disk", "other"]);
    let pack = |snapshot: &str| {
        let shown = home.json(&["show", snapshot]);
        let id = shown["packs"][0]["pack"].as_str().unwrap().to_owned();
        home.store().join(format!("packs/{}/{id}.pack", &id[..2]))
    };
    let (path, other) = (pack("vm"), fs::read(pack("other")).unwrap());
    let whole = fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 3] ^= 4;
    for (what, bytes) in [
        ("cut", whole[..whole.len() / 2].to_vec()),
        ("empty", Vec::new()),
        ("flipped", flipped),
        ("swapped", other),
        ("hostile", noise(9, 70)),
    ] {
        fs::write(&path, bytes).unwrap();
        let errors = home.fails(code::CORRUPT, &["export", "vm:root", "out"]);
        assert!(errors.contains("vm@1"), "{what}: {errors}");
        assert!(errors.contains("verify --deep"), "{what}: {errors}");
        home.fails(code::CORRUPT, &["export", "vm", "folder"]);
        home.fails(code::CORRUPT, &["cat", "vm:root"]);
        home.fails(code::CORRUPT, &["verify", "--deep"]);
        if !["flipped", "swapped"].contains(&what) {
            let output = home.run(&["du"]);
            assert_eq!(output.status.code(), Some(code::OK), "{what}: {}", self::errors(&output));
            assert!(self::errors(&output).contains("vm@1 cannot be read whole"), "{what}");
        }
        assert_eq!(home.run(&["cat", "other:root"]).stdout, noise(2, 64), "{what}");
        let left: Vec<_> = fs::read_dir(home.path("")).unwrap().collect();
        assert_eq!(left.len(), 3, "{what}: {left:?}");
    }
    fs::write(&path, whole).unwrap();
    assert_eq!(home.run(&["cat", "vm:root"]).stdout, noise(1, 64));
}

/// Firecracker and Cloud Hypervisor write dense zeros, QEMU holes: the same image to us.
#[test]
fn dense_and_sparse_files_are_one() {
    let home = Home::with_store();
    let mut image = noise(1, 8);
    image.resize(4 << 20, 0);
    image.extend(noise(2, 8));
    home.file("dense", &image);
    let sparse = fs::File::create(home.path("sparse")).unwrap();
    sparse.set_len(image.len() as u64).unwrap();
    sparse.write_all_at(&noise(1, 8), 0).unwrap();
    sparse.write_all_at(&noise(2, 8), 4 << 20).unwrap();
    let dense = home.json(&["commit", "vm", "--disk", "dense"]);
    let sparse = home.json(&["commit", "vm", "--disk", "sparse"]);
    assert_eq!(dense["figures"]["skipped_bytes"], 0);
    assert_eq!(sparse["figures"]["skipped_bytes"], (4 << 20) - 8 * 4096);
    assert_eq!(sparse["figures"]["changed_bytes"], 0);
    assert_eq!(home.run(&["cat", "vm@1:root"]).stdout, image);
    assert_eq!(home.run(&["cat", "vm@2:root"]).stdout, image);
}

#[test]
fn sources_that_cannot_be_read_leave_the_store_as_it_was() {
    let home = Home::with_store();
    home.file("disk", &noise(1, 4));
    home.ok(&["commit", "vm", "--disk", "disk"]);
    let before = home.published();
    fs::create_dir(home.path("folder")).unwrap();
    let errors = home.fails(code::NOT_FOUND, &["commit", "vm", "--disk", "missing"]);
    assert!(errors.contains("missing"), "{errors}");
    let errors = home.fails(code::USAGE, &["commit", "vm", "--disk", "folder"]);
    assert!(errors.contains("folder is a folder"), "{errors}");
    // Nobody can read there, not even root.
    let errors = home.fails(code::IO, &["commit", "vm", "--disk", "/proc/self/mem"]);
    assert!(errors.contains("cannot read /proc/self/mem"), "{errors}");
    assert_eq!(home.published(), before);
    assert_eq!(home.snapshots(), ["vm@1"]);
}

#[test]
fn what_is_not_there_is_named() {
    let home = Home::with_store();
    home.file("disk", &noise(1, 4));
    home.ok(&["commit", "vm", "--disk", "disk"]);
    for (arguments, told) in [
        (&["show", "vm@7"][..], "vm@7"),
        (&["show", "other"], "other"),
        (&["cat", "vm:memory"], "memory"),
        (&["cat", "vm:data"], "disk/data"),
        (&["export", "vm:state/x", "out"], "state/x"),
        (&["commit", "vm", "--parent", "vm@9", "--disk", "disk"], "vm@9"),
        (&["export", "vm:root", "no/such/folder/out"], "no/such/folder"),
    ] {
        let errors = home.fails(code::NOT_FOUND, arguments);
        assert!(errors.contains(told), "{arguments:?}: {errors}");
    }
}

#[test]
fn errors_are_objects_with_json() {
    let home = Home::with_store();
    let output = home.run(&["--json", "show", "vm"]);
    assert_eq!(output.status.code(), Some(code::NOT_FOUND));
    assert!(output.stdout.is_empty());
    let object: serde_json::Value = serde_json::from_str(&errors(&output)).unwrap();
    assert_eq!(object["version"], 1);
    assert_eq!(object["error"]["kind"], "not_found");
    assert!(object["error"]["causes"].is_array());
}

#[test]
fn a_damaged_manifest_is_told_and_hides_no_other() {
    let home = Home::with_store();
    home.file("disk", &noise(1, 4));
    home.ok(&["commit", "vm", "--disk", "disk"]);
    home.ok(&["commit", "vm", "--disk", "disk"]);
    let path = home.store().join("snapshots/vm/1.json");
    fs::write(&path, b"{").unwrap();
    let output = home.run(&["ls"]);
    assert!(output.status.success());
    assert!(errors(&output).contains("vm@1"), "{}", errors(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("vm@2"));
    home.fails(code::CORRUPT, &["show", "vm@1"]);
    assert_eq!(home.json(&["ls"])["damaged"][0]["snapshot"], "vm@1");
    home.ok(&["rm", "vm@1"]);
    assert_eq!(home.json(&["ls"])["damaged"], serde_json::json!([]));
}
