//! The daemon with VMs that doubles play: what it answers, counts and logs of them.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::daemon_fixture::Running;
use crate::fixture::{Home, code};
use crate::vm_fixture::Vms;

/// A VM that is asleep as `vm@1`.
fn asleep() -> Vms {
    let vms = Vms::of_asking_doubles("1.13.1");
    vms.home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    vms.home.ok(&["sleep", "box", "--as", "vm"]);
    vms
}

/// Durations were texts such as "84.85466ms", and causes the text "[]".
#[test]
fn a_log_in_objects_has_numbers() {
    let home = Home::with_store();
    let daemon = Running::start(&home, &["--log-format", "json"]);
    daemon.post("/v1/gc?wait=durable", &json!({}));
    daemon.send("DELETE", "/v1/vms/none?wait=durable", None);
    let guest = json!({ "launch": { "vmm": "qemu", "program": "/none", "args": ["-machine", "q35"],
        "memory_bytes": 4096 } });
    daemon.send("POST", "/v1/vms?wait=durable", Some(&json!({ "name": "box", "guest": guest })));
    let (_, log) = daemon.terminate();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let line = |message: &str, kind: &str| {
        let found = lines.iter().find(|line| line["message"] == message && line["kind"] == kind);
        found.unwrap_or_else(|| panic!("{message} {kind}: {log}"))
    };
    for job in [line("a job is done", "gc"), line("a job came to nothing", "kill")] {
        assert!(job["queue_seconds"].is_f64() && job["service_seconds"].is_f64(), "{job}");
        assert!(job.get("causes").is_none(), "{job}");
    }
    let failed = line("a job came to nothing", "run");
    assert!(failed["causes"].as_str().is_none_or(|causes| !causes.contains('[')), "{failed}");
    let answered = lines.iter().find(|line| line["message"] == "answered").unwrap();
    assert!(answered["took_seconds"].is_f64(), "{answered}");
}

/// `ps` waited for it as long as a job does.
#[test]
fn a_daemon_that_hangs_keeps_nobody_from_looking() {
    let home = Home::with_store();
    let daemon = Running::start(&home, &[]);
    daemon.signal(Signal::STOP);
    let begun = Instant::now();
    let said = home.fails(1, &["ps"]);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert!(said.contains("does not answer; `--no-daemon` does without"), "{said}");
    home.ok(&["ps", "--no-daemon"]);
    daemon.signal(Signal::CONT);
    home.ok(&["ps"]);
}

/// It was prepared, and then told that its own first VM was in its way.
#[test]
fn a_fork_of_a_name_twice_is_refused_before_anything_is_done() {
    let vms = asleep();
    let home = &vms.home;
    let said = home.fails(code::USAGE, &["fork", "vm", "one", "k", "k"]);
    assert_eq!(said, "error: the name k is given twice\n");
    let daemon = Running::start(home, &[]);
    let (status, error) =
        daemon.ask("POST", "/v1/snapshots/vm/fork", Some(&json!({ "names": ["k", "one", "k"] })));
    assert_eq!((status, &error["error"]["kind"]), (400, &json!("usage")), "{error}");
    assert_eq!(said, home.fails(code::USAGE, &["fork", "vm", "one", "k", "k"]));
    assert_eq!(daemon.get("/v1/jobs")["jobs"], json!([]));
    assert_eq!(daemon.get("/v1/vms")["vms"], json!([]));
}
