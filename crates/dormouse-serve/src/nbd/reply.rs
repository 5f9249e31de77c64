//! Replies, written one after the other into a worker's buffer and sent together.

use std::fmt;

use zerocopy::IntoBytes;

use super::handshake::ReplyForm;
use super::limits::{FIRST_BUFFER_BYTES, TRANSFER_BYTES, WORKER_SLACK_BYTES};
use super::protocol::{
    Chunk, EXTENDED_REPLY_MAGIC, ErrorChunk, ExtendedChunk, HoleChunk, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, SimpleReply, chunk,
};
use super::request::{Refusal, Request};

/// Bytes of the longest chunk of a READ, its data aside: that of a hole.
pub(crate) const CHUNK_BYTES_MAX: usize = size_of::<ExtendedChunk>() + size_of::<HoleChunk>();

/// Bytes that a reply without data needs at most: an error with message and offset.
pub(crate) const SHORT_REPLY_MAX: usize = size_of::<ExtendedChunk>() + 6 + 64 + 8;

/// A worker's buffer: whole replies, not sent yet. Whoever writes asks for room first.
pub(crate) struct Replies {
    bytes: Vec<u8>,
    filled: usize,
    form: ReplyForm,
}

/// What a reply or chunk answers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answered {
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
}

impl From<&Request> for Answered {
    fn from(request: &Request) -> Answered {
        Answered { cookie: request.cookie, offset: request.offset }
    }
}

impl Replies {
    pub(crate) fn new(form: ReplyForm) -> Replies {
        Replies { bytes: Vec::new(), filled: 0, form }
    }

    pub(crate) fn form(&self) -> ReplyForm {
        self.form
    }

    pub(crate) fn filled(&self) -> usize {
        self.filled
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }

    pub(crate) fn clear(&mut self) {
        self.filled = 0;
    }

    pub(crate) fn has_room(&self, count: usize) -> bool {
        self.bytes.len() - self.filled >= count
    }

    /// Grows, where the buffer has never been as large as this.
    pub(crate) fn reserve(&mut self, count: usize) {
        if self.bytes.len() - self.filled < count {
            self.bytes.resize(buffer_bytes(self.filled + count), 0);
        }
    }

    /// Gives up what was written after the buffer held `filled` bytes.
    pub(crate) fn truncate(&mut self, filled: usize) {
        self.filled = self.filled.min(filled);
    }

    /// The reply of a success without data.
    pub(crate) fn done(&mut self, to: Answered) {
        if self.form == ReplyForm::Extended {
            self.chunk(to, chunk::DONE, chunk::NONE, 0);
        } else {
            self.simple(to, 0);
        }
    }

    /// The last chunk of a READ that had nothing to say.
    pub(crate) fn nothing_read(&mut self, to: Answered) {
        if self.form == ReplyForm::Simple {
            self.simple(to, 0);
        } else {
            self.chunk(to, chunk::DONE, chunk::NONE, 0);
        }
    }

    /// The reply of a failure, or the last chunk of one; with the offset that failed, if known.
    pub(crate) fn error(&mut self, to: Answered, refusal: Refusal, at: Option<u64>) {
        if self.form == ReplyForm::Simple {
            self.simple(to, refusal.errno as u32);
            return;
        }
        // Our own messages, shorter than 64 bytes.
        let message = refusal.message.as_bytes();
        let message = &message[..message.len().min(64)];
        let offset_bytes = if at.is_some() { 8 } else { 0 };
        let kind = if at.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
        let length = size_of::<ErrorChunk>() + message.len() + offset_bytes;
        self.chunk(to, chunk::DONE, kind, length);
        let error = ErrorChunk {
            error: (refusal.errno as u32).into(),
            message_length: u16::try_from(message.len()).unwrap_or(0).into(),
        };
        self.put(error.as_bytes());
        self.put(message);
        if let Some(at) = at {
            self.put(&at.to_be_bytes());
        }
    }

    /// The header of data from `at` on, and the place to put it.
    pub(crate) fn data(&mut self, to: Answered, at: u64, length: usize, last: bool) -> &mut [u8] {
        self.data_header(to, at, length, last);
        let place = self.filled..self.filled + length;
        self.filled = place.end;
        &mut self.bytes[place]
    }

    /// The header of data that is sent from elsewhere.
    pub(crate) fn data_header(&mut self, to: Answered, at: u64, length: usize, last: bool) {
        if self.form == ReplyForm::Simple {
            self.simple(to, 0);
        } else {
            self.chunk(to, done_if(last), chunk::OFFSET_DATA, length + 8);
            self.put(&at.to_be_bytes());
        }
    }

    /// A run of zeros.
    pub(crate) fn hole(&mut self, to: Answered, at: u64, length: u32, last: bool) {
        self.chunk(to, done_if(last), chunk::OFFSET_HOLE, size_of::<HoleChunk>());
        self.put(HoleChunk { offset: at.into(), length: length.into() }.as_bytes());
    }

    /// Begins a chunk whose payload, put by [`put`](Replies::put), has a length known only at its end.
    pub(crate) fn begin_chunk(&mut self, to: Answered, kind: u16, last: bool) -> Unfinished {
        let begin = self.filled;
        self.chunk(to, done_if(last), kind, 0);
        Unfinished { begin, payload: self.filled, to, kind, last }
    }

    /// Gives a begun chunk the length of what was put since.
    pub(crate) fn finish_chunk(&mut self, unfinished: Unfinished) {
        let end = self.filled;
        self.filled = unfinished.begin;
        let length = end - unfinished.payload;
        self.chunk(unfinished.to, done_if(unfinished.last), unfinished.kind, length);
        self.filled = end;
    }

    /// Overwrites bytes of the payload of a begun chunk.
    pub(crate) fn patch(&mut self, unfinished: &Unfinished, at: usize, bytes: &[u8]) {
        let at = unfinished.payload + at;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        let place = self.filled..self.filled + bytes.len();
        self.filled = place.end;
        self.bytes[place].copy_from_slice(bytes);
    }

    fn simple(&mut self, to: Answered, error: u32) {
        let reply = SimpleReply {
            magic: SIMPLE_REPLY_MAGIC.into(),
            error: error.into(),
            cookie: to.cookie.into(),
        };
        self.put(reply.as_bytes());
    }

    fn chunk(&mut self, to: Answered, flags: u16, kind: u16, length: usize) {
        if self.form == ReplyForm::Extended {
            let chunk = ExtendedChunk {
                magic: EXTENDED_REPLY_MAGIC.into(),
                flags: flags.into(),
                kind: kind.into(),
                cookie: to.cookie.into(),
                offset: to.offset.into(),
                length: (length as u64).into(),
            };
            self.put(chunk.as_bytes());
        } else {
            let chunk = Chunk {
                magic: STRUCTURED_REPLY_MAGIC.into(),
                flags: flags.into(),
                kind: kind.into(),
                cookie: to.cookie.into(),
                // Chunks are at most PAYLOAD_BYTES_MAX and a header.
                length: u32::try_from(length).unwrap_or(u32::MAX).into(),
            };
            self.put(chunk.as_bytes());
        }
    }
}

impl fmt::Debug for Replies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replies")
            .field("form", &self.form)
            .field("filled", &self.filled)
            .finish_non_exhaustive()
    }
}

/// A chunk whose length is not known yet.
#[derive(Debug)]
pub(crate) struct Unfinished {
    begin: usize,
    payload: usize,
    to: Answered,
    kind: u16,
    last: bool,
}

/// One of two sizes that holds `count` bytes.
fn buffer_bytes(count: usize) -> usize {
    let most = TRANSFER_BYTES + WORKER_SLACK_BYTES;
    if count <= FIRST_BUFFER_BYTES { FIRST_BUFFER_BYTES } else { most.max(count) }
}

fn done_if(last: bool) -> u16 {
    if last { chunk::DONE } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::Errno;
    use super::*;

    const TO: Answered = Answered { cookie: 0x0102_0304_0506_0708, offset: 4096 };
    const REFUSAL: Refusal = Refusal { errno: Errno::Eio, message: "no" };

    #[test]
    fn replies_are_byte_for_byte_what_the_protocol_draws() {
        let with_room = |form| {
            let mut replies = Replies::new(form);
            replies.reserve(SHORT_REPLY_MAX);
            replies
        };
        let mut simple = with_room(ReplyForm::Simple);
        simple.error(TO, REFUSAL, Some(5));
        assert_eq!(simple.bytes(), b"\x67\x44\x66\x98\0\0\0\x05\x01\x02\x03\x04\x05\x06\x07\x08");

        let mut structured = with_room(ReplyForm::Structured);
        structured.error(TO, REFUSAL, Some(5));
        let expected = b"\x66\x8e\x33\xef\0\x01\x80\x02\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x10\
            \0\0\0\x05\0\x02no\0\0\0\0\0\0\0\x05";
        assert_eq!(structured.bytes(), expected);

        let mut extended = with_room(ReplyForm::Extended);
        extended.hole(TO, 8192, 512, true);
        let expected = b"\x6e\x8a\x27\x8c\0\x01\0\x02\x01\x02\x03\x04\x05\x06\x07\x08\
            \0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x0c\0\0\0\0\0\0\x20\0\0\0\x02\0";
        assert_eq!(extended.bytes(), expected);
    }

    #[test]
    fn an_unfinished_chunk_gets_its_length() {
        let mut replies = Replies::new(ReplyForm::Structured);
        replies.reserve(SHORT_REPLY_MAX);
        replies.done(TO);
        let unfinished = replies.begin_chunk(TO, chunk::BLOCK_STATUS, true);
        replies.put(&[0; 4]);
        replies.put(&[9; 8]);
        replies.patch(&unfinished, 0, &7u32.to_be_bytes());
        replies.finish_chunk(unfinished);
        assert_eq!(
            replies.bytes()[16 + 16..],
            *b"\0\0\0\x0c\0\0\0\x07\x09\x09\x09\x09\x09\x09\x09\x09"
        );
    }
}
