//! Contents of streams, put at once where they will be in the image.
//!
//! A tar from a pipe says what is in it only as it goes by. Its contents are given out blocks from the
//! first one after the area for descriptors on, around the places where copies of the superblock will
//! be, and go there at once: into the image's file, or to a [`Sink`] such as a store. The layout puts
//! tables and folders behind them. What a later layer removes is punched out of a file, is zero in
//! what a sink took, and stays free.

mod file;

use std::fmt;
use std::fs::File;
use std::mem;
use std::ops::Range;
use std::sync::Arc;

use crate::disk::{BLOCK, BLOCK_BYTES, GROUP_BLOCKS, backup_groups};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::layout::data_blocks;
use crate::layout::geometry::{AREA_BLOCKS, area_blocks};
use crate::layout::options::Size;
use crate::layout::space::Space;
use crate::sink::Sink;
use crate::stage::file::FileTarget;
use crate::tree::content::FileId;
use crate::tree::{NodeId, Tree};

/// Groups whose copies are kept free: those of 16 TiB.
const GROUPS: u64 = 1 << 17;

/// What was staged, for the layout.
#[derive(Clone, Debug, Default)]
pub struct Staged {
    end: u64,
    freed: Vec<Range<u64>>,
    area: Option<u64>,
    copied_bytes: u64,
}

impl Staged {
    /// Nothing was: all contents are still elsewhere.
    pub fn nothing() -> Staged {
        Staged::default()
    }

    /// The end of what was staged, in bytes of the image.
    pub fn end_bytes(&self) -> u64 {
        self.end * BLOCK
    }

    /// Bytes of contents that were put into the image, those that a later layer removed among them.
    pub fn copied_bytes(&self) -> u64 {
        self.copied_bytes
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

/// Where contents go.
enum Target<'a> {
    File(FileTarget),
    Sink(&'a mut dyn Sink),
}

impl fmt::Debug for Target<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::File(file) => file.fmt(f),
            Target::Sink(_) => f.write_str("Sink"),
        }
    }
}

/// Puts contents into an image that has no plan yet.
#[derive(Debug)]
pub struct Stage<'a> {
    target: Target<'a>,
    space: Space,
    staged: Staged,
}

impl<'a> Stage<'a> {
    /// Begins to stage into an empty file that will be the image, of a size if that is known.
    pub fn new(file: Arc<File>, size: Size) -> Stage<'a> {
        Stage::into_target(Target::File(FileTarget::new(file)), size)
    }

    /// Begins to stage for an image that `sink` takes.
    pub fn into_sink(sink: &'a mut dyn Sink, size: Size) -> Stage<'a> {
        Stage::into_target(Target::Sink(sink), size)
    }

    fn into_target(target: Target<'a>, size: Size) -> Stage<'a> {
        let area = match size {
            Size::Exactly(bytes) => area_blocks(bytes),
            Size::Slack(_) => AREA_BLOCKS,
        };
        let copies = backup_groups(GROUPS).into_iter().map(|group| group * GROUP_BLOCKS);
        let space = Space::new(copies.map(|at| at..at + 1 + area).collect(), u64::MAX);
        let staged = Staged { end: 1 + area, area: Some(area), ..Staged::default() };
        Stage { target, space, staged }
    }

    /// Takes blocks for a content, and returns its id and what writes it.
    pub(crate) fn begin(&mut self, blocks: u64) -> Result<(FileId, Placing<'_, 'a>)> {
        let start = self.space.skip(self.staged.end);
        let end = self.space.runs(start, blocks).last().map_or(self.staged.end, |run| run.end);
        if end > GROUPS * GROUP_BLOCKS {
            let what = "contents of more than 16 TiB";
            return Err(Error::new(ErrorKind::DoesNotFit, what));
        }
        self.staged.end = end;
        let runs = self.space.runs(start, blocks).collect::<Vec<_>>().into_iter();
        let placing = Placing { stage: self, runs, at: 0, left: 0 };
        Ok((FileId::placed(start), placing))
    }

    fn free(&mut self, tree: &Tree, nodes: &[NodeId]) -> Result<()> {
        self.drain()?;
        for &node in nodes {
            let inode = &tree.node(node);
            if !inode.is_file() || inode.source != FileId::PLACED {
                continue;
            }
            for run in self.space.runs(inode.key, data_blocks(tree, node)) {
                if let Target::File(file) = &self.target {
                    let freed = file.free(&run);
                    freed.context(|| "cannot free what a later layer removed".to_owned())?;
                }
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
        self.drain()?;
        Ok(mem::take(&mut self.staged))
    }

    fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let written = match &mut self.target {
            Target::File(file) => file.write(bytes, offset),
            Target::Sink(sink) => sink.write(bytes, offset),
        };
        written.context(|| format!("cannot write the image before byte {offset}"))
    }

    fn drain(&mut self) -> Result<()> {
        let Target::File(file) = &mut self.target else { return Ok(()) };
        file.drain().context(|| "cannot write the image".to_owned())
    }
}

/// Writes one content, block after block.
#[derive(Debug)]
pub(crate) struct Placing<'s, 'a> {
    stage: &'s mut Stage<'a>,
    runs: std::vec::IntoIter<Range<u64>>,
    /// Where in the image the next byte goes, and how many the current run has room for.
    at: u64,
    left: u64,
}

impl Placing<'_, '_> {
    /// Appends bytes of the content.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stage.staged.copied_bytes += bytes.len() as u64;
        self.put(bytes)
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.left == 0 {
                let run = self.runs.next().ok_or_else(|| {
                    Error::new(ErrorKind::BadArchive, "more content than was announced")
                })?;
                self.at = run.start * BLOCK;
                self.left = (run.end - run.start) * BLOCK;
            }
            let now = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
            let (now, rest) = bytes.split_at(now);
            self.stage.write(now, self.at)?;
            self.at += now.len() as u64;
            self.left -= now.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Completes the last block with zeros.
    pub(crate) fn finish(mut self) -> Result<()> {
        let zeros = usize::try_from(self.left % BLOCK).unwrap_or(0);
        self.put(&[0; BLOCK_BYTES][..zeros])
    }
}
