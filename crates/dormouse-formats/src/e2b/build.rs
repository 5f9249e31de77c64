//! The folder of a build, and the builds that it refers to.
//!
//! Which object holds the data of a build, a header says by the codec of its entry for it:
//!
//! | header | no entry | entry without frames | entry with frames |
//! |---|---|---|---|
//! | 1 to 3 | plain | – | – |
//! | 4, 5 | of itself: plain; of an ancestor: whatever the ancestor's own header says of itself | plain | `.zstd` or `.lz4` |
//!
//! A build that is referred to and has a header of its own becomes a snapshot of its own, oldest
//! first. A damaged header of any of them is an error; one that is missing and not needed is not.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_store::manifest::Vmm;
use dormouse_store::name::{ImageName, Name};
use serde::Deserialize;
use uuid::Uuid;

use super::frames::{FrameCache, FramedFile};
use super::header::{BuildEntry, Header};
use crate::data::{MappedDevice, RandomRead, StableFile};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::foreign_folder::ForeignFolder;
use crate::format::Format;
use crate::import::{Body, Found, Generation, LookOptions, NewContent, is_file};
use crate::page_map::{BUILDS_MAX, PageMap};
use crate::records::{HEADER_BYTES_MAX, Metadata};
use crate::replay::{DataCodec, HeaderSource, StoredFile, StoredReplay};

/// Runs of all headers of a lineage: 12 bytes each in memory, and once more for each generation.
const LINEAGE_RUNS_MAX: usize = 32 << 20;

/// Frames of a lineage, those in headers and those of all generations' data: 32 bytes each.
const LINEAGE_FRAMES_MAX: usize = 32 << 20;

/// The label with the id that a build was imported with.
pub const BUILD_LABEL: &str = "e2b.build-id";

/// The longest `metadata.json`; its prefetch list has a number for each page.
const METADATA_BYTES_MAX: u64 = 64 << 20;

/// A device of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Device {
    /// `rootfs.ext4`
    Disk,

    /// `memfile`
    Memory,
}

impl Device {
    pub(super) const ALL: [Device; 2] = [Device::Disk, Device::Memory];

    /// The data object's name.
    pub(super) fn object(self) -> &'static str {
        match self {
            Device::Disk => "rootfs.ext4",
            Device::Memory => "memfile",
        }
    }

    pub(super) fn image(self) -> Result<ImageName> {
        Ok(match self {
            Device::Disk => ImageName::Disk(Name::new("root")?),
            Device::Memory => ImageName::Memory,
        })
    }
}

/// What the name of a data object ends in.
pub(super) fn suffix(codec: DataCodec) -> &'static str {
    match codec {
        DataCodec::Plain => "",
        DataCodec::Zstd => ".zstd",
        DataCodec::Lz4 => ".lz4",
    }
}

/// What is used of `metadata.json`.
#[derive(Debug, Deserialize)]
pub struct BuildMetadata {
    version: u64,
    #[serde(default)]
    template: Option<TemplateMetadata>,
}

#[derive(Debug, Default, Deserialize)]
struct TemplateMetadata {
    #[serde(default)]
    kernel_version: Option<String>,
    #[serde(default)]
    firecracker_version: Option<String>,
}

impl BuildMetadata {
    /// Reads the JSON.
    pub fn parse(bytes: &[u8]) -> Result<BuildMetadata> {
        serde_json::from_slice(bytes)
            .map_err(|error| Error::corrupt(format!("metadata.json: {error}")))
    }
}

/// A header, and where it is read again.
#[derive(Debug)]
struct Read {
    header: Header,
    source: HeaderSource,
}

/// Finds builds by their ids, and reads each header once.
struct Builds {
    /// The build that is imported, whose folder need not have its id as name.
    own: (Uuid, ForeignFolder),
    root: ForeignFolder,
    headers: HashMap<(Uuid, Device), Option<Arc<Read>>>,
    /// Runs of all headers so far.
    runs: usize,
    /// Frames that are held so far.
    frames: usize,
}

impl Builds {
    fn dir(&self, build: Uuid) -> ForeignFolder {
        if build == self.own.0 { self.own.1.clone() } else { self.root.folder(&build.to_string()) }
    }

    fn count_frames(&mut self, more: usize) -> Result<()> {
        self.frames = self.frames.saturating_add(more);
        if self.frames > LINEAGE_FRAMES_MAX {
            return Err(Error::corrupt(format!(
                "the builds so far need more than {LINEAGE_FRAMES_MAX} frames in all"
            )));
        }
        Ok(())
    }

    /// The header of a build's device, if there is one.
    fn header(&mut self, build: Uuid, device: Device) -> Result<Option<Arc<Read>>> {
        if let Some(known) = self.headers.get(&(build, device)) {
            return Ok(known.clone());
        }
        let read = match self.dir(build).file(&header_name(device))? {
            None => None,
            Some(file) => {
                let read = read_header(file)?;
                let header = &read.header;
                let path = header_path(&self.dir(build), device);
                if header.metadata.build != build {
                    return Err(Error::corrupt(format!(
                        "{} is of build {}; expected {build}",
                        path.display(),
                        header.metadata.build
                    )));
                }
                self.count_frames(header.builds.values().map(|entry| entry.frames.len()).sum())
                    .context(|| format!("cannot take {}", path.display()))?;
                self.runs += header.map.len();
                if self.runs > LINEAGE_RUNS_MAX {
                    return Err(Error::corrupt(format!(
                        "the builds up to {} have more than {LINEAGE_RUNS_MAX} runs in all",
                        path.display()
                    )));
                }
                Some(Arc::new(read))
            }
        };
        self.headers.insert((build, device), read.clone());
        Ok(read)
    }
}

fn header_name(device: Device) -> String {
    format!("{}.header", device.object())
}

fn header_path(dir: &ForeignFolder, device: Device) -> PathBuf {
    dir.join(&header_name(device))
}

fn read_header(file: StableFile) -> Result<Read> {
    let bytes = file.read_all(HEADER_BYTES_MAX)?;
    file.release();
    let header = Header::parse(&bytes).context(|| format!("{} is damaged", file.label()))?;
    Ok(Read { header, source: HeaderSource::File(Arc::new(file), HEADER_BYTES_MAX) })
}

/// Looks at a build's folder and at the builds beside it, or in the folder with builds.
pub fn look(path: &Path, options: &LookOptions) -> Result<Found> {
    let own = ForeignFolder::open(path)?;
    let metadata = own_metadata(&own)?;
    let beside = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let root = options
        .builds
        .clone()
        .unwrap_or_else(|| beside.map_or_else(|| path.join(".."), Path::to_owned));
    let mut builds = Builds {
        own: (metadata.build, own),
        root: ForeignFolder::open(&root)?,
        headers: HashMap::new(),
        runs: 0,
        frames: 0,
    };
    let mut notes = Vec::new();
    let order = lineage(&mut builds, &metadata, &mut notes)?;
    let cache = Arc::new(FrameCache::default());
    let mut before: BTreeMap<Device, Arc<PageMap>> = BTreeMap::new();
    let mut numbers = 0;
    let mut generations = Vec::new();
    for build in order {
        let made = generation(&mut builds, build, &mut before, &cache, &mut numbers, &mut notes);
        generations.push(made.context(|| format!("cannot take in build {build}"))?);
    }
    Ok(Found {
        format: Format::E2b,
        version: metadata.format().to_string(),
        generations,
        notes,
        is_whole: true,
        base: None,
    })
}

/// The metadata of the build at `path`, from whichever header it has; they must agree.
fn own_metadata(dir: &ForeignFolder) -> Result<Metadata> {
    let mut own: Option<Metadata> = None;
    for device in Device::ALL {
        let header = header_path(dir, device);
        let Some(file) = dir.file(&header_name(device))? else { continue };
        let metadata = read_header(file)?.header.metadata;
        match &own {
            Some(other) if other.build != metadata.build => {
                return Err(Error::corrupt(format!(
                    "{} is of build {} and the other device's header of {}",
                    header.display(),
                    metadata.build,
                    other.build
                )));
            }
            _ => own = Some(metadata),
        }
    }
    if let Some(own) = own {
        return Ok(own);
    }
    // A build of the first days has no header; its name is all there is.
    let path = dir.path();
    let id = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
    let data = dir.has(Device::Memory.object())? || dir.has(Device::Disk.object())?;
    if let (Some(build), true) = (id, data) {
        return Ok(Metadata {
            version: 1,
            block_bytes: 4096,
            size_bytes: 0,
            generation: 1,
            build,
            base: build,
        });
    }
    let builds = builds_in(path)?;
    Err(match builds.first() {
        Some(first) => Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{} is a folder of {} builds of E2B; name the one to import, such as {}, and \
                 what it refers to is found beside it",
                path.display(),
                builds.len(),
                path.join(first).display()
            ),
        ),
        None => Error::new(
            ErrorKind::NotFound,
            format!(
                "{} has neither memfile.header nor rootfs.ext4.header, so it is no build of E2B",
                path.display()
            ),
        ),
    })
}

/// The folders of builds in a folder, by name.
fn builds_in(path: &Path) -> Result<Vec<String>> {
    let what = || format!("cannot look into {}", path.display());
    let mut builds = Vec::new();
    for entry in std::fs::read_dir(path).context(what)? {
        let Ok(name) = entry.context(what)?.file_name().into_string() else { continue };
        let has = |device: Device| is_file(&path.join(&name).join(header_name(device)));
        if name.parse::<Uuid>().is_ok() && Device::ALL.into_iter().any(has) {
            builds.push(name);
        }
    }
    builds.sort_unstable();
    Ok(builds)
}

/// The build and all that it refers to that have headers, oldest first.
fn lineage(builds: &mut Builds, own: &Metadata, notes: &mut Vec<String>) -> Result<Vec<Uuid>> {
    let mut generations: BTreeMap<Uuid, u64> = BTreeMap::new();
    let mut referred: BTreeSet<(Uuid, Uuid, Device)> = BTreeSet::new();
    let mut next = vec![own.build];
    while let Some(build) = next.pop() {
        if generations.contains_key(&build) {
            continue;
        }
        if generations.len() == BUILDS_MAX {
            return Err(Error::corrupt(format!("more than {BUILDS_MAX} builds")));
        }
        let mut generation = None;
        for device in Device::ALL {
            let Some(read) = builds.header(build, device)? else { continue };
            let header = &read.header;
            generation = generation.max(Some(header.metadata.generation));
            for &other in header.map.builds() {
                if other != build {
                    referred.insert((build, other, device));
                    next.push(other);
                }
            }
        }
        if let Some(generation) = generation {
            generations.insert(build, generation);
        } else if build == own.build {
            generations.insert(build, own.generation);
        }
    }
    for &(child, ancestor, device) in &referred {
        match (generations.get(&child), generations.get(&ancestor)) {
            (Some(child_generation), Some(generation)) if generation >= child_generation => {
                return Err(Error::corrupt(format!(
                    "the {} of build {child} (generation {child_generation}) refers to build \
                     {ancestor} of generation {generation}; expected an earlier one, as builds \
                     must not refer to each other in a circle",
                    device.object()
                )));
            }
            (_, None) => {
                let note = format!(
                    "build {ancestor} has no header at {}: only its data is used",
                    builds.dir(ancestor).path().display()
                );
                if !notes.contains(&note) {
                    notes.push(note);
                }
            }
            _ => {}
        }
    }
    let mut order: Vec<(u64, Uuid)> =
        generations.into_iter().map(|(build, generation)| (generation, build)).collect();
    order.sort_unstable();
    Ok(order.into_iter().map(|(_, build)| build).collect())
}

fn generation(
    builds: &mut Builds,
    build: Uuid,
    before: &mut BTreeMap<Device, Arc<PageMap>>,
    cache: &Arc<FrameCache>,
    numbers: &mut u64,
    notes: &mut Vec<String>,
) -> Result<Generation> {
    let dir = builds.dir(build);
    let mut generation = Generation::new(format!("build {build}"));
    generation.labels.insert(BUILD_LABEL.to_owned(), build.to_string());
    for device in Device::ALL {
        let read = match builds.header(build, device)? {
            Some(read) => read,
            None => match headerless(&dir, device, build)? {
                Some(read) => {
                    notes.push(format!(
                        "{} has no header: taken as it is",
                        dir.join(device.object()).display()
                    ));
                    Arc::new(read)
                }
                None => {
                    before.remove(&device);
                    continue;
                }
            },
        };
        let header = &read.header;
        if header.trailing_bytes > 0 {
            notes.push(format!(
                "{}: {} bytes behind its end skipped",
                header_path(&dir, device).display(),
                header.trailing_bytes
            ));
        }
        let metadata = &header.metadata;
        generation.labels.insert("e2b.generation".to_owned(), metadata.generation.to_string());
        let map = Arc::new(header.map.clone());
        let before_map = before.insert(device, Arc::clone(&map));
        let mut files = Vec::new();
        let mut data: Vec<Arc<dyn RandomRead>> = Vec::new();
        for &of in map.builds() {
            let (reader, file) = open_data(builds, header, of, device, cache, numbers)?;
            data.push(reader);
            files.push(file);
        }
        let label = header_path(&dir, device).display().to_string();
        let source = match &read.source {
            HeaderSource::File(file, max) => HeaderSource::File(Arc::clone(file), *max),
            HeaderSource::None(build, size_bytes) => HeaderSource::None(*build, *size_bytes),
        };
        let replay = StoredReplay::new(source, files);
        let is_first = before_map.is_none();
        let layer = Arc::new(MappedDevice::new(label, map, data, before_map)?);
        let body = if is_first { Body::Whole(layer) } else { Body::Changes(layer) };
        generation.images.push(NewContent {
            image: device.image()?,
            body,
            replay: Some(Box::new(replay)),
        });
    }
    add_state(&dir, &mut generation, notes)?;
    Ok(generation)
}

/// Firecracker's state, and what the build was for.
fn add_state(
    dir: &ForeignFolder,
    generation: &mut Generation,
    notes: &mut Vec<String>,
) -> Result<()> {
    match dir.file("snapfile")? {
        Some(state) => {
            let image = ImageName::State(Name::new("vmstate")?);
            generation.images.push(NewContent::opened(image, state));
        }
        None => notes
            .push(format!("{} has no snapfile: it cannot resume, only boot", dir.path().display())),
    }
    let path = dir.join("metadata.json");
    let Some(file) = dir.file("metadata.json")? else {
        notes.push(format!("{} has no metadata.json", dir.path().display()));
        return Ok(());
    };
    let bytes = file.read_all(METADATA_BYTES_MAX)?;
    let metadata =
        BuildMetadata::parse(&bytes).context(|| format!("{} is damaged", path.display()))?;
    if metadata.version != 2 {
        notes.push(format!(
            "{} has version {}, of which E2B itself reads nothing; kept as it is",
            path.display(),
            metadata.version
        ));
    }
    let template = metadata.template.unwrap_or_default();
    generation.vmm = Vmm {
        kind: Some("firecracker".to_owned()),
        version: template.firecracker_version,
        ..Vmm::default()
    };
    if let Some(kernel) = template.kernel_version
        && kernel.len() <= dormouse_store::manifest::LABEL_BYTES_MAX
    {
        generation.labels.insert("e2b.kernel-version".to_owned(), kernel);
    }
    generation.images.push(NewContent::opened(ImageName::State(Name::new("metadata")?), file));
    Ok(())
}

/// The header that a data object without one is taken to have.
fn headerless(dir: &ForeignFolder, device: Device, build: Uuid) -> Result<Option<Read>> {
    let Some(file) = dir.file(device.object())? else { return Ok(None) };
    let size_bytes = file.size_bytes();
    let block_bytes = if device == Device::Memory { 2 << 20 } else { 4096 };
    let header = Header {
        metadata: Metadata {
            version: 1,
            block_bytes,
            size_bytes,
            generation: 1,
            build,
            base: build,
        },
        builds: BTreeMap::new(),
        map: PageMap::identity(size_bytes, build)?,
        trailing_bytes: 0,
    };
    Ok(Some(Read { header, source: HeaderSource::None(build, size_bytes) }))
}

/// What a header says of a build's data, by the rules at the top of this file.
fn entry_of(
    builds: &mut Builds,
    header: &Header,
    of: Uuid,
    device: Device,
) -> Result<Option<BuildEntry>> {
    if header.metadata.format() <= 3 {
        return Ok(None);
    }
    if let Some(entry) = header.builds.get(&of) {
        return Ok(Some(entry.clone()));
    }
    if of == header.metadata.build {
        return Ok(None);
    }
    match builds.header(of, device)? {
        Some(ancestor) if ancestor.header.metadata.format() <= 3 => Ok(None),
        Some(ancestor) => Ok(ancestor.header.builds.get(&of).cloned()),
        None => Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "the {} of build {} refers to build {of} and does not say how its data is stored, \
                 and {} is missing; expected it beside the build or in --builds DIR",
                device.object(),
                header.metadata.build,
                header_path(&builds.dir(of), device).display()
            ),
        )),
    }
}

fn open_data(
    builds: &mut Builds,
    header: &Header,
    of: Uuid,
    device: Device,
    cache: &Arc<FrameCache>,
    numbers: &mut u64,
) -> Result<(Arc<dyn RandomRead>, StoredFile)> {
    let entry = entry_of(builds, header, of, device)?;
    let codec = entry.as_ref().map_or(DataCodec::Plain, |entry| entry.codec);
    let name = format!("{}{}", device.object(), suffix(codec));
    let path = builds.dir(of).join(&name);
    let Some(file) = builds.dir(of).file(&name)? else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "the {} of build {} lies in part in build {of}, but {} is missing; expected it \
                 beside the build or in --builds DIR",
                device.object(),
                header.metadata.build,
                path.display()
            ),
        ));
    };
    let file = Arc::new(file);
    let stored = StoredFile {
        build: of,
        file: Arc::clone(&file),
        codec,
        sha256: entry.as_ref().and_then(|entry| entry.sha256),
    };
    let reader: Arc<dyn RandomRead> = match entry {
        Some(entry) if codec != DataCodec::Plain => {
            builds.count_frames(entry.frames.len())?;
            *numbers += 1;
            Arc::new(FramedFile::new(file, codec, entry.frames, Arc::clone(cache), *numbers)?)
        }
        entry => {
            let expected = entry.map_or(0, |entry| entry.size_bytes);
            if expected != 0 && expected != file.size_bytes() {
                return Err(Error::corrupt(format!(
                    "{} has {} bytes; the header of build {} expects {expected}",
                    path.display(),
                    file.size_bytes(),
                    header.metadata.build
                )));
            }
            file
        }
    };
    Ok((reader, stored))
}
