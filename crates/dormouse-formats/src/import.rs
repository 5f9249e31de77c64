//! Taking a foreign snapshot in: generation by generation, each streamed into a commit.
//!
//! A format's module looks at what is there and makes a [`Found`]: generations, oldest first, each
//! with its images as layers, files or bytes. Nothing was read but headers then. [`import`] commits
//! them in order. A layer says what it has changed since the generation before, so what did not
//! change is neither read nor looked up again, and nothing is copied to a temporary file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_image::block::HoleMeaning;
use dormouse_image::codec::Codec;
use dormouse_store::commit::{CommitReport, CommitRequest, NewImage, Parent};
use dormouse_store::manifest::{Manifest, MemoryRegion, Vmm};
use dormouse_store::name::{ImageName, Name, SnapRef};
use dormouse_store::progress::Job;
use dormouse_store::reader::ImageReader;
use dormouse_store::source::{LayerSource, Source};
use dormouse_store::store::Store;
use uuid::Uuid;

use crate::data::{RandomRead, StableFile, WholeFile};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::Format;
use crate::verify::{Compare, Replay};

/// The label with the format that a snapshot came from.
pub const FORMAT_LABEL: &str = "import.format";

/// What was found at a path.
#[derive(Debug)]
pub struct Found {
    /// Whose it is.
    pub format: Format,

    /// The format's version, in its own words.
    pub version: String,

    /// What to commit, oldest first.
    pub generations: Vec<Generation>,

    /// What a user should know: what was skipped, assumed or missing.
    pub notes: Vec<String>,

    /// Whether the generations have all their images, so that those of a parent that are not among
    /// them are dropped. A VMM's own snapshot has no disks, which are then the parent's.
    pub is_whole: bool,

    /// The snapshot that the first one holds the changes of.
    pub base: Option<CarriedBase>,
}

/// A snapshot that whoever sent changes of it says is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CarriedBase {
    /// The UUID that it had where it was made.
    pub uuid: Uuid,

    /// The images that there are changes of, each with what it must hold, see
    /// [`content_digest`](crate::carry::content_digest).
    pub images: Vec<(ImageName, Option<String>)>,
}

/// One snapshot to be.
#[derive(Debug)]
pub struct Generation {
    /// What messages and reports call it.
    pub title: String,

    /// Its images.
    pub images: Vec<NewContent>,

    /// Where memory lies in the guest, if that is known.
    pub memory_layout: Vec<MemoryRegion>,

    /// What ran the guest.
    pub vmm: Vmm,

    /// Put beside [`FORMAT_LABEL`].
    pub labels: BTreeMap<String, String>,

    /// Pairs of files that must be copies of each other, which is looked at before anything of it is
    /// committed.
    pub same: Vec<[Arc<StableFile>; 2]>,
}

impl Generation {
    /// A generation without images.
    pub(crate) fn new(title: impl Into<String>) -> Generation {
        Generation {
            title: title.into(),
            images: Vec::new(),
            memory_layout: Vec::new(),
            vmm: Vmm::default(),
            labels: BTreeMap::new(),
            same: Vec::new(),
        }
    }
}

/// An image of a generation.
#[derive(Debug)]
pub struct NewContent {
    /// Which one.
    pub image: ImageName,

    /// Its bytes.
    pub body: Body,

    /// Another way to the same bytes, for a comparison afterwards.
    pub replay: Option<Box<dyn Replay>>,
}

impl NewContent {
    /// A file of a foreign folder, as it is.
    pub(crate) fn opened(image: ImageName, file: StableFile) -> NewContent {
        // A lineage has more files than a process may hold open.
        file.release();
        NewContent { image, body: Body::Opened(Arc::new(file)), replay: None }
    }
}

/// The bytes of an image.
#[derive(Clone, Debug)]
pub enum Body {
    /// A file that the user named, whose holes are zeros.
    File(PathBuf),

    /// A file of a foreign folder, whose holes are zeros, opened when it was looked at.
    Opened(Arc<StableFile>),

    /// A file whose holes are as in the generation before.
    Diff(PathBuf),

    /// A few bytes.
    Bytes(Arc<[u8]>),

    /// A layer whose runs cover everything.
    Whole(Arc<dyn LayerSource>),

    /// A layer between whose runs the image is as in the generation before.
    Changes(Arc<dyn LayerSource>),
}

/// How to import.
#[derive(Clone, Debug)]
pub struct ImportRequest {
    /// The name that the snapshots get.
    pub name: Name,

    /// What the first one is taken over.
    pub parent: Parent,

    /// How new blocks are compressed.
    pub codec: Codec,

    /// Whether every byte is compared with the source afterwards.
    pub verify: bool,
}

/// What became of an import.
#[derive(Debug)]
pub struct ImportReport {
    /// Whose it was.
    pub format: Format,

    /// The format's version.
    pub version: String,

    /// The snapshots, oldest first.
    pub snapshots: Vec<Imported>,

    /// What a user should know.
    pub notes: Vec<String>,
}

/// One snapshot that was made.
#[derive(Debug)]
pub struct Imported {
    /// What it was called there.
    pub title: String,

    /// What was committed.
    pub commit: CommitReport,

    /// Bytes that were compared with the source, if that was asked for.
    pub verified_bytes: Option<u64>,
}

/// Commits what was found. When a generation fails, those before it stand.
pub fn import(
    store: &Store,
    found: Found,
    request: &ImportRequest,
    job: Job<'_>,
) -> Result<ImportReport> {
    let mut snapshots: Vec<Imported> = Vec::new();
    let mut parent = match &found.base {
        Some(base) => known_base(store, base, &request.parent, job)?,
        None => request.parent.clone(),
    };
    // Somebody else may commit to the name meanwhile: what the layers were compared with, and what
    // the new snapshot says of itself, must be the same snapshot.
    let is_named = matches!(parent, Parent::Snapshot(_));
    if parent == Parent::Auto {
        parent = match store.numbers(&request.name)?.last() {
            None => Parent::None,
            Some(&number) => {
                Parent::Snapshot(SnapRef { name: request.name.clone(), number: Some(number) })
            }
        };
    }
    if !is_named {
        refuse_diffs(found.generations.first())?;
    }
    for generation in found.generations {
        let title = generation.title.clone();
        let done =
            import_one(store, generation, &parent, found.is_whole, found.format, request, job);
        let imported = done.context(|| match snapshots.last() {
            None => format!("cannot import {title}"),
            Some(last) => format!(
                "cannot import {title}; the {} before it stand, up to {}",
                snapshots.len(),
                last.commit.manifest.display_name()
            ),
        })?;
        parent = Parent::Snapshot(snap_ref(&imported.commit.manifest));
        snapshots.push(imported);
    }
    Ok(ImportReport { format: found.format, version: found.version, snapshots, notes: found.notes })
}

/// A diff over whatever is the newest is a mistake more often than not.
fn refuse_diffs(first: Option<&Generation>) -> Result<()> {
    let images = first.map(|generation| &generation.images[..]).unwrap_or_default();
    match images.iter().find(|content| matches!(content.body, Body::Diff(_))) {
        None => Ok(()),
        Some(content) => Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{} is a diff: name the snapshot that it is against with --parent",
                content.image
            ),
        )),
    }
}

/// The snapshot of ours that is the one that was meant. By its UUID or label it is found; whether it
/// is the one, its content tells: a label is anybody's word.
fn known_base(store: &Store, base: &CarriedBase, parent: &Parent, job: Job<'_>) -> Result<Parent> {
    let uuid = base.uuid;
    let is_it = |manifest: &Manifest| {
        let label = manifest.labels.get(crate::carry::ORIGIN_LABEL);
        manifest.uuid == uuid || label.is_some_and(|label| *label == uuid.to_string())
    };
    if let Parent::Snapshot(snap) = parent {
        if !is_it(&store.manifest(snap)?) {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "it holds changes of snapshot {uuid}, which {snap} is not; leave --parent out"
                ),
            ));
        }
        check_base(store, snap, base, job)?;
        return Ok(parent.clone());
    }
    let mut found: Vec<Manifest> =
        store.list(None)?.snapshots.into_iter().rev().filter(is_it).collect();
    // One that was made here is the likeliest.
    found.sort_by_key(|manifest| manifest.uuid != uuid);
    let mut wrong = None;
    for manifest in found {
        let snap = snap_ref(&manifest);
        match check_base(store, &snap, base, job) {
            Ok(()) => return Ok(Parent::Snapshot(snap)),
            Err(error) if error.kind() == ErrorKind::Refused => {
                wrong.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
    Err(wrong.unwrap_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!(
                "it holds changes of snapshot {uuid}, which is not here; ask the sender for one \
                 that says less of what is here"
            ),
        )
    }))
}

fn check_base(store: &Store, snap: &SnapRef, base: &CarriedBase, job: Job<'_>) -> Result<()> {
    let snapshot = store.snapshot(snap)?;
    for (image, expected) in &base.images {
        let Some(expected) = expected else {
            return Err(Error::corrupt(format!(
                "it holds changes of {image} of snapshot {} and no digest of it; expected \
                 base_digest in its header, so ask the sender for one of a newer dormouse",
                base.uuid
            )));
        };
        let got = match snapshot.manifest().image(image) {
            Some(_) => crate::carry::content_digest(&snapshot.image(image)?, job)?,
            None => "no such image".to_owned(),
        };
        if got != *expected {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "it holds changes of snapshot {}, which {snap} says it came from, but {image} of \
                     {snap} is another: got {got}; expected {expected}; ask the sender for one \
                     without --has",
                    base.uuid
                ),
            ));
        }
    }
    Ok(())
}

fn snap_ref(manifest: &Manifest) -> SnapRef {
    SnapRef { name: manifest.name.clone(), number: Some(manifest.number) }
}

fn import_one(
    store: &Store,
    generation: Generation,
    parent: &Parent,
    is_whole: bool,
    format: Format,
    request: &ImportRequest,
    job: Job<'_>,
) -> Result<Imported> {
    check_copies(&generation.same, job)?;
    let before = match parent {
        Parent::Snapshot(snap) => Some(store.snapshot(snap)?),
        // `import` has settled what auto is.
        Parent::None | Parent::Auto => None,
    };
    let base = |image: &ImageName| -> Result<Option<ImageReader>> {
        match &before {
            Some(before) if before.manifest().image(image).is_some() => {
                Ok(Some(before.image(image)?))
            }
            _ => Ok(None),
        }
    };
    let mut commit = CommitRequest::new(request.name.clone());
    commit.parent = match &before {
        Some(before) => Parent::Snapshot(snap_ref(before.manifest())),
        None => Parent::None,
    };
    commit.codec = request.codec;
    commit.labels = generation.labels;
    commit.labels.insert(FORMAT_LABEL.to_owned(), format.word().to_owned());
    commit.memory_layout = generation.memory_layout;
    commit.vmm = generation.vmm;
    let mut bases = Vec::new();
    for content in &generation.images {
        let base = base(&content.image)?;
        let (source, holes) = match &content.body {
            Body::File(path) => (Source::File(path.clone()), HoleMeaning::Zero),
            Body::Diff(path) => (Source::File(path.clone()), HoleMeaning::Parent),
            Body::Opened(file) => {
                let layer = Arc::new(WholeFile(Arc::clone(file)));
                (Source::Layer { layer, base: base.clone() }, HoleMeaning::Parent)
            }
            Body::Bytes(bytes) => (Source::Bytes(Arc::clone(bytes)), HoleMeaning::Zero),
            Body::Whole(layer) | Body::Changes(layer) => {
                if matches!(content.body, Body::Changes(_)) && base.is_none() {
                    return Err(Error::new(
                        ErrorKind::Refused,
                        format!(
                            "{} holds only what changed in {}: name the snapshot before it with \
                             --parent",
                            generation.title, content.image
                        ),
                    ));
                }
                let layer = Arc::clone(layer);
                (Source::Layer { layer, base: base.clone() }, HoleMeaning::Parent)
            }
        };
        bases.push(base);
        commit.images.push(NewImage { image: content.image.clone(), source, holes });
    }
    if let Some(before) = &before {
        commit.drop = dropped(before.manifest(), &generation.images, is_whole);
    }
    let report = store.commit(commit, job)?;
    let mut verified_bytes = None;
    if request.verify {
        let snap = snap_ref(&report.manifest);
        match compare(store, &snap, &generation.images, &bases, job) {
            Ok(bytes) => verified_bytes = Some(bytes),
            Err(error) => {
                // What is not as its source shall not be taken for it.
                store.remove(&snap)?;
                return Err(error.within(format!("{snap} is not what was imported; removed it")));
            }
        }
    }
    Ok(Imported { title: generation.title, commit: report, verified_bytes })
}

/// Compares files that must be the same. Which of two that differ is right nobody knows.
fn check_copies(same: &[[Arc<StableFile>; 2]], job: Job<'_>) -> Result<()> {
    const PIECE_BYTES: u64 = 1 << 20;
    if same.is_empty() {
        return Ok(());
    }
    let total = same.iter().map(|[first, _]| first.size_bytes()).sum();
    job.progress.begin("compare copies", Some(total));
    let mut bufs = [Vec::new(), Vec::new()];
    for pair in same {
        for at in (0..pair[0].size_bytes()).step_by(1 << 20) {
            job.check()?;
            let len = PIECE_BYTES.min(pair[0].size_bytes() - at);
            for (file, buf) in pair.iter().zip(&mut bufs) {
                buf.resize(usize::try_from(len).unwrap_or(0), 0);
                file.read_at(buf, at)?;
            }
            if let Some(place) = bufs[0].iter().zip(&bufs[1]).position(|(one, two)| one != two) {
                return Err(Error::corrupt(format!(
                    "{} differs from its copy {} at byte {}: got {:#04x}; expected {:#04x}; import \
                     the folders one by one, if you know that both are right",
                    pair[1].label(),
                    pair[0].label(),
                    at + place as u64,
                    bufs[1].get(place).copied().unwrap_or(0),
                    bufs[0].get(place).copied().unwrap_or(0)
                )));
            }
            job.progress.advance(len);
        }
        pair.iter().for_each(|file| file.release());
    }
    Ok(())
}

/// The images of the parent that the new snapshot shall not have.
fn dropped(parent: &Manifest, images: &[NewContent], is_whole: bool) -> Vec<ImageName> {
    let has = |image: &ImageName| images.iter().any(|content| content.image == *image);
    let new_run = images.iter().any(|content| !content.image.is_disk());
    parent
        .images
        .iter()
        .map(|entry| entry.image.clone())
        .filter(|image| !has(image) && (is_whole || (new_run && !image.is_disk())))
        .collect()
}

fn compare(
    store: &Store,
    snap: &SnapRef,
    images: &[NewContent],
    bases: &[Option<ImageReader>],
    job: Job<'_>,
) -> Result<u64> {
    let snapshot = store.snapshot(snap)?;
    let mut bytes = 0;
    for (content, base) in images.iter().zip(bases) {
        let image = snapshot.image(&content.image)?;
        job.progress.begin("verify", Some(image.size_bytes()));
        let mut compare = Compare::new(image, base.clone(), job);
        let done = match (&content.replay, &content.body) {
            (Some(replay), _) => replay.replay(&mut compare),
            (None, Body::Bytes(source)) => {
                compare.size(source.len() as u64).and_then(|()| compare.bytes(0, source))
            }
            (None, Body::File(path)) => crate::verify::plain_file(path, &mut compare),
            (None, Body::Opened(file)) => crate::verify::opened_file(file, &mut compare),
            (None, Body::Diff(path)) => crate::verify::diff_file(path, &mut compare),
            (None, Body::Whole(_) | Body::Changes(_)) => Err(Error::new(
                ErrorKind::Unsupported,
                "its source can be read only once, so nothing is left to compare with; \
                 import it without --verify",
            )),
        };
        bytes += done
            .and_then(|()| compare.finish())
            .context(|| format!("{} differs from its source", content.image))?;
    }
    Ok(bytes)
}

/// Where a guest's memory lies, by the user's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestLayout {
    /// As the VMM lays out a guest without memory that can be plugged.
    Standard,

    /// Regions in the order of the file, each with its guest-physical address and its length.
    Regions(Vec<(u64, u64)>),
}

/// Where to look for what a snapshot refers to, and what its files do not say.
#[derive(Clone, Debug, Default)]
pub struct LookOptions {
    /// The folder with other builds, if they are not beside the one that is imported.
    pub builds: Option<PathBuf>,

    /// The VMM's state, where it is a file of its own.
    pub state: Option<PathBuf>,

    /// What a copy-on-write store lies over, where its own note is not to be followed.
    pub origin: Option<PathBuf>,

    /// Whether a memory file has only what changed.
    pub is_diff: bool,

    /// The length of the first memory region of a guest with a hole below 4 GiB.
    pub low_memory_bytes: Option<u64>,

    /// Where memory lies in the guest, where its files do not tell it.
    pub layout: Option<GuestLayout>,

    /// The VMM's version, where its files do not tell it.
    pub vmm_version: Option<String>,

    /// What a lone disk is called.
    pub disk: Option<Name>,
}

impl LookOptions {
    /// Fails if anything was given that a format has no use for.
    pub(crate) fn check(&self, format: Format) -> Result<()> {
        let given = [
            ("builds", self.builds.is_some()),
            ("state", self.state.is_some()),
            ("origin", self.origin.is_some()),
            ("diff", self.is_diff),
            ("low-memory", self.low_memory_bytes.is_some()),
            ("layout", self.layout.is_some()),
            ("vmm-version", self.vmm_version.is_some()),
            ("disk", self.disk.is_some()),
        ];
        format.check_options(format.import_options(), &given)
    }
}

/// Whether something is there, as a regular file.
pub(crate) fn is_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file())
}
