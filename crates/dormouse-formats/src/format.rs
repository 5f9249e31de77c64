//! The formats, by the words that users call them.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind};

/// A foreign format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// wrenn's memory header of version 1 with its diff files, and the folder around them.
    Wrenn,

    /// Builds of E2B.
    E2b,

    /// Firecracker's memory file and vmstate.
    Firecracker,

    /// A snapshot folder of Cloud Hypervisor.
    CloudHypervisor,

    /// QEMU's memory-backend file with a migration stream.
    Qemu,

    /// QEMU's mapped-ram file.
    MappedRam,

    /// The copy-on-write store of the kernel's dm-snapshot target.
    DmSnapshot,

    /// A disk that qemu-img reads: qcow2, vmdk, vhdx and others.
    Qcow2,

    /// A file of bytes, with or without holes.
    Raw,

    /// Our own: snapshots in one file or stream, without a key.
    Carry,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 10] = [
        Format::Wrenn,
        Format::E2b,
        Format::Firecracker,
        Format::CloudHypervisor,
        Format::Qemu,
        Format::MappedRam,
        Format::DmSnapshot,
        Format::Qcow2,
        Format::Raw,
        Format::Carry,
    ];

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Format::Wrenn => "wrenn",
            Format::E2b => "e2b",
            Format::Firecracker => "firecracker",
            Format::CloudHypervisor => "cloud-hypervisor",
            Format::Qemu => "qemu",
            Format::MappedRam => "mapped-ram",
            Format::DmSnapshot => "dm-snapshot",
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
            Format::Carry => "carry",
        }
    }
}

/// What may be said of an import or an export beside its format, by its name on the command line.
pub type OptionName = &'static str;

impl Format {
    /// The words for all of them, as messages list them.
    pub fn words() -> String {
        let words = Format::ALL.iter().map(|format| match format {
            Format::Qcow2 => "qcow2 (also vmdk, vhdx, vpc, vdi, qed)",
            other => other.word(),
        });
        words.collect::<Vec<_>>().join(", ")
    }

    /// The options of an import that it has a use for.
    pub fn import_options(self) -> &'static [OptionName] {
        match self {
            Format::Wrenn => &["builds", "origin"],
            Format::E2b => &["builds"],
            Format::Firecracker => &["state", "diff", "low-memory", "layout", "vmm-version"],
            Format::CloudHypervisor => &["builds", "origin", "vmm-version"],
            Format::Qemu => &["state", "low-memory", "vmm-version"],
            Format::MappedRam => &["vmm-version"],
            Format::DmSnapshot => &["origin", "disk"],
            Format::Qcow2 => &["builds", "disk"],
            Format::Raw => &["diff", "disk"],
            Format::Carry => &[],
        }
    }

    /// The options of an export that it has a use for.
    pub fn export_options(self) -> &'static [OptionName] {
        match self {
            Format::Wrenn => &["base", "build-id"],
            Format::E2b => &["version", "compression", "base", "build-id"],
            Format::Firecracker => &["base"],
            Format::CloudHypervisor => &["rewrite"],
            Format::Qcow2 | Format::Raw => &["disk"],
            Format::Carry => &["base", "has"],
            Format::Qemu | Format::MappedRam | Format::DmSnapshot => &[],
        }
    }

    /// Fails if an option was given that would do nothing. `given` says which were.
    pub(crate) fn check_options(
        self,
        known: &[OptionName],
        given: &[(OptionName, bool)],
    ) -> Result<(), Error> {
        for &(name, is_given) in given {
            if is_given && !known.contains(&name) {
                let typed = |name: OptionName| match name {
                    "version" | "compression" => format!("{name}="),
                    name => format!("--{name}"),
                };
                let known: Vec<_> = known.iter().map(|name| typed(name)).collect();
                let others = match known.is_empty() {
                    true => "leave it out".to_owned(),
                    false => format!("what it has a use for is {}", known.join(", ")),
                };
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("{self} has no use for {}; {others}", typed(name)),
                ));
            }
        }
        Ok(())
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Format, Error> {
        // What qemu-img calls other disks goes the same way.
        let text = match text {
            "disk" | "vmdk" | "vhdx" | "vpc" | "vhd" | "vdi" | "qed" => "qcow2",
            other => other,
        };
        Format::ALL.into_iter().find(|format| format.word() == text).ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("{text:?} is not a format; there are {}", Format::words()),
            )
        })
    }
}
