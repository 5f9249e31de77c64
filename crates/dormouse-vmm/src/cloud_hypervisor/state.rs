//! `state.json`: whether it is whole, and how memory lies in `memory-ranges`.
//!
//! The state is a tree of snapshots; each node's own state is a text of JSON inside the JSON. The
//! memory manager's has the ranges, and their order is the order of the file: not that of addresses,
//! for it comes out of a hash map.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::STATE;
use crate::error::{Error, ErrorKind, Result};
use crate::vmm::MemoryRegion;

/// Ranges of memory; what is plugged by virtio-mem comes in pieces of 2 MiB and more.
const RANGES_MAX: usize = 1 << 20;

/// A range of a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct MemoryRange {
    /// Its guest-physical address.
    pub gpa: u64,
    /// Its bytes.
    pub length: u64,
}

/// A mapping of guest memory: a slot of the hypervisor's, and where it is in the file behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// The hypervisor's number of it.
    pub slot: u32,
    /// Its guest-physical address.
    pub gpa: u64,
    /// Its bytes.
    pub size: u64,
    /// Where it starts in its file or descriptor.
    pub file_offset: u64,
}

#[derive(Deserialize)]
struct Manager {
    memory_ranges: Ranges,
}

#[derive(Deserialize)]
struct Ranges {
    data: Vec<MemoryRange>,
}

#[derive(Deserialize)]
struct Mappings {
    guest_ram_mappings: Vec<Slot>,
}

/// The ranges of memory in a state, in the order of the memory's file. None where all of memory is
/// in files of its own.
pub fn memory_ranges(bytes: &[u8]) -> Result<Vec<MemoryRange>> {
    let text = manager(bytes)?;
    let manager: Manager = serde_json::from_str(&text).map_err(|error| {
        let context = format!("{STATE} has no memory ranges where they belong");
        Error::with_source(ErrorKind::InvalidFile, context, error)
    })?;
    let ranges = manager.memory_ranges.data;
    check(ranges.iter().map(|range| (range.gpa, range.length)))?;
    Ok(ranges)
}

/// The slots of memory, out of `memory_manager_data` of a migration's configuration.
pub fn slots(config: &[u8]) -> Result<Vec<Slot>> {
    let bad = |why: &str| {
        Error::new(ErrorKind::InvalidFile, format!("the configuration of a migration has {why}"))
    };
    let config: Value = serde_json::from_slice(config).map_err(|error| {
        let context = "the configuration of a migration is damaged or cut short";
        Error::with_source(ErrorKind::InvalidFile, context, error)
    })?;
    let mappings: Mappings = Mappings::deserialize(&config["memory_manager_data"])
        .map_err(|error| bad(&format!("no slots of memory: {error}")))?;
    let slots = mappings.guest_ram_mappings;
    check(slots.iter().map(|slot| (slot.gpa, slot.size)))?;
    for (number, slot) in slots.iter().enumerate() {
        let is_twice = slots[..number].iter().any(|other| other.slot == slot.slot);
        if is_twice || slot.file_offset.checked_add(slot.size).is_none() {
            return Err(bad(&format!("slot {} twice, or beyond its file", slot.slot)));
        }
    }
    Ok(slots)
}

/// The memory manager's own state.
fn manager(bytes: &[u8]) -> Result<String> {
    let state: Value = serde_json::from_slice(bytes).map_err(|error| {
        let context = format!("{STATE} of {} bytes is damaged or cut short", bytes.len());
        Error::with_source(ErrorKind::InvalidFile, context, error)
    })?;
    match &state["snapshots"]["memory-manager"]["snapshot_data"]["state"] {
        Value::String(text) => Ok(text.clone()),
        _ => {
            let context = format!("{STATE} has no state of a memory manager");
            Err(Error::new(ErrorKind::InvalidFile, context))
        }
    }
}

/// Refuses ranges of (address, length) that overlap, are empty, or are no pages.
fn check(ranges: impl Iterator<Item = (u64, u64)>) -> Result<()> {
    let bad = |what: String| {
        Err(Error::new(ErrorKind::InvalidFile, format!("the guest's memory has {what}")))
    };
    let mut sorted: Vec<(u64, u64)> = ranges.collect();
    if sorted.len() > RANGES_MAX {
        return bad(format!("{} ranges", sorted.len()));
    }
    sorted.sort_unstable();
    let (mut end, mut total) = (0_u64, 0_u64);
    for (gpa, length) in sorted {
        let is_pages = (gpa | length).is_multiple_of(4096) && length > 0;
        let sums = gpa.checked_add(length).zip(total.checked_add(length));
        let Some((next, sum)) = sums.filter(|_| is_pages && gpa >= end) else {
            return bad(format!("a range of {length:#x} bytes at {gpa:#x}"));
        };
        (end, total) = (next, sum);
    }
    Ok(())
}

/// The ranges as regions of the memory's file.
pub fn regions(ranges: &[MemoryRange]) -> Vec<MemoryRegion> {
    let mut image_offset = 0;
    let region = |range: &MemoryRange| {
        let region = MemoryRegion {
            block: String::new(),
            image_offset,
            guest_address: Some(range.gpa),
            length: range.length,
        };
        image_offset += range.length;
        region
    };
    ranges.iter().map(region).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state(ranges: &Value) -> String {
        let manager = json!({"memory_ranges": {"data": ranges}, "boot_ram": 1, "later": []});
        json!({"snapshots": {
            "cpu-manager": {"snapshots": {}, "snapshot_data": null},
            "memory-manager": {"snapshots": {}, "snapshot_data": {"state": manager.to_string()}},
        }, "snapshot_data": null})
        .to_string()
    }

    #[test]
    fn ranges_are_in_the_order_of_the_file() {
        let high = json!([{"gpa": 1_u64 << 32, "length": 8192}, {"gpa": 0, "length": 4096}]);
        let ranges = memory_ranges(state(&high).as_bytes()).unwrap();
        let regions: Vec<_> =
            regions(&ranges).into_iter().map(|r| (r.image_offset, r.guest_address)).collect();
        assert_eq!(regions, [(0, Some(1 << 32)), (8192, Some(0))]);
        assert_eq!(memory_ranges(state(&json!([])).as_bytes()).unwrap(), []);
    }

    #[test]
    fn what_is_cut_short_or_makes_no_sense_is_an_error() {
        let whole = state(&json!([{"gpa": 0, "length": 4096}]));
        for end in [0, 1, whole.len() / 2, whole.len() - 1] {
            assert!(memory_ranges(&whole.as_bytes()[..end]).is_err());
        }
        for ranges in [
            json!([{"gpa": 0, "length": 0}]),
            json!([{"gpa": 0, "length": 100}]),
            json!([{"gpa": 4096, "length": 8192}, {"gpa": 8192, "length": 4096}]),
            json!([{"gpa": 0xffff_ffff_ffff_f000_u64, "length": 8192}]),
            json!([{"gpa": 0}]),
            json!({}),
        ] {
            let error = memory_ranges(state(&ranges).as_bytes()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidFile, "{ranges}");
        }
        for bytes in [&b"{}"[..], b"[]", b"null"] {
            assert!(memory_ranges(bytes).is_err());
        }
    }

    #[test]
    fn slots_of_a_migration_are_read() {
        let slot = |slot: u32, gpa: u64, size: u64, file_offset: u64| json!({"slot": slot, "gpa": gpa, "size": size, "file_offset": file_offset, "zone_id": "mem0"});
        let config = |slots: Value| {
            json!({"vm_config": {}, "common_cpuid": [], "memory_manager_data": {"guest_ram_mappings": slots}})
                .to_string()
        };
        let two = config(json!([slot(0, 0, 4096, 0), slot(1, 1 << 32, 8192, 4096)]));
        let read = slots(two.as_bytes()).unwrap();
        assert_eq!(read[1], Slot { slot: 1, gpa: 1 << 32, size: 8192, file_offset: 4096 });
        for bad in [
            config(json!([slot(0, 0, 4096, 0), slot(0, 1 << 32, 8192, 4096)])),
            config(json!([slot(0, 0, 4096, u64::MAX)])),
            config(json!({})),
            "{}".to_owned(),
            two[..two.len() - 1].to_owned(),
        ] {
            assert_eq!(slots(bad.as_bytes()).unwrap_err().kind(), ErrorKind::InvalidFile, "{bad}");
        }
    }
}
