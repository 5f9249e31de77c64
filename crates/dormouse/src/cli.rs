//! What can be typed: the verbs, their options and their help.

pub(crate) mod daemon;
pub(crate) mod ext4;
pub(crate) mod formats;
pub(crate) mod live;
pub(crate) mod vm;

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser, ValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use dormouse_image::codec::Codec;
use dormouse_store::commit::Parent;
use dormouse_store::error::Error;
use dormouse_store::gc::KeepRules;
use dormouse_store::name::{ImageName, ImageRef, Name, SnapRef};

use crate::cli::ext4::{CloneArgs, Ext4Command, WorkDiskCommand};
use crate::cli::formats::{DetectArgs, ExportAsArgs, ImportArgs};
use crate::output::size;

const EXAMPLES: &str = "\
Examples:
  dormouse init
  dormouse commit vm --memory mem.bin --disk root.img --state vmstate
  dormouse ls
  dormouse export vm restored/
  dormouse rm vm@1 && dormouse gc

SNAP is NAME@N, or NAME for the newest.
IMAGE is memory, disk/ID or state/NAME; a bare ID is a disk's.

Exit codes: 0 done, 1 other, 2 usage, 3 not found, 4 exists, 5 conflict, 6 refused, 7 corrupt, \
8 unsupported, 9 key, 10 busy, 11 input or output, 130 stopped by a signal.";

/// The options that every verb has.
const COMMON: &str = "Common options";

/// Snapshot storage for microVMs: sleep small, wake fast, fork freely.
#[derive(Debug, Parser)]
#[command(name = "dormouse", version, after_help = EXAMPLES, max_term_width = 100)]
pub(crate) struct Cli {
    /// The store's folder
    #[arg(
        long,
        global = true,
        help_heading = COMMON,
        env = "DORMOUSE_STORE",
        default_value = "./dormouse-store",
        value_name = "DIR"
    )]
    pub(crate) store: PathBuf,

    /// Print one JSON object, and errors as one on standard error
    #[arg(long, global = true, help_heading = COMMON)]
    pub(crate) json: bool,

    /// Log more to standard error; again for more (or set DORMOUSE_LOG to a filter)
    #[arg(short, long, global = true, help_heading = COMMON, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    /// No progress and no summaries
    #[arg(short, long, global = true, help_heading = COMMON, conflicts_with = "verbose")]
    pub(crate) quiet: bool,

    /// Do what is asked of VMs here, though the store has a daemon
    #[arg(long, global = true, help_heading = COMMON)]
    pub(crate) no_daemon: bool,

    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make an empty store
    #[command(after_help = "Example:\n  dormouse --store /srv/snapshots init")]
    Init,

    /// Capture memory, disks and VMM state as a new snapshot
    Commit(Box<CommitArgs>),

    /// List snapshots
    #[command(after_help = "Examples:\n  dormouse ls\n  dormouse ls vm --json")]
    Ls(LsArgs),

    /// Show a snapshot: images, figures, and the packs that it uses
    #[command(after_help = "Examples:\n  dormouse show vm\n  dormouse show vm@3 --json")]
    Show(SnapArgs),

    /// Draw the lineage of a snapshot as a tree
    #[command(after_help = "Example:\n  dormouse log vm@3")]
    Log(SnapArgs),

    /// Tell what changed between two snapshots, image by image
    #[command(
        after_help = "Examples:\n  dormouse diff vm@1 vm@2\n  dormouse diff vm@1 vm --regions"
    )]
    Diff(DiffArgs),

    /// Tell who uses how much space: the store, a snapshot, or any folder
    Du(DuArgs),

    /// Draw where an image's bytes are: zero, its own, an ancestor's, a disk's
    Map(MapArgs),

    /// Write an image to a file, or a whole snapshot to a folder, also in other systems' formats
    Export(Box<ExportArgs>),

    /// Take in other systems' snapshots and disks
    Import(Box<ImportArgs>),

    /// Say what is at a path: whose snapshot, which version, and what is wrong with it
    Detect(DetectArgs),

    /// Print the UUIDs of what the store has, for the sender of a carry
    #[command(
        after_help = "Example:\n  ssh host dormouse have > has\n  dormouse export vm - --as carry --has has | ssh host dormouse import carry - vm"
    )]
    Have,

    /// Write an image to standard output, zeros included
    #[command(after_help = "Example:\n  dormouse cat vm:state/vmstate | jq .")]
    Cat(CatArgs),

    /// Check the store, and mend what can be mended
    Verify(VerifyArgs),

    /// Remove a snapshot; `gc` then frees the space
    #[command(after_help = "Example:\n  dormouse rm vm@1 && dormouse gc")]
    Rm(RmArgs),

    /// Remove the snapshots of a name that no rule keeps
    Prune(PruneArgs),

    /// Delete what no snapshot needs
    #[command(after_help = "Example:\n  dormouse gc --dry-run")]
    Gc(GcArgs),

    /// Write pack files again that are mostly dead, or many and small
    Compact(CompactArgs),

    /// Give the zero blocks of memory files back to the file system
    Punch(PunchArgs),

    /// Make, commit and remove live disks: writable disks over snapshots
    #[command(subcommand, after_help = live::DISK_EXAMPLES)]
    Disk(live::DiskCommand),

    /// Serve live disks and images to VMs and tools
    #[command(subcommand)]
    Serve(live::ServeCommand),

    /// Keep descriptors for servers that may end; started by 'serve memory' and 'mount --hold'
    #[command(hide = true)]
    Hold {
        /// Where to listen; the folder must be its owner's alone
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,

        /// Where the next server writes why it could not start
        #[arg(long, value_name = "FILE")]
        log: Option<PathBuf>,

        /// What the next server is started with when one ends
        #[arg(last = true, value_name = "ARGUMENT")]
        successor: Vec<OsString>,
    },

    /// Bring VMs to rest that were left in the middle of something; started by the data plane
    #[command(hide = true)]
    Recover,

    /// Look at what waking VMs touch first
    #[command(subcommand)]
    Trace(TraceCommand),

    /// Make, read and patch ext4 images, without root
    #[command(subcommand)]
    Ext4(Ext4Command),

    /// Make disks for work, with the home folder of a root image in them
    #[command(subcommand)]
    WorkDisk(WorkDiskCommand),

    /// Copy an image: share its blocks, else copy them and keep its holes
    Clone(CloneArgs),

    /// Show snapshots and live disks as files, until SIGTERM or unmount
    #[command(after_help = live::MOUNT_EXAMPLES)]
    Mount(live::MountArgs),

    /// Boot a guest as a VM
    #[command(after_help = vm::RUN_EXAMPLES)]
    Run(vm::RunArgs),

    /// Store a VM as one snapshot of memory, disks and state, and end it
    #[command(
        after_help = "Examples:\n  dormouse sleep box\n  dormouse sleep box --as vm --keep-running"
    )]
    Sleep(vm::SleepArgs),

    /// Wake a snapshot as a VM
    #[command(after_help = "Examples:\n  dormouse wake vm\n  dormouse wake vm@3 --as box")]
    Wake(vm::WakeArgs),

    /// Wake a snapshot as many VMs
    #[command(after_help = "Example:\n  dormouse fork vm@3 box-1 box-2 box-3")]
    Fork(vm::ForkArgs),

    /// List VMs
    #[command(after_help = "Example:\n  dormouse ps --json")]
    Ps,

    /// Show a VM
    #[command(after_help = "Example:\n  dormouse inspect box")]
    Inspect(vm::VmArgs),

    /// End a VM at once and remove it, disks included
    #[command(after_help = "Example:\n  dormouse kill box")]
    Kill(vm::VmArgs),

    /// Print what a VM's VMM has said
    #[command(after_help = "Example:\n  dormouse logs box")]
    Logs(vm::VmArgs),

    /// Wake VMs and put them to sleep for others, over HTTP, until SIGTERM
    #[command(after_help = daemon::EXAMPLES)]
    Daemon(daemon::DaemonArgs),

    /// Print completions for a shell
    #[command(
        after_help = "Example:\n  dormouse completions bash > /etc/bash_completion.d/dormouse"
    )]
    Completions(CompletionsArgs),

    /// Write man pages to a folder
    #[command(after_help = "Example:\n  dormouse man /usr/local/share/man/man1")]
    Man(ManArgs),
}

const COMMIT_EXAMPLES: &str = "\
Examples:
  dormouse commit vm --memory mem.bin --disk root.img --state vmstate
  dormouse commit vm --memory mem2.bin --state vmstate2 --label step=build
  dormouse commit vm --parent vm@2 --memory-diff diff.bin --state vmstate3
  dormouse commit fork --parent vm@1 --disk data=data.img
  dormouse commit vm --live box --state vmstate
  dormouse commit vm --parent vm@2 --memory-of 4711 --state vmstate
  dormouse commit vm --live box --capture /mnt/dormouse/capture/box
  zstd -dc mem.zst | dormouse commit vm --memory - --state vmstate

Disks that are not given are inherited from the parent. A diff is a sparse file in which a hole \
means 'as in the parent', as Firecracker writes it; it needs an explicit --parent. In all other \
files a hole means zero. Prints NAME@N.";

/// Arguments of `commit`.
#[derive(Debug, Args)]
#[command(after_help = COMMIT_EXAMPLES)]
pub(crate) struct CommitArgs {
    /// The snapshot's name; it gets the next number
    pub(crate) name: Name,

    /// What the snapshot is taken over: SNAP, 'auto' for the newest of NAME, if any, or 'none'
    #[arg(long, value_name = "SNAP|auto|none", default_value = "auto", value_parser = parse_parent)]
    pub(crate) parent: ParentArg,

    /// All of a live VM: its disks, and its memory if it woke from a snapshot. Pause it meanwhile
    #[arg(long, value_name = "LIVE", conflicts_with_all = ["memory", "memory_diff", "disk", "disk_diff", "drop", "memory_layout", "vmm", "vmm_version", "cpu_model", "host_kernel", "arch", "vcpus", "codec"])]
    pub(crate) live: Option<Name>,

    /// What a VMM wrote to a folder below 'capture' of a mount, which is removed afterwards. Without
    /// --parent its parent is the snapshot's
    #[arg(long, value_name = "DIR", conflicts_with_all = ["memory", "memory_diff", "memory_of"])]
    pub(crate) capture: Option<PathBuf>,

    /// The guest's whole memory; '-' is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "memory_diff")]
    pub(crate) memory: Option<PathBuf>,

    /// What changed in the guest's memory since the parent: holes mean 'unchanged'
    #[arg(long, value_name = "FILE")]
    pub(crate) memory_diff: Option<PathBuf>,

    /// A whole disk; ID is 'root' if not given, '-' is standard input
    #[arg(long, value_name = "[ID=]FILE", value_parser = named_file())]
    pub(crate) disk: Vec<NamedFile>,

    /// The memory of a paused process that maps NAME/N/memory of a mount, the parent's: what its guest
    /// changed is told by its page tables
    #[arg(long, value_name = "PID", conflicts_with_all = ["memory", "memory_diff", "live"])]
    pub(crate) memory_of: Option<u32>,

    /// What changed on a disk since the parent: holes mean 'unchanged'
    #[arg(long, value_name = "[ID=]FILE", value_parser = named_file())]
    pub(crate) disk_diff: Vec<NamedFile>,

    /// A state file of the VMM; NAME is 'vmstate' if not given
    #[arg(long, value_name = "[NAME=]FILE", value_parser = named_file())]
    pub(crate) state: Vec<NamedFile>,

    /// An image of the parent that the snapshot shall not have
    #[arg(long, value_name = "IMAGE")]
    pub(crate) drop: Vec<ImageName>,

    /// A label of your own
    #[arg(long, value_name = "K=V", value_parser = parse_label)]
    pub(crate) label: Vec<(String, String)>,

    /// Where memory lies in the guest: a JSON array of rows with image_offset, length,
    /// guest_address, block, page_size and plugged, as docs/cli.md describes them
    #[arg(long, value_name = "FILE")]
    pub(crate) memory_layout: Option<PathBuf>,

    /// What runs the guest, such as firecracker, cloud-hypervisor or qemu
    #[arg(long, value_name = "KIND")]
    pub(crate) vmm: Option<String>,

    /// The VMM's version
    #[arg(long, value_name = "VERSION")]
    pub(crate) vmm_version: Option<String>,

    /// The host's CPU model
    #[arg(long, value_name = "MODEL")]
    pub(crate) cpu_model: Option<String>,

    /// The host's kernel release
    #[arg(long, value_name = "RELEASE")]
    pub(crate) host_kernel: Option<String>,

    /// The guest's architecture, such as x86_64
    #[arg(long)]
    pub(crate) arch: Option<String>,

    /// The guest's virtual CPUs
    #[arg(long, value_name = "N")]
    pub(crate) vcpus: Option<u32>,

    /// How new blocks are compressed: raw, lz4, zstd or zstd:LEVEL with a level from -7 to 19
    #[arg(long, default_value_t = Codec::DEFAULT)]
    pub(crate) codec: Codec,

    /// Store as zeros what the ext4 file systems of whole disks do not use
    #[arg(long, requires = "disk")]
    pub(crate) drop_free_blocks: bool,

    /// The guest's file systems were frozen: its memory owns no block that its disks call free
    #[arg(long, requires = "drop_free_blocks")]
    pub(crate) fs_frozen: bool,
}

/// A parent that clap can keep: its values must be `Clone`, `Send` and `Sync`.
#[derive(Clone, Debug)]
pub(crate) struct ParentArg(pub(crate) Parent);

/// `[ID=]FILE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedFile {
    /// What stands before the first `=`.
    pub(crate) id: Option<Name>,

    /// The file.
    pub(crate) file: PathBuf,
}

/// Arguments of `ls`.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Only snapshots of this name
    pub(crate) name: Option<Name>,
}

/// Arguments of verbs that want a snapshot.
#[derive(Debug, Args)]
pub(crate) struct SnapArgs {
    /// The snapshot: NAME@N, or NAME for the newest
    pub(crate) snap: SnapRef,
}

/// Arguments of `diff`.
#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// The older snapshot
    #[arg(value_name = "A")]
    pub(crate) old: SnapRef,

    /// The newer snapshot
    #[arg(value_name = "B")]
    pub(crate) new: SnapRef,

    /// Print every changed region, not only the first of each image
    #[arg(long)]
    pub(crate) regions: bool,
}

const DU_EXAMPLES: &str = "\
Examples:
  dormouse du
  dormouse du vm@3
  dormouse du /var/lib/firecracker/snapshots

What holds a '/', or is '.' or '..', is a path: ./vm is a folder, vm a snapshot.";

/// Arguments of `du`.
#[derive(Debug, Args)]
#[command(after_help = DU_EXAMPLES)]
pub(crate) struct DuArgs {
    /// A snapshot, or a file or folder that is no store; the whole store if not given
    #[arg(value_name = "SNAP|PATH", value_parser = ValueParser::from(OsStringValueParser::new().try_map(parse_du_target)))]
    pub(crate) target: Option<DuTarget>,
}

/// What `du` is about.
#[derive(Clone, Debug)]
pub(crate) enum DuTarget {
    /// A snapshot of the store.
    Snap(SnapRef),

    /// A file or folder.
    Path(PathBuf),
}

const MAP_EXAMPLES: &str = "\
Examples:
  dormouse map vm:memory
  dormouse map vm@2:root --svg map.svg

A cell has the colour of what it holds most of and is the stronger the more it holds of it; blocks \
of zeros weaken it. 'A disk' means: found on one of the guest's disks, so memory costs nothing there.";

/// Arguments of `map`.
#[derive(Debug, Args)]
#[command(after_help = MAP_EXAMPLES)]
pub(crate) struct MapArgs {
    /// The image: SNAP:IMAGE
    #[arg(value_name = "SNAP:IMAGE")]
    pub(crate) image: ImageRef,

    /// Write a picture to this file instead
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

/// What can be done with traces.
#[derive(Debug, Subcommand)]
pub(crate) enum TraceCommand {
    /// Draw in which order a snapshot's memory is touched: addresses down, order to the right
    #[command(
        after_help = "Examples:\n  dormouse trace show vm\n  dormouse trace show vm@2 --svg trace.svg"
    )]
    Show(TraceShowArgs),
}

/// Arguments of `trace show`.
#[derive(Debug, Args)]
pub(crate) struct TraceShowArgs {
    /// The snapshot
    pub(crate) snap: SnapRef,

    /// Write a picture to this file instead
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

const EXPORT_EXAMPLES: &str = "\
Examples:
  dormouse export vm:memory mem.bin
  dormouse export vm@2:memory diff.bin --diff-from vm@1
  dormouse export vm restored/
  dormouse export vm builds/ --as e2b,version=5,compression=zstd --base vm@1
  dormouse export vm@3 diff/ --as firecracker --base vm@1
  dormouse export vm root.qcow2 --as qcow2

A folder gets memory, disk/ID, state/NAME and manifest.json; what has no data becomes a hole. \
Nothing is there before it is whole. A diff is a sparse file with Firecracker's meaning: a hole is \
unchanged, a zero that was data is written as data; commit it with --memory-diff or --disk-diff.";

/// Arguments of `export`.
#[derive(Debug, Args)]
#[command(after_help = EXPORT_EXAMPLES)]
pub(crate) struct ExportArgs {
    /// An image, or a whole snapshot
    #[arg(value_name = "SNAP[:IMAGE]")]
    pub(crate) what: ExportWhat,

    /// The file; for a whole snapshot a folder that is empty or not there yet; of a carry '-' is
    /// standard output
    #[arg(value_name = "FILE|DIR")]
    pub(crate) path: PathBuf,

    /// Write only what differs from the same image of this snapshot
    #[arg(long, value_name = "SNAP")]
    pub(crate) diff_from: Option<SnapRef>,

    /// Replace the file if it is there
    #[arg(long)]
    pub(crate) force: bool,

    /// How another format is written.
    #[command(flatten)]
    pub(crate) other: ExportAsArgs,
}

/// What `export` writes.
#[derive(Clone, Debug)]
pub(crate) enum ExportWhat {
    /// One image.
    Image(ImageRef),

    /// All images.
    Snapshot(SnapRef),
}

/// Arguments of `cat`.
#[derive(Debug, Args)]
pub(crate) struct CatArgs {
    /// The image: SNAP:IMAGE
    #[arg(value_name = "SNAP:IMAGE")]
    pub(crate) image: ImageRef,
}

/// Arguments of `verify`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  dormouse verify\n  dormouse verify vm@3 --deep\n  dormouse verify --deep --repair"
)]
pub(crate) struct VerifyArgs {
    /// Only this snapshot
    pub(crate) snap: Option<SnapRef>,

    /// Decode every frame and check every digest, not only structure
    #[arg(long)]
    pub(crate) deep: bool,

    /// Take damaged blocks from equal ones elsewhere in the store, and rebuild a lost index
    #[arg(long)]
    pub(crate) repair: bool,
}

/// Arguments of `rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// The snapshots: NAME@N, or NAME for the newest
    #[arg(required = true, value_name = "SNAP")]
    pub(crate) snaps: Vec<SnapRef>,
}

/// Arguments of `prune`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  dormouse prune vm --keep last=5,hourly=24,daily=7 --dry-run\n\nThe newest snapshot is always kept."
)]
pub(crate) struct PruneArgs {
    /// The name
    pub(crate) name: Name,

    /// What to keep: RULE=COUNT,… of last, hourly, daily, weekly, monthly, yearly
    #[arg(long, value_name = "RULES")]
    pub(crate) keep: KeepRules,

    /// Only tell what would go
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Arguments of `gc`.
#[derive(Debug, Args)]
pub(crate) struct GcArgs {
    /// Only tell what would go
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Arguments of `compact`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  dormouse compact --dead-percent 20 --dry-run")]
pub(crate) struct CompactArgs {
    /// Write files again of which at least this part is dead [default: 33]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) dead_percent: Option<u8>,

    /// Gather files under this size [default: 16MiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) small: Option<u64>,

    /// Into files of up to this size [default: 256MiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) bundle: Option<u64>,

    /// Only tell what would be done
    #[arg(long)]
    pub(crate) dry_run: bool,
}

const PUNCH_EXAMPLES: &str = "\
Examples:
  dormouse punch /var/lib/ch/snapshots/vm1
  dormouse punch mem.bin --holes zero
  dormouse punch snapshots/* --dry-run

A folder stands for its files named memory*, not those below it. Nobody may write to the files \
meanwhile. A sparse file may be a diff, in which a hole means 'unchanged' and a zero 'now zero': it \
is refused unless it lies in a Cloud Hypervisor snapshot folder or --holes zero vouches for it.";

/// Arguments of `punch`.
#[derive(Debug, Args)]
#[command(after_help = PUNCH_EXAMPLES)]
pub(crate) struct PunchArgs {
    /// Files, and folders whose files named memory* are meant
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,

    /// All regular files of a folder, whatever their names
    #[arg(long)]
    pub(crate) all: bool,

    /// Only tell what would be freed
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Leave shorter runs of zeros, so that a file is cut into fewer pieces
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = size::parse)]
    pub(crate) min_run: u64,

    /// What holes that are there already stand for
    #[arg(long, value_enum)]
    pub(crate) holes: Option<Holes>,

    /// Threads that read and punch [default: one per CPU]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
}

/// What is known about holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Holes {
    /// Zeros: the files are whole images
    Zero,
}

/// Arguments of `completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: Shell,
}

/// Arguments of `man`.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// The folder, which is made if it is not there
    pub(crate) dir: PathBuf,
}

impl std::str::FromStr for ExportWhat {
    type Err = Error;

    fn from_str(text: &str) -> Result<ExportWhat, Error> {
        if text.contains(':') {
            text.parse().map(ExportWhat::Image)
        } else {
            text.parse().map(ExportWhat::Snapshot)
        }
    }
}

fn parse_parent(text: &str) -> Result<ParentArg, Error> {
    match text {
        "auto" => Ok(ParentArg(Parent::Auto)),
        "none" => Ok(ParentArg(Parent::None)),
        _ => text.parse().map(|snap| ParentArg(Parent::Snapshot(snap))),
    }
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    Name::new(key).map_err(|error| error.to_string())?;
    Ok((key.to_owned(), value.to_owned()))
}

fn named_file() -> ValueParser {
    ValueParser::from(OsStringValueParser::new().try_map(parse_named_file))
}

/// Splits at the first `=`; a file with one in its path is written with its id in front.
fn parse_named_file(text: OsString) -> Result<NamedFile, String> {
    let bytes = text.as_bytes();
    let Some(at) = bytes.iter().position(|&byte| byte == b'=') else {
        return Ok(NamedFile { id: None, file: text.into() });
    };
    let id = String::from_utf8_lossy(&bytes[..at]);
    let id = Name::new(id)
        .map_err(|error| format!("{error}; for a file with '=' in its path write NAME=FILE"))?;
    Ok(NamedFile { id: Some(id), file: OsString::from_vec(bytes[at + 1..].to_vec()).into() })
}

fn parse_du_target(text: OsString) -> Result<DuTarget, String> {
    let is_path = text.as_bytes().contains(&b'/') || text == "." || text == "..";
    match text.to_str() {
        Some(snap) if !is_path => snap
            .parse()
            .map(DuTarget::Snap)
            .map_err(|error| format!("{error}; for a file or folder of that name write ./{snap}")),
        _ => Ok(DuTarget::Path(text.into())),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn files_may_have_an_id() {
        let parse = |text: &str| parse_named_file(text.into());
        assert_eq!(parse("a/b").unwrap(), NamedFile { id: None, file: "a/b".into() });
        let id = Some(Name::new("data").unwrap());
        assert_eq!(parse("data=a=b").unwrap(), NamedFile { id, file: "a=b".into() });
        for bad in ["../x=f", "=f", "live=f"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_du_means_is_told_by_a_slash() {
        let parse = |text: &str| parse_du_target(text.into());
        assert!(matches!(parse("vm@1"), Ok(DuTarget::Snap(_))));
        for path in ["./vm", ".", "..", "/x"] {
            assert!(matches!(parse(path), Ok(DuTarget::Path(_))), "{path}");
        }
        assert!(parse("a b").unwrap_err().contains("./a b"));
    }
}
