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
///
/// A packed stream is members one after the other, as gzip and zstd have them, and zeros, which
/// tapes and block devices leave. What is wrong with it is [`ErrorKind::BadArchive`]; what went wrong
/// with reading it stays what it is.
pub fn unpacked(input: impl Read + Send + 'static) -> io::Result<Box<dyn Read + Send>> {
    let mut input = BufReader::with_capacity(INPUT_BYTES, Input(input));
    let head = fill(&mut input)?;
    let format = if head.starts_with(GZIP) {
        Format::Gzip
    } else if head.starts_with(ZSTD) || is_skippable_zstd(head) {
        Format::Zstd
    } else {
        for (magic, name) in [(BZIP2, "bzip2"), (XZ, "xz")] {
            if head.starts_with(magic) {
                let what = format!("packed with {name}; unpack it first, or use gzip or zstd");
                return Err(Error::new(ErrorKind::Unsupported, what).into());
            }
        }
        return Ok(Box::new(input));
    };
    let member = format.member(input)?;
    Ok(Box::new(Unpacked { format, member: Some(member) }))
}

/// Some first bytes; a pipe may give them one by one.
fn fill<R: Read>(input: &mut BufReader<R>) -> io::Result<&[u8]> {
    input.fill_buf()?;
    Ok(input.buffer())
}

fn is_skippable_zstd(head: &[u8]) -> bool {
    matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

/// What is unpacked. A failure to read it is marked as such, so that it is not taken for damage.
struct Input<R>(R);

impl<R: Read> Read for Input<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf).map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => error,
            _ if is_ours(&error) => error,
            _ => Error::io("cannot read it", error).into(),
        })
    }
}

/// Whether a failure was told by this crate on the way through a reader.
fn is_ours(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Error>())
}

/// How a stream is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Gzip,
    Zstd,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Format::Gzip => "gzip",
            Format::Zstd => "zstd",
        }
    }

    fn member<R: Read>(self, input: BufReader<R>) -> io::Result<Member<R>> {
        Ok(match self {
            Format::Gzip => Member::Gzip(Box::new(flate2::bufread::GzDecoder::new(input))),
            Format::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(input)?;
                Member::Zstd(Box::new(decoder.single_frame()))
            }
        })
    }

    /// Whether another member may begin with a byte.
    fn may_begin_with(self, byte: u8) -> bool {
        match self {
            Format::Gzip => byte == GZIP[0],
            Format::Zstd => byte == ZSTD[0] || matches!(byte, 0x50..=0x5f),
        }
    }

    /// A decoder's failure: a stream that is damaged, unless reading failed.
    fn failure(self, error: io::Error) -> io::Error {
        if is_ours(&error) || error.kind() == io::ErrorKind::Interrupted {
            return error;
        }
        let name = self.name();
        let what = match error.kind() {
            io::ErrorKind::UnexpectedEof => format!("its {name} stream is cut: its end is missing"),
            _ => format!("its {name} stream is damaged: {error}"),
        };
        Error::new(ErrorKind::BadArchive, what).into()
    }
}

enum Member<R: Read> {
    Gzip(Box<flate2::bufread::GzDecoder<BufReader<R>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, BufReader<R>>>),
}

/// A packed stream. Its end is reached when the unpacked one is: who checks a digest on the way sees
/// all of it.
struct Unpacked<R: Read> {
    format: Format,
    member: Option<Member<R>>,
}

impl<R: Read> Read for Unpacked<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let read = match member {
                Member::Gzip(decoder) => decoder.read(buf),
                Member::Zstd(decoder) => decoder.read(buf),
            };
            let read = read.map_err(|error| self.format.failure(error))?;
            if read > 0 || buf.is_empty() {
                return Ok(read);
            }
            let mut input = match self.member.take() {
                Some(Member::Gzip(decoder)) => decoder.into_inner(),
                Some(Member::Zstd(decoder)) => decoder.finish(),
                None => return Ok(0),
            };
            match fill(&mut input)?.first() {
                Some(&byte) if self.format.may_begin_with(byte) => {
                    self.member = Some(self.format.member(input)?);
                }
                _ => only_zeros(&mut input, self.format)?,
            }
        }
        Ok(0)
    }
}

/// Reads to the end, where nothing may be but zeros.
fn only_zeros(input: &mut impl Read, format: Format) -> io::Result<()> {
    let mut rest = [0; 4096];
    loop {
        let read = input.read(&mut rest)?;
        if read == 0 {
            return Ok(());
        }
        if rest[..read].iter().any(|&byte| byte != 0) {
            let name = format.name();
            let what = format!("bytes that are no {name} follow its {name} stream");
            return Err(Error::new(ErrorKind::BadArchive, what).into());
        }
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

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use super::*;

    fn packed(format: Format, bytes: &[u8]) -> Vec<u8> {
        match format {
            Format::Gzip => {
                let level = flate2::Compression::fast();
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            Format::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
                encoder.include_checksum(true).unwrap();
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
        }
    }

    fn read(bytes: Vec<u8>) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        unpacked(Cursor::new(bytes))?.read_to_end(&mut all)?;
        Ok(all)
    }

    /// A damaged or cut archive was told as a failure to read, and zeros behind a gzip stream as a
    /// wrong header.
    #[test]
    fn what_is_wrong_with_a_packed_stream_is_its_own_fault() {
        let text: Vec<u8> =
            (0..200_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        for format in [Format::Gzip, Format::Zstd] {
            let whole = packed(format, &text);
            let twice = [&whole[..], &whole[..], &[0; 5000]].concat();
            assert!(read(twice).unwrap() == [&text[..], &text[..]].concat(), "{format:?}");
            let mut damaged = whole.clone();
            damaged[1000..1100].fill(0xff);
            damaged[9..12].fill(0xff);
            for (what, bytes) in [
                ("cut", whole[..whole.len() / 2].to_vec()),
                ("cut", whole[..whole.len() - 1].to_vec()),
                ("", damaged),
                ("follow", [&whole[..], b"hello"].concat()),
                ("follow", [&whole[..], &[0; 600], b"x"].concat()),
            ] {
                let error = read(bytes).map(drop).unwrap_err();
                let error = Error::io("archive", error);
                let told = std::error::Error::source(&error).unwrap().to_string();
                assert_eq!(error.kind(), ErrorKind::BadArchive, "{told}");
                assert!(told.contains(what) && told.contains(format.name()), "{told}");
            }
        }
    }

    #[test]
    fn a_failure_to_read_is_not_the_archives_fault() {
        struct Broken(Cursor<Vec<u8>>);
        impl Read for Broken {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                match self.0.read(buf)? {
                    0 => Err(io::ErrorKind::TimedOut.into()),
                    read => Ok(read),
                }
            }
        }
        for format in [Format::Gzip, Format::Zstd] {
            let mut half = packed(format, &[7; 300_000]);
            half.truncate(half.len() / 2);
            let mut input = unpacked(Broken(Cursor::new(half))).unwrap();
            let error = input.read_to_end(&mut Vec::new()).unwrap_err();
            assert_eq!(Error::io("archive", error).kind(), ErrorKind::Io);
        }
    }
}
