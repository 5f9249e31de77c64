//! VMs: listed, looked at, booted, stored, ended.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use anyhow::Context;
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use dormouse_store::name::Name;
use futures_util::stream;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::Daemon;
use super::answer::{Answer, Asked, ErrorObject, JobFailures, Named, Wanted};
use super::jobs::WaitParams;
use crate::daemon::jobs::{JobKind, JobView};
use crate::exit::Fault;
use crate::live::LiveFolder;
use crate::vm::guest::Guest;
use crate::vm::log_of;
use crate::vm::phase::Then;
use crate::vm::sleep::{SleepOptions, sleep as fall_asleep};
use crate::vm::wake::run as boot;

/// What of a log is sent at once.
const LOG_BYTES: usize = 64 << 10;

/// A name: letters, digits, and after the first of them dots, lines and dashes.
#[derive(ToSchema)]
#[schema(value_type = String, pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", example = "box")]
#[expect(dead_code, reason = "it is there to be described")]
pub(crate) struct NameText(String);

/// A VM, in a list.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VmObject {
    /// What it is called.
    #[schema(required = true)]
    name: String,
    /// `waking`, `awake`, `falling_asleep`, `failed`, or `damaged`, which has a problem and no more.
    #[schema(required = true)]
    state: String,
    /// Its VMM.
    vmm: Option<String>,
    /// The VMM's version.
    vmm_version: Option<String>,
    /// The snapshot that it woke from, or was last stored as.
    over: Option<String>,
    /// The VMM's process.
    pid: Option<u32>,
    /// When it was made.
    since: Option<String>,
    /// What is wrong with it.
    problem: Option<String>,
}

/// VMs.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VmsObject {
    /// By name.
    #[schema(value_type = Vec<VmObject>)]
    vms: Vec<Value>,
}

/// A disk of a VM.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VmDisk {
    /// Its id.
    id: String,
    /// What it lies over.
    base: String,
}

/// A VM, in full: beside what a list has of it, its disks, its VMM's socket, its log, its guest.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VmDetails {
    name: String,
    state: String,
    vmm: Option<String>,
    vmm_version: Option<String>,
    over: Option<String>,
    pid: Option<u32>,
    since: Option<String>,
    problem: Option<String>,
    /// Its disks.
    disks: Vec<VmDisk>,
    /// The socket of the VMM's API.
    api: String,
    /// What the VMM has said.
    log: String,
    /// How it is made, as docs/cli.md describes guests.
    #[schema(value_type = Object)]
    guest: Value,
}

/// How long a wake took.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AwakeSeconds {
    /// Everything.
    total: f64,
    /// Until disks and memory were there for the VMM.
    ready: f64,
    /// The VMM: its start, and loading the state.
    vmm: f64,
}

/// A VM that is awake now.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AwakeObject {
    /// What it is called.
    name: String,
    /// The snapshot that it woke from.
    over: Option<String>,
    /// The VMM's process.
    pid: u32,
    /// The socket of the VMM's API.
    api: String,
    seconds: AwakeSeconds,
}

/// A guest that stands still no longer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FrozenObject {
    /// For how long it did.
    frozen_seconds: f64,
}

/// A VM that was stored; with `wait=frozen` no more than `frozen_seconds` and `job`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SleptObject {
    /// The VM.
    name: Option<String>,
    /// The snapshot.
    snapshot: Option<String>,
    /// How long the guest stood still.
    #[schema(required = true)]
    frozen_seconds: f64,
    /// Of that, the VMM.
    vmm_seconds: Option<f64>,
    /// Until the snapshot was durable.
    durable_seconds: Option<f64>,
    /// What was written.
    written_bytes: Option<u64>,
    /// Whether the VM goes on.
    goes_on: Option<bool>,
    /// With `wait=frozen`, the job that stores it.
    #[schema(value_type = Option<String>, format = "uuid")]
    job: Option<String>,
}

/// A VM that is gone.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct KilledObject {
    /// What it was called.
    name: String,
    /// True.
    killed: bool,
}

/// What a guest is; docs/cli.md has it all.
#[derive(Serialize, ToSchema)]
pub(crate) struct GuestObject {
    /// How its VMM is launched.
    launch: LaunchObject,
    /// Its disks.
    #[serde(default)]
    disks: Vec<GuestDisk>,
    /// A command of the host that has the guest flush, run before it is paused.
    #[serde(default)]
    before_sleep: Vec<String>,
}

/// How a VMM is launched. In arguments `{disk:ID}` is a disk's path, `{folder}` the VM's folder, `{name}`
/// its name.
#[derive(Serialize, ToSchema)]
pub(crate) struct LaunchObject {
    /// `firecracker`, `cloud-hypervisor` or `qemu`.
    vmm: String,
    /// Its program.
    program: Option<String>,
    /// Its arguments; QEMU's have a `-machine`.
    #[serde(default)]
    args: Vec<String>,
    /// Arguments at a wake alone.
    #[serde(default)]
    wake_args: Vec<String>,
    /// Firecracker's configuration.
    #[schema(value_type = Option<Object>)]
    config: Option<Value>,
    /// Environment variables.
    #[serde(default)]
    environment: BTreeMap<String, String>,
    /// The folder it runs in.
    work_folder: Option<String>,
    /// QEMU's memory, a multiple of 4096.
    memory_bytes: Option<u64>,
    /// How Cloud Hypervisor hands a snapshot over: `files`, the default, or `descriptors`.
    transfer: Option<String>,
}

/// A disk of a guest: one of `from`, `from_file` and `size`.
#[derive(Serialize, ToSchema)]
pub(crate) struct GuestDisk {
    /// Its name.
    #[schema(value_type = NameText)]
    id: String,
    /// What it lies over when the guest boots: a snapshot's disk, `SNAP:ID`.
    from: Option<String>,
    /// The same, a raw file.
    from_file: Option<String>,
    /// Bytes.
    size: Option<u64>,
}

/// A guest to boot.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunRequest {
    /// What the VM will be called.
    #[schema(value_type = NameText)]
    name: Name,
    /// What the guest is. Relative paths are the daemon's.
    #[schema(value_type = GuestObject)]
    guest: Value,
}

/// How to store a VM.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SleepRequest {
    /// The snapshot's name; that of the snapshot it woke from if not given, else the VM's.
    #[serde(default, rename = "as")]
    #[schema(value_type = Option<NameText>)]
    snapshot: Option<Name>,
    /// Whether the VM goes on.
    #[serde(default)]
    keep_running: bool,
    /// Labels of the snapshot.
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

/// Reads a guest that stands in a request.
pub(crate) fn guest_of(value: &Value) -> anyhow::Result<Guest> {
    // Arrays would be taken for their fields, one by one.
    let disks = value["disks"].as_array().into_iter().flatten();
    if ![value, &value["launch"]].into_iter().chain(disks).all(Value::is_object) {
        return Err(Fault::usage("a guest, its launch and its disks are JSON objects").into());
    }
    Guest::parse(value.to_string().as_bytes()).context("cannot use the guest")
}

/// All VMs.
#[utoipa::path(
    get, path = "/v1/vms", operation_id = "list_vms", tag = "vms",
    responses(
        (status = 200, body = VmsObject),
        (status = 421, body = ErrorObject),
        (status = 429, body = ErrorObject),
        (status = 500, body = ErrorObject),
    ),
)]
pub(crate) async fn list(State(daemon): State<Arc<Daemon>>) -> Answer<Json<VmsObject>> {
    let vms = daemon.look_up("vms", |daemon| daemon.house.list()).await?;
    Ok(Json(VmsObject { vms }))
}

/// Boots a guest as a VM.
#[utoipa::path(
    post, path = "/v1/vms", operation_id = "run_vm", tag = "vms",
    params(WaitParams), request_body = RunRequest,
    responses(
        (status = 200, description = "It is awake", body = AwakeObject,
            headers(("location" = String, description = "The job"))),
        (status = 202, description = "The job that boots it", body = JobView,
            headers(("location" = String, description = "The job"))),
        JobFailures,
    ),
)]
pub(crate) async fn run(
    State(daemon): State<Arc<Daemon>>,
    Asked(params): Asked<WaitParams>,
    Wanted(request): Wanted<RunRequest>,
) -> Answer<Response> {
    let RunRequest { name, guest } = request;
    let guest = guest_of(&guest)?;
    daemon
        .work(JobKind::Run, Some(name.to_string()), params, move |daemon, job| {
            let awake = boot(&daemon.house, guest, &name, job.store_job())?;
            daemon.metrics.awake("run", &awake.seconds);
            Ok(json!(awake))
        })
        .await
}

/// A VM.
#[utoipa::path(
    get, path = "/v1/vms/{name}", operation_id = "inspect_vm", tag = "vms",
    params(("name" = NameText, Path, description = "The VM")),
    responses(
        (status = 200, body = VmDetails),
        (status = 400, body = ErrorObject),
        (status = 404, body = ErrorObject),
        (status = 421, body = ErrorObject),
        (status = 429, body = ErrorObject),
        (status = 500, body = ErrorObject),
        (status = 501, body = ErrorObject),
    ),
)]
pub(crate) async fn inspect(
    State(daemon): State<Arc<Daemon>>,
    Named(name): Named<Name>,
) -> Answer<Json<Value>> {
    Ok(Json(daemon.look_up("vm", move |daemon| daemon.house.inspect(&name)).await?))
}

/// Ends a VM at once, like a power cut for its guest, and removes it with its disks.
#[utoipa::path(
    delete, path = "/v1/vms/{name}", operation_id = "kill_vm", tag = "vms",
    params(("name" = NameText, Path, description = "The VM"), WaitParams),
    responses(
        (status = 200, description = "It is gone", body = KilledObject,
            headers(("location" = String, description = "The job"))),
        (status = 202, description = "The job that ends it", body = JobView,
            headers(("location" = String, description = "The job"))),
        (status = 400, body = ErrorObject),
        (status = 404, body = ErrorObject),
        (status = 409, body = ErrorObject),
        (status = 421, body = ErrorObject),
        (status = 429, body = ErrorObject),
        (status = 500, body = ErrorObject),
        (status = 501, body = ErrorObject),
        (status = 503, body = ErrorObject),
    ),
)]
pub(crate) async fn kill(
    State(daemon): State<Arc<Daemon>>,
    Named(name): Named<Name>,
    Asked(params): Asked<WaitParams>,
) -> Answer<Response> {
    daemon
        .work(JobKind::Kill, Some(name.to_string()), params, move |daemon, _| {
            daemon.house.kill(&name)?;
            Ok(json!({ "name": name.as_str(), "killed": true }))
        })
        .await
}

/// Stores a VM as one snapshot of memory, disks and state; it ends, or goes on.
#[utoipa::path(
    post, path = "/v1/vms/{name}/sleep", operation_id = "sleep_vm", tag = "vms",
    params(("name" = NameText, Path, description = "The VM"), WaitParams),
    request_body = SleepRequest,
    responses(
        (status = 200, description = "It is stored, or frozen no longer", body = SleptObject,
            headers(("location" = String, description = "The job"))),
        (status = 202, description = "The job that stores it", body = JobView,
            headers(("location" = String, description = "The job"))),
        JobFailures,
    ),
)]
pub(crate) async fn sleep(
    State(daemon): State<Arc<Daemon>>,
    Named(name): Named<Name>,
    Asked(params): Asked<WaitParams>,
    Wanted(request): Wanted<SleepRequest>,
) -> Answer<Response> {
    let options = SleepOptions {
        name: request.snapshot,
        then: if request.keep_running { Then::GoOn } else { Then::End },
        labels: request.labels,
    };
    daemon
        .work(JobKind::Sleep, Some(name.to_string()), params, move |daemon, job| {
            job.check()?;
            let mut on_frozen = |frozen| job.set_frozen(json!(frozen));
            let slept =
                fall_asleep(&daemon.house, &name, &options, &mut on_frozen, job.store_job())?;
            daemon.metrics.slept(&slept);
            let stored = slept.snapshot.parse().map(|snap| daemon.house.store.snapshot(&snap));
            // Somebody may have removed it at once.
            if let Ok(Ok(stored)) = stored {
                daemon.metrics.captured(&stored.manifest().figures);
            }
            // A guest whose memory had to be stored first stood still to the end.
            if job.frozen().is_none() {
                job.set_frozen(json!({ "frozen_seconds": slept.frozen_seconds }));
            }
            let mut object = serde_json::to_value(&slept)?;
            object["name"] = name.as_str().into();
            Ok(object)
        })
        .await
}

/// What a VM's VMM has said so far, byte for byte.
#[utoipa::path(
    get, path = "/v1/vms/{name}/logs", operation_id = "vm_logs", tag = "vms",
    params(("name" = NameText, Path, description = "The VM")),
    responses(
        (status = 200, body = String, content_type = "text/plain"),
        (status = 400, body = ErrorObject),
        (status = 404, body = ErrorObject),
        (status = 421, body = ErrorObject),
        (status = 429, body = ErrorObject),
        (status = 500, body = ErrorObject),
        (status = 501, body = ErrorObject),
    ),
)]
pub(crate) async fn logs(
    State(daemon): State<Arc<Daemon>>,
    Named(name): Named<Name>,
) -> Answer<Response> {
    let log = daemon
        .look_up("log", move |daemon| {
            let folder = LiveFolder::new(&daemon.house.dir, &name);
            daemon.house.record(&folder)?;
            let path = log_of(&folder);
            let log = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                log => log.with_context(|| format!("cannot open {}", path.display()))?,
            };
            // What is said while it is sent is for the next one who asks.
            let bytes = log.metadata()?.len();
            Ok(Some(log.take(bytes)))
        })
        .await?;
    let pieces = stream::unfold(log, move |log| {
        let daemon = Arc::clone(&daemon);
        async move {
            let mut log = log?;
            let read = move |_: &Daemon| {
                let mut piece = Vec::new();
                log.by_ref().take(LOG_BYTES as u64).read_to_end(&mut piece)?;
                Ok((piece, log))
            };
            match daemon.look_up("log", read).await {
                Ok((piece, _)) if piece.is_empty() => None,
                Ok((piece, log)) => Some((Ok(Bytes::from(piece)), Some(log))),
                Err(_) => {
                    let error = Fault::new(crate::exit::Kind::Io, "the log cannot be read further");
                    Some((Err(error), None))
                }
            }
        }
    });
    Ok(([(CONTENT_TYPE, "text/plain; charset=utf-8")], Body::from_stream(pieces)).into_response())
}
