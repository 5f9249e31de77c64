//! How an image is divided: blocks, groups, descriptors, inode tables.

use std::ops::Range;

use crate::disk::inode::INODE_BYTES;
use crate::disk::superblock::DESCRIPTOR_BYTES;
use crate::disk::{BLOCK, BLOCK_BYTES, GROUP_BLOCKS, backup_groups, has_superblock};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::options::{Journal, Options, Size};
use crate::layout::space::Space;
use crate::stage::Staged;

/// Groups whose tables lie together, as a power of two.
pub(crate) const LOG_FLEX_GROUPS: u8 = 4;

const FLEX_GROUPS: usize = 1 << LOG_FLEX_GROUPS;

/// Inodes that fit into a block of a table.
pub(crate) const INODES_PER_BLOCK: u32 = 16;

const _: () = assert!(INODES_PER_BLOCK as usize * INODE_BYTES == BLOCK_BYTES);

/// One inode for so many bytes.
const BYTES_PER_INODE: u64 = 16 << 10;

/// A group's inodes: as many as a bitmap of one block has bits.
const GROUP_INODES_MAX: u64 = GROUP_BLOCKS;

/// Descriptors in a block.
const DESCRIPTORS_PER_BLOCK: u64 = (BLOCK_BYTES / DESCRIPTOR_BYTES) as u64;

/// Blocks for descriptors where the size is not known or below 50 GiB: those of 512 GiB.
pub(crate) const AREA_BLOCKS: u64 = 64;

/// Images from this many blocks of descriptors on reserve ten times as many.
const SMALL_DESCRIPTOR_BLOCKS: u64 = AREA_BLOCKS / 10;

/// The most that one indirect block of the resize inode can reserve.
const RESERVED_BLOCKS_MAX: u64 = BLOCK / 4;

/// A last group with less room than this beside its tables is left out.
const LAST_GROUP_BLOCKS_MIN: u64 = 50;

/// Sizes that are chosen here are multiples of this many blocks, 1 MiB.
const SIZE_STEP_BLOCKS: u64 = 256;

/// The most blocks: 2^32 groups would be more than inode numbers can name.
const BLOCKS_MAX: u64 = 1 << 44;

/// Where a group's bitmaps and table lie.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tables {
    pub(crate) block_bitmap: u64,
    pub(crate) inode_bitmap: u64,
    pub(crate) inode_table: u64,
}

/// How an image is divided.
#[derive(Clone, Debug)]
pub(crate) struct Geometry {
    pub(crate) size_bytes: u64,
    pub(crate) blocks: u64,
    pub(crate) inodes_per_group: u32,
    pub(crate) descriptor_blocks: u64,
    pub(crate) reserved_descriptors: u64,
    /// The first block after superblock and descriptors.
    pub(crate) first_block: u64,
    pub(crate) journal_blocks: Option<u64>,
    pub(crate) tables: Vec<Tables>,
    fixed: Vec<Range<u64>>,
    tables_from: u64,
}

impl Geometry {
    /// The geometry for a tree that needs `demand` blocks and `inodes` inodes.
    pub(crate) fn choose(
        options: &Options,
        demand: u64,
        inodes: u64,
        staged: &Staged,
    ) -> Result<Geometry> {
        match options.size {
            Size::Exactly(bytes) => {
                let geometry = Geometry::divide(bytes, options, inodes, staged)?;
                let (need, room) = (demand + geometry.journal(), geometry.room(staged)?);
                if need > room {
                    let what = format!(
                        "the tree needs {} KiB and an image of {bytes} bytes has room for {}",
                        need * 4,
                        room * 4
                    );
                    return Err(Error::new(ErrorKind::DoesNotFit, what));
                }
                Ok(geometry)
            }
            Size::Slack(slack) => {
                let free = slack.div_ceil(BLOCK);
                let mut blocks = (staged.end() + demand + free + AREA_BLOCKS + SIZE_STEP_BLOCKS)
                    .next_multiple_of(SIZE_STEP_BLOCKS);
                loop {
                    match Geometry::divide(blocks * BLOCK, options, inodes, staged) {
                        Ok(geometry) => {
                            let need = demand + free + geometry.journal();
                            let room = geometry.room(staged).unwrap_or(0);
                            if room >= need {
                                return Ok(geometry);
                            }
                            blocks += need - room;
                        }
                        Err(error) if error.kind() == ErrorKind::DoesNotFit => {
                            if blocks > BLOCKS_MAX {
                                return Err(error);
                            }
                            blocks += blocks / 8;
                        }
                        Err(error) => return Err(error),
                    }
                    blocks = blocks.next_multiple_of(SIZE_STEP_BLOCKS);
                }
            }
        }
    }

    /// One step more, where the size is ours to choose.
    pub(crate) fn larger(
        &self,
        options: &Options,
        inodes: u64,
        staged: &Staged,
    ) -> Option<Geometry> {
        let Size::Slack(_) = options.size else { return None };
        let blocks = (self.blocks + self.blocks / 64 + 1).next_multiple_of(SIZE_STEP_BLOCKS);
        Geometry::divide(blocks * BLOCK, options, inodes, staged).ok()
    }

    fn divide(bytes: u64, options: &Options, inodes: u64, staged: &Staged) -> Result<Geometry> {
        let mut blocks = bytes / BLOCK;
        loop {
            if blocks > BLOCKS_MAX {
                return Err(does_not_fit(format!("an image of {bytes} bytes is too large")));
            }
            let groups = blocks.div_ceil(GROUP_BLOCKS);
            let inodes_per_group = inodes_per_group(blocks, groups, options, inodes)?;
            let descriptor_blocks = groups.div_ceil(DESCRIPTORS_PER_BLOCK);
            let area = staged.area().unwrap_or_else(|| area_blocks(bytes));
            if descriptor_blocks > area {
                return Err(does_not_fit(format!(
                    "a stream of more than 500 GiB: say the size of the image ({bytes} bytes need \
                     {descriptor_blocks} blocks of descriptors, {area} are left for them)"
                )));
            }
            let table_blocks = u64::from(inodes_per_group / INODES_PER_BLOCK);
            let rest = blocks % GROUP_BLOCKS;
            let copies = if has_superblock(groups - 1) { 1 + area } else { 0 };
            if groups > 1 && rest > 0 && rest < copies + 2 + table_blocks + LAST_GROUP_BLOCKS_MIN {
                blocks -= rest;
                continue;
            }
            let first_block = 1 + area;
            let mut geometry = Geometry {
                size_bytes: bytes,
                blocks,
                inodes_per_group,
                descriptor_blocks,
                reserved_descriptors: area - descriptor_blocks,
                first_block,
                journal_blocks: journal_blocks(options.journal, blocks),
                tables: Vec::new(),
                fixed: Vec::new(),
                tables_from: first_block.max(staged.end()),
            };
            geometry.place_tables()?;
            return Ok(geometry);
        }
    }

    fn place_tables(&mut self) -> Result<()> {
        let groups = self.blocks.div_ceil(GROUP_BLOCKS);
        let copies: Vec<Range<u64>> = backup_groups(groups)
            .into_iter()
            .map(|group| group * GROUP_BLOCKS)
            .map(|first| first..first + self.first_block)
            .collect();
        let space = Space::new(copies.clone(), self.blocks);
        let mut fixed = copies;
        let table_blocks = u64::from(self.inodes_per_group / INODES_PER_BLOCK);
        let count = usize::try_from(groups).map_err(|_| does_not_fit("too many groups"))?;
        self.tables = vec![Tables::default(); count];
        let mut at = self.tables_from;
        for (flex, groups) in self.tables.chunks_mut(FLEX_GROUPS).enumerate() {
            at = at.max((flex * FLEX_GROUPS) as u64 * GROUP_BLOCKS);
            let mut take = |blocks: u64| {
                let run = space.in_one_piece(at, blocks);
                at = run.end;
                fixed.push(run.clone());
                run.start
            };
            groups.iter_mut().for_each(|tables| tables.block_bitmap = take(1));
            groups.iter_mut().for_each(|tables| tables.inode_bitmap = take(1));
            groups.iter_mut().for_each(|tables| tables.inode_table = take(table_blocks));
        }
        if at > self.blocks {
            let blocks = self.blocks;
            return Err(does_not_fit(format!("{blocks} blocks have no room for their tables")));
        }
        self.fixed = fixed;
        Ok(())
    }

    /// What can be given out beside copies and tables.
    pub(crate) fn space(&self) -> Result<Space> {
        Ok(Space::new(self.fixed.clone(), self.blocks))
    }

    fn room(&self, staged: &Staged) -> Result<u64> {
        Ok(self.space()?.room(self.first_block.max(staged.end())))
    }

    fn journal(&self) -> u64 {
        // A journal over 128 MiB is in several pieces.
        self.journal_blocks.map_or(0, |blocks| blocks + 1)
    }

    /// The number of groups.
    pub(crate) fn groups(&self) -> u64 {
        self.tables.len() as u64
    }

    /// The blocks of a group.
    pub(crate) fn group_range(&self, group: u64) -> Range<u64> {
        let first = group * GROUP_BLOCKS;
        first..(first + GROUP_BLOCKS).min(self.blocks)
    }
}

fn does_not_fit(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::DoesNotFit, what)
}

/// Blocks for descriptors, those that growth will need among them.
pub(crate) fn area_blocks(bytes: u64) -> u64 {
    let groups = (bytes / BLOCK).div_ceil(GROUP_BLOCKS);
    let now = groups.div_ceil(DESCRIPTORS_PER_BLOCK);
    if now <= SMALL_DESCRIPTOR_BLOCKS {
        return AREA_BLOCKS;
    }
    (now * 10).min(now + RESERVED_BLOCKS_MAX)
}

fn inodes_per_group(blocks: u64, groups: u64, options: &Options, inodes: u64) -> Result<u32> {
    // Some to spare: an image of which all inodes are taken is of little use.
    let needed = inodes + inodes / 8 + 64;
    let wanted = match options.inodes {
        Some(wanted) => u64::from(wanted).max(inodes),
        None => (blocks * BLOCK / BYTES_PER_INODE).max(needed),
    };
    let per_block = u64::from(INODES_PER_BLOCK);
    let per_group = wanted.div_ceil(groups.max(1)).next_multiple_of(per_block).max(per_block);
    if per_group > GROUP_INODES_MAX || per_group * groups > u64::from(u32::MAX) {
        let most = (GROUP_INODES_MAX * groups).min(u32::MAX.into());
        if inodes > most || options.inodes.is_some() {
            return Err(does_not_fit(format!("{wanted} inodes; {blocks} blocks have {most}")));
        }
        let least = (u64::from(u32::MAX) / groups / per_block * per_block).min(GROUP_INODES_MAX);
        return Ok(u32::try_from(least).unwrap_or(u32::MAX));
    }
    Ok(u32::try_from(per_group).unwrap_or(u32::MAX))
}

fn journal_blocks(journal: Journal, blocks: u64) -> Option<u64> {
    match journal {
        Journal::None => None,
        Journal::Bytes(bytes) => Some(bytes.div_ceil(BLOCK)),
        Journal::Standard => {
            // Blocks of the image, and of its journal: what mke2fs takes, too.
            let steps = [
                (2 << 10, 0),
                (32 << 10, 1 << 10),
                (256 << 10, 4 << 10),
                (512 << 10, 8 << 10),
                (4 << 20, 16 << 10),
                (8 << 20, 32 << 10),
                (16 << 20, 64 << 10),
                (32 << 20, 128 << 10),
            ];
            let found = steps.iter().find(|(below, _)| blocks < *below);
            Some(found.map_or(256 << 10, |&(_, journal)| journal)).filter(|&journal| journal > 0)
        }
    }
}
