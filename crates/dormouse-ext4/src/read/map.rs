//! Where the blocks of a file are: extent trees, indirect blocks, or the inode itself.

use crate::crc32c::crc32c;
use crate::disk::inode::{EXTENT_MAGIC, FLAG_EXTENTS};
use crate::error::{Result, corrupt};
use crate::read::Ext4;
use crate::read::inode::{FileKind, Inode};

/// Levels below the root of an extent tree.
const DEPTH_MAX: u16 = 5;

/// Lengths above this are those of extents that were reserved and not written.
const WRITTEN_BLOCKS_MAX: u16 = 32_768;

/// Bytes of an extent's or an index's entry, and of the header before them.
const ENTRY_BYTES: usize = 12;

/// A run of a file's blocks that hold data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first block in the file.
    pub logical: u64,

    /// The first block in the image.
    pub start: u64,

    /// How many.
    pub blocks: u64,
}

impl Ext4 {
    /// The runs of a file that hold data, in order; the rest are holes.
    pub fn runs(&self, inode: &Inode) -> Result<Vec<Run>> {
        let has_blocks = matches!(inode.kind, FileKind::File | FileKind::Folder)
            || inode.kind == FileKind::Symlink && inode.bytes >= 60;
        if !has_blocks || inode.is_inline() {
            return Ok(Vec::new());
        }
        let mut runs = Vec::new();
        // No block is in a map twice, so a map that has more than all has a circle.
        let mut left = self.blocks;
        if inode.flags & FLAG_EXTENTS != 0 {
            self.extents(inode, &inode.block, None, &mut runs, &mut left)?;
        } else {
            self.indirect(inode, &mut runs, &mut left)?;
        }
        let (mut next, mut sum) = (0, 0);
        for run in &runs {
            let end = run.start.checked_add(run.blocks).filter(|&end| end <= self.blocks);
            sum += run.blocks;
            if run.logical < next || end.is_none() || run.start == 0 || sum > self.blocks {
                return Err(corrupt(format!("inode {} has blocks out of order", inode.number)));
            }
            next = run.logical + run.blocks;
        }
        Ok(runs)
    }

    fn extents(
        &self,
        inode: &Inode,
        node: &[u8],
        depth: Option<u16>,
        runs: &mut Vec<Run>,
        left: &mut u64,
    ) -> Result<()> {
        let wrong = |what: &str| corrupt(format!("inode {}: {what}", inode.number));
        let half = |at: usize| u16::from_le_bytes([node[at], node[at + 1]]);
        let word =
            |at: usize| u32::from_le_bytes([node[at], node[at + 1], node[at + 2], node[at + 3]]);
        let (magic, count, most, level) = (half(0), half(2), half(4), half(6));
        let room = node.len() / ENTRY_BYTES - 1;
        if magic != EXTENT_MAGIC || count > most || usize::from(most) > room {
            return Err(wrong("an extent tree's node that is none"));
        }
        if level > DEPTH_MAX || depth.is_some_and(|above| level + 1 != above) {
            return Err(wrong("an extent tree of a wrong depth"));
        }
        for index in 0..usize::from(count) {
            let at = (index + 1) * ENTRY_BYTES;
            spend(inode, left)?;
            if level == 0 {
                let blocks = half(at + 4);
                if blocks == 0 {
                    return Err(wrong("an empty extent"));
                }
                // What was reserved and not written reads as zero.
                if blocks <= WRITTEN_BLOCKS_MAX {
                    runs.push(Run {
                        logical: u64::from(word(at)),
                        start: u64::from(half(at + 6)) << 32 | u64::from(word(at + 8)),
                        blocks: u64::from(blocks),
                    });
                }
                continue;
            }
            let below = u64::from(half(at + 8)) << 32 | u64::from(word(at + 4));
            let block = self.block(below)?;
            self.check_extent_block(inode, below, &block)?;
            self.extents(inode, &block, Some(level), runs, left)?;
        }
        Ok(())
    }

    fn check_extent_block(&self, inode: &Inode, number: u64, block: &[u8]) -> Result<()> {
        if !self.has_sums() {
            return Ok(());
        }
        let most = usize::from(u16::from_le_bytes([block[4], block[5]]));
        let at = ENTRY_BYTES * (most + 1);
        let sum = block.get(at..at + 4);
        if sum != Some(&crc32c(inode.seed, &block[..at.min(block.len())]).to_le_bytes()[..]) {
            let what = format!("inode {}: extent block {number} has a wrong sum", inode.number);
            return Err(corrupt(what));
        }
        Ok(())
    }

    fn indirect(&self, inode: &Inode, runs: &mut Vec<Run>, left: &mut u64) -> Result<()> {
        let words: Vec<u32> =
            inode.block.as_chunks::<4>().0.iter().map(|&word| u32::from_le_bytes(word)).collect();
        let mut logical = 0;
        let end = inode.bytes.div_ceil(self.block_bytes);
        for &block in &words[..12] {
            push(runs, logical, block);
            logical += 1;
        }
        for (level, &block) in (1..).zip(&words[12..15]) {
            self.indirect_block(
                inode,
                block,
                level,
                (&mut logical, end),
                (&mut *runs, &mut *left),
            )?;
        }
        runs.retain(|run| run.logical < end);
        Ok(())
    }

    fn indirect_block(
        &self,
        inode: &Inode,
        block: u32,
        level: u32,
        (logical, end): (&mut u64, u64),
        (runs, left): (&mut Vec<Run>, &mut u64),
    ) -> Result<()> {
        let words = self.block_bytes / 4;
        if block == 0 || *logical >= end {
            *logical += words.pow(level);
            return Ok(());
        }
        let bytes = self.block(block.into())?;
        for &word in bytes.as_chunks::<4>().0 {
            let below = u32::from_le_bytes(word);
            if below != 0 {
                spend(inode, left)?;
            }
            if level == 1 {
                push(runs, *logical, below);
                *logical += 1;
            } else {
                self.indirect_block(
                    inode,
                    below,
                    level - 1,
                    (&mut *logical, end),
                    (&mut *runs, &mut *left),
                )?;
            }
        }
        Ok(())
    }

    /// Fills `buf` with a file's content from `offset`, which must lie within it.
    pub fn read(&self, inode: &Inode, buf: &mut [u8], offset: u64) -> Result<()> {
        let runs = self.runs(inode)?;
        self.read_with(inode, &runs, buf, offset)
    }

    pub(crate) fn read_with(
        &self,
        inode: &Inode,
        runs: &[Run],
        buf: &mut [u8],
        offset: u64,
    ) -> Result<()> {
        inode.check_readable()?;
        let end = offset.checked_add(buf.len() as u64).filter(|&end| end <= inode.bytes);
        let Some(end) = end else {
            let what = format!("inode {} ends before byte {offset}+{}", inode.number, buf.len());
            return Err(corrupt(what));
        };
        if inode.is_inline() {
            let content = self.inline(inode)?;
            let from = usize::try_from(offset).unwrap_or(usize::MAX);
            buf.copy_from_slice(&content[from..from + buf.len()]);
            return Ok(());
        }
        buf.fill(0);
        let size = self.block_bytes;
        let first = runs.partition_point(|run| (run.logical + run.blocks) * size <= offset);
        for run in &runs[first..] {
            let begin = (run.logical * size).max(offset);
            let stop = ((run.logical + run.blocks) * size).min(end);
            if begin >= stop {
                break;
            }
            let mut at = begin;
            while at < stop {
                let block = run.start + at / size - run.logical;
                // Block by block only where the journal may have newer ones.
                let step = if self.is_on_disk() { stop - at } else { size - at % size };
                let step = step.min(stop - at);
                let from = usize::try_from(at - offset).unwrap_or(usize::MAX);
                let len = usize::try_from(step).unwrap_or(usize::MAX);
                self.read_block(block, &mut buf[from..from + len], at % size)?;
                at += step;
            }
        }
        Ok(())
    }
}

/// Takes one of the blocks that a map may have.
fn spend(inode: &Inode, left: &mut u64) -> Result<()> {
    *left = left
        .checked_sub(1)
        .ok_or_else(|| corrupt(format!("inode {} has more blocks than there are", inode.number)))?;
    Ok(())
}

fn push(runs: &mut Vec<Run>, logical: u64, block: u32) {
    let start = u64::from(block);
    if start == 0 {
        return;
    }
    match runs.last_mut() {
        Some(last)
            if last.logical + last.blocks == logical && last.start + last.blocks == start =>
        {
            last.blocks += 1;
        }
        _ => runs.push(Run { logical, start, blocks: 1 }),
    }
}
