//! How a guest's memory lies in Firecracker's memory file.
//!
//! Regions in ascending order, one behind the other; for the guest there are holes between them,
//! which have not been where they are for ever (`arch/*/layout.rs`). Memory for hotplug comes last,
//! all of it, whether it is plugged or not; where the guest has it is not told.

use crate::error::{Error, ErrorKind, Result};
use crate::kind::Version;
use crate::vmm::MemoryRegion;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// MiB of memory: more than any host has.
const MEMORY_MIB_MAX: u64 = 64 << 20;

/// An architecture that Firecracker has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// x86-64.
    X86,
    /// 64-bit ARM.
    Arm,
}

impl Arch {
    /// This machine's.
    pub const HERE: Arch = if cfg!(target_arch = "aarch64") { Arch::Arm } else { Arch::X86 };
}

/// The regions of a memory of `mib` MiB, and of `hotplug_mib` MiB that can be plugged.
pub fn regions(
    version: Version,
    arch: Arch,
    mib: u64,
    hotplug_mib: u64,
) -> Result<Vec<MemoryRegion>> {
    if mib == 0 || mib > MEMORY_MIB_MAX || hotplug_mib > MEMORY_MIB_MAX {
        let context = format!("a guest of {mib} MiB and {hotplug_mib} MiB for hotplug");
        return Err(Error::new(ErrorKind::Protocol, context));
    }
    let is_new = version >= Version::new(1, 13, 0);
    // Since 1.13 devices have 1 GiB below 4 GiB, and 256 GiB below 512 GiB.
    let ranges: &[(u64, u64)] = match (arch, is_new) {
        (Arch::X86, false) => &[(0, 3328 * MIB), (4 * GIB, u64::MAX)],
        (Arch::X86, true) => &[(0, 3 * GIB), (4 * GIB, 256 * GIB), (512 * GIB, u64::MAX)],
        (Arch::Arm, false) => &[(2 * GIB, u64::MAX)],
        (Arch::Arm, true) => &[(2 * GIB, 256 * GIB), (512 * GIB, u64::MAX)],
    };
    let (mut regions, mut offset, mut left) = (Vec::new(), 0, mib * MIB);
    let mut add = |guest_address, length| {
        let block = String::new();
        regions.push(MemoryRegion { block, image_offset: offset, guest_address, length });
        offset += length;
    };
    for &(start, end) in ranges {
        let length = left.min(end - start);
        if length > 0 {
            add(Some(start), length);
            left -= length;
        }
    }
    if hotplug_mib > 0 {
        add(None, hotplug_mib * MIB);
    }
    Ok(regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_where_each_version_has_them() {
        let split = |version, arch, mib, hotplug| -> Vec<_> {
            let regions = regions(version, arch, mib, hotplug).unwrap();
            regions.iter().map(|r| (r.image_offset, r.guest_address, r.length)).collect()
        };
        let (old, new) = (Version::new(1, 12, 1), Version::new(1, 13, 0));
        assert_eq!(split(old, Arch::X86, 512, 0), [(0, Some(0), 512 * MIB)]);
        assert_eq!(
            split(old, Arch::X86, 4096, 0),
            [(0, Some(0), 3328 * MIB), (3328 * MIB, Some(4 * GIB), 768 * MIB)]
        );
        assert_eq!(
            split(new, Arch::X86, 4096, 128),
            [(0, Some(0), 3 * GIB), (3 * GIB, Some(4 * GIB), GIB), (4 * GIB, None, 128 * MIB)]
        );
        assert_eq!(split(new, Arch::X86, 256 * 1024, 0)[2], (255 * GIB, Some(512 * GIB), GIB));
        assert_eq!(split(new, Arch::Arm, 1024, 0), [(0, Some(2 * GIB), GIB)]);
        assert!(regions(new, Arch::X86, 0, 0).is_err());
        assert!(regions(new, Arch::X86, u64::MAX, 0).is_err());
    }
}
