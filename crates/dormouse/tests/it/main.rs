//! The command from outside: what is typed, printed, written and returned.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod bad_input;
mod daemon;
mod daemon_api;
mod daemon_bounds;
mod daemon_fixture;
mod daemon_systemd;
mod ending;
mod ext4;
mod ext4_guest;
mod ext4_registry;
mod fixture;
mod forgetting;
mod formats;
mod host_file_systems;
mod json;
mod judges;
mod live_disk;
mod live_full;
mod live_trouble;
mod many_processes;
mod memory;
mod memory_fixture;
mod memory_takeover;
mod mount;
mod mount_capture;
mod mount_guest;
mod mount_live;
mod mount_memory;
mod mount_takeover;
mod mounted;
mod punch;
mod nbd_fixture;
mod round_trip;
mod serving;
mod sources;
mod streams;
mod trace;
mod usage;
mod vm;
mod vm_descriptors;
mod vm_doubles;
mod vm_fixture;
mod vm_trouble;

dormouse_testkit::small_vmm!();
