//! The beginning of a migration stream.
#![no_main]

use dormouse_formats::qemu::stream::{Stream, bitmap_bytes};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(stream) = Stream::read(&data.to_vec()) else { return };
    let mut end = 0;
    for block in &stream.blocks {
        assert!(block.bytes > 0);
        let Some(mapped) = block.mapped else { continue };
        assert!(mapped.bitmap_offset > end);
        assert!(
            mapped.bitmap_offset + bitmap_bytes(block.bytes, mapped.page_bytes)
                <= mapped.pages_offset
        );
        end = mapped.pages_offset + block.bytes;
    }
});
