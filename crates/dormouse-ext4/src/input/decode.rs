//! Streams as they come: plain, gzip or zstd, told by their first bytes; unpacked on a thread of
//! their own, so that reading and writing go on beside it.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use crate::error::{Error, ErrorKind};

/// What is handed over at once.
const PIECE_BYTES: usize = 512 << 10;

/// Pieces under way.
const PIECES_MAX: usize = 8;

/// What is read at once of a packed stream.
const INPUT_BYTES: usize = 256 << 10;

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const BZIP2: &[u8] = b"BZh";
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];

/// Unpacks a stream, whichever way it is packed.
pub fn unpacked(input: impl Read + Send + 'static) -> io::Result<Box<dyn Read + Send>> {
    let mut input = BufReader::with_capacity(INPUT_BYTES, input);
    let head = fill(&mut input)?;
    if head.starts_with(GZIP) {
        return Ok(Box::new(Drained::new(Packed::Gzip(Box::new(
            flate2::bufread::MultiGzDecoder::new(input),
        )))));
    }
    if head.starts_with(ZSTD) || is_skippable_zstd(head) {
        let decoder = zstd::stream::read::Decoder::with_buffer(input)?;
        return Ok(Box::new(Drained::new(Packed::Zstd(Box::new(decoder)))));
    }
    for (magic, name) in [(BZIP2, "bzip2"), (XZ, "xz")] {
        if head.starts_with(magic) {
            let what = format!("packed with {name}; unpack it first, or use gzip or zstd");
            return Err(Error::new(ErrorKind::Unsupported, what).into());
        }
    }
    Ok(Box::new(Drained::new(Packed::Plain(input))))
}

/// Some first bytes; a pipe may give them one by one.
fn fill<R: Read>(input: &mut BufReader<R>) -> io::Result<&[u8]> {
    input.fill_buf()?;
    Ok(input.buffer())
}

fn is_skippable_zstd(head: &[u8]) -> bool {
    matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

enum Packed<R: Read> {
    Plain(BufReader<R>),
    Gzip(Box<flate2::bufread::MultiGzDecoder<BufReader<R>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, BufReader<R>>>),
}

/// A stream whose packed end is reached when its unpacked end is: who checks a digest on the way
/// sees all of it.
struct Drained<R: Read>(Option<Packed<R>>);

impl<R: Read> Drained<R> {
    fn new(packed: Packed<R>) -> Drained<R> {
        Drained(Some(packed))
    }
}

impl<R: Read> Read for Drained<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(packed) = &mut self.0 else { return Ok(0) };
        let read = match packed {
            Packed::Plain(input) => input.read(buf)?,
            Packed::Gzip(decoder) => decoder.read(buf)?,
            Packed::Zstd(decoder) => decoder.read(buf)?,
        };
        if read == 0 && !buf.is_empty() {
            let mut input = match self.0.take() {
                Some(Packed::Plain(input)) => input,
                Some(Packed::Gzip(decoder)) => decoder.into_inner(),
                Some(Packed::Zstd(decoder)) => decoder.finish(),
                None => return Ok(0),
            };
            // Zeros after a packed stream are what tapes and block devices leave.
            let mut rest = [0; 512];
            loop {
                let read = input.read(&mut rest)?;
                if read == 0 {
                    return Ok(0);
                }
                if rest[..read].iter().any(|&byte| byte != 0) {
                    let what = "other bytes after the end of a packed stream";
                    return Err(Error::new(ErrorKind::BadArchive, what).into());
                }
            }
        }
        Ok(read)
    }
}

/// A stream that another thread reads ahead.
#[derive(Debug)]
pub struct ReadAhead {
    pieces: Option<Receiver<io::Result<Vec<u8>>>>,
    used: Option<SyncSender<Vec<u8>>>,
    piece: Vec<u8>,
    at: usize,
    thread: Option<JoinHandle<()>>,
}

impl ReadAhead {
    /// Begins to read what `open` opens, both on a thread of its own.
    pub fn new(
        open: impl FnOnce() -> io::Result<Box<dyn Read + Send>> + Send + 'static,
    ) -> ReadAhead {
        let (sender, pieces) = sync_channel(PIECES_MAX);
        let (used, reuse) = sync_channel::<Vec<u8>>(PIECES_MAX);
        let thread = thread::spawn(move || {
            let read = || -> io::Result<()> {
                let mut input = open()?;
                loop {
                    let mut piece = reuse.try_recv().unwrap_or_default();
                    piece.resize(PIECE_BYTES, 0);
                    let len = read_full(&mut *input, &mut piece)?;
                    piece.truncate(len);
                    // Nobody wants the rest.
                    if len == 0 || sender.send(Ok(piece)).is_err() {
                        return Ok(());
                    }
                }
            };
            if let Err(error) = read() {
                // Nobody wants the error either.
                let _ = sender.send(Err(error));
            }
        });
        ReadAhead {
            pieces: Some(pieces),
            used: Some(used),
            piece: Vec::new(),
            at: 0,
            thread: Some(thread),
        }
    }

    /// The bytes that are there without waiting, or the next piece; empty at the end.
    pub(crate) fn fill(&mut self) -> io::Result<&[u8]> {
        if self.at == self.piece.len()
            && let Some(pieces) = &self.pieces
        {
            match pieces.recv() {
                Ok(piece) => {
                    let old = std::mem::replace(&mut self.piece, piece?);
                    self.at = 0;
                    if let Some(used) = &self.used {
                        // Full or gone: then the buffer is given back here.
                        let _ = used.try_send(old);
                    }
                }
                Err(_) => self.pieces = None,
            }
        }
        Ok(&self.piece[self.at..])
    }

    pub(crate) fn consume(&mut self, bytes: usize) {
        self.at += bytes;
    }
}

impl Read for ReadAhead {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let piece = self.fill()?;
        let len = piece.len().min(buf.len());
        buf[..len].copy_from_slice(&piece[..len]);
        self.consume(len);
        Ok(len)
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        // The thread ends when it has nobody to send to, unless it waits for a pipe: then it is
        // left to end with it.
        self.pieces = None;
        drop(self.thread.take());
    }
}

fn read_full(input: &mut dyn Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buf.len() {
        match input.read(&mut buf[len..]) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}
