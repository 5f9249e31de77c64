//! A VMM's process in a folder of its own, started from a template as a live VM's is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use dormouse_testkit::double::{Program, Rule, ask};
use dormouse_vmm::deadline::Timeouts;
use dormouse_vmm::kind::Kind;
use dormouse_vmm::launch::{DiskPlace, Places, Start, Template, program_version};
use dormouse_vmm::vmm::{Clock, Load, MemoryFrom, Then, TrackDirty, Vmm, connect_at_start};

/// Megabytes of a double's guest.
pub(crate) const MIB: u64 = 16;

/// A process; killed when dropped.
pub(crate) struct Running {
    child: Child,
    pub(crate) api: PathBuf,
    pub(crate) vmm: Box<dyn Vmm>,
}

/// A double's installed program, and its folder.
pub(crate) struct Host<'a> {
    pub(crate) folder: &'a Path,
    pub(crate) kind: Kind,
    program: PathBuf,
}

impl<'a> Host<'a> {
    pub(crate) fn new(folder: &'a Path, kind: Kind, program: &Program) -> Host<'a> {
        Host { folder, kind, program: program.install(folder).unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A folder.
    pub(crate) fn make(&self, name: &str) -> PathBuf {
        let folder = self.path(name);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    pub(crate) fn disk(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        if !path.exists() {
            File::create(&path).unwrap().set_len(1 << 20).unwrap();
        }
        path
    }

    fn template(&self) -> Template {
        let args = match self.kind {
            Kind::CloudHypervisor => vec![
                "--memory",
                "size=16M,shared=on",
                "--cpus",
                "boot=2",
                "--kernel",
                "/vmlinux",
                "--disk",
                "path={disk:root},id=root",
                "--net",
                "tap=tap0,id=net0",
            ],
            _ => Vec::new(),
        };
        let config = (self.kind == Kind::Firecracker).then(|| {
            serde_json::json!({
                "machine-config": {"vcpu_count": 2, "mem_size_mib": MIB, "track_dirty_pages": true},
                "boot-source": {"kernel_image_path": "/vmlinux"},
                "drives": [{
                    "drive_id": "root", "path_on_host": "{disk:root}", "is_root_device": true,
                    "is_read_only": false, "io_engine": "Async",
                }],
                "network-interfaces": [{"iface_id": "net0", "host_dev_name": "tap0"}],
                "vsock": {"guest_cid": 3, "uds_path": "/v.sock"},
            })
        });
        Template {
            vmm: self.kind,
            program: Some(self.program.clone()),
            args: args.into_iter().map(str::to_owned).collect(),
            wake_args: Vec::new(),
            config,
            environment: BTreeMap::new(),
            work_folder: None,
            memory_bytes: None,
            transfer: dormouse_vmm::launch::Transfer::Files,
        }
    }

    pub(crate) fn boot(&self, name: &str) -> Running {
        self.start(name, Timeouts::STANDARD, false)
    }

    /// A process that waits for a load.
    pub(crate) fn ready(&self, name: &str) -> Running {
        self.start(name, Timeouts::STANDARD, true)
    }

    pub(crate) fn start(&self, name: &str, timeouts: Timeouts, is_wake: bool) -> Running {
        let folder = self.make(name);
        let places = Places {
            name: name.to_owned(),
            api: folder.join("api"),
            folder,
            memory: None,
            disks: BTreeMap::from([("root".to_owned(), DiskPlace::File(self.disk("root")))]),
            vsock: None,
        };
        let version = program_version(self.kind, &self.program).unwrap();
        let template = self.template();
        let start = match is_wake {
            false => template.boot(&places, version),
            true => template.wake(&places, version),
        };
        spawn(self.kind, &start.unwrap(), timeouts)
    }
}

fn spawn(kind: Kind, start: &Start, timeouts: Timeouts) -> Running {
    for (path, bytes) in &start.files {
        std::fs::write(path, bytes).unwrap();
    }
    let log = start.work_folder.join("log");
    let mut child = start
        .command()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let mut ended = || {
        let status = child.try_wait().unwrap()?;
        Some(format!("{status}: {}", std::fs::read_to_string(&log).unwrap()))
    };
    let timeouts = Timeouts { start: Duration::from_secs(60), ..timeouts };
    let vmm = connect_at_start(kind, &start.api, timeouts, &mut ended).unwrap();
    Running { child, api: start.api.clone(), vmm }
}

impl Running {
    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// A call that no driver makes, and its answer.
    pub(crate) fn call(&self, method: &str, path: &str, body: &str) -> String {
        self.try_call(method, path, body).unwrap()
    }

    /// The same, of a process that may end before it has answered, or even read it.
    pub(crate) fn try_call(&self, method: &str, path: &str, body: &str) -> io::Result<String> {
        ask(&self.api, method, path, body)
    }

    fn double(&self, method: &str, path: &str, body: &str) -> String {
        let answer = self.call(method, &format!("/double/{path}"), body);
        assert!(answer.starts_with("HTTP/1.1 20"), "{method} {path}: {answer:?}");
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    /// Gives a double rules.
    pub(crate) fn rules(&self, rules: &[Rule]) {
        self.double("PUT", "behaviour", &serde_json::to_string(rules).unwrap());
    }

    /// All of its memory and disks are right.
    pub(crate) fn verify(&self) {
        self.double("PUT", "verify", "");
    }

    pub(crate) fn count(&self) -> u64 {
        let report: serde_json::Value =
            serde_json::from_str(&self.double("GET", "report", "")).unwrap();
        report["count"].as_u64().unwrap()
    }

    /// Lets the guest work some time.
    pub(crate) fn work(&self) {
        let before = self.count();
        while self.count() < before + 20 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A load that asks for nothing special.
pub(crate) fn load<'a>(folder: &'a Path, scratch: &'a Path, memory: MemoryFrom<'a>) -> Load<'a> {
    Load {
        folder,
        scratch,
        memory,
        drives: &[],
        networks: &[],
        vsock: None,
        track_dirty: TrackDirty::No,
        clock: Clock::Default,
        then: Then::Resume,
    }
}
