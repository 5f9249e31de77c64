//! Golden files: what was once written is read for ever, and written the same today.
//!
//! Files whose every byte is decided by `docs/format.md` are compared byte for byte. What a
//! compressor makes of a frame is its own affair and may change with its version: `mixed.pack`
//! is compared by what is read from it, and by its id.
//!
//! `DORMOUSE_BLESS=1 cargo test -p dormouse-image golden` writes the files and the fuzzers' seeds.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_image::codec::Codec;
use dormouse_image::map::{Inner, LeafBuilder, Node, NodeRef, Source};
use dormouse_image::pack::{
    Bundle, BundleEntry, Live, PackId, PackReader, RECORD_HEADER_BYTES, ReadAt, rewrite_pack,
    write_bundle_end,
};

use crate::random::Random;
use crate::sample::{Contents, Sample, key, resolved};

const MIXED: [Codec; 3] = [Codec::Zstd(3), Codec::Lz4, Codec::Raw];

/// Slots of the mixed pack that the rewritten one keeps.
const KEPT: [u32; 2] = [17, 33];

fn at(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

fn blessing() -> bool {
    std::env::var_os("DORMOUSE_BLESS").is_some_and(|value| value == "1")
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// The file `name`, which is written first if it is to be blessed.
fn golden(name: &str, made: &[u8]) -> Vec<u8> {
    let path = at(name);
    if blessing() {
        write(&path, made);
    }
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// [`golden`] for files with one form only.
fn golden_exact(name: &str, made: &[u8]) -> Vec<u8> {
    let bytes = golden(name, made);
    let differ = bytes.iter().zip(made).position(|(a, b)| a != b);
    assert!(bytes == made, "{name} would be written otherwise, first at byte {differ:?}");
    bytes
}

/// An id that does not compress, so that nodes are stored as they are.
fn pack(first: u8) -> PackId {
    PackId(std::array::from_fn(|at| first + at as u8))
}

fn leaf() -> Node {
    let mut leaf = LeafBuilder::new();
    let other = pack(0xa0);
    leaf.push(1, Source::Stored { pack: PackId::SELF, slot: 0 });
    leaf.push(300, Source::Zero);
    leaf.push(200, Source::Stored { pack: other, slot: 1000 });
    leaf.push(5, Source::Stored { pack: PackId::SELF, slot: 1 });
    leaf.push(1, Source::Stored { pack: other, slot: 1190 });
    Node::Leaf(Arc::new(leaf.finish()))
}

fn inner() -> Node {
    let other = pack(0xb0);
    let children = vec![
        Some(NodeRef { pack: PackId::SELF, node: 0 }),
        None,
        Some(NodeRef { pack: other, node: 300 }),
    ];
    Node::Inner(Arc::new(Inner { level: 1, children }))
}

/// One raw block, then a leaf.
fn tiny() -> Sample {
    let block = (0..4096_u32).map(|at| (at % 251) as u8).collect();
    Sample::of(vec![block], vec![leaf()], 0x0403_0201, &[Codec::Raw])
}

/// A frame of each encoding, and two nodes.
fn mixed() -> Sample {
    let mut random = Random::new(2026);
    let blocks = (0..34)
        .map(|slot| {
            let mut block = vec![0; 4096];
            match slot {
                33 => random.fill(&mut block),
                _ => block
                    .chunks_mut(16)
                    .zip(0_u32..)
                    .for_each(|(c, at)| c[slot % 16] = at as u8 | 1),
            }
            block
        })
        .collect();
    Sample::of(blocks, vec![leaf(), inner()], 0x0807_0605, &MIXED)
}

/// The mixed pack without most of its slots and its first node.
fn rewritten(mixed: &Sample) -> Vec<u8> {
    let mut live = Live::new();
    KEPT.iter().for_each(|&slot| live.add_slots(slot, 1));
    live.add_node(1);
    let salt = 0x0c0b_0a09;
    rewrite_pack(&mixed.reader(), &live, &key(), Codec::Raw, salt, Vec::new()).unwrap().1
}

fn bundle(packs: &[(PackId, &[u8])]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut entries = Vec::new();
    for &(pack, bytes) in packs {
        entries.push(BundleEntry { pack, offset: file.len() as u64, bytes: bytes.len() as u64 });
        file.extend_from_slice(bytes);
    }
    let end = file.len() as u64;
    write_bundle_end(&mut file, &entries, end).unwrap();
    file
}

fn open(bytes: &[u8]) -> PackReader {
    PackReader::open(Arc::new(bytes.to_vec()), 0, bytes.len() as u64).unwrap()
}

fn check_rewritten(mixed: &Sample, reader: &PackReader) {
    assert_eq!(reader.id(), mixed.pack.id);
    let contents = Contents::read(reader);
    for (slot, block) in (0..).zip(&mixed.blocks) {
        let read = contents.blocks[slot as usize].as_ref().ok();
        assert_eq!(read, KEPT.contains(&slot).then_some(block), "slot {slot}");
    }
    assert!(contents.nodes[0].is_err());
    assert_eq!(contents.nodes[1].as_ref().unwrap(), &resolved(&mixed.nodes[1], reader.id()));
}

#[test]
fn nodes() {
    let own = PackId([0xee; 16]);
    for (name, node) in [("leaf.node", leaf()), ("inner.node", inner())] {
        let bytes = golden_exact(name, &node.encode());
        assert_eq!(Node::decode(&bytes, own).unwrap(), resolved(&node, own));
    }
}

#[test]
fn packs() {
    let (tiny, mixed) = (tiny(), mixed());
    tiny.check(&open(&golden_exact("tiny.pack", &tiny.bytes)));
    let file = golden("mixed.pack", &mixed.bytes);
    mixed.check(&open(&file));
    let reader = open(&file);
    let segment = reader.segment(0).unwrap();
    let encodings = [0, 1, 2].map(|frame| file[reader.frame_offset(&segment, frame) as usize + 5]);
    assert_eq!(encodings, [2, 1, 0], "zstd, lz4 and raw are all there");
    check_rewritten(&mixed, &open(&golden_exact("rewritten.pack", &rewritten(&mixed))));
}

#[test]
fn bundles() {
    let (tiny, mixed) = (tiny(), mixed());
    let again = rewritten(&mixed);
    let made = bundle(&[(tiny.pack.id, &tiny.bytes), (mixed.pack.id, &again)]);
    let file: Arc<dyn ReadAt> = Arc::new(golden_exact("two.bundle", &made));
    let found = Bundle::open(&*file, made.len() as u64).unwrap();
    let readers: Vec<_> = found
        .entries
        .iter()
        .map(|entry| PackReader::open(Arc::clone(&file), entry.offset, entry.bytes).unwrap())
        .collect();
    tiny.check(&readers[0]);
    check_rewritten(&mixed, &readers[1]);
}

/// The worked examples of `docs/format.md` are the golden files, byte by byte and without gaps,
/// also those of the store.
#[test]
fn worked_examples() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/format.md");
    let text = fs::read_to_string(&path).unwrap();
    let mut examples = 0;
    for example in text.split("```hexdump ").skip(1) {
        let (name, rest) = example.split_once('\n').unwrap();
        let (lines, _) = rest.split_once("```").unwrap();
        let folders = ["", "../../dormouse-store/testdata", "../../dormouse-live/testdata"];
        let file = folders.iter().find_map(|folder| fs::read(at(folder).join(name.trim())).ok());
        let file = file.unwrap_or_else(|| panic!("no golden file {name}"));
        let mut next = 0;
        for line in lines.lines().filter(|line| !line.trim().is_empty()) {
            let mut words = line.split_whitespace();
            let offset = usize::from_str_radix(words.next().unwrap(), 16).unwrap();
            assert_eq!(offset, next, "{name}: {line}");
            for word in words.take_while(|&word| word != "|") {
                if let Some(skipped) = word.strip_prefix('+') {
                    next += skipped.parse::<usize>().unwrap();
                    continue;
                }
                let byte = u8::from_str_radix(word, 16).unwrap();
                assert_eq!(byte, file[next], "{name} at {next:x}: {line}");
                next += 1;
            }
        }
        assert_eq!(next, file.len(), "{name} is shown to its end");
        examples += 1;
    }
    assert_eq!(examples, 5, "a node, a pack, an index run, a live disk and its states are shown");
}

/// The fuzzers start from parts of the golden files.
#[test]
fn seeds() {
    let (tiny, mixed) = (tiny(), mixed());
    let again = rewritten(&mixed);
    let nodes = Sample::of(vec![], mixed.nodes.clone(), 1, &MIXED);
    let small = Sample::of(mixed.blocks[..2].to_vec(), vec![leaf()], 1, &MIXED[1..2]);
    let segment = |bytes: &[u8]| {
        let entry = open(bytes).toc().segments[0];
        let start = entry.offset as usize;
        bytes[start + RECORD_HEADER_BYTES..start + entry.bytes as usize].to_vec()
    };
    // The header of the record gives the four bytes that the target wants first.
    let frame = |sample: &Sample, frame: usize| {
        let reader = sample.reader();
        let segment = reader.segment(0).unwrap();
        let record = &sample.bytes[reader.frame_offset(&segment, frame) as usize..];
        let stored = u32::from_le_bytes(*record[12..].first_chunk().unwrap()) as usize;
        let payload = &record[RECORD_HEADER_BYTES..RECORD_HEADER_BYTES + stored];
        [&[record[5], record[6], 0, 0], payload].concat()
    };
    let seeds: [(&str, Vec<u8>); 14] = [
        ("pack_footer/nodes", nodes.bytes.clone()),
        ("pack_footer/small", small.bytes.clone()),
        ("pack_footer/rewritten", again.clone()),
        ("segment/tiny", segment(&tiny.bytes)),
        ("segment/mixed", segment(&mixed.bytes)),
        ("segment/rewritten", segment(&again)),
        ("map_node/leaf", leaf().encode()),
        ("map_node/inner", inner().encode()),
        ("frame/zstd", frame(&mixed, 0)),
        ("frame/lz4", frame(&mixed, 1)),
        ("frame/raw", frame(&tiny, 0)),
        ("frame/list", [&[0x80, 1, 0, 0, 0, 0][..], &tiny.blocks[0]].concat()),
        ("bundle/empty", bundle(&[])),
        ("bundle/two", bundle(&[(nodes.pack.id, &nodes.bytes), (small.pack.id, &small.bytes)])),
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    for (name, bytes) in seeds {
        if blessing() {
            write(&folder.join(name), &bytes);
        }
        assert!(folder.join(name).exists(), "{name}: bless it");
    }
}
