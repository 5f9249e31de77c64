//! What each VMM gives and lacks, version by version: the table of `docs/vmm.md`, as a value.

use crate::kind::{Kind, Version};

/// What a version of a VMM gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Whether memory can be written to a file of its own.
    pub memory_file: bool,
    /// Whether what changed can be.
    pub diff: Diff,
    /// Whether memory can be left out of a save, or passes us page by page.
    pub leaves_memory_out: LeavesOut,
    /// Whether memory can come from a userfaultfd handler.
    pub uffd: bool,
    /// How a memory file is read at a wake.
    pub file_restore: FileRestore,
    /// Whether guests that wake from one memory file share the pages they have not changed.
    pub shares_clean_pages: bool,
    /// When disks can be given other files.
    pub drives: Drives,
    /// Whether the network's device can be another one at a wake.
    pub network_override: bool,
    /// Whether the vsock device's socket can be.
    pub vsock_override: bool,
    /// Whether the guest's clock can be advanced by the time that passed.
    pub clock_advance: bool,
    /// Whether a guest's discards reach a disk's file.
    pub discard: bool,
    /// Whether a snapshot can be handed over by descriptors, and be taken back lazily.
    pub offload: bool,
    /// Whether it ends when asked.
    pub quits: bool,
}

/// Diffs of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Diff {
    /// None.
    No,
    /// Yes, with dirty tracking from the boot or load on; without, everything that was touched.
    Yes,
    /// This version writes wrong ones.
    Broken,
}

/// How a save leaves memory out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeavesOut {
    /// It does not; a file that keeps nothing has to swallow it.
    No,
    /// Its stream is split as it passes, or memory is a shared file.
    Split,
    /// It hands descriptors of its memory over.
    Descriptors,
}

/// How a memory file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileRestore {
    /// All of it, before the guest goes on.
    Copy,
    /// By the VMM, page by page when needed.
    OnDemand,
    /// It is mapped privately.
    Mapped,
}

/// When disks can be given other files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drives {
    /// With the command line that the VMM is started with.
    AtStart,
    /// With the load, in the state's configuration.
    AtLoad,
    /// After the load, before the guest goes on.
    AfterLoad,
}

impl Capabilities {
    /// What a version gives.
    pub fn of(kind: Kind, version: Version) -> Capabilities {
        match kind {
            Kind::Firecracker => Capabilities::of_firecracker(version),
            Kind::CloudHypervisor => Capabilities::of_cloud_hypervisor(version),
            Kind::Qemu => Capabilities::of_qemu(version),
        }
    }

    fn of_firecracker(version: Version) -> Capabilities {
        // #5705: wrong offsets in guests of several slots.
        let broken = version.is_release(1, 14) && version.patch < 2;
        Capabilities {
            memory_file: true,
            diff: if broken { Diff::Broken } else { Diff::Yes },
            leaves_memory_out: LeavesOut::No,
            uffd: true,
            file_restore: FileRestore::Mapped,
            shares_clean_pages: true,
            drives: Drives::AfterLoad,
            network_override: version >= Version::new(1, 12, 0),
            vsock_override: version >= Version::new(1, 16, 0),
            clock_advance: version >= Version::new(1, 16, 0),
            discard: version >= Version::new(1, 17, 0),
            offload: false,
            quits: false,
        }
    }

    fn of_cloud_hypervisor(version: Version) -> Capabilities {
        let (on_demand, offload) = (Version::new(52, 0, 0), Version::new(53, 0, 0));
        let file_restore = match version >= on_demand {
            true => FileRestore::OnDemand,
            false => FileRestore::Copy,
        };
        let leaves_memory_out = match version >= offload {
            true => LeavesOut::Descriptors,
            false => LeavesOut::No,
        };
        Capabilities {
            memory_file: true,
            diff: Diff::No,
            leaves_memory_out,
            uffd: false,
            file_restore,
            // Released versions copy pages; see `copyonwrite` in `docs/vmm.md`.
            shares_clean_pages: false,
            drives: Drives::AtLoad,
            network_override: true,
            vsock_override: true,
            clock_advance: false,
            discard: version >= Version::new(51, 0, 0),
            offload: version >= offload,
            quits: true,
        }
    }

    fn of_qemu(_version: Version) -> Capabilities {
        Capabilities {
            memory_file: true,
            diff: Diff::No,
            leaves_memory_out: LeavesOut::Split,
            uffd: false,
            file_restore: FileRestore::Mapped,
            shares_clean_pages: true,
            drives: Drives::AtStart,
            network_override: false,
            vsock_override: false,
            clock_advance: false,
            discard: true,
            offload: false,
            quits: true,
        }
    }
}

/// Versions at which something changes, for the table.
const STEPS: [(Kind, &[(&str, Version)]); 3] = [
    (
        Kind::Firecracker,
        &[
            ("1.7", Version::new(1, 7, 0)),
            ("1.12", Version::new(1, 12, 0)),
            ("1.14.0", Version::new(1, 14, 0)),
            ("1.14.2", Version::new(1, 14, 2)),
            ("1.16", Version::new(1, 16, 0)),
            ("1.17", Version::new(1, 17, 0)),
        ],
    ),
    (
        Kind::CloudHypervisor,
        &[
            ("48", Version::new(48, 0, 0)),
            ("51", Version::new(51, 0, 0)),
            ("52", Version::new(52, 0, 0)),
            ("53", Version::new(53, 0, 0)),
        ],
    ),
    (Kind::Qemu, &[("7.2", Version::new(7, 2, 0))]),
];

/// The table of `docs/vmm.md`: a row for each version at which something changed.
pub fn table() -> String {
    let columns = [
        "",
        "since",
        "memory file",
        "diff",
        "leaves memory out",
        "uffd",
        "file restore",
        "shares clean pages",
        "drives",
        "network",
        "vsock",
        "clock",
        "discard",
        "offload",
        "quits",
    ];
    let mut table = format!("| {} |\n|{}\n", columns.join(" | "), "---|".repeat(columns.len()));
    table = table.replacen("|  |", "| |", 1);
    for (kind, steps) in STEPS {
        for (since, version) in steps {
            let row = Capabilities::of(kind, *version).row();
            table += &format!("| {kind} | {since} | {} |\n", row.join(" | "));
        }
    }
    table
}

impl Capabilities {
    fn row(&self) -> [&'static str; 13] {
        let word = |is_so: bool| if is_so { "yes" } else { "no" };
        [
            word(self.memory_file),
            match self.diff {
                Diff::No => "no",
                Diff::Yes => "yes",
                Diff::Broken => "broken",
            },
            match self.leaves_memory_out {
                LeavesOut::No => "no",
                LeavesOut::Split => "split",
                LeavesOut::Descriptors => "descriptors",
            },
            word(self.uffd),
            match self.file_restore {
                FileRestore::Copy => "copy",
                FileRestore::OnDemand => "on demand",
                FileRestore::Mapped => "mapped",
            },
            word(self.shares_clean_pages),
            match self.drives {
                Drives::AtStart => "at start",
                Drives::AtLoad => "at load",
                Drives::AfterLoad => "after load",
            },
            word(self.network_override),
            word(self.vsock_override),
            word(self.clock_advance),
            word(self.discard),
            word(self.offload),
            word(self.quits),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documents_say_the_same() {
        let documents = include_str!("../../../docs/vmm.md");
        assert!(documents.contains(&table()), "docs/vmm.md has another table than:\n{}", table());
    }

    #[test]
    fn versions_differ_where_they_do() {
        let firecracker =
            |minor, patch| Capabilities::of(Kind::Firecracker, Version::new(1, minor, patch));
        assert_eq!(firecracker(13, 1).diff, Diff::Yes);
        assert_eq!(firecracker(14, 0).diff, Diff::Broken);
        assert_eq!(firecracker(14, 1).diff, Diff::Broken);
        assert_eq!(firecracker(14, 2).diff, Diff::Yes);
        assert!(!firecracker(11, 0).network_override && firecracker(12, 0).network_override);
        assert!(!firecracker(15, 9).vsock_override && firecracker(16, 0).vsock_override);
        let ch = |major| Capabilities::of(Kind::CloudHypervisor, Version::new(major, 0, 0));
        assert_eq!(
            (ch(51).file_restore, ch(52).file_restore),
            (FileRestore::Copy, FileRestore::OnDemand)
        );
        assert!(!ch(52).offload && ch(53).offload);
    }
}
