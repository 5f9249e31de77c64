//! Where a machine of QEMU's has its memory, for the guest.
//!
//! x86 leaves a hole for devices below 4 GiB; memory beyond it goes on at 4 GiB. Where the hole
//! begins depends on the machine and on how much memory there is (`pc_q35.c`, `pc_piix.c`,
//! `microvm.c`; `max-ram-below-4g` at its default).

use crate::vmm::MemoryRegion;

const GIB: u64 = 1 << 30;

/// A memory's regions: its block, the machine type as QEMU says it (`pc-q35-7.2-machine`), bytes.
///
/// A machine that is not known has one region at an address that is not known.
pub fn regions(block: &str, machine: &str, bytes: u64) -> Vec<MemoryRegion> {
    let region = |image_offset, guest_address, length| MemoryRegion {
        block: block.to_owned(),
        image_offset,
        guest_address,
        length,
    };
    let Some(low) = low_memory(machine, bytes) else { return vec![region(0, None, bytes)] };
    let mut regions = vec![region(0, Some(0), low)];
    if bytes > low {
        regions.push(region(low, Some(4 * GIB), bytes - low));
    }
    regions
}

fn low_memory(machine: &str, bytes: u64) -> Option<u64> {
    let below = |hole_when: u64, low: u64| if bytes >= hole_when { low } else { bytes };
    if machine.starts_with("pc-q35") || machine.starts_with("q35") {
        Some(below(0xb000_0000, 2 * GIB))
    } else if machine.starts_with("microvm") {
        Some(below(0xc000_0000, 3 * GIB))
    } else if machine.starts_with("pc-i440fx") || machine.starts_with("pc-machine") {
        Some(below(0xe000_0000, 3 * GIB))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hole_begins_where_the_machine_has_it() {
        let split = |machine, bytes| {
            let regions = regions("m", machine, bytes);
            assert_eq!(regions.iter().map(|region| region.length).sum::<u64>(), bytes);
            regions.iter().map(|r| (r.image_offset, r.guest_address)).collect::<Vec<_>>()
        };
        let q35 = "pc-q35-7.2-machine";
        assert_eq!(split(q35, GIB / 2), [(0, Some(0))]);
        assert_eq!(split(q35, 0xb000_0000 - 4096), [(0, Some(0))]);
        let high = [(0, Some(0)), (2 * GIB, Some(4 * GIB))];
        assert_eq!(split(q35, 0xb000_0000), high);
        assert_eq!(split(q35, 8 * GIB), high);
        let high = [(0, Some(0)), (3 * GIB, Some(4 * GIB))];
        assert_eq!(split("pc-i440fx-10.0-machine", 7 * GIB / 2), high);
        assert_eq!(split("pc-i440fx-10.0-machine", 3 * GIB), [(0, Some(0))]);
        assert_eq!(split("microvm-machine", 4 * GIB), high);
        assert_eq!(split("virt-8.2-machine", 4 * GIB), [(0, None)]);
    }
}
