//! Responses of HTTP/1.1, from whatever pieces they come in.
//!
//! A body ends where `Content-Length` says, at the last chunk, or with the connection if it is said
//! to close; without any of these there is none, as with 204. Source: RFC 9112. Interim responses
//! (1xx) are passed over.
//!
//! Bounds: [`HEAD_BYTES_MAX`], [`HEADERS_MAX`], [`BODY_BYTES_MAX`], [`INTERIM_MAX`].

use crate::error::{Error, ErrorKind, Result};

/// Bytes of a head. VMMs send some hundreds.
pub const HEAD_BYTES_MAX: usize = 16 << 10;

/// Header fields.
pub const HEADERS_MAX: usize = 64;

/// Bytes of a body. Cloud Hypervisor's `vm.info` has some tens of KiB for some tens of devices.
pub const BODY_BYTES_MAX: usize = 8 << 20;

/// Interim responses before the one that counts.
pub const INTERIM_MAX: usize = 8;

/// Bytes of a chunk's size and what may be behind it, and of a trailer's lines.
const LINE_BYTES_MAX: usize = 4 << 10;

/// A response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Its status.
    pub status: u16,
    /// Its body.
    pub body: Vec<u8>,
}

/// Reads one response.
#[derive(Debug)]
pub struct Decoder {
    /// Not decoded yet.
    pending: Vec<u8>,
    state: State,
    status: u16,
    body: Vec<u8>,
    interim: usize,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Head,
    /// So many bytes of the body are missing.
    Length(usize),
    /// The size of a chunk comes next.
    ChunkSize,
    /// So many bytes of the chunk, and its line end, are missing.
    Chunk(usize),
    /// Lines behind the last chunk; bytes of them so far.
    Trailer(usize),
    UntilEnd,
}

impl Default for Decoder {
    fn default() -> Decoder {
        Decoder::new()
    }
}

impl Decoder {
    /// Of a connection on which nothing was received.
    pub fn new() -> Decoder {
        let (pending, body) = (Vec::new(), Vec::new());
        Decoder { pending, state: State::Head, status: 0, body, interim: 0 }
    }

    /// Takes some bytes; the response, if they end it. What follows it is dropped.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<Response>> {
        self.pending.extend_from_slice(bytes);
        loop {
            let is_done = match self.state {
                State::Head => {
                    if !self.head()? {
                        return Ok(None);
                    }
                    matches!(self.state, State::Length(0))
                }
                State::Length(missing) => {
                    let count = self.take(missing)?;
                    self.state = State::Length(missing - count);
                    if count < missing {
                        return Ok(None);
                    }
                    true
                }
                State::UntilEnd => {
                    self.take(usize::MAX)?;
                    return Ok(None);
                }
                State::ChunkSize => {
                    if !self.chunk_size()? {
                        return Ok(None);
                    }
                    false
                }
                State::Chunk(missing) => {
                    let count = self.take(missing)?;
                    self.state = State::Chunk(missing - count);
                    if count < missing || self.pending.len() < 2 {
                        return Ok(None);
                    }
                    if !self.pending.starts_with(b"\r\n") {
                        return Err(broken("a chunk that does not end where it should"));
                    }
                    self.pending.drain(..2);
                    self.state = State::ChunkSize;
                    false
                }
                State::Trailer(before) => match self.line(before)? {
                    None => return Ok(None),
                    Some(0) => true,
                    Some(length) => {
                        self.state = State::Trailer(before + length + 2);
                        false
                    }
                },
            };
            if is_done {
                return Ok(Some(self.finish()));
            }
        }
    }

    /// The connection has ended: the response if that ends it, none if nothing had come.
    pub fn end(mut self) -> Result<Option<Response>> {
        match self.state {
            State::UntilEnd => Ok(Some(self.finish())),
            State::Head if self.pending.is_empty() && self.interim == 0 => Ok(None),
            _ => {
                let context = format!(
                    "the VMM's answer ends in the middle, after {} bytes of its body",
                    self.body.len()
                );
                Err(Error::new(ErrorKind::Gone, context))
            }
        }
    }

    fn finish(&mut self) -> Response {
        Response { status: self.status, body: std::mem::take(&mut self.body) }
    }

    /// Reads the head, if it is whole.
    fn head(&mut self) -> Result<bool> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response.parse(&self.pending).map_err(|error| {
            Error::with_source(ErrorKind::Protocol, "the VMM's answer is no HTTP", error)
        })?;
        let httparse::Status::Complete(length) = parsed else {
            if self.pending.len() > HEAD_BYTES_MAX {
                return Err(broken("a head of too many bytes"));
            }
            return Ok(false);
        };
        let status = response.code.unwrap_or_default();
        let body = Body::of(status, response.headers)?;
        self.pending.drain(..length);
        if (100..200).contains(&status) {
            self.interim += 1;
            if self.interim > INTERIM_MAX || status == 101 {
                return Err(broken("too many interim answers"));
            }
            return Ok(true);
        }
        self.status = status;
        self.state = match body {
            Body::Length(bytes) => State::Length(bytes),
            Body::Chunked => State::ChunkSize,
            Body::UntilEnd => State::UntilEnd,
        };
        Ok(true)
    }

    fn chunk_size(&mut self) -> Result<bool> {
        match httparse::parse_chunk_size(&self.pending) {
            Ok(httparse::Status::Complete((length, size))) => {
                let size = usize::try_from(size).unwrap_or(usize::MAX);
                if size > BODY_BYTES_MAX - self.body.len() {
                    return Err(too_long());
                }
                self.pending.drain(..length);
                self.state = if size == 0 { State::Trailer(0) } else { State::Chunk(size) };
                Ok(true)
            }
            Ok(httparse::Status::Partial) if self.pending.len() <= LINE_BYTES_MAX => Ok(false),
            _ => Err(broken("a chunk without a size")),
        }
    }

    /// The length of the next line, which is taken; none if it is not whole.
    fn line(&mut self, before: usize) -> Result<Option<usize>> {
        let end = self.pending.windows(2).position(|pair| pair == b"\r\n");
        if before + end.unwrap_or(self.pending.len()) > LINE_BYTES_MAX {
            return Err(broken("a trailer of too many bytes"));
        }
        if let Some(end) = end {
            self.pending.drain(..end + 2);
        }
        Ok(end)
    }

    /// Moves at most `wanted` bytes to the body.
    fn take(&mut self, wanted: usize) -> Result<usize> {
        let count = wanted.min(self.pending.len());
        if count > BODY_BYTES_MAX - self.body.len() {
            return Err(too_long());
        }
        self.body.extend(self.pending.drain(..count));
        Ok(count)
    }
}

/// How a body ends.
enum Body {
    Length(usize),
    Chunked,
    UntilEnd,
}

impl Body {
    fn of(status: u16, headers: &[httparse::Header<'_>]) -> Result<Body> {
        if status < 200 || matches!(status, 204 | 304) {
            return Ok(Body::Length(0));
        }
        let named = |name: &'static str| {
            headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name))
        };
        let mut encodings = named("transfer-encoding");
        if let Some(encoding) = encodings.next() {
            let is_chunked = encoding.value.eq_ignore_ascii_case(b"chunked");
            if !is_chunked || encodings.next().is_some() {
                return Err(broken("a transfer encoding that is not chunked"));
            }
            return Ok(Body::Chunked);
        }
        let mut length = None;
        for header in named("content-length") {
            let text = str::from_utf8(header.value).unwrap_or_default().trim();
            let is_digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let value: Option<usize> = text.parse().ok().filter(|_| is_digits);
            if value.is_none() || length.is_some_and(|length| Some(length) != value) {
                return Err(broken("a content length that is none"));
            }
            length = value;
        }
        let closes =
            || named("connection").any(|header| header.value.eq_ignore_ascii_case(b"close"));
        match length {
            Some(length) if length > BODY_BYTES_MAX => Err(too_long()),
            Some(length) => Ok(Body::Length(length)),
            None if closes() => Ok(Body::UntilEnd),
            None => Ok(Body::Length(0)),
        }
    }
}

fn broken(what: &str) -> Error {
    Error::new(ErrorKind::Protocol, format!("the VMM's answer has {what}"))
}

fn too_long() -> Error {
    let context = format!("the VMM's answer has a body of more than {BODY_BYTES_MAX} bytes");
    Error::new(ErrorKind::Protocol, context)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes in pieces of every size; they must agree.
    fn decode(bytes: &[u8]) -> Result<Option<Response>> {
        let mut first: Option<Option<Response>> = None;
        for size in [1, 2, 3, 7, bytes.len().max(1)] {
            let mut decoder = Decoder::new();
            let mut decoded = None;
            for piece in bytes.chunks(size) {
                decoded = decoder.push(piece)?;
                if decoded.is_some() {
                    break;
                }
            }
            let decoded = match decoded {
                None => decoder.end()?,
                some => some,
            };
            assert_eq!(*first.get_or_insert(decoded.clone()), decoded, "pieces of {size}");
        }
        Ok(first.unwrap())
    }

    #[test]
    fn bodies_end_where_they_should() {
        let cases: [(&str, u16, &str); 8] = [
            ("HTTP/1.1 204 No Content\r\nServer: x\r\nConnection: keep-alive\r\n\r\n", 204, ""),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello, and more", 200, "hello"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 200, ""),
            ("HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\n", 200, ""),
            ("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nall of it", 200, "all of it"),
            (
                "HTTP/1.1 400 Bad\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nT: v\r\n\r\n",
                400,
                "abc0123456789",
            ),
            (
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\n[]",
                500,
                "[]",
            ),
            ("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", 200, "x"),
        ];
        for (text, status, body) in cases {
            let response = decode(text.as_bytes()).unwrap().unwrap();
            assert_eq!((response.status, response.body.as_slice()), (status, body.as_bytes()));
        }
        assert_eq!(decode(b"").unwrap(), None);
    }

    #[test]
    fn what_is_cut_short_or_broken_is_an_error() {
        let long = format!("HTTP/1.1 200 OK\r\nX: {}\r\n", "x".repeat(HEAD_BYTES_MAX));
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(HEADERS_MAX + 1));
        let interim = "HTTP/1.1 102 x\r\n\r\n".repeat(INTERIM_MAX + 1);
        let cases: [(&str, ErrorKind); 13] = [
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", ErrorKind::Gone),
            ("HTTP/1.1 200 OK\r\nContent-Le", ErrorKind::Gone),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab", ErrorKind::Gone),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", ErrorKind::Gone),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n",
                ErrorKind::Protocol,
            ),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", ErrorKind::Protocol),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", ErrorKind::Protocol),
            ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", ErrorKind::Protocol),
            ("HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", ErrorKind::Protocol),
            ("SSH-2.0-OpenSSH\r\n", ErrorKind::Protocol),
            (&long, ErrorKind::Protocol),
            (&many, ErrorKind::Protocol),
            (&interim, ErrorKind::Protocol),
        ];
        for (text, kind) in cases {
            let error = decode(text.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), kind, "{text:.60?} {error}");
        }
    }
}
