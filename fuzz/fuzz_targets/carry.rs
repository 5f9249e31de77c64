//! A carry: as it comes, and with its checksums made to match.
#![no_main]

use dormouse_formats::carry::{Header, Record, RecordBody};
use dormouse_fuzz::u32_at;
use dormouse_image::digest::checksum;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    read(data);
    let mut signed = data.to_vec();
    if signed.len() < 32 {
        return;
    }
    let mut at = 32_usize.saturating_add(u32_at(&signed, 20) as usize);
    if at > signed.len() {
        return;
    }
    let sum = checksum(&[&signed[..24], &signed[32..at]]);
    signed[24..32].copy_from_slice(&sum.to_le_bytes());
    while signed.len() - at >= 32 {
        let end = at.saturating_add(32).saturating_add(u32_at(&signed, at + 4) as usize);
        if end > signed.len() {
            break;
        }
        let sum = checksum(&[&signed[at..at + 24], &signed[at + 32..end]]);
        signed[at + 24..at + 32].copy_from_slice(&sum.to_le_bytes());
        at = end;
    }
    read(&signed);
});

fn read(data: &[u8]) {
    let mut rest = data;
    let Ok(header) = Header::read(&mut rest) else { return };
    let mut again = Vec::new();
    header.write(&mut again).expect("into memory");
    assert_eq!(Header::read(&mut &again[..]).expect("ours"), header);
    let mut position = 0;
    while let Ok(record) = Record::read(&mut rest, &mut position) {
        if let RecordBody::Data(bytes) = &record.body {
            assert!(!bytes.is_empty() && bytes.len() <= 1 << 20 && bytes.len() % 4096 == 0);
        }
    }
}
