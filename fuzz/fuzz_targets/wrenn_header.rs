//! wrenn's header: what is accepted covers its device, and is written as it was read.
#![no_main]

use dormouse_formats::replay::check_plain;
use dormouse_formats::wrenn::Header;
use dormouse_fuzz::foreign::check_map;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(header) = Header::parse(data) else { return };
    check_map(&header.map);
    check_plain(data, &header.map).expect("read again, it is the same");
    let again = header.encode();
    // Records that go on are joined, and a header without any is written with one.
    assert!(again.len() <= data.len().max(64 + 40));
    assert_eq!(Header::parse(&again).expect("ours"), header);
});
