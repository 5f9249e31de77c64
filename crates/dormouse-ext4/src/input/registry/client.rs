//! Requests to a registry: who we are, where it sends us, and when it is asked again.
//!
//! Sources: the OCI distribution specification, 1.1; "Token Authentication" of the Distribution
//! project; RFC 6749, section 6, for identity tokens.

use std::fmt;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use ureq::http::{Response, StatusCode};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::input::registry::Transport;
use crate::input::registry::challenge::{self, Challenge};
use crate::input::registry::credentials::Credentials;
use crate::input::registry::reference::Reference;

/// What a connection may take to be made, and an answer to begin.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// How long nothing may come in the middle of a body.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);

/// The longest answer of a token server, and the longest complaint that is read.
const TOKEN_BYTES_MAX: u64 = 1 << 20;

/// Redirections of one request.
const REDIRECTIONS_MAX: u32 = 10;

/// So much of a registry's complaint is shown.
const COMPLAINT_CHARS_MAX: usize = 200;

/// Requests for one thing, where the registry is busy or breaks off.
pub(super) const ATTEMPTS_MAX: u32 = 5;

/// The pause after the first attempt; each one after it is twice as long.
const PAUSE: Duration = Duration::from_millis(250);

/// Talks to one registry about one repository.
pub(super) struct Client {
    agent: Agent,
    reference: Reference,
    credentials: Option<Credentials>,
    /// `http` or `https`, when it is known.
    scheme: OnceLock<&'static str>,
    /// What the `Authorization` header was last. Guards only itself, and is held over no request.
    authorization: Mutex<Option<String>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("reference", &self.reference)
            .field("scheme", &self.scheme)
            .finish_non_exhaustive()
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    /// Below the repository: `manifests/v1`.
    pub(super) path: &'a str,
    /// Media types; empty where any will do.
    pub(super) accept: &'a str,
    /// The first byte that is wanted.
    pub(super) from: u64,
}

impl Client {
    pub(super) fn new(
        reference: Reference,
        credentials: Option<Credentials>,
        transport: Transport,
    ) -> Result<Client> {
        let scheme = match transport {
            Transport::Plain => OnceLock::from("http"),
            Transport::Tls if !reference.is_loopback() => OnceLock::from("https"),
            // Asked when it is first needed.
            Transport::Tls => OnceLock::new(),
        };
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // Followed here, where ports count as part of where credentials may go.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("dormouse/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(ANSWER_TIMEOUT))
            .timeout_connect(Some(ANSWER_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .timeout_per_read(Some(SILENCE_TIMEOUT));
        if scheme.get() != Some(&"http") {
            config = config.tls_config(tls()?);
        }
        let agent = config.build().new_agent();
        let authorization = Mutex::new(None);
        Ok(Client { agent, reference, credentials, scheme, authorization })
    }

    /// Asks until there is an answer that is no passing trouble.
    pub(super) fn get(&self, request: Request<'_>) -> Result<Response<Body>> {
        let mut attempt = 1;
        loop {
            let answer = self.get_once(request);
            let passes = match &answer {
                Ok(answer) => is_passing(answer.status()),
                Err(error) => error.kind() == ErrorKind::Io,
            };
            if !passes || attempt == ATTEMPTS_MAX {
                return self.judged(request, answer?);
            }
            pause(attempt);
            attempt += 1;
        }
    }

    /// One request, or two where the registry first wants to know who we are.
    fn get_once(&self, request: Request<'_>) -> Result<Response<Body>> {
        let answer = self.send(request)?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            return Ok(answer);
        }
        let headers = answer.headers().get_all("www-authenticate");
        let challenges: Vec<Challenge> = headers
            .iter()
            .filter_map(|header| header.to_str().ok())
            .flat_map(challenge::parse)
            .collect();
        let Some(authorization) = self.authorize(&challenges)? else { return Ok(answer) };
        *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(authorization);
        self.send(request)
    }

    /// Sends a request, and follows where it is sent to. Who we are is told to the registry alone.
    fn send(&self, request: Request<'_>) -> Result<Response<Body>> {
        let origin = format!("{}://{}", self.scheme(), self.reference.server());
        let mut url = format!("{origin}/v2/{}/{}", self.reference.repository(), request.path);
        let authorization = self.authorization.lock().unwrap_or_else(PoisonError::into_inner);
        let authorization = authorization.clone();
        for _ in 0..=REDIRECTIONS_MAX {
            let mut get = self.agent.get(&url);
            if !request.accept.is_empty() {
                get = get.header("accept", request.accept);
            }
            if request.from > 0 {
                get = get.header("range", format!("bytes={}-", request.from));
            }
            if let Some(authorization) = &authorization
                && is_within(&url, &origin)
            {
                get = get.header("authorization", authorization);
            }
            let answer = get.call().map_err(|error| failed(&url, error))?;
            if !answer.status().is_redirection() {
                return Ok(answer);
            }
            let location = answer.headers().get("location").and_then(|value| value.to_str().ok());
            url = self.redirected(&url, location.unwrap_or_default())?;
        }
        let what = format!("{} sends in a circle", self.reference.host());
        Err(Error::io(what, io::Error::other("more than 10 redirections")))
    }

    /// Where a redirection leads. A registry with TLS sends nobody to a place without it.
    fn redirected(&self, from: &str, location: &str) -> Result<String> {
        let is_whole = location.starts_with("https://")
            || location.starts_with("http://") && self.scheme() == "http";
        if is_whole {
            return Ok(location.to_owned());
        }
        let rest = from.split_once("://").map_or("", |(_, rest)| rest);
        let authority = rest.split('/').next().unwrap_or_default();
        let scheme = &from[..from.len() - rest.len()];
        if location.starts_with('/') && !location.starts_with("//") {
            return Ok(format!("{scheme}{authority}{location}"));
        }
        let what = format!("{} sends to {location:?}", self.reference.host());
        Err(Error::new(ErrorKind::Refused, what))
    }

    /// How the registry is spoken to. On this machine, TLS is tried first.
    fn scheme(&self) -> &'static str {
        self.scheme.get_or_init(|| {
            let url = format!("https://{}/v2/", self.reference.server());
            if self.agent.get(&url).call().is_ok() { "https" } else { "http" }
        })
    }

    /// The `Authorization` header that answers a challenge, if there is an answer.
    fn authorize(&self, challenges: &[Challenge]) -> Result<Option<String>> {
        if let Some(bearer) = challenges.iter().find(|found| found.scheme == "bearer") {
            return self.token(bearer).map(|token| Some(format!("Bearer {token}")));
        }
        let is_basic = challenges.iter().any(|found| found.scheme == "basic");
        match &self.credentials {
            Some(Credentials::Password { user, password }) if is_basic => {
                Ok(Some(basic(user, password)))
            }
            _ => Ok(None),
        }
    }

    /// Gets a token for pulling from the server that the registry trusts.
    fn token(&self, challenge: &Challenge) -> Result<String> {
        let realm = challenge.get("realm").unwrap_or_default();
        let allowed: &[&str] =
            if self.scheme() == "https" { &["https://"] } else { &["http://", "https://"] };
        if !allowed.iter().any(|scheme| realm.starts_with(scheme)) {
            let what = format!("{} sends for tokens to {realm:?}", self.reference.host());
            return Err(Error::new(ErrorKind::Refused, what));
        }
        let scope = format!("repository:{}:pull", self.reference.repository());
        let scope = challenge.get("scope").unwrap_or(&scope);
        let service = challenge.get("service").unwrap_or_default();
        let sent = match &self.credentials {
            Some(Credentials::IdentityToken(token)) => self.agent.post(realm).send_form([
                ("grant_type", "refresh_token"),
                ("service", service),
                ("scope", scope),
                ("client_id", "dormouse"),
                ("refresh_token", token),
            ]),
            credentials => {
                let mut get = self.agent.get(realm).query("scope", scope);
                if !service.is_empty() {
                    get = get.query("service", service);
                }
                if let Some(Credentials::Password { user, password }) = credentials {
                    get = get.header("authorization", basic(user, password));
                }
                get.call()
            }
        };
        let mut answer = sent.map_err(|error| failed(realm, error))?;
        if answer.status() != StatusCode::OK {
            return Err(self.refused(answer.status(), &complaint(&mut answer)));
        }
        let what = || format!("the token server {realm} answers with no token");
        let mut text = Vec::new();
        let body = answer.body_mut().as_reader();
        body.take(TOKEN_BYTES_MAX).read_to_end(&mut text).context(what)?;
        let tokens: Tokens =
            serde_json::from_slice(&text).map_err(|_| Error::new(ErrorKind::BadArchive, what()))?;
        let token = tokens.token.or(tokens.access_token).unwrap_or_default();
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Error::new(ErrorKind::BadArchive, what()));
        }
        Ok(token)
    }

    /// The answer, if it is what was asked for.
    fn judged(&self, request: Request<'_>, mut answer: Response<Body>) -> Result<Response<Body>> {
        let status = answer.status();
        if status == StatusCode::OK || status == StatusCode::PARTIAL_CONTENT {
            return Ok(answer);
        }
        let said = complaint(&mut answer);
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(self.refused(status, &said)),
            StatusCode::NOT_FOUND => {
                let (host, path) = (self.reference.host(), request.path);
                let what = format!("{host} has no {path} of {}", self.reference.repository());
                Err(Error::new(ErrorKind::NotFound, format!("{what}{said}")))
            }
            _ => {
                let what = format!("cannot read from {}", self.reference.host());
                Err(Error::io(what, io::Error::other(format!("it answers {status}{said}"))))
            }
        }
    }

    fn refused(&self, status: StatusCode, said: &str) -> Error {
        let host = self.reference.host();
        let advice = match self.credentials {
            None => format!("; `skopeo login {host}` first, or name a file of credentials"),
            Some(_) => " with the credentials it was given".to_owned(),
        };
        Error::new(ErrorKind::Refused, format!("{host} answers {status}{said}{advice}"))
    }
}

#[derive(Deserialize)]
struct Tokens {
    token: Option<String>,
    access_token: Option<String>,
}

/// The first complaint in a registry's own words, for people.
fn complaint(answer: &mut Response<Body>) -> String {
    #[derive(Deserialize)]
    struct Complaints {
        errors: Vec<Complaint>,
    }
    #[derive(Deserialize)]
    struct Complaint {
        #[serde(default)]
        message: String,
    }
    let mut text = Vec::new();
    let body = answer.body_mut().as_reader();
    // What cannot be read has nothing to add to the status.
    let _ = body.take(TOKEN_BYTES_MAX).read_to_end(&mut text);
    let complaints = serde_json::from_slice::<Complaints>(&text).ok();
    let first = complaints.and_then(|found| found.errors.into_iter().next());
    let Some(first) = first.filter(|first| !first.message.is_empty()) else {
        return String::new();
    };
    let shown: String = first.message.chars().take(COMPLAINT_CHARS_MAX).collect();
    format!(": {}", shown.escape_debug())
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// Whether a URL is one of the registry's own.
fn is_within(url: &str, origin: &str) -> bool {
    url.strip_prefix(origin).is_some_and(|rest| rest.starts_with('/'))
}

/// Whether an answer is likely to be another one in a moment.
fn is_passing(status: StatusCode) -> bool {
    status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error()
}

pub(super) fn pause(attempt: u32) {
    std::thread::sleep(PAUSE * (1 << (attempt - 1)));
}

fn failed(url: &str, error: ureq::Error) -> Error {
    // Without what a query may hold.
    let shown = url.split('?').next().unwrap_or_default();
    Error::io(format!("cannot get {shown}"), error.into_io())
}

/// This machine's certificates (`SSL_CERT_FILE` and `SSL_CERT_DIR` name others).
fn tls() -> Result<TlsConfig> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        let what = "no certificates to know registries by; install ca-certificates, or say \
                    where they are with SSL_CERT_FILE";
        return Err(Error::new(ErrorKind::NotFound, what));
    }
    let certificates: Vec<Certificate<'static>> =
        found.certs.iter().map(|found| Certificate::from_der(found).to_owned()).collect();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&certificates))
        .unversioned_rustls_crypto_provider(provider)
        .build())
}

/// Whether reading may go on where it broke off.
pub(super) fn may_go_on(error: &io::Error) -> bool {
    // Errors of ours are judgements, others are a network's.
    !error.get_ref().is_some_and(|inner| inner.is::<Error>())
}
