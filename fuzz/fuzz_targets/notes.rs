//! Notes of a live disk: as they come, and with their checksums made to match.
#![no_main]

use dormouse_image::digest::checksum;
use dormouse_live::files::BootId;
use dormouse_live::notes::{NOTE_BYTES, NOTES_HEADER_BYTES, NotesHeader};
use libfuzzer_sys::fuzz_target;

const BOOT: BootId = BootId([7; 16]);

fuzz_target!(|data: &[u8]| {
    open(data);
    if data.len() < NOTES_HEADER_BYTES {
        return;
    }
    let mut signed = data.to_vec();
    signed[16..32].copy_from_slice(&BOOT.0);
    let sum = checksum(&[&signed[..56]]);
    signed[56..64].copy_from_slice(&sum.to_le_bytes());
    let epoch = signed[32..40].to_vec();
    for (number, record) in (0_u64..).zip(signed[NOTES_HEADER_BYTES..].chunks_exact_mut(NOTE_BYTES))
    {
        let sum = checksum(&[&BOOT.0, &epoch, &number.to_le_bytes(), &record[..24]]);
        record[24..].copy_from_slice(&sum.to_le_bytes());
    }
    open(&signed);
});

fn open(data: &[u8]) {
    let Ok(Some(header)) = NotesHeader::parse(data, BOOT) else { return };
    let records = &data[NOTES_HEADER_BYTES..];
    let Ok(notes) = header.parse_notes(records) else { return };
    for (number, note) in notes.iter().enumerate() {
        assert!(note.blocks.start < note.blocks.end && note.blocks.end <= 1 << 32);
        let at = number * NOTE_BYTES;
        assert_eq!(header.encode_note(number as u64, note), records[at..at + NOTE_BYTES]);
    }
}
