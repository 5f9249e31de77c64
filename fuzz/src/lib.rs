//! Hostile packs with sound checksums: the harness signs what the fuzzer made up, so that it gets
//! past the checksums to the parsers behind them. Offsets are those of `docs/format.md`.

pub mod disk;
pub mod foreign;
pub mod nbd;

use std::sync::Arc;

use dormouse_image::codec::Decoder;
use dormouse_image::digest::{DomainKey, KeyId, checksum, structure_hash};
use dormouse_image::pack::{
    FOOTER_BYTES, HEADER_BYTES, PackId, PackIdParts, PackParams, PackReader, RECORD_HEADER_BYTES,
    ReadAt, rebuild_pack,
};

/// An empty file in memory, gone with its descriptor.
pub fn memory_file() -> std::fs::File {
    use std::os::unix::fs::OpenOptionsExt;
    /// `O_TMPFILE` of Linux on x86.
    const TMPFILE: i32 = 0o20_200_000;
    let mut options = std::fs::File::options();
    options.read(true).write(true).custom_flags(TMPFILE).open("/dev/shm").expect("a tmpfs")
}

/// The salt of every pack that the harness makes.
pub const SALT: u32 = 0x1357_9bdf;

/// The kind of the record that says what was dropped.
const DROPPED: u8 = 5;

/// The key of the golden files.
pub fn key() -> DomainKey {
    DomainKey::new([0x5a; 32])
}

/// A number at `at`, 0 past the end.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk::<4>())
        .map_or(0, |number| u32::from_le_bytes(*number))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// A record with a sound checksum.
pub fn record(
    kind: u8,
    encoding: u8,
    count: u16,
    index: u32,
    raw_bytes: u32,
    payload: &[u8],
) -> Vec<u8> {
    let mut record = b"DMr\x1a".to_vec();
    record.extend([kind, encoding]);
    record.extend(count.to_le_bytes());
    record.extend(index.to_le_bytes());
    record.extend(u32::try_from(payload.len()).expect("short inputs").to_le_bytes());
    record.extend(raw_bytes.to_le_bytes());
    record.extend(SALT.to_le_bytes());
    let sum = checksum(&[&record, payload]);
    record.extend(sum.to_le_bytes());
    record.extend(payload);
    record
}

/// A header with a sound checksum.
pub fn header() -> Vec<u8> {
    let mut header = b"\x89DMpack\n\x01\x00\x48\x00\x01\x00\x00\x00".to_vec();
    header.extend(key().id().0);
    header.extend([0; 16]);
    header.extend(SALT.to_le_bytes());
    header.extend([0; 12]);
    let sum = checksum(&[&header]);
    header.extend(sum.to_le_bytes());
    header
}

/// Ends a pack of header and records with a table of contents and a footer.
pub fn finish(mut pack: Vec<u8>, toc: &[u8]) -> Vec<u8> {
    let toc_offset = pack.len() as u64;
    let length = u32::try_from(toc.len()).expect("short inputs");
    let toc = record(4, 0, 0, 0, length, toc);
    pack.extend(&toc);
    let mut footer = b"\x89DMpend\n\x01\x00\x00\x00".to_vec();
    footer.extend(SALT.to_le_bytes());
    footer.extend(toc_offset.to_le_bytes());
    footer.extend((toc.len() as u64).to_le_bytes());
    footer.extend([0; 32]);
    pack.extend(footer);
    sign(&mut pack);
    pack
}

/// A row of a table of contents.
pub fn row(hash: [u8; 16], offset: usize, bytes: usize, extra: u32) -> Vec<u8> {
    let mut row = hash.to_vec();
    row.extend((offset as u64).to_le_bytes());
    row.extend(u32::try_from(bytes).expect("short inputs").to_le_bytes());
    row.extend(extra.to_le_bytes());
    row
}

/// Makes every checksum of a pack match, and its length and id, as far as its parts can be found.
pub fn sign(pack: &mut [u8]) {
    if pack.len() < HEADER_BYTES + RECORD_HEADER_BYTES + FOOTER_BYTES {
        return;
    }
    let sum = checksum(&[&pack[..HEADER_BYTES - 8]]);
    pack[HEADER_BYTES - 8..HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
    let first = HEADER_BYTES + RECORD_HEADER_BYTES;
    let end = first.saturating_add(u32_at(pack, HEADER_BYTES + 12) as usize);
    if pack[HEADER_BYTES + 4] == DROPPED && end <= pack.len() {
        sign_record(&mut pack[HEADER_BYTES..end]);
    }
    let footer = pack.len() - FOOTER_BYTES;
    let toc = usize::try_from(u64_at(pack, footer + 16)).unwrap_or(usize::MAX);
    let body = toc.saturating_add(RECORD_HEADER_BYTES);
    if body <= footer {
        let entries = (footer - body).saturating_sub(16) / 32;
        let segments = (u32_at(pack, body + 4) as usize).min(entries);
        let mut hashes = Vec::new();
        for entry in 0..entries {
            let row = body + 16 + entry * 32;
            let offset = usize::try_from(u64_at(pack, row + 16)).unwrap_or(usize::MAX);
            let bytes = u32_at(pack, row + 24) as usize;
            if offset.checked_add(bytes).is_some_and(|end| end <= toc) {
                sign_record(&mut pack[offset..offset + bytes]);
            }
            hashes.push(*pack[row..].first_chunk::<16>().expect("inside the table"));
        }
        sign_record(&mut pack[toc..footer]);
        let (segments, nodes) = hashes.split_at(segments);
        let key_id = *pack[16..].first_chunk::<16>().expect("inside the header");
        let params = PackParams::new(KeyId(key_id), 0);
        let slots = u32_at(pack, body);
        let id = PackIdParts { params: &params, slots, segments, nodes }.id();
        pack[footer + 40..footer + 56].copy_from_slice(&id.0);
    }
    let length = pack.len() as u64;
    pack[footer + 32..footer + 40].copy_from_slice(&length.to_le_bytes());
    let sum = checksum(&[&pack[footer..footer + 56]]);
    pack[footer + 56..].copy_from_slice(&sum.to_le_bytes());
}

fn sign_record(record: &mut [u8]) {
    if record.len() >= RECORD_HEADER_BYTES {
        let (head, payload) = record.split_at(RECORD_HEADER_BYTES);
        let sum = checksum(&[&head[..24], payload]);
        record[24..32].copy_from_slice(&sum.to_le_bytes());
    }
}

/// Opens a pack and reads everything; nothing may panic, and what opens has the promised shape.
pub fn read_everything(pack: &[u8]) -> Option<PackId> {
    let file: Arc<dyn ReadAt> = Arc::new(pack.to_vec());
    let reader = PackReader::open(Arc::clone(&file), 0, pack.len() as u64).ok()?;
    let mut decoder = Decoder::new().expect("zstd has memory");
    for number in 0..reader.toc().segments.len().min(64) {
        let Ok(segment) = reader.segment(number) else { continue };
        for slot in 0..segment.slots() {
            let located = segment.locate(slot);
            assert_eq!(located.is_some(), segment.is_present(slot));
            if let Some((frame, position)) = located {
                assert_eq!(segment.frame_slots(frame)[position], slot);
            }
        }
        for frame in 0..segment.frames() {
            if let Ok(decoded) = reader.frame(number, &segment, frame, &key(), &mut decoder) {
                assert_eq!(decoded.blocks(), segment.frame_slots(frame).len());
            }
        }
    }
    for number in 0..u32::try_from(reader.toc().nodes.len().min(64)).expect("at most 64") {
        drop(reader.node(number));
    }
    let rebuilt = rebuild_pack(&file, 0, pack.len() as u64, reader.id(), &key(), Vec::new());
    if let Ok((finished, bytes)) = rebuilt {
        assert_eq!(finished.id, reader.id());
        PackReader::open(Arc::new(bytes), 0, finished.bytes).expect("a rebuilt pack opens");
    }
    // Without its table, too: the records may say enough.
    let cut = reader.records_end();
    let rebuilt = rebuild_pack(&file, 0, cut, reader.id(), &key(), Vec::new());
    if let Ok((finished, _)) = rebuilt {
        assert_eq!((finished.id, &finished.toc.slots), (reader.id(), &reader.toc().slots));
    }
    Some(reader.id())
}

/// A pack with one segment, whose body is `body`, behind the records in `pack`.
pub fn with_segment(mut pack: Vec<u8>, body: &[u8]) -> Vec<u8> {
    let slots = u32_at(body, 0) & 0xffff;
    let digests = body.len().saturating_sub(slots as usize * 16);
    let live = match u32_at(body, 4) & 1 {
        1 => body.iter().skip(8).take(128).map(|byte| byte.count_ones()).sum(),
        _ => slots,
    };
    let segment = record(2, 0, slots.min(1024) as u16, 0, body.len() as u32, body);
    let mut toc = slots.to_le_bytes().to_vec();
    toc.extend(1_u32.to_le_bytes());
    toc.extend([0; 8]);
    toc.extend(row(structure_hash([&body[digests..]]), pack.len(), segment.len(), live));
    pack.extend(segment);
    finish(pack, &toc)
}
