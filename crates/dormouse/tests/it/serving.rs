//! The process that serves: in the background, reached by other commands, asked for figures.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use dormouse_testkit::certificates;
use serde_json::Value;

use crate::fixture::{Home, code, errors, noise};
use crate::nbd_fixture::{Served, messages_of, nbdsh, qemu_io, signal, tool, uri, wait_until};

fn with_disk() -> Home {
    let home = Home::with_store();
    home.file("d", &noise(1, 256));
    home.ok(&["commit", "vm", "--disk", "d"]);
    home.ok(&["disk", "create", "box", "--from", "vm:root"]);
    home
}

/// A process that ends with the test.
struct Ends(u32);

impl Drop for Ends {
    fn drop(&mut self) {
        if is_running(self.0) {
            signal(self.0, "KILL");
        }
    }
}

/// A zombie is not: nobody of ours may collect it.
fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn pid_of(object: &Value) -> u32 {
    u32::try_from(object["pid"].as_u64().unwrap()).unwrap()
}

#[test]
fn a_background_server_serves_when_the_command_returns_and_ends_when_told() {
    let home = with_disk();
    let started = home.json(&["serve", "nbd", "box", "--socket", "s.nbd", "--background"]);
    let pid = pid_of(&started);
    let _ends = Ends(pid);
    assert!(started["uris"][0].as_str().unwrap().starts_with("nbd+unix:///box?socket=/"));
    // At once, without waiting for anything.
    assert_eq!(tool(&home, "nbdinfo", &["--size", &uri("box")]), "1048576\n");
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    assert_eq!(fields[3], pid.to_string(), "a session of its own: {stat}");
    assert_eq!(fields[4], "0", "no terminal: {stat}");
    let stdio = |number: u32| fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap();
    assert_eq!(stdio(0), Path::new("/dev/null"));
    assert_eq!(stdio(1), Path::new("/dev/null"));
    assert_eq!(stdio(2), home.store().join("live/box/log").canonicalize().unwrap());
    let status = home.json(&["disk", "status", "box"]);
    assert_eq!(status["server"]["pid"], pid);
    assert_eq!(status["server"]["uris"], started["uris"]);
    signal(pid, "USR1");
    let log = home.store().join("live/box/log");
    wait_until("figures in the log", || fs::read_to_string(&log).unwrap().contains("\"exports\""));
    assert_eq!(home.json(&["serve", "stop", "box"])["stopped"], true);
    wait_until("its end", || !is_running(pid));
    assert!(!home.path("s.nbd").exists());
    assert!(!home.store().join("live/box/control").exists());
    assert_eq!(home.json(&["serve", "stop", "box"])["stopped"], false);
    home.fails(code::NOT_FOUND, &["serve", "stop", "none"]);
    assert_eq!(home.json(&["disk", "status", "box"])["server"], Value::Null);
}

#[test]
fn a_background_server_of_snapshots_has_its_log_where_it_is_told() {
    let home = with_disk();
    let serve = ["serve", "nbd", "vm@1:root", "--socket", "s.nbd", "--background"];
    let told = home.fails(code::USAGE, &serve);
    assert!(told.contains("--log FILE"), "{told}");
    assert!(!home.path("s.nbd").exists());
    let text = home.ok(&[&serve[..], &["--log", "log"]].concat());
    let lines: Vec<&str> = text.lines().collect();
    let pid: u32 = lines[1].strip_prefix("pid ").unwrap().parse().unwrap();
    let _ends = Ends(pid);
    assert!(lines[0].starts_with("nbd+unix:///vm@1:root?socket=/"), "{text}");
    assert_eq!(tool(&home, "nbdinfo", &["--size", &uri("vm@1:root")]), "1048576\n");
    assert_eq!(fs::metadata(home.path("log")).unwrap().permissions().mode() & 0o777, 0o600);
    signal(pid, "TERM");
    wait_until("its end", || !is_running(pid));
    assert!(!home.path("s.nbd").exists());
}

/// A live disk over TCP: who has a certificate of ours reads and writes it, and nobody else.
#[test]
fn a_live_disk_over_tcp_is_for_clients_with_a_certificate() {
    let home = with_disk();
    home.fails(code::USAGE, &["serve", "nbd", "box", "--tcp", "127.0.0.1:0"]);
    let serve = ["serve", "nbd", "box", "vm@1:root", "--tcp", "127.0.0.1:0", "--tls", "certs"];
    let told = home.fails(code::NOT_FOUND, &serve);
    assert!(told.contains("certs/ca-cert.pem"), "{told}");
    fs::create_dir(home.path("certs")).unwrap();
    certificates::make(&home.path("certs")).unwrap();
    for (optional, plain_is_served) in [(&[][..], false), (&["--tls-optional"], true)] {
        let started = home.json(&[&serve[..], optional, &["--background"]].concat());
        let _ends = Ends(pid_of(&started));
        let uri = started["uris"][0].as_str().unwrap();
        let (scheme, rest) = uri.split_once("://127.0.0.1:").unwrap();
        assert_eq!(scheme, if plain_is_served { "nbd" } else { "nbds" });
        let with = |folder: &str| format!("nbds://localhost:{rest}?tls-certificates={folder}");
        let ours = with("certs");
        let about = tool(&home, "nbdinfo", &[&ours]);
        assert!(about.contains("with TLS") && about.contains("dormouse:dirty"), "{about}");
        home.file("new", &noise(7, 256));
        tool(&home, "nbdcopy", &["--flush", "new", &ours]);
        tool(&home, "nbdcopy", &[&ours, "copy"]);
        assert!(fs::read(home.path("copy")).unwrap() == noise(7, 256));
        let is_served = |uri: &str| {
            let info = Command::new("nbdinfo").current_dir(home.path(".")).arg(uri).output();
            info.unwrap().status.success()
        };
        assert!(!is_served(&with("certs/stranger")), "nobody vouches for a stranger");
        assert_eq!(is_served(&format!("nbd://localhost:{rest}")), plain_is_served);
        home.ok(&["serve", "stop", "box"]);
    }
    home.ok(&["disk", "commit", "box", "vm"]);
    assert!(home.run(&["cat", "vm:root"]).stdout == noise(7, 256));
}

/// What keeps the other process from serving is told by the command that was typed, with its code.
#[test]
fn a_background_server_that_cannot_start_says_why() {
    let home = with_disk();
    let background = |exports: &str, socket: &str| {
        home.run(&["serve", "nbd", exports, "--socket", socket, "--background", "--json"])
    };
    home.file("file", b"precious");
    for (export, socket, expected, kind) in [
        ("none", "s.nbd", code::NOT_FOUND, "not_found"),
        ("vm@7:root", "s.nbd", code::NOT_FOUND, "not_found"),
        ("box", "none/s.nbd", code::NOT_FOUND, "not_found"),
        ("box", "file", code::ALREADY_EXISTS, "already_exists"),
    ] {
        let output = background(export, socket);
        assert_eq!(output.status.code(), Some(expected), "{export}: {}", errors(&output));
        assert!(output.stdout.is_empty());
        let object: Value = serde_json::from_slice(&output.stderr).unwrap();
        assert_eq!(object["error"]["kind"], kind, "{export} {socket}");
    }
    let _served = Served::start(&home, &["box"]);
    assert_eq!(background("box", "t.nbd").status.code(), Some(10));
    home.fails(code::USAGE, &["serve", "nbd", "box", "--socket", "t.nbd", "--log", "log"]);
}

#[test]
fn only_the_user_reaches_a_live_disk() {
    let home = with_disk();
    let _served = Served::start(&home, &["box"]);
    let mode = |path: &str| fs::metadata(home.path(path)).unwrap().permissions().mode() & 0o777;
    for folder in ["live/box", "live/box/disk", "live/box/disk/root"] {
        assert_eq!(mode(&format!("dormouse-store/{folder}")), 0o700, "{folder}");
    }
    assert_eq!(mode("dormouse-store/live/box/control"), 0o600);
    assert_eq!(mode("s.nbd"), 0o600);
}

/// Whoever connects to the control socket and is silent keeps nobody waiting.
#[test]
fn a_silent_client_of_the_control_socket_holds_up_nobody() {
    let home = with_disk();
    let _served = Served::start(&home, &["box"]);
    let silent: Vec<UnixStream> = (0..8)
        .map(|_| UnixStream::connect(home.store().join("live/box/control")).unwrap())
        .collect();
    assert_eq!(home.json(&["disk", "status", "box"])["disks"][0]["dirty_bytes"], 0);
    drop(silent);
    assert_eq!(home.json(&["serve", "stop", "box"])["stopped"], true);
}

/// Causes and kinds of failures come through the control socket.
#[test]
fn a_commit_that_fails_in_the_server_has_the_exit_code_it_would_have_here() {
    let home = with_disk();
    let _served = Served::start(&home, &["box"]);
    home.fails(code::NOT_FOUND, &["disk", "commit", "box", "vm", "--parent", "vm@9"]);
    home.fails(code::NOT_FOUND, &["disk", "commit", "box/none", "vm"]);
    home.fails(code::USAGE, &["disk", "commit", "box", "vm", "--parent", "../x"]);
    assert_eq!(home.ok(&["disk", "commit", "box", "vm"]), "vm@2\n");
}

/// Of two commits of a live VM the second is refused. A stop ends the first; what that had sealed
/// belongs to the next one.
#[test]
fn one_commit_at_a_time_and_a_stop_ends_it() {
    const BLOCKS: usize = 24 << 10;
    for attempt in 0..8 {
        let home = Home::with_store();
        home.ok(&["disk", "create", "box", "--size", "96MiB"]);
        let _served = Served::start(&home, &["box"]);
        home.file("new", &noise(attempt, BLOCKS));
        tool(&home, "nbdcopy", &["--flush", "new", &uri("box")]);
        let commit = ["disk", "commit", "box", "vm"];
        let (first, second) = std::thread::scope(|scope| {
            let first = scope.spawn(|| home.run(&commit));
            let is_under_way =
                || home.json(&["disk", "status", "box"])["disks"][0]["is_committing"] == true;
            while !first.is_finished() && !is_under_way() {}
            let second = home.run(&commit);
            home.ok(&["serve", "stop", "box"]);
            (first.join().unwrap(), second)
        });
        if first.status.success() || second.status.success() {
            // It was over before it could be looked at.
            continue;
        }
        assert_eq!(second.status.code(), Some(10), "{}", errors(&second));
        assert!(errors(&second).contains("another commit of box is under way"));
        assert_eq!(first.status.code(), Some(130), "{}", errors(&first));
        assert!(home.snapshots().is_empty(), "a commit that was ended published something");
        assert_eq!(home.ok(&commit), "vm@1\n");
        assert!(home.run(&["cat", "vm:root"]).stdout == noise(attempt, BLOCKS));
        home.ok(&["verify", "--deep"]);
        return;
    }
    panic!("no commit was ever seen under way");
}

#[test]
fn zeros_in_plain_writes_take_space_where_they_are_not_looked_for() {
    for (detect, dirty, zero) in [("on", 0, 65536), ("off", 65536, 0)] {
        let home = with_disk();
        let _served = Served::start(&home, &["box", "--detect-zeroes", detect]);
        let said = qemu_io(&home, "box", &["write -P 0 64k 64k", "read -P 0 64k 64k"]);
        assert!(!said.contains("failed"), "{said}");
        let status = home.json(&["disk", "status", "box"]);
        assert_eq!(status["disks"][0]["dirty_bytes"], dirty, "{detect}");
        assert_eq!(status["disks"][0]["zero_bytes"], zero, "{detect}");
    }
}

#[test]
fn figures_are_printed_when_asked_for_and_at_the_end() {
    let home = with_disk();
    let mut served = Served::start(&home, &["box", "vm@1:root", "--metrics"]);
    let script = "h.pwrite(b'x' * 8192, 4096)\nh.zero(4096, 65536)\nh.flush()\nh.pread(4096, 0)\n\
                  try:\n    h.pread(4096, 1 << 40)\n    print('read')\n\
                  except nbd.Error as e:\n    print(e.errnum)";
    assert_eq!(nbdsh(&home, "box", "", script), "22\n");
    served.signal("USR1");
    let figures = || -> Vec<Value> {
        let text = messages_of(&home);
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    };
    wait_until("figures", || !figures().is_empty());
    served.signal("TERM");
    assert!(served.child.wait().unwrap().success());
    assert_eq!(figures().len(), 2);
    for object in figures() {
        assert_eq!(object["version"], 1);
        assert_eq!(object["accepted"], 1);
        let live = &object["exports"][0];
        assert_eq!(live["name"], "box");
        assert_eq!(live["write"]["requests"], 1);
        assert_eq!(live["write"]["bytes"], 8192);
        assert_eq!(live["zero"]["bytes"], 4096);
        assert_eq!(live["flush"]["requests"], 1);
        assert_eq!(live["refused"], 1);
        for command in ["read", "write", "flush"] {
            assert!(live[command]["waiting_seconds"].as_f64().unwrap() > 0.0, "{object}");
            assert!(live[command]["serving_seconds"].as_f64().unwrap() > 0.0, "{object}");
            assert_eq!(live[command]["errors"], 0);
        }
        assert_eq!(live["disk"]["dirty_bytes"], 8192);
        assert_eq!(live["disk"]["zero_bytes"], 4096);
        assert_eq!(live["disk"]["problem"], Value::Null);
        assert_eq!(object["exports"][1]["disk"], Value::Null);
    }
}

/// Here the kernel has no driver, or it has: then the device is busy or not ours to take.
#[test]
fn a_kernel_without_the_driver_is_told_with_what_to_do() {
    let home = with_disk();
    home.fails(code::USAGE, &["serve", "nbd", "box", "--attach", "/dev/sda"]);
    home.fails(code::USAGE, &["serve", "nbd", "box", "--socket", "s.nbd", "--connections", "2"]);
    home.fails(code::USAGE, &["serve", "nbd", "box", "vm@1:root", "--attach", "/dev/nbd0"]);
    if Path::new("/sys/module/nbd").exists() {
        eprintln!("SKIPPED the error without a driver: this host has one; see host_attach");
        return;
    }
    for background in [&[][..], &["--background"]] {
        let attach = ["serve", "nbd", "box", "--attach", "/dev/nbd0", "--socket", "s.nbd"];
        let told = home.fails(code::NOT_FOUND, &[&attach[..], background].concat());
        assert!(told.contains("modprobe nbd"), "{told}");
        assert!(!home.path("s.nbd").exists());
    }
    // The disk was let go of.
    home.ok(&["disk", "commit", "box", "vm"]);
}

/// A real block device, on hosts whose kernel has the driver: written through it, read after it
/// was disconnected.
#[test]
fn host_attach_makes_a_block_device() {
    if std::env::var_os("DORMOUSE_TEST_HOST").is_none() || !Path::new("/sys/module/nbd").exists() {
        eprintln!("SKIPPED: `make test-host` attaches /dev/nbdN where `modprobe nbd` was run");
        return;
    }
    let is_free = |number: &u32| {
        Path::new(&format!("/dev/nbd{number}")).exists()
            && !Path::new(&format!("/sys/block/nbd{number}/pid")).exists()
    };
    let Some(number) = (0..16).find(is_free) else {
        eprintln!("SKIPPED: all of /dev/nbd0 to 15 are in use");
        return;
    };
    let home = with_disk();
    let device = format!("/dev/nbd{number}");
    let attach = ["serve", "nbd", "box", "--attach", &device, "--connections", "2", "--background"];
    let started = home.json(&attach);
    let _ends = Ends(pid_of(&started));
    assert_eq!(started["device"], device);
    assert!(fs::read(&device).unwrap() == noise(1, 256));
    let other = ["serve", "nbd", "vm@1:root", "--attach", &device, "--log", "log", "--background"];
    home.fails(10, &other);
    home.file("new", &noise(9, 16));
    let of = format!("of={device}");
    tool(&home, "dd", &["if=new", &of, "bs=4096", "seek=8", "conv=fsync", "status=none"]);
    tool(&home, "blkdiscard", &["-o", "0", "-l", "16384", &device]);
    assert_eq!(home.json(&["serve", "stop", "box"])["stopped"], true);
    assert!(is_free(&number));
    home.ok(&["disk", "commit", "box", "vm"]);
    let mut expected = noise(1, 256);
    expected[8 * 4096..24 * 4096].copy_from_slice(&noise(9, 16));
    expected[..16384].fill(0);
    assert!(home.run(&["cat", "vm@2:root"]).stdout == expected);
}
