//! wrenn's `rootfs.meta`.
#![no_main]

use dormouse_formats::wrenn::RootMeta;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(meta) = RootMeta::parse(data) else { return };
    assert!(meta.base_template.as_os_str().len() <= data.len());
});
