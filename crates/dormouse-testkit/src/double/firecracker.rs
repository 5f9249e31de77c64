//! A Firecracker.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::api::{Api, Call, Reply, serve};
use super::disk::DiskState;
use super::guest::{Guest, GuestState};
use super::state::{VmState, decode, encode, format_of};
use crate::vmm::{Backing, Manner, PAGE_BYTES, Version};

const MIB: u64 = 1 << 20;

/// Pages that devices touch while they are restored: faults before the load call returns.
const RESTORE_PAGES: usize = 16;

/// Options with a value that change nothing here.
const IGNORED: [&str; 12] = [
    "--seccomp-filter",
    "--start-time-us",
    "--start-time-cpu-us",
    "--parent-cpu-time-us",
    "--metadata",
    "--log-path",
    "--level",
    "--module",
    "--metrics-path",
    "--http-api-max-payload-size",
    "--mmds-size-limit",
    "--id",
];
/// And such without.
const IGNORED_FLAGS: [&str; 5] =
    ["--no-seccomp", "--show-level", "--show-log-origin", "--boot-timer", "--enable-pci"];

/// Is a Firecracker, with the arguments of one. `out` is where its standard output goes.
pub fn run(args: &[String], out: Option<PathBuf>) -> Result<()> {
    let version = std::env::var("DORMOUSE_DOUBLE_VERSION").unwrap_or("1.13.1".to_owned());
    let mut numbers = version.split('.').map(str::parse::<u32>);
    ensure!(numbers.next() == Some(Ok(1)), "{version} is no version of Firecracker");
    let minor = numbers.next().context("a version of two numbers")??;
    let patch = numbers.next().transpose()?.unwrap_or(0);
    let say = |text: &str| match &out {
        Some(path) => Ok(std::fs::write(path, text)?),
        None => {
            use std::io::Write;
            Ok::<(), anyhow::Error>(std::io::stdout().write_all(text.as_bytes())?)
        }
    };
    let (mut api, mut config) = (PathBuf::from("/run/firecracker.socket"), None);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} without a value"));
        match arg.as_str() {
            "--version" => return say(&format!("Firecracker v{version}\n")),
            "--snapshot-version" => {
                let [major, minor, patch] = format_of((minor, patch));
                return say(&format!("v{major}.{minor}.{patch}\n"));
            }
            "--describe-snapshot" => {
                decode((minor, patch), &std::fs::read(value()?)?)?;
                let [major, minor, patch] = format_of((minor, patch));
                return say(&format!("v{major}.{minor}.{patch}\n"));
            }
            "--api-sock" => api = value()?.into(),
            "--config-file" => config = Some(PathBuf::from(value()?)),
            ignored if IGNORED.contains(&ignored) => drop(value()?),
            ignored if IGNORED_FLAGS.contains(&ignored) => {}
            other => bail!("Found argument '{other}' which wasn't expected"),
        }
    }
    let mut firecracker = Firecracker {
        version,
        minor,
        patch,
        machine: json!({"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false}),
        drives: BTreeMap::new(),
        networks: Vec::new(),
        vsock: None,
        is_configured: false,
        guest: None,
        saved_in: None,
        console: out,
    };
    if let Some(path) = config {
        firecracker.configure(&serde_json::from_slice(&std::fs::read(path)?)?)?;
        firecracker.boot()?;
    }
    serve(&api, firecracker)
}

struct Firecracker {
    version: String,
    minor: u32,
    patch: u32,
    machine: Value,
    drives: BTreeMap<String, Value>,
    networks: Vec<Value>,
    vsock: Option<Value>,
    /// Something that a boot needs was said: nothing can be loaded any more.
    is_configured: bool,
    guest: Option<Guest>,
    saved_in: Option<PathBuf>,
    console: Option<PathBuf>,
}

/// A refusal: the words of a fault message, and whether the process ends with it.
struct Refusal(String, bool);

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Refusal {
        Refusal(format!("{error:#}"), false)
    }
}

type Answer = std::result::Result<Reply, Refusal>;

impl Api for Firecracker {
    fn call(&mut self, call: &Call) -> Reply {
        self.answer(call).unwrap_or_else(|Refusal(message, ends)| Reply {
            status: 400,
            body: Some(json!({ "fault_message": message }).to_string()),
            ends,
        })
    }

    fn state_folder(&self) -> Option<PathBuf> {
        self.saved_in.clone()
    }
}

impl Firecracker {
    fn answer(&mut self, call: &Call) -> Answer {
        let body: Value = match call.body.as_slice() {
            [] => Value::Null,
            bytes => {
                serde_json::from_slice(bytes).map_err(|error| malformed(&error.to_string()))?
            }
        };
        let parts: Vec<&str> = call.path.trim_start_matches('/').split('/').collect();
        match (call.method.as_str(), parts.as_slice()) {
            ("GET", [""]) => Ok(Reply::json(&json!({
                "id": "anonymous-instance",
                "state": self.state(),
                "vmm_version": self.version,
                "app_name": "Firecracker",
            }))),
            ("GET", ["version"]) => {
                Ok(Reply::json(&json!({ "firecracker_version": self.version })))
            }
            ("GET", ["machine-config"]) => Ok(Reply::json(&self.machine)),
            ("GET", ["double", "report"]) => {
                let guest = self.guest()?.lock();
                Ok(Reply::json(
                    &json!({ "count": guest.state.count, "is_running": guest.is_running }),
                ))
            }
            ("PUT", ["double", "verify"]) => {
                self.guest()?.lock().verify()?;
                Ok(Reply::empty(204))
            }
            ("PUT", ["double", "touch"]) => Ok(Reply::json(&self.guest()?.lock().touch(&body)?)),
            ("PUT", ["machine-config" | "boot-source" | "vsock" | "balloon" | "entropy"])
            | ("PUT", ["drives" | "network-interfaces", _]) => {
                if self.guest.is_some() {
                    return Err(post_boot());
                }
                let config = match parts[0] {
                    list @ ("drives" | "network-interfaces") => json!({ list: [body] }),
                    one => json!({ one: body }),
                };
                self.configure(&config)?;
                Ok(Reply::empty(204))
            }
            ("PUT", ["actions"]) if body["action_type"] == "InstanceStart" => {
                if self.guest.is_some() {
                    return Err(post_boot());
                }
                self.boot()?;
                Ok(Reply::empty(204))
            }
            ("PUT", ["logger" | "metrics"]) => Ok(Reply::empty(204)),
            ("PATCH", ["vm"]) => self.set_state(&body),
            ("PATCH", ["drives", id]) => self.patch_drive(id, &body),
            ("PUT", ["snapshot", "create"]) => self.create(&body),
            ("PUT", ["snapshot", "load"]) => self.load(&body),
            _ => {
                let message =
                    format!("Invalid request method and/or path: {} {}.", call.method, call.path);
                Err(Refusal(message, false))
            }
        }
    }

    fn state(&self) -> &'static str {
        match &self.guest {
            None => "Not started",
            Some(guest) if guest.lock().is_running => "Running",
            Some(_) => "Paused",
        }
    }

    fn guest(&self) -> std::result::Result<&Guest, Refusal> {
        self.guest.as_ref().ok_or_else(|| {
            let message =
                "The requested operation is not supported before starting the microVM.".to_owned();
            Refusal(message, false)
        })
    }

    fn configure(&mut self, config: &Value) -> Result<()> {
        self.is_configured = true;
        let list = |name: &str| config[name].as_array().cloned().unwrap_or_default();
        if let Some(fields) = config["machine-config"].as_object() {
            for (name, value) in fields {
                self.machine[name] = value.clone();
            }
        }
        for drive in list("drives") {
            let id = drive["drive_id"].as_str().context("a drive without an id")?.to_owned();
            self.drives.insert(id, drive);
        }
        self.networks.extend(list("network-interfaces"));
        if config["vsock"].is_object() {
            self.vsock = Some(config["vsock"].clone());
        }
        Ok(())
    }

    fn boot(&mut self) -> Result<()> {
        let mib = self.machine["mem_size_mib"].as_u64().context("mem_size_mib")?;
        let disks = self.drives.iter().map(|(id, drive)| {
            Ok(DiskState {
                id: id.clone(),
                path: drive["path_on_host"].as_str().context("path_on_host")?.into(),
                is_read_only: drive["is_read_only"] == true,
                is_async: drive["io_engine"] == "Async",
                written: Vec::new(),
            })
        });
        let state = GuestState {
            seed: 0x5eed,
            region_bytes: self.regions(mib)?,
            cpus: usize::try_from(self.machine["vcpu_count"].as_u64().unwrap_or(1))?.clamp(1, 8),
            disks: disks.collect::<Result<_>>()?,
            count: 0,
        };
        let guest = Guest::start(state, Backing::Own, None, self.console.clone())?;
        guest.lock().is_running = true;
        self.guest = Some(guest);
        Ok(())
    }

    /// The bytes of the regions of memory.
    fn regions(&self, mib: u64) -> Result<Vec<u64>> {
        if let Ok(text) = std::env::var("DORMOUSE_DOUBLE_REGIONS_MIB") {
            let regions: Vec<u64> =
                text.split(',').map(str::parse).collect::<std::result::Result<_, _>>()?;
            ensure!(regions.iter().sum::<u64>() == mib, "regions of {text} MiB, and {mib} in all");
            return Ok(regions.into_iter().map(|mib| mib * MIB).collect());
        }
        let low = if self.minor >= 13 { 3072 } else { 3328 };
        let split = if mib > low { vec![low, mib - low] } else { vec![mib] };
        Ok(split.into_iter().map(|mib| mib * MIB).collect())
    }

    fn set_state(&mut self, body: &Value) -> Answer {
        known(body, &["state"])?;
        let is_running = match body["state"].as_str() {
            Some("Paused") => false,
            Some("Resumed") => true,
            _ => return Err(malformed("unknown variant, expected `Paused` or `Resumed`")),
        };
        self.guest()?.lock().is_running = is_running;
        Ok(Reply::empty(204))
    }

    fn patch_drive(&mut self, id: &str, body: &Value) -> Answer {
        known(body, &["drive_id", "path_on_host", "rate_limiter"])?;
        if body["drive_id"] != id {
            return Err(Refusal(
                "The id from the path does not match the id from the body!".to_owned(),
                false,
            ));
        }
        let mut guest = self.guest()?.lock();
        let disk = guest.disks.iter_mut().find(|disk| disk.state.id == id);
        let Some(disk) = disk else {
            return Err(Refusal(
                format!(
                    "Drive config error: Unable to patch the block device: Device {id} not found"
                ),
                false,
            ));
        };
        if let Some(path) = body["path_on_host"].as_str() {
            disk.replace(Path::new(path)).map_err(|error| {
                Refusal(
                    format!("Drive config error: Unable to patch the block device: {error:#}"),
                    false,
                )
            })?;
        }
        Ok(Reply::empty(204))
    }

    fn create(&mut self, body: &Value) -> Answer {
        known(body, &["snapshot_type", "snapshot_path", "mem_file_path"])?;
        let path = |name: &str| {
            body[name]
                .as_str()
                .map(PathBuf::from)
                .ok_or_else(|| malformed(&format!("missing field `{name}`")))
        };
        let (state_path, memory_path) = (path("snapshot_path")?, path("mem_file_path")?);
        let is_diff = body["snapshot_type"] == "Diff";
        self.saved_in = state_path.parent().map(Path::to_owned);
        let is_tracked = self.machine["track_dirty_pages"] == true;
        let mut guest = self.guest()?.lock();
        if guest.is_running {
            let message =
                "Create snapshot error: Cannot save the microVM state: The vCPUs are running";
            return Err(Refusal(message.to_owned(), false));
        }
        // The state first, which drains the disks; then memory.
        let state = VmState {
            guest: guest.saved(),
            mem_size_mib: self.machine["mem_size_mib"].as_u64().unwrap_or(0),
            networks: self.networks.clone(),
            vsock: self.vsock.clone(),
        };
        let bytes = encode((self.minor, self.patch), &state, &guest.vmm.guest.oracle.save())?;
        let failed = |error: std::io::Error| {
            Refusal(
                format!(
                    "Create snapshot error: Cannot perform open on the snapshot backing file: {error}"
                ),
                false,
            )
        };
        let file = File::create(&state_path).map_err(failed)?;
        file.write_all_at(&bytes, 0).and_then(|()| file.sync_all()).map_err(failed)?;
        let failed = |error: std::io::Error| {
            Refusal(
                format!(
                    "Create snapshot error: Cannot perform write on the memory backing file: {error}"
                ),
                false,
            )
        };
        let total: u64 = state.guest.region_bytes.iter().sum();
        let memory = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&memory_path)
            .map_err(failed)?;
        let length = memory.metadata().map_err(failed)?.len();
        if length != total {
            memory.set_len(0).and_then(|()| memory.set_len(total)).map_err(failed)?;
        }
        let oracle = &guest.vmm.guest.oracle;
        let mut cursor = Cursor::new(&state.guest.region_bytes, self.minor == 14 && self.patch < 2);
        guest.dump(|first, bytes| {
            // Pages that follow each other are written at once.
            let mut run: Option<(u64, std::ops::Range<usize>)> = None;
            let write = |run: Option<(u64, std::ops::Range<usize>)>| match run {
                Some((at, range)) => memory.write_all_at(&bytes[range], at),
                None => Ok(()),
            };
            for (page, start) in (first..).zip((0..bytes.len()).step_by(PAGE_BYTES)) {
                let is_written = !is_diff || !is_tracked || oracle.is_written(page);
                let at = cursor.at(page, is_diff, is_written);
                run = match (run, at) {
                    (Some((from, range)), Some(at))
                        if range.end == start && from + range.len() as u64 == at =>
                    {
                        Some((from, range.start..start + PAGE_BYTES))
                    }
                    (before, at) => {
                        write(before)?;
                        at.map(|at| (at, start..start + PAGE_BYTES))
                    }
                };
            }
            Ok(write(run)?)
        })?;
        memory.sync_all().map_err(failed)?;
        guest.vmm.guest.oracle.mark();
        Ok(Reply::empty(204))
    }

    fn load(&mut self, body: &Value) -> Answer {
        let mut fields = vec![
            "snapshot_path",
            "mem_file_path",
            "mem_backend",
            "enable_diff_snapshots",
            "resume_vm",
        ];
        for (since, field) in [
            (12, "network_overrides"),
            (13, "track_dirty_pages"),
            (16, "vsock_override"),
            (16, "clock_realtime"),
            (17, "huge_pages"),
        ] {
            if self.minor >= since {
                fields.push(field);
            }
        }
        known(body, &fields)?;
        known(&body["mem_backend"], &["backend_path", "backend_type"])?;
        if self.guest.is_some() {
            return Err(post_boot());
        }
        if self.is_configured {
            let message = "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.";
            return Err(Refusal(message.to_owned(), false));
        }
        // From here on a failure leaves nothing that could be used.
        self.restore(body).map_err(|error| {
            Refusal(
                format!("Load snapshot error: Failed to restore from snapshot: {error:#}"),
                true,
            )
        })?;
        Ok(Reply::empty(204))
    }

    fn restore(&mut self, body: &Value) -> Result<()> {
        let text = |value: &Value, name: &str| {
            value[name]
                .as_str()
                .map(PathBuf::from)
                .with_context(|| format!("missing field `{name}`"))
        };
        let bytes =
            std::fs::read(text(body, "snapshot_path")?).context("Failed to get snapshot state")?;
        let (mut state, oracle) =
            decode((self.minor, self.patch), &bytes).context("Failed to get snapshot state")?;
        for network in body["network_overrides"].as_array().into_iter().flatten() {
            let known =
                state.networks.iter_mut().find(|known| known["iface_id"] == network["iface_id"]);
            known.context("Unknown Network Device.")?["host_dev_name"] =
                network["host_dev_name"].clone();
        }
        if let Some(path) = body["vsock_override"]["uds_path"].as_str() {
            state.vsock.as_mut().context("Unknown Vsock Device.")?["uds_path"] = json!(path);
        }
        let (path, kind) = match &body["mem_backend"] {
            Value::Null => (text(body, "mem_file_path")?, "File"),
            backend => (
                text(backend, "backend_path")?,
                backend["backend_type"].as_str().context("missing field `backend_type`")?,
            ),
        };
        let total: u64 = state.guest.region_bytes.iter().sum();
        let backing = match kind {
            "File" => {
                let length = std::fs::metadata(&path).context("Cannot open the memory file")?.len();
                ensure!(length >= total, "Failed to load guest memory: OffsetTooLarge");
                Backing::PrivateFile(path)
            }
            "Uffd" => {
                let version = if self.minor >= 12 { Version::V1_12 } else { Version::V1_7 };
                Backing::Uffd { socket: path, version, manner: Manner::AtOnce }
            }
            other => bail!("unknown variant `{other}`, expected `File` or `Uffd`"),
        };
        self.machine["mem_size_mib"] = json!(state.mem_size_mib);
        self.machine["vcpu_count"] = json!(state.guest.cpus);
        let is_tracked = body["track_dirty_pages"] == true || body["enable_diff_snapshots"] == true;
        self.machine["track_dirty_pages"] = json!(is_tracked);
        let guest = Guest::start(state.guest, backing, Some(&oracle), self.console.clone())?;
        let mut inner = guest.lock();
        // Devices are restored: they read their rings.
        let mut first = vec![0; RESTORE_PAGES * PAGE_BYTES];
        inner.vmm.guest.memory.dump(0, &mut first)?;
        inner.is_running = body["resume_vm"] == true;
        drop(inner);
        (self.networks, self.vsock, self.guest) = (state.networks, state.vsock, Some(guest));
        Ok(())
    }
}

/// Where pages go in a memory file; in 1.14.0 and 1.14.1 a diff's cursor stays where the last
/// dirty page of a region ended (#5705).
struct Cursor {
    /// The first page of each region, and the end.
    starts: Vec<u64>,
    is_broken: bool,
    region: usize,
    shift: u64,
    after_last: u64,
}

impl Cursor {
    fn new(region_bytes: &[u64], is_broken: bool) -> Cursor {
        let mut starts = vec![0];
        for bytes in region_bytes {
            starts.push(starts[starts.len() - 1] + bytes / PAGE_BYTES as u64);
        }
        Cursor { starts, is_broken, region: 0, shift: 0, after_last: 0 }
    }

    fn at(&mut self, page: u64, is_diff: bool, is_written: bool) -> Option<u64> {
        if self.is_broken && is_diff && page == self.starts[self.region + 1] {
            self.region += 1;
            self.shift += page - self.shift - self.after_last;
            self.after_last = page - self.shift;
        }
        let at = page - self.shift;
        if is_written {
            self.after_last = at + 1;
        }
        is_written.then_some(at * PAGE_BYTES as u64)
    }
}

fn malformed(why: &str) -> Refusal {
    let message =
        format!("An error occurred when deserializing the json body of a request: {why}.");
    Refusal(message, false)
}

fn post_boot() -> Refusal {
    let message = "The requested operation is not supported after starting the microVM.".to_owned();
    Refusal(message, false)
}

/// Refuses fields that this version does not know, as serde's `deny_unknown_fields` does.
fn known(body: &Value, fields: &[&str]) -> std::result::Result<(), Refusal> {
    let mut names = body.as_object().into_iter().flat_map(|fields| fields.keys());
    match names.find(|name| !fields.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => {
            Err(malformed(&format!("unknown field `{name}`, expected one of {fields:?}")))
        }
    }
}
