//! Names of images in registries: `[HOST[:PORT]/]NAME[:TAG][@DIGEST]`, as docker and skopeo read them.
//!
//! Every part is checked letter by letter, so that nothing but what is meant gets into a URL.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};
use crate::input::oci::manifest::Digest;

/// The registry of names without a host.
const HUB: &str = "docker.io";

/// Where it really is.
const HUB_HOST: &str = "registry-1.docker.io";

/// What is meant if neither tag nor digest is given.
const LATEST: &str = "latest";

/// The longest name with its host (the distribution specification).
const NAME_BYTES_MAX: usize = 255;

/// The longest tag.
const TAG_BYTES_MAX: usize = 128;

/// An image in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// The host, with its port if it has one, as it was named.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The host that is asked.
    pub(crate) fn server(&self) -> &str {
        if self.host == HUB { HUB_HOST } else { &self.host }
    }

    /// The name in the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The digest that the manifest must have.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What the manifest is asked for by: the digest if there is one, else the tag.
    pub(crate) fn version(&self) -> &str {
        match &self.digest {
            Some(digest) => digest.as_str(),
            None => self.tag.as_deref().unwrap_or(LATEST),
        }
    }

    /// Whether the host is this machine, where registries speak HTTP without TLS as often as not.
    pub(crate) fn is_loopback(&self) -> bool {
        let host = match self.host.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => self.host.split(':').next().unwrap_or_default(),
        };
        let address = host.parse::<std::net::IpAddr>();
        host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Reference> {
        let wrong = |why: &str| {
            let what = format!("{text:?} is not a reference, [HOST/]NAME[:TAG][@DIGEST]: {why}");
            Error::new(ErrorKind::InvalidInput, what)
        };
        let (named, digest) = match text.split_once('@') {
            Some((named, digest)) => {
                (named, Some(digest.parse().map_err(|_| wrong("the digest is none"))?))
            }
            None => (text, None),
        };
        // A colon before the last slash is a port's.
        let (name, tag) = match named.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag.to_owned())),
            _ => (named, None),
        };
        let (host, repository) = match name.split_once('/') {
            Some((host, rest)) if is_host(host) => (host.to_owned(), rest.to_owned()),
            Some(_) => (HUB.to_owned(), name.to_owned()),
            None => (HUB.to_owned(), format!("library/{name}")),
        };
        let host = match host.as_str() {
            "index.docker.io" | HUB_HOST => HUB.to_owned(),
            _ => host,
        };
        if host.len() + repository.len() > NAME_BYTES_MAX {
            return Err(wrong("it is longer than 255 bytes"));
        }
        if !is_authority(&host) {
            return Err(wrong("the host is none"));
        }
        if !repository.split('/').all(is_component) {
            return Err(wrong("names are small letters and digits with . _ - between them"));
        }
        if tag.as_deref().is_some_and(|tag| !is_tag(tag)) {
            return Err(wrong("the tag is none"));
        }
        Ok(Reference { host, repository, tag, digest })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => write!(f, ":{}", self.version()),
        }
    }
}

/// Whether the first component is a host: it has a dot or a port, or is this machine.
fn is_host(text: &str) -> bool {
    text.contains(['.', ':']) || text == "localhost"
}

fn is_authority(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, rest)) => {
                if address.parse::<std::net::Ipv6Addr>().is_err() {
                    return false;
                }
                match (rest, rest.strip_prefix(':')) {
                    ("", _) => return true,
                    (_, Some(port)) => return port.parse::<u16>().is_ok(),
                    _ => return false,
                }
            }
            None => return false,
        },
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    host.split('.').all(is_label) && port.is_none_or(|port| port.parse::<u16>().is_ok())
}

fn is_component(text: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends = bytes.first().zip(bytes.last());
    ends.is_some_and(|(&first, &last)| is_letter(first) && is_letter(last))
        && bytes.iter().all(|&byte| is_letter(byte) || matches!(byte, b'.' | b'_' | b'-'))
        && !text.contains("..")
}

fn is_tag(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=TAG_BYTES_MAX).contains(&text.len())
        && text.bytes().next().is_some_and(is_word)
        && text.bytes().all(|byte| is_word(byte) || matches!(byte, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read_as_docker_reads_them() {
        let hex = "a".repeat(64);
        let by_digest = format!("localhost:5000/a@sha256:{hex}");
        let both = format!("quay.io/a/b:v1@sha256:{hex}");
        for (text, host, repository, version) in [
            ("alpine", "docker.io", "library/alpine", "latest"),
            ("alpine:3.20", "docker.io", "library/alpine", "3.20"),
            ("user/name", "docker.io", "user/name", "latest"),
            ("index.docker.io/library/a", "docker.io", "library/a", "latest"),
            ("localhost/a", "localhost", "a", "latest"),
            ("quay.io/a/b/c:v1_x", "quay.io", "a/b/c", "v1_x"),
            ("127.0.0.1:5000/a:v1", "127.0.0.1:5000", "a", "v1"),
            ("[::1]:5000/a", "[::1]:5000", "a", "latest"),
            (&by_digest, "localhost:5000", "a", &by_digest[17..]),
            (&both, "quay.io", "a/b", &both[15..]),
        ] {
            let found: Reference = text.parse().unwrap();
            assert_eq!(
                (found.host(), found.repository(), found.version()),
                (host, repository, version),
                "{text}"
            );
        }
        assert_eq!("alpine".parse::<Reference>().unwrap().server(), HUB_HOST);
        for (text, expected) in [
            ("localhost:1/a", true),
            ("127.3.2.1/a", true),
            ("[::1]/a", true),
            ("localhost.example/a", false),
            ("alpine", false),
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().is_loopback(), expected, "{text}");
        }
    }

    #[test]
    fn what_could_lead_elsewhere_is_refused() {
        let long = format!("quay.io/{}", "a".repeat(300));
        for text in [
            "",
            "/",
            "a/../b",
            "a//b",
            "A",
            "quay.io/",
            "quay.io/a?b",
            "quay.io/a#b",
            "quay.io/a b",
            "user@quay.io/a",
            "quay.io:port/a",
            "qu_ay.io/a",
            "[::1/a",
            "[nine]:1/a",
            "[::1]x/a",
            "a:",
            "a:-tag",
            "a:tag/",
            "a@sha256:00",
            "a@",
            "%2e%2e/a",
            &long,
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
    }
}
