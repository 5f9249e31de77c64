//! The folder of a snapshot, in and out.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_store::manifest::Vmm;
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::reader::{ExportTarget, ImageReader, NewFolder};
use serde::Deserialize;
use uuid::Uuid;

use super::header::{Header, VERSION};
use crate::data::{MappedDevice, RandomRead, StableFile};
use crate::dm_snapshot;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::export::{ExportReport, ExportRequest, Line};
use crate::format::Format;
use crate::import::{Body, Found, Generation, LookOptions, NewContent, is_file};
use crate::page_map::{PAGE_BYTES, PageMap};
use crate::rank;
use crate::records::{HEADER_BYTES_MAX, Metadata};
use crate::replay::StoredReplay;

const HEADER: &str = "memfile.header";
const DATA: &str = "memfile";
const STATE: &str = "snapfile";

/// The longest `rootfs.meta`.
const META_BYTES_MAX: u64 = 64 << 10;

/// Folders of one chain; wrenn itself stops at ten.
const CHAIN_MAX: usize = 4096;

/// Runs of all headers of a chain: 12 bytes each in memory.
const CHAIN_RUNS_MAX: usize = 32 << 20;

/// `rootfs.meta`.
#[derive(Debug, Deserialize)]
struct RootMeta {
    base_template: PathBuf,
}

/// Looks at a snapshot's folder, or at a folder of such folders.
pub fn look(path: &Path, options: &LookOptions) -> Result<Found> {
    let mut folders = snapshot_folders(path)?;
    folders.sort_by_key(|(_, header)| header.metadata.generation);
    if let Some(pair) = folders
        .windows(2)
        .find(|pair| pair[0].1.metadata.generation == pair[1].1.metadata.generation)
    {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{} and {} are both of generation {}, so their order is not known; import them one \
                 by one",
                pair[0].0.display(),
                pair[1].0.display(),
                pair[0].1.metadata.generation
            ),
        ));
    }
    if let Some(other) =
        folders.iter().find(|(_, header)| header.metadata.base != folders[0].1.metadata.base)
    {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{} has the base build {} and {} has {}; a folder of snapshots must be one lineage, \
                 so import them one by one",
                folders[0].0.display(),
                folders[0].1.metadata.base,
                other.0.display(),
                other.1.metadata.base
            ),
        ));
    }
    let mut found = Found {
        format: Format::Wrenn,
        version: VERSION.to_string(),
        generations: Vec::new(),
        notes: Vec::new(),
        is_whole: true,
        base: None,
    };
    let mut before: Option<Arc<PageMap>> = None;
    for (dir, header) in folders {
        let map = Arc::new(header.map);
        let before_map = before.replace(Arc::clone(&map));
        let looked = generation(&dir, &header.metadata, map, before_map.as_deref(), options);
        let generation = looked.context(|| format!("cannot take in {}", dir.display()))?;
        found.generations.push(generation.0);
        found.notes.extend(generation.1);
    }
    Ok(found)
}

/// The folders with a header at `path` or in it.
fn snapshot_folders(path: &Path) -> Result<Vec<(PathBuf, Header)>> {
    if is_file(&path.join(HEADER)) {
        return Ok(vec![(path.to_owned(), read_header(path)?)]);
    }
    let mut folders = Vec::new();
    let mut runs = 0;
    let what = || format!("cannot look into {}", path.display());
    for entry in fs::read_dir(path).context(what)? {
        let dir = entry.context(what)?.path();
        if is_file(&dir.join(HEADER)) {
            if folders.len() == CHAIN_MAX {
                return Err(Error::corrupt(format!(
                    "more than {CHAIN_MAX} snapshots in {}",
                    path.display()
                )));
            }
            let header = read_header(&dir)?;
            runs += header.map.len();
            if runs > CHAIN_RUNS_MAX {
                return Err(Error::corrupt(format!(
                    "the snapshots in {} have more than {CHAIN_RUNS_MAX} runs in all",
                    path.display()
                )));
            }
            folders.push((dir, header));
        }
    }
    if folders.is_empty() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("there is no {HEADER} in {} or in a folder in it", path.display()),
        ));
    }
    Ok(folders)
}

fn read_header(dir: &Path) -> Result<Header> {
    let path = dir.join(HEADER);
    let bytes = StableFile::open(&path)?.read_all(HEADER_BYTES_MAX)?;
    Header::parse(&bytes).context(|| format!("{} is damaged", path.display()))
}

fn generation(
    dir: &Path,
    metadata: &Metadata,
    map: Arc<PageMap>,
    before: Option<&PageMap>,
    options: &LookOptions,
) -> Result<(Generation, Vec<String>)> {
    let mut notes = Vec::new();
    let mut generation = Generation::new(format!("build {}", metadata.build));
    generation.labels = BTreeMap::from([
        ("wrenn.build-id".to_owned(), metadata.build.to_string()),
        ("wrenn.generation".to_owned(), metadata.generation.to_string()),
    ]);
    let mut paths = Vec::new();
    let mut data: Vec<Arc<dyn RandomRead>> = Vec::new();
    for &build in map.builds() {
        let path = data_path(dir, build, metadata)?;
        data.push(Arc::new(StableFile::open(&path)?));
        paths.push(path);
    }
    let replay = StoredReplay::plain(Arc::clone(&map), paths);
    let label = dir.join(HEADER).display().to_string();
    let layer = Arc::new(MappedDevice::new(label, map, data, before)?);
    let body = if before.is_some() { Body::Changes(layer) } else { Body::Whole(layer) };
    generation.images.push(NewContent {
        image: ImageName::Memory,
        body,
        replay: Some(Box::new(replay)),
    });
    let state = dir.join(STATE);
    if is_file(&state) {
        let version = crate::firecracker::vmstate::version_of(&state);
        generation.vmm = Vmm {
            kind: Some("firecracker".to_owned()),
            version: version.as_ref().ok().cloned(),
            ..Vmm::default()
        };
        if let Err(error) = version {
            notes.push(format!("{}: {error}", state.display()));
        }
        generation.images.push(plain(ImageName::State(Name::new("vmstate")?), state));
    } else {
        notes.push(format!("{} has no {STATE}: memory without state cannot resume", dir.display()));
    }
    let disk = ImageName::Disk(Name::new("root")?);
    let (ext4, cow) = (dir.join("rootfs.ext4"), dir.join("rootfs.cow"));
    if is_file(&cow) {
        let origin = match &options.origin {
            Some(origin) => origin.clone(),
            None => read_meta(&dir.join("rootfs.meta"))?.base_template,
        };
        let (content, changed) = dm_snapshot::disk(disk, &cow, &origin)?;
        notes.push(format!("{}: {changed} bytes over {}", cow.display(), origin.display()));
        if is_file(&ext4) {
            notes.push(format!("{} skipped: the disk is rootfs.cow", ext4.display()));
        }
        generation.images.push(content);
    } else if is_file(&ext4) {
        generation.images.push(plain(disk, ext4));
    } else {
        notes.push(format!("{} has no rootfs: memory only", dir.display()));
    }
    Ok((generation, notes))
}

fn plain(image: ImageName, path: PathBuf) -> NewContent {
    NewContent { image, body: Body::File(path), replay: None }
}

/// The data of a build: under its own name, or under the one of a full dump.
fn data_path(dir: &Path, build: Uuid, metadata: &Metadata) -> Result<PathBuf> {
    let own = dir.join(format!("{DATA}.{build}"));
    if is_file(&own) {
        return Ok(own);
    }
    let full = dir.join(DATA);
    let may_be_full =
        build == metadata.base || (build == metadata.build && metadata.generation == 0);
    if may_be_full && is_file(&full) {
        return Ok(full);
    }
    Err(Error::new(
        ErrorKind::NotFound,
        format!(
            "the data of build {build} is missing: expected {}{}",
            own.display(),
            if may_be_full { format!(" or {}", full.display()) } else { String::new() }
        ),
    ))
}

fn read_meta(path: &Path) -> Result<RootMeta> {
    let bytes = StableFile::open(path)
        .and_then(|file| file.read_all(META_BYTES_MAX))
        .context(|| "rootfs.cow needs the disk that it lies over: give --origin FILE".to_owned())?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Error::corrupt(format!("{}: {error}; expected a base_template", path.display()))
    })
}

/// Writes a folder as wrenn does. With a base, the generations from there on have a data file each.
pub fn export(
    line: &Line,
    dir: &Path,
    request: &ExportRequest,
    job: Job<'_>,
) -> Result<ExportReport> {
    let new = NewFolder::create(dir)?;
    let mut report = ExportReport::new(Format::Wrenn, VERSION.to_string(), dir);
    let newest = line.newest();
    if newest.manifest().image(&ImageName::Memory).is_none() {
        return Err(Error::new(
            ErrorKind::Refused,
            format!("{} has no memory, which is what wrenn's header is of", line.name()),
        ));
    }
    let mut before: Option<(ImageReader, PageMap)> = None;
    let count = line.snapshots().len();
    for (number, snapshot) in line.snapshots().iter().enumerate() {
        let image = snapshot.image(&ImageName::Memory)?;
        let build = line.build_id(number, request);
        let map = match &before {
            None => rank::full(&image, build)?,
            Some((older, map)) => rank::over(&image, older, map, build)?,
        };
        let name = if count == 1 { DATA.to_owned() } else { format!("{DATA}.{build}") };
        job.progress.begin("export", None);
        write_file(&new.path().join(&name), &mut |sink| {
            rank::write_data(&image, &map, build, sink, job).map(drop)
        })?;
        report.wrote(&name, new.path())?;
        before = Some((image, map));
    }
    let Some((image, map)) = before else {
        return Err(Error::new(ErrorKind::InvalidInput, "there is no snapshot to export"));
    };
    let metadata = Metadata {
        version: VERSION,
        block_bytes: PAGE_BYTES,
        size_bytes: image.size_bytes(),
        generation: (count - 1) as u64,
        build: line.build_id(count - 1, request),
        base: line.build_id(0, request),
    };
    let header = Header { metadata, map };
    write_file(&new.path().join(HEADER), &mut |sink| {
        sink.write_all(&header.encode()).context(|| format!("cannot write {HEADER}"))
    })?;
    report.wrote(HEADER, new.path())?;
    let state = ImageName::State(Name::new("vmstate")?);
    let disk = ImageName::Disk(Name::new("root")?);
    for (image, name) in [(state, STATE), (disk, "rootfs.ext4")] {
        if newest.manifest().image(&image).is_some() {
            newest.image(&image)?.export(&new.path().join(name), ExportTarget::New, job)?;
            report.wrote(name, new.path())?;
        } else {
            report.notes.push(format!("no {name}: {} has no {image}", line.name()));
        }
    }
    report.skipped(newest.manifest(), &["memory", "state/vmstate", "disk/root"]);
    new.publish()?;
    Ok(report)
}

/// Writes a new file and makes it durable.
pub(crate) fn write_file(
    path: &Path,
    fill: &mut dyn FnMut(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    let what = || format!("cannot write {}", path.display());
    let file = File::create_new(path).context(what)?;
    let mut sink = BufWriter::with_capacity(1 << 20, file);
    fill(&mut sink)?;
    let file = sink.into_inner().map_err(std::io::IntoInnerError::into_error).context(what)?;
    file.sync_all().context(what)
}
