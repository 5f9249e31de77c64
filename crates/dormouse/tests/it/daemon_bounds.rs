//! What the daemon lets others do to it: strangers, what is too long or too slow, too much at once; and that
//! it keeps to its budget.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::daemon_fixture::{Running, exchange, live, parse};
use crate::fixture::Home;
use crate::mounted::path;

/// Nobody.
const STRANGER: u32 = 65534;

const ASK: &str = "
import http.client, socket, sys
class Connection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(sys.argv[1])
connection = Connection('x')
try:
    connection.request('POST', '/v1/gc', b'{}')
    answer = connection.getresponse()
    print(answer.status, answer.read().decode())
except PermissionError:
    print('not let in')
";

/// A client of another user, on whom the tests must be able to call: they run as root, as those of mounts
/// and network block devices do.
fn ask_as_a_stranger(socket: &str) -> String {
    assert!(rustix::process::geteuid().is_root(), "this test needs root to be somebody else");
    let mut command = Command::new("python3");
    command.args(["-c", ASK, socket]).uid(STRANGER).gid(STRANGER).current_dir("/");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn peers_of_other_users_are_refused() {
    let home = Home::with_store();
    fs::set_permissions(home.path("."), fs::Permissions::from_mode(0o755)).unwrap();
    let daemon = Running::start(&home, &["--socket", "open", "--socket-mode", "666"]);
    let socket = home.path("open");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o666);
    let answer = ask_as_a_stranger(path(&socket));
    assert!(answer.starts_with("403 "), "{answer}");
    let error: Value = serde_json::from_str(&answer[4..]).unwrap();
    assert_eq!(error["error"]["kind"], "refused");
    assert_eq!(daemon.get("/v1/jobs")["jobs"], json!([]), "nothing was done for it");
    let (_, metrics) = daemon.send("GET", "/metrics", None);
    assert!(metrics.contains("dormouse_refused_total{why=\"stranger\"} 1\n"), "{metrics}");
    daemon.kill();
    // The mode alone keeps them out, too.
    let _daemon = Running::start(&home, &["--socket", "closed"]);
    let socket = home.path("closed");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(ask_as_a_stranger(path(&socket)).trim(), "not let in");
}

fn answer_to(daemon: &Running, request: &[u8]) -> (u16, String) {
    let mut stream = daemon.connect();
    // It may be answered and closed before all is sent.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    parse(&answer).unwrap_or_else(|| panic!("{answer:?}"))
}

#[test]
fn what_is_too_long_is_refused_unread() {
    let home = Home::with_store();
    let daemon = Running::start(&home, &[]);
    let before = resident(&daemon);
    let head = "POST /v1/gc HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    let long = format!("{head}content-length: 1073741824\r\n\r\n");
    let (status, body) = answer_to(&daemon, &[long.as_bytes(), &[b' '; 3 << 20]].concat());
    assert_eq!(status, 413, "{body}");
    let mut chunked = format!("{head}transfer-encoding: chunked\r\n\r\n").into_bytes();
    for _ in 0..48 {
        chunked.extend_from_slice(b"10000\r\n");
        chunked.extend_from_slice(&[b' '; 0x10000]);
        chunked.extend_from_slice(b"\r\n");
    }
    assert_eq!(answer_to(&daemon, &chunked).0, 413);
    let field = format!("GET /v1 HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(64 << 10));
    // These are answered by who reads heads, with no body (docs/api.md).
    let nothing = String::new();
    assert_eq!(answer_to(&daemon, field.as_bytes()), (431, nothing.clone()));
    let target = format!("GET /v1/{} HTTP/1.1\r\nhost: x\r\n\r\n", "y".repeat(20_000));
    assert_eq!(answer_to(&daemon, target.as_bytes()), (431, nothing.clone()));
    let fields = format!("GET /v1 HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(200));
    assert_eq!(answer_to(&daemon, fields.as_bytes()), (431, nothing.clone()));
    assert_eq!(answer_to(&daemon, b"GET\x00 / nonsense\r\n\r\n"), (400, nothing));
    for body in [json!([null, null]), json!({ "names": "x" }), json!({ "name": "x", "nome": 1 })] {
        let (status, error) = daemon.ask("POST", "/v1/snapshots/vm/wake", Some(&body));
        assert_eq!((status, &error["error"]["kind"]), (400, &json!("usage")), "{body}");
    }
    let names: Vec<String> = (0..2000).map(|number| format!("n{number}")).collect();
    let (status, error) =
        daemon.ask("POST", "/v1/snapshots/vm/fork", Some(&json!({ "names": names })));
    assert_eq!((status, &error["error"]["kind"]), (400, &json!("usage")));
    let grown = resident(&daemon).saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes more");
}

fn resident(daemon: &Running) -> u64 {
    let statm = fs::read_to_string(format!("/proc/{}/statm", daemon.child.id())).unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// Until when a connection is closed to which somebody writes `first`, and then nothing.
fn closed_after(mut stream: UnixStream, first: &[u8]) -> (Duration, String) {
    let begun = Instant::now();
    stream.write_all(first).unwrap();
    let mut answer = Vec::new();
    // How it is closed is of no interest.
    let _ = stream.read_to_end(&mut answer);
    (begun.elapsed(), String::from_utf8_lossy(&answer).into_owned())
}

/// All at once, for each takes its time.
#[test]
fn who_is_too_slow_is_let_go() {
    let home = Home::with_store();
    let daemon = Running::start(&home, &["--connections", "5"]);
    let connect = || daemon.connect();
    let soon = Duration::from_secs(60);
    thread::scope(|scope| {
        let idle = scope.spawn(move || closed_after(connect(), b""));
        let head = scope.spawn(move || closed_after(connect(), b"GET /v1 HTTP/1.1\r\nhost"));
        let kept = scope.spawn(move || closed_after(connect(), b"GET /v1 HTTP/1.1\r\n\r\n"));
        let body = scope.spawn(move || {
            let half = b"POST /v1/gc HTTP/1.1\r\ncontent-length: 9\r\n\r\n{";
            closed_after(connect(), half)
        });
        let deaf = scope.spawn(move || {
            let mut stream = connect();
            let requests = b"GET /v1/openapi.json HTTP/1.1\r\n\r\n".repeat(100);
            stream.write_all(&requests).unwrap();
            // It reads nothing for longer than it is waited for.
            thread::sleep(Duration::from_secs(26));
            let mut answers = Vec::new();
            let _ = stream.read_to_end(&mut answers);
            String::from_utf8_lossy(&answers).matches("HTTP/1.1 200").count()
        });
        // All places are taken; this one waits for the first that becomes free.
        thread::sleep(Duration::from_millis(300));
        let begun = Instant::now();
        assert_eq!(exchange(connect(), "GET", "/v1", None).unwrap().0, 200);
        let waited = begun.elapsed();
        assert!(waited > Duration::from_secs(3) && waited < soon, "{waited:?}");
        for (what, waits) in [("idle", idle), ("head", head)] {
            let (after, answer) = waits.join().unwrap();
            assert!(after > Duration::from_secs(5) && after < soon, "{what} {after:?} {answer}");
        }
        let (after, answer) = kept.join().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(after > Duration::from_secs(5) && after < soon, "{after:?}");
        let (after, answer) = body.join().unwrap();
        assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
        assert!(after > Duration::from_secs(10) && after < soon, "{after:?}");
        let answers = deaf.join().unwrap();
        assert!(answers < 100, "it was let go before it had all answers");
    });
    assert_eq!(daemon.get("/v1/vms")["vms"], json!([]));
}

/// A guest whose VMM takes so many seconds to say its version, and then is none.
fn slow_guest(home: &Home, seconds: u32) -> Value {
    let program = home.file("slow-vmm", format!("#!/bin/sh\nsleep {seconds}\nexit 1\n").as_bytes());
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    json!({ "launch": {
        "vmm": "qemu", "program": path(&program), "args": ["-machine", "q35"], "memory_bytes": 4096
    } })
}

#[test]
fn jobs_wait_are_turned_away_are_told_to_stop_and_are_ended_in_order() {
    let home = Home::with_store();
    let daemon = Running::start(&home, &["--jobs", "1", "--queue", "1", "--threads", "1"]);
    let guest = slow_guest(&home, 3);
    let run =
        |name: &str| daemon.ask("POST", "/v1/vms", Some(&json!({ "name": name, "guest": guest })));
    let (status, first) = run("first");
    assert_eq!(status, 202, "{first}");
    let (status, second) = run("second");
    assert_eq!((status, &second["state"]), (202, &json!("queued")), "{second}");
    let (status, third) = run("third");
    assert_eq!((status, &third["error"]["kind"]), (429, &json!("busy")), "{third}");
    let message = &third["error"]["message"];
    assert_eq!(message, "as many jobs wait as may: 1, behind 1 at work", "not the sum of both");
    // One that waits is ended at once, while the first is still at work.
    let id = second["id"].as_str().unwrap();
    let cancelled = daemon.post(&format!("/v1/jobs/{id}/cancel"), &json!({}));
    assert_eq!(cancelled["state"], "cancelled");
    assert_eq!(daemon.events(&second).len(), 1, "it has ended");
    let (status, _) = daemon.ask("GET", &format!("/v1/jobs/{id}0"), None);
    assert_eq!(status, 400);
    // Others are answered meanwhile, and a wait that is over is told the job.
    let (status, fourth) = daemon.ask(
        "POST",
        "/v1/vms?wait=durable&timeout_seconds=0",
        Some(&json!({ "name": "fourth", "guest": guest })),
    );
    assert_eq!((status, &fourth["state"]), (202, &json!("queued")), "{fourth}");
    let (mut daemon, store) = (daemon, home.store());
    // A job is at work some time before there is anything of its VM.
    daemon.wait_for("the first is begun", |_| live(&store) == ["first"]);
    let id = first["id"].as_str().unwrap();
    assert_eq!(daemon.get(&format!("/v1/jobs/{id}"))["state"], "running");
    let begun = Instant::now();
    let (status, log) = daemon.terminate();
    assert!(status.success(), "{log}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{log}");
    assert_eq!(live(&home.store()), [""; 0], "what failed left nothing: {log}");
    assert!(log.contains("a job came to nothing"), "{log}");
}

/// A job that is at work when the daemon is killed is undone by the next one.
#[test]
fn what_a_kill_leaves_is_mended_at_the_start() {
    let home = Home::with_store();
    let mut daemon = Running::start(&home, &[]);
    let guest = slow_guest(&home, 2);
    daemon.post("/v1/vms", &json!({ "name": "half", "guest": guest }));
    let store = home.store();
    daemon.wait_for("it is begun", |_| live(&store) == ["half"]);
    daemon.kill();
    assert_eq!(live(&store), ["half"]);
    let daemon = Running::start(&home, &[]);
    assert_eq!(live(&store), [""; 0], "{}", daemon.log());
}

#[test]
fn the_budget_holds_under_load() {
    let home = Home::with_store();
    let args = ["--jobs", "3", "--connections", "20", "--threads", "1", "--queue", "400"];
    let daemon = Running::start(&home, &args);
    let budget = daemon.get("/v1")["budget"].clone();
    let (threads, descriptors) = (&budget["threads"], &budget["descriptors"]);
    let most = thread::scope(|scope| {
        let daemon = &daemon;
        let clients: Vec<_> = (0..60)
            .map(|client| {
                scope.spawn(move || {
                    for round in 0..15 {
                        let (method, path, body) = match (client + round) % 4 {
                            0 => ("GET", "/v1/vms", None),
                            1 => ("GET", "/metrics", None),
                            2 => ("POST", "/v1/gc?wait=durable", Some(json!({}))),
                            _ => ("GET", "/v1/snapshots", None),
                        };
                        let (status, answer) = daemon.send(method, path, body.as_ref());
                        assert_eq!(status, 200, "{path}: {answer}");
                    }
                })
            })
            .collect();
        let mut most = (0, 0);
        while clients.iter().any(|client| !client.is_finished()) {
            most.0 = most.0.max(daemon.count("task"));
            most.1 = most.1.max(daemon.count("fd"));
            thread::sleep(Duration::from_millis(2));
        }
        most
    });
    assert!(most.0 as u64 <= threads.as_u64().unwrap(), "{most:?} {budget}");
    assert!(most.1 as u64 <= descriptors.as_u64().unwrap(), "{most:?} {budget}");
    assert!(most.0 > 4, "there was load: {most:?}");
    let bytes = resident(&daemon);
    assert!(bytes < 128 << 20, "{bytes}");
    daemon.signal(Signal::INT);
    assert!(daemon.terminate().0.success());
}

/// A limit of the host under what may be needed is told at once, not when it is hit.
#[test]
fn too_few_descriptors_are_refused_at_the_start() {
    let home = Home::with_store();
    let daemon = env!("CARGO_BIN_EXE_dormouse");
    let output = Command::new("sh")
        .current_dir(home.path("."))
        .args(["-c", "ulimit -n 256; exec \"$0\" daemon", daemon])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(6), "{said}");
    assert!(said.contains("LimitNOFILE"), "{said}");
}
