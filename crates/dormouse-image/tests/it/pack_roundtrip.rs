//! Packs are read as they were written, whatever their size and compression.

use std::sync::Arc;

use dormouse_image::codec::{Codec, Decoder, Encoder};
use dormouse_image::digest::DomainKey;
use dormouse_image::error::ErrorKind;
use dormouse_image::pack::{
    EncodedFrame, FRAME_BLOCKS, PackParams, PackReader, PackWriter, SEGMENT_SLOTS,
};

use crate::random::Random;
use crate::sample::{CODECS, Contents, Sample, block, key};

#[test]
fn every_size_reads_back() {
    for (seed, slots) in (0..).zip([0, 1, 15, 16, 17, 1008, 1023, 1024, 1025, 2048, 5000]) {
        let nodes = if slots == 0 { 40 } else { slots / 40 };
        let sample = Sample::new(seed, slots, nodes, 7, &CODECS);
        assert_eq!(sample.pack.toc.slots as usize, slots);
        let reader = sample.reader();
        assert_eq!(reader.toc(), &sample.pack.toc);
        sample.check(&reader);
    }
}

#[test]
fn every_codec_reads_back() {
    for codec in CODECS {
        let sample = Sample::new(3, 200, 9, 1, &[codec]);
        sample.check(&sample.reader());
    }
}

#[test]
fn an_empty_pack_reads_back() {
    let sample = Sample::new(0, 0, 0, 1, &CODECS);
    sample.check(&sample.reader());
}

/// A table of contents longer than what is read at once.
#[test]
fn a_long_table_reads_back() {
    let sample = Sample::new(4, 3, 700, 1, &[Codec::Lz4]);
    sample.check(&sample.reader());
}

/// The id is the hash of the content: neither chance nor compression is part of it.
#[test]
fn the_id_depends_on_neither_salt_nor_codec() {
    let base = Sample::new(5, 100, 7, 1, &[Codec::Raw]);
    for (salt, codec) in [(2, Codec::Raw), (1, Codec::Lz4), (u32::MAX, Codec::Zstd(9))] {
        let other = Sample::new(5, 100, 7, salt, &[codec]);
        assert_eq!(other.pack.id, base.pack.id);
        assert_ne!(other.bytes, base.bytes);
    }
    let mut random = Random::new(6);
    for at in [0, 50, 99] {
        let mut blocks = base.blocks.clone();
        blocks[at] = block(&mut random);
        let other = Sample::of(blocks, base.nodes.clone(), 1, &[Codec::Raw]);
        assert_ne!(other.pack.id, base.pack.id, "block {at}");
    }
    let mut nodes = base.nodes.clone();
    nodes.swap(0, 1);
    let other = Sample::of(base.blocks.clone(), nodes, 1, &[Codec::Raw]);
    assert_ne!(other.pack.id, base.pack.id);
}

#[test]
fn another_key_is_refused() {
    let sample = Sample::new(6, 20, 1, 1, &CODECS);
    let reader = sample.reader();
    let segment = reader.segment(0).unwrap();
    let mut decoder = Decoder::new().unwrap();
    let other = DomainKey::new([1; 32]);
    let refused = reader.frame(0, &segment, 0, &other, &mut decoder).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::WrongKey);
    reader.params().check_key(other.id()).unwrap_err();
    reader.frame(0, &segment, 0, &key(), &mut decoder).unwrap();
}

/// A block that is not what its digest says was once stored by a writer with bad memory; whoever
/// reads it must not get it.
#[test]
fn a_block_that_is_not_its_digest_is_refused() {
    let key = key();
    let mut encoder = Encoder::new(Codec::Lz4).unwrap();
    let blocks = vec![7; 2 * 4096];
    let digests = vec![key.digest(&blocks[..4096]), key.digest(&[8; 4096])];
    let frame = EncodedFrame::encode(&mut encoder, &blocks, digests).unwrap();
    let mut writer = PackWriter::new(Vec::new(), PackParams::new(key.id(), 1)).unwrap();
    writer.push_frame(&frame).unwrap();
    let (pack, bytes) = writer.finish().unwrap();
    let reader = PackReader::open(Arc::new(bytes), 0, pack.bytes).unwrap();
    let segment = reader.segment(0).unwrap();
    let refused = reader.frame(0, &segment, 0, &key, &mut Decoder::new().unwrap()).unwrap_err();
    assert_eq!((refused.kind(), refused.what()), (ErrorKind::Corrupt, "block digest"));
}

#[test]
fn numbers_out_of_range_are_errors() {
    let sample = Sample::new(7, 20, 2, 1, &CODECS);
    let reader = sample.reader();
    reader.segment(1).unwrap_err();
    reader.segment(usize::MAX).unwrap_err();
    reader.node(2).unwrap_err();
    reader.node(u32::MAX).unwrap_err();
    let segment = reader.segment(0).unwrap();
    let mut decoder = Decoder::new().unwrap();
    for frame in [2, 64, usize::MAX] {
        reader.frame(0, &segment, frame, &key(), &mut decoder).unwrap_err();
        assert!(segment.frame_slots(frame).is_empty());
    }
}

/// The segment's number and the segment come from the caller; a mix-up must not show him blocks.
#[test]
fn a_frame_of_another_segment_is_refused() {
    let sample = Sample::new(8, 1100, 0, 1, &[Codec::Lz4]);
    let reader = sample.reader();
    let segments = [reader.segment(0).unwrap(), reader.segment(1).unwrap()];
    let mut decoder = Decoder::new().unwrap();
    for (number, other) in [(0, 1), (1, 0), (usize::MAX, 0)] {
        reader.frame(number, &segments[other], 0, &key(), &mut decoder).unwrap_err();
    }
}

#[test]
#[should_panic(expected = "only the last frame")]
fn a_frame_behind_a_short_one_is_refused() {
    let key = key();
    let mut encoder = Encoder::new(Codec::Raw).unwrap();
    let mut writer = PackWriter::new(Vec::new(), PackParams::new(key.id(), 1)).unwrap();
    for _ in 0..2 {
        let digests = vec![key.digest(&[1; 4096]); FRAME_BLOCKS - 1];
        let blocks = vec![1; digests.len() * 4096];
        let frame = EncodedFrame::encode(&mut encoder, &blocks, digests).unwrap();
        writer.push_frame(&frame).unwrap();
    }
}

#[test]
fn a_pack_is_read_from_inside_a_file() {
    let sample = Sample::new(9, 1030, 5, 1, &CODECS);
    for before in [1, 4095, 70_000] {
        let mut file = vec![0xcc; before];
        file.extend(&sample.bytes);
        file.extend([0xdd; 100]);
        let reader = PackReader::open(Arc::new(file), before as u64, sample.pack.bytes).unwrap();
        sample.check(&reader);
        let segment = reader.segment(0).unwrap();
        assert!(reader.frame_offset(&segment, 0) >= before as u64);
    }
}

/// The sum of start and length overflowed instead of being refused.
#[test]
fn a_region_past_the_end_of_numbers_is_refused() {
    let sample = Sample::new(10, 1, 0, 1, &CODECS);
    for (start, bytes) in [(u64::MAX, 1000), (0, u64::MAX), (u64::MAX - 100, 200), (0, 0), (5, 100)]
    {
        PackReader::open(sample.file(), start, bytes).unwrap_err();
    }
}

#[test]
fn slots_are_numbered_as_they_come() {
    let sample = Sample::new(11, 2060, 0, 1, &[Codec::Raw]);
    let contents = Contents::read(&sample.reader());
    assert_eq!(contents.blocks.len(), 2060);
    let last = sample.reader().segment(2).unwrap();
    assert_eq!(last.slots(), 2060 - 2 * SEGMENT_SLOTS);
    assert_eq!(last.digest(11), Some(key().digest(&sample.blocks[2059])));
    assert_eq!(last.digest(12), None);
}
