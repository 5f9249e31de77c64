//! Speeds of the data model's hot paths: `cargo run --release --example speed -- FILE…`.
//!
//! Absolute numbers mean little on a shared machine; compare them within one run.
#![expect(clippy::cast_possible_truncation, reason = "random numbers are cut on purpose")]

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use dormouse_image::block::BLOCK_BYTES;
use dormouse_image::codec::{Codec, Decoder, Encoder};
use dormouse_image::digest::{DomainKey, checksum};
use dormouse_image::error::Result;
use dormouse_image::map::{
    LEAF_BLOCKS, LeafBuilder, Map, MapUpdate, Node, NodeRef, NodeSink, NodeSource, Source,
};
use dormouse_image::pack::{
    EncodedFrame, FRAME_BLOCKS, FRAME_BYTES, PackId, PackParams, PackReader, PackWriter,
};
use dormouse_image::zero::is_zero;

const OWN: PackId = PackId([0xee; 16]);

#[derive(Default)]
struct Cache(HashMap<NodeRef, Node>);

impl NodeSource for Cache {
    fn node(&self, at: NodeRef) -> Result<Node> {
        Ok(self.0[&at].clone())
    }
}

#[derive(Default)]
struct Pending(Vec<Node>);

impl NodeSink for Pending {
    fn put_node(&mut self, node: &Node) -> Result<u32> {
        self.0.push(node.clone());
        Ok(u32::try_from(self.0.len() - 1).expect("few nodes"))
    }
}

fn main() -> Result<()> {
    let data = sample();
    lookups()?;
    scans(&data);
    frames(&data)?;
    nodes()
}

/// What the named files hold, in whole frames.
fn sample() -> Vec<u8> {
    let mut data = Vec::new();
    for path in std::env::args_os().skip(1) {
        data.extend(std::fs::read(path).unwrap_or_default());
    }
    data.resize(data.len().next_multiple_of(FRAME_BYTES).max(FRAME_BYTES * 64), 0);
    data
}

fn say(what: &str, text: std::fmt::Arguments<'_>) {
    use std::io::Write;
    // A closed pipe ends the show, not the program.
    let _ = writeln!(std::io::stdout(), "{what:<28} {text}");
}

/// The shortest of five runs, in seconds: what others do on the machine only makes runs longer.
fn best(mut run: impl FnMut()) -> f64 {
    let once = |_| {
        let begin = Instant::now();
        run();
        begin.elapsed().as_secs_f64()
    };
    (0..5).map(once).fold(f64::MAX, f64::min)
}

fn speed(what: &str, bytes: usize, run: impl FnMut()) {
    say(what, format_args!("{:8.0} MB/s", bytes as f64 / best(run) / 1e6));
}

fn each(what: &str, count: usize, run: impl FnMut()) {
    say(what, format_args!("{:8.0} ns each", best(run) * 1e9 / count as f64));
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn lookups() -> Result<()> {
    lookups_in(8)?;
    lookups_in(1_000_000 / 4096)
}

fn lookups_in(leaves: u64) -> Result<()> {
    let blocks = leaves * u64::from(LEAF_BLOCKS);
    let mut state = 88_172_645_463_325_252;
    let mut pending = Pending::default();
    let mut update = MapUpdate::new(Map::zero(blocks), blocks);
    for index in 0..leaves {
        let mut leaf = LeafBuilder::new();
        for _ in 0..4096 {
            let slot = (random(&mut state) >> 33) as u32;
            leaf.push(2, Source::Stored { pack: PackId::SELF, slot });
        }
        update.put_leaf(&mut pending, index, &Arc::new(leaf.finish()))?;
    }
    let map = update.finish(&Cache::default(), &mut pending)?;
    let cache =
        (0..).zip(pending.0).map(|(node, at)| (NodeRef { pack: PackId::SELF, node }, at)).collect();
    let cache = Cache(cache);
    let count = 2_000_000;
    let name = format!("lookup, {} extents", leaves * 4096);
    each(&name, count, || {
        for _ in 0..count {
            let block = random(&mut state) % blocks;
            black_box(map.lookup(&cache, block).is_ok());
        }
    });
    each("random block alone", count, || {
        for _ in 0..count {
            black_box(random(&mut state) % blocks);
        }
    });
    let Some(leaf) = map.leaf(&cache, 3)? else { return Ok(()) };
    each("lookup in a leaf", count, || {
        for _ in 0..count {
            let block = (random(&mut state) % u64::from(LEAF_BLOCKS)) as u32;
            black_box(leaf.lookup(block));
        }
    });
    Ok(())
}

fn scans(data: &[u8]) {
    let key = DomainKey::new([1; 32]);
    speed("digest", data.len(), || {
        for block in data.chunks(BLOCK_BYTES) {
            black_box(key.digest(block));
        }
    });
    speed("checksum of frames", data.len(), || {
        for frame in data.chunks(FRAME_BYTES) {
            black_box(checksum(&[&[0; 24], frame]));
        }
    });
    // Fresh zeros would all be one page of the kernel's.
    let mut zeros = black_box(vec![1; 64 << 20]);
    black_box(&mut zeros).fill(0);
    speed("zero test, 64 MiB", zeros.len(), || {
        black_box(zeros.chunks(BLOCK_BYTES).filter(|block| is_zero(block)).count());
    });
    let few = &zeros[..128 << 10];
    speed("zero test, in cache", few.len() * 2000, || {
        for _ in 0..2000 {
            black_box(black_box(few).chunks(BLOCK_BYTES).filter(|block| is_zero(block)).count());
        }
    });
}

fn frames(data: &[u8]) -> Result<()> {
    let key = DomainKey::new([1; 32]);
    for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd(1), Codec::Zstd(3)] {
        let mut encoder = Encoder::new(codec)?;
        let mut writer = PackWriter::new(Vec::new(), PackParams::new(key.id(), 1))?;
        let begin = Instant::now();
        for frame in data.chunks(FRAME_BYTES) {
            let digests = frame.chunks(BLOCK_BYTES).map(|block| key.digest(block)).collect();
            writer.push_frame(&EncodedFrame::encode(&mut encoder, frame, digests)?)?;
        }
        let (pack, bytes) = writer.finish()?;
        let encode = data.len() as f64 / begin.elapsed().as_secs_f64() / 1e6;
        let reader = PackReader::open(Arc::new(bytes), 0, pack.bytes)?;
        let mut decoder = Decoder::new()?;
        let begin = Instant::now();
        for number in 0..reader.toc().segments.len() {
            let segment = reader.segment(number)?;
            for frame in 0..segment.frames() {
                black_box(reader.frame(number, &segment, frame, &key, &mut decoder)?);
            }
        }
        let decode = data.len() as f64 / begin.elapsed().as_secs_f64() / 1e6;
        let ratio = data.len() as f64 / pack.bytes as f64;
        let blocks = data.len() / BLOCK_BYTES / FRAME_BLOCKS;
        say(
            &format!("frames, {codec}"),
            format_args!(
                "{encode:8.0} MB/s written, {decode:6.0} MB/s read, ratio {ratio:.2}, {blocks} frames"
            ),
        );
    }
    Ok(())
}

fn nodes() -> Result<()> {
    let mut state = 12345;
    let mut leaf = LeafBuilder::new();
    for _ in 0..1000 {
        let slot = (random(&mut state) >> 44) as u32;
        let pack = PackId([(slot % 20 + 1) as u8; 16]);
        leaf.push(1 + slot % 7, Source::Stored { pack, slot });
    }
    let node = Node::Leaf(Arc::new(leaf.finish()));
    let mut writer = PackWriter::new(Vec::new(), PackParams::new(DomainKey::new([1; 32]).id(), 1))?;
    let count = 2000_u32;
    let begin = Instant::now();
    for _ in 0..count {
        writer.put_node(&node)?;
    }
    let each_ns = begin.elapsed().as_secs_f64() * 1e9 / f64::from(count);
    let bytes = node.encode().len();
    say("put_node, 1,000 extents", format_args!("{each_ns:8.0} ns each, {bytes} bytes"));
    let (pack, file) = writer.finish()?;
    let reader = PackReader::open(Arc::new(file), 0, pack.bytes)?;
    each("read a node", count as usize, || {
        for number in 0..count {
            black_box(reader.node(number).is_ok());
        }
    });
    let bytes = node.encode();
    each("decode of bytes", count as usize, || {
        for _ in 0..count {
            black_box(Node::decode(&bytes, OWN).is_ok());
        }
    });
    Ok(())
}
