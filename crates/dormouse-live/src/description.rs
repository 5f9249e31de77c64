//! The description of an overlay: its size, its base and its layers, in one small file.
//!
//! It is replaced whole by a rename, so that a crash leaves the old one or the new one.
//! `docs/format.md` draws the bytes.

use dormouse_image::block::IMAGE_BYTES_MAX;
use dormouse_image::digest::checksum;

use crate::error::{Error, ErrorKind, Result};

/// Layers of an overlay, the one that is written to included. Each costs a look at its states
/// for every run that is read; commits that fail again and again fold layers beyond it.
pub const LAYERS_MAX: usize = 8;

/// Bytes of the caller's name for the base.
pub const BASE_LABEL_BYTES_MAX: usize = 4096;

/// The longest description there is.
pub(crate) const DESCRIPTION_BYTES_MAX: u64 =
    (HEADER_BYTES + 8 * LAYERS_MAX + BASE_LABEL_BYTES_MAX + 8) as u64;

const MAGIC: [u8; 8] = *b"\x89DMlive\n";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 32;

/// What an overlay is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Bytes of the disk.
    pub size_bytes: u64,

    /// What the caller calls the base, to find it again. Means nothing here.
    pub base_label: String,

    /// Numbers of the layers, newest first.
    pub layers: Vec<u64>,

    /// The number of the next layer; numbers only count up.
    pub next_layer: u64,
}

impl Description {
    /// The description as bytes, which [`Description::parse`] takes if it is a sound one.
    pub fn encode(&self) -> Result<Vec<u8>> {
        self.check()?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(u16::try_from(self.layers.len()).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend(u16::try_from(self.base_label.len()).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend(self.size_bytes.to_le_bytes());
        bytes.extend(self.next_layer.to_le_bytes());
        for layer in &self.layers {
            bytes.extend(layer.to_le_bytes());
        }
        bytes.extend(self.base_label.as_bytes());
        bytes.extend(checksum(&[&bytes]).to_le_bytes());
        Ok(bytes)
    }

    /// Parses a description.
    pub fn parse(bytes: &[u8]) -> Result<Description> {
        let corrupt = |got: &str, expected: &str| Error::corrupt("live disk", got, expected);
        if !bytes.starts_with(&MAGIC) {
            return Err(corrupt("another magic", "a description of an overlay"));
        }
        let short = || corrupt("a short description", "all its fields");
        let version = u16::from_le_bytes(field(bytes, 8).ok_or_else(short)?);
        if version != VERSION {
            let message = format!("a live disk of version {version}; this build reads {VERSION}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let (body, sum) = bytes.split_last_chunk::<8>().ok_or_else(short)?;
        if checksum(&[body]) != u64::from_le_bytes(*sum) {
            return Err(corrupt("another checksum", "that of its bytes"));
        }
        if field(body, 10).ok_or_else(short)? != [0; 2] {
            return Err(corrupt("reserved fields in use", "zeros"));
        }
        let layers = usize::from(u16::from_le_bytes(field(body, 12).ok_or_else(short)?));
        let label = usize::from(u16::from_le_bytes(field(body, 14).ok_or_else(short)?));
        if body.len() != HEADER_BYTES + 8 * layers + label {
            return Err(corrupt("another length", "that of its fields"));
        }
        let (rows, label) = body[HEADER_BYTES..].split_at(8 * layers);
        let rows = rows.as_chunks::<8>().0;
        let description = Description {
            size_bytes: u64::from_le_bytes(field(body, 16).ok_or_else(short)?),
            next_layer: u64::from_le_bytes(field(body, 24).ok_or_else(short)?),
            layers: rows.iter().map(|row| u64::from_le_bytes(*row)).collect(),
            base_label: std::str::from_utf8(label)
                .map_err(|_| corrupt("a label of other bytes", "UTF-8"))?
                .to_owned(),
        };
        description.check().map_err(|error| corrupt(&error.to_string(), "a sound description"))?;
        Ok(description)
    }

    fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        if self.size_bytes == 0 || self.size_bytes > IMAGE_BYTES_MAX {
            let size = self.size_bytes;
            return refuse(format!("a disk of {size} bytes; expected 1 to {IMAGE_BYTES_MAX}"));
        }
        if self.base_label.len() > BASE_LABEL_BYTES_MAX {
            return refuse(format!("a base label of {} bytes", self.base_label.len()));
        }
        if self.layers.is_empty() || self.layers.len() > LAYERS_MAX {
            return refuse(format!("{} layers; expected 1 to {LAYERS_MAX}", self.layers.len()));
        }
        let is_descending = self.layers.windows(2).all(|pair| pair[0] > pair[1]);
        if !is_descending || self.layers[0] >= self.next_layer {
            return refuse("layers out of order".to_owned());
        }
        Ok(())
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> Description {
        Description {
            size_bytes: 1 << 30,
            base_label: "web@3:rootfs".to_owned(),
            layers: vec![7, 4, 2],
            next_layer: 8,
        }
    }

    #[test]
    fn every_flip_and_cut_is_noticed() {
        let bytes = description().encode().unwrap();
        assert_eq!(Description::parse(&bytes).unwrap(), description());
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Description::parse(&bad).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(Description::parse(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn unsound_descriptions_are_refused() {
        let sound = description;
        for bad in [
            Description { size_bytes: 0, ..sound() },
            Description { size_bytes: IMAGE_BYTES_MAX + 1, ..sound() },
            Description { layers: vec![], ..sound() },
            Description { layers: (0..9).rev().collect(), next_layer: 9, ..sound() },
            Description { layers: vec![2, 2], ..sound() },
            Description { next_layer: 7, ..sound() },
            Description { base_label: "x".repeat(5000), ..sound() },
        ] {
            assert_eq!(bad.encode().unwrap_err().kind(), ErrorKind::InvalidInput, "{bad:?}");
        }
    }
}
