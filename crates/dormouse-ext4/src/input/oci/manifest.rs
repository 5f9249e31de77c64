//! Indices, manifests and descriptors, parsed and judged without any I/O.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

use crate::error::{Error, ErrorKind, Result};

/// The annotation with an image's tag.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// The annotation by which buildkit marks what is no image.
const ATTESTATION: &str = "vnd.docker.reference.type";

/// A blob's digest: an algorithm and hexadecimal digits, both checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Digest(String);

impl Digest {
    /// The whole.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `sha256` or `sha512`.
    pub fn algorithm(&self) -> &str {
        self.0.split(':').next().unwrap_or_default()
    }

    /// The digits.
    pub fn hex(&self) -> &str {
        self.0.split(':').nth(1).unwrap_or_default()
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Digest> {
        let digits = match text.split_once(':') {
            Some(("sha256", hex)) if hex.len() == 64 => hex,
            Some(("sha512", hex)) if hex.len() == 128 => hex,
            _ => "",
        };
        let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if digits.is_empty() || !digits.bytes().all(is_hex) {
            let what = format!("{text:?} is not a digest of sha256 or sha512");
            return Err(Error::new(ErrorKind::BadArchive, what));
        }
        Ok(Digest(text.to_owned()))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(input: D) -> std::result::Result<Digest, D::Error> {
        String::deserialize(input)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What an image runs on.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Platform {
    /// The system, such as `linux`.
    pub os: String,

    /// The processor, such as `amd64`.
    pub architecture: String,

    /// Its kind, such as `v8`.
    #[serde(default)]
    pub variant: Option<String>,
}

impl FromStr for Platform {
    type Err = Error;

    /// Reads `OS/ARCHITECTURE[/VARIANT]`.
    fn from_str(text: &str) -> Result<Platform> {
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts[..] {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant.to_owned())),
            _ => {
                let what = format!("{text:?} is not a platform, OS/ARCHITECTURE[/VARIANT]");
                return Err(Error::new(ErrorKind::InvalidInput, what));
            }
        };
        Ok(Platform { os: os.to_owned(), architecture: architecture.to_owned(), variant })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(f, "/{variant}"))
    }
}

/// What refers to a blob.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,

    /// Its digest.
    pub digest: Digest,

    /// Its length.
    pub size: u64,

    /// What it is for.
    #[serde(default)]
    pub platform: Option<Platform>,

    /// What else is known of it.
    #[serde(default)]
    pub annotations: std::collections::HashMap<String, String>,
}

impl Descriptor {
    /// Fails unless this is a layer that can be read.
    pub(crate) fn check_layer(&self) -> Result<()> {
        let kind = self.media_type.as_str();
        let known = kind.starts_with("application/vnd.oci.image.layer.")
            || kind.starts_with("application/vnd.docker.image.rootfs.");
        if !known || kind.ends_with("+encrypted") {
            let what = format!("a layer of type {kind:?}");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        if kind.contains(".foreign.") {
            return Err(Error::new(ErrorKind::Unsupported, "a layer that lies elsewhere"));
        }
        Ok(())
    }

    /// Whether this is the configuration of an image, and not of something else in its form.
    pub(crate) fn is_image_config(&self) -> bool {
        matches!(
            self.media_type.as_str(),
            "application/vnd.oci.image.config.v1+json"
                | "application/vnd.docker.container.image.v1+json"
        )
    }

    fn tag(&self) -> Option<&str> {
        self.annotations.get(REF_NAME).map(String::as_str)
    }
}

/// Images to choose from.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Index {
    /// One for each tag or platform.
    pub manifests: Vec<Descriptor>,
}

/// An image.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Manifest {
    /// What it is for and how it is run.
    #[serde(default)]
    pub config: Option<Descriptor>,

    /// The lowest first.
    pub layers: Vec<Descriptor>,
}

/// Reads an index.
pub fn parse_index(text: &[u8]) -> Result<Index> {
    serde_json::from_slice(text).map_err(|error| bad(format!("not an OCI index: {error}")))
}

/// Reads a manifest.
pub fn parse_manifest(text: &[u8]) -> Result<Manifest> {
    serde_json::from_slice(text).map_err(|error| bad(format!("not an OCI manifest: {error}")))
}

/// The platform that an image's configuration tells, if it does.
pub fn parse_platform(text: &[u8]) -> Result<Option<Platform>> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        os: String,
        #[serde(default)]
        architecture: String,
        #[serde(default)]
        variant: Option<String>,
    }
    let found: Config = serde_json::from_slice(text)
        .map_err(|error| bad(format!("not an image's configuration: {error}")))?;
    let Config { os, architecture, variant } = found;
    if os.is_empty() || architecture.is_empty() {
        return Ok(None);
    }
    Ok(Some(Platform { os, architecture, variant }))
}

/// Whether a blob is an index.
pub(crate) fn is_index(descriptor: &Descriptor, text: &[u8]) -> bool {
    match descriptor.media_type.as_str() {
        "" => parse_index(text).is_ok(),
        kind => kind.contains(".index.") || kind.contains("manifest.list"),
    }
}

/// Which image of an index is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The tag; without one the index must have only one image for the platform.
    pub tag: Option<String>,

    /// What it is to run on.
    pub platform: Platform,
}

impl Wanted {
    /// Chooses a manifest, or an index for more platforms; tags count in the first index only.
    pub fn choose(&self, index: &Index, first: bool) -> Result<Descriptor> {
        let mut found: Vec<&Descriptor> = index
            .manifests
            .iter()
            .filter(|descriptor| !descriptor.annotations.contains_key(ATTESTATION))
            .collect();
        if let Some(tag) = self.tag.as_deref().filter(|_| first) {
            found.retain(|descriptor| {
                let name = descriptor.tag();
                // Some write the whole reference, `registry/name:tag`.
                name == Some(tag)
                    || name.and_then(|name| name.rsplit_once(':')).is_some_and(|(_, t)| t == tag)
            });
            if found.is_empty() {
                let tags: Vec<&str> = index.manifests.iter().filter_map(Descriptor::tag).collect();
                let what = format!("no tag {tag:?}; there are {}", list(&tags));
                return Err(Error::new(ErrorKind::NotFound, what));
            }
        }
        let fits = |descriptor: &&Descriptor| {
            descriptor.platform.as_ref().is_none_or(|platform| self.fits(platform))
        };
        let fitting: Vec<&Descriptor> = found.iter().copied().filter(fits).collect();
        match fitting[..] {
            [one] => Ok(one.clone()),
            [] => {
                let all = found.iter().filter_map(|descriptor| descriptor.platform.as_ref());
                let all: Vec<String> = all.map(Platform::to_string).collect();
                let what = format!("no image for {}; there are {}", self.platform, list(&all));
                Err(Error::new(ErrorKind::NotFound, what))
            }
            // The same image under several tags, or variants of which the first is the plain one.
            [one, ref others @ ..] if others.iter().all(|other| other.digest == one.digest) => {
                Ok(one.clone())
            }
            [one, ..] if !first => Ok(one.clone()),
            _ => {
                let tags: Vec<&str> = fitting.iter().filter_map(|found| found.tag()).collect();
                let what = format!("several images; say which tag: {}", list(&tags));
                Err(Error::new(ErrorKind::InvalidInput, what))
            }
        }
    }

    pub(crate) fn fits(&self, platform: &Platform) -> bool {
        let wanted = &self.platform;
        (&platform.os, &platform.architecture) == (&wanted.os, &wanted.architecture)
            && (wanted.variant.is_none() || platform.variant == wanted.variant)
    }
}

fn list<T: AsRef<str>>(names: &[T]) -> String {
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// Hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn bad(what: String) -> Error {
    Error::new(ErrorKind::BadArchive, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(digit: char, tag: Option<&str>, platform: Option<&str>) -> Descriptor {
        let annotations =
            tag.map(|tag| (REF_NAME.to_owned(), tag.to_owned())).into_iter().collect();
        Descriptor {
            media_type: String::new(),
            digest: format!("sha256:{}", digit.to_string().repeat(64)).parse().unwrap(),
            size: 1,
            platform: platform.map(|platform| platform.parse().unwrap()),
            annotations,
        }
    }

    #[test]
    fn images_are_chosen_by_tag_and_platform() {
        let index = Index {
            manifests: vec![
                descriptor('1', Some("v1"), Some("linux/amd64")),
                descriptor('2', Some("docker.io/name:v2"), Some("linux/amd64")),
                descriptor('3', Some("v1"), Some("linux/arm64/v8")),
            ],
        };
        let choose = |tag: Option<&str>, platform: &str| {
            let tag = tag.map(str::to_owned);
            let wanted = Wanted { tag, platform: platform.parse().unwrap() };
            wanted.choose(&index, true).map(|found| found.digest.hex()[..1].to_owned())
        };
        assert_eq!(choose(Some("v1"), "linux/amd64").unwrap(), "1");
        assert_eq!(choose(Some("v2"), "linux/amd64").unwrap(), "2");
        assert_eq!(choose(Some("v1"), "linux/arm64").unwrap(), "3");
        assert_eq!(choose(None, "linux/arm64/v8").unwrap(), "3");
        let several = choose(None, "linux/amd64").unwrap_err();
        assert!(several.to_string().contains("v1, docker.io/name:v2"), "{several}");
        let none = choose(Some("v9"), "linux/amd64").unwrap_err();
        assert_eq!(none.kind(), ErrorKind::NotFound);
        assert!(choose(Some("v2"), "linux/s390x").unwrap_err().to_string().contains("linux/amd64"));
    }

    #[test]
    fn a_digest_is_no_path() {
        for wrong in ["sha256:..", "sha256:", "md5:00", "../../etc/passwd", "sha256/ab"] {
            assert!(wrong.parse::<Digest>().is_err(), "{wrong}");
        }
        let upper = format!("sha256:{}", "A".repeat(64));
        assert!(upper.parse::<Digest>().is_err());
    }
}
