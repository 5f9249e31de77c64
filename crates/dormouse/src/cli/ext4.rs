//! What can be typed about ext4 images: `ext4`, `work-disk` and `clone`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use dormouse_ext4::input::oci::manifest::Platform;
use dormouse_ext4::tree::owner::{IdRange, Owner};
use dormouse_store::name::Name;

use crate::output::size;

const BUILD_EXAMPLES: &str = "\
Examples:
  dormouse ext4 build rootfs/ -o root.ext4 --size 4GiB
  docker export box | dormouse ext4 build - -o root.ext4 --inject agent:/usr/bin/agent
  dormouse ext4 build oci:image:v1 --commit base --size 8GiB
  dormouse ext4 build docker://debian:stable-slim -o debian.ext4 --slack 1GiB

A SOURCE is a folder, a tar (plain, gzip or zstd; '-' is standard input), oci:DIR[:TAG], \
oci-archive:FILE[:TAG] or docker://[HOST/]NAME[:TAG][@DIGEST]. The same source and options give the same bytes; times later than \
SOURCE_DATE_EPOCH become it.";

/// What can be done with ext4 images.
#[derive(Debug, Subcommand)]
pub(crate) enum Ext4Command {
    /// Make an image of a folder, a tar or an OCI image
    Build(Box<BuildArgs>),

    /// List a folder of an image
    #[command(
        after_help = "Examples:\n  dormouse ext4 ls root.ext4 /etc\n  dormouse ext4 ls vm:root /"
    )]
    Ls(Ext4PathArgs),

    /// Print a file of an image
    #[command(after_help = "Example:\n  dormouse ext4 cat vm@3:root /var/log/syslog")]
    Cat(Ext4PathArgs),

    /// Put files and folders into an image, with one run of debugfs
    #[command(
        after_help = "Example:\n  dormouse ext4 put root.ext4 agent:/usr/bin/agent --mode 755"
    )]
    Put(PutArgs),

    /// Remove files and folders from an image, with one run of debugfs
    #[command(after_help = "Example:\n  dormouse ext4 rm root.ext4 /etc/machine-id")]
    Rm(Ext4RmArgs),

    /// Tell what of an image its file system does not use
    #[command(after_help = "Example:\n  dormouse ext4 free vm:root")]
    Free(FreeArgs),
}

/// Arguments of `ext4 build`.
#[derive(Debug, Args)]
#[command(after_help = BUILD_EXAMPLES)]
#[command(group(ArgGroup::new("target").required(true).args(["output", "commit"])))]
pub(crate) struct BuildArgs {
    /// A folder, a tar, or an OCI image
    pub(crate) source: String,

    /// The image, which must not be there
    #[arg(short, long, value_name = "IMAGE")]
    pub(crate) output: Option<PathBuf>,

    /// Commit it as the next snapshot of NAME, as its disk 'root'
    #[arg(long, value_name = "NAME")]
    pub(crate) commit: Option<Name>,

    /// The image's size
    #[arg(long, value_name = "SIZE", value_parser = size::parse, conflicts_with = "slack")]
    pub(crate) size: Option<u64>,

    /// As small as can be, with so much free [default: 64MiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) slack: Option<u64>,

    /// Whose everything is, instead of who owns it
    #[arg(long, value_name = "UID:GID", conflicts_with_all = ["uid_map", "gid_map"])]
    pub(crate) owner: Option<Owner>,

    /// Users outside and in the image
    #[arg(long, value_name = "FROM:TO:COUNT")]
    pub(crate) uid_map: Vec<IdRange>,

    /// Groups outside and in the image
    #[arg(long, value_name = "FROM:TO:COUNT")]
    pub(crate) gid_map: Vec<IdRange>,

    /// Owners, modes and times by path, in mtree form
    #[arg(long, value_name = "FILE")]
    pub(crate) mtree: Option<PathBuf>,

    /// Put a file or folder of the host into the image, as root's
    #[arg(long, value_name = "SRC:DST")]
    pub(crate) inject: Vec<String>,

    /// A list of SRC:DST, one a line
    #[arg(long, value_name = "FILE")]
    pub(crate) inject_from: Option<PathBuf>,

    /// A list of paths in the image to leave out, one a line
    #[arg(long, value_name = "FILE")]
    pub(crate) exclude_from: Option<PathBuf>,

    /// The file system's label, at most 16 bytes
    #[arg(long, default_value = "")]
    pub(crate) label: String,

    /// Its UUID; derived from the content if not given
    #[arg(long)]
    pub(crate) uuid: Option<uuid::Uuid>,

    /// The journal's size, or 'none' [default: by the image's size]
    #[arg(long, value_name = "SIZE|none")]
    pub(crate) journal: Option<String>,

    /// Blocks for root alone
    #[arg(long, value_name = "PERCENT", default_value_t = 0,
          value_parser = clap::value_parser!(u8).range(0..=50))]
    pub(crate) reserved: u8,

    /// How many files it can hold at least [default: one for each 16 KiB]
    #[arg(long, value_name = "N")]
    pub(crate) inodes: Option<u32>,

    /// The platform to choose of an OCI image [default: this host's]
    #[arg(long, value_name = "OS/ARCH")]
    pub(crate) platform: Option<Platform>,

    /// Credentials for a registry [default: what `skopeo login` or `docker login` wrote]
    #[arg(long, value_name = "FILE")]
    pub(crate) authfile: Option<PathBuf>,

    /// Speak to a registry without TLS
    #[arg(long)]
    pub(crate) plain_http: bool,

    /// Refuse streams that unpack to more
    #[arg(long, value_name = "SIZE", default_value = "1TiB", value_parser = size::parse)]
    pub(crate) limit_bytes: u64,

    /// Refuse sources of more files
    #[arg(long, value_name = "N", default_value_t = 16 << 20)]
    pub(crate) limit_entries: u64,
}

/// Arguments of `ext4 ls` and `ext4 cat`.
#[derive(Debug, Args)]
pub(crate) struct Ext4PathArgs {
    /// A file or disk, or SNAP:DISK
    #[arg(value_name = "IMAGE|SNAP:DISK")]
    pub(crate) image: String,

    /// A path in it
    #[arg(default_value = "/")]
    pub(crate) path: OsString,
}

/// Arguments of `ext4 put`.
#[derive(Debug, Args)]
pub(crate) struct PutArgs {
    /// The image, which nobody may use meanwhile
    pub(crate) image: PathBuf,

    /// What to put where; what is there is replaced
    #[arg(required = true, value_name = "SRC:DST")]
    pub(crate) files: Vec<String>,

    /// The files' permissions, in octal [default: as outside]
    #[arg(long, value_parser = parse_mode)]
    pub(crate) mode: Option<u16>,

    /// Whose they are
    #[arg(long, value_name = "UID:GID", default_value = "0:0")]
    pub(crate) owner: Owner,
}

/// Arguments of `ext4 rm`.
#[derive(Debug, Args)]
pub(crate) struct Ext4RmArgs {
    /// The image, which nobody may use meanwhile
    pub(crate) image: PathBuf,

    /// What to remove; folders with all that is in them
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<OsString>,
}

/// Arguments of `ext4 free`.
#[derive(Debug, Args)]
pub(crate) struct FreeArgs {
    /// A file or disk, or SNAP:DISK
    #[arg(value_name = "IMAGE|SNAP:DISK")]
    pub(crate) image: String,

    /// List the ranges, too
    #[arg(long)]
    pub(crate) ranges: bool,
}

const SEED_EXAMPLES: &str = "\
Examples:
  dormouse work-disk seed root.ext4
  dormouse work-disk seed vm:root --path /home/agent -o agent.seed.ext4";

/// What can be done about work disks.
#[derive(Debug, Subcommand)]
pub(crate) enum WorkDiskCommand {
    /// Make a seed: a small image with a home folder of a root image
    Seed(SeedArgs),

    /// Make a work disk of a seed
    #[command(
        after_help = "Example:\n  dormouse work-disk make root.work-seed.ext4 -o work.ext4 --size 64GiB"
    )]
    Make(MakeArgs),
}

/// Arguments of `work-disk seed`.
#[derive(Debug, Args)]
#[command(after_help = SEED_EXAMPLES)]
pub(crate) struct SeedArgs {
    /// The root image
    #[arg(value_name = "ROOT|SNAP:DISK")]
    pub(crate) root: String,

    /// The folder in it; the seed is empty where it is missing
    #[arg(long, default_value = "/root")]
    pub(crate) path: String,

    /// The seed [default: X.work-seed.ext4 for X.ext4, else X.work-seed]
    #[arg(short, long, value_name = "SEED")]
    pub(crate) output: Option<PathBuf>,

    /// How large the seed is
    #[arg(long, value_enum, default_value_t = Sizing::Need)]
    pub(crate) sizing: Sizing,
}

/// How large a seed is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sizing {
    /// As small as can be
    Need,

    /// Twice the used bytes and 256 MiB, at least 512 MiB, in steps of 64 MiB
    Roomy,
}

/// Arguments of `work-disk make`.
#[derive(Debug, Args)]
pub(crate) struct MakeArgs {
    /// The seed, or any ext4 image
    #[arg(value_name = "SEED|SNAP:DISK")]
    pub(crate) seed: String,

    /// The work disk, which must not be there
    #[arg(short, long, value_name = "DISK")]
    pub(crate) output: PathBuf,

    /// Its size
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) size: u64,

    /// Whose everything is, instead of who owns it
    #[arg(long, value_name = "UID:GID")]
    pub(crate) owner: Option<Owner>,
}

/// Arguments of `clone`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  dormouse clone root.ext4 vm1.ext4")]
pub(crate) struct CloneArgs {
    /// A file or disk
    pub(crate) source: PathBuf,

    /// The copy, which must not be there
    pub(crate) target: PathBuf,
}

fn parse_mode(text: &str) -> Result<u16, String> {
    let mode = u16::from_str_radix(text, 8).ok().filter(|&mode| mode <= 0o7777);
    mode.ok_or_else(|| format!("{text:?} is not a mode, such as 644 or 4755"))
}
