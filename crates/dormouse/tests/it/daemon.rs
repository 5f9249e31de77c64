//! The daemon with a real guest: through it VMs run, sleep, are forked and ended; it is killed and ended
//! while they run.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use dormouse_testkit::guest::Machine;
use serde_json::{Value, json};

use crate::daemon_fixture::{Running, live};
use crate::fixture::{code, errors};
use crate::mounted::path;
use crate::vm_fixture::Vms;

#[test]
fn a_guest_lives_through_the_daemon_and_outlives_it() {
    let vms = Vms::new(Machine::Q35);
    let home = &vms.home;
    let daemon = Running::start(home, &[]);
    let awake = home.json(&["run", "guest.json", "box"]);
    assert_eq!(awake["name"], "box");
    let jobs = daemon.get("/v1/jobs");
    assert_eq!(
        (&jobs["jobs"][0]["kind"], &jobs["jobs"][0]["state"]),
        (&json!("run"), &json!("done"))
    );
    let mut guest = vms.console("box");
    guest.wait_ready().unwrap();
    guest.check("echo kept > /root/note; sync").unwrap();
    let pid = awake["pid"].as_u64().unwrap();

    // The same with and without it.
    for command in [&["ps"][..], &["inspect", "box"], &["logs", "box"], &["ps", "--json"]] {
        let without = [&["--no-daemon"], command].concat();
        assert_eq!(home.ok(command), home.ok(&without), "{command:?}");
    }

    // A crash of the daemon is nothing to the guest, and the next one has it.
    daemon.kill();
    guest.wait_counter().unwrap();
    assert_eq!(vms.state("box").unwrap()["state"], "awake", "without a daemon");
    let daemon = Running::start(home, &["--log-format", "json"]);
    let listed = daemon.get("/v1/vms");
    assert_eq!(
        (&listed["vms"][0]["state"], &listed["vms"][0]["pid"]),
        (&json!("awake"), &json!(pid))
    );

    // Asleep with the guest going on: frozen first, durable by the job's events.
    let wanted = json!({ "as": "vm", "keep_running": true, "labels": { "why": "test" } });
    let frozen = daemon.post("/v1/vms/box/sleep?wait=frozen", &wanted);
    assert!(frozen["frozen_seconds"].as_f64().unwrap() > 0.0, "{frozen}");
    let jobs = daemon.get("/v1/jobs");
    let events = daemon.events(&jobs["jobs"][0]);
    let (name, last) = events.last().unwrap();
    assert_eq!((name.as_str(), &last["result"]["snapshot"]), ("done", &json!("vm@1")), "{last}");
    assert_eq!(last["frozen"]["frozen_seconds"], last["result"]["frozen_seconds"]);
    assert!(last["service_seconds"].as_f64() >= last["result"]["durable_seconds"].as_f64());
    let shown = daemon.get("/v1/snapshots/vm");
    assert_eq!(shown["manifest"]["labels"]["why"], "test");
    guest.wait_counter().unwrap();

    // The end of the daemon in order is nothing to it either.
    let (status, log) = daemon.terminate();
    assert!(status.success(), "{log}");
    assert!(log.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{log}");
    assert!(!home.store().join("live/.daemon/address").exists());
    assert!(!home.store().join("live/.daemon/api").exists());
    guest.wait_counter().unwrap();
    let daemon = Running::start(home, &[]);

    // The examples, as a user runs them.
    let python = root().join("examples/orchestrator.py");
    let said =
        said(Command::new("python3").arg(python).arg(&daemon.socket).args(["vm@1", "one", "two"]));
    for words in ["one: awake after", "two: awake after", "two: gone", "left: []; stored: one@1"] {
        assert!(said.contains(words), "{words}\n{said}");
    }
    let rust = said_by_rust(&daemon.socket, &["vm@1", "three", "four"]);
    assert!(rust.contains("three: \"three@1\" after"), "{rust}");
    assert!(rust.contains("left: 1"), "{rust}");

    // A wake by command, with what was stored; forks by command, in both kinds of output.
    let woken = home.json(&["wake", "vm", "--as", "again"]);
    assert_eq!(woken["over"], "vm@1");
    let mut again = vms.console("again");
    again.wait_counter().unwrap();
    assert_eq!(again.check("cat /root/note").unwrap(), "kept\n");
    assert_eq!(home.ok(&["fork", "vm", "five"]), "five\n");
    let slept = home.json(&["sleep", "five", "--as", "five"]);
    assert_eq!((&slept["snapshot"], &slept["goes_on"]), (&json!("five@1"), &json!(false)));
    let failed = home.fails(code::ALREADY_EXISTS, &["wake", "vm", "--as", "again"]);
    assert_eq!(
        failed,
        home.fails(code::ALREADY_EXISTS, &["--no-daemon", "wake", "vm", "--as", "again"])
    );

    // What was counted.
    let (_, metrics) = daemon.send("GET", "/metrics", None);
    for line in [
        r#"dormouse_vms{state="awake"} 2"#,
        r#"dormouse_sleep_frozen_seconds_count 3"#,
        r#"dormouse_wake_seconds_count{kind="wake",part="total"} 1"#,
        r#"dormouse_wake_seconds_count{kind="fork",part="vmm"} 5"#,
        r#"dormouse_jobs_total{kind="wake",outcome="failed"} 1"#,
    ] {
        assert!(metrics.lines().any(|there| there == line), "{line}\n{metrics}");
    }
    assert!(metrics.contains(r#"dormouse_disk_dirty_bytes{vm="box",disk="root"}"#), "{metrics}");

    for live in ["again", "box"] {
        home.ok(&["kill", live]);
    }
    assert_eq!(live(&home.store()), [""; 0]);
    home.ok(&["verify", "--deep"]);
}

/// A kill in the middle of a sleep, at several moments of it: the guest goes on as it was, and the next
/// daemon tells whether there is a snapshot.
#[test]
fn a_guest_that_falls_asleep_goes_on_when_the_daemon_is_killed() {
    let vms = Vms::new(Machine::Q35);
    let home = &vms.home;
    let mut daemon = Running::start(home, &[]);
    daemon.post(
        "/v1/vms?wait=durable",
        &json!({
            "name": "box",
            "guest": serde_json::from_slice::<Value>(&fs::read(home.path("guest.json")).unwrap())
                .unwrap(),
        }),
    );
    let mut guest = vms.console("box");
    guest.wait_ready().unwrap();
    guest.check("mount -t tmpfs tmp /mnt && head -c 9000000 /dev/urandom > /mnt/note").unwrap();
    let sum = guest.check("sha256sum < /mnt/note").unwrap();
    let mut stored = 0;
    for wait_ms in [0, 5, 20, 60, 120, 250, 500, 1500] {
        daemon.post("/v1/vms/box/sleep", &json!({ "as": "vm", "keep_running": true }));
        thread::sleep(Duration::from_millis(wait_ms));
        daemon.kill();
        daemon = Running::start(home, &[]);
        // The data plane has it mended, too, and may be at it.
        daemon
            .wait_for("the guest goes on", |daemon| daemon.get("/v1/vms/box")["state"] == "awake");
        guest.wait_counter().unwrap();
        assert_eq!(guest.check("sha256sum < /mnt/note").unwrap(), sum, "after {wait_ms} ms");
        assert!(!vms.folder("box").join("vmm/save").exists(), "nothing is left of it");
        let snapshots = home.snapshots().iter().filter(|name| name.starts_with("vm@")).count();
        assert!(snapshots == stored || snapshots == stored + 1, "{snapshots}, there were {stored}");
        // What it lies over now is what there is.
        if snapshots > stored {
            let state = daemon.get("/v1/vms/box");
            assert_eq!(state["over"], format!("vm@{snapshots}"), "after {wait_ms} ms");
        }
        stored = snapshots;
    }
    assert!(stored > 0, "not each of them was too early");
    // The last one is whole.
    daemon.post("/v1/vms/box/sleep?wait=durable", &json!({ "as": "vm" }));
    let woken = daemon.post("/v1/snapshots/vm/wake?wait=durable", &json!({ "name": "box" }));
    assert_eq!(woken["over"], format!("vm@{}", stored + 1));
    let mut guest = vms.console("box");
    guest.wait_counter().unwrap();
    assert_eq!(guest.check("sha256sum < /mnt/note").unwrap(), sum);
    home.ok(&["verify", "--deep"]);
}

/// The workspace's folder.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}

fn said(command: &mut Command) -> String {
    let output: Output = command.output().unwrap();
    assert!(output.status.success(), "{}", errors(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Builds the Rust example, unless that is done, and runs it.
fn said_by_rust(socket: &Path, args: &[&str]) -> String {
    let folder = Path::new(env!("CARGO_BIN_EXE_dormouse")).parent().unwrap();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root()).args(["build", "--quiet", "-p", "dormouse", "--example"]);
    cargo.arg("orchestrator");
    if folder.ends_with("release") {
        cargo.arg("--release");
    }
    said(&mut cargo);
    said(Command::new(folder.join("examples/orchestrator")).arg(path(socket)).args(args))
}

/// Two daemons of one store would count and limit apart.
#[test]
fn a_store_has_one_daemon_and_commands_do_without() {
    let home = crate::fixture::Home::with_store();
    let daemon = Running::start(&home, &[]);
    home.fails(code::BUSY, &["daemon"]);
    assert_eq!(home.ok(&["ps", "--json"]), home.ok(&["ps", "--json", "--no-daemon"]));
    assert_eq!(daemon.get("/v1")["store"], path(&fs::canonicalize(home.store()).unwrap()));
    // Another store's commands do not take it for theirs, though its address is there.
    let other = crate::fixture::Home::with_store();
    let folder = other.store().join("live/.daemon");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("address"), format!("{}\n", path(&daemon.socket))).unwrap();
    other.fails(code::NOT_FOUND, &["kill", "box"]);
    assert_eq!(daemon.get("/v1/jobs")["jobs"], json!([]));
    // It is gone, and its address is not.
    daemon.kill();
    assert!(home.store().join("live/.daemon/address").exists());
    assert_eq!(home.json(&["ps"])["vms"], json!([]));
    Running::start(&home, &[]);
}
