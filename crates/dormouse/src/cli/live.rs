//! What can be typed about live VMs' parts: `disk`, `serve` and `mount`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use dormouse_store::name::{ImageRef, Name, SnapRef};

use super::parse_label;
use crate::command::serve::attach::NbdPath;
use crate::live::LiveRef;
use crate::live::memory::{Prefetch, TrackChanges};
use crate::output::size;

pub(super) const DISK_EXAMPLES: &str = "\
Examples:
  dormouse disk create box --from vm:root --size 8GiB
  dormouse serve nbd box --socket box.nbd &
  dormouse disk commit box vm
  dormouse disk rm box

LIVE is the name of a live VM; where it has several disks, LIVE/ID.";

pub(super) const MOUNT_EXAMPLES: &str = "\
Examples:
  dormouse mount /mnt/dormouse --background
  mount -o loop,ro /mnt/dormouse/vm/3/disk/root /mnt/root
  qemu-system-x86_64 … -object memory-backend-file,id=m,size=512M,\
mem-path=/mnt/dormouse/vm/3/memory,share=off,readonly=on,rom=off
  firecracker … \"path_on_host\": \"/mnt/dormouse/live/box/disk/root\"
  umount /mnt/dormouse";

/// The largest window around a fault: a guest that waits for more waits for megabytes to be copied.
const WINDOW_BYTES_MAX: u64 = 16 << 20;

/// What can be done with live disks.
#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Make a live disk over a snapshot's disk, or a blank one
    Create(DiskCreateArgs),

    /// List live disks
    Ls,

    /// Tell what was written, and whether anything failed
    Status {
        /// The live VM or disk
        live: LiveRef,
    },

    /// Remove a live VM with its disks, after stopping who serves it; or one disk that nobody serves
    Rm {
        /// The live VM or disk
        live: LiveRef,
    },

    /// Commit what was written as a new snapshot; writers go on meanwhile
    Commit(DiskCommitArgs),

    /// Forget what was written: the disk is as its base again
    Discard {
        /// The live VM or disk
        live: LiveRef,
    },
}

/// Arguments of `disk create`.
#[derive(Debug, Args)]
pub(crate) struct DiskCreateArgs {
    /// The live VM, or LIVE/ID; the id is the snapshot's disk's, or 'root'
    pub(crate) live: LiveRef,

    /// The disk that it lies over; blank without
    #[arg(long, value_name = "SNAP:ID")]
    pub(crate) from: Option<ImageRef>,

    /// A raw file that it lies over, which nobody may change until the first commit
    #[arg(long, value_name = "FILE", conflicts_with = "from")]
    pub(crate) from_file: Option<PathBuf>,

    /// Its size; at least that of what it lies over
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) size: Option<u64>,
}

/// Arguments of `disk commit`.
#[derive(Debug, Args)]
pub(crate) struct DiskCommitArgs {
    /// The live VM, or one of its disks
    pub(crate) live: LiveRef,

    /// The snapshot's name; it gets the next number
    pub(crate) name: Name,

    /// The snapshot's parent: SNAP, 'auto' for the newest of NAME, if any, or 'none'
    #[arg(long, value_name = "SNAP|auto|none", default_value = "auto")]
    pub(crate) parent: String,

    /// A label of your own
    #[arg(long, value_name = "K=V", value_parser = parse_label)]
    pub(crate) label: Vec<(String, String)>,
}

/// The protocols that can be served.
#[derive(Debug, Subcommand)]
pub(crate) enum ServeCommand {
    /// The Network Block Device protocol, until SIGTERM; SIGUSR1 prints statistics
    #[command(after_help = SERVE_EXAMPLES)]
    Nbd(Box<ServeNbdArgs>),

    /// The memory of a snapshot, page by page, to a VMM that wakes it
    #[command(after_help = SERVE_MEMORY_EXAMPLES)]
    Memory(Box<ServeMemoryArgs>),

    /// End the process that serves a live VM, with all that it serves, and wait for it
    Stop {
        /// The live VM
        live: Name,
    },
}

const SERVE_EXAMPLES: &str = "\
Examples:
  dormouse serve nbd box --socket /run/box.nbd
  dormouse serve nbd box --socket /run/box.nbd --background && dormouse serve stop box
  dormouse serve nbd vm@2:root --socket /run/root.nbd --background --log /var/log/root.log
  dormouse serve nbd box --attach /dev/nbd0 --background
  dormouse serve nbd box --tcp 0.0.0.0:10809 --tls /etc/dormouse/tls

Prints the URI of each export once they can be connected to. A background process is ended by \
'serve stop LIVE', or by SIGTERM to the pid that was printed.";

/// Arguments of `serve nbd`.
#[derive(Debug, Args)]
#[group(skip)]
#[command(group = ArgGroup::new("where").required(true).multiple(true).args(["socket", "tcp", "attach"]))]
pub(crate) struct ServeNbdArgs {
    /// LIVE or LIVE/ID, or SNAP:IMAGE, which is read-only; exports are named as given
    #[arg(required = true, value_name = "LIVE|SNAP:IMAGE")]
    pub(crate) exports: Vec<String>,

    /// A unix socket
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// A TCP address
    #[arg(long, value_name = "ADDRESS:PORT", requires = "tls")]
    pub(crate) tcp: Option<std::net::SocketAddr>,

    /// A folder with ca-cert.pem, server-cert.pem and server-key.pem: clients must have a
    /// certificate of that authority
    #[arg(long, value_name = "DIR")]
    pub(crate) tls: Option<PathBuf>,

    /// Let clients in over TCP that do not ask for TLS, too
    #[arg(long, requires = "tls")]
    pub(crate) tls_optional: bool,

    /// Make the only export a block device of this machine, by the kernel's nbd driver
    #[arg(long, value_name = "/dev/nbdN")]
    pub(crate) attach: Option<NbdPath>,

    /// Connections of the block device
    #[arg(long, value_name = "N", requires = "attach", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) connections: u32,

    /// Seconds that the block device's requests wait for a server that died before they fail
    #[arg(long, value_name = "SECONDS", requires = "attach", default_value_t = 10)]
    pub(crate) dead_timeout: u64,

    /// Whether blocks of zeros in plain writes to live disks are found and take no space
    #[arg(long, value_name = "on|off", value_enum, default_value_t = DetectZeroes::On, hide_possible_values = true)]
    pub(crate) detect_zeroes: DetectZeroes,

    #[command(flatten)]
    pub(crate) process: ServerProcess,
}

/// The process that serves.
#[derive(Debug, Args)]
pub(crate) struct ServerProcess {
    /// Serve in a process of its own: return once it serves
    #[arg(long)]
    pub(crate) background: bool,

    /// The background process's log; live/LIVE/log of the store if not given
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,

    /// What `--background` becomes in the process that it starts
    #[arg(long, hide = true, conflicts_with = "background")]
    pub(crate) detached: bool,

    /// Print statistics at the end
    #[arg(long)]
    pub(crate) metrics: bool,
}

const SERVE_MEMORY_EXAMPLES: &str = "\
Examples:
  dormouse serve memory vm@3 --uffd /run/box.uffd --as box
  dormouse serve memory vm --uffd /run/box.uffd --as box --nbd /run/box.nbd --background
  dormouse serve memory --take-over box --background

Prints the socket once a VMM can connect to it; Firecracker is told of it by PUT /snapshot/load with \
mem_backend {\"backend_type\":\"Uffd\",\"backend_path\":SOCKET}. Serves one VM and ends with it. SIGTERM, \
or a crash, leaves the VM waiting for '--take-over LIVE'.";

/// Arguments of `serve memory`.
#[derive(Debug, Args)]
pub(crate) struct ServeMemoryArgs {
    /// The snapshot that wakes
    #[arg(required_unless_present = "take_over", conflicts_with = "take_over")]
    pub(crate) snap: Option<SnapRef>,

    /// The unix socket that the VMM connects to
    #[arg(
        long,
        value_name = "SOCKET",
        required_unless_present = "take_over",
        conflicts_with = "take_over"
    )]
    pub(crate) uffd: Option<PathBuf>,

    /// What the live VM is called; its disks, if it has any, are had by this process, too
    #[arg(
        long = "as",
        value_name = "LIVE",
        required_unless_present = "take_over",
        conflicts_with = "take_over"
    )]
    pub(crate) live: Option<Name>,

    /// Go on serving the VM of a server that is gone, as that one did
    #[arg(long, value_name = "LIVE")]
    pub(crate) take_over: Option<Name>,

    /// Whether the pages that the guest changes are known exactly; otherwise all that it touched
    /// count, and it must stay paused while it is committed
    #[arg(long, value_name = "on|off", value_enum, default_value_t = TrackChanges::On, hide_possible_values = true, conflicts_with = "take_over")]
    pub(crate) track_dirty: TrackChanges,

    /// What is installed before the guest asks for it
    #[arg(long, value_enum, default_value_t = Prefetch::Trace, conflicts_with = "take_over")]
    pub(crate) prefetch: Prefetch,

    /// Bytes around a fault of which what is decoded is installed with it: a power of two from 4KiB
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = parse_window, conflicts_with = "take_over")]
    pub(crate) window: u64,

    /// Serve the live VM's disks here, over the Network Block Device protocol
    #[arg(long, value_name = "SOCKET", conflicts_with = "take_over")]
    pub(crate) nbd: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) process: ServerProcess,
}

/// Whether zeros inside plain writes are looked for, as QEMU calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DetectZeroes {
    /// They take no space.
    On,

    /// They are written like all other bytes.
    Off,
}

/// Arguments of `mount`.
#[derive(Debug, Args)]
pub(crate) struct MountArgs {
    /// An empty folder
    pub(crate) dir: PathBuf,

    /// Return when it is mounted, and go on in the background
    #[arg(long)]
    pub(crate) background: bool,

    /// Write the log to a file once it is mounted
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,

    /// Have what the mount cannot do without kept by a process of its own: after a crash open files
    /// wait, and the next 'dormouse mount DIR' takes them over; with --background that process starts
    /// it. Wants Linux 6.9
    #[arg(long)]
    pub(crate) hold: bool,

    /// Take over a mount whose process is gone, and do nothing if there is none
    #[arg(long, hide = true, requires = "hold")]
    pub(crate) successor: bool,

    /// Let other users in, too; without root it wants 'user_allow_other' in /etc/fuse.conf
    #[arg(long)]
    pub(crate) allow_other: bool,

    /// Requests that are answered at the same time
    #[arg(long, value_name = "N", default_value = "8")]
    pub(crate) threads: NonZeroUsize,
}

fn parse_window(text: &str) -> Result<u64, String> {
    let window = size::parse(text).map_err(|error| error.to_string())?;
    if (4 << 10..=WINDOW_BYTES_MAX).contains(&window) && window.is_power_of_two() {
        return Ok(window);
    }
    Err("expected a power of two from 4KiB to 16MiB".to_owned())
}
