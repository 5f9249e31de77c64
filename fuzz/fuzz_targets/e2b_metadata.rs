//! E2B's `metadata.json`.
#![no_main]

use dormouse_formats::e2b::build::BuildMetadata;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = BuildMetadata::parse(data);
});
