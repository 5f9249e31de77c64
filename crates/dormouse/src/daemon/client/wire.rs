//! A request and its answer over HTTP/1.1, blocking: the head, then the body in pieces as it comes, by
//! its length or in chunks. What the daemon sends is bounded like what anybody sends.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How often somebody looks up who waits.
const TICK: Duration = Duration::from_millis(100);

/// The longest head.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// Fields of a head.
const HEADERS_MAX: usize = 64;

/// The longest line before a chunk.
const CHUNK_LINE_BYTES_MAX: usize = 1024;

/// An answer that is read.
#[derive(Debug)]
pub(super) struct Conversation {
    stream: UnixStream,
    /// How long the daemon may be silent.
    patience: Duration,
    status: u16,
    /// What has come and was not given yet.
    buffer: Vec<u8>,
    rest: Rest,
}

/// What of the body has yet to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// So many bytes.
    Bytes(u64),
    /// A chunk's line.
    ChunkLine,
    /// So many bytes of a chunk, and its line end.
    Chunk(u64),
    /// All until the connection's end.
    UntilEnd,
    Nothing,
}

impl Conversation {
    /// Sends a request and reads its answer's head.
    pub(super) fn begin(
        mut stream: UnixStream,
        request: &[u8],
        patience: Duration,
    ) -> Result<Conversation> {
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(patience))?;
        // Who is turned away for its size may be answered before all is sent.
        let sent = stream.write_all(request);
        let mut conversation =
            Conversation { stream, patience, status: 0, buffer: Vec::new(), rest: Rest::Nothing };
        match conversation.read_head() {
            Ok(()) => Ok(conversation),
            Err(error) => sent.map_err(anyhow::Error::from).and(Err(error)),
        }
    }

    /// The answer's status.
    pub(super) fn status(&self) -> u16 {
        self.status
    }

    fn read_head(&mut self) -> Result<()> {
        loop {
            let mut fields = [httparse::EMPTY_HEADER; HEADERS_MAX];
            let mut head = httparse::Response::new(&mut fields);
            if let httparse::Status::Complete(len) = head.parse(&self.buffer)? {
                self.status = head.code.context("an answer without a status")?;
                self.rest = rest_of(self.status, head.headers)?;
                self.buffer.drain(..len);
                return Ok(());
            }
            ensure!(self.buffer.len() <= HEAD_BYTES_MAX, "the answer's head is too long");
            ensure!(self.fill(&mut || Ok(()))?, "the connection ended before the answer");
        }
    }

    /// Reads more; false at the end. `on_idle` is called while nothing comes.
    fn fill(&mut self, on_idle: &mut dyn FnMut() -> Result<()>) -> Result<bool> {
        let begun = Instant::now();
        let mut piece = [0; 16 << 10];
        loop {
            match self.stream.read(&mut piece) {
                Ok(0) => return Ok(false),
                Ok(count) => {
                    self.buffer.extend_from_slice(&piece[..count]);
                    return Ok(true);
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                        let patience = self.patience;
                        ensure!(begun.elapsed() < patience, "it was silent for {patience:?}");
                        on_idle()?;
                    }
                    io::ErrorKind::Interrupted => on_idle()?,
                    _ => return Err(error.into()),
                },
            }
        }
    }

    /// The next piece of the body; none at its end.
    pub(super) fn next(
        &mut self,
        on_idle: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<u8>>> {
        loop {
            match self.rest {
                Rest::Nothing | Rest::Bytes(0) => return Ok(None),
                Rest::Bytes(left) if !self.buffer.is_empty() => {
                    let piece = self.take(left);
                    self.rest = Rest::Bytes(left - piece.len() as u64);
                    return Ok(Some(piece));
                }
                Rest::UntilEnd if !self.buffer.is_empty() => {
                    return Ok(Some(std::mem::take(&mut self.buffer)));
                }
                Rest::Chunk(0) if self.buffer.len() >= 2 => {
                    ensure!(self.buffer.starts_with(b"\r\n"), "a chunk without an end");
                    self.buffer.drain(..2);
                    self.rest = Rest::ChunkLine;
                    continue;
                }
                Rest::Chunk(left) if left > 0 && !self.buffer.is_empty() => {
                    let piece = self.take(left);
                    self.rest = Rest::Chunk(left - piece.len() as u64);
                    return Ok(Some(piece));
                }
                Rest::ChunkLine => {
                    if let Some(end) = self.buffer.windows(2).position(|two| two == b"\r\n") {
                        let line: Vec<u8> = self.buffer.drain(..end + 2).collect();
                        self.rest = match chunk_bytes(&line)? {
                            // Trailers are of no interest.
                            0 => Rest::Nothing,
                            bytes => Rest::Chunk(bytes),
                        };
                        continue;
                    }
                    ensure!(
                        self.buffer.len() <= CHUNK_LINE_BYTES_MAX,
                        "a chunk's line is too long"
                    );
                }
                _ => {}
            }
            if !self.fill(on_idle)? {
                if self.rest == Rest::UntilEnd {
                    return Ok(None);
                }
                bail!("the answer ended early");
            }
        }
    }

    fn take(&mut self, most: u64) -> Vec<u8> {
        let count =
            usize::try_from(most).map_or(self.buffer.len(), |most| most.min(self.buffer.len()));
        self.buffer.drain(..count).collect()
    }
}

/// How much follows a head (RFC 9112, 6.3).
fn rest_of(status: u16, headers: &[httparse::Header<'_>]) -> Result<Rest> {
    if status < 200 || status == 204 || status == 304 {
        return Ok(Rest::Nothing);
    }
    let value = |name: &str| {
        let found = headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        found.map(|header| String::from_utf8_lossy(header.value).trim().to_ascii_lowercase())
    };
    if let Some(coding) = value("transfer-encoding") {
        ensure!(coding == "chunked", "the answer is coded as {coding:?}");
        return Ok(Rest::ChunkLine);
    }
    match value("content-length") {
        Some(length) => {
            let bytes = length.parse().with_context(|| format!("a length of {length:?}"))?;
            Ok(Rest::Bytes(bytes))
        }
        None => Ok(Rest::UntilEnd),
    }
}

/// The length in a chunk's line, behind which extensions may stand.
fn chunk_bytes(line: &[u8]) -> Result<u64> {
    let line = std::str::from_utf8(line).context("a chunk's line is not text")?;
    let digits = line.split(';').next().unwrap_or_default().trim();
    u64::from_str_radix(digits, 16).with_context(|| format!("a chunk of {digits:?} bytes"))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// All of an answer that comes in pieces of `step` bytes.
    fn read(answer: &'static [u8], step: usize) -> Result<(u16, Vec<u8>)> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let sender = thread::spawn(move || {
            let mut request = [0; 4];
            theirs.read_exact(&mut request).unwrap();
            for piece in answer.chunks(step) {
                theirs.write_all(piece).unwrap();
                thread::yield_now();
            }
        });
        let mut conversation = Conversation::begin(ours, b"GET ", Duration::from_secs(30))?;
        let mut body = Vec::new();
        while let Some(piece) = conversation.next(&mut || Ok(()))? {
            body.extend(piece);
        }
        sender.join().unwrap();
        Ok((conversation.status(), body))
    }

    #[test]
    fn bodies_come_by_length_in_chunks_or_until_the_end() {
        for step in [1, 2, 7, 1000] {
            for answer in [
                b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello".as_slice(),
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n",
                b"HTTP/1.1 200 OK\r\n\r\nhello",
            ] {
                assert_eq!(read(answer, step).unwrap(), (200, b"hello".to_vec()), "{step}");
            }
        }
    }

    #[test]
    fn what_is_cut_or_wrong_is_an_error() {
        for answer in [
            b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhell".as_slice(),
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhel\r\n",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\nhell",
            b"HTTP/1.1 2",
            b"",
        ] {
            assert!(read(answer, 3).is_err(), "{}", String::from_utf8_lossy(answer));
        }
    }
}
