//! Heads of Firecracker's states: a bit more or less is seen by the checksum.
#![no_main]

use dormouse_vmm::firecracker::vmstate::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some(header) = parse(data) else { return };
    if header.is_whole {
        let mut damaged = data.to_vec();
        let last = damaged.len() - 9;
        damaged[last] ^= 1;
        assert!(parse(&damaged).is_none_or(|header| !header.is_whole));
    }
});
