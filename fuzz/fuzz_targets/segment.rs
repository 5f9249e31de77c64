//! The body of a segment, in a pack that is otherwise sound.
#![no_main]

use dormouse_fuzz::{header, read_everything, record, with_segment};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut pack = header();
    pack.extend(record(1, 0, 1, 0, 4096, &[7; 4096]));
    read_everything(&with_segment(pack, data));
});
