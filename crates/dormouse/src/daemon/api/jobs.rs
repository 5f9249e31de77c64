//! Jobs: looked at, waited for, told to stop; and their events, as `text/event-stream`.
//!
//! Each event is called after the job's state, and its data is the job as [`show`] gives it: one at once,
//! one whenever something changes, and the last when the job has ended.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, LOCATION};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::Daemon;
use super::answer::{Answer, ErrorObject, Failure, Named};
use crate::daemon::jobs::{Job, JobKind, JobView};
use crate::exit::Fault;

/// How often bytes are told that went on.
const TICK: Duration = Duration::from_millis(200);

/// How often something is sent though nothing happened, so that a client that is gone is noticed.
const PULSE: Duration = Duration::from_secs(15);

/// How long a request waits for a job that was not told otherwise.
const WAIT_SECONDS: u32 = 600;

/// Until when a request waits for its job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Until {
    /// Not at all.
    #[default]
    No,
    /// Until a guest that is stored stands still no longer; for other jobs as `durable`.
    Frozen,
    /// Until all is done and will be there whatever becomes of the host.
    Durable,
}

/// How a request waits for its job.
#[derive(Clone, Copy, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct WaitParams {
    /// Until when to wait.
    #[serde(default)]
    #[param(inline)]
    pub(crate) wait: Until,
    /// For how long at most; then the answer is 202, and the job goes on.
    #[serde(default = "wait_seconds")]
    #[param(minimum = 0, maximum = 86400, default = 600)]
    pub(crate) timeout_seconds: u32,
}

fn wait_seconds() -> u32 {
    WAIT_SECONDS
}

/// The longest wait.
const WAIT_SECONDS_MAX: u32 = 86_400;

/// Answers for a job: with it, or with what came of it. Who waits for less than its end is told which job
/// goes on.
pub(crate) async fn answer(job: &Arc<Job>, params: WaitParams) -> Answer<Response> {
    let deadline = Instant::now() + Duration::from_secs(u64::from(params.timeout_seconds));
    let mut changed = job.watch();
    let location = HeaderValue::try_from(format!("/v1/jobs/{}", job.id));
    let location = [(LOCATION, location.map_err(anyhow::Error::from)?)];
    loop {
        let outcome = match params.wait {
            Until::No => None,
            Until::Frozen => job.outcome().or_else(|| job.frozen().map(Ok)),
            Until::Durable => job.outcome(),
        };
        match outcome {
            Some(Ok(mut result)) => {
                if params.wait == Until::Frozen {
                    result["job"] = job.id.to_string().into();
                }
                return Ok((location, Json(result)).into_response());
            }
            Some(Err(told)) => return Err(Failure::of(told)),
            None if params.wait == Until::No => break,
            None => {}
        }
        if !matches!(timeout_at(deadline, changed.changed()).await, Ok(Ok(()))) {
            break;
        }
    }
    Ok((StatusCode::ACCEPTED, location, Json(job.view())).into_response())
}

/// Checks how a request wants to wait; before anything is begun.
pub(crate) fn check(params: WaitParams) -> Answer<WaitParams> {
    if params.timeout_seconds > WAIT_SECONDS_MAX {
        let message = format!("timeout_seconds is more than {WAIT_SECONDS_MAX}");
        return Err(Fault::usage(message).into());
    }
    Ok(params)
}

impl Daemon {
    /// Begins a job and answers for it.
    pub(crate) async fn work(
        self: &Arc<Daemon>,
        kind: JobKind,
        subject: Option<String>,
        params: WaitParams,
        work: impl FnOnce(&Daemon, &Job) -> anyhow::Result<Value> + Send + 'static,
    ) -> Answer<Response> {
        let params = check(params)?;
        let daemon = Arc::clone(self);
        let work = move |job: &Job| work(&daemon, job);
        let job = self
            .jobs
            .start(kind, subject, &self.metrics, work)
            .map_err(|error| Failure::too_many(&error))?;
        answer(&job, params).await
    }
}

/// Jobs.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct JobsObject {
    /// Those that have not ended, and those that ended lately; oldest first.
    jobs: Vec<JobView>,
}

/// An event.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EventObject {
    /// Counts up.
    id: String,
    /// The job's state.
    event: String,
    /// The job, as JSON.
    data: String,
}

/// All jobs that are remembered.
#[utoipa::path(
    get, path = "/v1/jobs", operation_id = "list_jobs", tag = "jobs",
    responses((status = 200, body = JobsObject), (status = 421, body = ErrorObject)),
)]
pub(crate) async fn list(State(daemon): State<Arc<Daemon>>) -> Json<JobsObject> {
    let jobs = daemon.jobs.list().iter().map(|job| job.view()).collect();
    Json(JobsObject { jobs })
}

/// A job.
#[utoipa::path(
    get, path = "/v1/jobs/{id}", operation_id = "show_job", tag = "jobs",
    params(("id" = String, Path, description = "The job", format = "uuid")),
    responses(
        (status = 200, body = JobView),
        (status = 400, body = ErrorObject),
        (status = 404, body = ErrorObject),
        (status = 421, body = ErrorObject),
    ),
)]
pub(crate) async fn show(
    State(daemon): State<Arc<Daemon>>,
    Named(id): Named<Uuid>,
) -> Answer<Json<JobView>> {
    Ok(Json(daemon.jobs.find(id)?.view()))
}

/// Tells a job to stop. One that waits for its turn ends at once, a collection as soon as it can, a fork
/// before its next VM. A sleep stops before it begins; boots, wakes, kills and sleeps that run are done.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/cancel", operation_id = "cancel_job", tag = "jobs",
    params(("id" = String, Path, description = "The job", format = "uuid")),
    responses(
        (status = 202, description = "It was told", body = JobView),
        (status = 400, body = ErrorObject),
        (status = 404, body = ErrorObject),
        (status = 421, body = ErrorObject),
    ),
)]
pub(crate) async fn cancel(
    State(daemon): State<Arc<Daemon>>,
    Named(id): Named<Uuid>,
) -> Answer<(StatusCode, Json<JobView>)> {
    let job = daemon.jobs.find(id)?;
    if !job.state().is_end() {
        job.cancel();
    }
    Ok((StatusCode::ACCEPTED, Json(job.view())))
}

/// What happens to a job, as server-sent events: `event` is its state, `data` the job.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/events", operation_id = "job_events", tag = "jobs",
    params(("id" = String, Path, description = "The job", format = "uuid")),
    responses(
        (status = 200, description = "Ends after the event of its end", body = EventObject,
            content_type = "text/event-stream"),
        (status = 400, body = ErrorObject),
        (status = 404, body = ErrorObject),
        (status = 421, body = ErrorObject),
    ),
)]
pub(crate) async fn events(
    State(daemon): State<Arc<Daemon>>,
    Named(id): Named<Uuid>,
) -> Answer<Response> {
    let job = daemon.jobs.find(id)?;
    let teller = Teller { changed: job.watch(), job, told: None, number: 0 };
    let events = stream::unfold(teller, |mut teller| async move {
        let event = teller.next().await?;
        Some((event, teller))
    });
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-store")];
    Ok((headers, Body::from_stream(events)).into_response())
}

/// Who tells of a job.
struct Teller {
    job: Arc<Job>,
    changed: watch::Receiver<()>,
    /// What was told last.
    told: Option<JobView>,
    number: u64,
}

impl Teller {
    /// The next event; none after the job's end was told.
    async fn next(&mut self) -> Option<Result<String, serde_json::Error>> {
        if self.told.as_ref().is_some_and(|told| told.state.is_end()) {
            return None;
        }
        let asked = Instant::now();
        loop {
            let view = self.job.view();
            let is_new = self.told.as_ref().is_none_or(|told| {
                // Time passes, which is no news.
                let JobView { queue_seconds, service_seconds, .. } = *told;
                *told != JobView { queue_seconds, service_seconds, ..view.clone() }
            });
            if is_new {
                self.number += 1;
                let data = serde_json::to_string(&view);
                let (number, state) = (self.number, view.state.word());
                self.told = Some(view);
                let event =
                    data.map(|data| format!("id: {number}\nevent: {state}\ndata: {data}\n\n"));
                return Some(event);
            }
            if asked.elapsed() > PULSE {
                return Some(Ok(": nothing new\n\n".to_owned()));
            }
            // Bytes go on without a word; the sender lives as long as the job.
            let _ = timeout(TICK, self.changed.changed()).await;
        }
    }
}
