//! A Cloud Hypervisor. Its memory is memfds, one for each region; ranges are saved in an order that
//! is not that of addresses, as a hash map gives them.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

use super::api::{Api, Call, Reply, serve};
use super::disk::DiskState;
use super::guest::{Guest, GuestState};
use super::offload;
use super::postcopy::{Part, Postcopy};
use crate::vmm::{Backing, PAGE_BYTES, RegionAddress};

const MIB: u64 = 1 << 20;
/// Where memory above the hole for devices begins.
const HIGH: u64 = 4 << 30;
/// How long a restore on demand fills memory behind a guest's back.
const FILLS: Duration = Duration::from_millis(150);

/// Is a Cloud Hypervisor, with the arguments of one.
pub fn run(args: &[String], out: Option<PathBuf>) -> Result<()> {
    let version = std::env::var("DORMOUSE_DOUBLE_VERSION").unwrap_or("53.0".to_owned());
    let major: u32 = version.split('.').next().unwrap_or_default().parse()?;
    if args.iter().any(|arg| arg == "--version" || arg == "-V") {
        let text = format!("cloud-hypervisor v{version}\n");
        return match &out {
            Some(path) => Ok(std::fs::write(path, text)?),
            None => Ok(std::io::stdout().write_all(text.as_bytes())?),
        };
    }
    let mut options: Vec<(String, Vec<String>)> = Vec::new();
    for arg in args {
        match arg.strip_prefix("--") {
            Some(name) => options.push((name.to_owned(), Vec::new())),
            None => options.last_mut().context("a value without an option")?.1.push(arg.clone()),
        }
    }
    let values = |name: &'static str| {
        options.iter().filter(move |option| option.0 == name).flat_map(|option| &option.1)
    };
    let api = values("api-socket").next().context("--api-socket")?;
    let api = field(api, "path").unwrap_or_else(|| api.clone());
    let mut ch = CloudHypervisor {
        version,
        major,
        config: None,
        vm: None,
        saved_in: None,
        fills_until: None,
        postcopy: None,
        console: out,
    };
    if let Some(memory) = values("memory").next() {
        let size = field(memory, "size").context("--memory size")?;
        let mib: u64 = match size.strip_suffix('G') {
            Some(gib) => gib.parse::<u64>()? * 1024,
            None => size.trim_end_matches('M').parse()?,
        };
        let cpus = values("cpus").next().and_then(|cpus| field(cpus, "boot")).unwrap_or("1".into());
        let disks = values("disk").enumerate().map(|(number, disk)| {
            json!({
                "path": field(disk, "path"),
                "readonly": field(disk, "readonly").as_deref() == Some("on"),
                "id": field(disk, "id").unwrap_or(format!("_disk{number}")),
                "image_type": "Raw",
            })
        });
        let nets = values("net").enumerate().map(|(number, net)| {
            json!({ "tap": field(net, "tap"), "id": field(net, "id").unwrap_or(format!("_net{number}")) })
        });
        let mut config = json!({
            "cpus": { "boot_vcpus": cpus.parse::<u64>()?, "max_vcpus": cpus.parse::<u64>()? },
            "memory": {
                "size": mib * MIB,
                "shared": field(memory, "shared").as_deref() == Some("on"),
                "thp": true,
            },
            "disks": disks.collect::<Vec<_>>(),
            "net": nets.collect::<Vec<_>>(),
            "payload": { "kernel": values("kernel").next() },
            "watchdog": false,
        });
        if let Some(vsock) = values("vsock").next() {
            config["vsock"] = json!({ "cid": 3, "socket": field(vsock, "socket") });
        }
        ch.boot(config)?;
    }
    if let Some(restore) = values("restore").next() {
        let is_on = |name: &str| matches!(field(restore, name).as_deref(), Some("on" | "true"));
        let mode = match field(restore, "memory_restore_mode").as_deref() {
            Some("ondemand") => "OnDemand",
            _ => "Copy",
        };
        ch.restore(&json!({
            "source_url": field(restore, "source_url"),
            "memory_restore_mode": mode,
            "resume": is_on("resume"),
        }))?;
    }
    serve(Path::new(&api), ch)
}

/// A field of an option: `path=/x,readonly=on`.
fn field(option: &str, name: &str) -> Option<String> {
    let mut value = option.split(',').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
    if let Some(quoted) = value.and_then(|value| value.strip_prefix('"')) {
        value = quoted.strip_suffix('"').or(Some(quoted));
    }
    value.map(str::to_owned)
}

struct CloudHypervisor {
    version: String,
    major: u32,
    config: Option<Value>,
    vm: Option<Vm>,
    saved_in: Option<PathBuf>,
    fills_until: Option<Instant>,
    postcopy: Option<Postcopy>,
    console: Option<PathBuf>,
}

struct Vm {
    guest: Guest,
    memory: Vec<File>,
    region_bytes: Vec<u64>,
}

impl Api for CloudHypervisor {
    fn call(&mut self, call: &Call) -> Reply {
        match self.answer(call) {
            Ok(reply) => reply,
            Err(error) => {
                let chain: Vec<String> = std::iter::once("Error from API".to_owned())
                    .chain(error.chain().map(ToString::to_string))
                    .collect();
                let is_missing = self.vm.is_none() && self.major >= 50;
                let status = if is_missing { 404 } else { 500 };
                Reply { status, body: Some(json!(chain).to_string()), ends: false }
            }
        }
    }

    fn state_folder(&self) -> Option<PathBuf> {
        self.saved_in.clone()
    }
}

impl CloudHypervisor {
    fn answer(&mut self, call: &Call) -> Result<Reply> {
        let body: Value = match call.body.as_slice() {
            [] => Value::Null,
            bytes => serde_json::from_slice(bytes).context("Failed to deserialize JSON")?,
        };
        let name = call.path.strip_prefix("/api/v1/").unwrap_or(&call.path);
        match (call.method.as_str(), name) {
            ("GET", "vmm.ping") => Ok(Reply::json(&json!({
                "build_version": format!("v{}", self.version),
                "version": format!("{}.0", self.version),
                "pid": std::process::id(),
                "features": ["kvm"],
            }))),
            ("GET", "vm.info") => {
                let is_running = self.vm()?.guest.lock().is_running;
                Ok(Reply::json(&json!({
                    "config": self.config,
                    "state": if is_running { "Running" } else { "Paused" },
                    "memory_actual_size": self.vm()?.region_bytes.iter().sum::<u64>(),
                    "device_tree": null,
                })))
            }
            ("GET", "/double/report") => {
                let guest = self.vm()?.guest.lock();
                Ok(Reply::json(
                    &json!({ "count": guest.state.count, "is_running": guest.is_running }),
                ))
            }
            ("PUT", "/double/verify") => {
                self.vm()?.guest.lock().verify()?;
                Ok(Reply::empty(204))
            }
            ("PUT", "/double/touch") => {
                let touched = self.vm()?.guest.lock().touch(&body)?;
                Ok(Reply::json(&touched))
            }
            ("PUT", "vm.pause") => self.set_running(false),
            ("PUT", "vm.resume") => self.set_running(true),
            ("PUT", "vm.snapshot") => {
                self.snapshot(&body).context("The VM could not be snapshotted")?;
                Ok(Reply::empty(204))
            }
            ("PUT", "vm.restore") => {
                self.restore(&body).context("The VM could not be restored")?;
                Ok(Reply::empty(204))
            }
            ("PUT", "vm.send-migration") => {
                let keeps = self.send(&body).context("Error sending migration")?;
                Ok(Reply { status: 204, body: None, ends: !keeps })
            }
            ("PUT", "vm.receive-migration") => {
                self.receive(&body).context("Error receiving migration")?;
                Ok(Reply::empty(204))
            }
            ("PUT", "vmm.shutdown") => Ok(Reply { status: 204, body: None, ends: true }),
            _ => Ok(Reply { status: 404, body: Some("[\"Not Found\"]".to_owned()), ends: false }),
        }
    }

    fn vm(&self) -> Result<&Vm> {
        self.vm.as_ref().context("The VM is not created")
    }

    fn set_running(&mut self, is_running: bool) -> Result<Reply> {
        let mut guest = self.vm()?.guest.lock();
        if guest.is_running == is_running {
            bail!("InvalidStateTransition");
        }
        guest.is_running = is_running;
        Ok(Reply::empty(204))
    }

    fn boot(&mut self, config: Value) -> Result<()> {
        let disk = |disk: &Value| {
            Ok(DiskState {
                id: disk["id"].as_str().context("id")?.to_owned(),
                path: disk["path"].as_str().context("path")?.into(),
                is_read_only: disk["readonly"] == true,
                is_async: true,
                written: Vec::new(),
            })
        };
        let state = GuestState {
            seed: 0x5eed,
            region_bytes: regions(config["memory"]["size"].as_u64().context("size")?)?,
            cpus: usize::try_from(config["cpus"]["boot_vcpus"].as_u64().unwrap_or(1))?.clamp(1, 8),
            disks: config["disks"]
                .as_array()
                .into_iter()
                .flatten()
                .map(disk)
                .collect::<Result<_>>()?,
            count: 0,
        };
        let (memory, seed) = (memory(&state.region_bytes)?, state.seed);
        self.start(config, state, memory, None)?;
        let mut guest = self.vm()?.guest.lock();
        guest.vmm.guest.memory.fill(seed);
        guest.is_running = true;
        Ok(())
    }

    fn start(
        &mut self,
        config: Value,
        mut state: GuestState,
        memory: Vec<File>,
        oracle: Option<&[u8]>,
    ) -> Result<()> {
        // Disks are where the configuration says, whatever the state knew.
        for disk in &mut state.disks {
            let configured = config["disks"].as_array().into_iter().flatten();
            let path = configured
                .filter(|known| known["id"] == disk.id.as_str())
                .find_map(|known| known["path"].as_str());
            disk.path = path.context("a disk that is not configured")?.into();
        }
        let paths = memory.iter().map(|file| format!("/proc/self/fd/{}", file.as_raw_fd()).into());
        let region_bytes = state.region_bytes.clone();
        let backing = Backing::SharedFiles(paths.collect());
        let guest = Guest::start(state, backing, oracle, self.console.clone())?;
        self.vm = Some(Vm { guest, memory, region_bytes });
        self.config = Some(config);
        Ok(())
    }

    /// Configuration, state, and the places of regions in the order in which they are saved.
    fn saved(&self) -> Result<(Value, Value, Vec<usize>)> {
        let vm = self.vm()?;
        let mut guest = vm.guest.lock();
        ensure!(!guest.is_running, "The VM is not paused");
        let state = guest.saved();
        let oracle: String =
            guest.vmm.guest.oracle.save().iter().map(|byte| format!("{byte:02x}")).collect();
        let order: Vec<usize> = (0..vm.region_bytes.len()).rev().collect();
        let ranges: Vec<Value> = order
            .iter()
            .map(|region| json!({ "gpa": address(*region), "length": vm.region_bytes[*region] }))
            .collect();
        let node = |state: Value| json!({ "snapshots": {}, "snapshot_data": { "state": state.to_string() } });
        let tree = json!({
            "snapshots": {
                "cpu-manager": node(json!({ "vcpus": state.cpus })),
                "memory-manager": node(json!({
                    "memory_ranges": { "data": ranges },
                    "guest_ram_mappings": mappings(&vm.region_bytes),
                    "next_memory_slot": vm.region_bytes.len(),
                })),
                "device-manager": node(json!({ "guest": state, "oracle": oracle })),
            },
            "snapshot_data": null,
        });
        Ok((self.config.clone().context("no configuration")?, tree, order))
    }

    fn snapshot(&mut self, body: &Value) -> Result<()> {
        let folder = file_url(body["destination_url"].as_str().context("destination_url")?)?;
        self.check_filled()?;
        self.saved_in = Some(folder.clone());
        let (config, state, order) = self.saved()?;
        let create = |name: &str| {
            let mut options = File::options();
            options.write(true).create_new(true).mode(0o600);
            options.open(folder.join(name)).with_context(|| format!("cannot create {name}"))
        };
        create("config.json")?.write_all(config.to_string().as_bytes())?;
        create("state.json")?.write_all(state.to_string().as_bytes())?;
        let file = create("memory-ranges")?;
        let vm = self.vm()?;
        file.set_len(vm.region_bytes.iter().sum())?;
        let mut offset = 0;
        for region in order {
            dump(&vm.memory[region], &file, offset, vm.region_bytes[region])?;
            offset += vm.region_bytes[region];
        }
        Ok(())
    }

    fn restore(&mut self, body: &Value) -> Result<()> {
        ensure!(self.vm.is_none(), "The VM is already created");
        let folder = file_url(body["source_url"].as_str().context("source_url")?)?;
        let read = |name: &str| -> Result<Value> {
            let bytes =
                std::fs::read(folder.join(name)).with_context(|| format!("cannot read {name}"))?;
            serde_json::from_slice(&bytes).with_context(|| format!("cannot parse {name}"))
        };
        let (config, tree) = (read("config.json")?, read("state.json")?);
        let manager = inner(&tree, "memory-manager")?;
        let (state, oracle) = guest_of(&tree)?;
        let memory = memory(&state.region_bytes)?;
        let file = File::open(folder.join("memory-ranges")).context("cannot open memory-ranges")?;
        let mut offset = 0;
        for range in manager["memory_ranges"]["data"].as_array().context("memory_ranges")? {
            let (gpa, length) =
                (range["gpa"].as_u64(), range["length"].as_u64().context("length")?);
            let region = (0..memory.len()).find(|region| Some(address(*region)) == gpa);
            copy(&file, offset, &memory[region.context("a range elsewhere")?], 0, length)?;
            offset += length;
        }
        self.start(config, state, memory, Some(&oracle))?;
        let is_late = self.major >= 52;
        if is_late && body["memory_restore_mode"] == "OnDemand" {
            self.fills_until = Some(Instant::now() + FILLS);
        }
        self.vm()?.guest.lock().is_running = is_late && body["resume"] == true;
        Ok(())
    }

    /// Whether the guest stays.
    fn send(&mut self, body: &Value) -> Result<bool> {
        let is_kept = self.major >= 54 && body["preserve_source"] == true;
        ensure!(body["local"] == true, "only local migrations are played");
        self.check_filled()?;
        let was_running = self.vm()?.guest.lock().is_running;
        self.vm()?.guest.lock().is_running = false;
        let shared = self.config.as_ref().is_some_and(|config| config["memory"]["shared"] == true);
        let (config, state, _) = self.saved()?;
        let vm = self.vm()?;
        let config = json!({
            "vm_config": config,
            "common_cpuid": [],
            "memory_manager_data": { "guest_ram_mappings": mappings(&vm.region_bytes) },
        });
        let memory: &[File] = if shared { &vm.memory } else { &[] };
        let url = body["destination_url"].as_str().context("destination_url")?;
        let sent = offload::send(
            Path::new(url.strip_prefix("unix:").context("a unix socket")?),
            memory,
            &config.to_string(),
            &state.to_string(),
            was_running,
        );
        if sent.is_err() {
            // Its guest is as it was.
            self.vm()?.guest.lock().is_running = was_running;
        }
        sent?;
        Ok(is_kept)
    }

    fn receive(&mut self, body: &Value) -> Result<()> {
        ensure!(self.vm.is_none(), "The VM is already created");
        let url = body["receiver_url"].as_str().context("receiver_url")?;
        let socket = Path::new(url.strip_prefix("unix:").context("a unix socket")?);
        let is_lazy = body["memory_mode"] == "Postcopy";
        let mut received = offload::receive(socket, is_lazy)?;
        let config: Value = serde_json::from_str(&received.config)?;
        let tree: Value = serde_json::from_str(&received.state)?;
        let (state, oracle) = guest_of(&tree)?;
        let memory = match received.memory.len() {
            0 => memory(&state.region_bytes)?,
            _ => std::mem::take(&mut received.memory),
        };
        ensure!(memory.len() == state.region_bytes.len(), "{} slots of memory", memory.len());
        let files: Vec<File> =
            memory.iter().map(File::try_clone).collect::<std::io::Result<_>>()?;
        self.start(config["vm_config"].clone(), state, memory, Some(&oracle))?;
        if let Some(faults) = received.faults.take() {
            let places = self.vm()?.guest.lock().vmm.guest.memory.addresses();
            let part = |(region, (place, file)): (usize, (&RegionAddress, File))| Part {
                gpa: address(region),
                addresses: place.address..place.address + place.size,
                file,
            };
            let parts = places.iter().zip(files).enumerate().map(part).collect();
            self.postcopy = Some(Postcopy::start(faults, parts, received.is_private)?);
        }
        // Devices are restored: they want the first pages, and wait for them.
        self.vm()?.guest.lock().vmm.touch((0..4).collect())?;
        received.answer_state()?;
        let is_running = received.finish()?;
        self.vm()?.guest.lock().is_running = is_running;
        Ok(())
    }

    fn check_filled(&self) -> Result<()> {
        let is_filling = self.fills_until.is_some_and(|until| Instant::now() < until)
            || self.postcopy.as_ref().is_some_and(Postcopy::is_filling);
        ensure!(!is_filling, "VM on-demand memory restore is still in progress");
        Ok(())
    }
}

fn regions(bytes: u64) -> Result<Vec<u64>> {
    match std::env::var("DORMOUSE_DOUBLE_REGIONS_MIB") {
        Ok(text) => {
            let regions: Vec<u64> =
                text.split(',').map(str::parse).collect::<std::result::Result<_, _>>()?;
            Ok(regions.into_iter().map(|mib| mib * MIB).collect())
        }
        Err(_) => Ok(vec![bytes]),
    }
}

/// The guest-physical address of a region.
fn address(region: usize) -> u64 {
    if region == 0 { 0 } else { HIGH + (region as u64 - 1) * (1 << 30) }
}

fn mappings(region_bytes: &[u64]) -> Value {
    let row = |(region, bytes): (usize, &u64)| {
        json!({
            "slot": region, "gpa": address(region), "size": bytes, "zone_id": "mem0",
            "virtio_mem": false, "file_offset": 0,
        })
    };
    region_bytes.iter().enumerate().map(row).collect()
}

fn memory(region_bytes: &[u64]) -> Result<Vec<File>> {
    let make = |bytes: &u64| {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC)?);
        file.set_len(*bytes)?;
        Ok(file)
    };
    region_bytes.iter().map(make).collect()
}

fn file_url(url: &str) -> Result<PathBuf> {
    let path = url.strip_prefix("file://").context("only file:// URLs are supported")?;
    Ok(PathBuf::from(path))
}

/// Writes all of it, in large pieces.
fn dump(from: &File, to: &File, to_offset: u64, length: u64) -> Result<()> {
    let mut piece = vec![0; 1 << 20];
    for at in (0..length).step_by(piece.len()) {
        let piece = &mut piece[..usize::try_from((length - at).min(1 << 20))?];
        from.read_exact_at(piece, at)?;
        to.write_all_at(piece, to_offset + at)?;
    }
    Ok(())
}

/// Copies what is not zero, page by page, as its readers on demand do.
fn copy(from: &File, from_offset: u64, to: &File, to_offset: u64, length: u64) -> Result<()> {
    let mut page = [0; PAGE_BYTES];
    for at in (0..length).step_by(PAGE_BYTES) {
        from.read_exact_at(&mut page, from_offset + at)?;
        if page.iter().any(|byte| *byte != 0) {
            to.write_all_at(&page, to_offset + at)?;
        }
    }
    Ok(())
}

fn inner(tree: &Value, node: &str) -> Result<Value> {
    let text = tree["snapshots"][node]["snapshot_data"]["state"].as_str();
    Ok(serde_json::from_str(text.with_context(|| format!("no state of {node}"))?)?)
}

fn guest_of(tree: &Value) -> Result<(GuestState, Vec<u8>)> {
    let manager = inner(tree, "device-manager")?;
    let oracle = manager["oracle"].as_str().context("no oracle")?;
    let byte = |at| u8::from_str_radix(&oracle[at..at + 2], 16);
    let oracle: Vec<u8> =
        (0..oracle.len()).step_by(2).map(byte).collect::<std::result::Result<_, _>>()?;
    Ok((serde_json::from_value(manager["guest"].clone())?, oracle))
}
