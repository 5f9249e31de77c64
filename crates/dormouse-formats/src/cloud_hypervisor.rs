//! Cloud Hypervisor's snapshot folder.
//!
//! ```text
//! config.json     the VM's configuration, which may be changed before a restore
//! state.json      the state of all devices; that of the memory manager is JSON in a string
//! memory-ranges   the guest's memory: the ranges that the memory manager lists, in its order
//! rootfs.*        where wrenn made it: the disk, as in its own folders
//! ID.img          where we made it, or whatever else a configured disk's file is called: that disk
//! ```
//!
//! The order of the ranges is that of a hash table: it is kept, never sorted. A hole is zero; dense
//! and sparse files read the same. A zone whose memory is a shared file of its own is not in the
//! folder at all. Cloud Hypervisor writes both JSON files with one write and does not look how much
//! was written, so both are parsed to their end before anything is taken.
//!
//! A state in the store has its file's name, as those have that a sleep stores.

use std::collections::BTreeMap;
use std::path::Path;

use dormouse_store::manifest::{ImageEntry, MemoryRegion, REGIONS_MAX, Vmm};
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::reader::{ExportTarget, NewFolder};
use dormouse_store::store::Snapshot;
use serde::Deserialize;
use serde_json::Value;

use crate::data::RandomRead;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::export::{ExportReport, ExportRequest, Line};
use crate::foreign_folder::ForeignFolder;
use crate::format::Format;
use crate::import::{Found, Generation, LookOptions, NewContent};
use crate::page_map::PAGE_BYTES;
use crate::wrenn::{disk_beside, is_rootfs, write_file};

/// The longest of the JSON files; a state of many devices has some hundred KiB.
pub const JSON_BYTES_MAX: u64 = 64 << 20;

const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const RANGES: &str = "memory-ranges";

/// What a snapshot by descriptors has in the place of its configuration.
const MIGRATION_CONFIG: &str = "migration-config.json";

/// A range of `memory-ranges`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Range {
    /// Its guest-physical address.
    pub gpa: u64,

    /// Its length.
    pub length: u64,
}

/// A mapping of guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Mapping {
    /// Its guest-physical address.
    pub gpa: u64,

    /// Its length.
    pub size: u64,

    /// Its zone.
    pub zone_id: String,

    /// Whether it is memory that can be plugged.
    #[serde(default)]
    pub virtio_mem: bool,
}

/// What the memory manager says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryState {
    /// What is in `memory-ranges`, in its order.
    pub ranges: Vec<Range>,

    /// All mappings.
    pub mappings: Vec<Mapping>,
}

#[derive(Deserialize)]
struct ManagerState {
    memory_ranges: RangeTable,
    #[serde(default)]
    guest_ram_mappings: Vec<Mapping>,
}

#[derive(Deserialize)]
struct RangeTable {
    data: Vec<Range>,
}

impl MemoryState {
    /// Reads `state.json`.
    pub fn parse(bytes: &[u8]) -> Result<MemoryState> {
        let json: Value = serde_json::from_slice(bytes)
            .map_err(|error| Error::corrupt(format!("{STATE}: {error}; was it written short?")))?;
        let state = &json["snapshots"]["memory-manager"]["snapshot_data"]["state"];
        let text = state.as_str().ok_or_else(|| {
            Error::corrupt(format!(
                "{STATE}: no text at snapshots.memory-manager.snapshot_data.state; expected the \
                 memory manager's JSON"
            ))
        })?;
        let manager: ManagerState = serde_json::from_str(text).map_err(|error| {
            Error::corrupt(format!("{STATE}: the memory manager's state: {error}"))
        })?;
        let state = MemoryState {
            ranges: manager.memory_ranges.data,
            mappings: manager.guest_ram_mappings,
        };
        state.check()?;
        Ok(state)
    }

    fn check(&self) -> Result<()> {
        if self.ranges.len() > REGIONS_MAX || self.mappings.len() > REGIONS_MAX {
            return Err(Error::corrupt(format!(
                "{STATE}: {} ranges and {} mappings; at most {REGIONS_MAX}",
                self.ranges.len(),
                self.mappings.len()
            )));
        }
        let mut sorted: Vec<(usize, &Range)> = self.ranges.iter().enumerate().collect();
        sorted.sort_unstable_by_key(|(_, range)| range.gpa);
        let mut end = 0;
        for (number, range) in sorted {
            let next = range.gpa.checked_add(range.length);
            let Some(next) = next.filter(|_| range.length > 0) else {
                return Err(Error::corrupt(format!(
                    "{STATE}: range {number} at {:#x} has {} bytes",
                    range.gpa, range.length
                )));
            };
            if (range.gpa | range.length) % PAGE_BYTES != 0 {
                return Err(Error::corrupt(format!(
                    "{STATE}: range {number} at {:#x} of {} bytes; expected whole pages",
                    range.gpa, range.length
                )));
            }
            if range.gpa < end {
                return Err(Error::corrupt(format!(
                    "{STATE}: range {number} at {:#x} overlaps another that ends at {end:#x}",
                    range.gpa
                )));
            }
            end = next;
            // Older releases list no mappings at all.
            if !self.mappings.is_empty() && self.mapping_of(range).is_none() {
                return Err(Error::corrupt(format!(
                    "{STATE}: range {number} at {:#x} of {} bytes lies in none of the {} mappings; \
                     expected it inside of one, which tells its zone and whether it is plugged",
                    range.gpa,
                    range.length,
                    self.mappings.len()
                )));
            }
        }
        Ok(())
    }

    fn mapping_of(&self, range: &Range) -> Option<&Mapping> {
        self.mappings
            .iter()
            .find(|mapping| mapping.gpa <= range.gpa && range.gpa - mapping.gpa < mapping.size)
    }

    /// The length that `memory-ranges` must have.
    pub fn size_bytes(&self) -> Option<u64> {
        self.ranges.iter().try_fold(0_u64, |sum, range| sum.checked_add(range.length))
    }

    fn zone_of(&self, range: &Range) -> String {
        self.mapping_of(range).map(|mapping| mapping.zone_id.clone()).unwrap_or_default()
    }

    fn rows(&self) -> Vec<MemoryRegion> {
        let mut image_offset = 0;
        self.ranges
            .iter()
            .map(|range| {
                let row = MemoryRegion {
                    block: self.zone_of(range),
                    image_offset,
                    guest_address: Some(range.gpa),
                    length: range.length,
                    page_size: PAGE_BYTES,
                    plugged: true,
                };
                image_offset += range.length;
                row
            })
            .collect()
    }

    /// The mappings of which nothing is in the folder.
    fn absent(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.iter().filter(|mapping| {
            !mapping.virtio_mem
                && !self.ranges.iter().any(|range| {
                    range.gpa < mapping.gpa.saturating_add(mapping.size)
                        && mapping.gpa < range.gpa + range.length
                })
        })
    }
}

/// Looks at a snapshot's folder.
pub fn look(path: &Path, options: &LookOptions) -> Result<Found> {
    let folder = ForeignFolder::open(path)?;
    let (config, state) = (folder.needed(CONFIG)?, folder.needed(STATE)?);
    let config_bytes = config.read_all(JSON_BYTES_MAX)?;
    let parsed: Value = serde_json::from_slice(&config_bytes).map_err(|error| {
        Error::corrupt(format!("{}: {error}; was it written short?", config.label()))
    })?;
    if !parsed.is_object() {
        return Err(Error::corrupt(format!("{}: expected an object", config.label())));
    }
    let state_bytes = state.read_all(JSON_BYTES_MAX)?;
    let memory =
        MemoryState::parse(&state_bytes).context(|| format!("{} is damaged", state.label()))?;
    let size = memory.size_bytes().ok_or_else(|| Error::corrupt("more than 16 EiB of memory"))?;
    let mut notes = Vec::new();
    for mapping in memory.absent() {
        notes.push(format!(
            "zone {} ({} bytes at {:#x}) is not in the snapshot: its memory is a file of its own",
            mapping.zone_id, mapping.size, mapping.gpa
        ));
    }
    let mut generation = Generation::new(path.display().to_string());
    let ranges = folder.join(RANGES);
    if size > 0 {
        let file = folder.needed(RANGES)?;
        if file.size_bytes() != size {
            return Err(Error::corrupt(format!(
                "{} has {} bytes; {STATE} lists {} ranges of {size} bytes",
                ranges.display(),
                file.size_bytes(),
                memory.ranges.len()
            )));
        }
        generation.memory_layout = memory.rows();
        generation.images.push(NewContent::opened(ImageName::Memory, file));
    } else {
        if folder.has(RANGES)? {
            return Err(Error::corrupt(format!(
                "{} is there, but {STATE} lists no range",
                ranges.display()
            )));
        }
        notes.push("no memory in the snapshot: all of it is in files of its own".to_owned());
    }
    let disks = parsed["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is_beside = disk_beside(&folder, options, &mut generation, &mut notes)?;
    let found = usize::from(is_beside) + disks_inside(disks, &folder, &mut generation)?;
    if disks.len() > found {
        notes.push(match disks.len() - found {
            1 => "1 disk is configured that is not in the folder".to_owned(),
            missing => format!("{missing} disks are configured that are not in the folder"),
        });
    }
    generation.images.push(NewContent::opened(ImageName::State(Name::new(CONFIG)?), config));
    generation.images.push(NewContent::opened(ImageName::State(Name::new(STATE)?), state));
    generation.vmm = Vmm {
        kind: Some("cloud-hypervisor".to_owned()),
        version: options.vmm_version.clone(),
        vcpus: parsed["cpus"]["boot_vcpus"].as_u64().and_then(|vcpus| u32::try_from(vcpus).ok()),
        ..Vmm::default()
    };
    Ok(Found {
        format: Format::CloudHypervisor,
        version: "snapshot".to_owned(),
        generations: vec![generation],
        notes,
        is_whole: false,
        base: None,
    })
}

/// Adds the configured disks whose files are in the folder, wherever that was when they were written; how
/// many there are.
fn disks_inside(
    disks: &[Value],
    folder: &ForeignFolder,
    generation: &mut Generation,
) -> Result<usize> {
    let file_name = |disk: &Value| Some(disk["path"].as_str()?.rsplit('/').next()?.to_owned());
    let names: Vec<Option<String>> = disks.iter().map(file_name).collect();
    let mut found = 0;
    for (disk, name) in disks.iter().zip(&names) {
        let Some(name) = name.as_ref().filter(|name| !name.is_empty()) else { continue };
        // Two of one name lay in folders of their own. What wrenn put there is taken already.
        let is_other = names.iter().filter(|other| other.as_ref() == Some(name)).count() > 1;
        let is_known = [CONFIG, STATE, RANGES].contains(&name.as_str()) || is_rootfs(name);
        let id = disk["id"].as_str().and_then(|id| Name::new(id.trim_start_matches('_')).ok());
        let Some(id) = id.filter(|_| !is_other && !is_known) else { continue };
        let image = ImageName::Disk(id);
        if generation.images.iter().any(|content| content.image == image) {
            continue;
        }
        if let Some(file) = folder.file(name)? {
            generation.images.push(NewContent::opened(image, file));
            found += 1;
        }
    }
    Ok(found)
}

/// Writes a folder that `--restore` takes: paths of disks that the snapshot has become those of the
/// files written beside, and paths that are asked for others.
pub fn export(
    line: &Line,
    dir: &Path,
    request: &ExportRequest,
    job: Job<'_>,
) -> Result<ExportReport> {
    let snapshot = line.newest();
    let has = |name: &str| snapshot.manifest().images.iter().any(|entry| is_state(entry, name));
    if has(MIGRATION_CONFIG) && !has(CONFIG) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{} was handed over by descriptors and has no {CONFIG}, so no folder can be made of \
                 it; wake it, and sleep with launch.transfer \"files\"",
                line.name()
            ),
        ));
    }
    // The names that earlier imports gave.
    let name_of = |file, older| if has(file) || !has(older) { file } else { older };
    let (config_name, state_name) = (name_of(CONFIG, "config"), name_of(STATE, "state"));
    let mut config: Value = serde_json::from_slice(&small(snapshot, config_name)?)
        .map_err(|error| Error::corrupt(format!("{CONFIG} in the store: {error}")))?;
    let state = small(snapshot, state_name)?;
    let memory = MemoryState::parse(&state)?;
    let new = NewFolder::create(dir)?;
    let mut report = ExportReport::new(Format::CloudHypervisor, "snapshot".to_owned(), dir);
    let target =
        std::path::absolute(dir).context(|| format!("cannot tell where {} is", dir.display()))?;
    let mut written = vec![format!("state/{config_name}"), format!("state/{state_name}")];
    let mut rewrites: BTreeMap<String, String> = request.rewrite.iter().cloned().collect();
    for (id, path) in disks_of(&config, snapshot) {
        let file = format!("{id}.img");
        let image = ImageName::Disk(id);
        snapshot.image(&image)?.export(&new.path().join(&file), ExportTarget::New, job)?;
        report.wrote(&file, new.path())?;
        written.push(image.to_string());
        match path {
            Some(path) => {
                rewrites.insert(path, target.join(&file).display().to_string());
            }
            None => report.notes.push(format!(
                "{image} of {} is no disk of {CONFIG}: it lies beside as {file}, and nothing opens it",
                line.name()
            )),
        }
    }
    let changed = rewrite(&mut config, &rewrites);
    if let Some((old, _)) = request.rewrite.iter().find(|(old, _)| !changed.contains_key(old)) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("--rewrite {old}=…: {CONFIG} of {} has no {old:?}", line.name()),
        ));
    }
    for (old, new_path) in &rewrites {
        let times = changed.get(old).copied().unwrap_or(0);
        let places = if times == 1 { "1 place".to_owned() } else { format!("{times} places") };
        report.notes.push(format!("{old} became {new_path} at {places} of {CONFIG}"));
    }
    let text = serde_json::to_vec(&config)
        .map_err(|error| Error::corrupt(format!("cannot write {CONFIG}: {error}")))?;
    for (name, bytes) in [(CONFIG, &text), (STATE, &state)] {
        write_file(&new.path().join(name), &mut |sink| {
            sink.write_all(bytes).context(|| format!("cannot write {name}"))
        })?;
        report.wrote(name, new.path())?;
    }
    if !memory.ranges.is_empty() {
        let image = snapshot.image(&ImageName::Memory)?;
        if memory.size_bytes() != Some(image.size_bytes()) {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "the memory of {} has {} bytes, but its {STATE} lists {:?}",
                    line.name(),
                    image.size_bytes(),
                    memory.size_bytes()
                ),
            ));
        }
        image.export(&new.path().join(RANGES), ExportTarget::New, job)?;
        report.wrote(RANGES, new.path())?;
        written.push(ImageName::Memory.to_string());
    }
    let written: Vec<&str> = written.iter().map(String::as_str).collect();
    report.skipped(snapshot.manifest(), &written);
    new.publish()?;
    Ok(report)
}

fn is_state(entry: &ImageEntry, name: &str) -> bool {
    matches!(&entry.image, ImageName::State(state) if state.as_str() == name)
}

/// A state that is JSON.
fn small(snapshot: &Snapshot, name: &str) -> Result<Vec<u8>> {
    let image = snapshot.image(&ImageName::State(Name::new(name)?))?;
    if image.size_bytes() > JSON_BYTES_MAX {
        return Err(Error::corrupt(format!(
            "state/{name} has {} bytes; at most {JSON_BYTES_MAX}",
            image.size_bytes()
        )));
    }
    let mut bytes = vec![0; usize::try_from(image.size_bytes()).unwrap_or(0)];
    image.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The disks of the snapshot, with the paths of those that are configured: by id, or the only one of both.
fn disks_of(config: &Value, snapshot: &Snapshot) -> Vec<(Name, Option<String>)> {
    let images: Vec<Name> = snapshot
        .manifest()
        .images
        .iter()
        .filter_map(|entry| match &entry.image {
            ImageName::Disk(id) => Some(id.clone()),
            _ => None,
        })
        .collect();
    let disks = config["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = |disk: &Value| -> Option<(Name, String)> {
        let path = disk["path"].as_str()?.to_owned();
        let id = disk["id"].as_str().unwrap_or_default();
        let same = images.iter().find(|image| image.as_str() == id.trim_start_matches('_'));
        let only = if disks.len() == 1 && images.len() == 1 { images.first() } else { None };
        Some((same.or(only)?.clone(), path))
    };
    let configured: Vec<(Name, String)> = disks.iter().filter_map(found).collect();
    let path_of = |id: &Name| configured.iter().find(|(other, _)| other == id);
    let with_path = |id: &Name| (id.clone(), path_of(id).map(|(_, path)| path.clone()));
    images.iter().map(with_path).collect()
}

/// Changes texts that are a path, or lie under it, and counts.
fn rewrite(json: &mut Value, paths: &BTreeMap<String, String>) -> BTreeMap<String, usize> {
    let mut changed = BTreeMap::new();
    let mut next = vec![json];
    while let Some(value) = next.pop() {
        match value {
            Value::String(text) => {
                let found = paths.iter().rev().find_map(|(old, new)| {
                    let rest = text.strip_prefix(old.as_str())?;
                    let whole = rest.is_empty() || rest.starts_with('/') || old.ends_with('/');
                    whole.then(|| (old.clone(), format!("{new}{rest}")))
                });
                if let Some((old, new)) = found {
                    *changed.entry(old).or_insert(0) += 1;
                    *text = new;
                }
            }
            Value::Array(values) => next.extend(values.iter_mut()),
            Value::Object(fields) => next.extend(fields.iter_mut().map(|(_, value)| value)),
            _ => {}
        }
    }
    changed
}
