//! `cargo xtask demo`: a real Linux guest works, is paused three times, and wakes from the third pause.
//!
//! Each pause is committed with the real command. The last is exported to new files, and a second
//! QEMU goes on from those. Then it wakes as a VM, lazily, twice: the second time with the trace of the
//! first. It sleeps once more, and is forked ten times; each fork counts on by itself.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use comfy_table::{CellAlignment, Table};
use dormouse_testkit::guest::{
    Assets, Config, Console, Disk, Guest, Machine, Pause, cache_dir, drive, guest_for_run,
};
use serde_json::Value;

use crate::command::{cargo, output_of, run as run_command, target_dir};
use crate::packages;

const PAUSES: [Pause; 3] = [Pause::Boot, Pause::Work, Pause::Rework];
const SNAPSHOT: &str = "vm";
/// The images' names in the snapshot; an export puts them in `disk/` and `state/`.
const DISK: &str = "root";
const STATE: &str = "stream";
const FORKS: usize = 10;
const MEMORY_MIB: u64 = 512;
/// What a guest is asked as soon as it is awake: about a file of 8 MB that it has in memory.
const FIRST_COMMAND: &str = "cat /job/sorted | wc -l";
/// How long the trace of a wake that is over may take to be stored.
const TRACE_TIMEOUT: Duration = Duration::from_secs(10);

/// Tells the story; fails if the guest does not go on where it stopped.
pub(crate) fn run() -> Result<()> {
    let begun = Instant::now();
    packages::install()?;
    let assets = build_and_prepare()?;
    let demo = Demo::new()?;
    let stopped_at = demo.sleep(&assets)?;
    demo.wake(&assets, stopped_at)?;
    let forked = demo.fork(&assets, stopped_at);
    demo.end_vms()?;
    forked?;
    println!("demo: done in {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Builds the command while the guest is made: the one takes processors, the other the network and the disk.
fn build_and_prepare() -> Result<Assets> {
    thread::scope(|scope| {
        let guest = scope.spawn(|| Assets::prepare(&cache_dir(), &mut |line| println!("{line}")));
        let built = run_command(&mut cargo(&["build", "--quiet", "--release", "-p", "dormouse"]));
        let assets = guest.join().map_err(|_| anyhow!("making the guest panicked"))?;
        built?;
        assets
    })
}

/// The places of one run, made anew each time.
#[derive(Debug)]
struct Demo {
    command: PathBuf,
    store: PathBuf,
    first: PathBuf,
    second: PathBuf,
}

impl Demo {
    fn new() -> Result<Demo> {
        let dir = target_dir().join("demo");
        if dir.exists() {
            fs::remove_dir_all(&dir).context("cannot remove the last demo's files")?;
        }
        let demo = Demo {
            command: target_dir().join("release/dormouse"),
            store: dir.join("store"),
            first: dir.join("first"),
            second: dir.join("second"),
        };
        fs::create_dir_all(&demo.first)?;
        run_command(demo.dormouse().arg("init"))?;
        Ok(demo)
    }

    /// Boots a guest, lets it work and commits its pauses; returns where its counter stopped.
    fn sleep(&self, assets: &Assets) -> Result<u64> {
        println!("demo: booting a Linux guest (512 MiB memory, 2 GiB disk)");
        let mut guest = Guest::boot(assets, &Config::in_dir(&self.first))?;
        let state = self.first.join("state");
        let mut table = Table::new();
        table.set_header([
            "pause",
            "after",
            "raw",
            "non-zero",
            "stored",
            "ratio",
            "seconds",
            "of it fsync",
        ]);
        for pause in PAUSES {
            drive(&mut guest, pause, &mut |line| println!("demo: {line}"))?;
            guest.pause(&state)?;
            println!("demo: paused at counter {}, committing", count(&guest)?);
            let report = self.commit(&state)?;
            table.add_row(row(pause, &report)?);
            if pause != PAUSES[PAUSES.len() - 1] {
                guest.resume()?;
            }
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        println!("{table}");
        let stopped_at = count(&guest)?;
        guest.kill()?;
        Ok(stopped_at)
    }

    fn commit(&self, state: &Path) -> Result<Value> {
        let disk = format!("{DISK}={}", self.first.join("disk").display());
        let state = format!("{STATE}={}", state.display());
        let text = output_of(
            self.dormouse()
                .args(["--json", "commit", SNAPSHOT, "--memory"])
                .arg(self.first.join("memory"))
                .args(["--disk", &disk, "--state", &state]),
        )?;
        serde_json::from_str(&text).with_context(|| format!("dormouse printed no JSON: {text}"))
    }

    /// Wakes the last snapshot in a second QEMU.
    fn wake(&self, assets: &Assets, stopped_at: u64) -> Result<()> {
        let name = format!("{SNAPSHOT}@{}", PAUSES.len());
        println!("demo: the first guest is gone; exporting {name} to new files");
        // The trailing slash says that this is a folder for all of the snapshot's images.
        let target = format!("{}/", self.second.display());
        run_command(self.dormouse().args(["export", &name, &target]))?;
        let config = Config {
            disk: Disk::File(self.second.join("disk").join(DISK)),
            ..Config::in_dir(&self.second)
        };
        let guest = Guest::restore(assets, &config, &self.second.join("state").join(STATE))?;
        let goes_on_at = guest.wait_counter()?;
        println!("demo: the guest stopped at counter {stopped_at}, goes on at {goes_on_at}");
        // A line that was on its way at the pause may be lost between the two QEMUs.
        ensure!(
            goes_on_at > stopped_at && goes_on_at <= stopped_at + 2,
            "the guest did not go on where it stopped: {goes_on_at} after {stopped_at}"
        );
        guest.kill()
    }

    /// Wakes the last snapshot as a VM, puts it to sleep, and wakes that ten times.
    fn fork(&self, assets: &Assets, stopped_at: u64) -> Result<()> {
        let guest = guest_for_run(assets, Machine::Q35, MEMORY_MIB, &format!("{SNAPSHOT}:{DISK}"))?;
        let path = self.first.join("guest.json");
        fs::write(&path, guest.to_string())?;
        let path = path.to_str().context("a path in UTF-8")?;
        let (_, without_trace) = self.wake_lazily(path)?;
        // The trace is stored as its memory is let go of; the next wake shall find nothing in our caches.
        self.json(&["kill", "box"])?;
        self.wait_for_trace()?;
        self.end_vms()?;
        let (goes_on_at, with_trace) = self.wake_lazily(path)?;
        println!(
            "demo: awake as a VM, nothing copied: its first command has its output {without_trace:.2} s \
             after the wake without a trace, {with_trace:.2} s with one; counting on at {goes_on_at}"
        );
        ensure!(goes_on_at > stopped_at, "the guest began anew: {goes_on_at} after {stopped_at}");
        let slept = self.json(&["sleep", "box"])?;
        let seconds = |name: &str| slept[name].as_f64().unwrap_or_default();
        println!(
            "demo: asleep again as {}: {} written, frozen {:.2} s (QEMU {:.2} s), durable after {:.2} s",
            slept["snapshot"].as_str().unwrap_or("?"),
            mib(slept["written_bytes"].as_u64().unwrap_or(0)),
            seconds("frozen_seconds"),
            seconds("vmm_seconds"),
            seconds("durable_seconds"),
        );
        let names: Vec<String> = (1..=FORKS).map(|number| format!("fork-{number}")).collect();
        let mut arguments = vec!["fork", SNAPSHOT];
        arguments.extend(names.iter().map(String::as_str));
        let begun = Instant::now();
        let forks = self.json(&arguments)?;
        let took = begun.elapsed();
        let mut processes = Vec::new();
        for fork in forks["forks"].as_array().context("no forks")? {
            processes.push(fork["pid"].as_u64().context("a fork without a process")?);
        }
        for name in &names {
            let counts_at = self.console(name)?.wait_counter()?;
            ensure!(counts_at > goes_on_at, "{name} began anew: {counts_at}");
        }
        println!("demo: {FORKS} forks awake after {:.1} s, each counts on", took.as_secs_f64());
        let mut memory = 0;
        for process in processes {
            memory += proportional_bytes(process)?;
        }
        let mut disks = 0;
        for name in &names {
            disks += allocated_bytes(&self.store.join("live").join(name).join("disk"))?;
        }
        // Of a copy of the disk: what it takes where holes are kept.
        let copy = self.second.join("disk").join(DISK);
        let copy =
            fs::metadata(&copy).with_context(|| format!("no {}", copy.display()))?.blocks() * 512;
        let mut table = Table::new();
        table.set_header(["", "memory", "disk"]);
        let copies = FORKS as u64;
        for (what, memory, disk) in [
            (format!("{FORKS} forks, QEMU's own included"), memory, disks),
            (
                format!("{FORKS} full copies, without QEMU"),
                copies * (MEMORY_MIB << 20),
                copies * copy,
            ),
        ] {
            table.add_row([what, mib(memory), mib(disk)]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        println!("{table}");
        Ok(())
    }

    /// Wakes the newest snapshot and has its guest do something; where it counts, and after how many
    /// seconds it has done that.
    fn wake_lazily(&self, guest: &str) -> Result<(u64, f64)> {
        let begun = Instant::now();
        self.json(&["wake", SNAPSHOT, "--as", "box", "--guest", guest])?;
        let mut console = self.console("box")?;
        // Its counter sleeps a second in between, and would tell how long that is.
        console.check(FIRST_COMMAND)?;
        let elapsed = begun.elapsed().as_secs_f64();
        Ok((console.wait_counter()?, elapsed))
    }

    /// Waits until a wake that is over has left its trace.
    fn wait_for_trace(&self) -> Result<()> {
        let begun = Instant::now();
        while !self
            .dormouse()
            .args(["--json", "trace", "show", SNAPSHOT])
            .output()?
            .status
            .success()
        {
            ensure!(begun.elapsed() < TRACE_TIMEOUT, "the wake left no trace");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Ends all VMs and the process that served them.
    fn end_vms(&self) -> Result<()> {
        let all = self.json(&["ps"])?;
        for vm in all["vms"].as_array().into_iter().flatten() {
            self.json(&["kill", vm["name"].as_str().unwrap_or_default()])?;
        }
        let files = self.store.join("live/.plane/files");
        if files.exists() {
            run_command(Command::new("umount").arg(files))?;
        }
        Ok(())
    }

    fn console(&self, live: &str) -> Result<Console> {
        Console::connect(&self.store.join("live").join(live).join("vmm/serial"))
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = output_of(self.dormouse().arg("--json").args(arguments))?;
        serde_json::from_str(&text).with_context(|| format!("dormouse printed no JSON: {text}"))
    }

    fn dormouse(&self) -> Command {
        let mut command = Command::new(&self.command);
        command.arg("--store").arg(&self.store);
        command
    }
}

/// What a process has of memory: pages that several have count in parts.
fn proportional_bytes(process: u64) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))
        .with_context(|| format!("process {process} is gone"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.context("no Pss in smaps_rollup")? << 10)
}

/// What the files below a folder take.
fn allocated_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += metadata.blocks() * 512;
        if metadata.is_dir() {
            bytes += allocated_bytes(&entry.path())?;
        }
    }
    Ok(bytes)
}

fn count(guest: &Guest) -> Result<u64> {
    guest.counter().context("the guest has not counted yet")
}

/// A table row from the JSON that `dormouse commit` prints.
fn row(pause: Pause, report: &Value) -> Result<Vec<String>> {
    let figure = |name: &str| {
        report["figures"][name].as_u64().with_context(|| format!("no figures.{name} in {report}"))
    };
    let seconds = |name: &str| {
        report["seconds"][name].as_f64().with_context(|| format!("no seconds.{name} in {report}"))
    };
    // Everything that the commit wrote: pack with maps, index run, manifest.
    let Some(stored) = report["written_bytes"].as_u64() else {
        bail!("no written_bytes in {report}");
    };
    let raw = figure("raw_bytes")?;
    let tenths = raw * 10 / stored.max(1);
    Ok(vec![
        pause.number().to_string(),
        pause.title().to_owned(),
        mib(raw),
        mib(figure("nonzero_bytes")?),
        mib(stored),
        format!("{}.{}", tenths / 10, tenths % 10),
        format!("{:.2}", seconds("total")?),
        format!("{:.2}", seconds("fsync")?),
    ])
}

fn mib(bytes: u64) -> String {
    let tenths = bytes * 10 / (1 << 20);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}
