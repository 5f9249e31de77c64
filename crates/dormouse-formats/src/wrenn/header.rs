//! `memfile.header`.

use crate::error::{Error, ErrorKind, Result};
use crate::fields::Fields;
use crate::page_map::{PAGE_BYTES, PageMap};
use crate::records::{HEADER_BYTES_MAX, Metadata, encode_records, parse_records};

/// The one version there is.
pub const VERSION: u64 = 1;

/// A header that was checked: its records are sorted, cover the device and are whole pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The first 64 bytes.
    pub metadata: Metadata,

    /// The records.
    pub map: PageMap,
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: &[u8]) -> Result<Header> {
        if bytes.len() as u64 > HEADER_BYTES_MAX {
            return Err(Error::corrupt(format!(
                "a header of {} bytes; expected at most {HEADER_BYTES_MAX}",
                bytes.len()
            )));
        }
        let mut fields = Fields::new(bytes, "wrenn header");
        let metadata = Metadata::parse(&mut fields)?;
        if metadata.version != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "wrenn header at byte 0: version {}; expected {VERSION}{}",
                    metadata.version,
                    if (2..=5).contains(&metadata.format()) { "; is it E2B's?" } else { "" }
                ),
            ));
        }
        if metadata.block_bytes != PAGE_BYTES {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "wrenn header at byte 8: block size {}; expected {PAGE_BYTES}",
                    metadata.block_bytes
                ),
            ));
        }
        let map = parse_records(&mut fields, &metadata, None)?;
        Ok(Header { metadata, map })
    }

    /// The header's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.metadata.encode(&mut bytes);
        encode_records(&self.map, &mut bytes);
        bytes
    }
}
