//! Reads numbers and bytes out of a buffer, with bounds before everything and the position in every
//! error.

use uuid::Uuid;

use crate::error::{Error, Result};

/// A place in a buffer that is being parsed.
#[derive(Clone, Debug)]
pub(crate) struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Where the buffer begins in the file, for messages.
    origin: u64,
    what: &'static str,
}

impl<'a> Fields<'a> {
    /// Begins at the first byte of `bytes`, which `what` names in messages.
    pub(crate) fn new(bytes: &'a [u8], what: &'static str) -> Fields<'a> {
        Fields { bytes, at: 0, origin: 0, what }
    }

    /// The same, of a buffer that begins at byte `origin` of what is named.
    pub(crate) fn at_origin(bytes: &'a [u8], what: &'static str, origin: u64) -> Fields<'a> {
        Fields { bytes, at: 0, origin, what }
    }

    /// The position of the next byte.
    pub(crate) fn position(&self) -> u64 {
        self.origin + self.at as u64
    }

    /// Bytes that were not read yet.
    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The bytes that were not read yet.
    pub(crate) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    /// A failure at the next byte.
    pub(crate) fn corrupt(&self, why: impl std::fmt::Display) -> Error {
        Error::corrupt(format!("{} at byte {}: {why}", self.what, self.position()))
    }

    pub(crate) fn take(&mut self, len: usize, field: &str) -> Result<&'a [u8]> {
        if self.remaining() < len {
            return Err(self.corrupt(format_args!(
                "it ends after {} more bytes; expected {len} of {field}",
                self.remaining()
            )));
        }
        let taken = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, field)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self, field: &str) -> Result<u8> {
        Ok(self.array::<1>(field)?[0])
    }

    pub(crate) fn u32(&mut self, field: &str) -> Result<u32> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, field: &str) -> Result<u64> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub(crate) fn i32(&mut self, field: &str) -> Result<i32> {
        self.array(field).map(i32::from_le_bytes)
    }

    pub(crate) fn i64(&mut self, field: &str) -> Result<i64> {
        self.array(field).map(i64::from_le_bytes)
    }

    pub(crate) fn u32_be(&mut self, field: &str) -> Result<u32> {
        self.array(field).map(u32::from_be_bytes)
    }

    pub(crate) fn u64_be(&mut self, field: &str) -> Result<u64> {
        self.array(field).map(u64::from_be_bytes)
    }

    pub(crate) fn uuid(&mut self, field: &str) -> Result<Uuid> {
        self.array(field).map(Uuid::from_bytes)
    }

    /// A name behind a byte with its length.
    pub(crate) fn short_string(&mut self, field: &str) -> Result<&'a str> {
        let len = usize::from(self.u8(field)?);
        let at = self.clone();
        let bytes = self.take(len, field)?;
        std::str::from_utf8(bytes).map_err(|_| at.corrupt(format_args!("{field} is not UTF-8")))
    }

    /// An unsigned number in LEB128, at most `max`.
    pub(crate) fn uvarint(&mut self, max: u64, field: &str) -> Result<u64> {
        // Most numbers are short.
        if let Some(&byte) = self.bytes.get(self.at)
            && byte < 0x80
            && u64::from(byte) <= max
        {
            self.at += 1;
            return Ok(u64::from(byte));
        }
        let begin = self.clone();
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8(field)?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                if value > max {
                    return Err(begin.corrupt(format_args!("{field} is {value}; at most {max}")));
                }
                return Ok(value);
            }
        }
        Err(begin.corrupt(format_args!("{field} does not fit into 64 bits")))
    }

    /// A signed number, zigzag in LEB128.
    pub(crate) fn varint(&mut self, field: &str) -> Result<i64> {
        let raw = self.uvarint(u64::MAX, field)?;
        Ok(((raw >> 1) as i64) ^ -((raw & 1) as i64))
    }
}

/// Appends an unsigned number in LEB128.
pub(crate) fn put_uvarint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push((value & 0x7f) as u8);
}

/// Appends a signed number, zigzag in LEB128.
pub(crate) fn put_varint(bytes: &mut Vec<u8>, value: i64) {
    put_uvarint(bytes, ((value << 1) ^ (value >> 63)) as u64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_round_trip_and_overlong_ones_are_refused() {
        for value in [0, 1, -1, 63, -64, 64, i64::MAX, i64::MIN, 6] {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            assert_eq!(Fields::new(&bytes, "test").varint("value").unwrap(), value);
        }
        let mut bytes = Vec::new();
        put_varint(&mut bytes, 6);
        assert_eq!(bytes, [0x0c], "as the worked example of E2B's V5 has it");
        let overlong = [0xff; 11];
        let error = Fields::new(&overlong, "test").uvarint(u64::MAX, "value").unwrap_err();
        assert_eq!(error.to_string(), "test at byte 0: value does not fit into 64 bits");
        let short = Fields::new(&[0x80], "test").uvarint(u64::MAX, "value").unwrap_err();
        assert_eq!(
            short.to_string(),
            "test at byte 1: it ends after 0 more bytes; expected 1 of value"
        );
    }
}
