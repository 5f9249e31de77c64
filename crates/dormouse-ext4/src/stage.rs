//! Contents of streams, put at once where they will be in the image.
//!
//! A tar from a pipe says what is in it only as it goes by. Its contents are written from the first
//! block after the area for descriptors on, around the places where copies of the superblock will
//! be; the layout puts tables and folders behind them. What a later layer removes is punched out
//! and stays free.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use dormouse_sys::sparse::punch_hole;

use crate::disk::{BLOCK, BLOCK_BYTES, GROUP_BLOCKS, backup_groups};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::layout::data_blocks;
use crate::layout::geometry::{AREA_BLOCKS, area_blocks};
use crate::layout::options::Size;
use crate::layout::space::Space;
use crate::tree::content::FileId;
use crate::tree::{NodeId, Tree};
use crate::write::data::write_nonzero;

/// Groups whose copies are kept free: those of 16 TiB.
const GROUPS: u64 = 1 << 17;

/// Contents are gathered up to so many bytes, those of small files together.
const PIECE_BYTES: usize = 1 << 20;

/// What was staged, for the layout.
#[derive(Clone, Debug, Default)]
pub struct Staged {
    end: u64,
    freed: Vec<Range<u64>>,
    area: Option<u64>,
}

impl Staged {
    /// Nothing was: all contents are still elsewhere.
    pub fn nothing() -> Staged {
        Staged::default()
    }

    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    pub(crate) fn freed(&self) -> &[Range<u64>] {
        &self.freed
    }

    /// Blocks for descriptors, if contents depend on it already.
    pub(crate) fn area(&self) -> Option<u64> {
        self.area
    }
}

/// Puts contents into an image that has no plan yet.
#[derive(Debug)]
pub struct Stage {
    file: Arc<File>,
    space: Space,
    staged: Staged,
    /// What is not written yet, and where in the file it goes.
    buffer: Vec<u8>,
    at: u64,
}

impl Stage {
    /// Begins to stage into an empty file that will be the image, of a size if that is known.
    pub fn new(file: Arc<File>, size: Size) -> Stage {
        let area = match size {
            Size::Exactly(bytes) => area_blocks(bytes),
            Size::Slack(_) => AREA_BLOCKS,
        };
        let copies = backup_groups(GROUPS).into_iter().map(|group| group * GROUP_BLOCKS);
        let space = Space::new(copies.map(|at| at..at + 1 + area).collect(), u64::MAX);
        let staged = Staged { end: 1 + area, freed: Vec::new(), area: Some(area) };
        Stage { file, space, staged, buffer: Vec::with_capacity(PIECE_BYTES), at: 0 }
    }

    /// Takes blocks for a content, and returns its id and what writes it.
    pub(crate) fn begin(&mut self, blocks: u64) -> Result<(FileId, Placing<'_>)> {
        let start = self.space.skip(self.staged.end);
        let end = self.space.runs(start, blocks).last().map_or(self.staged.end, |run| run.end);
        if end > GROUPS * GROUP_BLOCKS {
            let what = "contents of more than 16 TiB";
            return Err(Error::new(ErrorKind::DoesNotFit, what));
        }
        self.staged.end = end;
        let runs = self.space.runs(start, blocks).collect::<Vec<_>>().into_iter();
        let placing = Placing { stage: self, runs, left: 0 };
        Ok((FileId::placed(start), placing))
    }

    fn free(&mut self, tree: &Tree, nodes: &[NodeId]) -> Result<()> {
        self.flush()?;
        for &node in nodes {
            let inode = &tree.node(node);
            if !inode.is_file() || inode.source != FileId::PLACED {
                continue;
            }
            for run in self.space.runs(inode.key, data_blocks(tree, node)) {
                punch_hole(&*self.file, run.start * BLOCK, (run.end - run.start) * BLOCK)
                    .context(|| "cannot free what a later layer removed".to_owned())?;
                self.staged.freed.push(run);
            }
        }
        Ok(())
    }

    /// Frees the contents of all files that the tree lost since the last time.
    pub fn release(&mut self, tree: &mut Tree) -> Result<()> {
        let freed = tree.take_freed();
        self.free(tree, &freed)
    }

    /// Writes the rest, and tells what was staged.
    pub fn finish(mut self) -> Result<Staged> {
        self.flush()?;
        Ok(self.staged)
    }

    /// Goes on at a block.
    fn seek(&mut self, block: u64) -> Result<()> {
        if self.at + self.buffer.len() as u64 != block * BLOCK {
            self.flush()?;
            self.at = block * BLOCK;
        }
        Ok(())
    }

    fn append(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let room = PIECE_BYTES - self.buffer.len();
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            self.buffer.extend_from_slice(now);
            bytes = rest;
            if self.buffer.len() == PIECE_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Writes what is gathered, which ends where a block does: contents are padded.
    fn flush(&mut self) -> Result<()> {
        write_nonzero(&self.file, &self.buffer, self.at)
            .context(|| format!("cannot write the image at byte {}", self.at))?;
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

/// Writes one content, block after block.
#[derive(Debug)]
pub(crate) struct Placing<'a> {
    stage: &'a mut Stage,
    runs: std::vec::IntoIter<Range<u64>>,
    /// Bytes that the current run has room for.
    left: u64,
}

impl Placing<'_> {
    /// Appends bytes of the content.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.left == 0 {
                let run = self.runs.next().ok_or_else(|| {
                    Error::new(ErrorKind::BadArchive, "more content than was announced")
                })?;
                self.stage.seek(run.start)?;
                self.left = (run.end - run.start) * BLOCK;
            }
            let now = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
            let (now, rest) = bytes.split_at(now);
            self.stage.append(now)?;
            self.left -= now.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Completes the last block with zeros.
    pub(crate) fn finish(mut self) -> Result<()> {
        let zeros = usize::try_from(self.left % BLOCK).unwrap_or(0);
        self.write(&[0; BLOCK_BYTES][..zeros])
    }
}
