//! Files of Firecracker's state: a head and a checksum as each version writes them, and in between
//! what a double's guest needs.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::guest::GuestState;

const MAGIC: u64 = 0x0710_1984_8664_0000;

/// The state of a whole VMM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct VmState {
    pub(super) guest: GuestState,
    pub(super) mem_size_mib: u64,
    /// Devices as they were configured.
    pub(super) networks: Vec<Value>,
    pub(super) vsock: Option<Value>,
}

/// The format of a release 1.MINOR.PATCH.
pub(super) fn format_of(release: (u32, u32)) -> [u32; 3] {
    let major = match release {
        (..=7, _) => 1,
        (8, _) => 2,
        (9, _) | (10, 0) => 3,
        (10, _) => 4,
        (11, _) => 5,
        (12, _) => 6,
        (13 | 14, _) => 8,
        (15, _) => 9,
        (16, _) => 10,
        _ => 11,
    };
    [major, 0, 0]
}

/// A state's file as a release writes it.
pub(super) fn encode(release: (u32, u32), state: &VmState, oracle: &[u8]) -> Result<Vec<u8>> {
    let [major, _, _] = format_of(release);
    let version = format!("{major}.0.0");
    let mut bytes = Vec::new();
    if release.0 >= 15 {
        bytes.push(0);
        bytes.extend(MAGIC.to_le_bytes());
        bytes.push(u8::try_from(version.len())?);
    } else {
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend((version.len() as u64).to_le_bytes());
    }
    bytes.extend(version.as_bytes());
    let json = serde_json::to_vec(state)?;
    bytes.extend((json.len() as u64).to_le_bytes());
    bytes.extend(json);
    bytes.extend(oracle);
    let sum = crc64(&bytes);
    bytes.extend(sum.to_le_bytes());
    Ok(bytes)
}

/// Reads a state's file as a release does: only of its own format.
pub(super) fn decode(release: (u32, u32), bytes: &[u8]) -> Result<(VmState, Vec<u8>)> {
    let (bytes, sum) =
        bytes.split_last_chunk::<8>().context("IO Error: failed to fill whole buffer")?;
    ensure!(crc64(bytes) == u64::from_le_bytes(*sum), "CRC64 validation failed");
    let (head, length_bytes) = if release.0 >= 15 { (9, 1) } else { (8, 8) };
    let length = bytes.get(head..head + length_bytes).context("Bitcode error")?;
    let length = length.iter().rev().fold(0_usize, |sum, byte| sum << 8 | usize::from(*byte));
    let at = head + length_bytes;
    let version = bytes.get(at..at.saturating_add(length)).context("Bitcode error")?;
    let [major, minor, patch] = format_of(release);
    if version != format!("{major}.{minor}.{patch}").as_bytes() {
        bail!("Invalid data version: {}", String::from_utf8_lossy(version));
    }
    let (length, rest) =
        bytes[at + version.len()..].split_first_chunk::<8>().context("a state that is cut")?;
    let length = usize::try_from(u64::from_le_bytes(*length))?;
    ensure!(length <= rest.len(), "a state that is cut");
    let (json, oracle) = rest.split_at(length);
    Ok((serde_json::from_slice(json)?, oracle.to_vec()))
}

/// Jones's, bit by bit.
fn crc64(bytes: &[u8]) -> u64 {
    let step = |crc: u64| (crc >> 1) ^ if crc & 1 == 1 { 0x95ac_9329_ac4b_c9b5 } else { 0 };
    bytes.iter().fold(0, |crc, byte| (0..8).fold(crc ^ u64::from(*byte), |crc, _| step(crc)))
}
