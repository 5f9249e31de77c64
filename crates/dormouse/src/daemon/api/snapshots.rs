//! Snapshots: listed, looked at, removed, woken; and what no snapshot needs, collected.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use dormouse_store::gc::GcOptions;
use dormouse_store::name::{Name, SnapRef};
use dormouse_store::progress::Job as StoreJob;
use dormouse_vmm::vmm::Network;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use super::Daemon;
use super::answer::{Answer, Asked, ErrorObject, JobFailures, Named, Wanted};
use super::jobs::WaitParams;
use super::vms::{AwakeObject, GuestObject, NameText, guest_of};
use crate::command::gc::GcObject;
use crate::command::ls::listing;
use crate::command::rm::remove as remove_all;
use crate::command::show::show_object;
use crate::daemon::jobs::{JobKind, JobView};
use crate::exit::Fault;
use crate::live::remove_leftovers;
use crate::vm::wake::{Awake, WakeOptions, check_names, fork as fork_all, wake as awaken};

/// VMs of one fork.
const FORKS_MAX: usize = 1024;

/// A snapshot: `NAME@N`, or `NAME` for the newest.
#[derive(ToSchema)]
#[schema(
    value_type = String,
    pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(@[1-9][0-9]{0,18})?$",
    example = "vm@3"
)]
#[expect(dead_code, reason = "it is there to be described")]
pub(crate) struct SnapText(String);

/// A snapshot, in a list.
#[derive(Serialize, ToSchema)]
pub(crate) struct SnapshotRow {
    /// `NAME@N`.
    snapshot: String,
    uuid: String,
    name: String,
    number: u64,
    created: String,
    /// The snapshot that it was taken over.
    parent: Option<String>,
    /// `memory`, `disk/ID`, `state/NAME`.
    images: Vec<String>,
    /// Length of its images.
    raw_bytes: u64,
    /// What its commit wrote.
    stored_bytes: u64,
    labels: BTreeMap<String, String>,
}

/// A snapshot that cannot be read.
#[derive(Serialize, ToSchema)]
pub(crate) struct DamagedSnapshot {
    /// `NAME@N`.
    snapshot: String,
    /// What is wrong with it.
    problem: String,
}

/// Snapshots.
#[derive(Serialize, ToSchema)]
pub(crate) struct SnapshotsObject {
    /// By name, then number.
    snapshots: Vec<SnapshotRow>,
    damaged: Vec<DamagedSnapshot>,
}

/// A snapshot, in full.
#[derive(Serialize, ToSchema)]
pub(crate) struct SnapshotObject {
    /// `NAME@N`.
    snapshot: String,
    /// As docs/format.md describes it.
    #[schema(value_type = Object)]
    manifest: Value,
    /// The packs that it uses.
    #[schema(value_type = Vec<Object>)]
    packs: Value,
}

/// Snapshots that are gone.
#[derive(Serialize, ToSchema)]
pub(crate) struct RemovedObject {
    /// `NAME@N`.
    removed: Vec<String>,
}

/// VMs that are awake now.
#[derive(Serialize, ToSchema)]
pub(crate) struct ForksObject {
    /// The snapshot that they woke from.
    snapshot: String,
    forks: Vec<AwakeObject>,
}

/// What was freed.
#[derive(Serialize, ToSchema)]
pub(crate) struct CollectedObject {
    dry_run: bool,
    live_packs: u64,
    deleted_files: u64,
    deleted_bytes: u64,
    swept: u64,
    index_runs_before: u64,
    index_runs_after: u64,
    dead_bytes: u64,
}

/// What of the host a VM that wakes is given.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct WakeRequest {
    /// What the VM will be called; as the snapshot if not given.
    #[serde(default)]
    #[schema(value_type = Option<NameText>)]
    name: Option<Name>,
    /// What the guest is, for a snapshot that does not say it, or to replace what it says.
    #[serde(default)]
    #[schema(value_type = Option<GuestObject>)]
    guest: Option<Value>,
    /// The program to start as the VMM: its path, or a name along the daemon's PATH.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    vmm: Option<PathBuf>,
    /// Other devices of the host for network interfaces, by their ids.
    #[serde(default)]
    networks: BTreeMap<String, String>,
    /// Another socket for the vsock device; relative paths are the daemon's.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    vsock: Option<PathBuf>,
}

/// VMs to wake from one snapshot.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ForkRequest {
    /// What they will be called.
    #[schema(value_type = Vec<NameText>, min_items = 1, max_items = 1024)]
    names: Vec<Name>,
    /// As of a wake.
    #[serde(default)]
    #[schema(value_type = Option<GuestObject>)]
    guest: Option<Value>,
    /// As of a wake.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    vmm: Option<PathBuf>,
    /// As of a wake.
    #[serde(default)]
    networks: BTreeMap<String, String>,
    /// As of a wake.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    vsock: Option<PathBuf>,
}

/// What to collect.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct GcRequest {
    /// Only tell what would be done.
    #[serde(default)]
    dry_run: bool,
}

/// Which snapshots to list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListParams {
    /// Those of this name.
    #[param(value_type = Option<NameText>)]
    name: Option<String>,
}

fn wake_options(
    guest: Option<&Value>,
    vmm: Option<PathBuf>,
    networks: BTreeMap<String, String>,
    vsock: Option<PathBuf>,
) -> anyhow::Result<WakeOptions> {
    let networks = networks.into_iter().map(|(id, host_device)| Network { id, host_device });
    let guest = guest.map(guest_of).transpose()?;
    Ok(WakeOptions { guest, vmm, networks: networks.collect(), vsock })
}

/// All snapshots, or those of a name.
#[utoipa::path(
    get, path = "/v1/snapshots", operation_id = "list_snapshots", tag = "snapshots",
    params(ListParams),
    responses(
        (status = 200, body = SnapshotsObject),
        (status = 400, body = ErrorObject),
        (status = 404, body = ErrorObject),
        (status = 421, body = ErrorObject),
        (status = 429, body = ErrorObject),
        (status = 500, body = ErrorObject),
    ),
)]
pub(crate) async fn list(
    State(daemon): State<Arc<Daemon>>,
    Asked(params): Asked<ListParams>,
) -> Answer<Json<Value>> {
    let name = params.name.map(Name::new).transpose()?;
    let list = move |daemon: &Daemon| {
        Ok(serde_json::to_value(listing(&daemon.house.store, name.as_ref())?.0)?)
    };
    Ok(Json(daemon.look_up("snapshots", list).await?))
}

/// A snapshot: its manifest, and how much of which pack it uses.
#[utoipa::path(
    get, path = "/v1/snapshots/{snap}", operation_id = "show_snapshot", tag = "snapshots",
    params(("snap" = SnapText, Path, description = "The snapshot")),
    responses(
        (status = 200, body = SnapshotObject),
        (status = 400, body = ErrorObject),
        (status = 404, body = ErrorObject),
        (status = 421, body = ErrorObject),
        (status = 429, body = ErrorObject),
        (status = 500, body = ErrorObject),
        (status = 501, body = ErrorObject),
    ),
)]
pub(crate) async fn show(
    State(daemon): State<Arc<Daemon>>,
    Named(snap): Named<SnapRef>,
) -> Answer<Json<Value>> {
    let show = move |daemon: &Daemon| {
        let snapshot = daemon.house.store.snapshot(&snap)?;
        let packs = snapshot.packs(StoreJob::quiet())?;
        Ok(serde_json::to_value(show_object(snapshot.manifest(), &packs))?)
    };
    Ok(Json(daemon.look_up("snapshot", show).await?))
}

/// Removes a snapshot; a collection then frees the space.
#[utoipa::path(
    delete, path = "/v1/snapshots/{snap}", operation_id = "remove_snapshot", tag = "snapshots",
    params(("snap" = SnapText, Path, description = "The snapshot")),
    responses(
        (status = 200, body = RemovedObject),
        (status = 400, body = ErrorObject),
        (status = 404, body = ErrorObject),
        (status = 409, body = ErrorObject),
        (status = 421, body = ErrorObject),
        (status = 422, body = ErrorObject),
        (status = 429, body = ErrorObject),
        (status = 500, body = ErrorObject),
    ),
)]
pub(crate) async fn remove(
    State(daemon): State<Arc<Daemon>>,
    Named(snap): Named<SnapRef>,
) -> Answer<Json<RemovedObject>> {
    let remove = move |daemon: &Daemon| {
        let mut removed = Vec::new();
        remove_all(&daemon.house.store, &[snap], &mut |name| {
            removed.push(name);
            Ok(())
        })?;
        Ok(RemovedObject { removed })
    };
    Ok(Json(daemon.look_up("remove", remove).await?))
}

/// Wakes a snapshot as a VM.
#[utoipa::path(
    post, path = "/v1/snapshots/{snap}/wake", operation_id = "wake_snapshot", tag = "snapshots",
    params(("snap" = SnapText, Path, description = "The snapshot"), WaitParams),
    request_body = WakeRequest,
    responses(
        (status = 200, description = "It is awake", body = AwakeObject,
            headers(("location" = String, description = "The job"))),
        (status = 202, description = "The job that wakes it", body = JobView,
            headers(("location" = String, description = "The job"))),
        JobFailures,
    ),
)]
pub(crate) async fn wake(
    State(daemon): State<Arc<Daemon>>,
    Named(snap): Named<SnapRef>,
    Asked(params): Asked<WaitParams>,
    Wanted(request): Wanted<WakeRequest>,
) -> Answer<Response> {
    let WakeRequest { name, guest, vmm, networks, vsock } = request;
    let options = wake_options(guest.as_ref(), vmm, networks, vsock)?;
    let live = name.unwrap_or_else(|| snap.name.clone());
    daemon
        .work(JobKind::Wake, Some(live.to_string()), params, move |daemon, job| {
            let awake = awaken(&daemon.house, &snap, &live, &options, job.store_job())?;
            daemon.metrics.awake("wake", &awake.seconds);
            Ok(json!(awake))
        })
        .await
}

/// Wakes a snapshot as many VMs, all of the same one, whatever is committed meanwhile. Those that are
/// awake stay so if another one fails.
#[utoipa::path(
    post, path = "/v1/snapshots/{snap}/fork", operation_id = "fork_snapshot", tag = "snapshots",
    params(("snap" = SnapText, Path, description = "The snapshot"), WaitParams),
    request_body = ForkRequest,
    responses(
        (status = 200, description = "They are awake", body = ForksObject,
            headers(("location" = String, description = "The job"))),
        (status = 202, description = "The job that wakes them", body = JobView,
            headers(("location" = String, description = "The job"))),
        JobFailures,
    ),
)]
pub(crate) async fn fork(
    State(daemon): State<Arc<Daemon>>,
    Named(snap): Named<SnapRef>,
    Asked(params): Asked<WaitParams>,
    Wanted(request): Wanted<ForkRequest>,
) -> Answer<Response> {
    let ForkRequest { names, guest, vmm, networks, vsock } = request;
    if names.is_empty() || names.len() > FORKS_MAX {
        let message = format!("{} names, expected 1 to {FORKS_MAX}", names.len());
        return Err(Fault::usage(message).into());
    }
    check_names(&names)?;
    let options = wake_options(guest.as_ref(), vmm, networks, vsock)?;
    daemon
        .work(JobKind::Fork, Some(snap.to_string()), params, move |daemon, job| {
            let mut on_awake = |awake: &Awake| {
                daemon.metrics.awake("fork", &awake.seconds);
                job.add_awake(json!(awake));
                Ok(())
            };
            let (house, stop) = (&daemon.house, job.store_job());
            let forks = fork_all(house, &snap, &names, &options, stop, &mut on_awake)?;
            Ok(json!(forks))
        })
        .await
}

/// Deletes what no snapshot needs.
#[utoipa::path(
    post, path = "/v1/gc", operation_id = "gc", tag = "snapshots",
    params(WaitParams), request_body = GcRequest,
    responses(
        (status = 200, description = "It is done", body = CollectedObject,
            headers(("location" = String, description = "The job"))),
        (status = 202, description = "The job that does it", body = JobView,
            headers(("location" = String, description = "The job"))),
        (status = 400, body = ErrorObject),
        (status = 408, body = ErrorObject),
        (status = 409, body = ErrorObject),
        (status = 413, body = ErrorObject),
        (status = 415, body = ErrorObject),
        (status = 421, body = ErrorObject),
        (status = 422, body = ErrorObject),
        (status = 429, body = ErrorObject),
        (status = 500, body = ErrorObject),
        (status = 503, body = ErrorObject),
    ),
)]
pub(crate) async fn gc(
    State(daemon): State<Arc<Daemon>>,
    Asked(params): Asked<WaitParams>,
    Wanted(request): Wanted<GcRequest>,
) -> Answer<Response> {
    let GcRequest { dry_run } = request;
    daemon
        .work(JobKind::Gc, None, params, move |daemon, job| {
            if !dry_run {
                remove_leftovers(&daemon.house.dir)?;
            }
            let report = daemon.house.store.gc(&GcOptions { dry_run }, job.store_job())?;
            Ok(serde_json::to_value(GcObject { dry_run, report })?)
        })
        .await
}
