//! Firecracker's files: a vmstate with its checksum, and diffs in which holes are what did not
//! change.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::random::PAGE;

/// A vmstate of a format, with some payload, as the releases of that format write it.
#[must_use]
pub fn vmstate(format: (u64, u64, u64), payload: &[u8]) -> Vec<u8> {
    let magic = 0x0710_1984_8664_0000_u64.to_le_bytes();
    let version = format!("{}.{}.{}", format.0, format.1, format.2);
    let mut bytes = Vec::new();
    // Since 1.15 each field says how it is packed, and lengths are short.
    if format.0 >= 9 {
        bytes.push(0);
        bytes.extend(magic);
        bytes.push(u8::try_from(version.len()).unwrap_or(u8::MAX));
    } else {
        bytes.extend(magic);
        bytes.extend((version.len() as u64).to_le_bytes());
    }
    bytes.extend(version.as_bytes());
    bytes.extend(payload);
    let sum = crc64(&bytes);
    bytes.extend(sum.to_le_bytes());
    bytes
}

/// Bit by bit, from the polynomial as it is written down: 0xad93d23594c935a9, both sides reflected.
fn crc64(bytes: &[u8]) -> u64 {
    let mut crc = 0_u64;
    for byte in bytes {
        crc ^= u64::from(byte.reverse_bits()) << 56;
        for _ in 0..8 {
            crc = crc << 1 ^ if crc >> 63 == 1 { 0xad93_d235_94c9_35a9 } else { 0 };
        }
    }
    crc.reverse_bits()
}

/// Writes a diff of memory: the pages that the guest wrote to are data, zeros too.
///
/// # Errors
/// When the file cannot be written.
pub fn diff(path: &Path, memory: &[u8], written: &[usize]) -> io::Result<()> {
    let file = File::create(path)?;
    file.set_len(memory.len() as u64)?;
    for &page in written {
        file.write_all_at(&memory[page * PAGE..][..PAGE], (page * PAGE) as u64)?;
    }
    file.sync_all()
}
