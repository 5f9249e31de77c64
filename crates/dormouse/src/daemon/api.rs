//! The API, version 1: what is at which path, and what it is in words of OpenAPI.
//!
//! Answers have the fields of the commands' `--json`. What takes long is a [job](super::jobs): answered
//! at once by 202 and the job, or with `?wait=` when it has come so far.

pub(crate) mod answer;
pub(crate) mod host;
mod jobs;
mod lookup;
mod snapshots;
pub(crate) mod vms;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::sync::Semaphore;
use utoipa::OpenApi;

use super::budget::{Budget, READERS, READERS_WAITING_MAX};
use super::jobs::Jobs;
use super::metrics::Metrics;
use super::place::STORE_HEADER;
use crate::exit::Kind;
use crate::vm::House;
use answer::Failure;

/// What all handlers share.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) house: Arc<House>,
    pub(crate) jobs: Arc<Jobs>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) budget: Budget,
    pub(crate) started: jiff::Timestamp,
    pub(crate) store_mark: String,
    pub(crate) socket: Option<PathBuf>,
    readers: Arc<Semaphore>,
    readers_and_waiting: Arc<Semaphore>,
    /// Figures that are asked for at scrapes and take long; held to look and to replace.
    slow: Mutex<host::Slow>,
}

impl Daemon {
    /// Of a store with its VMs.
    pub(crate) fn new(
        house: House,
        budget: Budget,
        store_mark: String,
        socket: Option<PathBuf>,
    ) -> Daemon {
        Daemon {
            house: Arc::new(house),
            jobs: Arc::new(Jobs::new(&budget)),
            metrics: Arc::new(Metrics::new()),
            budget,
            started: jiff::Timestamp::now(),
            store_mark,
            socket,
            readers: Arc::new(Semaphore::new(READERS)),
            readers_and_waiting: Arc::new(Semaphore::new(READERS + READERS_WAITING_MAX)),
            slow: Mutex::default(),
        }
    }
}

/// The API in words of OpenAPI.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Dormouse",
        version = "1.0.0",
        description = "Sleeping and waking microVMs. A snapshot is NAME@N, or NAME for the newest. \
                       What takes long is a job: 202 and the job at once, or with wait= when it has \
                       come so far."
    ),
    paths(
        host::about,
        host::openapi,
        host::metrics,
        vms::list,
        vms::run,
        vms::inspect,
        vms::kill,
        vms::sleep,
        vms::logs,
        snapshots::list,
        snapshots::show,
        snapshots::remove,
        snapshots::wake,
        snapshots::fork,
        snapshots::gc,
        jobs::list,
        jobs::show,
        jobs::cancel,
        jobs::events,
    ),
    components(schemas(answer::ErrorObject, snapshots::SnapText, vms::NameText))
)]
struct Document;

/// The document that is checked in.
pub(crate) fn document() -> Result<String> {
    let mut document = Document::openapi();
    // The workspace's licence says nothing of what is served.
    document.info.license = None;
    document.info.contact = None;
    let mut text = document.to_pretty_json().context("cannot write the API down")?;
    text.push('\n');
    Ok(text)
}

/// All routes.
pub(crate) fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1", get(host::about))
        .route("/v1/openapi.json", get(host::openapi))
        .route("/metrics", get(host::metrics))
        .route("/v1/vms", get(vms::list).post(vms::run))
        .route("/v1/vms/{name}", get(vms::inspect).delete(vms::kill))
        .route("/v1/vms/{name}/sleep", post(vms::sleep))
        .route("/v1/vms/{name}/logs", get(vms::logs))
        .route("/v1/snapshots", get(snapshots::list))
        .route("/v1/snapshots/{snap}", get(snapshots::show).delete(snapshots::remove))
        .route("/v1/snapshots/{snap}/wake", post(snapshots::wake))
        .route("/v1/snapshots/{snap}/fork", post(snapshots::fork))
        .route("/v1/gc", post(snapshots::gc))
        .route("/v1/jobs", get(jobs::list))
        .route("/v1/jobs/{id}", get(jobs::show))
        .route("/v1/jobs/{id}/cancel", post(jobs::cancel))
        .route("/v1/jobs/{id}/events", get(jobs::events))
        .fallback(answer::nothing_here)
        .method_not_allowed_fallback(answer::not_so)
        .layer(middleware::from_fn_with_state(Arc::clone(&daemon), observe))
        .with_state(daemon)
}

/// Counts and logs each request, and turns away those that mean another store.
async fn observe(State(daemon): State<Arc<Daemon>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let route = route.unwrap_or_else(|| "other".to_owned());
    let path = request.uri().path().to_owned();
    let means_another = request
        .headers()
        .get(STORE_HEADER)
        .is_some_and(|mark| mark.as_bytes() != daemon.store_mark.as_bytes());
    let response = if means_another {
        let message = "this is the daemon of another store".to_owned();
        let status = StatusCode::MISDIRECTED_REQUEST;
        Failure::with_status(status, Kind::NotFound, message).into_response()
    } else {
        next.run(request).await
    };
    let (status, took) = (response.status(), begun.elapsed());
    daemon.metrics.request(known(&method), &route, status.as_u16(), took);
    let (code, took_seconds) = (status.as_u16(), took.as_secs_f64());
    if status.is_server_error() {
        tracing::warn!(%method, path, status = code, took_seconds, "answered");
    } else {
        tracing::info!(%method, path, status = code, took_seconds, "answered");
    }
    response
}

/// A method as a label: clients may make up others.
fn known(method: &axum::http::Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "DELETE" => "DELETE",
        _ => "other",
    }
}
