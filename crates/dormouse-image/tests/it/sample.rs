//! Packs to try things on: random blocks and nodes, written by the crate and read back whole.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dormouse_image::block::BLOCK_BYTES;
use dormouse_image::codec::{Codec, Decoder, Encoder};
use dormouse_image::digest::DomainKey;
use dormouse_image::error::Result;
use dormouse_image::map::{Inner, LeafBuilder, Node, NodeRef, NodeSink, Source};
use dormouse_image::pack::{
    EncodedFrame, FRAME_BLOCKS, FinishedPack, PackId, PackParams, PackReader, PackWriter, ReadAt,
    SEGMENT_SLOTS,
};

use crate::random::Random;

pub(crate) const CODECS: [Codec; 5] =
    [Codec::Raw, Codec::Lz4, Codec::Zstd(-5), Codec::Zstd(3), Codec::Zstd(9)];

pub(crate) fn key() -> DomainKey {
    DomainKey::new([0x5a; 32])
}

/// A block that is zero, noise, text-like or nearly empty.
pub(crate) fn block(random: &mut Random) -> Vec<u8> {
    let mut block = vec![0; BLOCK_BYTES];
    match random.below(4) {
        0 => random.fill(&mut block),
        1 => {
            let words: Vec<u64> = (0..8).map(|_| random.next()).collect();
            for (at, chunk) in block.chunks_mut(8).enumerate() {
                chunk.copy_from_slice(&words[at * at % 8].to_le_bytes());
            }
        }
        2 => {
            let at = random.index(BLOCK_BYTES);
            block[at] = 1;
        }
        _ => {
            let half = random.index(BLOCK_BYTES);
            random.fill(&mut block[half..]);
        }
    }
    block
}

/// A leaf or inner node, with references to the pack itself and to others.
pub(crate) fn node(random: &mut Random) -> Node {
    let pack = |random: &mut Random| match random.below(4) {
        0 => PackId::SELF,
        id => PackId([u8::try_from(id).unwrap(); 16]),
    };
    if random.one_in(3) {
        let mut children: Vec<_> = (0..random.below(511))
            .map(|_| {
                let at = NodeRef { pack: pack(random), node: random.small(u32::MAX) };
                (!random.one_in(3)).then_some(at)
            })
            .collect();
        children.push(Some(NodeRef { pack: PackId::SELF, node: 0 }));
        let level = 1 + u8::try_from(random.below(3)).unwrap();
        return Node::Inner(Arc::new(Inner { level, children }));
    }
    let mut leaf = LeafBuilder::new();
    leaf.push(1, Source::Stored { pack: pack(random), slot: random.small(u32::MAX) });
    for _ in 0..random.below(300) {
        let source = match random.one_in(3) {
            true => Source::Zero,
            false => Source::Stored { pack: pack(random), slot: random.small(1 << 31) },
        };
        leaf.push(1 + random.small(20), source);
    }
    Node::Leaf(Arc::new(leaf.finish()))
}

/// `node` as it reads from the pack `own`.
pub(crate) fn resolved(node: &Node, own: PackId) -> Node {
    match node {
        Node::Leaf(leaf) => Node::Leaf(Arc::new(leaf.rename_pack(PackId::SELF, own))),
        Node::Inner(inner) => {
            let children = inner.children.iter().map(|child| child.map(|at| at.resolve(own)));
            Node::Inner(Arc::new(Inner { level: inner.level, children: children.collect() }))
        }
    }
}

/// A pack in memory and what was put into it.
pub(crate) struct Sample {
    pub(crate) bytes: Vec<u8>,
    pub(crate) pack: FinishedPack,
    pub(crate) blocks: Vec<Vec<u8>>,
    pub(crate) nodes: Vec<Node>,
}

impl Sample {
    /// Random contents, which follow from `seed` alone.
    pub(crate) fn new(
        seed: u64,
        slots: usize,
        nodes: usize,
        salt: u32,
        codecs: &[Codec],
    ) -> Sample {
        let mut random = Random::new(seed);
        let blocks: Vec<_> = (0..slots).map(|_| block(&mut random)).collect();
        let nodes: Vec<_> = (0..nodes).map(|_| node(&mut random)).collect();
        Sample::of(blocks, nodes, salt, codecs)
    }

    /// The given contents; the frames take the codecs in turn, nodes are strewn among the frames.
    pub(crate) fn of(
        blocks: Vec<Vec<u8>>,
        nodes: Vec<Node>,
        salt: u32,
        codecs: &[Codec],
    ) -> Sample {
        let key = key();
        let params = PackParams::new(key.id(), salt);
        let mut encoders: Vec<_> =
            codecs.iter().map(|&codec| Encoder::new(codec).unwrap()).collect();
        let mut writer = PackWriter::new(Vec::new(), params).unwrap();
        let mut left = nodes.iter();
        for (number, chunk) in blocks.chunks(FRAME_BLOCKS).enumerate() {
            let turn = number % encoders.len();
            let digests = chunk.iter().map(|block| key.digest(block)).collect();
            let frame =
                EncodedFrame::encode(&mut encoders[turn], &chunk.concat(), digests).unwrap();
            writer.push_frame(&frame).unwrap();
            if number % 3 == 1
                && let Some(node) = left.next()
            {
                writer.put_node(node).unwrap();
            }
        }
        for node in left {
            writer.put_node(node).unwrap();
        }
        let (pack, bytes) = writer.finish().unwrap();
        assert_eq!(pack.bytes, bytes.len() as u64);
        Sample { bytes, pack, blocks, nodes }
    }

    pub(crate) fn file(&self) -> Arc<dyn ReadAt> {
        Arc::new(self.bytes.clone())
    }

    pub(crate) fn reader(&self) -> PackReader {
        PackReader::open(self.file(), 0, self.pack.bytes).unwrap()
    }

    /// Reads everything back and compares.
    pub(crate) fn check(&self, reader: &PackReader) {
        assert_eq!(reader.id(), self.pack.id);
        let read = Contents::read(reader);
        assert_eq!(read.blocks.len(), self.blocks.len());
        for (slot, (read, block)) in read.blocks.into_iter().zip(&self.blocks).enumerate() {
            assert!(read.unwrap() == *block, "slot {slot}");
        }
        assert_eq!(read.nodes.len(), self.nodes.len());
        for (read, node) in read.nodes.into_iter().zip(&self.nodes) {
            assert_eq!(read.unwrap(), resolved(node, self.pack.id));
        }
    }
}

/// All that can be read of a pack.
pub(crate) struct Contents {
    pub(crate) blocks: Vec<Result<Vec<u8>>>,
    pub(crate) nodes: Vec<Result<Node>>,
}

impl Contents {
    pub(crate) fn read(reader: &PackReader) -> Contents {
        let key = key();
        let mut decoder = Decoder::new().unwrap();
        let mut blocks = Vec::new();
        for number in 0..reader.toc().segments.len() {
            let slots = reader.toc().segment_slots(number);
            let segment = reader.segment(number);
            let mut last = None;
            for slot in 0..slots {
                blocks.push(segment.as_ref().map_err(again).and_then(|segment| {
                    let place = segment.locate(slot);
                    let (frame, position) = place.ok_or_else(|| missing(slot))?;
                    if last.as_ref().is_none_or(|(at, _)| *at != frame) {
                        last =
                            Some((frame, reader.frame(number, segment, frame, &key, &mut decoder)));
                    }
                    let (_, decoded) = last.as_ref().unwrap();
                    Ok(decoded.as_ref().map_err(again)?.block(position).to_vec())
                }));
            }
        }
        let nodes = (0..u32::try_from(reader.toc().nodes.len()).unwrap())
            .map(|number| reader.node(number))
            .collect();
        Contents { blocks, nodes }
    }
}

fn missing(slot: u32) -> dormouse_image::error::Error {
    dormouse_image::error::Error::missing("slot", "one that was dropped", slot)
}

/// Errors cannot be cloned; the kind is what counts.
fn again(error: &dormouse_image::error::Error) -> dormouse_image::error::Error {
    use dormouse_image::error::{Error, ErrorKind};
    match error.kind() {
        ErrorKind::Missing => Error::missing(error.what(), error, ""),
        _ => Error::corrupt(error.what(), error, ""),
    }
}

/// The segment number of a slot and its place there.
pub(crate) fn split(slot: u32) -> (usize, u32) {
    ((slot / SEGMENT_SLOTS) as usize, slot % SEGMENT_SLOTS)
}

/// Bytes that fail to be read in places, and know the longest read that was tried.
#[derive(Debug, Default)]
pub(crate) struct Faulty {
    pub(crate) bytes: Vec<u8>,
    pub(crate) bad: Vec<std::ops::Range<u64>>,
    pub(crate) longest: AtomicUsize,
}

impl ReadAt for Faulty {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.longest.fetch_max(buf.len(), Ordering::Relaxed);
        let end = offset + buf.len() as u64;
        if self.bad.iter().any(|bad| bad.start < end && offset < bad.end) {
            return Err(io::Error::other("a bad sector"));
        }
        self.bytes.read_exact_at(buf, offset)
    }
}
