//! A QEMU with the counting guest, started as a live VM's is.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use dormouse_testkit::counter::{Counter, wait_count};
use dormouse_vmm::deadline::Timeouts;
use dormouse_vmm::kind::Kind;
use dormouse_vmm::launch::{Memory, Places, Sharing, Start, Template, program_version};
use dormouse_vmm::program;
use dormouse_vmm::vmm::{Clock, Load, MemoryFrom, Then, TrackDirty, Vmm, connect_at_start};

pub(crate) const MEMORY_BYTES: u64 = 64 << 20;
const PAGES: u32 = 2000;
/// For a QEMU that is to hang.
pub(crate) const SHORT: Timeouts = Timeouts {
    start: Duration::from_secs(60),
    call: Duration::from_secs(5),
    save: Duration::from_secs(5),
    load: Duration::from_secs(5),
};

const COUNTS: Duration = Duration::from_secs(60);

/// A machine, and the folder of all it has.
pub(crate) struct Machine<'a> {
    pub(crate) machine: &'a str,
    pub(crate) folder: &'a Path,
}

/// A process of it; killed when dropped.
pub(crate) struct Running {
    child: Child,
    serial: PathBuf,
    pub(crate) vmm: Box<dyn Vmm>,
}

impl Machine<'_> {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A folder for a state.
    pub(crate) fn state(&self, name: &str) -> PathBuf {
        let folder = self.path(name);
        std::fs::create_dir(&folder).unwrap();
        folder
    }

    pub(crate) fn template(&self) -> Template {
        let args = [
            "-machine",
            self.machine,
            "-accel",
            "tcg",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-kernel",
            "{folder}/kernel",
            "-serial",
            "file:{folder}/{name}.serial",
        ];
        Template {
            vmm: Kind::Qemu,
            program: None,
            args: args.map(str::to_owned).to_vec(),
            wake_args: Vec::new(),
            config: None,
            environment: BTreeMap::new(),
            work_folder: None,
            memory_bytes: Some(MEMORY_BYTES),
            transfer: dormouse_vmm::launch::Transfer::Files,
        }
    }

    pub(crate) fn boot(&self, sharing: Sharing) -> Running {
        self.boot_within(sharing, Timeouts::STANDARD)
    }

    pub(crate) fn boot_within(&self, sharing: Sharing, timeouts: Timeouts) -> Running {
        Counter { pages: PAGES }.write_kernel(&self.path("kernel")).unwrap();
        let memory = self.path("memory-0");
        File::create(&memory).unwrap().set_len(MEMORY_BYTES).unwrap();
        self.start(&memory, sharing, timeouts, false)
    }

    /// Wakes it, and lets it go on.
    pub(crate) fn wake(&self, memory: &Path, sharing: Sharing, state: &Path) -> Running {
        let mut running = self.ready(memory, sharing);
        running.vmm.load(&self.load(state)).unwrap();
        running.vmm.resume().unwrap();
        running
    }

    /// A process that waits for a load.
    pub(crate) fn ready(&self, memory: &Path, sharing: Sharing) -> Running {
        self.start(memory, sharing, Timeouts::STANDARD, true)
    }

    pub(crate) fn load<'a>(&'a self, state: &'a Path) -> Load<'a> {
        Load {
            folder: state,
            scratch: self.folder,
            memory: MemoryFrom::AtStart,
            drives: &[],
            networks: &[],
            vsock: None,
            track_dirty: TrackDirty::No,
            clock: Clock::Default,
            then: Then::StayPaused,
        }
    }

    fn start(&self, memory: &Path, sharing: Sharing, timeouts: Timeouts, is_wake: bool) -> Running {
        thread_local!(static NEXT: Cell<u32> = const { Cell::new(0) });
        let number = NEXT.get();
        NEXT.set(number + 1);
        let name = format!("vm-{number}");
        let places = Places {
            name: name.clone(),
            folder: self.folder.to_owned(),
            api: self.path(&format!("{name}.qmp")),
            memory: Some(Memory { path: memory.to_owned(), sharing }),
            disks: BTreeMap::new(),
            vsock: None,
        };
        let version =
            program_version(Kind::Qemu, &program::find(Kind::Qemu, None).unwrap()).unwrap();
        let template = self.template();
        let start = match is_wake {
            false => template.boot(&places, version),
            true => template.wake(&places, version),
        };
        self.spawn(&start.unwrap(), &name, timeouts)
    }

    pub(crate) fn spawn(&self, start: &Start, name: &str, timeouts: Timeouts) -> Running {
        let log = self.path(&format!("{name}.log"));
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
        let vmm = connect_at_start(Kind::Qemu, &start.api, timeouts, &mut ended).unwrap();
        let serial = self.path(&format!("{name}.serial"));
        Running { child, serial, vmm }
    }
}

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its memory as the process has it: where it maps `file`.
    pub(crate) fn memory(&self, file: &Path) -> Vec<u8> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.child.id())).unwrap();
        let line = maps.lines().find(|line| line.ends_with(file.to_str().unwrap())).unwrap();
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
        assert_eq!(end - start, MEMORY_BYTES, "one mapping of all of it");
        let mut bytes = vec![0; usize::try_from(MEMORY_BYTES).unwrap()];
        let range = start..end;
        let ranges = std::slice::from_ref(&range);
        dormouse_sys::process_memory::read(self.child.id(), ranges, &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn wait(&mut self) {
        self.child.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Waits until the guest has counted beyond `after`.
pub(crate) fn count(running: &Running, after: u32) -> u32 {
    wait_count(&running.serial, after, COUNTS).unwrap()
}
