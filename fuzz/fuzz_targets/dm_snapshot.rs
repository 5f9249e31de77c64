//! A copy-on-write store of dm-snapshot.
#![no_main]

use dormouse_formats::dm_snapshot::{device_map, read_exceptions};
use dormouse_fuzz::foreign::check_map;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok((header, exceptions)) = read_exceptions(&data.to_vec()) else { return };
    assert!(exceptions.windows(2).all(|pair| pair[0].old < pair[1].old));
    let chunks = data.len() as u64 / header.chunk_bytes;
    assert!(exceptions.iter().all(|exception| exception.new < chunks));
    for size in [0, 512, 1 << 20, 1 << 30] {
        if let Ok(map) = device_map(header, &exceptions, size) {
            check_map(&map);
        }
    }
});
