//! What is taken from a request, within bounds, and what a failure looks like in an answer.

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::timeout;
use utoipa::{IntoResponses, ToSchema};

use crate::daemon::budget::{BODY_BYTES_MAX, BODY_TIMEOUT};
use crate::exit::{Fault, Kind, Told};

/// What an answer says that is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct ErrorBody {
    /// The word of docs/cli.md, such as `not_found`.
    pub(crate) kind: String,
    /// What failed.
    pub(crate) message: String,
    /// Why, outermost first.
    pub(crate) causes: Vec<String>,
    /// What to do, where that is known.
    pub(crate) advice: Option<String>,
}

impl ErrorBody {
    /// As it is told.
    pub(crate) fn of(told: &Told) -> ErrorBody {
        ErrorBody {
            kind: told.kind.word().to_owned(),
            message: told.message.clone(),
            causes: told.causes.clone(),
            advice: told.advice.clone(),
        }
    }

    /// As the other end told it.
    fn told(self) -> Told {
        let ErrorBody { kind, message, causes, advice } = self;
        Told { kind: Kind::from_word(&kind), message, causes, advice, awake: Vec::new() }
    }
}

/// The body of an answer that is none.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ErrorObject {
    /// What failed.
    error: ErrorBody,
    /// Of a fork, those that are awake all the same; not there if there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<super::vms::AwakeObject>)]
    awake: Vec<Value>,
}

impl ErrorObject {
    /// As it is told.
    fn of(told: &Told) -> ErrorObject {
        ErrorObject { error: ErrorBody::of(told), awake: told.awake.clone() }
    }

    /// As the other end told it.
    pub(crate) fn told(self) -> Told {
        Told { awake: self.awake, ..self.error.told() }
    }
}

/// Instead of a job about a VM, as the API's description has it.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it is there to be described")]
pub(crate) enum JobFailures {
    #[response(status = 400)]
    Malformed(ErrorObject),
    #[response(status = 404)]
    NotFound(ErrorObject),
    #[response(status = 408)]
    TooSlow(ErrorObject),
    #[response(status = 409)]
    InTheWay(ErrorObject),
    #[response(status = 413)]
    TooLong(ErrorObject),
    #[response(status = 415)]
    OtherType(ErrorObject),
    #[response(status = 421)]
    OtherHost(ErrorObject),
    #[response(status = 422)]
    Refused(ErrorObject),
    #[response(status = 429)]
    TooMany(ErrorObject),
    #[response(status = 500)]
    Failed(ErrorObject),
    #[response(status = 501)]
    Unsupported(ErrorObject),
    #[response(status = 503)]
    Ending(ErrorObject),
}

/// A failure on its way out.
#[derive(Debug)]
pub(crate) struct Failure {
    status: StatusCode,
    told: Told,
}

/// What a handler gives.
pub(crate) type Answer<T> = Result<T, Failure>;

impl Failure {
    /// Of a kind, with the status that belongs to it.
    pub(crate) fn of(told: Told) -> Failure {
        Failure { status: status_of(&told), told }
    }

    /// With a status of its own.
    pub(crate) fn with_status(status: StatusCode, kind: Kind, message: String) -> Failure {
        Failure { status, told: Told::new(kind, message) }
    }

    /// Too many at once.
    pub(crate) fn too_many(error: &anyhow::Error) -> Failure {
        Failure { status: StatusCode::TOO_MANY_REQUESTS, told: Told::of(error) }
    }
}

/// The status that belongs to a failure.
fn status_of(told: &Told) -> StatusCode {
    match told.kind {
        Kind::Usage => StatusCode::BAD_REQUEST,
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::AlreadyExists | Kind::Conflict | Kind::Busy => StatusCode::CONFLICT,
        Kind::Refused => StatusCode::UNPROCESSABLE_ENTITY,
        Kind::Unsupported => StatusCode::NOT_IMPLEMENTED,
        Kind::Cancelled => StatusCode::SERVICE_UNAVAILABLE,
        Kind::Other | Kind::Corrupt | Kind::Key | Kind::Io => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::of(Told::of(&error.into()))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = ErrorObject::of(&self.told);
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            // The rest of the request is not read.
            StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT => {
                headers.insert("connection", HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}

/// A body of JSON.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Wanted<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _state: &S) -> Answer<Wanted<T>> {
        if let Some(kind) = request.headers().get(CONTENT_TYPE) {
            let kind = kind.to_str().unwrap_or_default();
            let kind = kind.split(';').next().unwrap_or_default().trim();
            if !kind.eq_ignore_ascii_case("application/json") {
                let message = format!("a body of type {kind:?}, expected application/json");
                let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
                return Err(Failure::with_status(status, Kind::Usage, message));
            }
        }
        let bytes = read_body(request.into_body()).await?;
        // An array would be taken for a structure's fields, one by one.
        if bytes.trim_ascii_start().first() != Some(&b'{') {
            return Err(Fault::usage("the body is no JSON object").into());
        }
        let mut reader = serde_json::Deserializer::from_slice(&bytes);
        let read = T::deserialize(&mut reader).and_then(|value| reader.end().map(|()| value));
        let wanted = read.map_err(|error| {
            Fault::usage(format!("the body is not what docs/openapi.json describes: {error}"))
        })?;
        Ok(Wanted(wanted))
    }
}

async fn read_body(body: Body) -> Answer<Bytes> {
    let too_large = || {
        let message = format!("a body of more than {BODY_BYTES_MAX} bytes");
        Failure::with_status(StatusCode::PAYLOAD_TOO_LARGE, Kind::Usage, message)
    };
    match timeout(BODY_TIMEOUT, Limited::new(body, BODY_BYTES_MAX).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(Fault::usage(format!("the body ended early: {error}")).into()),
        Err(_) => {
            let message = format!("the body did not arrive within {BODY_TIMEOUT:?}");
            Err(Failure::with_status(StatusCode::REQUEST_TIMEOUT, Kind::Usage, message))
        }
    }
}

/// Parameters after the path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Asked<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Answer<Asked<T>> {
        let query = Query::<T>::try_from_uri(&parts.uri);
        let query = query.map_err(|error| Fault::usage(error.body_text()))?;
        Ok(Asked(query.0))
    }
}

/// What the path names: a VM, a snapshot, or a job.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Named<T>(pub(crate) T);

impl<S: Send + Sync, T> FromRequestParts<S> for Named<T>
where
    T: std::str::FromStr,
    T::Err: Into<anyhow::Error>,
{
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Named<T>> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let text = path.map_err(|error| Fault::usage(error.body_text()))?.0;
        let named = text.parse().map_err(|error: T::Err| {
            let cause = error.into();
            anyhow::Error::from(Fault::usage(format!("{cause:#}")))
        })?;
        Ok(Named(named))
    }
}

/// Nothing is at this path.
pub(crate) async fn nothing_here(request: Request) -> Failure {
    let message = format!("nothing is at {}; docs/api.md says what is", request.uri().path());
    Fault::new(Kind::NotFound, message).into()
}

/// Something is at this path, and cannot be used so. The header that says how is added by the router.
pub(crate) async fn not_so(request: Request) -> Response {
    let message = format!("{} is not for {}", request.uri().path(), request.method());
    let failure = Failure::with_status(StatusCode::METHOD_NOT_ALLOWED, Kind::Usage, message);
    let mut response = failure.into_response();
    // Whatever was set here would keep the router from its own.
    response.headers_mut().remove(ALLOW);
    response
}
