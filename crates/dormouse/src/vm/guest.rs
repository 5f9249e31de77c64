//! What a guest is made of: how its VMM is launched, and its disks. A user writes it as a file; it is
//! stored with every snapshot, so that one can be woken with nothing else at hand.
//!
//! ```json
//! {"launch": {"vmm": "qemu", "memory_bytes": 536870912,
//!             "args": ["-machine", "q35", "-drive", "file={disk:root},format=raw,if=virtio,cache=none"]},
//!  "disks": [{"id": "root", "from": "base:root", "size": 8589934592}],
//!  "before_sleep": ["ssh", "box", "sync"]}
//! ```

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result};
use dormouse_store::name::Name;
use dormouse_vmm::kind::Kind as VmmKind;
use dormouse_vmm::launch::Template;
use serde::{Deserialize, Serialize};

use crate::exit::Fault;

/// The state image in which a snapshot has its guest.
pub(crate) const GUEST_STATE: &str = "dormouse-guest.json";

/// The longest file.
pub(crate) const GUEST_BYTES_MAX: usize = 2 << 20;

/// A guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Guest {
    /// How its VMM is launched.
    pub(crate) launch: Template,

    /// How its VMM gets the memory that it wakes with.
    #[serde(default, skip_serializing_if = "MemoryBackend::is_default")]
    pub(crate) memory_backend: MemoryBackend,

    /// Its disks.
    #[serde(default)]
    pub(crate) disks: Vec<Disk>,

    /// A command of the host that tells the guest to flush what it has not written yet; run before it is
    /// paused. `{name}` is the VM's name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) before_sleep: Vec<String>,
}

/// How a VMM gets the memory that its guest wakes with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MemoryBackend {
    /// From a file of the data plane, as the VMM can.
    #[default]
    File,

    /// Page by page over userfaultfd. Firecracker.
    Uffd,
}

impl MemoryBackend {
    fn is_default(&self) -> bool {
        *self == MemoryBackend::default()
    }
}

/// A disk of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Disk {
    /// Its name in the VM, and in snapshots of it.
    pub(crate) id: Name,

    /// What it lies over when the guest boots: a snapshot's disk, `SNAP:ID`. When a guest wakes it lies
    /// over that of the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<String>,

    /// The same, a raw file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from_file: Option<PathBuf>,

    /// Bytes; none: as what it lies over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) size: Option<u64>,
}

impl Guest {
    /// Reads a guest.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Guest> {
        let guest: Guest = serde_json::from_slice(bytes).map_err(|error| {
            Fault::usage(format!("not a guest as docs/cli.md describes it: {error}"))
        })?;
        guest.launch.check()?;
        if guest.memory_backend == MemoryBackend::Uffd {
            if guest.launch.vmm != VmmKind::Firecracker {
                let message = "memory_backend uffd is Firecracker's; others have files";
                return Err(Fault::usage(message).into());
            }
            if guest.disks.is_empty() {
                let message =
                    "memory_backend uffd wants a guest with a disk: they are stored together";
                return Err(Fault::usage(message).into());
            }
        }
        let mut ids = BTreeSet::new();
        for disk in &guest.disks {
            if !ids.insert(&disk.id) {
                return Err(Fault::usage(format!("disk {} is given twice", disk.id)).into());
            }
            let over = usize::from(disk.from.is_some()) + usize::from(disk.from_file.is_some());
            if over > 1 || (over == 0 && disk.size.is_none()) {
                let message = format!("disk {} wants one of from, from_file, and size", disk.id);
                return Err(Fault::usage(message).into());
            }
        }
        Ok(guest)
    }

    /// Refuses one that could not be woken as it slept: with disks that its VMM has not or calls otherwise,
    /// or some that are in no snapshot.
    pub(crate) fn check_disks(&self) -> Result<()> {
        let ids: Vec<&str> = self.disks.iter().map(|disk| disk.id.as_str()).collect();
        Ok(self.launch.check_disks(&ids)?)
    }

    /// As it is stored.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).context("cannot write down the guest")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Kind;

    #[test]
    fn a_guest_is_read_or_refused_with_a_reason() {
        let launch = r#""launch":{"vmm":"qemu","args":["-machine","q35"],"memory_bytes":4096}"#;
        let guest =
            |disks: &str| Guest::parse(format!("{{{launch},\"disks\":[{disks}]}}").as_bytes());
        let read = guest(r#"{"id":"root","from":"base:root"},{"id":"data","size":4096}"#).unwrap();
        assert_eq!(Guest::parse(&read.to_bytes().unwrap()).unwrap(), read);
        for (disks, why) in [
            (r#"{"id":"a","size":1},{"id":"a","size":1}"#, "twice"),
            (r#"{"id":"a"}"#, "wants one of"),
            (r#"{"id":"a","from":"x:y","from_file":"/z"}"#, "wants one of"),
            (r#"{"id":"../a","size":1}"#, "not a guest"),
            (r#"{"id":"a","size":1,"sise":2}"#, "unknown field"),
        ] {
            let error = guest(disks).unwrap_err();
            assert_eq!(Kind::of(&error), Kind::Usage, "{disks}");
            assert!(format!("{error:#}").contains(why), "{error:#}");
        }
    }
}
