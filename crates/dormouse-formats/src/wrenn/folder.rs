//! The folder of a snapshot, in and out.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_store::manifest::Vmm;
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::reader::{EXPORT_MODE, ExportTarget, ImageReader, NewFolder};
use dormouse_store::source::{LayerRun, LayerSource};
use serde::Deserialize;
use uuid::Uuid;

use super::header::{Header, VERSION};
use crate::data::{MappedDevice, RandomRead, StableFile};
use crate::dm_snapshot::{self, CowDisk};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::export::{ExportReport, ExportRequest, Line};
use crate::foreign_folder::ForeignFolder;
use crate::format::Format;
use crate::import::{Body, Found, Generation, LookOptions, NewContent};
use crate::page_map::{PAGE_BYTES, PageMap};
use crate::rank;
use crate::records::{HEADER_BYTES_MAX, Metadata};
use crate::replay::{DataCodec, HeaderSource, StoredFile, StoredReplay};
use crate::verify::{Compare, Replay};

const HEADER: &str = "memfile.header";
const DATA: &str = "memfile";
const STATE: &str = "snapfile";
const DISK: &str = "rootfs.ext4";
const COW: &str = "rootfs.cow";
const META: &str = "rootfs.meta";

/// What the names of all three begin with.
const DISK_PREFIX: &str = "rootfs.";

/// Entries of a folder that are looked at for a disk.
const NAMES_MAX: usize = 1024;

/// The longest `rootfs.meta`.
const META_BYTES_MAX: u64 = 64 << 10;

/// Folders of one chain; wrenn itself stops at ten.
const CHAIN_MAX: usize = 4096;

/// Entries of a folder of snapshots.
const ENTRIES_MAX: usize = 65_536;

/// Runs of all headers of a chain: 12 bytes each in memory.
const CHAIN_RUNS_MAX: usize = 32 << 20;

/// `rootfs.meta`.
#[derive(Debug, Deserialize)]
pub struct RootMeta {
    /// The path of the disk, on the host where it was made.
    pub base_template: PathBuf,
}

impl RootMeta {
    /// Reads the JSON.
    pub fn parse(bytes: &[u8]) -> Result<RootMeta> {
        serde_json::from_slice(bytes).map_err(|error| {
            Error::corrupt(format!("rootfs.meta: {error}; expected a base_template"))
        })
    }
}

/// Looks at a snapshot's folder, or at a folder of such folders.
pub fn look(path: &Path, options: &LookOptions) -> Result<Found> {
    let home = ForeignFolder::open(path)?;
    let mut folders = snapshot_folders(&home)?;
    folders.sort_by_key(|(_, opened)| opened.header.metadata.generation);
    if let Some(pair) = folders
        .windows(2)
        .find(|pair| pair[0].1.header.metadata.generation == pair[1].1.header.metadata.generation)
    {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{} and {} are both of generation {}, so their order is not known; import them one \
                 by one",
                pair[0].0.path().display(),
                pair[1].0.path().display(),
                pair[0].1.header.metadata.generation
            ),
        ));
    }
    let base = folders[0].1.header.metadata.base;
    if let Some(other) = folders.iter().find(|(_, opened)| opened.header.metadata.base != base) {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{} has the base build {} and {} has {}; a folder of snapshots must be one lineage, \
                 so import them one by one",
                folders[0].0.path().display(),
                base,
                other.0.path().display(),
                other.1.header.metadata.base
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
    let consent = Consent { options, home };
    let mut before: Option<Looked> = None;
    let mut copies = Copies::default();
    for (dir, header) in folders {
        let looked = generation(&dir, header, before.as_ref(), &consent, &mut copies);
        let (generation, notes, looked) =
            looked.context(|| format!("cannot take in {}", dir.path().display()))?;
        before = Some(looked);
        found.generations.push(generation);
        found.notes.extend(notes);
    }
    Ok(found)
}

/// A folder with its header, which is read again for a comparison.
struct Opened {
    header: Header,
    file: Arc<StableFile>,
}

/// The folders with a header at `path` or in it.
fn snapshot_folders(home: &ForeignFolder) -> Result<Vec<(ForeignFolder, Opened)>> {
    if let Some(file) = home.file(HEADER)? {
        return Ok(vec![(home.clone(), read_header(file)?)]);
    }
    let mut folders = Vec::new();
    let mut runs = 0;
    // The entries themselves may be anything; a chain has few others.
    for name in home.names(ENTRIES_MAX)? {
        let dir = home.folder(&name);
        if let Some(file) = dir.file(HEADER)? {
            if folders.len() == CHAIN_MAX {
                return Err(Error::corrupt(format!(
                    "more than {CHAIN_MAX} snapshots in {}",
                    home.path().display()
                )));
            }
            let opened = read_header(file)?;
            runs += opened.header.map.len();
            if runs > CHAIN_RUNS_MAX {
                return Err(Error::corrupt(format!(
                    "the snapshots in {} have more than {CHAIN_RUNS_MAX} runs in all",
                    home.path().display()
                )));
            }
            folders.push((dir, opened));
        }
    }
    if folders.is_empty() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("there is no {HEADER} in {} or in a folder in it", home.path().display()),
        ));
    }
    Ok(folders)
}

fn read_header(file: StableFile) -> Result<Opened> {
    let bytes = file.read_all(HEADER_BYTES_MAX)?;
    file.release();
    let header = Header::parse(&bytes).context(|| format!("{} is damaged", file.label()))?;
    Ok(Opened { header, file: Arc::new(file) })
}

/// What the next generation is compared with.
struct Looked {
    map: Arc<PageMap>,
    disk: DiskBefore,
}

/// The disk of the generation before.
enum DiskBefore {
    None,
    Cow(CowDisk),
    File(Arc<StableFile>),
}

/// What the user allows beyond the folder.
struct Consent<'a> {
    options: &'a LookOptions,
    home: ForeignFolder,
}

impl Consent<'_> {
    /// The disk under the store of a snapshot: the one that the user names, or the one that the
    /// snapshot does, if it lies where the user said.
    fn origin(&self, dir: &ForeignFolder) -> Result<StableFile> {
        if let Some(origin) = &self.options.origin {
            return StableFile::open(origin);
        }
        let named = read_meta(dir)?.base_template;
        let allowed = match &self.options.builds {
            Some(builds) => ForeignFolder::open(builds)?,
            None => self.home.clone(),
        };
        if allowed.holds(&named) {
            let file = StableFile::open(&named)?;
            // Links may have changed since.
            file.check_same(&named.canonicalize().unwrap_or_default())?;
            if allowed.holds(&named) {
                return Ok(file);
            }
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{} says that the disk lies over {}, which is outside of {}; a snapshot may name any \
                 file of this host, so say with --origin FILE that it is this one, or with --builds \
                 DIR where base images are",
                dir.join(META).display(),
                named.display(),
                allowed.path().display()
            ),
        ))
    }
}

/// The first copy of each build's data; wrenn copies those of all ancestors into every folder.
#[derive(Debug, Default)]
struct Copies {
    first: HashMap<Uuid, Arc<StableFile>>,
}

impl Copies {
    /// What the data of a build is to be held against, if another folder has it, too.
    fn pair(
        &mut self,
        build: Uuid,
        file: &Arc<StableFile>,
    ) -> Result<Option<[Arc<StableFile>; 2]>> {
        let Some(first) = self.first.get(&build) else {
            self.first.insert(build, Arc::clone(file));
            return Ok(None);
        };
        if first.is_one_with(file) {
            return Ok(None);
        }
        let pair = [Arc::clone(first), Arc::clone(file)];
        let [first, other] = [&pair[0], &pair[1]].map(|file| file.size_bytes());
        if first != other {
            return Err(Error::corrupt(format!(
                "{} has {other} bytes and its copy {} {first}; expected the same data of build \
                 {build} in both, so import the folders one by one, if you know that both are right",
                pair[1].label(),
                pair[0].label(),
            )));
        }
        Ok(Some(pair))
    }
}

fn generation(
    dir: &ForeignFolder,
    opened: Opened,
    before: Option<&Looked>,
    consent: &Consent<'_>,
    copies: &mut Copies,
) -> Result<(Generation, Vec<String>, Looked)> {
    let Opened { header: Header { metadata, map }, file: header } = opened;
    let map = Arc::new(map);
    let mut notes = Vec::new();
    let mut generation = Generation::new(format!("build {}", metadata.build));
    generation.labels = BTreeMap::from([
        ("wrenn.build-id".to_owned(), metadata.build.to_string()),
        ("wrenn.generation".to_owned(), metadata.generation.to_string()),
    ]);
    let mut files = Vec::new();
    let mut data: Vec<Arc<dyn RandomRead>> = Vec::new();
    for &build in map.builds() {
        let file = Arc::new(open_data(dir, build, &metadata)?);
        generation.same.extend(copies.pair(build, &file)?);
        data.push(Arc::clone(&file) as Arc<dyn RandomRead>);
        files.push(StoredFile { build, file, codec: DataCodec::Plain, sha256: None });
    }
    let label = header.label().to_owned();
    let replay = StoredReplay::new(HeaderSource::File(header, HEADER_BYTES_MAX), files);
    let before_map = before.map(|before| Arc::clone(&before.map));
    let is_first = before_map.is_none();
    let layer = Arc::new(MappedDevice::new(label, Arc::clone(&map), data, before_map)?);
    let body = if is_first { Body::Whole(layer) } else { Body::Changes(layer) };
    generation.images.push(NewContent {
        image: ImageName::Memory,
        body,
        replay: Some(Box::new(replay)),
    });
    if let Some(state) = dir.file(STATE)? {
        let version = crate::firecracker::vmstate::version_of(&state);
        generation.vmm = Vmm {
            kind: Some("firecracker".to_owned()),
            version: version.as_ref().ok().cloned(),
            ..Vmm::default()
        };
        if let Err(error) = version {
            notes.push(format!("{}: {error}", state.label()));
        }
        generation.images.push(NewContent::opened(ImageName::State(Name::new("vmstate")?), state));
    } else {
        notes.push(format!(
            "{} has no {STATE}: memory without state cannot resume",
            dir.path().display()
        ));
    }
    let disk = disk(dir, DISK, before, consent, &mut generation, &mut notes)?;
    Ok((generation, notes, Looked { map, disk }))
}

/// Whether a file is what wrenn keeps a disk in, beside a snapshot of another VMM.
pub(crate) fn is_rootfs(name: &str) -> bool {
    name.strip_prefix(DISK_PREFIX).is_some_and(|kind| !kind.contains('.'))
}

/// Adds the disk that lies beside a snapshot of another VMM, as wrenn puts it: `rootfs.` and whatever the
/// disk is; whether there is one.
pub(crate) fn disk_beside(
    dir: &ForeignFolder,
    options: &LookOptions,
    generation: &mut Generation,
    notes: &mut Vec<String>,
) -> Result<bool> {
    let mut plain = Vec::new();
    for name in dir.names(NAMES_MAX)? {
        if is_rootfs(&name) && ![COW, META].contains(&name.as_str()) && dir.has(&name)? {
            plain.push(name);
        }
    }
    let name = match &plain[..] {
        [] if !dir.has(COW)? => return Ok(false),
        [] => DISK,
        [name] => name,
        [one, other, ..] => {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{} has {one} and {other}, and which of them is the disk is not known; leave one",
                    dir.path().display()
                ),
            ));
        }
    };
    let consent = Consent { options, home: dir.clone() };
    disk(dir, name, None, &consent, generation, notes)?;
    Ok(true)
}

/// Adds the disk, of which no more is read than may differ from that of the generation before: the store
/// of a dm-snapshot, or else the file `plain`.
fn disk(
    dir: &ForeignFolder,
    plain: &str,
    before: Option<&Looked>,
    consent: &Consent<'_>,
    generation: &mut Generation,
    notes: &mut Vec<String>,
) -> Result<DiskBefore> {
    let image = ImageName::Disk(Name::new("root")?);
    let before = before.map(|before| &before.disk);
    let plain = dir.file(plain)?;
    if let Some(cow) = dir.file(COW)? {
        let origin = consent.origin(dir)?;
        let label = cow.label().to_owned();
        let older = match before {
            Some(DiskBefore::Cow(older)) => Some(older),
            _ => None,
        };
        let mut disk = dm_snapshot::disk(image.clone(), cow, origin, older)?;
        notes.push(format!("{label}: {} bytes over {}", disk.changed_bytes, disk.origin.label()));
        if let Some(plain) = plain {
            notes.push(format!("{} skipped: the disk is {COW}", plain.label()));
        }
        let body = Body::Bytes(Arc::from(Vec::new()));
        let content = NewContent { image, body, replay: None };
        generation.images.push(std::mem::replace(&mut disk.content, content));
        return Ok(DiskBefore::Cow(disk));
    }
    let Some(plain) = plain else {
        notes.push(format!("{} has no rootfs: memory only", dir.path().display()));
        return Ok(DiskBefore::None);
    };
    plain.release();
    let file = Arc::new(plain);
    let body = match before {
        // A link to the one of the folder before: there is nothing to read.
        Some(DiskBefore::File(older)) if older.is_one_with(&file) => {
            notes.push(format!("{} is the file of the generation before", file.label()));
            Body::Changes(Arc::new(Unchanged(Arc::clone(&file))))
        }
        _ => Body::Opened(Arc::clone(&file)),
    };
    let replay = Box::new(FileReplay(Arc::clone(&file)));
    generation.images.push(NewContent { image, body, replay: Some(replay) });
    Ok(DiskBefore::File(file))
}

/// A file with which nothing happened since the generation before.
#[derive(Debug)]
struct Unchanged(Arc<StableFile>);

impl LayerSource for Unchanged {
    fn size_bytes(&self) -> u64 {
        RandomRead::size_bytes(&*self.0)
    }

    fn label(&self) -> String {
        StableFile::label(&self.0).to_owned()
    }

    fn read_at(&self, _: &mut [u8], offset: u64) -> io::Result<()> {
        Err(io::Error::other(format!("byte {offset} was not to be read")))
    }

    fn check_unchanged(&self) -> io::Result<()> {
        Ok(RandomRead::check_unchanged(&*self.0)?)
    }

    fn for_each_run(
        &self,
        _: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct FileReplay(Arc<StableFile>);

impl Replay for FileReplay {
    fn replay(&self, compare: &mut Compare<'_>) -> Result<()> {
        crate::verify::opened_file(&self.0, compare)
    }
}

/// The data of a build: under its own name, or under the one of a full dump.
fn open_data(dir: &ForeignFolder, build: Uuid, metadata: &Metadata) -> Result<StableFile> {
    let own = format!("{DATA}.{build}");
    if let Some(file) = dir.file(&own)? {
        return Ok(file);
    }
    let may_be_full =
        build == metadata.base || (build == metadata.build && metadata.generation == 0);
    if may_be_full && let Some(file) = dir.file(DATA)? {
        return Ok(file);
    }
    let full = dir.join(DATA);
    Err(Error::new(
        ErrorKind::NotFound,
        format!(
            "the data of build {build} is missing: expected {}{}",
            dir.join(&own).display(),
            if may_be_full { format!(" or {}", full.display()) } else { String::new() }
        ),
    ))
}

fn read_meta(dir: &ForeignFolder) -> Result<RootMeta> {
    let bytes = dir
        .needed(META)
        .and_then(|file| file.read_all(META_BYTES_MAX))
        .context(|| format!("{COW} needs the disk that it lies over: give --origin FILE"))?;
    RootMeta::parse(&bytes).context(|| format!("{} is damaged", dir.join(META).display()))
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

/// Writes a new file, its owner's alone, and makes it durable.
pub(crate) fn write_file(
    path: &Path,
    fill: &mut dyn FnMut(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    let what = || format!("cannot write {}", path.display());
    let mut options = File::options();
    let file = options.write(true).create_new(true).mode(EXPORT_MODE).open(path).context(what)?;
    let mut sink = BufWriter::with_capacity(1 << 20, file);
    fill(&mut sink)?;
    let file = sink.into_inner().map_err(std::io::IntoInnerError::into_error).context(what)?;
    file.sync_all().context(what)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use dormouse_image::codec::Codec;
    use dormouse_store::commit::Parent;
    use dormouse_store::store::{Config, Store};

    use super::*;
    use crate::import::{ImportRequest, import};
    use crate::page_map::{PageMapBuilder, Record};

    /// A comparison went by the map of the import, so it found whatever the map said, and said that
    /// all was well.
    #[test]
    fn a_map_that_is_wrong_is_found_by_the_comparison() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("snapshot");
        fs::create_dir(&dir).unwrap();
        let build = Uuid::from_bytes([7; 16]);
        let data: Vec<u8> = (1..=4).flat_map(|page| [page; 4096]).collect();
        fs::write(dir.join(DATA), data).unwrap();
        let map = |storages: &[u64]| {
            let mut builder = PageMapBuilder::new(storages.len() as u64 * PAGE_BYTES).unwrap();
            for (offset, &storage) in (0..).step_by(4096).zip(storages) {
                let storage = storage * PAGE_BYTES;
                builder.push(&Record { offset, length: PAGE_BYTES, build, storage }).unwrap();
            }
            builder.finish().unwrap()
        };
        let metadata = Metadata {
            version: VERSION,
            block_bytes: PAGE_BYTES,
            size_bytes: 3 * PAGE_BYTES,
            generation: 0,
            build,
            base: build,
        };
        // With a gap between the first and the second page.
        let right = Header { metadata, map: map(&[0, 2, 3]) };
        fs::write(dir.join(HEADER), right.encode()).unwrap();
        let home = ForeignFolder::open(&dir).unwrap();
        let options = LookOptions::default();
        let consent = Consent { options: &options, home: home.clone() };
        for (number, (storages, is_right)) in
            [(&[0, 2, 3], true), (&[0, 1, 2], false)].into_iter().enumerate()
        {
            let mut opened = read_header(home.needed(HEADER).unwrap()).unwrap();
            // As a parser would have it that joins neighbours without a look at their storage.
            opened.header.map = map(storages);
            let mut copies = Copies::default();
            let (generation, ..) = generation(&home, opened, None, &consent, &mut copies).unwrap();
            let found = Found {
                format: Format::Wrenn,
                version: "1".to_owned(),
                generations: vec![generation],
                notes: Vec::new(),
                is_whole: true,
                base: None,
            };
            let path = folder.path().join(format!("store-{number}"));
            let store = Store::init(&path, Config::STANDARD).unwrap();
            let request = ImportRequest {
                name: Name::new("vm").unwrap(),
                parent: Parent::None,
                codec: Codec::Lz4,
                verify: true,
            };
            match import(&store, found, &request, Job::quiet()) {
                Ok(_) => assert!(is_right, "a wrong map was not found"),
                Err(error) => {
                    assert!(!is_right);
                    assert_eq!(error.kind(), ErrorKind::Differs);
                    assert!(store.list(None).unwrap().snapshots.is_empty(), "it was removed");
                }
            }
        }
    }
}
