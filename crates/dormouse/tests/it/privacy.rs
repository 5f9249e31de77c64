//! Who may read a store: its owner alone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::fixture::{Home, noise};

/// Runs commands as somebody who hides nothing would, from `umask` on.
fn without_umask(home: &Home, script: &str) {
    let dormouse = env!("CARGO_BIN_EXE_dormouse");
    let script = format!("set -e; umask 000; dormouse() {{ {dormouse} \"$@\"; }}; {script}");
    let shell = Command::new("sh").current_dir(home.path(".")).arg("-c").arg(&script).output();
    let shell = shell.unwrap();
    assert!(shell.status.success(), "{script}: {shell:?}");
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Counts the files and folders below a folder, all of which must be private.
fn all_private(folder: &Path) -> usize {
    let mut count = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let is_folder = path.is_dir();
        assert_eq!(mode(&path), if is_folder { 0o700 } else { 0o600 }, "{}", path.display());
        count += 1 + if is_folder { all_private(&path) } else { 0 };
    }
    count
}

/// Packs, manifests and index runs were there for every user of the host to read, and guests' memory has
/// their keys and passwords in it.
#[test]
fn a_store_is_its_owners_alone() {
    let home = Home::new();
    for seed in 1..4 {
        home.file(&format!("memory{seed}"), &noise(seed, 64));
    }
    without_umask(
        &home,
        "dormouse --store a/store init
         export DORMOUSE_STORE=a/store
         dormouse commit vm --memory memory1 --state s=memory2
         dormouse commit vm --memory memory2 --state s=memory3
         dormouse commit vm --memory memory3 --state s=memory1
         dormouse disk create box --size 1MiB
         dormouse rm vm@1
         dormouse gc
         dormouse compact
         dormouse verify",
    );
    assert_eq!(mode(&home.path("a")), 0o755, "no part of the store");
    assert_eq!(mode(&home.path("a/store")), 0o700);
    let count = all_private(&home.path("a/store"));
    assert!(count > 25, "{count} files and folders");
}

/// Whoever made the folder said who may look into it; what is in it is private all the same.
#[test]
fn a_folder_that_was_there_keeps_its_mode() {
    let home = Home::new();
    fs::create_dir(home.path("store")).unwrap();
    fs::set_permissions(home.path("store"), fs::Permissions::from_mode(0o750)).unwrap();
    without_umask(&home, "dormouse --store store init");
    assert_eq!(mode(&home.path("store")), 0o750);
    all_private(&home.path("store"));
}
