//! LEB128 numbers, as the columns of a node hold them.

use crate::error::{Error, Result};

/// Appends `value`, seven bits a byte, lowest first.
pub(super) fn put(out: &mut Vec<u8>, mut value: u64) {
    loop {
        let byte = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            out.push(byte);
            return;
        }
        out.push(byte | 0x80);
    }
}

/// Appends a signed number; small magnitudes stay short.
pub(super) fn put_signed(out: &mut Vec<u8>, value: i64) {
    put(out, ((value << 1) ^ (value >> 63)) as u64);
}

/// Reads numbers from the front of a slice.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes }
    }

    /// A number of at most `limit`, in its shortest form.
    pub(super) fn take(&mut self, what: &'static str, limit: u64) -> Result<u64> {
        let mut value = 0_u64;
        for (index, &byte) in self.rest.iter().enumerate().take(10) {
            let bits = u64::from(byte & 0x7f);
            if index == 9 && bits > 1 {
                return Err(Error::corrupt(what, "a number over 64 bits", limit));
            }
            value |= bits << (7 * index);
            if byte & 0x80 == 0 {
                if byte == 0 && index > 0 {
                    return Err(Error::corrupt(what, "a padded number", "its shortest form"));
                }
                if value > limit {
                    return Err(Error::corrupt(what, value, format_args!("at most {limit}")));
                }
                self.rest = &self.rest[index + 1..];
                return Ok(value);
            }
        }
        Err(Error::corrupt(what, "the end of the node", "a number"))
    }

    /// A signed number.
    pub(super) fn take_signed(&mut self, what: &'static str) -> Result<i64> {
        let raw = self.take(what, u64::MAX)?;
        Ok((raw >> 1) as i64 ^ -((raw & 1) as i64))
    }

    /// The next `len` bytes.
    pub(super) fn bytes(&mut self, what: &'static str, len: usize) -> Result<&'a [u8]> {
        let Some((bytes, rest)) = self.rest.split_at_checked(len) else {
            return Err(Error::corrupt(what, self.rest.len(), format_args!("{len} bytes")));
        };
        self.rest = rest;
        Ok(bytes)
    }

    /// Fails if anything is left.
    pub(super) fn finish(self, what: &'static str) -> Result<()> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(Error::corrupt(what, format_args!("{} bytes more", self.rest.len()), "its end"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip() {
        for value in [0, 1, 127, 128, 16383, 16384, u64::from(u32::MAX), u64::MAX] {
            let mut out = Vec::new();
            put(&mut out, value);
            let mut reader = Reader::new(&out);
            assert_eq!(reader.take("n", u64::MAX).unwrap(), value);
            reader.finish("n").unwrap();
        }
        for value in [0, -1, 1, i64::MIN, i64::MAX] {
            let mut out = Vec::new();
            put_signed(&mut out, value);
            assert_eq!(Reader::new(&out).take_signed("n").unwrap(), value);
        }
    }

    #[test]
    fn hostile_numbers_are_refused() {
        let cases: [&[u8]; 5] = [
            &[],
            &[0x80],
            &[0x80, 0x00],
            &[0xff; 10],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02],
        ];
        for bytes in cases {
            Reader::new(bytes).take("n", u64::MAX).unwrap_err();
        }
        Reader::new(&[5]).take("n", 4).unwrap_err();
    }
}
