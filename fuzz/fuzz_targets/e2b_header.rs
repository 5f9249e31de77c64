//! E2B's headers of all versions: as they come, and with the input as the block of version 4 or 5.
#![no_main]

use std::io::Write;

use dormouse_formats::e2b::header::Header;
use dormouse_formats::replay::check_plain;
use dormouse_fuzz::foreign::check_map;
use libfuzzer_sys::fuzz_target;
use lz4_flex::frame::FrameEncoder;

fuzz_target!(|data: &[u8]| {
    read(data);
    if data.len() < 64 {
        return;
    }
    let (head, block) = data.split_at(64);
    for version in [4, 5] {
        let mut header = head.to_vec();
        header[..8].copy_from_slice(&u64::to_le_bytes(version));
        header[8..16].copy_from_slice(&4096_u64.to_le_bytes());
        header.push(0);
        header.extend((block.len() as u32).to_le_bytes());
        let mut encoder = FrameEncoder::new(header);
        encoder.write_all(block).expect("into memory");
        read(&encoder.finish().expect("into memory"));
    }
});

fn read(data: &[u8]) {
    let Ok(mut header) = Header::parse(data) else { return };
    check_map(&header.map);
    check_plain(data, &header.map).expect("read again, it is the same");
    for entry in header.builds.values() {
        let mut end = 0;
        for frame in &entry.frames {
            assert!(frame.decoded_at >= end);
            end = frame.decoded_at + u64::from(frame.decoded_bytes);
        }
    }
    header.metadata.version = 5;
    header.trailing_bytes = 0;
    if let Ok(again) = header.encode() {
        assert_eq!(Header::parse(&again).expect("ours"), header);
    }
}
