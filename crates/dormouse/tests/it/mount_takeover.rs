//! The process of a held mount is killed under load, again and again, and the next `dormouse mount` goes
//! on: a guest's memory is right, its disk is right, also what it never flushed, and nothing hangs.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use dormouse_testkit::vmm::{Backing, Config, SmallVmm};

use crate::fixture::Home;
use crate::memory_fixture::{PAGES, SEED, with_snapshot};
use crate::mount_memory::commit_with_layout;
use crate::mounted::{detach, path, run, wait_for};

const KILLS: usize = 4;

/// Works on a disk as a guest does that seldom flushes, until its input ends: random blocks, a third of
/// them zeros, trims, and each is read again. Tells what was wrong, and leaves what must be there.
const WORK: &str = r#"
import ctypes, os, random, select, sys
disk = os.open(sys.argv[1], os.O_RDWR)
blocks = os.fstat(disk).st_size // 4096
fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
model = bytearray(os.pread(disk, blocks * 4096, 0))
random.seed(7)
writes = 0
print("working", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    block = random.randrange(blocks)
    at = block * 4096
    kind = random.randrange(10)
    if kind == 0:
        length = 4096 * min(random.randrange(1, 20), blocks - block)
        assert fallocate(disk, 3, at, length) == 0, ctypes.get_errno()
        data = bytes(length)
    else:
        data = bytes(4096) if kind < 4 else os.urandom(random.randrange(1, 9000))[:blocks * 4096 - at]
        assert os.pwrite(disk, data, at) == len(data)
    model[at:at + len(data)] = data
    writes += 1
    if writes % 500 == 0:
        os.fsync(disk)
    other = random.randrange(blocks) * 4096
    assert os.pread(disk, 4096, other) == model[other:other + 4096], (writes, other)
assert os.pread(disk, blocks * 4096, 0) == model
open(sys.argv[2], "wb").write(model)
print("done", writes, flush=True)
"#;

struct Server(Child);

impl Server {
    /// Mounts, or takes the mount over. Whoever starts it must have no file of the mount open: a new
    /// process waits for the server of those that it closes, and that is what it is to be.
    fn start(home: &Home, options: &[&str]) -> Server {
        let mut child = Command::new(env!("CARGO_BIN_EXE_dormouse"))
            .current_dir(home.path("."))
            .env_remove("DORMOUSE_STORE")
            .args(["mount", "mnt"])
            .args(options)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.trim_end().ends_with("/mnt"), "{line}");
        Server(child)
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Guard<'a>(&'a Home);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        detach(&self.0.path("mnt"));
        let holders = format!("hold --socket {}", path(&self.0.store()));
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let pid = process.file_name().to_str().and_then(|pid| pid.parse().ok());
            let pid = pid.and_then(rustix::process::Pid::from_raw);
            if let Some(pid) = pid.filter(|_| line.contains(&holders)) {
                // It may have ended since.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

#[test]
fn a_killed_mount_is_taken_over_and_a_guest_notices_nothing() {
    let home = with_snapshot();
    let backing = Backing::PrivateFile(home.path("mnt/vm/2/memory"));
    let config = Config::small(SEED, PAGES, backing);
    commit_with_layout(&home, &config);
    home.ok(&["disk", "create", "box", "--size", "16MiB"]);
    fs::create_dir(home.path("mnt")).unwrap();
    let _guard = Guard(&home);
    let mut server = Server::start(&home, &["--hold"]);
    let twice = home.fails(10, &["mount", "mnt"]);
    assert!(twice.contains("already"), "{twice}");
    let mut work = Command::new("python3")
        .args(["-c", WORK, path(&home.path("mnt/live/box/disk/root")), path(&home.path("model"))])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(work.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "working");
    let mut vmm = SmallVmm::spawn(&config).unwrap();
    let mut server = thread::scope(|scope| {
        let guest = scope.spawn(|| {
            for _ in 0..KILLS {
                vmm.run(2_000).unwrap();
                thread::sleep(Duration::from_millis(300));
            }
        });
        for number in 0..KILLS as u64 {
            thread::sleep(Duration::from_millis(400 + 130 * number));
            server.kill();
            thread::sleep(Duration::from_millis(50));
            server = Server::start(&home, &[]);
        }
        guest.join().unwrap();
        server
    });
    vmm.pause().unwrap();
    vmm.write_expected(&home.path("expected")).unwrap();
    vmm.resume().unwrap();
    home.ok(&[
        "commit",
        "vm",
        "--parent",
        "vm@2",
        "--memory-of",
        &vmm.pid().to_string(),
        "--state",
        "state",
    ]);
    assert!(
        home.run(&["cat", "vm:memory"]).stdout == fs::read(home.path("expected")).unwrap(),
        "the guest's memory"
    );
    vmm.quit().unwrap();
    work.stdin.take().unwrap().write_all(b"end").unwrap();
    let done = said.next().unwrap().unwrap();
    let writes: u64 = done.strip_prefix("done ").unwrap().parse().unwrap();
    assert!(work.wait().unwrap().success() && writes > 100, "{done}");
    home.ok(&["disk", "commit", "box", "disk"]);
    assert!(
        home.run(&["cat", "disk:root"]).stdout == fs::read(home.path("model")).unwrap(),
        "the guest's disk"
    );
    // The end of the mount is the end of who held it.
    run("umount", &[path(&home.path("mnt"))]);
    assert!(server.0.wait().unwrap().success());
    let mounts = fs::read_dir(home.store().join("mounts")).unwrap().next().unwrap().unwrap();
    wait_for("the holder's end", || !mounts.path().join("holder").exists());
}

/// Somebody takes a held mount away whose process is gone: the next one is a new one.
#[test]
fn a_held_mount_that_was_taken_away_is_not_taken_over() {
    let home = with_snapshot();
    fs::create_dir(home.path("mnt")).unwrap();
    let _guard = Guard(&home);
    Server::start(&home, &["--hold"]).kill();
    run("umount", &["-l", path(&home.path("mnt"))]);
    let server = Server::start(&home, &[]);
    assert!(fs::read(home.path("mnt/vm/1/memory")).unwrap() == fs::read(home.path("mem")).unwrap());
    run("umount", &[path(&home.path("mnt"))]);
    drop(server);
}
