//! An image whose contents stay where they are until somebody reads them: for a commit straight
//! from a folder, without a file in between.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use dormouse_sys::sparse::data_extents;

use crate::disk::BLOCK;
use crate::error::{Context, Result};
use crate::layout::Layout;
use crate::tree::content::{FileId, ReadAt};
use crate::tree::{NodeId, Tree};
use crate::write::data::open_content;
use crate::write::{Report, Watch, metadata};

/// What a run of the image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Bytes to be read.
    Data,

    /// Zeros.
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

/// An image that reads contents of files when it is asked for them.
#[derive(Debug)]
pub struct LazyImage {
    tree: Tree,
    size_bytes: u64,
    /// Metadata and staged contents, where the image has them.
    file: File,
    /// By `start`.
    pieces: Vec<Piece>,
}

impl LazyImage {
    /// Writes the metadata into `file`, which is empty or where contents were staged, and leaves
    /// all other contents where they are.
    pub fn new(
        tree: Tree,
        layout: &Layout,
        file: File,
        watch: &dyn Watch,
    ) -> Result<(LazyImage, Report)> {
        let size_bytes = layout.size_bytes();
        file.set_len(size_bytes).context(|| "cannot give the image its length".to_owned())?;
        let report = metadata(&tree, layout, &file, watch)?;
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
        Ok((LazyImage { tree, size_bytes, file, pieces }, report))
    }

    /// The image's length.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Fills `buf` from `offset`. A source that became shorter is an error.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        let first = self.pieces.partition_point(|piece| piece.end() <= offset);
        for piece in &self.pieces[first..] {
            let begin = piece.start * BLOCK;
            if begin >= end {
                break;
            }
            self.read_file(buf, offset, at..begin.max(at))?;
            let part = begin.max(at)..piece.end().min(end);
            self.read_piece(piece, buf, offset, part.clone())?;
            at = part.end;
        }
        self.read_file(buf, offset, at..end)
    }

    fn read_file(&self, buf: &mut [u8], offset: u64, part: Range<u64>) -> io::Result<()> {
        FileExt::read_exact_at(&self.file, slice(buf, offset, &part)?, part.start)
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

    /// Calls `visit` with the runs that are not zero, in order, each of whole blocks.
    pub fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, Run) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut written = data_extents(&self.file, 0..self.size_bytes).map(|range| {
            let range = range?;
            let end = range.end.next_multiple_of(BLOCK).min(self.size_bytes);
            Ok::<_, io::Error>(range.start / BLOCK * BLOCK..end)
        });
        let mut pieces = self.pieces.iter().map(|piece| piece.start * BLOCK..piece.end());
        let (mut file, mut piece) = (written.next().transpose()?, pieces.next());
        let mut run: Option<Range<u64>> = None;
        loop {
            let next = match (&file, &piece) {
                (Some(in_file), Some(in_piece)) if in_piece.start < in_file.start => {
                    std::mem::replace(&mut piece, pieces.next())
                }
                (None, Some(_)) => std::mem::replace(&mut piece, pieces.next()),
                (Some(_), _) => std::mem::replace(&mut file, written.next().transpose()?),
                (None, None) => None,
            };
            let Some(next) = next else { break };
            match &mut run {
                Some(run) if next.start <= run.end => run.end = run.end.max(next.end),
                _ => {
                    if let Some(done) = run.replace(next) {
                        visit(done, Run::Data)?;
                    }
                }
            }
        }
        run.map_or(Ok(()), |run| visit(run, Run::Data))
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
