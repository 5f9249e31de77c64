//! OCI images: a layout folder, or one in an archive. The manifest is chosen by tag and platform,
//! and every blob is checked against its digest and length while it is read.
//!
//! Source: the OCI image specification, 1.1.

pub mod manifest;

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest as _, Sha256, Sha512};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::input::Limits;
use crate::input::decode::ReadAhead;
use crate::input::layers::{Layer, Whiteouts, apply};
use crate::input::oci::manifest::{Descriptor, Digest, Manifest, Platform, Wanted};
use crate::input::tar::{MemberKind, Tar};
use crate::stage::Stage;
use crate::tree::Tree;
use crate::write::Watch;

/// The longest index, manifest or configuration.
const DOCUMENT_BYTES_MAX: u64 = 8 << 20;

/// The most layers: what a link's 16 bits can tell apart.
const LAYERS_MAX: usize = 10_000;

/// Indices in indices.
const INDEX_DEPTH_MAX: u32 = 4;

/// Where blobs are.
pub trait Blobs: fmt::Debug + Send + Sync {
    /// The index that everything begins with, as JSON.
    fn index(&self) -> Result<Vec<u8>>;

    /// Opens a blob. Its bytes are not checked yet.
    fn open(&self, blob: &Descriptor, what: What) -> io::Result<Box<dyn Read + Send>>;
}

/// What a blob is; registries keep manifests apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A manifest or an index.
    Manifest,

    /// A configuration or a layer.
    Blob,
}

/// A layout folder.
#[derive(Clone, Debug)]
pub struct LayoutFolder(PathBuf);

impl LayoutFolder {
    /// The layout in a folder.
    pub fn new(path: &Path) -> LayoutFolder {
        LayoutFolder(path.to_owned())
    }
}

impl Blobs for LayoutFolder {
    fn index(&self) -> Result<Vec<u8>> {
        let path = self.0.join("index.json");
        let file = File::open(&path);
        let file =
            file.context(|| format!("cannot open {}; is this an OCI layout?", path.display()))?;
        document(file, &path.display().to_string())
    }

    fn open(&self, blob: &Descriptor, _what: What) -> io::Result<Box<dyn Read + Send>> {
        let (algorithm, hex) = (blob.digest.algorithm(), blob.digest.hex());
        let path = self.0.join("blobs").join(algorithm).join(hex);
        Ok(Box::new(File::open(path)?))
    }
}

/// A layout in a plain tar file.
#[derive(Debug)]
pub struct LayoutArchive {
    label: String,
    file: Arc<File>,
    /// Offsets and lengths, by name.
    members: HashMap<Vec<u8>, (u64, u64)>,
}

impl LayoutArchive {
    /// Reads the archive's table of contents, which means its headers only.
    pub fn open(path: &Path, limits: &Limits) -> Result<LayoutArchive> {
        let label = path.display().to_string();
        let file = Arc::new(File::open(path).context(|| format!("cannot open {label}"))?);
        let mut members = HashMap::new();
        let mut at = 0;
        loop {
            let part = Part { file: Arc::clone(&file), at, end: at + HEADERS_BYTES };
            // Headers are short and contents are skipped by their length.
            let mut tar = Tar::new(ReadAhead::new(move || Ok(Box::new(part))), u64::MAX);
            let told = |error: Error| error.within(format!("{label} at byte {at}"));
            let Some(member) = tar.next_header().map_err(told)? else { break };
            let (member, header_bytes) = member;
            if members.len() as u64 >= limits.entries {
                let what = format!("{label} has more than {} entries", limits.entries);
                return Err(Error::new(ErrorKind::Limit, what));
            }
            at += header_bytes;
            let content = if member.kind == MemberKind::File { member.bytes } else { 0 };
            let name = member.name.strip_prefix(b"./").unwrap_or(&member.name).to_vec();
            members.insert(name, (at, content));
            at += content.next_multiple_of(512);
        }
        Ok(LayoutArchive { label, file, members })
    }

    fn member(&self, name: &str) -> io::Result<Part> {
        let found = self.members.get(name.as_bytes());
        let &(at, bytes) = found.ok_or(io::ErrorKind::NotFound)?;
        Ok(Part { file: Arc::clone(&self.file), at, end: at + bytes })
    }
}

/// Headers before a content: an extended one and the member's own, with room to spare.
const HEADERS_BYTES: u64 = 64 << 10;

impl Blobs for LayoutArchive {
    fn index(&self) -> Result<Vec<u8>> {
        let what = || format!("no index.json in {}; is this an OCI archive?", self.label);
        document(self.member("index.json").context(what)?, &self.label)
    }

    fn open(&self, blob: &Descriptor, _what: What) -> io::Result<Box<dyn Read + Send>> {
        let name = format!("blobs/{}/{}", blob.digest.algorithm(), blob.digest.hex());
        Ok(Box::new(self.member(&name)?))
    }
}

/// A part of a file.
struct Part {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Part {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(buf.len());
        let read = self.file.read_at(&mut buf[..left], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// What was taken of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The manifest's digest.
    pub manifest: Digest,

    /// Its layers, the lowest first.
    pub layers: Vec<Digest>,
}

/// Applies the layers of an image to `tree`; contents go to `stage`.
pub fn read(
    tree: &mut Tree,
    stage: &mut Stage<'_>,
    blobs: &Arc<dyn Blobs>,
    wanted: &Wanted,
    limits: &Limits,
    watch: &dyn Watch,
) -> Result<Image> {
    let (chosen, manifest) = choose(&**blobs, wanted)?;
    check_platform(&**blobs, &chosen, &manifest, wanted)?;
    if manifest.layers.len() > LAYERS_MAX {
        let what =
            format!("an image of {} layers; {LAYERS_MAX} is the most", manifest.layers.len());
        return Err(Error::new(ErrorKind::Limit, what));
    }
    let mut layers = Vec::with_capacity(manifest.layers.len());
    let count = manifest.layers.len();
    for (number, layer) in (0u16..).zip(manifest.layers) {
        let label = format!("layer {} of {count} ({})", number + 1, layer.digest);
        layer.check_layer().map_err(|error| error.within(label.clone()))?;
        let blob = layer.clone();
        let blobs = Arc::clone(blobs);
        let open = move || -> io::Result<Box<dyn Read + Send>> {
            // Read and digested beside unpacking, which is what takes longest.
            let checked = move || -> io::Result<Box<dyn Read + Send>> {
                Ok(Box::new(Checked::new(blobs.open(&blob, What::Blob)?, &blob)))
            };
            Ok(Box::new(ReadAhead::new(checked)))
        };
        let layer_of = Layer { label: &label, number, whiteouts: Whiteouts::Apply };
        apply(tree, stage, open, layer_of, limits, watch)?;
        layers.push(layer.digest);
    }
    Ok(Image { manifest: chosen.digest, layers })
}

/// Finds the manifest for a tag and a platform.
fn choose(blobs: &dyn Blobs, wanted: &Wanted) -> Result<(Descriptor, Manifest)> {
    let index = manifest::parse_index(&blobs.index()?)?;
    let mut found = wanted.choose(&index, true)?;
    for _ in 0..INDEX_DEPTH_MAX {
        let blob = format!("blob {}", found.digest);
        let input = blobs.open(&found, What::Manifest);
        let input = input.context(|| format!("cannot open {blob}"))?;
        let text = document(Checked::new(input, &found), &blob)?;
        if !manifest::is_index(&found, &text) {
            let manifest = manifest::parse_manifest(&text).map_err(|error| error.within(blob))?;
            return Ok((found, manifest));
        }
        let index = manifest::parse_index(&text).map_err(|error| error.within(blob))?;
        found = wanted.choose(&index, false)?;
    }
    Err(Error::new(ErrorKind::BadArchive, "indices within indices, without an end"))
}

/// Fails where an image that no index describes is, by its configuration, for another platform.
fn check_platform(
    blobs: &dyn Blobs,
    chosen: &Descriptor,
    manifest: &Manifest,
    wanted: &Wanted,
) -> Result<()> {
    let Some(config) = manifest.config.as_ref().filter(|config| config.is_image_config()) else {
        return Ok(());
    };
    if chosen.platform.is_some() {
        return Ok(());
    }
    let label = format!("configuration {}", config.digest);
    let input = blobs.open(config, What::Blob).context(|| format!("cannot open {label}"))?;
    let text = document(Checked::new(input, config), &label)?;
    match manifest::parse_platform(&text).map_err(|error| error.within(label))? {
        Some(platform) if !wanted.fits(&platform) => {
            let what = format!(
                "the image is for {platform}, not for {}; say so with --platform if it should be",
                wanted.platform
            );
            Err(Error::new(ErrorKind::NotFound, what))
        }
        _ => Ok(()),
    }
}

pub(crate) fn document(input: impl Read, label: &str) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let what = || format!("cannot read {label}");
    input.take(DOCUMENT_BYTES_MAX + 1).read_to_end(&mut text).context(what)?;
    if text.len() as u64 > DOCUMENT_BYTES_MAX {
        let what = format!("{label} has more than {DOCUMENT_BYTES_MAX} bytes");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    Ok(text)
}

/// Passes a blob on, and fails at its end if it is not what its descriptor says.
pub(crate) struct Checked<R> {
    input: R,
    expected: Digest,
    bytes: u64,
    seen: u64,
    hasher: Hasher,
}

enum Hasher {
    Sha256(Sha256),
    Sha512(Box<Sha512>),
}

impl<R: Read> Checked<R> {
    pub(crate) fn new(input: R, descriptor: &Descriptor) -> Checked<R> {
        let hasher = match descriptor.digest.algorithm() {
            "sha512" => Hasher::Sha512(Box::default()),
            _ => Hasher::Sha256(Sha256::new()),
        };
        let expected = descriptor.digest.clone();
        Checked { input, expected, bytes: descriptor.size, seen: 0, hasher }
    }

    fn check(&self) -> io::Result<()> {
        let found = match &self.hasher {
            Hasher::Sha256(hasher) => manifest::hex(&hasher.clone().finalize()),
            Hasher::Sha512(hasher) => manifest::hex(&hasher.clone().finalize()),
        };
        if self.seen != self.bytes || found != self.expected.hex() {
            let what = format!(
                "the blob has {} bytes with digest {found}, expected {} bytes with {}",
                self.seen,
                self.bytes,
                self.expected.hex()
            );
            return Err(Error::new(ErrorKind::BadArchive, what).into());
        }
        Ok(())
    }
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buf)?;
        self.seen += read as u64;
        if self.seen > self.bytes {
            let what = format!("the blob is longer than the {} bytes it should have", self.bytes);
            return Err(Error::new(ErrorKind::BadArchive, what).into());
        }
        match &mut self.hasher {
            Hasher::Sha256(hasher) => hasher.update(&buf[..read]),
            Hasher::Sha512(hasher) => hasher.update(&buf[..read]),
        }
        if read == 0 && !buf.is_empty() {
            self.check()?;
        }
        Ok(read)
    }
}

/// The platform of this host, in OCI's words.
pub fn host_platform() -> Platform {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    };
    Platform { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: None }
}
