//! A frame of data, zstd or LZ4: exactly as long as its header says, or refused.
#![no_main]

use dormouse_formats::e2b::frames::decode;
use dormouse_formats::replay::DataCodec;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&len, frame)) = data.split_first() else { return };
    let len = usize::from(len) * 257;
    for codec in [DataCodec::Zstd, DataCodec::Lz4] {
        if let Ok(decoded) = decode(codec, frame, len) {
            assert_eq!(decoded.len(), len);
        }
    }
});
