//! Packs written again: the same id, the live blocks, and nothing else.

use std::sync::Arc;

use dormouse_image::codec::Codec;
use dormouse_image::digest::DomainKey;
use dormouse_image::error::ErrorKind;
use dormouse_image::pack::{
    Bundle, BundleEntry, Live, PackReader, ReadAt, rewrite_pack, write_bundle_end,
};

use crate::random::Random;
use crate::sample::{CODECS, Contents, Sample, key, resolved, split};

/// Runs of slots and single nodes, chosen at random.
pub(crate) fn random_live(random: &mut Random, slots: u32, nodes: usize) -> Live {
    let mut live = Live::new();
    match random.below(6) {
        0 => live.add_slots(0, slots),
        1 => {}
        _ => {
            let mut at = random.small(200);
            while at < slots {
                let len = (1 + random.small(120)).min(slots - at);
                live.add_slots(at, len);
                let skip = if random.one_in(4) { 1500 } else { 60 };
                at += len + random.small(skip);
            }
        }
    }
    (0..u32::try_from(nodes).unwrap())
        .filter(|_| random.one_in(2))
        .for_each(|node| live.add_node(node));
    live
}

fn rewrite(reader: &PackReader, live: &Live, codec: Codec, salt: u32) -> (Vec<u8>, PackReader) {
    let (finished, bytes) = rewrite_pack(reader, live, &key(), codec, salt, Vec::new()).unwrap();
    assert_eq!(finished.id, reader.id());
    assert_eq!(finished.bytes, bytes.len() as u64);
    let again = PackReader::open(Arc::new(bytes.clone()), 0, finished.bytes).unwrap();
    assert_eq!(again.toc(), &finished.toc);
    (bytes, again)
}

/// What is live is there and equal, the rest is missing.
fn check(sample: &Sample, reader: &PackReader, live: &Live) {
    let contents = Contents::read(reader);
    assert_eq!(contents.blocks.len(), sample.blocks.len());
    for (slot, (read, block)) in (0..).zip(contents.blocks.into_iter().zip(&sample.blocks)) {
        match read {
            Ok(read) => assert!(live.has_slot(slot) && read == *block, "slot {slot}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Missing, "{error}");
                assert!(!live.has_slot(slot), "slot {slot}: {error}");
            }
        }
    }
    for (number, (read, node)) in (0..).zip(contents.nodes.into_iter().zip(&sample.nodes)) {
        match read {
            Ok(read) => {
                assert!(live.has_node(number));
                assert_eq!(read, resolved(node, reader.id()));
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Missing);
                assert!(!live.has_node(number));
            }
        }
    }
    assert_eq!(reader.toc().live_slots(), live.slots());
}

/// The slots that both hold.
fn both(a: &Live, b: &Live, slots: u32, nodes: usize) -> Live {
    let mut live = Live::new();
    (0..slots)
        .filter(|&slot| a.has_slot(slot) && b.has_slot(slot))
        .for_each(|slot| live.add_slots(slot, 1));
    (0..u32::try_from(nodes).unwrap())
        .filter(|&node| a.has_node(node) && b.has_node(node))
        .for_each(|node| live.add_node(node));
    live
}

#[test]
fn random_live_sets_again_and_again() {
    for seed in 0..30 {
        let mut random = Random::new(seed);
        let slots = [1, 16, 40, 1024, 1025, 2500][random.index(6)];
        let sample = Sample::new(seed, slots as usize, 12, 1, &CODECS);
        let mut live = Live::all(&sample.pack.toc);
        assert_eq!(live.slots(), u64::from(slots));
        let mut reader = sample.reader();
        for salt in 2..6 {
            live = both(&live, &random_live(&mut random, slots, 12), slots, 12);
            let codec = CODECS[random.index(CODECS.len())];
            let (_, again) = rewrite(&reader, &live, codec, salt);
            check(&sample, &again, &live);
            reader = again;
        }
    }
}

/// A block of a segment that is whole except for slots dropped earlier is copied, not regrouped.
#[test]
fn a_second_rewrite_that_drops_nothing_changes_nothing() {
    let sample = Sample::new(1, 1100, 5, 1, &CODECS);
    let mut live = Live::new();
    live.add_slots(3, 500);
    live.add_node(2);
    let (first, reader) = rewrite(&sample.reader(), &live, Codec::Lz4, 9);
    let (second, again) = rewrite(&reader, &live, Codec::Zstd(9), 9);
    assert_eq!(first, second);
    check(&sample, &again, &live);
}

#[test]
fn what_was_dropped_cannot_be_asked_for() {
    let sample = Sample::new(2, 2100, 3, 1, &CODECS);
    let mut live = Live::new();
    live.add_slots(0, 100);
    live.add_node(0);
    let (_, reader) = rewrite(&sample.reader(), &live, Codec::Raw, 2);
    let mut cases = vec![live.clone(), live.clone(), live.clone()];
    cases[0].add_slots(100, 1);
    cases[1].add_slots(2000, 1);
    cases[2].add_node(1);
    for live in cases {
        let refused = rewrite_pack(&reader, &live, &key(), Codec::Raw, 3, Vec::new());
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Missing);
    }
    // As many slots as there are, but not the same ones: nothing to regroup, and yet not a copy.
    let mut others = Live::new();
    others.add_slots(1, 100);
    let refused = rewrite_pack(&reader, &others, &key(), Codec::Raw, 3, Vec::new());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Missing);
}

/// Marks past the pack's end were ignored: a live set made for another pack dropped blocks of this.
#[test]
fn a_live_set_of_another_pack_is_refused() {
    let sample = Sample::new(3, 40, 3, 1, &CODECS);
    let (mut slots, mut nodes) = (Live::new(), Live::new());
    slots.add_slots(39, 2);
    nodes.add_node(3);
    for live in [slots, nodes] {
        let refused = rewrite_pack(&sample.reader(), &live, &key(), Codec::Raw, 3, Vec::new());
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Missing);
    }
}

#[test]
fn another_key_is_refused() {
    let sample = Sample::new(4, 40, 3, 1, &CODECS);
    let live = Live::all(&sample.pack.toc);
    let other = DomainKey::new([1; 32]);
    let refused = rewrite_pack(&sample.reader(), &live, &other, Codec::Raw, 3, Vec::new());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::WrongKey);
}

/// A damaged frame must not get a fresh checksum, neither copied nor regrouped.
#[test]
fn damage_is_not_copied() {
    let sample = Sample::new(5, 100, 0, 1, &[Codec::Raw]);
    let reader = sample.reader();
    let at = reader.frame_offset(&reader.segment(0).unwrap(), 3) as usize + 2000;
    let mut bytes = sample.bytes.clone();
    bytes[at] ^= 4;
    let reader = PackReader::open(Arc::new(bytes), 0, sample.pack.bytes).unwrap();
    let mut some = Live::new();
    some.add_slots(40, 30);
    for live in [Live::all(reader.toc()), some] {
        let refused = rewrite_pack(&reader, &live, &key(), Codec::Raw, 3, Vec::new());
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Corrupt);
    }
    let mut others = Live::new();
    others.add_slots(0, 48);
    rewrite(&reader, &others, Codec::Raw, 3);
}

#[test]
fn live_sets_mark_what_they_are_told() {
    let mut random = Random::new(6);
    for _ in 0..200 {
        let mut live = Live::new();
        let mut model = vec![false; 700];
        for _ in 0..random.below(6) {
            let (first, len) = (random.small(400), random.small(300));
            live.add_slots(first, len);
            model[first as usize..(first + len) as usize].fill(true);
        }
        for (slot, &marked) in (0..).zip(&model) {
            assert_eq!(live.has_slot(slot), marked, "{slot}");
        }
        assert_eq!(live.slots(), model.iter().filter(|&&marked| marked).count() as u64);
        assert!(!live.has_slot(u32::MAX) && !live.has_node(u32::MAX));
    }
}

/// A bundle of packs in memory: some as they were written, some rewritten.
pub(crate) fn bundle(samples: &[Sample]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut entries = Vec::new();
    for (salt, sample) in (100..).zip(samples) {
        let offset = file.len() as u64;
        let live = Live::all(&sample.pack.toc);
        let reader = sample.reader();
        let (pack, end) = rewrite_pack(&reader, &live, &key(), Codec::Lz4, salt, file).unwrap();
        file = end;
        entries.push(BundleEntry { pack: pack.id, offset, bytes: pack.bytes });
    }
    let end = file.len() as u64;
    write_bundle_end(&mut file, &entries, end).unwrap();
    file
}

#[test]
fn packs_are_read_from_a_bundle() {
    let samples: Vec<_> = [0, 1, 1030, 17]
        .iter()
        .zip(20..)
        .map(|(&slots, seed)| Sample::new(seed, slots, 3, 1, &CODECS))
        .collect();
    let file: Arc<dyn ReadAt> = Arc::new(bundle(&samples));
    let bytes = bundle(&samples).len() as u64;
    let bundle = Bundle::open(&*file, bytes).unwrap();
    assert_eq!(bundle.entries.len(), samples.len());
    for (entry, sample) in bundle.entries.iter().zip(&samples) {
        assert_eq!(entry.pack, sample.pack.id);
        let reader = PackReader::open(Arc::clone(&file), entry.offset, entry.bytes).unwrap();
        sample.check(&reader);
        // A rewrite out of a bundle reads at the right place, too.
        let (_, alone) = rewrite(&reader, &Live::all(reader.toc()), Codec::Raw, 5);
        sample.check(&alone);
    }
    let empty = self::bundle(&[]);
    assert!(Bundle::open(&empty, empty.len() as u64).unwrap().entries.is_empty());
}

#[test]
fn slots_are_split_into_segments() {
    assert_eq!([0, 1023, 1024, 2050].map(split), [(0, 0), (0, 1023), (1, 0), (2, 2)]);
}
