//! One QEMU process with one guest in it: boot, drive, pause, restore, end.
//!
//! Pausing leaves three files: the memory (QEMU's shared RAM file, as it is), the disk, and the
//! state, a migration stream without the RAM (`x-ignore-shared`). Sources: QEMU's
//! `docs/devel/migration`; works with QEMU 7.2 and later.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::assets::Assets;
use super::copy::copy_sparse;
use super::initramfs;
use super::qmp::Qmp;
use super::serial::{Output, Serial};

/// The data in a guest's pauses was measured with this much memory.
const MEMORY_MIB: u32 = 512;
/// The same in every guest; earlier than the files on its disk, whose access times so change at every read under relatime.
pub(super) const CLOCK: &str = "2025-01-01T00:00:00";
/// A boot takes 3 s on an idle machine; a busy one gets its time.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
const START_TIMEOUT: Duration = Duration::from_secs(30);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(300);
const COUNTER_TIMEOUT: Duration = Duration::from_secs(60);
/// More than any disk or pipe gives, so that QEMU does not pace itself.
const MIGRATION_BANDWIDTH: u64 = 10 << 30;
/// From this version on, `rom=off` lets a memory file be read-only and the memory writable.
const READ_ONLY_MEMORY_VERSION: (u32, u32) = (8, 2);
/// No randomised addresses, so that two runs of one workload differ less.
pub(super) const KERNEL_ARGUMENTS: &str =
    "console=ttyS0 quiet panic=-1 nokaslr norandmaps root=/dev/vda";

/// The machine that QEMU plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// A PC with PCI devices.
    Q35,
    /// A minimal machine with MMIO devices; boots Debian 12's kernel.
    Microvm,
}

impl Machine {
    /// What QEMU calls it, and the bus in the names of its devices.
    pub(super) fn words(self) -> (&'static str, &'static str) {
        match self {
            Machine::Q35 => ("q35", "pci"),
            Machine::Microvm => ("microvm", "device"),
        }
    }
}

/// How the memory file is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryMapping {
    /// The guest's memory is the file; needed for [`Guest::pause`] to leave RAM out of the state.
    Shared,
    /// The guest reads the file and keeps its changes to itself; see [`private_files_stay_whole`].
    Private,
}

/// Where the root disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Disk {
    /// A raw file; [`Guest::boot`] copies the base disk to it if it does not exist.
    File(PathBuf),
    /// An NBD server on a unix socket.
    Nbd {
        /// The server's socket.
        socket: PathBuf,
        /// The export's name.
        export: String,
    },
}

/// What a guest is made of; a restored guest needs the machine and memory size of its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The machine that QEMU plays.
    pub machine: Machine,
    /// The size of the guest's memory in MiB.
    pub memory_mib: u32,
    /// The memory file; made new by [`Guest::boot`].
    pub memory: PathBuf,
    /// How the memory file is mapped.
    pub mapping: MemoryMapping,
    /// The root disk.
    pub disk: Disk,
    /// How the guest mounts its root: a list of options as for `mount -o`.
    pub root_options: String,
    /// When the guest's clock starts, in UTC: `YYYY-MM-DDTHH:MM:SS`.
    pub clock: String,
}

impl Config {
    /// A q35 with 512 MiB of shared memory in `dir/memory` and its disk in `dir/disk`.
    #[must_use]
    pub fn in_dir(dir: &Path) -> Config {
        Config {
            machine: Machine::Q35,
            memory_mib: MEMORY_MIB,
            memory: dir.join("memory"),
            mapping: MemoryMapping::Shared,
            disk: Disk::File(dir.join("disk")),
            root_options: initramfs::ROOT_OPTIONS.to_owned(),
            clock: CLOCK.to_owned(),
        }
    }
}

/// A running or paused guest; dropping it ends it.
#[derive(Debug)]
pub struct Guest {
    process: Process,
    qmp: Qmp,
    serial: Serial,
}

impl Guest {
    /// Boots a guest and waits until it takes commands; about 3 s.
    pub fn boot(assets: &Assets, config: &Config) -> Result<Guest> {
        let memory = File::create(&config.memory)
            .with_context(|| format!("cannot create {}", config.memory.display()))?;
        memory.set_len(u64::from(config.memory_mib) << 20)?;
        if let Disk::File(path) = &config.disk
            && !path.exists()
        {
            copy_sparse(&assets.disk(), path)?;
        }
        let guest = Guest::start(assets, config, &[])?;
        guest
            .serial
            .wait_ready(BOOT_TIMEOUT)
            .with_context(|| guest.trouble("the guest did not boot"))?;
        Ok(guest)
    }

    /// Starts a new QEMU from a paused guest's memory, disk and `state`, and lets it go on.
    pub fn restore(assets: &Assets, config: &Config, state: &Path) -> Result<Guest> {
        // QEMU would make a missing memory file, and the guest would wake to zeros.
        let memory = fs::metadata(&config.memory)
            .with_context(|| format!("no memory file {}", config.memory.display()))?;
        if memory.len() != u64::from(config.memory_mib) << 20 {
            bail!(
                "{} has {} bytes, expected {} MiB",
                config.memory.display(),
                memory.len(),
                config.memory_mib
            );
        }
        let mut guest = Guest::start(assets, config, &["-S", "-incoming", "defer"])?;
        guest.set_migration_parameters()?;
        let uri = format!("exec:cat < {}", shell_quoted(state)?);
        guest.qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
        guest
            .qmp
            .wait_for_migration()
            .with_context(|| guest.trouble("the guest was not restored"))?;
        guest.resume()?;
        Ok(guest)
    }

    /// Runs one shell command line in the guest; a command that fails is no error.
    pub fn run(&mut self, command: &str) -> Result<Output> {
        self.run_within(command, COMMAND_TIMEOUT)
    }

    /// [`Guest::run`] with its own time limit; after that the guest takes no more commands.
    pub fn run_within(&mut self, command: &str, timeout: Duration) -> Result<Output> {
        self.serial
            .run(command, timeout)
            .with_context(|| self.trouble(&format!("running `{command}` in the guest")))
    }

    /// [`Guest::run`] for a command that has to succeed; returns what it printed.
    pub fn check(&mut self, command: &str) -> Result<String> {
        self.run(command)?.text_of(command)
    }

    /// The last counter value that this QEMU's guest has sent; it counts seconds of its own time.
    #[must_use]
    pub fn counter(&self) -> Option<u64> {
        self.serial.counter()
    }

    /// Waits for the next counter value.
    pub fn wait_counter(&self) -> Result<u64> {
        self.serial
            .next_counter(COUNTER_TIMEOUT)
            .with_context(|| self.trouble("the guest does not count"))
    }

    /// Stops the guest and writes its state without the RAM; memory and disk then hold still.
    pub fn pause(&mut self, state: &Path) -> Result<()> {
        self.qmp.execute("stop", Value::Null)?;
        self.set_migration_parameters()?;
        let uri = format!("exec:cat > {}", shell_quoted(state)?);
        self.qmp.execute("migrate", json!({ "uri": uri }))?;
        self.qmp
            .wait_for_migration()
            .with_context(|| self.trouble("the guest's state was not saved"))
    }

    /// Lets a paused guest go on.
    pub fn resume(&mut self) -> Result<()> {
        self.qmp.execute("cont", Value::Null)?;
        Ok(())
    }

    /// Ends QEMU at once, like a power cut for the guest, and waits until it is gone.
    pub fn kill(mut self) -> Result<()> {
        self.process.end()
    }

    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// The machine protocol of this guest's QEMU.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    fn start(assets: &Assets, config: &Config, more: &[&str]) -> Result<Guest> {
        let mut process = Process::spawn(assets, config, more)?;
        let serial = Serial::new(process.connect("serial")?)?;
        let qmp = Qmp::new(process.connect("qmp")?)?;
        Ok(Guest { process, qmp, serial })
    }

    fn set_migration_parameters(&mut self) -> Result<()> {
        self.qmp.execute(
            "migrate-set-capabilities",
            json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] }),
        )?;
        self.qmp
            .execute("migrate-set-parameters", json!({ "max-bandwidth": MIGRATION_BANDWIDTH }))?;
        Ok(())
    }

    /// What is known beside an error: QEMU's own words and the guest's last ones.
    fn trouble(&self, what: &str) -> String {
        let text = self.serial.text();
        let skip = text.lines().count().saturating_sub(20);
        let tail: Vec<&str> = text.lines().skip(skip).collect();
        format!("{what}\nQEMU: {}\nguest: {}", self.process.log(), tail.join("\n"))
    }
}

/// QEMU's process and the folder of its sockets; both go when it is dropped.
#[derive(Debug)]
struct Process {
    child: Child,
    scratch: PathBuf,
}

impl Process {
    fn spawn(assets: &Assets, config: &Config, more: &[&str]) -> Result<Process> {
        // A short path: a unix socket's has to fit into 108 bytes.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("dormouse-guest-{}-{number}", std::process::id());
        let scratch = std::env::temp_dir().join(name);
        fs::create_dir(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
        let log = File::create(scratch.join("log"))?;
        let mut command = command_line(assets, config, &scratch)?;
        let child = command
            .args(more)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start qemu-system-x86_64; `cargo xtask packages` installs it")?;
        Ok(Process { child, scratch })
    }

    /// Connects to one of QEMU's sockets as soon as it is there and listened on.
    fn connect(&mut self, name: &str) -> Result<UnixStream> {
        let deadline = Instant::now() + START_TIMEOUT;
        let path = self.scratch.join(name);
        loop {
            let error = match UnixStream::connect(&path) {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            if let Some(status) = self.child.try_wait()? {
                bail!("QEMU ended with {status}: {}", self.log());
            }
            if Instant::now() > deadline {
                bail!("QEMU does not listen on {}: {error}\n{}", path.display(), self.log());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.scratch.join("log")).unwrap_or_default()
    }

    fn end(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nobody is left to tell: the process may be gone already, the folder is in /tmp.
        let _ = self.end();
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

/// Whether this machine's QEMU leaves a privately mapped memory file as it is.
///
/// When the guest reports a page as free, QEMU punches it out of the memory file, also out of one
/// that it has mapped privately. Since 8.2 it can open the file read-only, and then it does not.
/// Before, only a copy of the file (or a file system that refuses to punch) is safe.
pub fn private_files_stay_whole() -> Result<bool> {
    let output = Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()
        .context("cannot start qemu-system-x86_64; `cargo xtask packages` installs it")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = parse_version(&text)
        .with_context(|| format!("QEMU does not tell its version: {text:?}"))?;
    Ok(version >= READ_ONLY_MEMORY_VERSION)
}

/// Major and minor version from the first line of `qemu-system-x86_64 --version`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let (_, rest) = text.split_once("version ")?;
    let mut numbers = rest.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn command_line(assets: &Assets, config: &Config, scratch: &Path) -> Result<Command> {
    let (machine, bus) = config.machine.words();
    let share = match config.mapping {
        MemoryMapping::Shared => "share=on",
        MemoryMapping::Private if private_files_stay_whole()? => "share=off,readonly=on,rom=off",
        MemoryMapping::Private => "share=off",
    };
    let drive = match &config.disk {
        Disk::File(path) => option_quoted(path)?,
        Disk::Nbd { socket, export } => {
            format!("nbd+unix:///{export}?socket={}", option_quoted(socket)?)
        }
    };
    let kernel_arguments =
        format!("{KERNEL_ARGUMENTS}{}", clock_argument(config.machine).unwrap_or_default());
    let initramfs = if config.root_options == initramfs::ROOT_OPTIONS {
        assets.initramfs()
    } else {
        let path = scratch.join("initramfs");
        let bytes = initramfs::with_root_options(&assets.initramfs(), &config.root_options)?;
        fs::write(&path, bytes)?;
        path
    };
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", &format!("{machine},memory-backend=dormouse-memory")])
        .args(["-accel", "tcg,thread=multi", "-smp", "1"])
        .args(["-m", &format!("{}M", config.memory_mib)])
        .arg("-object")
        .arg(format!(
            "memory-backend-file,id=dormouse-memory,size={}M,mem-path={},{share}",
            config.memory_mib,
            option_quoted(&config.memory)?
        ))
        .arg("-kernel")
        .arg(assets.kernel())
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &kernel_arguments])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-seed", "1", "-rtc", &format!("base={},clock=vm", config.clock)])
        .arg("-drive")
        .arg(format!("file={drive},format=raw,if=none,id=d0,discard=unmap,detect-zeroes=unmap"))
        .args(["-device", &format!("virtio-blk-{bus},drive=d0")])
        .arg("-device")
        .arg(format!("virtio-balloon-{bus},id=bal0,free-page-reporting=on"));
    for (option, name) in [("-serial", "serial"), ("-qmp", "qmp")] {
        let path = option_quoted(&scratch.join(name))?;
        command.arg(option).arg(format!("unix:{path},server=on,wait=off"));
    }
    Ok(command)
}

/// What a microvm's kernel is told of its clock. It has no timer that the kernel can measure that
/// against on a busy host: without this, a third of the boots stop there.
pub(super) fn clock_argument(machine: Machine) -> Option<String> {
    let khz = host_clock_khz().filter(|_| machine == Machine::Microvm)?;
    Some(format!(" tsc_early_khz={khz}"))
}

/// The rate of the clock that an emulated processor shows to its guest: this processor's.
fn host_clock_khz() -> Option<u64> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("cpu MHz"))?;
    let (mhz, fraction) = line.split_once(':')?.1.trim().split_once('.')?;
    let khz = fraction.get(..3)?;
    format!("{mhz}{khz}").parse().ok()
}

/// A path inside one of QEMU's comma-separated options.
fn option_quoted(path: &Path) -> Result<String> {
    Ok(utf8(path)?.replace(',', ",,"))
}

/// A path inside the shell command of QEMU's `exec:`.
fn shell_quoted(path: &Path) -> Result<String> {
    Ok(format!("'{}'", utf8(path)?.replace('\'', r"'\''")))
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_parsed() {
        let cases = [
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)\nCopyright", Some((7, 2))),
            ("QEMU emulator version 10.0.13 (Debian)", Some((10, 0))),
            ("QEMU", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_version(text), expected, "{text:?}");
        }
    }

    #[test]
    fn paths_survive_qemus_and_the_shells_syntax() {
        let path = Path::new("/a,b/it's");
        assert_eq!(option_quoted(path).unwrap(), "/a,,b/it's");
        assert_eq!(shell_quoted(path).unwrap(), r"'/a,b/it'\''s'");
    }
}
