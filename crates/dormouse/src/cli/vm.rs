//! The verbs of VMs: run, sleep, wake, fork, ps, inspect, kill, logs.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use dormouse_store::name::{Name, SnapRef};

use super::parse_label;

/// The examples of `run`.
pub(super) const RUN_EXAMPLES: &str = "\
Examples:
  dormouse run box.json box
  dormouse sleep box --as vm
  dormouse wake vm --as box

GUEST is a JSON file: {\"launch\": {\"vmm\": \"qemu\", \"memory_bytes\": …, \"args\": […]}, \
\"disks\": [{\"id\": \"root\", \"from\": \"base:root\"}]}; docs/cli.md has it all. In arguments \
{disk:ID} is a disk's path, {folder} the VM's folder, {name} its name.";

/// Arguments of `run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// What the guest is: a JSON file
    pub(crate) guest: PathBuf,

    /// What the VM will be called
    pub(crate) name: Name,
}

/// Until when `sleep` waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WaitUntil {
    /// Until the snapshot is there, whatever becomes of the host
    Durable,

    /// Until the guest stands still no longer; the rest is done in the background
    Frozen,
}

/// Arguments of `sleep`.
#[derive(Debug, Args)]
pub(crate) struct SleepArgs {
    /// The VM
    pub(crate) name: Name,

    /// The snapshot's name; that of the snapshot it woke from if not given, else the VM's
    #[arg(long = "as", value_name = "NAME")]
    pub(crate) snapshot: Option<Name>,

    /// Let the VM go on
    #[arg(long)]
    pub(crate) keep_running: bool,

    /// Until when to wait
    #[arg(long, value_name = "WHAT", default_value = "durable")]
    pub(crate) wait: WaitUntil,

    /// A label of your own
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_label)]
    pub(crate) label: Vec<(String, String)>,
}

/// What of the host a VM that wakes is given.
#[derive(Clone, Debug, Args)]
pub(crate) struct WakeOptionArgs {
    /// What the guest is, for a snapshot that does not say it, or to replace what it says
    #[arg(long, value_name = "FILE")]
    pub(crate) guest: Option<PathBuf>,

    /// Start this program as the VMM, by its path or a name along PATH
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) vmm: Option<PathBuf>,

    /// Give a network interface another device of the host
    #[arg(long, value_name = "ID=DEVICE", value_parser = parse_label)]
    pub(crate) network: Vec<(String, String)>,

    /// Give the vsock device another socket; '{name}' and '{folder}' stand for each VM's
    #[arg(long, value_name = "PATH")]
    pub(crate) vsock: Option<PathBuf>,
}

/// Arguments of `wake`.
#[derive(Debug, Args)]
pub(crate) struct WakeArgs {
    /// The snapshot
    pub(crate) snap: SnapRef,

    /// What the VM will be called; as the snapshot if not given
    #[arg(long = "as", value_name = "NAME")]
    pub(crate) name: Option<Name>,

    #[command(flatten)]
    pub(crate) options: WakeOptionArgs,
}

/// Arguments of `fork`.
#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    /// The snapshot
    pub(crate) snap: SnapRef,

    /// What the VMs will be called
    #[arg(required = true)]
    pub(crate) names: Vec<Name>,

    #[command(flatten)]
    pub(crate) options: WakeOptionArgs,
}

/// Arguments of verbs that want a VM.
#[derive(Debug, Args)]
pub(crate) struct VmArgs {
    /// The VM
    pub(crate) name: Name,
}
