//! How frames and nodes are compressed: zstd, lz4 or not at all.

use std::cell::RefCell;
use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The compression asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Bytes as they are.
    Raw,

    /// LZ4 block format: four times as fast to decode as zstd, a fifth larger.
    Lz4,

    /// Zstandard at a level from -7 to 19.
    Zstd(i32),
}

impl Codec {
    /// Level 3 is where RAM stops gaining: its pages are either alike or noise.
    pub const DEFAULT: Codec = Codec::Zstd(3);
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Codec::Raw => f.write_str("raw"),
            Codec::Lz4 => f.write_str("lz4"),
            Codec::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// The text was no codec: `raw`, `lz4`, `zstd` or `zstd:LEVEL` with a level from -7 to 19.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a codec: {0:?}; expected raw, lz4, zstd or zstd:LEVEL with a level from -7 to 19")]
pub struct ParseCodecError(String);

impl FromStr for Codec {
    type Err = ParseCodecError;

    fn from_str(text: &str) -> std::result::Result<Codec, ParseCodecError> {
        let unknown = || ParseCodecError(text.to_owned());
        match text {
            "raw" => Ok(Codec::Raw),
            "lz4" => Ok(Codec::Lz4),
            "zstd" => Ok(Codec::DEFAULT),
            _ => {
                let level = text.strip_prefix("zstd:").ok_or_else(unknown)?;
                let level = level.parse::<i32>().map_err(|_| unknown())?;
                if (-7..=19).contains(&level) { Ok(Codec::Zstd(level)) } else { Err(unknown()) }
            }
        }
    }
}

/// How bytes in a file are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// As they are.
    Raw = 0,

    /// One LZ4 block.
    Lz4 = 1,

    /// One zstd frame.
    Zstd = 2,
}

impl Encoding {
    /// Reads the byte that stands in a record header.
    pub fn from_byte(byte: u8) -> Result<Encoding> {
        match byte {
            0 => Ok(Encoding::Raw),
            1 => Ok(Encoding::Lz4),
            2 => Ok(Encoding::Zstd),
            _ => Err(Error::unsupported("codec", byte, "0 (raw), 1 (lz4) or 2 (zstd)")),
        }
    }
}

/// Compresses with one set of tables, kept from call to call.
pub struct Encoder {
    codec: Codec,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    scratch: Vec<u8>,
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder").field("codec", &self.codec).finish_non_exhaustive()
    }
}

impl Encoder {
    /// An encoder; fails only when zstd cannot get its memory.
    pub fn new(codec: Codec) -> Result<Encoder> {
        let zstd = match codec {
            Codec::Zstd(level) => {
                Some(zstd::bulk::Compressor::new(level).map_err(|error| Error::io("zstd", error))?)
            }
            Codec::Raw | Codec::Lz4 => None,
        };
        Ok(Encoder { codec, zstd, scratch: Vec::new() })
    }

    /// Compresses `raw`, or leaves it when that saves less than a thirty-second: such a frame is
    /// noise, and decoding it would cost every reader for nothing.
    pub fn encode<'a>(&'a mut self, raw: &'a [u8]) -> Result<(Encoding, &'a [u8])> {
        let worth = raw.len() - raw.len() / 32;
        let (encoding, len) = match (self.codec, &mut self.zstd) {
            (Codec::Zstd(_), Some(zstd)) => {
                self.scratch.resize(zstd::zstd_safe::compress_bound(raw.len()), 0);
                let len = zstd
                    .compress_to_buffer(raw, self.scratch.as_mut_slice())
                    .map_err(|error| Error::io("zstd", error))?;
                (Encoding::Zstd, len)
            }
            (Codec::Lz4, _) => {
                self.scratch.resize(lz4_flex::block::get_maximum_output_size(raw.len()), 0);
                let len = lz4_flex::block::compress_into(raw, &mut self.scratch)
                    .map_err(|error| Error::io("lz4", std::io::Error::other(error)))?;
                (Encoding::Lz4, len)
            }
            _ => (Encoding::Raw, raw.len()),
        };
        if encoding == Encoding::Raw || len >= worth {
            Ok((Encoding::Raw, raw))
        } else {
            Ok((encoding, &self.scratch[..len]))
        }
    }
}

/// Decompresses with one set of tables, kept from call to call.
pub struct Decoder {
    zstd: zstd::bulk::Decompressor<'static>,

    /// What was read of the frame being decoded, kept from frame to frame.
    record: Vec<u8>,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

impl Decoder {
    /// A decoder; fails only when zstd cannot get its memory.
    pub fn new() -> Result<Decoder> {
        let zstd =
            zstd::bulk::Decompressor::new().map_err(|error| Error::io("zstd decoder", error))?;
        Ok(Decoder { zstd, record: Vec::new() })
    }

    /// Runs `run` with this decoder and its buffer for what is to be decoded.
    pub(crate) fn with_record<T>(
        &mut self,
        run: impl FnOnce(&mut Decoder, &mut Vec<u8>) -> Result<T>,
    ) -> Result<T> {
        let mut record = std::mem::take(&mut self.record);
        let result = run(self, &mut record);
        self.record = record;
        result
    }

    /// Fills `raw` exactly; anything that decodes to fewer or more bytes is corrupt.
    pub fn decode(&mut self, encoding: Encoding, stored: &[u8], raw: &mut [u8]) -> Result<()> {
        let expected = raw.len();
        let got = match encoding {
            Encoding::Raw => {
                if stored.len() == expected {
                    raw.copy_from_slice(stored);
                }
                stored.len()
            }
            Encoding::Lz4 => lz4_flex::block::decompress_into(stored, raw)
                .map_err(|error| Error::corrupt("lz4 data", error, "a whole block"))?,
            Encoding::Zstd => self
                .zstd
                .decompress_to_buffer(stored, raw)
                .map_err(|error| Error::corrupt("zstd data", error, "a whole frame"))?,
        };
        if got == expected { Ok(()) } else { Err(Error::corrupt("decoded length", got, expected)) }
    }
}

thread_local! {
    static DECODER: RefCell<Option<Decoder>> = const { RefCell::new(None) };
}

/// Runs `run` with this thread's decoder: making one costs twice as much as decoding a node.
pub(crate) fn with_decoder<T>(run: impl FnOnce(&mut Decoder) -> Result<T>) -> Result<T> {
    let mut decoder = match DECODER.take() {
        Some(decoder) => decoder,
        None => Decoder::new()?,
    };
    let result = run(&mut decoder);
    DECODER.set(Some(decoder));
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(len: usize) -> Vec<u8> {
        (0..len).map(|i| u8::try_from(i * i / 7 % 61).unwrap()).collect()
    }

    #[test]
    fn every_codec_round_trips() {
        for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd(-5), Codec::Zstd(1), Codec::Zstd(19)] {
            for len in [0, 1, 4096, 65536] {
                let raw = sample(len);
                let mut encoder = Encoder::new(codec).unwrap();
                let (encoding, stored) = encoder.encode(&raw).unwrap();
                let mut decoded = vec![0; len];
                Decoder::new().unwrap().decode(encoding, stored, &mut decoded).unwrap();
                assert_eq!(decoded, raw, "{codec} {len}");
            }
        }
    }

    #[test]
    fn noise_is_left_raw() {
        let noise: Vec<u8> = blake3::Hasher::new().finalize_xof().by_ref_fill(65536);
        for codec in [Codec::Lz4, Codec::Zstd(3)] {
            let mut encoder = Encoder::new(codec).unwrap();
            assert_eq!(encoder.encode(&noise).unwrap().0, Encoding::Raw);
        }
    }

    #[test]
    fn a_wrong_length_is_corrupt() {
        let raw = sample(4096);
        let mut encoder = Encoder::new(Codec::Zstd(3)).unwrap();
        let (encoding, stored) = encoder.encode(&raw).unwrap();
        for len in [0, 4095, 4097] {
            let mut decoded = vec![0; len];
            Decoder::new().unwrap().decode(encoding, stored, &mut decoded).unwrap_err();
        }
    }

    #[test]
    fn codecs_are_parsed_and_printed() {
        for text in ["raw", "lz4", "zstd:-7", "zstd:19"] {
            assert_eq!(text.parse::<Codec>().unwrap().to_string(), text);
        }
        for text in ["", "gzip", "zstd:", "zstd:20", "zstd:x", "ZSTD"] {
            text.parse::<Codec>().unwrap_err();
        }
    }

    trait Fill {
        fn by_ref_fill(self, len: usize) -> Vec<u8>;
    }

    impl Fill for blake3::OutputReader {
        fn by_ref_fill(mut self, len: usize) -> Vec<u8> {
            let mut bytes = vec![0; len];
            self.fill(&mut bytes);
            bytes
        }
    }
}
