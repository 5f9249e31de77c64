//! A guest that somebody else's QEMU runs, reached over its serial line; and what that QEMU is to be
//! started with.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::assets::Assets;
use super::qemu::{CLOCK, KERNEL_ARGUMENTS, Machine, clock_argument};
use super::serial::{Output, Serial};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(300);
const COUNTER_TIMEOUT: Duration = Duration::from_secs(60);

/// The guest's end of a serial line.
#[derive(Debug)]
pub struct Console {
    serial: Serial,
}

impl Console {
    /// Connects to a serial line of QEMU's that listens at `socket`, or is about to.
    pub fn connect(socket: &Path) -> Result<Console> {
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Ok(Console { serial: Serial::new(stream)? }),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("no console {}", socket.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Waits until a guest that boots takes commands.
    pub fn wait_ready(&self) -> Result<()> {
        self.serial.wait_ready(BOOT_TIMEOUT)
    }

    /// Runs one shell command line in the guest; a command that fails is no error.
    pub fn run(&mut self, command: &str) -> Result<Output> {
        self.serial.run(command, COMMAND_TIMEOUT)
    }

    /// The same for a command that has to succeed; returns what it printed.
    pub fn check(&mut self, command: &str) -> Result<String> {
        self.run(command)?.text_of(command)
    }

    /// The last counter value that arrived.
    #[must_use]
    pub fn counter(&self) -> Option<u64> {
        self.serial.counter()
    }

    /// Waits for the next counter value.
    pub fn wait_counter(&self) -> Result<u64> {
        self.serial.next_counter(COUNTER_TIMEOUT)
    }
}

/// What `dormouse run` is to be given for a guest of ours: its disk `root` lies over `from` (`SNAP:ID`),
/// and its serial line listens at `serial` in the VM's folder.
pub fn guest_for_run(
    assets: &Assets,
    machine: Machine,
    memory_mib: u64,
    from: &str,
) -> Result<Value> {
    let utf8 = |path: &Path| -> Result<String> {
        Ok(path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?.to_owned())
    };
    let (name, bus) = machine.words();
    let append = format!("{KERNEL_ARGUMENTS}{}", clock_argument(machine).unwrap_or_default());
    Ok(json!({
        "launch": {
            "vmm": "qemu",
            "memory_bytes": memory_mib << 20,
            "args": [
                "-machine", name, "-accel", "tcg,thread=multi", "-smp", "1",
                "-kernel", utf8(&assets.kernel())?, "-initrd", utf8(&assets.initramfs())?,
                "-append", append,
                "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
                "-seed", "1", "-rtc", format!("base={CLOCK},clock=vm"),
                "-drive",
                "file={disk:root},format=raw,if=none,id=d0,discard=unmap,detect-zeroes=unmap,cache=none",
                "-device", format!("virtio-blk-{bus},drive=d0"),
                "-device", format!("virtio-balloon-{bus},id=bal0,free-page-reporting=on"),
                "-serial", "unix:{folder}/serial,server=on,wait=off",
            ],
        },
        "disks": [{ "id": "root", "from": from }],
    }))
}
