//! Contents on their way into the image's file: gathered, and written by a thread of its own.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::{io, mem};

use dormouse_sys::sparse::punch_hole;

use crate::disk::BLOCK;
use crate::write::buffer::Buffer;
use crate::write::content_file::{ContentFile, DIRECT_FROM_BYTES};

/// Contents are gathered up to so many bytes, those of small files together.
const PIECE_BYTES: usize = 1 << 20;

/// Pieces on their way to the disk.
const PIECES_MAX: usize = 4;

/// A file that will be the image.
#[derive(Debug)]
pub(super) struct FileTarget {
    file: Arc<File>,
    /// What is not written yet, and where in the file it goes.
    buffer: Buffer,
    at: u64,
    writer: Option<Writer>,
}

impl FileTarget {
    pub(super) fn new(file: Arc<File>) -> FileTarget {
        FileTarget { file, buffer: Buffer::new(0), at: 0, writer: None }
    }

    /// Takes bytes for `offset`; runs begin and end at whole blocks.
    pub(super) fn write(&mut self, mut bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.at + self.buffer.len() as u64 != offset {
            self.flush()?;
            self.at = offset;
        }
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

    /// Gives blocks back to the file system. All that was taken is written.
    pub(super) fn free(&self, run: &Range<u64>) -> io::Result<()> {
        punch_hole(&*self.file, run.start * BLOCK, (run.end - run.start) * BLOCK)
    }

    /// Hands over what is gathered, which ends where a block does: contents are padded.
    fn flush(&mut self) -> io::Result<()> {
        let len = self.buffer.len() as u64;
        if len == 0 {
            return Ok(());
        }
        let writer = self.writer.get_or_insert_with(|| Writer::new(Arc::clone(&self.file)));
        self.buffer = writer.swap(mem::replace(&mut self.buffer, Buffer::new(0)), self.at)?;
        self.at += len;
        Ok(())
    }

    /// Hands over the rest, and waits until all is written.
    pub(super) fn drain(&mut self) -> io::Result<()> {
        self.flush()?;
        self.writer.as_mut().map_or(Ok(()), Writer::drain)
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
    fn new(file: Arc<File>) -> Writer {
        let (pieces, receiver) = sync_channel::<(Buffer, u64)>(PIECES_MAX);
        let (sender, written) = sync_channel(PIECES_MAX);
        let thread = thread::spawn(move || {
            let cached = ContentFile::cached(Arc::clone(&file));
            let direct = ContentFile::direct(file);
            let mut done = 0;
            for (mut piece, at) in receiver {
                let target = if done < DIRECT_FROM_BYTES { &cached } else { &direct };
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
