//! Damage of every kind: an error or the very content, never anything else.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use dormouse_image::codec::{Decoder, Encoding};
use dormouse_image::map::Node;
use dormouse_image::pack::{Bundle, FOOTER_BYTES, HEADER_BYTES, Live, PackId, PackReader, ReadAt};
use dormouse_image::pack::{RECORD_HEADER_BYTES, rewrite_pack};

use crate::random::Random;
use crate::rewrite::bundle;
use crate::sample::{CODECS, Contents, Faulty, Sample, key};

/// Every structure of a pack by name.
fn classes(reader: &PackReader, bytes: u64) -> Vec<(&'static str, Range<u64>)> {
    let record = |offset: u64, len: u64, head: &'static str, body: &'static str| {
        let middle = offset + RECORD_HEADER_BYTES as u64;
        [(head, offset..middle), (body, middle..offset + len)]
    };
    let toc = reader.toc();
    let footer = bytes - FOOTER_BYTES as u64;
    let mut classes = vec![("header", 0..HEADER_BYTES as u64), ("footer", footer..bytes)];
    let end = reader.records_end();
    classes.extend(record(end, footer - end, "table header", "table"));
    for (number, entry) in toc.segments.iter().enumerate().filter(|(_, entry)| entry.offset != 0) {
        let len = u64::from(entry.bytes);
        classes.extend(record(entry.offset, len, "segment header", "segment"));
        let segment = reader.segment(number).unwrap();
        let offset = |frame: usize| reader.frame_offset(&segment, frame);
        classes.extend((0..segment.frames()).map(|frame| {
            let at = offset(frame);
            ("frame header", at..at + RECORD_HEADER_BYTES as u64)
        }));
        classes.extend((0..segment.frames()).map(|frame| {
            let at = offset(frame) + RECORD_HEADER_BYTES as u64;
            ("frame", at..at + 4096)
        }));
    }
    for entry in toc.nodes.iter().filter(|entry| entry.offset != 0) {
        classes.extend(record(entry.offset, u64::from(entry.bytes), "node header", "node"));
    }
    classes
}

/// Opens and reads everything; whatever can be read must be what was written.
fn check(bytes: Vec<u8>, sound: &Contents, id: PackId) -> bool {
    let len = bytes.len();
    let file = Arc::new(Faulty { bytes, ..Faulty::default() });
    let Ok(reader) = PackReader::open(Arc::clone(&file) as Arc<dyn ReadAt>, 0, len as u64) else {
        return false;
    };
    assert_eq!(reader.id(), id, "a pack of another id was opened");
    let read = Contents::read(&reader);
    let mut whole = true;
    assert_eq!(read.blocks.len(), sound.blocks.len());
    for (read, sound) in read.blocks.iter().zip(&sound.blocks) {
        match (read, sound) {
            (Ok(read), Ok(sound)) => assert!(read == sound),
            (Ok(_), Err(_)) => panic!("a dropped block came back"),
            (Err(_), sound) => whole &= sound.is_err(),
        }
    }
    assert_eq!(read.nodes.len(), sound.nodes.len());
    for (read, sound) in read.nodes.iter().zip(&sound.nodes) {
        match (read, sound) {
            (Ok(read), Ok(sound)) => assert_eq!(read, sound),
            (Ok(_), Err(_)) => panic!("a dropped node came back"),
            (Err(_), sound) => whole &= sound.is_err(),
        }
    }
    assert!(file.longest.load(Ordering::Relaxed) <= len, "more was asked for than there is");
    whole
}

fn samples() -> Vec<Sample> {
    let whole = Sample::new(1, 40, 5, 77, &CODECS);
    let base = Sample::new(2, 1080, 6, 77, &CODECS);
    let mut live = Live::new();
    (0..30).for_each(|at| live.add_slots(at * 7, 2));
    live.add_node(1);
    live.add_node(4);
    let (pack, bytes) =
        rewrite_pack(&base.reader(), &live, &key(), CODECS[1], 6, Vec::new()).unwrap();
    vec![whole, Sample { bytes, pack, blocks: Vec::new(), nodes: Vec::new() }]
}

#[test]
fn flips_in_a_pack_are_found() {
    let mut random = Random::new(3);
    for sample in samples() {
        let reader = sample.reader();
        let sound = Contents::read(&reader);
        let classes = classes(&reader, sample.pack.bytes);
        for _ in 0..3000 {
            let (what, range) = &classes[random.index(classes.len())];
            let end = range.end.min(sample.pack.bytes);
            let mut bytes = sample.bytes.clone();
            let at = (range.start + random.below(end - range.start)) as usize;
            match random.below(4) {
                0 => bytes[at] = 0,
                1 => bytes[at] = 0xff,
                2 => {
                    let to = (at + random.index(40)).min(bytes.len());
                    random.fill(&mut bytes[at..to]);
                }
                _ => bytes[at] ^= 1 << random.below(8),
            }
            let same = bytes == sample.bytes;
            let whole = check(bytes, &sound, sample.pack.id);
            // XXH3 and the digests see every flip; a byte of no structure does not exist.
            assert!(whole == same || *what == "frame", "{what} at {at}");
        }
    }
}

#[test]
fn truncations_and_growth_of_a_pack_are_found() {
    let mut random = Random::new(4);
    for sample in samples() {
        let sound = Contents::read(&sample.reader());
        for round in 0..500_u64 {
            let mut bytes = sample.bytes.clone();
            let cut = if round < 200 { round } else { random.below(sample.pack.bytes) };
            match round % 3 {
                0 => bytes.truncate(bytes.len() - cut as usize),
                1 => drop(bytes.drain(..cut as usize)),
                _ => bytes.resize(bytes.len() + cut as usize, 0),
            }
            if cut > 0 {
                assert!(!check(bytes, &sound, sample.pack.id), "{round}: cut by {cut}");
            }
        }
    }
}

#[test]
fn flips_in_a_bundle_are_found() {
    let samples: Vec<_> = (0..4).map(|seed| Sample::new(seed, 2, 1, 9, &CODECS)).collect();
    let file = bundle(&samples);
    let sound = Bundle::open(&file, file.len() as u64).unwrap();
    let end = sound.entries.last().map(|last| last.offset + last.bytes).unwrap() as usize;
    for at in end..file.len() {
        for bit in 0..8 {
            let mut bytes = file.clone();
            bytes[at] ^= 1 << bit;
            Bundle::open(&bytes, bytes.len() as u64).unwrap_err();
        }
    }
    for len in 0..file.len() {
        Bundle::open(&file, len as u64).unwrap_err();
        Bundle::open(&file[..len].to_vec(), len as u64).unwrap_err();
    }
}

/// A node has no checksum of its own: what is read is decided by the pack. But it has one form.
#[test]
fn flips_in_a_node_decode_to_what_they_encode() {
    let mut random = Random::new(5);
    let own = PackId([0xee; 16]);
    let mut accepted = 0;
    for _ in 0..60 {
        let sound = crate::sample::node(&mut random).encode();
        for _ in 0..200 {
            let mut bytes = sound.clone();
            for _ in 0..1 + random.below(2) {
                let at = random.index(bytes.len());
                bytes[at] ^= 1 << random.below(8);
            }
            if random.one_in(8) {
                bytes.truncate(random.index(bytes.len()));
            }
            if let Ok(node) = Node::decode(&bytes, own) {
                accepted += 1;
                assert_eq!(renamed(&node, own).encode(), bytes);
            }
        }
    }
    assert!(accepted > 100, "some flips make other nodes");
}

/// `node` with its own pack called [`PackId::SELF`] again.
fn renamed(node: &Node, own: PackId) -> Node {
    use dormouse_image::map::{Inner, NodeRef};
    match node {
        Node::Leaf(leaf) => Node::Leaf(Arc::new(leaf.rename_pack(own, PackId::SELF))),
        Node::Inner(inner) => {
            let back = |at: NodeRef| match at.pack == own {
                true => NodeRef { pack: PackId::SELF, ..at },
                false => at,
            };
            let children = inner.children.iter().map(|child| child.map(back)).collect();
            Node::Inner(Arc::new(Inner { level: inner.level, children }))
        }
    }
}

#[test]
fn random_bytes_are_no_structure() {
    let mut random = Random::new(6);
    let mut decoder = Decoder::new().unwrap();
    for _ in 0..20_000 {
        let mut bytes = vec![0; random.index(400)];
        random.fill(&mut bytes);
        drop(Node::decode(&bytes, PackId([1; 16])));
        let len = bytes.len() as u64;
        Bundle::open(&bytes, len).unwrap_err();
        for encoding in [Encoding::Raw, Encoding::Lz4, Encoding::Zstd] {
            let mut raw = vec![0; random.index(70_000)];
            drop(decoder.decode(encoding, &bytes, &mut raw));
        }
        PackReader::open(Arc::new(bytes), 0, len).unwrap_err();
    }
}
