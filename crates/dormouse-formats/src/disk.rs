//! Disks of other formats, through qemu-img and qemu-nbd: qcow2, vmdk, vhdx, vpc, vdi and qed.
//!
//! `qemu-img info` tells format, length and backing file of each layer, without opening the next;
//! `qemu-img map` which parts a layer has, as data or as zeros; `qemu-nbd` gives the bytes. Each
//! layer of a backing chain becomes a snapshot over that of the one below, and what a layer does not
//! have is not read.
//!
//! A disk image can name any file of the host as its backing or data file. So a chain is followed
//! only within the folder of the image (or `--builds DIR`), formats are told by magic numbers, never
//! guessed by QEMU, and every layer is opened with a description that says all of it.

mod nbd;
mod qcow2;
mod tool;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_store::name::{ImageName, Name};
use dormouse_store::source::{LayerRun, LayerSource};

use crate::data::{RandomRead, StableFile};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::Format;
use crate::import::{Body, Found, Generation, LookOptions, NewContent};
use crate::verify::{Compare, Replay};

pub use nbd::Client;
pub use qcow2::export;
pub use tool::Info;
use tool::Server;

/// Layers of one backing chain.
const CHAIN_MAX: usize = 256;

/// Bytes compared at once.
const PIECE_BYTES: usize = 1 << 20;

/// The formats, by the words of QEMU and their first bytes.
const MAGICS: [(&str, u64, &[u8]); 6] = [
    ("qcow2", 0, b"QFI\xfb"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vhdx", 0, b"vhdxfile"),
    ("qed", 0, b"QED\0"),
    ("vdi", 64, &[0x7f, 0x10, 0xda, 0xbe]),
];

/// What the footer at the end of a vpc disk begins with; a dynamic one has a copy at its beginning.
const VPC: &[u8] = b"conectix";

/// The format of a file by its first bytes, in QEMU's words; none if it is of none that is known.
pub fn sniff(path: &Path) -> Result<Option<&'static str>> {
    let file = StableFile::open(path)?;
    let has = |at: u64, magic: &[u8]| -> Result<bool> {
        if file.size_bytes() < at + magic.len() as u64 {
            return Ok(false);
        }
        let mut bytes = vec![0; magic.len()];
        file.read_at(&mut bytes, at)?;
        Ok(bytes == magic)
    };
    for (format, at, magic) in MAGICS {
        if has(at, magic)? {
            return Ok(Some(format));
        }
    }
    let footer = file.size_bytes().saturating_sub(512);
    Ok(if has(0, VPC)? || has(footer, VPC)? { Some("vpc") } else { None })
}

/// One layer of a chain.
#[derive(Clone, Debug)]
struct ChainLayer {
    path: PathBuf,
    format: &'static str,
    size_bytes: u64,
    internal_snapshots: Vec<String>,
}

/// Looks at a disk and the files that it lies over.
pub fn look(path: &Path, options: &LookOptions) -> Result<Found> {
    let chain = chain(path, options)?;
    let name = options.disk.clone().map_or_else(|| Name::new("root"), Ok)?;
    let mut generations = Vec::new();
    for depth in 0..chain.len() {
        // The chain is newest first; generations are oldest first.
        let layers = &chain[chain.len() - 1 - depth..];
        let layer = &layers[0];
        let node = node(layers);
        let map = tool::map(&node)
            .context(|| format!("cannot read the map of {}", layer.path.display()))?;
        let disk = QemuDisk::new(layer, node, &map, depth > 0)?;
        let disk = Arc::new(disk);
        let mut generation = Generation::new(layer.path.display().to_string());
        let replay = Box::new(DiskReplay { disk: Arc::clone(&disk) });
        let body = if depth > 0 { Body::Changes(disk) } else { Body::Whole(disk) };
        generation.images.push(NewContent {
            image: ImageName::Disk(name.clone()),
            body,
            replay: Some(replay),
        });
        generations.push(generation);
    }
    let mut notes = Vec::new();
    if chain.len() > 1 {
        notes.push(format!("{} layers of a backing chain, a snapshot each", chain.len()));
    }
    for layer in chain.iter().rev().filter(|layer| !layer.internal_snapshots.is_empty()) {
        notes.push(format!(
            "{} has {} internal snapshots ({:.200}), which are skipped: what is taken is the disk as \
             it is now",
            layer.path.display(),
            layer.internal_snapshots.len(),
            layer.internal_snapshots.join(", ")
        ));
    }
    Ok(Found {
        format: Format::Qcow2,
        version: chain[0].format.to_owned(),
        generations,
        notes,
        is_whole: false,
        base: None,
    })
}

/// The layers, newest first.
fn chain(path: &Path, options: &LookOptions) -> Result<Vec<ChainLayer>> {
    let first = path.canonicalize().context(|| format!("cannot find {}", path.display()))?;
    let home = match &options.builds {
        Some(builds) => {
            builds.canonicalize().context(|| format!("cannot find {}", builds.display()))?
        }
        None => first.parent().unwrap_or_else(|| Path::new("/")).to_owned(),
    };
    let mut chain: Vec<ChainLayer> = Vec::new();
    let mut next = Some((first, None));
    while let Some((path, format)) = next.take() {
        if chain.iter().any(|layer| layer.path == path) || chain.len() == CHAIN_MAX {
            return Err(Error::corrupt(format!(
                "the backing chain of {} comes back to {} or has more than {CHAIN_MAX} layers",
                chain[0].path.display(),
                path.display()
            )));
        }
        let sniffed = sniff(&path)?;
        let format = match (format, sniffed) {
            // Its parent says that the bytes themselves are the disk, whatever they look like.
            (Some("raw"), _) => "raw",
            (_, Some(format)) => format,
            (_, None) if chain.is_empty() => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "{} is no disk of a format that is known; a disk of plain bytes is imported \
                         as raw",
                        path.display()
                    ),
                ));
            }
            (_, None) => "raw",
        };
        let info = tool::info(&path, format)
            .context(|| format!("qemu-img cannot read {}", path.display()))?;
        check_inside(&info, &path)?;
        chain.push(ChainLayer {
            path: path.clone(),
            format,
            size_bytes: info.size_bytes,
            internal_snapshots: info.internal_snapshots,
        });
        if let Some(backing) = &info.backing {
            next = Some((
                inside(&path, backing, &home)?,
                info.backing_format.as_deref().filter(|format| *format == "raw").map(|_| "raw"),
            ));
        }
    }
    Ok(chain)
}

/// Refuses what would have QEMU open files that the image names.
fn check_inside(info: &Info, path: &Path) -> Result<()> {
    match &info.other_file {
        Some(other) => Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{} keeps its data in {other}, and what an image names is not opened; make it one \
                 file with qemu-img convert",
                path.display()
            ),
        )),
        None if info.is_encrypted => Err(Error::new(
            ErrorKind::Unsupported,
            format!("{} is encrypted; decrypt it with qemu-img convert", path.display()),
        )),
        None => Ok(()),
    }
}

/// The backing file, if it lies in the folder where it may.
fn inside(image: &Path, backing: &str, home: &Path) -> Result<PathBuf> {
    let folder = image.parent().unwrap_or_else(|| Path::new("/"));
    let path = folder
        .join(backing)
        .canonicalize()
        .context(|| format!("{} lies over {backing}, which cannot be found", image.display()))?;
    if !path.starts_with(home) {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{} lies over {}, which is outside of {}; an image may name any file, so say where \
                 its chain is with --builds DIR",
                image.display(),
                path.display(),
                home.display()
            ),
        ));
    }
    Ok(path)
}

/// QEMU's description of a layer and all below it.
fn node(layers: &[ChainLayer]) -> serde_json::Value {
    let mut node = serde_json::Value::Null;
    for layer in layers.iter().rev() {
        let mut this = serde_json::json!({
            "driver": layer.format,
            "file": {"driver": "file", "filename": layer.path.display().to_string()},
        });
        // Without this QEMU would follow what the image says.
        if matches!(layer.format, "qcow2" | "qed" | "vmdk") {
            this["backing"] = node;
        }
        node = this;
    }
    node
}

/// A layer of a chain, read through a server.
#[derive(Debug)]
struct QemuDisk {
    file: StableFile,
    size_bytes: u64,
    node: serde_json::Value,
    runs: Vec<(std::ops::Range<u64>, LayerRun)>,
    server: Server,
}

impl QemuDisk {
    fn new(
        layer: &ChainLayer,
        node: serde_json::Value,
        map: &[u8],
        has_lower: bool,
    ) -> Result<QemuDisk> {
        let runs = runs_of_map(map, layer.size_bytes, has_lower)
            .context(|| format!("the map of {} is of no use", layer.path.display()))?;
        let file = StableFile::open(&layer.path)?;
        file.release();
        let server = Server::new(&node);
        Ok(QemuDisk { file, size_bytes: layer.size_bytes, server, node, runs })
    }
}

/// The runs of a layer, in whole blocks, from what `qemu-img map` printed of it and all below it.
pub fn runs_of_map(
    json: &[u8],
    size_bytes: u64,
    has_lower: bool,
) -> Result<Vec<(std::ops::Range<u64>, LayerRun)>> {
    const BLOCK: u64 = dormouse_image::block::BLOCK_BYTES_U64;
    let mut runs: Vec<(std::ops::Range<u64>, LayerRun)> = Vec::new();
    let mut end = 0;
    for entry in tool::parse_map(json)? {
        let next = entry.start.checked_add(entry.length);
        let next =
            next.filter(|&next| entry.start == end && entry.length > 0 && next <= size_bytes);
        let Some(next) = next else {
            return Err(Error::corrupt(format!(
                "{} bytes at {}; expected some from {end} to at most {size_bytes}",
                entry.length, entry.start
            )));
        };
        end = next;
        if has_lower && entry.depth > 0 {
            continue;
        }
        let kind = if entry.data && !entry.zero { LayerRun::Data } else { LayerRun::Zero };
        push_run(&mut runs, entry.start..next, kind, size_bytes, BLOCK);
    }
    if end != size_bytes {
        return Err(Error::corrupt(format!("it ends at byte {end}; expected {size_bytes}")));
    }
    Ok(runs)
}

/// Adds a run in whole blocks: a block that is data in part is data. Sectors of 512 bytes are the
/// unit of some formats.
fn push_run(
    runs: &mut Vec<(std::ops::Range<u64>, LayerRun)>,
    range: std::ops::Range<u64>,
    kind: LayerRun,
    size_bytes: u64,
    block: u64,
) {
    let (mut start, mut stop) = (range.start, range.end);
    if kind == LayerRun::Data {
        start = start / block * block;
        stop = stop.next_multiple_of(block).min(size_bytes);
    } else {
        start = start.next_multiple_of(block);
        if stop != size_bytes {
            stop = stop / block * block;
        }
    }
    if let Some((last, _)) = runs.last() {
        start = start.max(last.end);
    }
    // Zeros that end within a block leave it to the data that begins there, or to nobody: then it is
    // read as data.
    if kind == LayerRun::Zero && range.start < start.min(stop) && !range.start.is_multiple_of(block)
    {
        let edge = range.start / block * block;
        let covered = runs.last().is_some_and(|(last, _)| last.end > edge);
        if !covered {
            runs.push((edge..start.min(size_bytes), LayerRun::Data));
        }
    }
    if start < stop {
        match runs.last_mut() {
            Some((last, old)) if *old == kind && last.end == start => last.end = stop,
            _ => runs.push((start..stop, kind)),
        }
    }
    if kind == LayerRun::Zero && stop < range.end && range.end != size_bytes {
        let from = stop.max(runs.last().map_or(0, |(last, _)| last.end));
        let to = range.end.next_multiple_of(block).min(size_bytes);
        if from < to {
            runs.push((from..to, LayerRun::Data));
        }
    }
}

impl LayerSource for QemuDisk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn label(&self) -> String {
        self.file.label().to_owned()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        Ok(self.server.read_at(buf, offset)?)
    }

    fn check_unchanged(&self) -> std::io::Result<()> {
        Ok(self.file.check_unchanged()?)
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(std::ops::Range<u64>, LayerRun) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        self.runs.iter().try_for_each(|(range, kind)| visit(range.clone(), *kind))
    }
}

/// The whole disk from its first byte to its last through a server of its own, without its map.
#[derive(Debug)]
struct DiskReplay {
    disk: Arc<QemuDisk>,
}

impl Replay for DiskReplay {
    fn replay(&self, compare: &mut Compare<'_>) -> Result<()> {
        compare.size(self.disk.size_bytes)?;
        let server = Server::new(&self.disk.node);
        let mut buf = vec![0; PIECE_BYTES];
        let mut at = 0;
        while at < self.disk.size_bytes {
            let left = self.disk.size_bytes - at;
            let len = usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            server.read_at(&mut buf[..len], at)?;
            compare.bytes(at, &buf[..len])?;
            at += len as u64;
        }
        Ok(())
    }
}
