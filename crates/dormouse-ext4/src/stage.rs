//! Contents of streams, put at once where they will be in the image.
//!
//! A tar from a pipe says what is in it only as it goes by. Its contents are written from the first
//! block after the area for descriptors on, around the places where copies of the superblock will
//! be; the layout puts tables and folders behind them. What a later layer removes is punched out
//! and stays free.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::{io, mem};

use dormouse_sys::sparse::punch_hole;

use crate::disk::{BLOCK, BLOCK_BYTES, GROUP_BLOCKS, backup_groups};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::layout::data_blocks;
use crate::layout::geometry::{AREA_BLOCKS, area_blocks};
use crate::layout::options::Size;
use crate::layout::space::Space;
use crate::tree::content::FileId;
use crate::tree::{NodeId, Tree};
use crate::write::buffer::Buffer;
use crate::write::content_file::{ContentFile, DIRECT_FROM_BYTES};

/// Groups whose copies are kept free: those of 16 TiB.
const GROUPS: u64 = 1 << 17;

/// Contents are gathered up to so many bytes, those of small files together.
const PIECE_BYTES: usize = 1 << 20;

/// Pieces on their way to the disk.
const PIECES_MAX: usize = 4;

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
    buffer: Buffer,
    at: u64,
    direct_from_bytes: u64,
    writer: Option<Writer>,
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
        Stage {
            file,
            space,
            staged,
            buffer: Buffer::new(0),
            at: 0,
            direct_from_bytes: DIRECT_FROM_BYTES,
            writer: None,
        }
    }

    /// Keeps all contents in the page cache, for an image that is read as soon as it is made.
    #[must_use]
    pub fn kept_in_cache(mut self) -> Stage {
        self.direct_from_bytes = u64::MAX;
        self
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
        self.drain()?;
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
        self.drain()?;
        Ok(mem::take(&mut self.staged))
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
        if self.buffer.capacity() == 0 {
            self.buffer = Buffer::new(PIECE_BYTES);
        }
        while !bytes.is_empty() {
            bytes = self.buffer.extend(bytes);
            if self.buffer.room() == 0 {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Hands over what is gathered, which ends where a block does: contents are padded.
    fn flush(&mut self) -> Result<()> {
        let len = self.buffer.len() as u64;
        if len == 0 {
            return Ok(());
        }
        let writer = self
            .writer
            .get_or_insert_with(|| Writer::new(Arc::clone(&self.file), self.direct_from_bytes));
        let empty = writer.swap(mem::replace(&mut self.buffer, Buffer::new(0)), self.at);
        self.buffer =
            empty.context(|| format!("cannot write the image before byte {}", self.at))?;
        self.at += len;
        Ok(())
    }

    /// Hands over the rest, and waits until all is written.
    fn drain(&mut self) -> Result<()> {
        self.flush()?;
        let Some(writer) = &mut self.writer else { return Ok(()) };
        writer.drain().context(|| format!("cannot write the image before byte {}", self.at))
    }
}

/// Writes pieces on a thread of its own, so that unpacking goes on meanwhile.
#[derive(Debug)]
struct Writer {
    pieces: Option<SyncSender<(Buffer, u64)>>,
    written: Receiver<io::Result<Buffer>>,
    /// Pieces that were handed over and did not come back.
    under_way: usize,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    fn new(file: Arc<File>, direct_from_bytes: u64) -> Writer {
        let (pieces, receiver) = sync_channel::<(Buffer, u64)>(PIECES_MAX);
        let (sender, written) = sync_channel(PIECES_MAX);
        let thread = thread::spawn(move || {
            let cached = ContentFile::cached(Arc::clone(&file));
            let direct = ContentFile::direct(file);
            let mut done = 0;
            for (mut piece, at) in receiver {
                let target = if done < direct_from_bytes { &cached } else { &direct };
                let result = target.write_nonzero(piece.filled(), at);
                done += piece.len() as u64;
                piece.clear();
                // Whoever gave the piece may have given up.
                if sender.send(result.map(|()| piece)).is_err() {
                    return;
                }
            }
        });
        Writer { pieces: Some(pieces), written, under_way: 0, thread: Some(thread) }
    }

    /// Hands over a piece, and returns an empty buffer.
    fn swap(&mut self, piece: Buffer, at: u64) -> io::Result<Buffer> {
        let empty =
            if self.under_way < PIECES_MAX { Buffer::new(PIECE_BYTES) } else { self.next()? };
        let sent = self.pieces.as_ref().map(|pieces| pieces.send((piece, at)));
        if !matches!(sent, Some(Ok(()))) {
            return Err(gone());
        }
        self.under_way += 1;
        Ok(empty)
    }

    fn next(&mut self) -> io::Result<Buffer> {
        let written = self.written.recv().map_err(|_| gone())?;
        self.under_way -= 1;
        written
    }

    fn drain(&mut self) -> io::Result<()> {
        while self.under_way > 0 {
            self.next()?;
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.pieces = None;
        // Anything but a clean end was told by an error before.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn gone() -> io::Error {
    io::Error::other("the thread that writes the image panicked")
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
