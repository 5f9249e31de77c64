//! A manifest: what is read is written so that it reads the same, as it comes and in an envelope
//! whose length and checksum match.
#![no_main]

use dormouse_image::digest::checksum;
use dormouse_store::manifest::Manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    check(data);
    // The body of a file, or else the whole input as a body.
    let body = data
        .windows(12)
        .position(|bytes| bytes == b"\"manifest\":{")
        .map_or(data, |at| &data[at + 11..])
        .trim_ascii_end();
    for body in [body, body.strip_suffix(b"}").unwrap_or(body)] {
        let mut file = format!(
            "{{\"format\":\"dormouse-snapshot\",\"version\":1,\"length\":{},\
             \"checksum\":\"xxh3:{:016x}\",\"manifest\":",
            body.len(),
            checksum(&[body])
        )
        .into_bytes();
        file.extend(body);
        file.push(b'}');
        check(&file);
    }
});

fn check(file: &[u8]) {
    let Ok(manifest) = Manifest::decode(file) else { return };
    for entry in &manifest.images {
        entry.map().expect("was checked");
        assert_eq!(manifest.image(&entry.image), Some(entry));
    }
    let encoded = manifest.encode().expect("short inputs stay under the limit");
    let again = Manifest::decode(&encoded).expect("what was written is read");
    assert_eq!(again, manifest);
    assert_eq!(again.encode().expect("was written before"), encoded);
}
