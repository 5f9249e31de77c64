//! A stream that is read through a buffer and passed on, but for what is taken out of it.
//!
//! Whatever was read is either passed or dropped, in order. Bytes that are passed wait in a second
//! buffer, so that a stream of small records costs few calls.

use std::io::{Read, Write};

use crate::error::{Error, ErrorKind, Result};

/// Bytes of each of the two buffers.
pub const BUFFER_BYTES: usize = 256 << 10;

/// The stream.
pub(super) struct Input<'a> {
    from: &'a mut dyn Read,
    to: &'a mut dyn Write,
    /// What was read: `start..end` of it is still to come.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Of the byte at `start`.
    position: u64,
    passed: Vec<u8>,
}

impl<'a> Input<'a> {
    pub(super) fn new(from: &'a mut dyn Read, to: &'a mut dyn Write) -> Input<'a> {
        let buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
        let passed = Vec::with_capacity(BUFFER_BYTES);
        Input { from, to, buffer, start: 0, end: 0, position: 0, passed }
    }

    /// Where in the stream the next byte is.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// The next byte, which stays.
    pub(super) fn peek(&mut self) -> Result<u8> {
        self.fill(1)?;
        Ok(self.buffer[self.start])
    }

    /// Takes `count` bytes out; at most [`BUFFER_BYTES`].
    pub(super) fn take(&mut self, count: usize) -> Result<&[u8]> {
        self.fill(count)?;
        let taken = self.start..self.start + count;
        self.start += count;
        self.position += count as u64;
        Ok(&self.buffer[taken])
    }

    /// Passes `count` bytes on; at most [`BUFFER_BYTES`].
    pub(super) fn pass(&mut self, count: usize) -> Result<&[u8]> {
        self.fill(count)?;
        let taken = self.start..self.start + count;
        self.start += count;
        self.position += count as u64;
        self.write(taken.clone())?;
        Ok(&self.buffer[taken])
    }

    pub(super) fn pass_u8(&mut self) -> Result<u8> {
        Ok(self.pass(1)?[0])
    }

    pub(super) fn pass_u16(&mut self) -> Result<u16> {
        let bytes = self.pass(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    pub(super) fn pass_u32(&mut self) -> Result<u32> {
        let bytes = self.pass(4)?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub(super) fn pass_u64(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(self.pass(8)?);
        Ok(u64::from_be_bytes(bytes))
    }

    pub(super) fn take_u8(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn take_u64(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(self.take(8)?);
        Ok(u64::from_be_bytes(bytes))
    }

    /// Passes a name: a length of one byte, and as many bytes of text.
    pub(super) fn pass_name(&mut self) -> Result<String> {
        let at = self.position;
        let length = self.pass_u8()?;
        text(at, self.pass(usize::from(length))?)
    }

    /// Takes a name out.
    pub(super) fn take_name(&mut self) -> Result<String> {
        let at = self.position;
        let length = self.take_u8()?;
        text(at, self.take(usize::from(length))?)
    }

    /// Puts bytes into what is passed on.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.passed.extend_from_slice(bytes);
        self.flush_if_full()
    }

    /// Passes on everything to the end of the stream.
    pub(super) fn pass_rest(&mut self) -> Result<()> {
        loop {
            let count = self.end - self.start;
            let rest = self.start..self.end;
            self.write(rest)?;
            self.position += count as u64;
            (self.start, self.end) = (0, 0);
            if self.read_some()? == 0 {
                return self.flush();
            }
        }
    }

    fn write(&mut self, part: std::ops::Range<usize>) -> Result<()> {
        self.passed.extend_from_slice(&self.buffer[part]);
        self.flush_if_full()
    }

    fn flush_if_full(&mut self) -> Result<()> {
        if self.passed.len() >= BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let written = self.to.write_all(&self.passed).and_then(|()| self.to.flush());
        self.passed.clear();
        written.map_err(|error| Error::file("cannot write QEMU's state", error))
    }

    /// Reads until there are `count` bytes.
    fn fill(&mut self, count: usize) -> Result<()> {
        debug_assert!(count <= BUFFER_BYTES, "{count} bytes at once");
        if self.end - self.start >= count {
            return Ok(());
        }
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        while self.end < count {
            if self.read_some()? == 0 {
                let at = self.position + self.end as u64;
                let context = format!("QEMU's stream ends at byte {at}, in the middle of a record");
                return Err(Error::new(ErrorKind::InvalidFile, context));
            }
        }
        Ok(())
    }

    fn read_some(&mut self) -> Result<usize> {
        loop {
            match self.from.read(&mut self.buffer[self.end..]) {
                Ok(count) => {
                    self.end += count;
                    return Ok(count);
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("cannot read QEMU's stream", error)),
            }
        }
    }
}

fn text(at: u64, bytes: &[u8]) -> Result<String> {
    let text = std::str::from_utf8(bytes);
    text.map(str::to_owned).map_err(|_| super::invalid(at, "a name that is no text"))
}
