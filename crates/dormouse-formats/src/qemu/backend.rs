//! A memory-backend file and the migration stream that left it out.

use std::fs;
use std::path::{Path, PathBuf};

use dormouse_store::manifest::{MemoryRegion, Vmm};
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::reader::{ExportTarget, NewFolder};

use super::stream::{MAGIC, Stream};
use crate::data::{RandomRead, StableFile};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::export::{ExportReport, Line};
use crate::format::Format;
use crate::import::{Body, Found, Generation, LookOptions, NewContent, is_file};
use crate::page_map::PAGE_BYTES;

const GIB: u64 = 1 << 30;
const STATE: &str = "stream";

/// Files of a folder that are looked at.
const FILES_MAX: usize = 64;

/// Looks at a memory file with its stream, or at a folder that has just these two.
pub fn look(path: &Path, options: &LookOptions) -> Result<Found> {
    let (memory, state) = match &options.state {
        Some(state) => (path.to_owned(), state.clone()),
        None => find_pair(path)?,
    };
    let stream = Stream::read(&StableFile::open(&state)?)
        .context(|| format!("{} cannot be read", state.display()))?;
    if !stream.has("x-ignore-shared") {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{} was written without x-ignore-shared, so the RAM is in it and {} is of no use",
                state.display(),
                memory.display()
            ),
        ));
    }
    let size = StableFile::open(&memory)?.size_bytes();
    let same: Vec<_> = stream.blocks.iter().filter(|block| block.bytes == size).collect();
    let [block] = same[..] else {
        let lengths: Vec<_> =
            stream.blocks.iter().map(|block| format!("{} {}", block.name, block.bytes)).collect();
        return Err(Error::corrupt(format!(
            "{} has {size} bytes, and {} RAM blocks of its stream do; expected one ({})",
            memory.display(),
            same.len(),
            lengths.join(", ")
        )));
    };
    let mut generation = Generation::new(memory.display().to_string());
    generation.memory_layout = rows(&block.name, &stream.machine, size, options.low_memory_bytes);
    generation.vmm = Vmm {
        kind: Some("qemu".to_owned()),
        version: options.vmm_version.clone(),
        ..Vmm::default()
    };
    let machine: String = stream.machine.chars().take(100).collect();
    generation.labels.insert("qemu.machine".to_owned(), machine.clone());
    generation.images = vec![
        NewContent { image: ImageName::Memory, body: Body::File(memory), replay: None },
        NewContent {
            image: ImageName::State(Name::new(STATE)?),
            body: Body::File(state),
            replay: None,
        },
    ];
    Ok(Found {
        format: Format::Qemu,
        version: format!("stream 3, {machine}"),
        generations: vec![generation],
        notes: Vec::new(),
        is_whole: false,
        base: None,
    })
}

/// Whether a file begins as a migration stream does.
pub(crate) fn has_magic(path: &Path) -> bool {
    let read = || -> Result<bool> {
        let mut head = [0; 4];
        StableFile::open(path)?.read_at(&mut head, 0)?;
        Ok(u32::from_be_bytes(head) == MAGIC)
    };
    read().unwrap_or(false)
}

fn find_pair(path: &Path) -> Result<(PathBuf, PathBuf)> {
    if !path.is_dir() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{} needs its migration stream: give --state FILE", path.display()),
        ));
    }
    let what = || format!("cannot look into {}", path.display());
    let (mut streams, mut others) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(path).context(what)?.take(FILES_MAX + 1) {
        let file = entry.context(what)?.path();
        if is_file(&file) {
            if has_magic(&file) { streams.push(file) } else { others.push(file) }
        }
    }
    match (&streams[..], &others[..]) {
        ([stream], [memory]) => Ok((memory.clone(), stream.clone())),
        _ => Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "{} has {} migration streams and {} other files; expected one of each, or name the \
                 memory file and --state FILE",
                path.display(),
                streams.len(),
                others.len()
            ),
        )),
    }
}

/// Where the file's bytes lie in the guest: below 4 GiB as much as the machine puts there.
fn rows(block: &str, machine: &str, size: u64, low: Option<u64>) -> Vec<MemoryRegion> {
    let low = low.or_else(|| {
        if machine.contains("q35") {
            Some(if size >= 2 * GIB + 768 * (1 << 20) { 2 * GIB } else { size })
        } else if machine.starts_with("pc-") || machine.starts_with("microvm") {
            Some(if size >= 3 * GIB + 512 * (1 << 20) { 3 * GIB } else { size })
        } else {
            None
        }
    });
    let row = |image_offset, guest_address, length| MemoryRegion {
        block: block.to_owned(),
        image_offset,
        guest_address,
        length,
        page_size: PAGE_BYTES,
        plugged: true,
    };
    match low {
        Some(low) if low < size => {
            vec![row(0, Some(0), low), row(low, Some(4 * GIB), size - low)]
        }
        Some(_) => vec![row(0, Some(0), size)],
        None => vec![row(0, None, size)],
    }
}

/// Writes a folder with `memory` and `stream`.
pub fn export(line: &Line, dir: &Path, job: Job<'_>) -> Result<ExportReport> {
    let snapshot = line.newest();
    let new = NewFolder::create(dir)?;
    let mut report = ExportReport::new(Format::Qemu, "stream 3".to_owned(), dir);
    let state = ImageName::State(Name::new(STATE)?);
    for (image, name) in [(ImageName::Memory, "memory"), (state, STATE)] {
        snapshot.image(&image)?.export(&new.path().join(name), ExportTarget::New, job)?;
        report.wrote(name, new.path())?;
    }
    report.skipped(snapshot.manifest(), &["memory", "state/stream"]);
    new.publish()?;
    Ok(report)
}
