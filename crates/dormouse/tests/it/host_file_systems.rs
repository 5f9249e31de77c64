//! Real file systems that have to be mounted: without holes, with coarse ones, full, read-only.
//! `make test-host` runs these; each mounts in a namespace of its own, which ends with it.
#![expect(clippy::print_stderr, reason = "what a host lacks is said loudly")]

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Output;

use assert_cmd::Command;

use crate::fixture::{Home, code, errors, noise};

/// Runs `script` after `mount` in `mnt`, with `$d` as the command; nothing if that cannot be done
/// here, said loudly.
fn mounted(home: &Home, mount: &str, script: &str) -> Option<Output> {
    if std::env::var_os("DORMOUSE_TEST_HOST").is_none() {
        eprintln!("SKIPPED: `make test-host` runs the tests that mount file systems");
        return None;
    }
    std::fs::create_dir_all(home.path("mnt")).unwrap();
    let mut unshare = Command::new("unshare");
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        unshare.args(["--user", "--map-root-user"]);
    }
    let script = format!("mount {mount} mnt || exit 99\n{script}");
    let output = unshare
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .env("d", env!("CARGO_BIN_EXE_dormouse"))
        .env_remove("DORMOUSE_STORE")
        .current_dir(home.path(""))
        .output()
        .unwrap();
    if output.status.code() == Some(99) || errors(&output).starts_with("unshare:") {
        eprintln!("SKIPPED: this host does not mount `{mount}`: {}", errors(&output));
        return None;
    }
    eprintln!("ran with `{mount}` mounted");
    Some(output)
}

/// A store with `vm@1`, and a diff of it in the file `diff`.
fn with_diff() -> Home {
    let home = Home::with_store();
    home.file("mem", &noise(1, 1024));
    home.file("state", b"s");
    home.ok(&["commit", "vm", "--memory", "mem", "--state", "state"]);
    let diff = File::create(home.path("diff")).unwrap();
    diff.set_len(1024 * 4096).unwrap();
    diff.write_all_at(&noise(2, 1), 8 * 4096).unwrap();
    diff.write_all_at(&[0; 4096], 20 * 4096).unwrap();
    home
}

/// Where holes are unknown or coarser than 4 KiB, unchanged pages look like zeros.
#[test]
fn host_a_diff_on_a_file_system_with_coarse_holes_is_refused() {
    let script = "cp --sparse=always diff mnt/diff && \
        exec $d commit vm --parent vm@1 --memory-diff mnt/diff --state state";
    for (mount, told) in [
        ("-t ramfs ramfs", "does not report holes"),
        ("-t tmpfs -o huge=always tmpfs", "in units of 2097152 bytes"),
    ] {
        let home = with_diff();
        let Some(output) = mounted(&home, mount, script) else { continue };
        assert_eq!(output.status.code(), Some(code::REFUSED), "{mount}: {}", errors(&output));
        assert!(errors(&output).contains(told), "{mount}: {}", errors(&output));
        assert_eq!(home.snapshots(), ["vm@1"]);
    }
    let home = with_diff();
    let Some(output) = mounted(&home, "-t tmpfs tmpfs", script) else { return };
    assert_eq!(output.status.code(), Some(code::OK), "{}", errors(&output));
    let mut expected = noise(1, 1024);
    expected[8 * 4096..9 * 4096].copy_from_slice(&noise(2, 1));
    let read = home.run(&["cat", "vm@2:memory"]).stdout;
    assert!(read[..20 * 4096] == expected[..20 * 4096]);
    assert!(read[21 * 4096..] == expected[21 * 4096..]);
}

#[test]
fn host_a_full_disk_is_told_and_leaves_the_store_as_it_was() {
    let home = Home::new();
    home.file("small", &noise(1, 16));
    home.file("large", &noise(2, 4096));
    let script = "set -e; $d -q init --store mnt/s; $d -q commit vm --disk small --store mnt/s\n\
        find mnt -type f | sort > before; set +e; $d commit vm --disk large --store mnt/s\n\
        code=$?; find mnt -type f | sort | cmp - before || exit 98\n\
        $d -q verify --deep --store mnt/s || exit 97\n\
        $d -q commit vm --disk small --store mnt/s || exit 96; exit $code";
    let Some(output) = mounted(&home, "-t tmpfs -o size=8m tmpfs", script) else { return };
    assert_eq!(output.status.code(), Some(code::IO), "{}", errors(&output));
    assert!(errors(&output).contains("No space left"), "{}", errors(&output));
    assert!(errors(&output).contains("what to do: make room"), "{}", errors(&output));
}

#[test]
fn host_a_store_on_a_read_only_file_system_is_read() {
    let home = Home::with_store();
    home.file("disk", &noise(1, 16));
    home.ok(&["commit", "vm", "--disk", "disk"]);
    let before = home.published();
    let script = "mount -o remount,bind,ro mnt || exit 99\n\
        $d cat vm:root --store mnt | cmp - disk || exit 98\n\
        for verb in ls du 'verify --deep' 'show vm'; do $d -q $verb --store mnt || exit 97; done\n\
        exec $d commit vm --disk disk --store mnt";
    let Some(output) = mounted(&home, "--bind dormouse-store", script) else { return };
    assert_eq!(output.status.code(), Some(code::IO), "{}", errors(&output));
    assert!(errors(&output).contains("Read-only file system"), "{}", errors(&output));
    assert_eq!(home.published(), before);
}
