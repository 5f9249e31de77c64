//! Packs whose checksums match, but not their hashes: made by a hand, not by a bad disk.

use std::sync::Arc;

use dormouse_image::block::BLOCK_BYTES;
use dormouse_image::codec::{Codec, Decoder};
use dormouse_image::digest::checksum;
use dormouse_image::error::{ErrorKind, Result};
use dormouse_image::pack::{FOOTER_BYTES, PackReader, RECORD_HEADER_BYTES};

use crate::sample::{Sample, key};

fn sample() -> Sample {
    Sample::new(1, 20, 2, 1, &[Codec::Raw])
}

/// Makes the checksum of a record match its bytes again.
fn sign(bytes: &mut [u8], offset: u64, len: u32) {
    let record = &mut bytes[offset as usize..][..len as usize];
    let (head, payload) = record.split_at(RECORD_HEADER_BYTES);
    let sum = checksum(&[&head[..24], payload]);
    record[24..32].copy_from_slice(&sum.to_le_bytes());
}

fn open(bytes: Vec<u8>) -> Result<PackReader> {
    let len = bytes.len() as u64;
    PackReader::open(Arc::new(bytes), 0, len)
}

#[test]
fn a_segment_of_another_pack_is_refused() {
    let sample = sample();
    let entry = sample.pack.toc.segments[0];
    let mut bytes = sample.bytes.clone();
    bytes[entry.offset as usize + entry.bytes as usize - 1] ^= 1;
    sign(&mut bytes, entry.offset, entry.bytes);
    let error = open(bytes).unwrap().segment(0).unwrap_err();
    assert_eq!((error.kind(), error.what()), (ErrorKind::Corrupt, "segment hash"));
}

/// A bit of a compressed node may mean nothing to the compressor; any other is found.
#[test]
fn a_node_of_another_pack_is_refused() {
    let sample = sample();
    let same = vec![sample.nodes[0].clone(), sample.nodes[0].clone()];
    let sample = Sample::of(sample.blocks, same, 1, &[Codec::Raw]);
    let entry = sample.pack.toc.nodes[0];
    let mut refused = 0;
    for at in 0..entry.bytes - 32 {
        let mut bytes = sample.bytes.clone();
        bytes[entry.offset as usize + RECORD_HEADER_BYTES + at as usize] ^= 1;
        sign(&mut bytes, entry.offset, entry.bytes);
        let reader = open(bytes).unwrap();
        let sound = reader.node(1).unwrap();
        match reader.node(0) {
            Ok(node) => assert!(node == sound, "another node, by byte {at}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > entry.bytes - 40, "{refused} of {} bytes", entry.bytes - 32);
}

/// Whoever asked for one pack must not be given another.
#[test]
fn a_pack_under_another_name_is_refused() {
    let sample = sample();
    let mut bytes = sample.bytes.clone();
    let footer = bytes.len() - FOOTER_BYTES;
    bytes[footer + 40] ^= 1;
    let sum = checksum(&[&bytes[footer..footer + 56]]);
    bytes[footer + 56..].copy_from_slice(&sum.to_le_bytes());
    let error = open(bytes).unwrap_err();
    assert_eq!((error.kind(), error.what()), (ErrorKind::Corrupt, "pack id"));

    let table = sample.reader().records_end();
    let mut bytes = sample.bytes.clone();
    bytes[table as usize + RECORD_HEADER_BYTES + 16] ^= 1;
    let table_bytes = u32::try_from(footer as u64 - table).unwrap();
    sign(&mut bytes, table, table_bytes);
    let error = open(bytes).unwrap_err();
    assert_eq!((error.kind(), error.what()), (ErrorKind::Corrupt, "pack id"));
}

/// A block is not seen before it was checked, and a bad one does not spoil its neighbours.
#[test]
fn a_lazy_frame_refuses_the_forged_block_only() {
    let (sample, key) = (sample(), key());
    let sound = sample.reader();
    let segment = sound.segment(0).unwrap();
    let blocks = segment.frame_slots(0).len();
    let mut decoder = Decoder::new().unwrap();
    let mut bytes = sample.bytes.clone();
    let at = sound.frame_offset(&segment, 0) as usize;
    let record_bytes = RECORD_HEADER_BYTES + blocks * BLOCK_BYTES;
    bytes[at + RECORD_HEADER_BYTES + BLOCK_BYTES + 9] ^= 1;
    sign(&mut bytes, at as u64, record_bytes as u32);
    let forged = open(bytes).unwrap();
    let frame = forged.lazy_frame(0, &segment, 0, &key, &mut decoder).unwrap();
    let expected = sound.frame(0, &segment, 0, &key, &mut decoder).unwrap();
    assert_eq!(frame.blocks(), blocks);
    for _ in 0..2 {
        assert!(frame.checked(0..1, &key).unwrap() == expected.block(0));
        for range in [1..2, 0..2, 0..blocks] {
            let error = frame.checked(range, &key).unwrap_err();
            assert_eq!((error.kind(), error.what()), (ErrorKind::Corrupt, "block digest"));
        }
        let rest = frame.checked(2..blocks, &key).unwrap();
        assert!(rest == &expected.bytes()[2 * BLOCK_BYTES..]);
    }
}
