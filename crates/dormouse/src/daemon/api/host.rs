//! The daemon itself: what it is, what its API is, and its figures.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use dormouse_store::progress::Job as StoreJob;
use dormouse_store::usage::Usage;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::answer::{Answer, ErrorObject};
use super::{Daemon, document};
use crate::daemon::metrics::{Page, labels};
use crate::live::LiveFolder;
use crate::live::control::{Request, ask};
use crate::mount::MountFigures;
use crate::vm::plane::Plane;

/// How old figures may be that take long.
const SLOW_FOR: Duration = Duration::from_secs(15);

/// How many times as old as they took they may be, too: a large store is not measured all the time.
const SLOW_TIMES: u32 = 20;

/// How long a scrape waits for them before it takes what there was.
const SLOW_TIMEOUT: Duration = Duration::from_secs(3);

/// The daemon.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DaemonObject {
    /// The program's.
    version: &'static str,
    /// The store's folder.
    store: String,
    /// The store's UUID.
    store_id: String,
    /// The daemon's process.
    pid: u32,
    /// When it was started.
    #[schema(value_type = String, format = "date-time")]
    started: jiff::Timestamp,
    /// Its unix socket; none if it has but TCP.
    socket: Option<String>,
    budget: BudgetObject,
}

/// What the daemon may use.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BudgetObject {
    /// Jobs at a time.
    jobs: usize,
    /// Jobs that wait.
    queue: usize,
    /// Connections at a time, on unix sockets and again on TCP.
    connections: usize,
    /// Beside one for each VMM that it started, which waits for its end.
    threads: usize,
    descriptors: u64,
}

/// What the daemon is.
#[utoipa::path(
    get, path = "/v1", operation_id = "about", tag = "daemon",
    responses((status = 200, body = DaemonObject), (status = 421, body = ErrorObject)),
)]
pub(crate) async fn about(State(daemon): State<Arc<Daemon>>) -> Json<DaemonObject> {
    let budget = &daemon.budget;
    Json(DaemonObject {
        version: env!("CARGO_PKG_VERSION"),
        store: daemon.house.dir.display().to_string(),
        store_id: daemon.house.store.id().to_string(),
        pid: std::process::id(),
        started: daemon.started,
        socket: daemon.socket.as_ref().map(|path| path.display().to_string()),
        budget: BudgetObject {
            jobs: budget.jobs,
            queue: budget.queue,
            connections: budget.connections,
            threads: budget.threads(),
            descriptors: budget.descriptors(),
        },
    })
}

/// This document.
#[utoipa::path(
    get, path = "/v1/openapi.json", operation_id = "openapi", tag = "daemon",
    responses(
        (status = 200, body = Object, content_type = "application/json"),
        (status = 421, body = ErrorObject),
    ),
)]
pub(crate) async fn openapi() -> Answer<Response> {
    Ok(([(CONTENT_TYPE, "application/json")], document()?).into_response())
}

/// Figures, in Prometheus's text format.
#[utoipa::path(
    get, path = "/metrics", operation_id = "metrics", tag = "daemon",
    responses(
        (status = 200, body = String, content_type = "text/plain"),
        (status = 421, body = ErrorObject),
        (status = 429, body = ErrorObject),
        (status = 500, body = ErrorObject),
    ),
)]
pub(crate) async fn metrics(State(daemon): State<Arc<Daemon>>) -> Answer<Response> {
    let vms = daemon.look_up("vms", |daemon| daemon.house.list()).await?;
    refresh(&daemon).await;
    let mut page = Page::default();
    page.family("dormouse_vms", "gauge", "VMs by what they are doing.");
    let mut states: BTreeMap<&str, u64> =
        ["waking", "awake", "falling_asleep", "failed", "damaged"].map(|word| (word, 0)).into();
    for state in vms.iter().filter_map(|vm| vm["state"].as_str()) {
        *states.entry(state).or_default() += 1;
    }
    for (state, count) in states {
        page.sample("dormouse_vms", &labels(&[("state", state)]), count);
    }
    let (queued, running) = daemon.jobs.counts();
    page.family("dormouse_jobs", "gauge", "Jobs that have not ended.");
    page.sample("dormouse_jobs", &labels(&[("state", "queued")]), queued);
    page.sample("dormouse_jobs", &labels(&[("state", "running")]), running);
    daemon.metrics.render(&mut page);
    daemon.slow_figures(&mut page);
    process(&mut page, &daemon);
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(CONTENT_TYPE, kind)], page.into_text()).into_response())
}

/// Figures that are asked of the store and of the data plane.
#[derive(Debug, Default)]
pub(crate) struct Slow {
    usage: Option<Usage>,
    /// Of each VM whose disks the data plane has.
    plane: BTreeMap<String, Value>,
    /// Of the data plane itself, if it runs.
    mount: Option<MountFigures>,
    as_of: Option<Instant>,
    /// Somebody is at it, maybe for as long as a data plane that hangs does.
    is_asked: bool,
    took: Duration,
}

/// Has figures made anew that are too old, and waits a while for them.
async fn refresh(daemon: &Arc<Daemon>) {
    {
        let mut slow = daemon.slow.lock().unwrap_or_else(PoisonError::into_inner);
        let lasts = SLOW_FOR.max(slow.took * SLOW_TIMES);
        if slow.is_asked || slow.as_of.is_some_and(|as_of| as_of.elapsed() < lasts) {
            return;
        }
        slow.is_asked = true;
    }
    let asking = Arc::clone(daemon);
    let asked = tokio::task::spawn_blocking(move || {
        let begun = Instant::now();
        let usage = asking.house.store.usage(StoreJob::quiet());
        let plane = plane(&asking);
        let mount = Plane::of(&asking.house.dir).figures();
        let mut slow = asking.slow.lock().unwrap_or_else(PoisonError::into_inner);
        slow.is_asked = false;
        slow.as_of = Some(Instant::now());
        slow.took = begun.elapsed();
        match usage {
            Ok(usage) => slow.usage = Some(usage),
            Err(error) => {
                slow.usage = None;
                tracing::warn!(%error, "the store cannot be measured");
            }
        }
        match plane {
            Ok(plane) => slow.plane = plane,
            Err(error) => tracing::warn!(error = &*error, "the disks' figures cannot be had"),
        }
        slow.mount = mount.unwrap_or_else(|error| {
            tracing::warn!(error = &*error, "the data plane cannot be asked");
            None
        });
    });
    // It goes on; the next scrape has what comes of it.
    let _ = tokio::time::timeout(SLOW_TIMEOUT, asked).await;
}

fn plane(daemon: &Daemon) -> Result<BTreeMap<String, Value>> {
    let mut all = BTreeMap::new();
    for folder in LiveFolder::all(&daemon.house.dir)? {
        match ask(&folder.control(), &Request::Status) {
            Ok(Some(status)) => {
                all.insert(folder.live.to_string(), status);
            }
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(live = %folder.live, error = &*error, "no figures of a VM");
            }
        }
    }
    Ok(all)
}

impl Daemon {
    fn slow_figures(&self, page: &mut Page) {
        let slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        let age = slow.as_of.map_or(f64::NAN, |as_of| as_of.elapsed().as_secs_f64());
        page.gauge("dormouse_figures_age_seconds", "Age of the store's and disks' figures.", age);
        let took = slow.took.as_secs_f64();
        page.gauge("dormouse_figures_took_seconds", "How long those figures took.", took);
        if let Some(usage) = &slow.usage {
            page.family("dormouse_store_bytes", "gauge", "Bytes of the store, by what they are.");
            for (what, bytes) in [
                ("packs", usage.pack_bytes),
                ("index", usage.index_bytes),
                ("live", usage.live_bytes),
                ("reclaimable", usage.reclaimable_bytes),
            ] {
                page.sample("dormouse_store_bytes", &labels(&[("what", what)]), bytes);
            }
            let raw: u64 = usage.snapshots.iter().map(|row| row.raw_bytes).sum();
            page.gauge("dormouse_store_raw_bytes", "Length of all snapshots' images.", raw);
            let snapshots = usage.snapshots.len() as u64;
            page.gauge("dormouse_store_snapshots", "Snapshots.", snapshots);
            let damaged = usage.damaged.len() as u64;
            page.gauge("dormouse_store_damaged_snapshots", "Snapshots that are damaged.", damaged);
        }
        page.gauge(
            "dormouse_plane_up",
            "Whether the data plane runs.",
            u64::from(slow.mount.is_some()),
        );
        if let Some(mount) = &slow.mount {
            plane_figures(page, mount);
        }
        for (name, field, help) in [
            ("dormouse_disk_dirty_bytes", "dirty_bytes", "Written over a VM's base."),
            ("dormouse_disk_allocated_bytes", "allocated_bytes", "Space of a VM's overlay."),
            ("dormouse_disk_memory_bytes", "memory_bytes", "The data plane's memory for a disk."),
            ("dormouse_disk_layers", "layers", "Layers of a VM's overlay."),
            ("dormouse_disk_failed", "has_failed", "Whether writes of a VM's disk have failed."),
        ] {
            page.family(name, "gauge", help);
            for (live, status) in &slow.plane {
                for disk in status["disks"].as_array().into_iter().flatten() {
                    let value = match &disk[field] {
                        Value::Bool(flag) => u64::from(*flag),
                        value => value.as_u64().unwrap_or_default(),
                    };
                    let id = disk["id"].as_str().unwrap_or_default();
                    page.sample(name, &labels(&[("vm", live), ("disk", id)]), value);
                }
            }
        }
    }
}

/// What went through the data plane since its process began.
fn plane_figures(page: &mut Page, mount: &MountFigures) {
    for (name, help, value) in [
        (
            "reads",
            "Reads of memory that the kernel had not cached (page faults), and of disks.",
            mount.reads,
        ),
        ("read_bytes", "Bytes that those gave.", mount.read_bytes),
        ("writes", "Writes to disks and of dumps.", mount.writes),
        ("written_bytes", "Bytes that those took.", mount.written_bytes),
        ("failures", "Reads and writes that failed.", mount.failures),
        (
            "decoded_frames",
            "Frames that it decoded: misses, and what is read ahead.",
            mount.decoded_frames,
        ),
        ("cached_frames", "Times that it found a frame decoded: hits.", mount.found_frames),
        ("faults", "Page faults of guests with memory_backend uffd.", mount.faults.answered),
        ("fault_first_writes", "Of those, first writes to pages there.", mount.faults.first_writes),
        ("fault_zero_bytes", "Zeros among what it installed.", mount.faults.zero_bytes),
        ("fault_removed_bytes", "What such guests gave back.", mount.faults.removed_bytes),
    ] {
        let name = format!("dormouse_plane_{name}_total");
        page.family(&name, "counter", help);
        page.sample(&name, "", value);
    }
    for (name, help, seconds) in [
        ("read", "Time that its reads took, all together.", mount.read_seconds),
        ("fault_queue", "Waiting of faults for a thread.", mount.faults.waiting_seconds),
        ("fault_service", "Work for faults, to the answer.", mount.faults.serving_seconds),
    ] {
        let name = format!("dormouse_plane_{name}_seconds_total");
        page.family(&name, "counter", help);
        page.sample(&name, "", seconds);
    }
    let name = "dormouse_plane_fault_installed_bytes_total";
    let help = "Memory of such guests that it installed: asked for, around that, or prefetched.";
    page.family(name, "counter", help);
    for (why, bytes) in [
        ("asked", mount.faults.asked_bytes),
        ("around", mount.faults.around_bytes),
        ("prefetched", mount.faults.prefetched_bytes),
    ] {
        page.sample(name, &labels(&[("why", why)]), bytes);
    }
    let cached = mount.cached_frame_bytes;
    page.gauge("dormouse_plane_cache_bytes", "Decoded frames that it has in memory.", cached);
}

/// What the daemon itself uses, beside what it may.
fn process(page: &mut Page, daemon: &Daemon) {
    let count =
        |folder: &str| std::fs::read_dir(folder).map_or(0, |entries| entries.count() as u64);
    page.gauge("dormouse_daemon_threads", "Threads of the daemon.", count("/proc/self/task"));
    let threads = daemon.budget.threads() as u64;
    page.gauge("dormouse_daemon_threads_max", "Threads that it may have.", threads);
    page.gauge("dormouse_daemon_descriptors", "Descriptors it has.", count("/proc/self/fd"));
    let descriptors = daemon.budget.descriptors();
    page.gauge("dormouse_daemon_descriptors_max", "Descriptors it may have.", descriptors);
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    let page_bytes = rustix::param::page_size() as u64;
    let resident = pages.unwrap_or_default() * page_bytes;
    page.gauge("dormouse_daemon_resident_bytes", "Memory of the daemon.", resident);
    let decoded = daemon.house.store.decoded_frames();
    page.family("dormouse_decoded_frames_total", "counter", "Frames that the daemon decoded.");
    page.sample("dormouse_decoded_frames_total", "", decoded);
}
