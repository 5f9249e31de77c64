//! `dormouse mount` running beside a test, and what is mounted on top of it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::fixture::Home;

/// A mount of a home's store on `mnt` that ends with the test.
pub(crate) struct Mounted {
    child: Child,
    dir: PathBuf,
}

impl Mounted {
    pub(crate) fn start(home: &Home) -> Mounted {
        let dir = home.path("mnt");
        fs::create_dir_all(home.path("mnt")).unwrap_or(());
        let log = fs::File::create(home.path("mount.log")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_dormouse"))
            .current_dir(home.path("."))
            .env_remove("DORMOUSE_STORE")
            .args(["mount", "mnt"])
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let log = fs::read_to_string(home.path("mount.log")).unwrap();
        assert!(line.trim_end().ends_with("/mnt"), "{line}{log}");
        Mounted { child, dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The process as a power cut would end it.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to end as an administrator does, and waits until it has.
    pub(crate) fn terminate(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        detach(&self.dir);
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        detach(&self.dir);
    }
}

/// Takes a mount away, however it is.
pub(crate) fn detach(dir: &Path) {
    // Mostly there is nothing any more.
    let _ = Command::new("umount").args(["-q", "-l"]).arg(dir).stderr(Stdio::null()).status();
}

/// A file system in a file that is mounted through a loop device.
pub(crate) struct Looped {
    dir: PathBuf,
    device: String,
}

impl Looped {
    pub(crate) fn mount(file: &Path, dir: &Path, options: &str) -> Looped {
        fs::create_dir_all(dir).unwrap();
        let device = run(
            "losetup",
            &[
                "--show",
                "-f",
                if options.starts_with("ro") { "-r" } else { "--direct-io=off" },
                path(file),
            ],
        );
        let looped = Looped { dir: dir.to_owned(), device: device.trim().to_owned() };
        run("mount", &["-o", options, &looped.device, path(dir)]);
        looped
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Unmounts it as one does.
    pub(crate) fn unmount(self) {
        run("umount", &[path(&self.dir)]);
    }
}

impl Drop for Looped {
    fn drop(&mut self) {
        detach(&self.dir);
        let _ = Command::new("losetup").args(["-d", &self.device]).stderr(Stdio::null()).status();
        // A file system whose device is gone takes a while to go, and XFS refuses a second one of its
        // UUID as long as it is there.
        let name = self.device.trim_start_matches("/dev/");
        let backing = format!("/sys/block/{name}/loop/backing_file");
        let deadline = Instant::now() + Duration::from_secs(20);
        while Path::new(&backing).exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

pub(crate) fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a program that must succeed, and gives what it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let (said, errors) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {said}{errors}");
    said.into_owned()
}

/// Waits for something that happens soon.
pub(crate) fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}
