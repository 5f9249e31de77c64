//! Damaged packs: what can be made again is, what cannot is named.

use std::ops::Range;
use std::sync::Arc;

use dormouse_image::codec::Codec;
use dormouse_image::digest::{Digest, DomainKey, checksum};
use dormouse_image::error::{ErrorKind, Result};
use dormouse_image::pack::{
    FOOTER_BYTES, HEADER_BYTES, Live, PackReader, RECORD_HEADER_BYTES, ReadAt, rebuild_pack,
    repair_pack, rewrite_pack,
};

use crate::random::Random;
use crate::sample::{CODECS, Contents, Faulty, Sample, key};

fn rebuild_from(sample: &Sample, file: Faulty) -> Result<PackReader> {
    let file: Arc<dyn ReadAt> = Arc::new(file);
    let id = sample.pack.id;
    let bytes = sample.bytes.len() as u64;
    let (pack, bytes) = rebuild_pack(&file, 0, bytes, id, &key(), Vec::new())?;
    assert_eq!(pack.id, id);
    PackReader::open(Arc::new(bytes), 0, pack.bytes)
}

fn rebuild(sample: &Sample, bytes: Vec<u8>) -> Result<PackReader> {
    rebuild_from(sample, Faulty { bytes, ..Faulty::default() })
}

fn scribble(random: &mut Random, bytes: &mut [u8], range: Range<u64>) {
    random.fill(&mut bytes[range.start as usize..range.end as usize]);
}

/// The parts of a pack that hold nothing which is not said elsewhere.
fn parts(sample: &Sample) -> Vec<(&'static str, Range<u64>)> {
    let reader = sample.reader();
    let end = sample.pack.bytes;
    let mut parts = vec![
        ("header", 0..HEADER_BYTES as u64),
        ("table of contents", reader.records_end()..end - FOOTER_BYTES as u64),
        ("footer", end - FOOTER_BYTES as u64..end),
        ("table and footer", reader.records_end()..end),
    ];
    let segments = &reader.toc().segments;
    parts.extend(segments.iter().map(|at| ("segment", at.offset..at.offset + u64::from(at.bytes))));
    parts
}

#[test]
fn what_is_said_twice_is_made_again() {
    let mut random = Random::new(1);
    for slots in [0, 1, 17, 1024, 2100] {
        let sample = Sample::new(slots, slots as usize, 9, 77, &CODECS);
        sample.check(&rebuild(&sample, sample.bytes.clone()).unwrap());
        for (what, range) in parts(&sample) {
            let mut bytes = sample.bytes.clone();
            scribble(&mut random, &mut bytes, range.clone());
            let rebuilt = rebuild(&sample, bytes).unwrap_or_else(|error| panic!("{what}: {error}"));
            sample.check(&rebuilt);
        }
        // All of it at once, but for the header or the footer: one of them must name the salt.
        let mut bytes = sample.bytes.clone();
        for (_, range) in parts(&sample).into_iter().skip(1) {
            scribble(&mut random, &mut bytes, range);
        }
        sample.check(&rebuild(&sample, bytes).unwrap());
    }
}

/// Without header and footer the salt is that of the first record.
#[test]
fn without_header_and_footer_the_records_are_enough() {
    let mut random = Random::new(2);
    let sample = Sample::new(2, 40, 3, 99, &CODECS);
    let mut bytes = sample.bytes.clone();
    scribble(&mut random, &mut bytes, 0..HEADER_BYTES as u64);
    scribble(&mut random, &mut bytes, sample.reader().records_end()..sample.pack.bytes);
    sample.check(&rebuild(&sample, bytes).unwrap());
}

/// A medium error ended the rebuild, though it is just what a rebuild is for.
#[test]
fn what_cannot_be_read_is_stepped_over() {
    for slots in [17, 1024, 2100] {
        let sample = Sample::new(3, slots, 9, 77, &CODECS);
        for (what, range) in parts(&sample) {
            // Sectors inside the part; header and footer are shorter than one.
            let bad = match range.start.next_multiple_of(512)..range.end / 512 * 512 {
                sectors if sectors.is_empty() => range,
                sectors => sectors,
            };
            let file = Faulty { bytes: sample.bytes.clone(), bad: vec![bad], ..Faulty::default() };
            let rebuilt = rebuild_from(&sample, file).unwrap_or_else(|e| panic!("{what}: {e}"));
            sample.check(&rebuilt);
        }
    }
}

#[test]
fn a_lost_frame_is_named() {
    let mut random = Random::new(4);
    let sample = Sample::new(4, 1200, 4, 5, &CODECS);
    let reader = sample.reader();
    for number in 0..2 {
        let segment = reader.segment(number).unwrap();
        for frame in 0..segment.frames() {
            let at = reader.frame_offset(&segment, frame) + random.below(60);
            let mut bytes = sample.bytes.clone();
            bytes[at as usize] ^= 1;
            let error = rebuild(&sample, bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Missing, "{error}");
            assert_eq!(error.what(), "frame of segment");
        }
    }
}

#[test]
fn a_lost_node_is_named() {
    let sample = Sample::new(5, 20, 6, 5, &CODECS);
    for number in 0..6 {
        let mut bytes = sample.bytes.clone();
        bytes[sample.pack.toc.nodes[number].offset as usize + 40] ^= 1;
        let error = rebuild(&sample, bytes).unwrap_err();
        assert_eq!((error.kind(), error.what()), (ErrorKind::Missing, "node"), "{number}");
    }
}

#[test]
fn the_wrong_key_makes_nothing_again() {
    let sample = Sample::new(6, 20, 1, 5, &CODECS);
    let other = DomainKey::new([1; 32]);
    let id = sample.pack.id;
    let refused = rebuild_pack(&sample.file(), 0, sample.pack.bytes, id, &other, Vec::new());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::WrongKey);
    let mut bytes = sample.bytes.clone();
    bytes[..HEADER_BYTES].fill(0);
    let file: Arc<dyn ReadAt> = Arc::new(bytes);
    rebuild_pack(&file, 0, sample.pack.bytes, id, &other, Vec::new()).unwrap_err();
}

/// Guests run stores of their own: a raw frame may hold a whole pack, down to the last byte. Its
/// records are of another salt and stay a guest's bytes, even when the frame around them is lost.
#[test]
fn a_pack_inside_a_guests_disk_is_not_taken_for_ours() {
    let inside = Sample::new(7, 3, 2, 1111, &[Codec::Raw]);
    let mut bytes = inside.bytes.clone();
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    let blocks: Vec<_> = bytes.chunks(4096).map(<[u8]>::to_vec).collect();
    let sample = Sample::of(blocks, inside.nodes.clone(), 2222, &[Codec::Raw]);
    let reader = sample.reader();
    let segment = reader.segment(0).unwrap();
    for (what, range) in parts(&sample) {
        let mut bytes = sample.bytes.clone();
        bytes[range.start as usize..range.end as usize].fill(0);
        let rebuilt = rebuild(&sample, bytes).unwrap_or_else(|error| panic!("{what}: {error}"));
        sample.check(&rebuilt);
    }
    let mut bytes = sample.bytes.clone();
    bytes[reader.frame_offset(&segment, 0) as usize] = 0;
    assert_eq!(rebuild(&sample, bytes).unwrap_err().kind(), ErrorKind::Missing);
}

/// A pack of which most was dropped: a segment in part, others and most nodes as a whole, the last
/// segment among them, so that no record is left that tells how many slots there were.
fn rewritten() -> Sample {
    let sample = Sample::new(8, 4000, 9, 5, &CODECS);
    let mut live = Live::new();
    live.add_slots(1100, 300);
    live.add_slots(1500, 2);
    live.add_node(3);
    let (pack, bytes) =
        rewrite_pack(&sample.reader(), &live, &key(), Codec::Lz4, 6, Vec::new()).unwrap();
    Sample { bytes, pack, blocks: Vec::new(), nodes: Vec::new() }
}

/// The record of [`rewritten`] that says what was dropped: three segments and eight nodes.
fn dropped_record() -> Range<u64> {
    let start = HEADER_BYTES as u64;
    start..start + (RECORD_HEADER_BYTES + 8 + 24 * (3 + 8)) as u64
}

/// Hashes of what a rewrite had dropped as a whole stood in the table of contents alone: damage to
/// one byte of that table lost the pack for good. Without using even that, damage to a header of
/// 72 bytes did.
#[test]
fn a_rewritten_pack_is_made_again_from_its_table_or_from_its_records() {
    let mut random = Random::new(8);
    let rewritten = rewritten();
    let kept = Contents::read(&rewritten.reader());
    let dropped = dropped_record();
    assert_eq!(rewritten.bytes[dropped.start as usize + 4], 5, "the kind of record");
    let mut cases = parts(&rewritten);
    cases.retain(|(_, range)| range.start < range.end);
    cases.push(("dropped", dropped.clone()));
    for (what, range) in cases {
        let mut bytes = rewritten.bytes.clone();
        scribble(&mut random, &mut bytes, range);
        match (what, rebuild(&rewritten, bytes)) {
            ("segment", Err(error)) => {
                assert_eq!(error.kind(), ErrorKind::Missing, "{what}: {error}");
            }
            ("segment", Ok(_)) => panic!("digests of dropped slots came from nowhere"),
            (_, Err(error)) => panic!("{what}: {error}"),
            (_, Ok(reader)) => {
                assert_eq!(reader.toc().live_slots(), 302);
                let again = Contents::read(&reader);
                assert_eq!(again.blocks.len(), kept.blocks.len());
                for (again, kept) in again.blocks.iter().zip(&kept.blocks) {
                    assert_eq!(again.as_ref().ok(), kept.as_ref().ok());
                }
                assert_eq!(again.nodes.len(), kept.nodes.len());
                for (again, kept) in again.nodes.iter().zip(&kept.nodes) {
                    assert_eq!(again.as_ref().ok(), kept.as_ref().ok());
                }
            }
        }
    }
}

/// A rebuilt copy says again what was dropped: the second rebuild finds as much as the first.
#[test]
fn a_rebuilt_pack_can_be_rebuilt() {
    let rewritten = rewritten();
    let file = rewritten.file();
    let id = rewritten.pack.id;
    let (_, first) = rebuild_pack(&file, 0, rewritten.pack.bytes, id, &key(), Vec::new()).unwrap();
    assert_eq!(first, rewritten.bytes, "a sound pack is copied as it is");
    let cut = rewritten.reader().records_end();
    let file: Arc<dyn ReadAt> = Arc::new(first[..cut as usize].to_vec());
    let (pack, second) = rebuild_pack(&file, 0, cut, id, &key(), Vec::new()).unwrap();
    assert_eq!((pack.id, second), (id, first));
}

/// A pack whose blocks were mended is a new file: it says what was dropped as well.
#[test]
fn a_repaired_pack_can_be_rebuilt() {
    let rewritten = rewritten();
    let mut find = |_: u32, _: &Digest| None;
    let (repaired, bytes) =
        repair_pack(&rewritten.reader(), &key(), Codec::Raw, 7, &mut find, Vec::new()).unwrap();
    assert!(repaired.lost.is_empty());
    let pack = repaired.finished;
    let cut = PackReader::open(Arc::new(bytes.clone()), 0, pack.bytes).unwrap().records_end();
    let file: Arc<dyn ReadAt> = Arc::new(bytes[..cut as usize].to_vec());
    let (_, rebuilt) = rebuild_pack(&file, 0, cut, pack.id, &key(), Vec::new()).unwrap();
    assert_eq!(rebuilt, bytes);
}

/// With both witnesses gone it is said what is lost, and a forged one makes another id.
#[test]
fn what_was_dropped_has_two_witnesses() {
    let rewritten = rewritten();
    let table = rewritten.reader().records_end();
    let dropped = dropped_record();
    let mut bytes = rewritten.bytes[..table as usize].to_vec();
    bytes[dropped.end as usize - 1] ^= 1;
    let error = rebuild(&rewritten, bytes.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Missing, "{error}");
    let record = &mut bytes[dropped.start as usize..dropped.end as usize];
    let (head, payload) = record.split_at(RECORD_HEADER_BYTES);
    let sum = checksum(&[&head[..24], payload]);
    record[24..32].copy_from_slice(&sum.to_le_bytes());
    bytes.resize(rewritten.bytes.len(), 0);
    let error = rebuild(&rewritten, bytes).unwrap_err();
    assert_eq!((error.kind(), error.what()), (ErrorKind::Corrupt, "rebuilt pack id"));
}

/// Packs that lose nothing as a whole are written as before: no record says so.
#[test]
fn nothing_is_said_where_nothing_was_dropped() {
    let sample = Sample::new(9, 2000, 2, 5, &CODECS);
    let mut live = Live::new();
    live.add_slots(3, 1);
    live.add_slots(1999, 1);
    live.add_node(0);
    live.add_node(1);
    let (_, bytes) =
        rewrite_pack(&sample.reader(), &live, &key(), Codec::Lz4, 6, Vec::new()).unwrap();
    assert_eq!(bytes[HEADER_BYTES + 4], 1, "a frame follows the header");
}

/// Two copies of one frame record, as a torn copy of the file may leave them, counted twice: the
/// copy got more frames than its slots need, and a sound id over an unreadable segment.
#[test]
fn a_frame_found_twice_counts_once() {
    let sample = Sample::new(9, 40, 1, 5, &CODECS);
    let reader = sample.reader();
    let segment = reader.segment(0).unwrap();
    let [first, second] = [0, 1].map(|frame| reader.frame_offset(&segment, frame) as usize);
    let mut bytes = sample.bytes[..second].to_vec();
    bytes.extend(&sample.bytes[first..]);
    let twice = Sample { bytes, ..sample };
    let rebuilt = rebuild(&twice, twice.bytes.clone()).unwrap();
    twice.check(&rebuilt);
}

/// Bytes of any kind before and after the records cost nothing but the search.
#[test]
fn junk_between_records_is_stepped_over() {
    let mut random = Random::new(10);
    for seed in 0..20 {
        let sample = Sample::new(10 + seed, 60, 4, 5, &CODECS);
        let reader = sample.reader();
        let segment = reader.segment(0).unwrap();
        let at = reader.frame_offset(&segment, random.index(segment.frames())) as usize;
        let mut junk = vec![0; random.index(200_000)];
        if random.one_in(2) {
            random.fill(&mut junk);
        }
        junk.extend(b"DMr\x1aDMr\x1a\x01DM");
        let mut bytes = sample.bytes.clone();
        bytes.splice(at..at, junk);
        let sample = Sample { bytes, ..sample };
        sample.check(&rebuild(&sample, sample.bytes.clone()).unwrap());
    }
}

#[test]
fn a_truncated_pack_is_made_again_or_named() {
    let sample = Sample::new(30, 100, 3, 5, &CODECS);
    let records_end = sample.reader().records_end();
    let mut random = Random::new(31);
    for _ in 0..50 {
        let len = random.below(sample.pack.bytes);
        let cut = Sample {
            bytes: sample.bytes[..len as usize].to_vec(),
            pack: sample.pack.clone(),
            blocks: sample.blocks.clone(),
            nodes: sample.nodes.clone(),
        };
        match rebuild(&cut, cut.bytes.clone()) {
            Ok(reader) => cut.check(&reader),
            Err(error) => assert!(len < records_end, "{error}"),
        }
    }
}
