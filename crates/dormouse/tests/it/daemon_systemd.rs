//! What systemd gives the daemon and is told by it, with a stand-in for systemd; and the unit files.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dormouse_sys::passing;
use rustix::io::{FdFlags, fcntl_setfd};

use crate::daemon_fixture::{Running, command, exchange};
use crate::fixture::Home;
use crate::mounted::path;

/// Listens and becomes the daemon, as systemd does.
const ACTIVATE: &str = "
import os, socket, sys
at, *command = sys.argv[1:]
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(at)
listener.listen()
os.dup2(listener.fileno(), 3, inheritable=True) if listener.fileno() != 3 else os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='api')
os.execv(command[0], command)
";

fn activated(home: &Home, notify: &Path) -> Command {
    let mut command = Command::new("python3");
    command
        .current_dir(home.path("."))
        .env("NOTIFY_SOCKET", notify)
        .env("WATCHDOG_USEC", "200000")
        .env_remove("DORMOUSE_STORE")
        .args(["-c", ACTIVATE, path(&home.path("api")), env!("CARGO_BIN_EXE_dormouse"), "daemon"]);
    command
}

fn told(socket: &UnixDatagram) -> String {
    let mut bytes = [0; 256];
    let count = socket.recv(&mut bytes).unwrap();
    String::from_utf8(bytes[..count].to_vec()).unwrap()
}

#[test]
fn sockets_are_taken_over_and_systemd_is_told() {
    let home = Home::with_store();
    let notify = home.path("notify");
    let systemd = UnixDatagram::bind(&notify).unwrap();
    systemd.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let daemon = Running::start_by(&home, &["--socket", "api"], activated(&home, &notify));
    assert_eq!(daemon.get("/v1")["socket"], path(&home.path("api")));
    assert!(!home.store().join("live/.daemon/api").exists(), "it needs no other one");
    assert!(told(&systemd).starts_with("READY=1\n"));
    for _ in 0..3 {
        assert_eq!(told(&systemd), "WATCHDOG=1");
    }
    // Commands find it there.
    home.ok(&["ps"]);
    assert!(daemon.log().contains("/v1/vms"), "{}", daemon.log());
    let (status, log) = daemon.terminate();
    assert!(status.success(), "{log}");
    let mut all = String::new();
    systemd.set_nonblocking(true).unwrap();
    let mut bytes = [0; 256];
    loop {
        match systemd.recv(&mut bytes) {
            Ok(count) => all.push_str(std::str::from_utf8(&bytes[..count]).unwrap()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(all.contains("STOPPING=1"), "{all}");
    assert!(home.path("api").exists(), "the socket is systemd's");
}

/// What is passed for another process, or is no listener, is not used.
#[test]
fn sockets_that_are_none_are_refused() {
    let home = Home::with_store();
    let script = ACTIVATE.replace("listener.listen()\n", "");
    let output = Command::new("python3")
        .current_dir(home.path("."))
        .args(["-c", &script, path(&home.path("api")), env!("CARGO_BIN_EXE_dormouse"), "daemon"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("is not listened on"), "{said}");
}

/// Becomes the daemon with a descriptor that was kept for it.
const SUCCEED: &str = "
import os, sys
kept, name, *command = sys.argv[1:]
os.dup2(int(kept), 3, inheritable=True) if kept != '3' else os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES=name)
os.execv(command[0], command)
";

/// What is told with a descriptor, and that.
fn kept(systemd: &UnixDatagram) -> (String, OwnedFd) {
    let (mut bytes, mut descriptors) = ([0; 256], Vec::new());
    let count = passing::receive(systemd, &mut bytes, &mut descriptors).unwrap();
    let text = std::str::from_utf8(&bytes[..count]).unwrap();
    let name = text.strip_prefix("FDSTORE=1\nFDNAME=").unwrap_or_else(|| panic!("{text}"));
    assert_eq!(descriptors.len(), 1, "{text}");
    (name.to_owned(), descriptors.pop().unwrap())
}

/// A daemon that made its socket itself is restarted, and killed: who connects meanwhile is answered by the
/// next one.
#[test]
fn its_own_socket_is_kept_over_restarts() {
    let home = Home::with_store();
    let notify = home.path("notify");
    let systemd = UnixDatagram::bind(&notify).unwrap();
    systemd.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut first = command(&home, &["--socket", "api"]);
    first.env("NOTIFY_SOCKET", &notify);
    let mut daemon = Running::start_by(&home, &["--socket", "api"], first);
    let (name, socket) = kept(&systemd);
    fcntl_setfd(&socket, FdFlags::empty()).unwrap();
    let next = |at: &str| {
        let mut next = Command::new("python3");
        next.current_dir(home.path("."))
            .env("NOTIFY_SOCKET", &notify)
            .env_remove("DORMOUSE_STORE")
            .args(["-c", SUCCEED, &socket.as_raw_fd().to_string(), &name])
            .args([env!("CARGO_BIN_EXE_dormouse"), "daemon", "--socket", at]);
        next
    };
    for is_killed in [false, true, false] {
        let client = {
            let connected = daemon.connect();
            drop(connected);
            let socket = daemon.socket.clone();
            if is_killed {
                daemon.kill();
            } else {
                let (status, log) = daemon.terminate();
                assert!(status.success(), "{log}");
                // Commands do without.
                home.ok(&["ps"]);
            }
            std::os::unix::net::UnixStream::connect(socket).unwrap()
        };
        let asked = std::thread::spawn(move || exchange(client, "GET", "/v1", None));
        daemon = Running::start_by(&home, &["--socket", "api"], next("api"));
        assert_eq!(asked.join().unwrap().unwrap().0, 200);
        home.ok(&["ps"]);
        assert!(daemon.log().contains("/v1/vms"), "{}", daemon.log());
    }
    let mut all = String::new();
    daemon.terminate();
    let other = Running::start_by(&home, &["--socket", "other"], next("other"));
    assert_eq!(other.get("/v1")["socket"], path(&home.path("other")));
    while !all.contains(&format!("FDSTOREREMOVE=1\nFDNAME={name}")) {
        all.push_str(&told(&systemd));
    }
    assert!(all.contains("FDSTORE=1\nFDNAME=dormouse-unix-"), "{all}");
}

/// The rules without which a restart would end VMs or lose their files.
#[test]
fn the_units_leave_vms_alone() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../contrib/systemd");
    let unit = std::fs::read_to_string(folder.join("dormouse.service")).unwrap();
    let lines: Vec<&str> =
        unit.lines().filter(|line| !line.starts_with('#') && line.contains('=')).collect();
    for needed in ["Type=notify", "KillMode=process", "WatchdogSec=30", "NotifyAccess=main"] {
        assert!(lines.contains(&needed), "{needed}");
    }
    // Each of these would hide the data plane's mount from the next daemon.
    for namespace in ["Protect", "Private", "ReadOnlyPaths", "ReadWritePaths", "MountFlags", "Bind"]
    {
        assert!(!lines.iter().any(|line| line.starts_with(namespace)), "{namespace}");
    }
    let exec = lines.iter().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let home = Home::with_store();
    let args: Vec<&str> = exec.split(' ').skip(1).collect();
    let at = args.iter().position(|arg| *arg == "/var/lib/dormouse").unwrap();
    let mut args: Vec<&str> = args.clone();
    let store = home.store();
    args[at] = path(&store);
    args.push("--print-openapi");
    home.ok(&args);
}
