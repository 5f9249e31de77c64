//! What `qemu-img info` and `qemu-img map` print: runs are whole blocks, in order, and inside the disk.
#![no_main]

use dormouse_formats::disk::Info;
use dormouse_fuzz::foreign::check_disk_runs;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = Info::parse(data, "/disk");
    for size_bytes in [0, 512, 1 << 20, (1 << 20) + 512, 1 << 40] {
        for has_lower in [false, true] {
            check_disk_runs(data, size_bytes, has_lower);
        }
    }
});
