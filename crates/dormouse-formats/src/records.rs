//! The header that wrenn and E2B's versions 1 to 3 share: 64 bytes, then a record of 40 bytes for
//! each run until the file ends.
//!
//! ```text
//!  0  u64  version          low 16 bits; wrenn always writes 1
//!  8  u64  block size       unit of dirty tracking; the unit of the records is 4 KiB all the same
//! 16  u64  size             bytes of the device
//! 24  u64  generation       0 for a full dump, the parent's + 1 for a diff
//! 32  16   build            whose header this is
//! 48  16   base build       generation 0 of the lineage
//! 64  40 × records: offset u64, length u64, build 16 bytes, storage offset u64; all little-endian
//! ```
//!
//! There is no magic, no count and no checksum, so a file cut between two records is noticed only
//! because its records do not cover the device. No record at all means the build's data as it is.

use uuid::Uuid;

use crate::error::{Context, Error, Result};
use crate::fields::Fields;
use crate::page_map::{PAGE_BYTES, PageMap, PageMapBuilder, RUNS_MAX, Record};

/// Bytes before the records.
pub const METADATA_BYTES: usize = 64;

/// Bytes of a record.
pub const RECORD_BYTES: usize = 40;

/// The longest header: as many records as runs are allowed.
pub const HEADER_BYTES_MAX: u64 = (METADATA_BYTES + RUNS_MAX * RECORD_BYTES) as u64;

/// The first 64 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// As it stands in the file.
    pub version: u64,

    /// The unit of dirty tracking.
    pub block_bytes: u64,

    /// Bytes of the device.
    pub size_bytes: u64,

    /// How many snapshots came before in the lineage.
    pub generation: u64,

    /// Whose header this is.
    pub build: Uuid,

    /// The first build of the lineage.
    pub base: Uuid,
}

impl Metadata {
    /// The format that the version selects: its low 16 bits.
    pub fn format(&self) -> u64 {
        self.version & 0xffff
    }

    pub(crate) fn parse(fields: &mut Fields<'_>) -> Result<Metadata> {
        let version = fields.u64("version")?;
        let at = fields.clone();
        let block_bytes = fields.u64("block size")?;
        if block_bytes == 0 || !block_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(at.corrupt(format_args!(
                "block size {block_bytes}; expected a multiple of {PAGE_BYTES}"
            )));
        }
        let size_bytes = fields.u64("size")?;
        let generation = fields.u64("generation")?;
        let at = fields.clone();
        let build = fields.uuid("build id")?;
        if build.is_nil() {
            return Err(at.corrupt("the build id is nil, which stands for zeros"));
        }
        let base = fields.uuid("base build id")?;
        Ok(Metadata { version, block_bytes, size_bytes, generation, build, base })
    }

    pub(crate) fn encode(&self, bytes: &mut Vec<u8>) {
        for number in [self.version, self.block_bytes, self.size_bytes, self.generation] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(self.build.as_bytes());
        bytes.extend(self.base.as_bytes());
    }
}

/// Reads `count` records, or those until the end, and checks that they cover the device.
pub(crate) fn parse_records(
    fields: &mut Fields<'_>,
    metadata: &Metadata,
    count: Option<usize>,
) -> Result<PageMap> {
    let begin = fields.position();
    let len = match count {
        None => fields.remaining(),
        Some(count) => count.saturating_mul(RECORD_BYTES),
    };
    let whole = len.is_multiple_of(RECORD_BYTES);
    if len / RECORD_BYTES > RUNS_MAX {
        return Err(fields
            .corrupt(format_args!("{} records; expected at most {RUNS_MAX}", len / RECORD_BYTES)));
    }
    let bytes = fields.take(len, "records")?;
    if bytes.is_empty() {
        return PageMap::identity(metadata.size_bytes, metadata.build);
    }
    let mut builder = PageMapBuilder::new(metadata.size_bytes)?;
    builder.reserve(bytes.len() / RECORD_BYTES);
    let mut chunks = bytes.chunks_exact(RECORD_BYTES);
    for (number, chunk) in chunks.by_ref().enumerate() {
        builder.push(&record(chunk)).context(|| {
            format!("record {number} at byte {} is damaged", begin + (number * RECORD_BYTES) as u64)
        })?;
    }
    if !whole {
        let at = begin + (len - chunks.remainder().len()) as u64;
        return Err(Error::corrupt(format!(
            "the record at byte {at} ends after {} bytes; expected {RECORD_BYTES}",
            chunks.remainder().len()
        )));
    }
    builder.finish()
}

fn record(chunk: &[u8]) -> Record {
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&chunk[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let mut build = [0; 16];
    build.copy_from_slice(&chunk[16..32]);
    Record {
        offset: number(0),
        length: number(8),
        build: Uuid::from_bytes(build),
        storage: number(32),
    }
}

/// Appends the records of a map.
pub(crate) fn encode_records(map: &PageMap, bytes: &mut Vec<u8>) {
    bytes.reserve(map.len() * RECORD_BYTES);
    for run in map.runs() {
        let (build, storage) = match run.place {
            None => (Uuid::nil(), 0),
            Some(place) => {
                let build = map.builds().get(place.build as usize).copied().unwrap_or_default();
                (build, u64::from(place.page) * PAGE_BYTES)
            }
        };
        bytes.extend((run.start * PAGE_BYTES).to_le_bytes());
        bytes.extend((run.pages * PAGE_BYTES).to_le_bytes());
        bytes.extend(build.as_bytes());
        bytes.extend(storage.to_le_bytes());
    }
}
