//! A memory dump made into wrenn's compact diff: the non-zero blocks, and a header that maps them.
//!
//! ```text
//! diff     the blocks that are not zero, one behind the other
//! header   64 bytes: version, block size, size, generation (u64 each), build id, base build id
//!          40 bytes a run: offset, length (u64 each), build id, storage offset (u64); little-endian
//! ```
//!
//! Zeros are runs of the nil build. Nothing is hashed, shared, compressed or synced.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

const BLOCK_BYTES: usize = 4096;
const BUILD_ID: [u8; 16] = [0x57; 16];
const NIL_ID: [u8; 16] = [0; 16];

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompactDiff {
    /// Bytes of the diff file.
    pub diff_bytes: u64,
    /// Bytes of the header file.
    pub header_bytes: u64,
}

struct Run {
    offset: u64,
    length: u64,
    build: [u8; 16],
    storage: u64,
}

/// Writes `dump` to the new files `diff` and `header`, as a first generation.
///
/// # Errors
/// When a file cannot be read or written.
pub fn compact(dump: &Path, diff: &Path, header: &Path) -> io::Result<CompactDiff> {
    let mut dump = File::open(dump)?;
    let size = dump.metadata()?.len();
    let mut diff = File::create(diff)?;
    let mut block = [0; BLOCK_BYTES];
    let mut runs: Vec<Run> = Vec::new();
    let (mut offset, mut storage) = (0, 0);
    loop {
        let read = read_block(&mut dump, &mut block)?;
        if read == 0 {
            break;
        }
        block[read..].fill(0);
        let length = BLOCK_BYTES as u64;
        if block.iter().all(|&byte| byte == 0) {
            push(&mut runs, Run { offset, length, build: NIL_ID, storage: 0 });
        } else {
            diff.write_all(&block)?;
            push(&mut runs, Run { offset, length, build: BUILD_ID, storage });
            storage += length;
        }
        offset += length;
    }
    let bytes = encode(size, &runs);
    File::create(header)?.write_all(&bytes)?;
    Ok(CompactDiff { diff_bytes: storage, header_bytes: bytes.len() as u64 })
}

fn read_block(file: &mut File, block: &mut [u8; BLOCK_BYTES]) -> io::Result<usize> {
    let mut len = 0;
    while len < BLOCK_BYTES {
        match file.read(&mut block[len..])? {
            0 => break,
            read => len += read,
        }
    }
    Ok(len)
}

fn push(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.build == run.build => last.length += run.length,
        _ => runs.push(run),
    }
}

fn encode(size: u64, runs: &[Run]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(64 + runs.len() * 40);
    for number in [1, BLOCK_BYTES as u64, size, 0] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(BUILD_ID);
    bytes.extend(BUILD_ID);
    for run in runs {
        bytes.extend(run.offset.to_le_bytes());
        bytes.extend(run.length.to_le_bytes());
        bytes.extend(run.build);
        bytes.extend(run.storage.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_blocks_that_are_not_zero_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name| folder.path().join(name);
        let mut dump = vec![0; 5 * BLOCK_BYTES + 7];
        dump[BLOCK_BYTES] = 1;
        dump[3 * BLOCK_BYTES - 1] = 2;
        *dump.last_mut().unwrap() = 3;
        std::fs::write(path("dump"), &dump).unwrap();
        let report = compact(&path("dump"), &path("diff"), &path("header")).unwrap();
        assert_eq!(report.diff_bytes, 3 * BLOCK_BYTES as u64, "blocks 1, 2 and the padded last");
        assert_eq!(report.header_bytes, 64 + 4 * 40, "zero, data, zero, data");
        let diff = std::fs::read(path("diff")).unwrap();
        assert_eq!(diff[..2 * BLOCK_BYTES], dump[BLOCK_BYTES..3 * BLOCK_BYTES]);
        assert_eq!(diff[2 * BLOCK_BYTES..][..7], dump[5 * BLOCK_BYTES..]);
        assert_eq!(std::fs::read(path("header")).unwrap().len() as u64, report.header_bytes);
    }
}
