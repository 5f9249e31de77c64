//! Firecracker's snapshots: a memory file and a vmstate.
//!
//! The memory file has no header: the guest's regions one behind the other, by address. In a *full*
//! one a hole is zero. In a *diff* a hole is what did not change, and a zero that is there is a page
//! that is zero now; nothing in the file tells which of the two it is, so the user does.
//!
//! Where regions lie depends on the architecture and, on x86_64, on the release: up to 1.12 the
//! first one ended at 3.25 GiB, since 1.13 at 3 GiB, with another hole from 256 to 512 GiB. Since 1.14
//! a guest may have a region at the end that memory is plugged into, which nothing that can be read
//! tells: then the user says where memory lies.
//!
//! Firecracker 1.14.0 and 1.14.1 wrote pages of diffs to wrong places (#5705). Such diffs are
//! refused; where the vmstate does not tell the release apart, the user has to.

pub mod vmstate;

use std::path::Path;

use dormouse_store::manifest::{MemoryRegion, Vmm};
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::reader::{ExportTarget, NewFolder};
use dormouse_sys::sparse::hole_granularity;

use crate::data::{RandomRead, StableFile};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::export::{ExportReport, Line};
use crate::foreign_folder::ForeignFolder;
use crate::format::Format;
use crate::import::{Body, Found, Generation, GuestLayout, LookOptions, NewContent};
use crate::page_map::PAGE_BYTES;
use vmstate::VmState;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// The format of Firecracker 1.13 and 1.14.
const FORMAT_OF_1_14: u64 = 8;

/// Files of a folder that are looked at for a snapshot.
const FILES_MAX: usize = 64;

/// Looks at a memory file with its vmstate, or at a folder that has just these two.
pub fn look(path: &Path, options: &LookOptions) -> Result<Found> {
    let (memory, state) = match &options.state {
        Some(state) => (StableFile::open(path)?, StableFile::open(state)?),
        None => find_pair(path)?,
    };
    let vmstate = VmState::read(&state).context(|| format!("{} is damaged", state.label()))?;
    if !vmstate.checksum_matches {
        return Err(Error::corrupt(format!(
            "{}: the CRC-64 at its end is not that of its bytes: it was cut or changed",
            state.label()
        )));
    }
    let size = memory.size_bytes();
    if size == 0 || !size.is_multiple_of(MIB) {
        return Err(Error::corrupt(format!(
            "{} has {size} bytes; expected whole MiB, as a guest's memory has",
            memory.label()
        )));
    }
    let mut notes = Vec::new();
    if options.is_diff {
        check_release(&vmstate, options)?;
        if !memory.has_holes() {
            notes.push(format!(
                "{} is taken as a diff and has no hole, so all of it replaces the parent's: a copy \
                 that filled the holes with zeros is no diff any more",
                memory.label()
            ));
        }
    } else if memory.has_holes() {
        notes.push(format!(
            "the holes of {} are taken for zeros; if it is a diff, import it with --diff and --parent",
            memory.label()
        ));
    }
    let version = options.vmm_version.clone().or_else(|| vmstate.releases().map(str::to_owned));
    let memory_layout = rows(&layout(&vmstate, &state, size, options)?);
    let mut generation = Generation::new(memory.label());
    generation.memory_layout = memory_layout;
    generation.vmm = Vmm {
        kind: Some("firecracker".to_owned()),
        version,
        arch: Some(vmstate.arch.to_owned()),
        ..Vmm::default()
    };
    generation.images = vec![
        if options.is_diff {
            let body = Body::Diff(memory.path().to_owned());
            NewContent { image: ImageName::Memory, body, replay: None }
        } else {
            NewContent::opened(ImageName::Memory, memory)
        },
        NewContent::opened(ImageName::State(Name::new("vmstate")?), state),
    ];
    let format = vmstate.format.map_or_else(
        || "vmstate of a version that is not known".to_owned(),
        |(major, minor, patch)| format!("vmstate {major}.{minor}.{patch}"),
    );
    Ok(Found {
        format: Format::Firecracker,
        version: format,
        generations: vec![generation],
        notes,
        is_whole: false,
        base: None,
    })
}

/// The memory file and the vmstate of a folder: the one file with the magic, and the one other.
fn find_pair(path: &Path) -> Result<(StableFile, StableFile)> {
    if !path.is_dir() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{} needs its vmstate beside it: give --state FILE", path.display()),
        ));
    }
    let folder = ForeignFolder::open(path)?;
    let mut states = Vec::new();
    let mut others = Vec::new();
    for name in folder.names(FILES_MAX + 1)? {
        let Some(file) = folder.file(&name)? else { continue };
        if is_vmstate(&file)? {
            states.push(file);
        } else if file.size_bytes() > 0 && file.size_bytes().is_multiple_of(MIB) {
            others.push(file);
        }
    }
    let counts = (states.len(), others.len());
    match (states.pop(), others.pop()) {
        (Some(state), Some(memory)) if counts == (1, 1) => Ok((memory, state)),
        _ => Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "{} has {} vmstate files and {} files of whole MiB; expected one of each, or name \
                 the memory file and --state FILE",
                path.display(),
                counts.0,
                counts.1
            ),
        )),
    }
}

fn is_vmstate(file: &StableFile) -> Result<bool> {
    let mut head = [0; vmstate::HEAD_BYTES];
    if file.size_bytes() < head.len() as u64 {
        return Ok(false);
    }
    file.read_at(&mut head, 0)?;
    Ok(vmstate::is_head(head))
}

/// Whether a file begins as a vmstate does.
pub(crate) fn has_magic(path: &Path) -> bool {
    StableFile::open(path).and_then(|file| is_vmstate(&file)).unwrap_or(false)
}

/// Refuses diffs that may be of 1.14.0 or 1.14.1.
fn check_release(vmstate: &VmState, options: &LookOptions) -> Result<()> {
    match options.vmm_version.as_deref().map(|version| version.trim_start_matches('v')) {
        Some("1.14.0" | "1.14.1") => Err(Error::new(
            ErrorKind::Refused,
            "Firecracker 1.14.0 and 1.14.1 wrote pages of diffs to wrong places (#5705), so what \
             this one holds cannot be trusted; take a full snapshot with 1.14.2 or later",
        )),
        Some(version) if !is_release(version) => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{version:?} is not a release of Firecracker; expected one such as 1.14.2"),
        )),
        Some(version) => match vmstate.releases() {
            // A wrong word would let a broken diff through.
            Some(releases) if !releases.split(" or ").any(|minor| is_of_minor(version, minor)) => {
                Err(Error::new(
                    ErrorKind::Refused,
                    format!(
                        "--vmm-version says {version}, but the vmstate is of {releases}; give the \
                         release that wrote it"
                    ),
                ))
            }
            _ => Ok(()),
        },
        None => match vmstate.format {
            Some((FORMAT_OF_1_14, ..)) => Err(Error::new(
                ErrorKind::Refused,
                "this vmstate may be of Firecracker 1.14.0 or 1.14.1, which wrote pages of diffs to \
                 wrong places (#5705), and does not tell; say which release it was with \
                 --vmm-version",
            )),
            _ => Ok(()),
        },
    }
}

/// Whether 1.14.2 is of 1.14.
fn is_of_minor(release: &str, minor: &str) -> bool {
    release.strip_prefix(minor).is_some_and(|patch| patch.starts_with('.'))
}

fn is_release(version: &str) -> bool {
    let numbers: Vec<_> = version.split('.').collect();
    numbers.len() == 3
        && numbers
            .iter()
            .all(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Regions as guest address and length: those that the user names, or those of a guest that cannot
/// have memory that is plugged. Where such memory lies, and how much of the file it is, only the
/// closed part of the vmstate has.
fn layout(
    vmstate: &VmState,
    state: &StableFile,
    size: u64,
    options: &LookOptions,
) -> Result<Vec<(u64, u64)>> {
    if let Some(GuestLayout::Regions(regions)) = &options.layout {
        check_layout(regions, size)?;
        return Ok(regions.clone());
    }
    let minor = options.vmm_version.as_deref().and_then(minor);
    let cannot_plug = match minor {
        Some(minor) => minor < 14,
        None => vmstate.format.is_some_and(|format| format.0 < FORMAT_OF_1_14),
    };
    let is_told = options.layout.is_some() || options.low_memory_bytes.is_some();
    if !cannot_plug && !is_told {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{} may be of Firecracker 1.14 or later, whose guests can have memory that is plugged \
                 in, so where the {size} bytes of memory lie is not known; say --layout standard if \
                 this guest had none, --layout ADDRESS:SIZE,… if it had, or --vmm-version",
                state.label()
            ),
        ));
    }
    if vmstate.arch == "aarch64" {
        // From 2 GiB to 256 GiB, then from 512 GiB.
        return Ok(split(size, &[(2 * GIB, 254 * GIB), (512 * GIB, u64::MAX)]));
    }
    let is_old = minor.map(|minor| minor <= 12).or(vmstate.format.map(|format| format.0 < 8));
    // Of one that is not known the hole is the newer one.
    let is_old = is_old.unwrap_or(false);
    let low = match options.low_memory_bytes {
        Some(low) => low,
        None if is_old => 3 * GIB + 256 * MIB,
        None => 3 * GIB,
    };
    if low == 0 || !low.is_multiple_of(PAGE_BYTES) || low > 4 * GIB {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("--low-memory {low}; expected whole pages, at most 4 GiB"),
        ));
    }
    let high = if is_old { u64::MAX } else { 252 * GIB };
    Ok(split(size, &[(0, low), (4 * GIB, high), (512 * GIB, u64::MAX)]))
}

/// The 14 of 1.14.2.
fn minor(version: &str) -> Option<u64> {
    version.trim_start_matches('v').strip_prefix("1.")?.split('.').next()?.parse().ok()
}

fn check_layout(regions: &[(u64, u64)], size: u64) -> Result<()> {
    let (mut end, mut sum) = (0, 0_u64);
    for &(address, length) in regions {
        let next = address.checked_add(length).filter(|_| length > 0 && address >= end);
        let Some(next) = next.filter(|_| (address | length).is_multiple_of(PAGE_BYTES)) else {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "--layout: the region at {address:#x} of {length} bytes; expected whole pages \
                     from {end:#x} on"
                ),
            ));
        };
        end = next;
        sum = sum.saturating_add(length);
    }
    if sum != size {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("--layout has {sum} bytes; expected {size}, the length of the memory file"),
        ));
    }
    Ok(())
}

fn split(size: u64, spaces: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut left = size;
    let mut regions = Vec::new();
    for &(address, room) in spaces {
        let length = left.min(room);
        if length > 0 {
            regions.push((address, length));
        }
        left -= length;
    }
    regions
}

fn rows(regions: &[(u64, u64)]) -> Vec<MemoryRegion> {
    let mut image_offset = 0;
    regions
        .iter()
        .map(|&(address, length)| {
            let row = MemoryRegion {
                block: String::new(),
                image_offset,
                guest_address: Some(address),
                length,
                page_size: PAGE_BYTES,
                plugged: true,
            };
            image_offset += length;
            row
        })
        .collect()
}

/// Writes a folder with `memory` and `vmstate`; with a base, `memory` is a diff against it.
pub fn export(line: &Line, dir: &Path, job: Job<'_>) -> Result<ExportReport> {
    let snapshot = line.newest();
    let memory = snapshot.image(&ImageName::Memory)?;
    let state = snapshot.image(&ImageName::State(Name::new("vmstate")?))?;
    let new = NewFolder::create(dir)?;
    let is_diff = line.snapshots().len() > 1;
    let kind = if is_diff { "Diff" } else { "Full" };
    let mut report = ExportReport::new(Format::Firecracker, kind.to_owned(), dir);
    let path = new.path().join("memory");
    if is_diff {
        let base = line.snapshots()[0].image(&ImageName::Memory)?;
        if base.size_bytes() != memory.size_bytes() {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "the memory of {} has {} bytes and that of its ancestor {}: there is no diff \
                     between them",
                    line.name(),
                    memory.size_bytes(),
                    base.size_bytes()
                ),
            ));
        }
        let granularity = hole_granularity(new.path())
            .context(|| format!("cannot find out how holes are kept at {}", dir.display()))?;
        if granularity.is_none_or(|granularity| granularity > PAGE_BYTES) {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "the file system of {} cannot keep holes of {PAGE_BYTES} bytes, so unchanged \
                     pages would be taken for zeros; write the diff to ext4, xfs or tmpfs",
                    dir.display()
                ),
            ));
        }
        memory.export_diff(&base, &path, ExportTarget::New, job)?;
    } else {
        memory.export(&path, ExportTarget::New, job)?;
    }
    state.export(&new.path().join("vmstate"), ExportTarget::New, job)?;
    report.wrote("memory", new.path())?;
    report.wrote("vmstate", new.path())?;
    report.skipped(snapshot.manifest(), &["memory", "state/vmstate"]);
    new.publish()?;
    Ok(report)
}
