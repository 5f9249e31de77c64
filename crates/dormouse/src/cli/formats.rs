//! What can be typed about other people's snapshots: `import`, `detect`, `have`, and `export --as`.

use std::path::PathBuf;

use clap::Args;
use dormouse_formats::format::Format;
use dormouse_formats::import::GuestLayout;
use dormouse_formats::replay::DataCodec;
use dormouse_image::codec::Codec;
use dormouse_store::name::{Name, SnapRef};
use uuid::Uuid;

use super::{ParentArg, parse_parent};
use crate::output::size;

const IMPORT_EXAMPLES: &str = "\
Examples:
  dormouse import wrenn /var/lib/wrenn/snapshots/box vm --verify --builds /var/lib/wrenn/images
  dormouse import e2b builds/5f1c… vm --builds /mnt/builds
  dormouse import firecracker mem.bin vm --state vmstate --layout standard
  dormouse import firecracker diff.bin vm --state vmstate2 --diff --parent vm@1 --vmm-version 1.13.1
  dormouse import cloud-hypervisor snapshot/ vm
  dormouse import qcow2 disk.qcow2 vm --disk root
  dormouse export vm - --as carry | ssh host dormouse import carry - vm

A chain of N generations becomes N snapshots, oldest first; no block is stored twice. Nothing is \
copied to a temporary file. Prints NAME@N for each. FORMAT is wrenn, e2b, firecracker, \
cloud-hypervisor, qemu, mapped-ram, dm-snapshot, qcow2 (also vmdk, vhdx, vpc, vdi, qed), raw, carry \
or auto.";

/// Arguments of `import`.
#[derive(Debug, Args)]
#[command(after_help = IMPORT_EXAMPLES)]
pub(crate) struct ImportArgs {
    /// Whose it is, or 'auto'
    #[arg(value_name = "FORMAT", value_parser = parse_import_format)]
    pub(crate) format: ImportFormat,

    /// The file or folder; of a carry '-' is standard input
    pub(crate) path: PathBuf,

    /// The name that the snapshots get
    pub(crate) name: Name,

    /// What the first one is taken over: SNAP, 'auto' for the newest of NAME, if any, or 'none'
    #[arg(long, value_name = "SNAP|auto|none", default_value = "auto", value_parser = parse_parent)]
    pub(crate) parent: ParentArg,

    /// Compare every byte with the source afterwards, on another way through its files
    #[arg(long)]
    pub(crate) verify: bool,

    /// How new blocks are compressed: raw, lz4, zstd or zstd:LEVEL with a level from -7 to 19
    #[arg(long, default_value_t = Codec::DEFAULT)]
    pub(crate) codec: Codec,

    /// What its files do not say.
    #[command(flatten)]
    pub(crate) look: LookArgs,
}

/// A format, or whichever it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ImportFormat(pub(crate) Option<Format>);

fn parse_import_format(text: &str) -> Result<ImportFormat, String> {
    match text {
        "auto" => Ok(ImportFormat(None)),
        text => text
            .parse()
            .map(|format| ImportFormat(Some(format)))
            .map_err(|error: dormouse_formats::error::Error| error.to_string()),
    }
}

/// What the files of a foreign snapshot do not say.
#[derive(Debug, Args)]
pub(crate) struct LookArgs {
    /// Where other builds, or the files under a disk, are; by default beside it. Of wrenn: where the
    /// disk may lie that rootfs.meta names
    #[arg(long, value_name = "DIR")]
    pub(crate) builds: Option<PathBuf>,

    /// The VMM's state, where PATH is the memory file
    #[arg(long, value_name = "FILE")]
    pub(crate) state: Option<PathBuf>,

    /// The disk under a copy-on-write store
    #[arg(long, value_name = "FILE")]
    pub(crate) origin: Option<PathBuf>,

    /// The memory file or raw disk has only what changed: holes mean 'as in the parent'
    #[arg(long)]
    pub(crate) diff: bool,

    /// The length of the guest's first memory region, below 4 GiB
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) low_memory: Option<u64>,

    /// Where memory lies in a Firecracker guest that may have memory that is plugged in: 'standard' if
    /// it has none, or its regions in the order of the file
    #[arg(long, value_name = "standard|ADDRESS:SIZE,…", value_parser = parse_layout)]
    pub(crate) layout: Option<GuestLayout>,

    /// The VMM's release, such as 1.14.2
    #[arg(long, value_name = "VERSION")]
    pub(crate) vmm_version: Option<String>,

    /// What a lone disk is called [default: root]
    #[arg(long, value_name = "ID")]
    pub(crate) disk: Option<Name>,
}

/// Arguments of `detect`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  dormouse detect snapshot/\n  dormouse detect disk.qcow2 --json"
)]
pub(crate) struct DetectArgs {
    /// The file or folder
    pub(crate) path: PathBuf,

    /// What its files do not say.
    #[command(flatten)]
    pub(crate) look: LookArgs,
}

/// How `export` writes another format.
#[derive(Debug, Args)]
pub(crate) struct ExportAsArgs {
    /// Write another system's format
    #[arg(help = "Write another system's format: FORMAT[,version=N][,compression=zstd|lz4|none]", long = "as", value_name = "FORMAT[,…]", value_parser = parse_as)]
    pub(crate) format: Option<AsFormat>,

    /// With --as: begin with this ancestor; of Firecracker, write a diff against it
    #[arg(long, value_name = "SNAP", requires = "format")]
    pub(crate) base: Option<SnapRef>,

    /// With --as: the newest build's id [default: the snapshot's UUID]
    #[arg(long, value_name = "UUID", requires = "format")]
    pub(crate) build_id: Option<Uuid>,

    /// With --as: which disk, where the format has one
    #[arg(long, value_name = "ID", requires = "format")]
    pub(crate) disk: Option<Name>,

    /// With --as carry: leave out what the receiver's 'dormouse have' printed into this file
    #[arg(long, value_name = "FILE", requires = "format")]
    pub(crate) has: Option<PathBuf>,

    /// With --as cloud-hypervisor: a path or name in config.json that becomes another; may be repeated
    #[arg(long, value_name = "OLD=NEW", requires = "format", value_parser = parse_rewrite)]
    pub(crate) rewrite: Vec<(String, String)>,
}

/// A format to write, with what stands behind it.
#[derive(Clone, Debug)]
pub(crate) struct AsFormat {
    pub(crate) format: Format,
    pub(crate) version: Option<String>,
    pub(crate) compression: Option<DataCodec>,
}

fn parse_as(text: &str) -> Result<AsFormat, String> {
    let mut parts = text.split(',');
    let word = parts.next().unwrap_or_default();
    let format: Format =
        word.parse().map_err(|error: dormouse_formats::error::Error| error.to_string())?;
    if format == Format::Qcow2 && word != format.word() {
        return Err(format!("{word} can be imported, not exported; qcow2 can be exported"));
    }
    let mut parsed = AsFormat { format, version: None, compression: None };
    for part in parts {
        match part.split_once('=') {
            Some(("version", version)) => {
                parsed.version = Some(version.trim_start_matches(['v', 'V']).to_owned());
            }
            Some(("compression", "none")) => parsed.compression = Some(DataCodec::Plain),
            Some(("compression", "zstd")) => parsed.compression = Some(DataCodec::Zstd),
            Some(("compression", "lz4")) => parsed.compression = Some(DataCodec::Lz4),
            _ => {
                return Err(format!(
                    "{part:?} is not understood; expected version=N or compression=zstd, lz4 or none"
                ));
            }
        }
    }
    if parsed.compression.is_some() && format != Format::E2b {
        return Err(format!("{format} has no choice of compression"));
    }
    Ok(parsed)
}

fn parse_layout(text: &str) -> Result<GuestLayout, String> {
    if text == "standard" {
        return Ok(GuestLayout::Standard);
    }
    let region = |part: &str| {
        let (address, length) = part
            .split_once(':')
            .ok_or_else(|| format!("{part:?} is not understood; expected ADDRESS:SIZE"))?;
        let address = match address.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).map_err(|error| error.to_string()),
            None => size::parse(address),
        };
        Ok((
            address.map_err(|error| format!("address of {part:?}: {error}"))?,
            size::parse(length)?,
        ))
    };
    text.split(',').map(region).collect::<Result<_, String>>().map(GuestLayout::Regions)
}

fn parse_rewrite(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((old, new)) if !old.is_empty() => Ok((old.to_owned(), new.to_owned())),
        _ => Err("expected OLD=NEW".to_owned()),
    }
}
