//! Judges we did not write, over live disks that the real `dormouse serve nbd` serves.
//!
//! What a judge does to a disk is done to a raw file, too, by itself or by another program. At
//! the end the disk is committed while it is served, and disk, export and raw file must be equal.

mod copies;
mod file_systems;
mod loads;
mod maps;
mod peers;
mod sequences;

use std::fs::{self, File};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::fixture::{Home, noise};
use crate::live_disk::{Served, tool};

const MIB: usize = 1 << 20;

/// Bytes of the snapshot's image.
const BASE_BYTES: usize = 20 * MIB;

/// Bytes of the disk over it, which ends within a block.
const DISK_BYTES: usize = 32 * MIB + 5 * 512;

/// The disk `box` over `vm@1`, both served, and the raw file `model`.
struct Trial {
    home: Home,
    commits: usize,
    server: Served,
}

/// Data with holes of a block, of some, and of eight MiB.
fn base() -> Vec<u8> {
    let mut bytes = noise(1, BASE_BYTES / 4096);
    for hole in [4096..8192, MIB..MIB + 65536, 8 * MIB..16 * MIB] {
        bytes[hole].fill(0);
    }
    bytes
}

impl Trial {
    /// A disk that is longer than the image below it.
    fn over_an_image() -> Trial {
        let home = Home::with_store();
        home.file("base", &base());
        home.ok(&["commit", "vm", "--disk", "base"]);
        home.ok(&["disk", "create", "box", "--from", "vm:root", "--size", &DISK_BYTES.to_string()]);
        fs::copy(home.path("base"), home.path("model")).unwrap();
        let model = File::options().write(true).open(home.path("model")).unwrap();
        model.set_len(DISK_BYTES as u64).unwrap();
        let server = Served::start(&home, &["box", "vm@1:root"]);
        Trial { home, commits: 0, server }
    }

    /// A disk over nothing; there is no raw file yet.
    fn blank(size_bytes: usize) -> Trial {
        let home = Home::with_store();
        home.ok(&["disk", "create", "box", "--size", &size_bytes.to_string()]);
        let server = Served::start(&home, &["box"]);
        Trial { home, commits: 0, server }
    }

    fn uri(&self) -> String {
        self.uri_of("box")
    }

    fn uri_of(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.home.path("s.nbd").display())
    }

    fn model(&self) -> Vec<u8> {
        fs::read(self.home.path("model")).unwrap()
    }

    fn run(&self, program: &str, arguments: &[&str]) -> String {
        // A client that hangs is a failure, not a test that never ends.
        let timed = [&["-k", "1", "120", program], arguments].concat();
        tool(&self.home, "timeout", &timed)
    }

    /// A script of qemu-io for the disk and for the raw file.
    fn qemu_io_both(&self, script: &[String]) {
        for target in [self.uri().as_str(), "model"] {
            let mut arguments = vec!["-f", "raw", "-t", "writeback", "-d", "unmap"];
            script.iter().for_each(|command| arguments.extend(["-c", command]));
            arguments.push(target);
            let said = self.run("qemu-io", &arguments);
            assert!(!said.contains("failed"), "{target}: {said}");
        }
    }

    /// Commits `box` as `vm`, again and again while `work` is done and at least once.
    fn commit_during<T>(&mut self, work: impl FnOnce(&Trial) -> T) -> T {
        let is_done = AtomicBool::new(false);
        let mut commits = 0;
        let trial = &*self;
        let result = std::thread::scope(|scope| {
            let committer = scope.spawn(|| {
                let mut commits = 0;
                while commits == 0 || !is_done.load(Ordering::Relaxed) {
                    trial.home.ok(&["disk", "commit", "box", "vm"]);
                    commits += 1;
                }
                commits
            });
            let done = Done(&is_done);
            let result = work(trial);
            drop(done);
            commits = committer.join().unwrap();
            result
        });
        self.commits += commits;
        result
    }

    /// The disk, what is committed of it and what it is after that equal the raw file.
    fn agree(&mut self) {
        let model = self.model();
        let uri = self.uri();
        self.run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, "model"]);
        let snapshot = self.home.ok(&["disk", "commit", "box", "vm"]);
        self.commits += 1;
        let export = format!("export-{}", self.commits);
        self.home.ok(&["export", &format!("{}:root", snapshot.trim()), &export]);
        same(&fs::read(self.home.path(&export)).unwrap(), &model, "the export");
        let status = self.home.json(&["disk", "status", "box"]);
        assert_eq!(status["disks"][0]["dirty_bytes"], 0);
        assert_eq!(status["disks"][0]["zero_bytes"], 0);
        let copy = format!("copy-{}", self.commits);
        self.run("nbdcopy", &[&uri, &copy]);
        same(&fs::read(self.home.path(&copy)).unwrap(), &model, "the disk after its commit");
        assert!(self.server.0.try_wait().unwrap().is_none(), "the server ended");
    }
}

/// Says so however the work ends.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn same(bytes: &[u8], model: &[u8], what: &str) {
    assert_eq!(bytes.len(), model.len(), "{what}");
    let differ = bytes.iter().zip(model).position(|(a, b)| a != b);
    assert_eq!(differ, None, "{what}: the first byte that is not the raw file's");
}

/// Numbers that look random and are the same in each run.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
        usize::try_from(self.0 >> 33).unwrap() % bound
    }
}
