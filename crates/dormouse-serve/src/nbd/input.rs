//! What comes from the peer, read in large pieces and taken in small ones.

use std::fmt;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Instant;

use super::limits::INPUT_BYTES;
use super::stall::Stall;

/// A buffered reader that can tell what it has without blocking.
pub(crate) struct Input {
    reader: Box<dyn Read + Send>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    arrived: Instant,
    stall: Arc<Stall>,
}

impl Input {
    pub(crate) fn new(reader: Box<dyn Read + Send>) -> Input {
        let buffer = vec![0; INPUT_BYTES].into_boxed_slice();
        Input { reader, buffer, start: 0, end: 0, arrived: Instant::now(), stall: Arc::default() }
    }

    /// What was read and not taken yet.
    pub(crate) fn buffered(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Says while the peer owes the rest of something that it began.
    pub(crate) fn stall(&self) -> &Arc<Stall> {
        &self.stall
    }

    /// When the last bytes came.
    pub(crate) fn arrived(&self) -> Instant {
        self.arrived
    }

    /// The next `count` bytes, at most the buffer's size; `None` if the peer ended before the first.
    pub(crate) fn take(&mut self, count: usize) -> io::Result<Option<&[u8]>> {
        if self.end - self.start < count {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            while self.end < count {
                if self.end > 0 {
                    self.stall.begin();
                }
                match read(&mut *self.reader, &mut self.buffer[self.end..])? {
                    0 if self.end == 0 => return Ok(None),
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    read => self.end += read,
                }
            }
            self.stall.end();
            self.arrived = Instant::now();
        }
        let taken = self.start..self.start + count;
        self.start += count;
        Ok(Some(&self.buffer[taken]))
    }

    /// Fills `destination`, past the buffer where it is large.
    pub(crate) fn read_exact(&mut self, destination: &mut [u8]) -> io::Result<()> {
        let count = destination.len().min(self.end - self.start);
        destination[..count].copy_from_slice(&self.buffer[self.start..self.start + count]);
        self.start += count;
        let mut rest = &mut destination[count..];
        if rest.is_empty() {
            return Ok(());
        }
        while !rest.is_empty() {
            self.stall.begin();
            match read(&mut *self.reader, rest)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => rest = &mut rest[read..],
            }
        }
        self.stall.end();
        Ok(())
    }

    /// Reads `count` bytes and drops them.
    pub(crate) fn discard(&mut self, mut count: u64) -> io::Result<()> {
        while count > 0 {
            if self.start == self.end {
                self.start = 0;
                self.stall.begin();
                self.end = read(&mut *self.reader, &mut self.buffer)?;
                if self.end == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            let here = (self.end - self.start) as u64;
            let dropped = here.min(count);
            // What is dropped is part of the buffer.
            self.start += usize::try_from(dropped).unwrap_or(self.end - self.start);
            count -= dropped;
        }
        self.stall.end();
        Ok(())
    }

    /// The reader, if nothing was read from it that was not taken.
    pub(crate) fn into_reader(self) -> Option<Box<dyn Read + Send>> {
        (self.start == self.end).then_some(self.reader)
    }
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Input").field("buffered", &self.buffered().len()).finish_non_exhaustive()
    }
}

fn read(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives one byte at a time.
    struct Drip(Vec<u8>);

    impl Read for Drip {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() {
                return Ok(0);
            }
            buffer[0] = self.0.remove(0);
            Ok(1)
        }
    }

    #[test]
    fn bytes_come_in_order_however_they_are_taken() {
        let mut input = Input::new(Box::new(Drip((0..20).collect())));
        assert_eq!(input.take(3).unwrap().unwrap(), [0, 1, 2]);
        let mut four = [0; 4];
        input.read_exact(&mut four).unwrap();
        assert_eq!(four, [3, 4, 5, 6]);
        input.discard(10).unwrap();
        assert_eq!(input.take(3).unwrap().unwrap(), [17, 18, 19]);
        assert!(input.take(1).unwrap().is_none());
    }

    #[test]
    fn an_end_within_something_is_an_error() {
        let mut input = Input::new(Box::new(io::Cursor::new(vec![1, 2])));
        assert!(input.take(3).is_err());
        let mut input = Input::new(Box::new(io::Cursor::new(vec![1, 2])));
        assert!(input.read_exact(&mut [0; 3]).is_err());
        let mut input = Input::new(Box::new(io::Cursor::new(vec![1, 2])));
        assert!(input.discard(3).is_err());
    }
}
