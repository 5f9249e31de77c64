//! The envelope of Firecracker's vmstate; what is in it stays closed.
//!
//! ```text
//! up to 1.14    u64 magic, u64 length, version as text, payload, u64 CRC-64
//! since 1.15    00, u64 magic, u8 length, version as text, payload, u64 CRC-64
//! ```
//!
//! All little-endian; the magic is 0x0710_1984_8664_0000 for x86_64 and 0x0710_1984_aaaa_0000 for aarch64,
//! and the CRC of all before it. The version is that of the snapshot's format, such as 8.0.0. Which
//! Firecracker wrote a file is told by it only roughly, as 1.13 and 1.14 share one.

use crate::data::StableFile;
use crate::error::{Error, ErrorKind, Result};
use crate::fields::Fields;

/// The longest vmstate that Firecracker reads.
pub const STATE_BYTES_MAX: u64 = 10 << 20;

const MAGIC_X86_64: u64 = 0x0710_1984_8664_0000;
const MAGIC_AARCH64: u64 = 0x0710_1984_aaaa_0000;

/// The longest text of a version: three small numbers.
const VERSION_BYTES_MAX: u64 = 32;

/// Bytes of a file that tell whether it is a vmstate.
pub(crate) const HEAD_BYTES: usize = 9;

/// How the head is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    /// Numbers as they are: bincode.
    Fixed,

    /// Each field with how it is packed before it: bitcode.
    Packed,
}

/// Whether a vmstate begins with these bytes.
pub(crate) fn is_head(head: [u8; HEAD_BYTES]) -> bool {
    magic_of(&head).is_some()
}

/// Encoding and architecture. At most one of the encodings has a magic where it belongs, as that ends in
/// two zeros.
fn magic_of(bytes: &[u8]) -> Option<(Encoding, &'static str)> {
    let arch = |bytes: &[u8]| match u64::from_le_bytes(*bytes.first_chunk()?) {
        MAGIC_X86_64 => Some("x86_64"),
        MAGIC_AARCH64 => Some("aarch64"),
        _ => None,
    };
    let fixed = arch(bytes).map(|arch| (Encoding::Fixed, arch));
    fixed.or_else(|| Some((Encoding::Packed, arch(bytes.strip_prefix(&[0])?)?)))
}

/// What a vmstate tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmState {
    /// The architecture.
    pub arch: &'static str,

    /// Major, minor and patch of the snapshot's format, where they can be read.
    pub format: Option<(u64, u64, u64)>,

    /// Whether the checksum at the end is right.
    pub checksum_matches: bool,
}

impl VmState {
    /// Reads the envelope of a whole file.
    pub fn parse(bytes: &[u8]) -> Result<VmState> {
        let mut fields = Fields::new(bytes, "vmstate");
        let Some((encoding, arch)) = magic_of(bytes) else {
            let magic = fields.u64("magic")?;
            return Err(Error::corrupt(format!(
                "vmstate at byte 0: magic {magic:#018x}; expected {MAGIC_X86_64:#018x} or \
                 {MAGIC_AARCH64:#018x}, there or behind a zero"
            )));
        };
        let text_bytes = match encoding {
            Encoding::Fixed => {
                fields.take(8, "magic")?;
                fields.u64("length of the version")?
            }
            Encoding::Packed => {
                fields.take(9, "magic")?;
                u64::from(fields.u8("length of the version")?)
            }
        };
        let format = version(&mut fields, text_bytes);
        let body = bytes.len().checked_sub(8).filter(|&body| body >= 8).ok_or_else(|| {
            Error::corrupt(format!("vmstate: {} bytes have no room for a checksum", bytes.len()))
        })?;
        let stored = Fields::at_origin(&bytes[body..], "vmstate", body as u64).u64("checksum")?;
        Ok(VmState { arch, format, checksum_matches: crc64(&bytes[..body]) == stored })
    }

    /// Reads a file.
    pub fn read(file: &StableFile) -> Result<VmState> {
        VmState::parse(&file.read_all(STATE_BYTES_MAX)?)
    }

    /// Which releases of Firecracker write this format, in words.
    pub fn releases(&self) -> Option<&'static str> {
        Some(match self.format?.0 {
            1 => "1.7",
            2 => "1.8",
            3 => "1.9 or 1.10",
            4 => "1.10",
            5 => "1.11",
            6 => "1.12",
            8 => "1.13 or 1.14",
            9 => "1.15",
            10 => "1.16",
            _ => return None,
        })
    }
}

/// A version's three numbers. One that is none is of something that is not known here, and no damage: the
/// checksum tells that.
fn version(fields: &mut Fields<'_>, text_bytes: u64) -> Option<(u64, u64, u64)> {
    let len = usize::try_from(text_bytes).ok().filter(|_| text_bytes <= VERSION_BYTES_MAX)?;
    let text = str::from_utf8(fields.take(len, "version").ok()?).ok()?;
    let mut numbers = text.split('.').map(|number| number.parse().ok());
    let version = (numbers.next()??, numbers.next()??, numbers.next()??);
    numbers.next().is_none().then_some(version)
}

/// The releases that may have written a vmstate, for a snapshot's description.
pub(crate) fn version_of(file: &StableFile) -> Result<String> {
    let state = VmState::read(file)?;
    if !state.checksum_matches {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("{}: its checksum does not match", file.label()),
        ));
    }
    state.releases().map(str::to_owned).ok_or_else(|| {
        Error::new(ErrorKind::Unsupported, "vmstate of a version that is not known; kept as it is")
    })
}

/// CRC-64 as Firecracker has it: polynomial 0xad93d23594c935a9 (Jones), reflected, no inversion.
fn crc64(bytes: &[u8]) -> u64 {
    const POLYNOMIAL: u64 = 0x95ac_9329_ac4b_c9b5;
    let table: [u64; 256] = std::array::from_fn(|byte| {
        (0..8)
            .fold(byte as u64, |crc, _| if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 })
    });
    bytes.iter().fold(0, |crc, &byte| table[((crc ^ u64::from(byte)) & 0xff) as usize] ^ crc >> 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_one_of_jones() {
        assert_eq!(crc64(b"123456789"), 0xe9c6_d914_c4b8_d9ca);
    }
}
