//! The sequencer of one image: decides for each block where it comes from, and builds the map.

use std::collections::BTreeMap;
use std::sync::Arc;

use dormouse_image::block::{
    BLOCK_BYTES, BLOCK_BYTES_U64, HoleMeaning, IMAGE_BYTES_MAX, blocks_in,
};
use dormouse_image::digest::Digest;
use dormouse_image::map::{Extent, LEAF_BLOCKS, Leaf, LeafBuilder, Map, MapUpdate, Source};
use dormouse_image::pack::PackId;
use dormouse_image::zero::is_zero;

use super::feed::feed;
use super::pool::{Done, Piece, PieceBody};
use super::{Capture, CaptureInput, CapturedImage, ParentImage};
use crate::error::{Context, Result};
use crate::manifest::Figures;

const LEAF: u64 = LEAF_BLOCKS as u64;

impl Capture<'_> {
    /// Captures one image.
    pub(crate) fn image(&mut self, input: CaptureInput) -> Result<CapturedImage> {
        let CaptureInput { source, holes, parent, is_disk } = input;
        let size_bytes = source.bytes();
        let parent = parent.unwrap_or(ParentImage { map: Map::zero(0), size_bytes: 0 });
        let mut image = ImageCapture {
            holes,
            parent,
            size_bytes,
            is_disk,
            builder: LeafBuilder::new(),
            leaf: 0,
            parent_leaf: None,
            parent_extent: None,
            update: MapUpdate::new(parent.map, blocks_in(IMAGE_BYTES_MAX)),
            previous: None,
            figures: Figures::default(),
        };
        let stored_before = self.stored_bytes;
        let pack_before = self.writer.bytes();
        feed(source, self.pool.feed_line())?;
        let mut waiting: BTreeMap<u64, Piece> = BTreeMap::new();
        let mut next = 0;
        let mut end = None;
        while end.is_none() {
            match self.pool.wait(self.context.job)? {
                Done::Failed(error) => return Err(error),
                Done::Compressed { number, frame } => self.write_frame(number, frame)?,
                Done::Piece { number, piece } => {
                    waiting.insert(number, piece);
                }
            }
            while !self.is_full()
                && let Some(piece) = waiting.remove(&next)
            {
                next += 1;
                end = image.piece(self, piece)?;
            }
        }
        let size_bytes = end.unwrap_or(0);
        let (map, mut figures) = image.finish(self, size_bytes)?;
        // What is still being compressed is this image's, not the next one's.
        self.write_sent_frames()?;
        figures.raw_bytes = blocks_in(size_bytes) * BLOCK_BYTES_U64;
        figures.nonzero_bytes = figures.raw_bytes - figures.zero_bytes;
        figures.stored_bytes = self.stored_bytes - stored_before;
        figures.map_bytes =
            (self.writer.bytes() - pack_before).saturating_sub(figures.stored_bytes);
        if is_disk {
            self.disk_slots = self.next_slot;
        }
        Ok(CapturedImage { map, size_bytes, figures })
    }
}

struct ImageCapture {
    holes: HoleMeaning,
    parent: ParentImage,
    /// Known from the start unless the source is a stream.
    size_bytes: Option<u64>,
    is_disk: bool,
    builder: LeafBuilder,
    leaf: u64,
    /// The parent's leaf under the one being built, once it was asked for.
    parent_leaf: Option<Option<Arc<Leaf>>>,
    /// The parent's extent that was asked last.
    parent_extent: Option<Extent>,
    update: MapUpdate,
    /// Where the block before this one lies.
    previous: Option<(PackId, u32)>,
    figures: Figures,
}

impl ImageCapture {
    /// Takes the next piece; the image's length when it was the last.
    fn piece(&mut self, capture: &mut Capture<'_>, piece: Piece) -> Result<Option<u64>> {
        let bytes = piece.blocks * BLOCK_BYTES_U64;
        match piece.body {
            PieceBody::End { size_bytes, check } => {
                check.check()?;
                return Ok(Some(size_bytes));
            }
            PieceBody::Hole => {
                self.figures.skipped_bytes += bytes;
                match self.holes {
                    HoleMeaning::Zero => self.zeros(capture, piece.blocks)?,
                    HoleMeaning::Parent => self.keep(capture, piece.blocks)?,
                }
            }
            PieceBody::Zero => {
                self.figures.skipped_bytes += bytes;
                self.zeros(capture, piece.blocks)?;
            }
            PieceBody::Data { bytes, digests } => {
                debug_assert_eq!(piece.first_block, self.position(), "pieces come in order");
                let mut zeros = 0;
                for (digest, block) in digests.iter().zip(bytes.chunks_exact(BLOCK_BYTES)) {
                    match digest {
                        None => zeros += 1,
                        Some(digest) => {
                            self.zeros(capture, std::mem::take(&mut zeros))?;
                            self.block(capture, *digest, block)?;
                        }
                    }
                }
                self.zeros(capture, zeros)?;
                capture.pool.recycle(bytes);
            }
        }
        capture.context.job.progress.advance(bytes);
        Ok(None)
    }

    fn position(&self) -> u64 {
        self.leaf * LEAF + u64::from(self.builder.blocks())
    }

    /// A block that is not zero.
    fn block(&mut self, capture: &mut Capture<'_>, digest: Digest, block: &[u8]) -> Result<()> {
        if let Source::Stored { pack, slot } = self.parent_source(capture)?
            && capture.slot_has(pack, slot, &digest)
        {
            self.figures.unchanged_bytes += BLOCK_BYTES_U64;
            return self.push_stored(capture, pack, slot);
        }
        self.figures.changed_bytes += BLOCK_BYTES_U64;
        // Most runs were runs where they were stored, too.
        if let Some((pack, slot)) = self.previous
            && pack != PackId::SELF
            && let Some(slot) = slot.checked_add(1)
            && capture.slot_has(pack, slot, &digest)
            && capture.rely_on(pack)?
            && capture.slot_has(pack, slot, &digest)
        {
            self.figures.elsewhere_bytes += BLOCK_BYTES_U64;
            self.count_from_disk(capture, pack, slot);
            return self.push_stored(capture, pack, slot);
        }
        if let Some(slot) = capture.own.find(&digest)? {
            self.figures.self_bytes += BLOCK_BYTES_U64;
            if !self.is_disk && slot < capture.disk_slots {
                self.figures.from_disks_bytes += BLOCK_BYTES_U64;
            }
            return self.push_stored(capture, PackId::SELF, slot);
        }
        if let Some(hit) = capture.find_stored(&digest, self.previous)? {
            self.figures.elsewhere_bytes += BLOCK_BYTES_U64;
            self.count_from_disk(capture, hit.pack, hit.slot);
            return self.push_stored(capture, hit.pack, hit.slot);
        }
        self.figures.new_bytes += BLOCK_BYTES_U64;
        let slot = capture.store(digest, block)?;
        self.push_stored(capture, PackId::SELF, slot)
    }

    fn count_from_disk(&mut self, capture: &Capture<'_>, pack: PackId, slot: u32) {
        let disk_slots = capture.context.disk_slots.get(&pack).copied().unwrap_or(0);
        if !self.is_disk && slot < disk_slots {
            self.figures.from_disks_bytes += BLOCK_BYTES_U64;
        }
    }

    fn push_stored(&mut self, capture: &mut Capture<'_>, pack: PackId, slot: u32) -> Result<()> {
        self.previous = Some((pack, slot));
        self.builder.push(1, Source::Stored { pack, slot });
        self.end_full_leaf(capture)
    }

    fn zeros(&mut self, capture: &mut Capture<'_>, mut blocks: u64) -> Result<()> {
        self.figures.zero_bytes += blocks * BLOCK_BYTES_U64;
        while blocks > 0 {
            let run = blocks.min(LEAF - u64::from(self.builder.blocks()));
            self.count_zeroed(capture, run)?;
            self.builder.push(leaf_blocks(run), Source::Zero);
            blocks -= run;
            self.end_full_leaf(capture)?;
        }
        Ok(())
    }

    /// Counts blocks of a zero run that the parent had as data: they changed.
    fn count_zeroed(&mut self, capture: &Capture<'_>, run: u64) -> Result<()> {
        let start = self.builder.blocks();
        let Some(leaf) = self.parent_leaf(capture)? else { return Ok(()) };
        let changed: u64 = leaf
            .iter_range(start..start + leaf_blocks(run))
            .filter(|extent| extent.source != Source::Zero)
            .map(|extent| u64::from(extent.len))
            .sum();
        self.figures.changed_bytes += changed * BLOCK_BYTES_U64;
        Ok(())
    }

    /// Blocks that are as they were in the parent.
    fn keep(&mut self, capture: &mut Capture<'_>, mut blocks: u64) -> Result<()> {
        let shrunk_tail = self
            .size_bytes
            .filter(|&size| size < self.parent.size_bytes && !size.is_multiple_of(BLOCK_BYTES_U64));
        if let Some(size) = shrunk_tail
            && self.position() + blocks == blocks_in(size)
        {
            self.keep(capture, blocks - 1)?;
            return self.keep_shrunk_block(capture, size);
        }
        while blocks > 0 {
            let start = self.builder.blocks();
            let run = blocks.min(LEAF - u64::from(start));
            let (mut zero, mut stored) = (0, 0);
            match self.parent_leaf(capture)? {
                None => {
                    zero = run;
                    self.builder.push(leaf_blocks(run), Source::Zero);
                }
                Some(leaf) => {
                    for extent in leaf.iter_range(start..start + leaf_blocks(run)) {
                        match extent.source {
                            Source::Zero => zero += u64::from(extent.len),
                            Source::Stored { .. } => stored += u64::from(extent.len),
                        }
                        self.builder.push(extent.len, extent.source);
                    }
                }
            }
            self.figures.zero_bytes += zero * BLOCK_BYTES_U64;
            self.figures.unchanged_bytes += stored * BLOCK_BYTES_U64;
            self.previous = None;
            blocks -= run;
            self.end_full_leaf(capture)?;
        }
        Ok(())
    }

    /// The last block of an image that shrank within it: what was behind its new end is zero now.
    fn keep_shrunk_block(&mut self, capture: &mut Capture<'_>, size_bytes: u64) -> Result<()> {
        let Source::Stored { pack, slot } = self.parent_source(capture)? else {
            return self.zeros(capture, 1);
        };
        let packs = capture.context.packs;
        let mut block = packs
            .with_blocks(pack, slot, 1, <[u8]>::to_vec)
            .context(|| "cannot read the parent's last block".to_owned())?;
        let kept = usize::try_from(size_bytes % BLOCK_BYTES_U64).unwrap_or(0);
        block[kept..].fill(0);
        if is_zero(&block) {
            return self.zeros(capture, 1);
        }
        let digest = capture.context.key.digest(&block);
        self.block(capture, digest, &block)
    }

    /// What the parent has where the next block goes.
    fn parent_source(&mut self, capture: &Capture<'_>) -> Result<Source> {
        let at = self.builder.blocks();
        let known = self.parent_extent.filter(|extent| (extent.start..extent.end()).contains(&at));
        let extent = match known {
            Some(extent) => extent,
            None => {
                let extent = match self.parent_leaf(capture)? {
                    Some(leaf) => leaf.lookup(at),
                    None => return Ok(Source::Zero),
                };
                self.parent_extent = Some(extent);
                extent
            }
        };
        Ok(extent.source.advance(at - extent.start))
    }

    fn parent_leaf(&mut self, capture: &Capture<'_>) -> Result<Option<Arc<Leaf>>> {
        if let Some(leaf) = &self.parent_leaf {
            return Ok(leaf.clone());
        }
        let leaf = if self.leaf < self.parent.map.leaves() {
            self.parent
                .map
                .leaf(capture.context.packs, self.leaf)
                .context(|| "cannot read the parent's map".to_owned())?
        } else {
            None
        };
        self.parent_leaf = Some(leaf.clone());
        Ok(leaf)
    }

    fn end_full_leaf(&mut self, capture: &mut Capture<'_>) -> Result<()> {
        if u64::from(self.builder.blocks()) == LEAF { self.end_leaf(capture) } else { Ok(()) }
    }

    /// Ends the leaf and keeps it if the parent's is another.
    fn end_leaf(&mut self, capture: &mut Capture<'_>) -> Result<()> {
        let parent = self.parent_leaf(capture)?;
        let leaf = std::mem::take(&mut self.builder).finish();
        self.figures.extents += leaf.extents() as u64;
        let same = match &parent {
            Some(parent) => **parent == leaf,
            None => leaf.is_zero(),
        };
        if !same {
            let leaf = Arc::new(leaf);
            self.update
                .put_leaf(&mut capture.writer, self.leaf, &leaf)
                .context(|| "cannot write the map".to_owned())?;
        }
        self.leaf += 1;
        self.parent_leaf = None;
        self.parent_extent = None;
        Ok(())
    }

    fn finish(mut self, capture: &mut Capture<'_>, size_bytes: u64) -> Result<(Map, Figures)> {
        if self.builder.blocks() > 0 {
            self.end_leaf(capture)?;
        }
        self.update.resize(blocks_in(size_bytes));
        let map = self
            .update
            .finish(capture.context.packs, &mut capture.writer)
            .context(|| "cannot write the map".to_owned())?;
        Ok((map, self.figures))
    }
}

fn leaf_blocks(blocks: u64) -> u32 {
    u32::try_from(blocks).expect("at most LEAF_BLOCKS")
}
