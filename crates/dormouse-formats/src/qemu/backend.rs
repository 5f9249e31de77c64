//! A memory-backend file and the migration stream that left it out.

use std::path::Path;

use dormouse_store::manifest::{MemoryRegion, Vmm};
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::reader::{ExportTarget, NewFolder};

use super::stream::{MAGIC, Stream};
use crate::data::{RandomRead, StableFile};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::export::{ExportReport, Line};
use crate::foreign_folder::ForeignFolder;
use crate::format::Format;
use crate::import::{Found, Generation, LookOptions, NewContent};
use crate::page_map::PAGE_BYTES;

const GIB: u64 = 1 << 30;
const STATE: &str = "stream";

/// Files of a folder that are looked at.
const FILES_MAX: usize = 64;

/// Looks at a memory file with its stream, or at a folder that has just these two.
pub fn look(path: &Path, options: &LookOptions) -> Result<Found> {
    let (memory, state) = match &options.state {
        Some(state) => (StableFile::open(path)?, StableFile::open(state)?),
        None => find_pair(path)?,
    };
    let stream = Stream::read(&state).context(|| format!("{} cannot be read", state.label()))?;
    if !stream.has("x-ignore-shared") {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{} was written without x-ignore-shared, so the RAM is in it and {} is of no use",
                state.label(),
                memory.label()
            ),
        ));
    }
    let size = memory.size_bytes();
    let same: Vec<_> = stream.blocks.iter().filter(|block| block.bytes == size).collect();
    let [block] = same[..] else {
        let lengths: Vec<_> =
            stream.blocks.iter().map(|block| format!("{} {}", block.name, block.bytes)).collect();
        return Err(Error::corrupt(format!(
            "{} has {size} bytes, and {} RAM blocks of its stream do; expected one ({})",
            memory.label(),
            same.len(),
            lengths.join(", ")
        )));
    };
    let mut generation = Generation::new(memory.label());
    generation.memory_layout = rows(&block.name, &stream.machine, size, options.low_memory_bytes);
    generation.vmm = Vmm {
        kind: Some("qemu".to_owned()),
        version: options.vmm_version.clone(),
        ..Vmm::default()
    };
    let machine: String = stream.machine.chars().take(100).collect();
    generation.labels.insert("qemu.machine".to_owned(), machine.clone());
    generation.images = vec![
        NewContent::opened(ImageName::Memory, memory),
        NewContent::opened(ImageName::State(Name::new(STATE)?), state),
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

fn is_stream(file: &StableFile) -> Result<bool> {
    let mut head = [0; 4];
    if file.size_bytes() < head.len() as u64 {
        return Ok(false);
    }
    file.read_at(&mut head, 0)?;
    Ok(u32::from_be_bytes(head) == MAGIC)
}

fn find_pair(path: &Path) -> Result<(StableFile, StableFile)> {
    if !path.is_dir() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{} needs its migration stream: give --state FILE", path.display()),
        ));
    }
    let folder = ForeignFolder::open(path)?;
    let (mut streams, mut others) = (Vec::new(), Vec::new());
    for name in folder.names(FILES_MAX + 1)? {
        if let Some(file) = folder.file(&name)? {
            if is_stream(&file)? { streams.push(file) } else { others.push(file) }
        }
    }
    let counts = (streams.len(), others.len());
    match (streams.pop(), others.pop()) {
        (Some(stream), Some(memory)) if counts == (1, 1) => Ok((memory, stream)),
        _ => Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "{} has {} migration streams and {} other files; expected one of each, or name the \
                 memory file and --state FILE",
                path.display(),
                counts.0,
                counts.1
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
