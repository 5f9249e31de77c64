//! Cloud Hypervisor's snapshot folder.

use std::fs;
use std::io;
use std::path::Path;

/// A zone, with its memory unless it is a shared file of its own.
#[derive(Clone, Debug)]
pub struct Zone {
    /// Its id.
    pub id: String,
    /// Where it lies.
    pub gpa: u64,
    /// Its bytes.
    pub memory: Vec<u8>,
    /// Whether it is in the snapshot.
    pub saved: bool,
}

/// Writes a folder; the zones that are saved come in the order given.
///
/// # Errors
/// When a file cannot be written.
pub fn write(dir: &Path, zones: &[Zone], disk: &str) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let config = serde_json::json!({
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
        "memory": {"size": zones.iter().map(|zone| zone.memory.len()).sum::<usize>()},
        "disks": [{"path": disk, "readonly": false, "id": "_disk0"}],
        "net": [{"id": "_net1", "tap": "tap0"}],
    });
    fs::write(dir.join("config.json"), config.to_string())?;
    let saved = || zones.iter().filter(|zone| zone.saved);
    let ranges: Vec<_> = saved()
        .map(|zone| serde_json::json!({"gpa": zone.gpa, "length": zone.memory.len()}))
        .collect();
    let mappings: Vec<_> = zones
        .iter()
        .enumerate()
        .map(|(slot, zone)| {
            serde_json::json!({
                "slot": slot, "gpa": zone.gpa, "size": zone.memory.len(), "zone_id": zone.id,
                "virtio_mem": false, "file_offset": 0,
            })
        })
        .collect();
    let manager = serde_json::json!({
        "memory_ranges": {"data": ranges},
        "guest_ram_mappings": mappings,
        "start_of_device_area": 0, "boot_ram": 0, "current_ram": 0, "next_memory_slot": 3,
    });
    let state = serde_json::json!({
        "snapshots": {
            "cpu-manager": {"snapshots": {}, "snapshot_data": null},
            "memory-manager": {"snapshots": {}, "snapshot_data": {"state": manager.to_string()}},
        },
        "snapshot_data": null,
    });
    fs::write(dir.join("state.json"), state.to_string())?;
    let memory: Vec<u8> = saved().flat_map(|zone| zone.memory.iter().copied()).collect();
    if memory.is_empty() {
        return Ok(());
    }
    fs::write(dir.join("memory-ranges"), memory)
}
