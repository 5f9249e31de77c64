//! A leaf: the sorted extents of 32 MiB of image.
//!
//! Invariants, kept by every constructor:
//!
//! - the extents cover blocks 0 to [`LEAF_BLOCKS`] without gap or overlap; blocks past the end of
//!   the image are zero;
//! - neighbours that continue each other are one extent: zero beside zero, or the same pack with
//!   the slots running on. Same pack alone is not enough: joining across a gap in storage reads
//!   another block's bytes;
//! - packs are listed in the order of their first use, so equal contents are equal leaves.

use std::collections::HashMap;
use std::ops::Range;

use crate::block::BLOCK_BYTES_U64;
use crate::pack::PackId;

/// Blocks in a leaf.
pub const LEAF_BLOCKS: u32 = 8192;

/// Bytes of image in a leaf.
pub const LEAF_BYTES: u64 = LEAF_BLOCKS as u64 * BLOCK_BYTES_U64;

/// Where a run of blocks comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The blocks are zero.
    Zero,

    /// The blocks lie in a pack's slots, one after the other from `slot` on.
    Stored {
        /// The pack; [`PackId::SELF`] in a leaf that is being written.
        pack: PackId,

        /// The slot of the run's first block.
        slot: u32,
    },
}

impl Source {
    /// The source of the block `blocks` further on in a run of this one.
    #[must_use]
    pub fn advance(self, blocks: u32) -> Source {
        match self {
            Source::Zero => Source::Zero,
            Source::Stored { pack, slot } => Source::Stored { pack, slot: slot + blocks },
        }
    }
}

/// A run of blocks of a leaf with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first block, counted from the start of the leaf.
    pub start: u32,

    /// Blocks in the run; never zero.
    pub len: u32,

    /// Where they come from.
    pub source: Source,
}

impl Extent {
    /// The block behind the last one.
    pub fn end(&self) -> u32 {
        self.start + self.len
    }

    /// The part of the run inside `range`, which must touch it.
    #[must_use]
    pub fn clip(&self, range: &Range<u32>) -> Extent {
        let start = self.start.max(range.start);
        let end = self.end().min(range.end);
        Extent { start, len: end - start, source: self.source.advance(start - self.start) }
    }
}

/// Eight bytes an extent: its length is the distance to the next one's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    start: u16,
    /// 0 for zeros, else 1 + the index into `Leaf::packs`.
    pack: u16,
    slot: u32,
}

/// Blocks of a leaf that share an entry of [`Leaf::starts`].
const START_BLOCKS: u32 = 32;

/// Up to so many rows a plain search touches no more cache lines than one with `starts`.
const PLAIN_ROWS_MAX: usize = 64;

/// The extents of 32 MiB of image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    packs: Vec<PackId>,
    rows: Vec<Row>,
    /// For each 32 blocks the row that holds the first of them, in leaves of many rows. A search
    /// of a leaf that is not in the processor's cache waits for each line that it touches: with
    /// this it touches three, without it ten.
    starts: Box<[u16]>,
}

impl Leaf {
    /// A leaf of nothing but zeros.
    pub fn zero() -> Leaf {
        Leaf::from_rows(Vec::new(), vec![Row { start: 0, pack: 0, slot: 0 }])
    }

    fn from_rows(packs: Vec<PackId>, rows: Vec<Row>) -> Leaf {
        let mut starts = Vec::new();
        if rows.len() > PLAIN_ROWS_MAX {
            let mut row = 0_u16;
            for block in (0..LEAF_BLOCKS).step_by(START_BLOCKS as usize) {
                while rows.get(usize::from(row) + 1).is_some_and(|at| u32::from(at.start) <= block)
                {
                    row += 1;
                }
                starts.push(row);
            }
        }
        Leaf { packs, rows, starts: starts.into() }
    }

    /// The row that holds `block`; for one past the leaf the last row.
    fn row_of(&self, block: u32) -> usize {
        let bucket = (block / START_BLOCKS) as usize;
        let first = self.starts.get(bucket).map_or(0, |&row| usize::from(row));
        let last = self.starts.get(bucket + 1).map_or(self.rows.len() - 1, |&row| usize::from(row));
        let after = self.rows[first..=last].partition_point(|row| u32::from(row.start) <= block);
        first + after - 1
    }

    /// Whether every block is zero.
    pub fn is_zero(&self) -> bool {
        self.rows.len() == 1 && self.rows[0].pack == 0
    }

    /// How many extents there are, zeros included.
    pub fn extents(&self) -> usize {
        self.rows.len()
    }

    /// The packs that the extents refer to.
    pub fn packs(&self) -> &[PackId] {
        &self.packs
    }

    /// Bytes that the leaf takes in memory.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Leaf>()
            + self.packs.len() * size_of::<PackId>()
            + self.rows.len() * size_of::<Row>()
            + self.starts.len() * size_of::<u16>()
    }

    /// The extent that holds `block`, found by binary search.
    ///
    /// # Panics
    ///
    /// If `block` is not below [`LEAF_BLOCKS`].
    pub fn lookup(&self, block: u32) -> Extent {
        assert!(block < LEAF_BLOCKS, "block {block} of a leaf of {LEAF_BLOCKS}");
        self.extent(self.row_of(block))
    }

    /// All extents in order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        (0..self.rows.len()).map(|index| self.extent(index))
    }

    /// The extents that touch `range`, cut to it.
    pub fn iter_range(&self, range: Range<u32>) -> impl Iterator<Item = Extent> + '_ {
        let range = range.start..range.end.min(LEAF_BLOCKS);
        (self.row_of(range.start)..self.rows.len())
            .map(|index| self.extent(index))
            .take_while({
                let end = range.end;
                let start = range.start;
                move |extent| start < end && extent.start < end
            })
            .map(move |extent| extent.clip(&range))
    }

    /// This leaf with the runs of `patch`, sorted and disjoint, laid over it.
    ///
    /// # Panics
    ///
    /// If the runs are not sorted and disjoint or go past the leaf.
    #[must_use]
    pub fn overlay(&self, patch: &[Extent]) -> Leaf {
        let mut builder = LeafBuilder::new();
        let mut at = 0;
        for run in patch {
            assert!(at <= run.start, "runs are sorted and disjoint");
            self.iter_range(at..run.start)
                .for_each(|extent| builder.push(extent.len, extent.source));
            builder.push(run.len, run.source);
            at = run.end();
        }
        self.iter_range(at..LEAF_BLOCKS).for_each(|extent| builder.push(extent.len, extent.source));
        builder.finish()
    }

    /// This leaf with every block from `end` on zero.
    #[must_use]
    pub fn truncate(&self, end: u32) -> Leaf {
        if end >= LEAF_BLOCKS {
            return self.clone();
        }
        self.overlay(&[Extent { start: end, len: LEAF_BLOCKS - end, source: Source::Zero }])
    }

    /// This leaf with `from` renamed to `to`, as when a pack being written gets its name.
    #[must_use]
    pub fn rename_pack(&self, from: PackId, to: PackId) -> Leaf {
        if from != to && self.packs.contains(&from) && self.packs.contains(&to) {
            // Two packs become one: extents may continue each other now.
            let mut builder = LeafBuilder::new();
            for extent in self.iter() {
                let source = match extent.source {
                    Source::Stored { pack, slot } if pack == from => {
                        Source::Stored { pack: to, slot }
                    }
                    other => other,
                };
                builder.push(extent.len, source);
            }
            return builder.finish();
        }
        let packs = self.packs.iter().map(|&pack| if pack == from { to } else { pack }).collect();
        Leaf { packs, rows: self.rows.clone(), starts: self.starts.clone() }
    }

    /// The runs in which two leaves name different sources, with both of them.
    pub fn diff<'a>(&'a self, other: &'a Leaf) -> impl Iterator<Item = LeafDiff> + 'a {
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < LEAF_BLOCKS {
                let (old, new) = (self.lookup(at), other.lookup(at));
                let end = old.end().min(new.end());
                let diff = LeafDiff {
                    start: at,
                    len: end - at,
                    old: old.source.advance(at - old.start),
                    new: new.source.advance(at - new.start),
                };
                at = end;
                if diff.old != diff.new {
                    return Some(diff);
                }
            }
            None
        })
    }

    fn extent(&self, index: usize) -> Extent {
        let row = self.rows[index];
        let start = u32::from(row.start);
        let end = self.rows.get(index + 1).map_or(LEAF_BLOCKS, |next| u32::from(next.start));
        let source = match row.pack {
            0 => Source::Zero,
            number => Source::Stored { pack: self.packs[usize::from(number) - 1], slot: row.slot },
        };
        Extent { start, len: end - start, source }
    }
}

/// A run in which two leaves differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafDiff {
    /// The first block, counted from the start of the leaf.
    pub start: u32,

    /// Blocks in the run.
    pub len: u32,

    /// The source in the leaf that was asked.
    pub old: Source,

    /// The source in the leaf that it was compared with.
    pub new: Source,
}

/// Builds a leaf from runs given in order.
#[derive(Debug, Default)]
pub struct LeafBuilder {
    packs: Vec<PackId>,
    numbers: HashMap<PackId, u16>,
    rows: Vec<Row>,
    blocks: u32,
}

impl LeafBuilder {
    /// A builder at block 0.
    pub fn new() -> LeafBuilder {
        LeafBuilder::default()
    }

    /// Blocks pushed so far.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Appends a run; one that continues the last extent is joined to it. An empty run is nothing.
    ///
    /// # Panics
    ///
    /// If the leaf would get more than [`LEAF_BLOCKS`] blocks, or a run's slots would pass 2³².
    pub fn push(&mut self, len: u32, source: Source) {
        if len == 0 {
            return;
        }
        let (pack, slot) = match source {
            Source::Zero => (0, 0),
            Source::Stored { pack, slot } => (self.number(pack), slot),
        };
        self.push_numbered(len, pack, slot);
    }

    /// [`LeafBuilder::push`] for a reader whose packs are numbered already: `pack` is 0 for zeros
    /// or what [`LeafBuilder::add_pack`] returned.
    pub(super) fn push_numbered(&mut self, len: u32, pack: u16, slot: u32) {
        assert!(len <= LEAF_BLOCKS - self.blocks, "a leaf holds {LEAF_BLOCKS} blocks");
        assert!(slot.checked_add(len - 1).is_some(), "slots of a pack end at 2^32");
        let joins = self.rows.last().is_some_and(|last| {
            last.pack == pack
                && (pack == 0
                    || u64::from(last.slot) + u64::from(self.blocks - u32::from(last.start))
                        == u64::from(slot))
        });
        if !joins {
            let start = u16::try_from(self.blocks).expect("below LEAF_BLOCKS, as len is not zero");
            self.rows.push(Row { start, pack, slot });
        }
        self.blocks += len;
    }

    /// The leaf; blocks that were not pushed are zero.
    pub fn finish(mut self) -> Leaf {
        self.push(LEAF_BLOCKS - self.blocks, Source::Zero);
        Leaf::from_rows(self.packs, self.rows)
    }

    fn number(&mut self, pack: PackId) -> u16 {
        if let Some(last) = self.rows.last()
            && last.pack != 0
            && self.packs[usize::from(last.pack) - 1] == pack
        {
            return last.pack;
        }
        if let Some(&number) = self.numbers.get(&pack) {
            return number;
        }
        let number = self.add_pack(pack);
        self.numbers.insert(pack, number);
        number
    }

    /// Numbers a pack that was not used before.
    pub(super) fn add_pack(&mut self, pack: PackId) -> u16 {
        self.packs.push(pack);
        u16::try_from(self.packs.len()).expect("a leaf has fewer extents than u16 numbers")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(pack: u8, slot: u32) -> Source {
        Source::Stored { pack: PackId([pack; 16]), slot }
    }

    fn leaf(runs: &[(u32, Source)]) -> Leaf {
        let mut builder = LeafBuilder::new();
        runs.iter().for_each(|&(len, source)| builder.push(len, source));
        builder.finish()
    }

    /// Neighbours of one pack whose slots do not run on must stay two extents: joined, the second
    /// half would read blocks of somebody else. A peer shipped exactly that.
    #[test]
    fn neighbours_join_only_where_storage_is_contiguous() {
        let gap = leaf(&[(4, stored(1, 0)), (4, stored(1, 5))]);
        assert_eq!(gap.extents(), 3);
        assert_eq!(gap.lookup(4).source, stored(1, 5));
        let joined = leaf(&[(4, stored(1, 0)), (4, stored(1, 4))]);
        assert_eq!(joined.extents(), 2);
        assert_eq!(leaf(&[(4, stored(1, 0)), (4, stored(2, 4))]).extents(), 3);
        assert_eq!(leaf(&[(4, Source::Zero), (4, Source::Zero)]), Leaf::zero());
    }

    #[test]
    fn overlay_splits_trims_and_rejoins() {
        let base = leaf(&[(100, stored(1, 0))]);
        let patched = base.overlay(&[
            Extent { start: 10, len: 5, source: Source::Zero },
            Extent { start: 50, len: 50, source: stored(2, 7) },
        ]);
        assert_eq!(patched.lookup(9).end(), 10);
        assert_eq!(patched.lookup(12).source, Source::Zero);
        assert_eq!(patched.lookup(15), Extent { start: 15, len: 35, source: stored(1, 15) });
        assert_eq!(patched.lookup(50).source, stored(2, 7));
        let back = patched.overlay(&[
            Extent { start: 10, len: 5, source: stored(1, 10) },
            Extent { start: 50, len: 50, source: stored(1, 50) },
        ]);
        assert_eq!(back, base);
    }

    #[test]
    fn truncation_leaves_nothing_behind() {
        let base = leaf(&[(LEAF_BLOCKS, stored(1, 0))]);
        let short = base.truncate(1);
        assert_eq!(short.lookup(1).source, Source::Zero);
        assert_eq!(short.extents(), 2);
        assert_eq!(base.truncate(0), Leaf::zero());
        assert_eq!(base.truncate(LEAF_BLOCKS), base);
    }

    #[test]
    fn ranges_are_cut_at_both_ends() {
        let base = leaf(&[(10, stored(1, 0)), (10, Source::Zero), (10, stored(1, 20))]);
        let runs: Vec<_> = base.iter_range(5..25).collect();
        assert_eq!(
            runs,
            [
                Extent { start: 5, len: 5, source: stored(1, 5) },
                Extent { start: 10, len: 10, source: Source::Zero },
                Extent { start: 20, len: 5, source: stored(1, 20) },
            ]
        );
        assert_eq!(base.iter_range(7..7).count(), 0);
    }

    /// Leaves of many rows are searched otherwise than those of few.
    #[test]
    fn every_block_is_found_however_many_rows_there_are() {
        for rows in [1, 2, 63, 64, 65, 66, 300, 4096, 8191, 8192] {
            for len in [1, 2, 31, 32, 33, 100] {
                let mut builder = LeafBuilder::new();
                let mut model = Vec::new();
                for row in 0..rows {
                    let len = len.min(LEAF_BLOCKS - builder.blocks());
                    let source = if row % 3 == 2 { Source::Zero } else { stored(1, row * 1000) };
                    (0..len).for_each(|at| model.push(source.advance(at)));
                    builder.push(len, source);
                }
                model.resize(LEAF_BLOCKS as usize, Source::Zero);
                let leaf = builder.finish();
                for (block, &source) in (0..).zip(&model) {
                    let extent = leaf.lookup(block);
                    assert!((extent.start..extent.end()).contains(&block));
                    assert_eq!(extent.source.advance(block - extent.start), source);
                }
                assert_eq!(leaf.iter_range(0..LEAF_BLOCKS).count(), leaf.extents());
            }
        }
    }

    /// Runs out of order were laid at the wrong places, without a word.
    #[test]
    #[should_panic(expected = "sorted and disjoint")]
    fn an_overlay_out_of_order_is_refused() {
        let run = |start| Extent { start, len: 2, source: Source::Zero };
        drop(leaf(&[(10, stored(1, 0))]).overlay(&[run(4), run(5)]));
    }

    /// A range past the leaf's end gave an extent without blocks.
    #[test]
    fn a_range_past_the_end_is_cut() {
        let base = leaf(&[(LEAF_BLOCKS, stored(1, 0))]);
        assert_eq!(base.iter_range(LEAF_BLOCKS..LEAF_BLOCKS + 9).count(), 0);
        let last: Vec<_> = base.iter_range(LEAF_BLOCKS - 1..u32::MAX).collect();
        assert_eq!(last, [Extent { start: LEAF_BLOCKS - 1, len: 1, source: stored(1, 8191) }]);
    }

    /// A pack renamed to one that the leaf knew already stood in the table twice, and equal leaves
    /// were not equal.
    #[test]
    fn renaming_to_a_known_pack_joins() {
        let base = leaf(&[(4, stored(1, 0)), (4, stored(2, 4))]);
        let renamed = base.rename_pack(PackId([2; 16]), PackId([1; 16]));
        assert_eq!(renamed, leaf(&[(8, stored(1, 0))]));
        assert_eq!(base.rename_pack(PackId([3; 16]), PackId([1; 16])), base);
    }

    #[test]
    fn a_diff_names_both_sides() {
        let old = leaf(&[(10, stored(1, 0))]);
        let new = old.overlay(&[Extent { start: 8, len: 4, source: stored(2, 0) }]);
        let runs: Vec<_> = old.diff(&new).collect();
        assert_eq!(runs.len(), 2);
        assert_eq!(runs[0], LeafDiff { start: 8, len: 2, old: stored(1, 8), new: stored(2, 0) });
        assert_eq!(runs[1], LeafDiff { start: 10, len: 2, old: Source::Zero, new: stored(2, 2) });
    }
}
