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
            let words: Vec<_> = Format::ALL.iter().map(|format| format.word()).collect();
            Error::new(
                ErrorKind::InvalidInput,
                format!("{text:?} is not a format; there are {}", words.join(", ")),
            )
        })
    }
}
