//! A mapped-ram file: the pages and the rest of it are two maps that leave nothing out.
#![no_main]

use dormouse_formats::qemu::mapped_ram_maps;
use dormouse_fuzz::foreign::check_map;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok([memory, rest]) = mapped_ram_maps(&data.to_vec()) else { return };
    check_map(&memory);
    check_map(&rest);
    assert_eq!(rest.size_bytes(), data.len() as u64);
});
