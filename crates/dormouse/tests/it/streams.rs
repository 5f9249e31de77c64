//! Pipes and signals.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::fixture::{Home, code, errors, noise};

fn spawn(home: &Home, arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .args(arguments)
        .current_dir(home.path(""))
        .env_remove("DORMOUSE_STORE")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").arg(name).arg(child.id().to_string()).status().unwrap();
    assert!(status.success());
}

#[test]
fn standard_input_is_an_image() {
    let home = Home::with_store();
    home.file("state", b"s");
    // No multiple of a block.
    let mut memory = noise(1, 20);
    memory.extend([7; 100]);
    let arguments = ["commit", "vm", "--memory", "-", "--state", "state"];
    home.command(&arguments).write_stdin(memory.clone()).assert().success();
    assert_eq!(home.run(&["cat", "vm:memory"]).stdout, memory);
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let home = Home::with_store();
    home.file("disk", &noise(1, 1024));
    home.ok(&["commit", "vm", "--disk", "disk"]);
    let mut child = spawn(&home, &["cat", "vm:root"]);
    let mut stdout = child.stdout.take().unwrap();
    let mut start = [0; 10];
    stdout.read_exact(&mut start).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(code::OK), "{}", errors(&output));
    assert_eq!(errors(&output), "");
    assert_eq!(start, noise(1, 1)[..10]);
}

#[test]
fn a_full_disk_behind_standard_output_is_a_failure() {
    let home = Home::new();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
    let status = command.args(["completions", "bash"]).stdout(full).stderr(Stdio::null()).status();
    assert_eq!(status.unwrap().code(), Some(11), "{home:?}");
}

/// Stops a commit in the middle of its input: nothing of it may stay.
fn stopped_by(first: &str, second: Option<&str>) {
    let home = Home::with_store();
    home.file("disk", &noise(1, 16));
    home.ok(&["commit", "vm", "--disk", "disk"]);
    let before = home.published();
    let mut child = spawn(&home, &["commit", "vm", "--disk", "-"]);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&noise(2, 4096)).unwrap();
    // Time to come to the next read, which waits for us.
    std::thread::sleep(Duration::from_millis(300));
    signal(&child, first);
    if let Some(second) = second {
        std::thread::sleep(Duration::from_millis(200));
        signal(&child, second);
    }
    std::thread::sleep(Duration::from_millis(100));
    // A commit that waits for its input may look at the flag only when more comes, or its end.
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(code::CANCELLED), "{}", errors(&output));
    assert_eq!(home.snapshots(), ["vm@1"]);
    home.ok(&["gc", "-q"]);
    let packs = |files: &[(std::path::PathBuf, u64)]| -> Vec<(std::path::PathBuf, u64)> {
        let kept = |path: &std::path::Path| !path.starts_with(home.store().join("index"));
        files.iter().filter(|(path, _)| kept(path)).cloned().collect()
    };
    assert_eq!(packs(&home.published()), packs(&before));
    home.ok(&["verify", "--deep"]);
}

#[test]
fn a_signal_ends_a_commit_and_leaves_nothing() {
    stopped_by("-INT", None);
    stopped_by("-TERM", None);
}

#[test]
fn a_second_signal_ends_it_at_once() {
    stopped_by("-INT", Some("-INT"));
    stopped_by("-TERM", Some("-INT"));
}

/// Two commits over the same newest snapshot: with `auto` the later one would be taken over a
/// parent that it never saw, so it fails; who names the parent knows what it does.
#[test]
fn the_later_of_two_commits_at_once_is_a_conflict() {
    let home = Home::with_store();
    home.file("disk", &noise(1, 16));
    home.ok(&["commit", "vm", "--disk", "disk"]);
    for (parent, expected) in [("auto", code::CONFLICT), ("vm@1", code::OK)] {
        let mut slow = spawn(&home, &["commit", "vm", "--parent", parent, "--disk", "-"]);
        let mut stdin = slow.stdin.take().unwrap();
        // More than a pipe holds, so the commit has begun when this returns.
        stdin.write_all(&noise(2, 512)).unwrap();
        home.ok(&["commit", "vm", "--disk", "disk"]);
        drop(stdin);
        let output = slow.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(expected), "{}", errors(&output));
    }
    assert_eq!(home.snapshots(), ["vm@1", "vm@2", "vm@3", "vm@4"]);
    assert_eq!(home.json(&["ls"])["snapshots"][3]["parent"], "vm@1");
}

#[test]
fn quiet_says_nothing() {
    let home = Home::with_store();
    home.file("disk", &noise(1, 16));
    let output = home.run(&["-q", "commit", "vm", "--disk", "disk"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "vm@1\n");
    assert_eq!(errors(&output), "");
    let output = home.run(&["commit", "vm", "--disk", "disk"]);
    assert!(errors(&output).contains("raw"), "{}", errors(&output));
}
