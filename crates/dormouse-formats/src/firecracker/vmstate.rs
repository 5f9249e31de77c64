//! The envelope of Firecracker's vmstate; what is in it stays closed.
//!
//! ```text
//! u64 magic (0x0710_1984_8664_0000 x86_64, 0x0710_1984_aaaa_0000 aarch64), the version of the
//! snapshot's format, payload, and a CRC-64 of all before it; little-endian
//! ```
//!
//! The version is three numbers. Up to format 8 (Firecracker 1.14) they are u64 each, from format 9
//! on they are written in whatever the payload's encoding makes of them, which is not told apart
//! here: then the version is unknown. Which Firecracker wrote a file is told by its format only
//! roughly, as 1.13 and 1.14 share one.

use crate::data::StableFile;
use crate::error::{Error, ErrorKind, Result};
use crate::fields::Fields;

/// The longest vmstate that Firecracker reads.
pub const STATE_BYTES_MAX: u64 = 10 << 20;

const MAGIC_X86_64: u64 = 0x0710_1984_8664_0000;
const MAGIC_AARCH64: u64 = 0x0710_1984_aaaa_0000;

/// Whether a vmstate begins with this number.
pub(crate) fn is_magic(number: u64) -> bool {
    matches!(number, MAGIC_X86_64 | MAGIC_AARCH64)
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
        let magic = fields.u64("magic")?;
        let arch = match magic {
            MAGIC_X86_64 => "x86_64",
            MAGIC_AARCH64 => "aarch64",
            other => {
                return Err(Error::corrupt(format!(
                    "vmstate at byte 0: magic {other:#018x}; expected {MAGIC_X86_64:#018x} or \
                     {MAGIC_AARCH64:#018x}"
                )));
            }
        };
        let mut numbers = fields.clone();
        let version = (numbers.u64("major")?, numbers.u64("minor")?, numbers.u64("patch")?);
        let format = (version.0 <= 8 && version.1 < 256 && version.2 < 256).then_some(version);
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
            5 => "1.11",
            6 => "1.12",
            8 => "1.13 or 1.14",
            _ => return None,
        })
    }
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
