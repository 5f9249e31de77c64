//! What is at a path: which format, which version, and what is wrong with it.

use std::fs;
use std::path::Path;

use crate::data::{RandomRead, StableFile};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::Format;
use crate::import::{Found, LookOptions, is_file};

/// Entries of a folder that are looked at.
const ENTRIES_MAX: usize = 256;

/// What was detected.
#[derive(Debug)]
pub struct Detected {
    /// Whose it is.
    pub format: Format,

    /// The version, where it can be read.
    pub version: Option<String>,

    /// What it holds, in words, one thing a line.
    pub facts: Vec<String>,

    /// What is wrong with it or missing, and keeps it from being imported.
    pub problem: Option<Error>,
}

/// Opens what is at a path as a format.
pub fn look(format: Format, path: &Path, options: &LookOptions) -> Result<Found> {
    options.check(format)?;
    match format {
        Format::Wrenn => crate::wrenn::look(path, options),
        Format::E2b => crate::e2b::look(path, options),
        Format::DmSnapshot => crate::dm_snapshot::look(path, options),
        Format::Firecracker => crate::firecracker::look(path, options),
        Format::CloudHypervisor => crate::cloud_hypervisor::look(path, options),
        Format::Qemu => crate::qemu::look_backend(path, options),
        Format::MappedRam => crate::qemu::look_mapped_ram(path, options),
        Format::Qcow2 => crate::disk::look(path, options),
        Format::Raw => crate::raw::look(path, options),
        Format::Carry => crate::carry::look(path),
    }
}

/// Says what is at a path.
pub fn detect(path: &Path, options: &LookOptions) -> Result<Detected> {
    let format = guess(path, options)?;
    let (version, facts, problem) = match look(format, path, options) {
        Ok(found) => {
            let mut facts = found.notes;
            for generation in &found.generations {
                let images: Vec<_> =
                    generation.images.iter().map(|content| content.image.to_string()).collect();
                facts.push(format!("{}: {}", generation.title, images.join(", ")));
            }
            (Some(found.version), facts, None)
        }
        Err(error) => (None, Vec::new(), Some(error)),
    };
    Ok(Detected { format, version, facts, problem })
}

/// Whose it is, by names and first bytes; of a memory file, by those of the state that belongs to it.
pub fn guess(path: &Path, options: &LookOptions) -> Result<Format> {
    let metadata = path.metadata().context(|| format!("cannot look at {}", path.display()))?;
    if let Some(state) = options.state.as_deref().filter(|_| metadata.is_file()) {
        return guess_state(state)?.ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{} is no state of a VMM that is known; expected one of Firecracker or QEMU",
                    state.display()
                ),
            )
        });
    }
    let guessed = if metadata.is_dir() { guess_folder(path)? } else { guess_file(path)? };
    guessed.ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!(
                "{} is of no format that is told by its bytes ({}); a disk of plain bytes is raw, \
                 and a memory file wants its --state",
                path.display(),
                Format::words()
            ),
        )
    })
}

/// Whose state a file is.
fn guess_state(path: &Path) -> Result<Option<Format>> {
    if crate::firecracker::has_magic(path) {
        return Ok(Some(Format::Firecracker));
    }
    Ok((guess_file(path)? == Some(Format::MappedRam)).then_some(Format::Qemu))
}

fn guess_folder(path: &Path) -> Result<Option<Format>> {
    let has = |name: &str| is_file(&path.join(name));
    if has("state.json") || has("memory-ranges") {
        return Ok(Some(Format::CloudHypervisor));
    }
    if has("metadata.json") || has("rootfs.ext4.header") {
        return Ok(Some(Format::E2b));
    }
    if has("memfile.header") {
        // Both have it; wrenn's is always of version 1, only wrenn keeps what its disk lies over or
        // data of several builds in one folder, and E2B's folders are named by the build.
        let file = StableFile::open(&path.join("memfile.header"))?;
        let mut version = [0; 8];
        file.read_at(&mut version, 0)?;
        let is_first = u64::from_le_bytes(version) & 0xffff == 1;
        let is_build = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.parse::<uuid::Uuid>().is_ok());
        let is_wrenn =
            is_first && (!is_build || has("rootfs.meta") || has("rootfs.cow") || has_diffs(path)?);
        return Ok(Some(if is_wrenn { Format::Wrenn } else { Format::E2b }));
    }
    let mut folders = 0;
    for entry in fs::read_dir(path).context(|| format!("cannot look into {}", path.display()))? {
        let entry = entry.context(|| format!("cannot look into {}", path.display()))?.path();
        if ["memfile.header", "rootfs.ext4.header"].iter().any(|name| is_file(&entry.join(name))) {
            let found = guess_folder(&entry)?;
            return Ok(Some(if found == Some(Format::E2b) { Format::E2b } else { Format::Wrenn }));
        }
        if crate::firecracker::has_magic(&entry) {
            return Ok(Some(Format::Firecracker));
        }
        if is_file(&entry) && guess_file(&entry)? == Some(Format::MappedRam) {
            return Ok(Some(Format::Qemu));
        }
        folders += 1;
        if folders == ENTRIES_MAX {
            break;
        }
    }
    Ok(None)
}

/// Whether a folder has a data file that is named by its build, as wrenn's diffs are.
fn has_diffs(path: &Path) -> Result<bool> {
    let what = || format!("cannot look into {}", path.display());
    for entry in fs::read_dir(path).context(what)?.take(ENTRIES_MAX) {
        let name = entry.context(what)?.file_name();
        let build = name.to_str().and_then(|name| name.strip_prefix("memfile."));
        if build.is_some_and(|build| build.parse::<uuid::Uuid>().is_ok()) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn guess_file(path: &Path) -> Result<Option<Format>> {
    let file = StableFile::open(path)?;
    let mut head = [0; 16];
    let len = usize::try_from(file.size_bytes().min(16)).unwrap_or(0);
    file.read_at(&mut head[..len], 0)?;
    Ok(if head == crate::carry::MAGIC {
        Some(Format::Carry)
    } else if head.starts_with(&crate::dm_snapshot::MAGIC.to_le_bytes()) {
        Some(Format::DmSnapshot)
    } else if head.starts_with(&crate::qemu::stream::MAGIC.to_be_bytes()) {
        Some(Format::MappedRam)
    } else if crate::disk::sniff(path)?.is_some() {
        Some(Format::Qcow2)
    } else {
        None
    })
}
