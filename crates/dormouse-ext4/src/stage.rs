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

/// Contents are written in pieces of this size.
const PIECE_BYTES: usize = 256 << 10;

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
        Stage { file, space, staged: Staged { end: 1 + area, freed: Vec::new(), area: Some(area) } }
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
        let placing = Placing {
            file: &self.file,
            runs: self.space.runs(start, blocks).collect::<Vec<_>>().into_iter(),
            run: 0..0,
            buffer: Vec::new(),
        };
        Ok((FileId::placed(start), placing))
    }

    fn free(&mut self, tree: &Tree, nodes: &[NodeId]) -> Result<()> {
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

    /// What was staged.
    pub fn finish(self) -> Staged {
        self.staged
    }
}

/// Writes one content, block after block.
#[derive(Debug)]
pub(crate) struct Placing<'a> {
    file: &'a File,
    runs: std::vec::IntoIter<Range<u64>>,
    run: Range<u64>,
    buffer: Vec<u8>,
}

impl Placing<'_> {
    /// Appends bytes of the content.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.buffer.is_empty() && bytes.len() >= PIECE_BYTES {
                let whole = bytes.len() / BLOCK_BYTES * BLOCK_BYTES;
                let (now, rest) = bytes.split_at(whole);
                self.put(now)?;
                bytes = rest;
                continue;
            }
            let (now, rest) = bytes.split_at(bytes.len().min(PIECE_BYTES - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = rest;
            if self.buffer.len() == PIECE_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Appends the zeros that complete a block.
    pub(crate) fn pad(&mut self) -> Result<()> {
        let zeros = self.buffer.len().next_multiple_of(BLOCK_BYTES) - self.buffer.len();
        self.write(&[0; BLOCK_BYTES][..zeros])
    }

    /// Writes what is left.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.pad()?;
        self.flush()
    }

    fn flush(&mut self) -> Result<()> {
        let buffer = std::mem::take(&mut self.buffer);
        self.put(&buffer)?;
        self.buffer = buffer;
        self.buffer.clear();
        Ok(())
    }

    /// Writes whole blocks.
    fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.run.is_empty() {
                self.run = self.runs.next().ok_or_else(|| {
                    Error::new(ErrorKind::BadArchive, "more content than was announced")
                })?;
            }
            let room = (self.run.end - self.run.start) * BLOCK;
            let now = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
            let (now, rest) = bytes.split_at(now);
            write_nonzero(self.file, now, self.run.start * BLOCK)
                .context(|| format!("cannot write the image's block {}", self.run.start))?;
            self.run.start += (now.len() / BLOCK_BYTES) as u64;
            bytes = rest;
        }
        Ok(())
    }
}
