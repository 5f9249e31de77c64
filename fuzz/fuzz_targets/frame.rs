//! A frame: encoding, count and place from the first bytes, the payload from the rest.
//!
//! Where the payload decodes, the harness digests what came out, so that the frame is accepted;
//! the reader must then hand out just these blocks.
#![no_main]

use std::sync::Arc;

use dormouse_fuzz::{header, key, read_everything, record, with_segment};
use dormouse_image::codec::{Decoder, Encoding};
use dormouse_image::pack::PackReader;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [encoding, count, slot, raw, payload @ ..] = data else { return };
    let blocks = usize::from(*count);
    let raw_bytes = if *raw == 0 { u32::from(*count) * 4096 } else { u32::from(*raw) << 20 };
    let mut decoded = vec![0; blocks * 4096];
    let list = if encoding & 0x80 != 0 { blocks * 2 } else { 0 };
    let decodes = Encoding::from_byte(encoding & 0x7f).is_ok_and(|encoding| {
        let stored = payload.get(list..).unwrap_or(&[]);
        let mut decoder = Decoder::new().expect("zstd has memory");
        decoder.decode(encoding, stored, &mut decoded).is_ok()
    });
    let mut pack = header();
    let place = pack.len() as u64;
    let frame = record(1, *encoding, u16::from(*count), u32::from(*slot), raw_bytes, payload);
    pack.extend(&frame);
    let slots = u16::from((*count).max(1));
    let mut segment = slots.to_le_bytes().to_vec();
    segment.extend([1, 0, 0, 0, 0, 0]);
    segment.extend(place.to_le_bytes());
    segment.extend((frame.len() as u32).to_le_bytes());
    segment.extend(decoded.chunks(4096).flat_map(|block| key().digest(block).0));
    segment.resize(20 + usize::from(slots) * 16, 0);
    let pack = with_segment(pack, &segment);
    read_everything(&pack);
    let bytes = pack.len() as u64;
    let Ok(reader) = PackReader::open(Arc::new(pack), 0, bytes) else { return };
    let Ok(segment) = reader.segment(0) else { return };
    let mut decoder = Decoder::new().expect("zstd has memory");
    if let Ok(read) = reader.frame(0, &segment, 0, &key(), &mut decoder) {
        assert!(decodes && read.bytes() == decoded);
    }
});
