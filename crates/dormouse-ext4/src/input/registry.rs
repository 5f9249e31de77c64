//! An image in a registry: manifests and layers over HTTP, checked by their digests like all others.
//!
//! Nothing that a registry says is believed: documents have a limit, layers end where their
//! descriptor says, and what breaks off goes on from where it was, a few times.

pub mod challenge;
pub(crate) mod client;
pub mod credentials;
pub mod reference;

use std::io::{self, Cursor, Read};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};
use ureq::BodyReader;
use ureq::http::StatusCode;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::input::oci::manifest::{self, Descriptor, Digest};
use crate::input::oci::{Blobs, What, document};
use crate::input::registry::client::{ATTEMPTS_MAX, Client, Request, may_go_on, pause};
use crate::input::registry::credentials::Credentials;
use crate::input::registry::reference::Reference;

/// What can be understood, the first of which is liked best.
const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// Manifests of before 2017, which are signed and list their layers backwards.
const OLD_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v1+";

/// How a registry is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Over TLS. On this machine's own addresses, without it where there is none.
    Tls,

    /// Without TLS: everybody on the way sees and changes what they like, within the digests.
    Plain,
}

/// A repository of a registry, for one image.
#[derive(Debug)]
pub struct Registry {
    client: Arc<Client>,
    reference: Reference,
    /// The manifest that the tag leads to, so that it is asked for once. Guards only itself.
    first: Mutex<Option<(Digest, Vec<u8>)>>,
}

impl Registry {
    /// Says where to ask, and as whom. Nothing is asked yet.
    pub fn new(
        reference: Reference,
        credentials: Option<Credentials>,
        transport: Transport,
    ) -> Result<Registry> {
        let client = Arc::new(Client::new(reference.clone(), credentials, transport)?);
        Ok(Registry { client, reference, first: Mutex::new(None) })
    }
}

impl Blobs for Registry {
    fn index(&self) -> Result<Vec<u8>> {
        let path = format!("manifests/{}", self.reference.version());
        let answer = self.client.get(Request { path: &path, accept: ACCEPT, from: 0 })?;
        let header = |name: &str| {
            let value = answer.headers().get(name).and_then(|value| value.to_str().ok());
            value.unwrap_or_default().to_owned()
        };
        let kind = header("content-type").split(';').next().unwrap_or_default().trim().to_owned();
        let told = header("docker-content-digest").parse::<Digest>().ok();
        let label = format!("the manifest of {}", self.reference);
        if kind.starts_with(OLD_MANIFEST) {
            let what = format!("{label} is of the first version, which nobody pushes any more");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let text = document(answer.into_body().into_reader(), &label)?;
        let found: Digest = format!("sha256:{}", manifest::hex(&Sha256::digest(&text))).parse()?;
        if let Some(told) = told.filter(|told| told.algorithm() == found.algorithm())
            && told != found
        {
            let what = format!("{label} has the digest {found}, and the registry says {told}");
            return Err(Error::new(ErrorKind::BadArchive, what));
        }
        // Checked against the one that was asked for when it is read from here.
        let digest = self.reference.digest().cloned().unwrap_or(found);
        let index = serde_json::json!({"manifests": [{
            "mediaType": kind, "digest": digest.as_str(), "size": text.len(),
        }]});
        *self.first.lock().unwrap_or_else(PoisonError::into_inner) = Some((digest, text));
        Ok(index.to_string().into_bytes())
    }

    fn open(&self, blob: &Descriptor, what: What) -> io::Result<Box<dyn Read + Send>> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((_, text)) = first.filter(|(digest, _)| *digest == blob.digest) {
            return Ok(Box::new(Cursor::new(text)));
        }
        let (folder, accept) = match what {
            What::Manifest => ("manifests", ACCEPT),
            What::Blob => ("blobs", ""),
        };
        Ok(Box::new(Download {
            client: Arc::clone(&self.client),
            path: format!("{folder}/{}", blob.digest),
            accept,
            bytes: blob.size,
            at: 0,
            body: None,
            breaks: 0,
        }))
    }
}

/// A blob on its way. Breaking off, it is asked for again from where it was.
struct Download {
    client: Arc<Client>,
    path: String,
    accept: &'static str,
    bytes: u64,
    at: u64,
    body: Option<BodyReader<'static>>,
    breaks: u32,
}

impl Download {
    fn open(&self) -> Result<BodyReader<'static>> {
        let request = Request { path: &self.path, accept: self.accept, from: self.at };
        let answer = self.client.get(request)?;
        let is_part = answer.status() == StatusCode::PARTIAL_CONTENT;
        let range = answer.headers().get("content-range").and_then(|value| value.to_str().ok());
        if is_part && !range.is_some_and(|range| begins_at(range, self.at)) {
            let what = format!("another part of {} than was asked for", self.path);
            return Err(Error::new(ErrorKind::BadArchive, what));
        }
        let mut body = answer.into_body().into_reader();
        if !is_part && self.at > 0 {
            // A registry that knows no parts begins anew.
            let what = || format!("cannot go on with {}", self.path);
            io::copy(&mut (&mut body).take(self.at), &mut io::sink()).context(what)?;
        }
        Ok(body)
    }

    fn read_once(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.body.is_none() {
            self.body = Some(self.open()?);
        }
        let Some(body) = &mut self.body else { return Err(io::ErrorKind::NotConnected.into()) };
        let read = body.read(buf)?;
        if read == 0 && !buf.is_empty() && self.at < self.bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += read as u64;
        Ok(read)
    }
}

impl Read for Download {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.read_once(buf) {
                Err(error) if may_go_on(&error) && self.breaks < ATTEMPTS_MAX => {
                    self.body = None;
                    self.breaks += 1;
                    pause(self.breaks);
                }
                read => return read,
            }
        }
    }
}

/// Whether a `Content-Range` begins at a byte.
fn begins_at(range: &str, at: u64) -> bool {
    let first = range.trim().strip_prefix("bytes ").and_then(|rest| rest.split('-').next());
    first.and_then(|first| first.trim().parse().ok()) == Some(at)
}
