//! What lies over metadata and staged contents: contents that stay where they are until somebody
//! reads them, superblocks, and what was staged and removed again.

use std::io;
use std::iter::Peekable;
use std::ops::Range;

use crate::disk::BLOCK;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::Layout;
use crate::sink::Sink;
use crate::tree::content::{FileId, ReadAt};
use crate::tree::{NodeId, Tree};
use crate::write::data::open_content;
use crate::write::metadata::{Metadata, Placed, metadata};
use crate::write::{Report, Watch};

/// What a run of the image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Bytes to be read.
    Data,

    /// Zeros, whatever was staged there.
    Zero,
}

/// A run of blocks that a file's content is read for.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: u64,
    logical: u32,
    blocks: u32,
    node: NodeId,
}

/// An image that reads contents of files when it is asked for them, over what a sink took of it: so
/// that it needs no file of its own.
#[derive(Debug)]
pub struct LazyImage {
    tree: Tree,
    size_bytes: u64,
    superblocks: Placed,
    /// By `start`.
    pieces: Vec<Piece>,
    freed: Vec<Range<u64>>,
}

impl LazyImage {
    /// Gives the metadata to `sink`, from its beginning on, and leaves contents that were not staged
    /// where they are.
    pub fn new(
        tree: Tree,
        layout: &Layout,
        sink: &mut dyn Sink,
        watch: &dyn Watch,
    ) -> Result<(LazyImage, Report)> {
        let size_bytes = layout.size_bytes();
        let Metadata { report, superblocks } = metadata(&tree, layout, sink, watch)?;
        let mut pieces = Vec::new();
        for &node in &layout.order {
            if !tree.node(node).is_file()
                || matches!(tree.node(node).source, FileId::EMPTY | FileId::PLACED)
            {
                continue;
            }
            watch.entries(1);
            pieces.extend(layout.extents(&tree, node).map(|extent| Piece {
                start: extent.start,
                logical: extent.logical,
                blocks: extent.blocks.into(),
                node,
            }));
        }
        pieces.sort_unstable_by_key(|piece| piece.start);
        let freed = layout.freed.clone();
        Ok((LazyImage { tree, size_bytes, superblocks, pieces, freed }, report))
    }

    /// The image's length.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Fills `buf` from `offset`, which lies in runs of data. A source that became shorter is an
    /// error.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let block = at / BLOCK;
            let superblock = self.superblocks.binary_search_by_key(&block, |&(at, _)| at);
            let next = match superblock {
                Ok(index) => {
                    let part = at..end.min((block + 1) * BLOCK);
                    let from = usize::try_from(at % BLOCK).map_err(io::Error::other)?;
                    let place = slice(buf, offset, &part)?;
                    place.copy_from_slice(&self.superblocks[index].1[from..from + place.len()]);
                    part.end
                }
                Err(_) => {
                    let index = self.pieces.partition_point(|piece| piece.end() <= at);
                    let piece = self.pieces.get(index).filter(|piece| piece.start <= block);
                    let piece = piece.ok_or_else(|| {
                        let what = format!("byte {at} of the image lies in no run of data");
                        Error::new(ErrorKind::InvalidInput, what)
                    })?;
                    let part = at..end.min(piece.end());
                    self.read_piece(piece, buf, offset, part.clone())?;
                    part.end
                }
            };
            at = next;
        }
        Ok(())
    }

    fn read_piece(
        &self,
        piece: &Piece,
        buf: &mut [u8],
        offset: u64,
        part: Range<u64>,
    ) -> io::Result<()> {
        let buf = slice(buf, offset, &part)?;
        let from = u64::from(piece.logical) * BLOCK + (part.start - piece.start * BLOCK);
        let bytes = self.tree.node(piece.node).size.saturating_sub(from).min(buf.len() as u64);
        let (content, past) = buf.split_at_mut(usize::try_from(bytes).map_err(io::Error::other)?);
        past.fill(0);
        if content.is_empty() {
            return Ok(());
        }
        let changed = |error: io::Error| {
            let path = self.tree.path_of(piece.node);
            io::Error::new(error.kind(), format!("cannot read {path} at byte {from}: {error}"))
        };
        let opened = open_content(&self.tree, piece.node)?;
        opened.read_exact_at(content, from).map_err(changed)
    }

    /// Calls `visit` with the runs that lie over what the sink took, in order, each of whole blocks.
    pub fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, Run) -> io::Result<()>,
    ) -> io::Result<()> {
        let superblocks = self.superblocks.iter().map(|&(at, _)| at * BLOCK..(at + 1) * BLOCK);
        let pieces = self.pieces.iter().map(|piece| piece.start * BLOCK..piece.end());
        let freed = self.freed.iter().map(|run| run.start * BLOCK..run.end * BLOCK);
        let mut data = Merged { a: superblocks.peekable(), b: pieces.peekable() }.peekable();
        let mut freed = freed.peekable();
        while let Some(zero) = freed.peek().cloned() {
            match data.next_if(|data| data.start < zero.start) {
                Some(data) => visit(data, Run::Data)?,
                None => {
                    visit(zero, Run::Zero)?;
                    freed.next();
                }
            }
        }
        data.try_for_each(|run| visit(run, Run::Data))
    }
}

/// Two rows of ranges, each in order, as one; those joined that touch.
struct Merged<A: Iterator, B: Iterator> {
    a: Peekable<A>,
    b: Peekable<B>,
}

impl<A, B> Iterator for Merged<A, B>
where
    A: Iterator<Item = Range<u64>>,
    B: Iterator<Item = Range<u64>>,
{
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let mut run = match (self.a.peek(), self.b.peek()) {
            (Some(a), Some(b)) if b.start < a.start => self.b.next(),
            (Some(_), _) => self.a.next(),
            (None, _) => self.b.next(),
        }?;
        loop {
            let next = self.a.next_if(|a| a.start == run.end);
            let Some(next) = next.or_else(|| self.b.next_if(|b| b.start == run.end)) else {
                return Some(run);
            };
            run.end = next.end;
        }
    }
}

impl Piece {
    fn end(&self) -> u64 {
        (self.start + u64::from(self.blocks)) * BLOCK
    }
}

/// The part of a buffer that begins at `offset` of the image.
fn slice<'a>(buf: &'a mut [u8], offset: u64, part: &Range<u64>) -> io::Result<&'a mut [u8]> {
    let from = usize::try_from(part.start - offset).map_err(io::Error::other)?;
    let len = usize::try_from(part.end - part.start).map_err(io::Error::other)?;
    Ok(&mut buf[from..from + len])
}
