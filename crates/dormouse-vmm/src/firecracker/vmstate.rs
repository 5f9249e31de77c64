//! Firecracker's state file, of which only the head and the checksum are looked at.
//!
//! ```text
//! up to 1.14    u64 magic, u64 length, version as text, …, u64 CRC-64
//! since 1.15    00, u64 magic, u8 length, version as text, …, u64 CRC-64
//! ```
//!
//! (All little-endian: bincode with fixed integers, then bitcode, which packs each field and starts
//! with how. Source: `src/vmm/src/snapshot`.) The CRC (Jones's polynomial, reflected) is of all that
//! is before it, so it tells a file that was cut short; what is in between is opaque.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::kind::Version;

/// Bytes of a state: Firecracker's own limit.
pub const BYTES_MAX: usize = 10_000_000;

/// The magic number for x86-64 and for ARM.
pub const MAGICS: [u64; 2] = [0x0710_1984_8664_0000, 0x0710_1984_aaaa_0000];

/// Bytes of the version's text; it is three small numbers.
const VERSION_BYTES_MAX: usize = 32;

/// The polynomial, reflected.
const POLYNOMIAL: u64 = 0x95ac_9329_ac4b_c9b5;

/// The head of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The version of its format.
    pub version: Version,
    /// Whether its checksum is right.
    pub is_whole: bool,
}

/// Reads the head of a state's file, and refuses one that is not whole.
pub fn read(path: &Path) -> Result<Header> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(BYTES_MAX as u64 + 1).read_to_end(&mut bytes))
        .map_err(|error| Error::file(format!("cannot read {}", path.display()), error))?;
    let bad = |why: String| Error::new(ErrorKind::InvalidFile, format!("{} {why}", path.display()));
    if bytes.len() > BYTES_MAX {
        return Err(bad(format!("has more than {BYTES_MAX} bytes, which Firecracker refuses")));
    }
    let header = parse(&bytes)
        .ok_or_else(|| bad(format!("is no state of Firecracker's ({} bytes)", bytes.len())))?;
    if !header.is_whole {
        return Err(bad(format!(
            "is damaged or cut short: the checksum of its {} bytes is wrong",
            bytes.len()
        )));
    }
    Ok(header)
}

/// The head of a state, if it is one.
pub fn parse(bytes: &[u8]) -> Option<Header> {
    let (before, sum) = bytes.split_last_chunk::<8>()?;
    let is_whole = crc64(before) == u64::from_le_bytes(*sum);
    // Of two readings at most one has a magic number where it belongs, for it ends in two zeros.
    let version = bincode(before).or_else(|| bitcode(before))?;
    Some(Header { version, is_whole })
}

fn bincode(bytes: &[u8]) -> Option<Version> {
    let (magic, bytes) = bytes.split_first_chunk::<8>()?;
    let (length, bytes) = bytes.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    version(u64::from_le_bytes(*magic), length, bytes)
}

fn bitcode(bytes: &[u8]) -> Option<Version> {
    let bytes = bytes.strip_prefix(&[0])?;
    let (magic, bytes) = bytes.split_first_chunk::<8>()?;
    let (length, bytes) = bytes.split_first()?;
    version(u64::from_le_bytes(*magic), usize::from(*length), bytes)
}

fn version(magic: u64, length: usize, bytes: &[u8]) -> Option<Version> {
    if !MAGICS.contains(&magic) || length > VERSION_BYTES_MAX {
        return None;
    }
    str::from_utf8(bytes.get(..length)?).ok()?.parse().ok()
}

/// The checksum of Firecracker's states.
pub fn crc64(bytes: &[u8]) -> u64 {
    const TABLE: [u64; 256] = table();
    bytes.iter().fold(0, |crc, byte| TABLE[((crc ^ u64::from(*byte)) & 0xff) as usize] ^ (crc >> 8))
}

const fn table() -> [u64; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u64;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        let sum = crc64(&bytes);
        bytes.extend(sum.to_le_bytes());
        bytes
    }

    #[test]
    fn the_checksum_is_joness() {
        assert_eq!(crc64(b"123456789"), 0xe9c6_d914_c4b8_d9ca);
        assert_eq!(crc64(b""), 0);
    }

    #[test]
    fn both_encodings_are_read() {
        let mut old = MAGICS[0].to_le_bytes().to_vec();
        old.extend(5_u64.to_le_bytes());
        old.extend(b"8.0.0rest");
        let header = parse(&sealed(old.clone())).unwrap();
        assert_eq!(header, Header { version: Version::new(8, 0, 0), is_whole: true });
        // What bitcode 0.6 makes of it.
        let mut new = vec![0];
        new.extend(MAGICS[1].to_le_bytes());
        new.extend([6]);
        new.extend(b"10.0.0\x03\x02rest");
        let header = parse(&sealed(new.clone())).unwrap();
        assert_eq!(header, Header { version: Version::new(10, 0, 0), is_whole: true });
        let mut torn = sealed(new);
        torn.pop();
        assert!(!parse(&torn).unwrap().is_whole);
        for bad in [&b""[..], b"1234567", &[0; 64], &sealed(b"no".to_vec())] {
            assert_eq!(parse(bad), None);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmstate");
        std::fs::write(&path, &torn).unwrap();
        assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::InvalidFile);
        std::fs::write(&path, sealed(old)).unwrap();
        read(&path).unwrap();
        std::fs::write(&path, vec![0; BYTES_MAX + 1]).unwrap();
        assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::InvalidFile);
    }
}
