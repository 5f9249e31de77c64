//! The daemon with VMs that doubles play: what it answers, counts and logs of them.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::daemon_fixture::Running;
use crate::fixture::{Home, code, errors};
use crate::mounted::path;
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

/// Faults that the data plane answered itself were in no figure, nor was what sleeps found stored already.
#[test]
fn faults_frames_and_what_is_stored_already_are_counted() {
    let vms = asleep();
    let home = &vms.home;
    let daemon = Running::start(home, &[]);
    let forks = json!({ "names": ["one", "two"] });
    daemon.post("/v1/snapshots/vm/fork?wait=durable", &forks);
    for live in ["one", "two"] {
        vms.work(live);
    }
    daemon.post("/v1/vms/one/sleep?wait=durable", &json!({ "as": "one", "keep_running": true }));
    let status = home.json(&["disk", "status", "two"]);
    let faults = status["memory"]["faults"].as_u64().unwrap();
    // What has ended counts on.
    home.ok(&["kill", "two"]);
    let (_, page) = daemon.send("GET", "/metrics", None);
    let value = |name: &str| -> f64 {
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name}: {page}")).parse().unwrap()
    };
    let plane = |name: &str| value(&format!("dormouse_plane_{name}"));
    assert!(faults > 0 && plane("faults_total") > faults as f64, "{faults} of two alone\n{page}");
    assert!(plane("fault_service_seconds_total") > 0.0, "{page}");
    assert!(plane("fault_queue_seconds_total") > 0.0, "{page}");
    let installed = ["asked", "around", "prefetched"]
        .map(|why| plane(&format!("fault_installed_bytes_total{{why=\"{why}\"}}")));
    assert!(installed[0] > 0.0, "{page}");
    assert!(plane("fault_zero_bytes_total") <= installed.iter().sum(), "{page}");
    assert!(plane("cached_frames_total") > 0.0 && plane("decoded_frames_total") > 0.0, "{page}");
    let found = ["zero", "unchanged", "elsewhere", "self", "new"]
        .map(|found| value(&format!("dormouse_sleep_captured_bytes_total{{found=\"{found}\"}}")));
    let shown = home.json(&["show", "one@1"]);
    let figures = &shown["manifest"]["figures"];
    let raw = figures["raw_bytes"].as_f64().unwrap();
    assert_eq!(found.iter().sum::<f64>(), raw, "{figures}");
    assert!(found[1] > 0.0 && found[4] > 0.0, "{figures}");
}

/// The answer had `frozen_seconds` and no more: nobody could find what became of the snapshot.
#[test]
fn a_sleep_that_goes_on_behind_its_answer_is_found() {
    let vms = asleep();
    let home = &vms.home;
    home.ok(&["fork", "vm", "one", "two"]);
    let daemon = Running::start(home, &[]);
    let mut stream = daemon.connect();
    let body = json!({ "as": "one", "keep_running": true }).to_string();
    let head = "POST /v1/vms/one/sleep?wait=frozen HTTP/1.0\r\ncontent-type: application/json";
    write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let frozen: Value = serde_json::from_str(body).unwrap();
    let id = frozen["job"].as_str().unwrap_or_else(|| panic!("{answer}"));
    assert!(frozen["frozen_seconds"].is_f64(), "{answer}");
    assert!(head.contains(&format!("location: /v1/jobs/{id}\r\n")), "{answer}");
    let events = daemon.events(&json!({ "id": id }));
    assert_eq!(events.last().unwrap().1["result"]["snapshot"], "one@1", "{events:?}");
    // By command, too; without a daemon there is no job.
    let frozen = home.json(&["sleep", "two", "--as", "two", "--keep-running", "--wait", "frozen"]);
    let events = daemon.events(&json!({ "id": frozen["job"] }));
    assert_eq!(events.last().unwrap().1["result"]["snapshot"], "two@1", "{events:?}");
    let frozen = home.json(&["sleep", "two", "--keep-running", "--wait", "frozen", "--no-daemon"]);
    assert!(frozen["frozen_seconds"].is_f64() && frozen.get("job").is_none(), "{frozen}");
    let begun = Instant::now();
    while !home.snapshots().contains(&"two@2".to_owned()) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", home.snapshots());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Who was awake all the same stood in the text alone.
#[test]
fn a_fork_that_fails_tells_who_is_awake() {
    let vms = asleep();
    let home = &vms.home;
    let guest = fs::read_to_string(home.path("guest.json")).unwrap();
    let guest: Value = serde_json::from_str(&guest).unwrap();
    let program = guest["launch"]["program"].as_str().unwrap();
    // A while later, when all are under way.
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in */live/b[12]/*) sleep 2; exit 1;; esac\nexec {program} \"$@\"\n"
    );
    let failing = home.file("failing", script.as_bytes());
    fs::set_permissions(&failing, fs::Permissions::from_mode(0o755)).unwrap();
    let failing = path(&failing);
    let names = |error: &Value| -> Vec<String> {
        let awake = error["awake"].as_array().unwrap_or_else(|| panic!("{error}"));
        assert!(awake.iter().all(|vm| vm["pid"].is_u64() && vm["over"] == "vm@1"), "{error}");
        awake.iter().map(|vm| vm["name"].as_str().unwrap().to_owned()).collect()
    };
    let fails = |arguments: &[&str]| -> Value {
        let output = home.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = errors(&output);
        let line = said.lines().last().unwrap();
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {said}"))
    };
    let error = fails(&["fork", "vm", "a1", "b1", "--vmm", failing, "--json"]);
    assert_eq!(names(&error), ["a1"]);
    let daemon = Running::start(home, &[]);
    let error = fails(&["fork", "vm", "a2", "b1", "--vmm", failing, "--json"]);
    assert_eq!(names(&error), ["a2"]);
    let wanted = json!({ "names": ["b1", "a3", "a4"], "vmm": failing });
    let (_, error) = daemon.ask("POST", "/v1/snapshots/vm/fork?wait=durable", Some(&wanted));
    assert_eq!(names(&error), ["a3", "a4"]);
    // Nobody is: then there is no list.
    let wanted = json!({ "names": ["b1", "b2"], "vmm": failing });
    let (_, error) = daemon.ask("POST", "/v1/snapshots/vm/fork?wait=durable", Some(&wanted));
    assert!(error["error"].is_object() && error.get("awake").is_none(), "{error}");
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
