//! A bundle: as it comes, and with its checksums made to match.
#![no_main]

use dormouse_fuzz::{read_everything, u32_at};
use dormouse_image::digest::checksum;
use dormouse_image::pack::{Bundle, FOOTER_BYTES};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    open(data);
    let mut signed = data.to_vec();
    let Some(footer) = signed.len().checked_sub(FOOTER_BYTES) else { return };
    let directory = u32_at(&signed, footer + 16) as usize;
    if directory <= footer {
        let sum = checksum(&[&signed[directory..footer]]);
        signed[footer + 24..footer + 32].copy_from_slice(&sum.to_le_bytes());
    }
    let length = signed.len() as u64;
    signed[footer + 32..footer + 40].copy_from_slice(&length.to_le_bytes());
    let sum = checksum(&[&signed[footer..footer + 56]]);
    signed[footer + 56..].copy_from_slice(&sum.to_le_bytes());
    open(&signed);
});

fn open(data: &[u8]) {
    let Ok(bundle) = Bundle::open(&data.to_vec(), data.len() as u64) else { return };
    let mut end = 0;
    for entry in &bundle.entries {
        assert!(entry.offset >= end);
        end = entry.offset + entry.bytes;
        assert!(end <= data.len() as u64);
        read_everything(&data[entry.offset as usize..end as usize]);
    }
}
