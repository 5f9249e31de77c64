//! What `qemu-img info` and `qemu-img map` print: runs are whole blocks, in order, and inside the disk.
#![no_main]

use dormouse_formats::disk::{Info, runs_of_map};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = Info::parse(data, "/disk");
    for size_bytes in [0, 512, 1 << 20, (1 << 20) + 512, 1 << 40] {
        for has_lower in [false, true] {
            let Ok(runs) = runs_of_map(data, size_bytes, has_lower) else { continue };
            let mut end = 0;
            for (range, _) in runs {
                assert!(range.start >= end && range.start < range.end && range.end <= size_bytes);
                assert_eq!(range.start % 4096, 0);
                assert!(range.end % 4096 == 0 || range.end == size_bytes);
                end = range.end;
            }
        }
    }
});
