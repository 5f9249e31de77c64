//! A header of any version.
//!
//! ```text
//! 1, 2, 3   the 64 bytes and records of module `records`
//! 4, 5      the 64 bytes, u8 flags (bit 0: an upload under way), u32 length of what follows when
//!           decoded (at most 256 MiB), then one LZ4 frame of
//!             u32 builds, each: 16 id, i64 data length (0: unknown), 32 SHA-256 (0: unknown),
//!               u32 codec (0 none, 1 zstd, 2 LZ4), u32 frames, each: i64 start decoded,
//!               i64 start encoded, i32 length decoded, i32 length encoded
//!             4: u32 count, then that many records of 40 bytes; none means the data as it is
//!             5: the columns of module `columns`; none means a device of zeros
//! ```

use std::collections::BTreeMap;
use std::io::Write;

use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
use uuid::Uuid;

use super::columns;
use super::frames::Frame;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fields::Fields;
use crate::page_map::{BUILDS_MAX, PageMap};
use crate::records::{HEADER_BYTES_MAX, Metadata, encode_records, parse_records};
use crate::replay::DataCodec;

/// What E2B's own reader accepts of a block of version 4 or 5.
pub const BLOCK_BYTES_MAX: u32 = 256 << 20;

/// Frames of one build, as E2B's own reader accepts.
pub const FRAMES_MAX: u32 = 1 << 20;

/// A flag that never lands in storage.
const INCOMPLETE: u8 = 1;

/// What a header knows of the data of a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildEntry {
    /// Bytes of the data when decoded; 0 is unknown.
    pub size_bytes: u64,

    /// SHA-256 of them.
    pub sha256: Option<[u8; 32]>,

    /// How they are compressed.
    pub codec: DataCodec,

    /// The frames that this header needs, sorted; gaps are normal.
    pub frames: Vec<Frame>,
}

/// A header that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The first 64 bytes.
    pub metadata: Metadata,

    /// What is known of builds; nothing in versions 1 to 3.
    pub builds: BTreeMap<Uuid, BuildEntry>,

    /// Where each page lies.
    pub map: PageMap,

    /// Bytes that nobody looks at: behind the mappings, and behind the frame.
    pub trailing_bytes: u64,
}

impl Header {
    /// Reads a header of any version.
    pub fn parse(bytes: &[u8]) -> Result<Header> {
        if bytes.len() as u64 > HEADER_BYTES_MAX {
            return Err(Error::corrupt(format!(
                "a header of {} bytes; expected at most {HEADER_BYTES_MAX}",
                bytes.len()
            )));
        }
        let mut fields = Fields::new(bytes, "E2B header");
        let metadata = Metadata::parse(&mut fields)?;
        match metadata.format() {
            1..=3 => {
                let map = parse_records(&mut fields, &metadata, None)?;
                Ok(Header { metadata, builds: BTreeMap::new(), map, trailing_bytes: 0 })
            }
            4 | 5 => parse_block(&mut fields, metadata),
            other => Err(Error::new(
                ErrorKind::Unsupported,
                format!("E2B header at byte 0: version {other}; expected 1 to 5"),
            )),
        }
    }

    /// The header's bytes, in the version that its metadata says: 3 or 5.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.metadata.encode(&mut bytes);
        match self.metadata.format() {
            3 => encode_records(&self.map, &mut bytes),
            5 => {
                let mut block = Vec::new();
                encode_builds(&self.builds, &mut block)?;
                columns::encode(&self.map, &mut block)?;
                bytes.push(0);
                let len = u32::try_from(block.len())
                    .ok()
                    .filter(|&len| len <= BLOCK_BYTES_MAX)
                    .ok_or_else(|| {
                        Error::new(
                            ErrorKind::Unsupported,
                            format!(
                                "a header of {} bytes; E2B reads at most {BLOCK_BYTES_MAX}",
                                block.len()
                            ),
                        )
                    })?;
                bytes.extend(len.to_le_bytes());
                bytes = encode_frame(bytes, &block)?;
            }
            other => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("version {other} cannot be written; expected 3 or 5"),
                ));
            }
        }
        Ok(bytes)
    }
}

fn parse_block(fields: &mut Fields<'_>, metadata: Metadata) -> Result<Header> {
    let at = fields.clone();
    let flags = fields.u8("flags")?;
    if flags & INCOMPLETE != 0 {
        return Err(Error::new(
            ErrorKind::Refused,
            "E2B header at byte 64: it is of an upload that had not ended, so its data may be \
             missing; take it from storage",
        ));
    }
    if flags != 0 {
        return Err(at.corrupt(format_args!("flags {flags:#04x}; expected 0")));
    }
    let at = fields.clone();
    let len = fields.u32("block length")?;
    if len > BLOCK_BYTES_MAX {
        return Err(at.corrupt(format_args!("a block of {len} bytes; at most {BLOCK_BYTES_MAX}")));
    }
    let (block, behind_frame) = decode_frame(fields.rest(), len)
        .map_err(|why| at.corrupt(format_args!("the block cannot be decoded: {why}")))?;
    let mut inner = Fields::new(&block, "E2B header's block");
    let builds = parse_builds(&mut inner)?;
    let map = if metadata.format() == 4 {
        let count = inner.u32("count of mappings")?;
        parse_records(&mut inner, &metadata, Some(usize::try_from(count).unwrap_or(usize::MAX)))?
    } else {
        columns::parse(&mut inner, metadata.size_bytes)?
    };
    let trailing_bytes = inner.remaining() as u64 + behind_frame;
    Ok(Header { metadata, builds, map, trailing_bytes })
}

/// Decodes a frame of exactly `len` bytes; also how many bytes follow it.
fn decode_frame(bytes: &[u8], len: u32) -> std::result::Result<(Vec<u8>, u64), String> {
    // LZ4 makes at most 255 bytes of one, so a length that lies reserves little. One byte more than
    // expected tells a block that is too long.
    let room = u64::from(len).min(bytes.len() as u64 * 255) + 1;
    let mut block = vec![0; usize::try_from(room).unwrap_or(0)];
    let (got, taken) = match super::lz4_frame::decode(bytes, &mut block) {
        Ok(decoded) => decoded,
        Err(why) if room == u64::from(len) + 1 && why.starts_with("it has more than") => {
            return Err(format!("it has at least {room} bytes; expected {len}"));
        }
        Err(why) => return Err(why),
    };
    if got as u64 != u64::from(len) {
        let more = if got as u64 > u64::from(len) { "at least " } else { "" };
        return Err(format!("it has {more}{got} bytes; expected {len}"));
    }
    block.truncate(got);
    Ok((block, (bytes.len() - taken) as u64))
}

/// Appends a block as one frame with the parameters that E2B's writer uses.
fn encode_frame(bytes: Vec<u8>, block: &[u8]) -> Result<Vec<u8>> {
    let info = FrameInfo::new()
        .block_size(BlockSize::Max4MB)
        .block_mode(BlockMode::Independent)
        .block_checksums(true)
        .content_checksum(true);
    let mut encoder = FrameEncoder::with_frame_info(info, bytes);
    encoder.write_all(block).context(|| "cannot compress the header".to_owned())?;
    encoder.finish().map_err(|error| {
        Error::new(ErrorKind::Unsupported, format!("cannot compress the header: {error}"))
    })
}

fn parse_builds(fields: &mut Fields<'_>) -> Result<BTreeMap<Uuid, BuildEntry>> {
    let at = fields.clone();
    let count = fields.u32("count of builds")?;
    if usize::try_from(count).unwrap_or(usize::MAX) > BUILDS_MAX {
        return Err(at.corrupt(format_args!("{count} builds; at most {BUILDS_MAX}")));
    }
    let mut builds = BTreeMap::new();
    for _ in 0..count {
        let at = fields.clone();
        let id = fields.uuid("build id")?;
        let size = fields.i64("data length")?;
        let Ok(size_bytes) = u64::try_from(size) else {
            return Err(at.corrupt(format_args!("data of {size} bytes of build {id}")));
        };
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(fields.take(32, "SHA-256")?);
        let codec_at = fields.clone();
        let codec = match fields.u32("codec")? {
            0 => DataCodec::Plain,
            1 => DataCodec::Zstd,
            2 => DataCodec::Lz4,
            other => {
                return Err(codec_at.corrupt(format_args!("codec {other}; expected 0, 1 or 2")));
            }
        };
        let frames = parse_frames(fields, codec)?;
        let entry = BuildEntry {
            size_bytes,
            sha256: (sha256 != [0; 32]).then_some(sha256),
            // A table without frames is read back as none.
            codec: if frames.is_empty() { DataCodec::Plain } else { codec },
            frames,
        };
        if builds.insert(id, entry).is_some() {
            return Err(at.corrupt(format_args!("build {id} is there twice")));
        }
    }
    Ok(builds)
}

fn parse_frames(fields: &mut Fields<'_>, codec: DataCodec) -> Result<Vec<Frame>> {
    let at = fields.clone();
    let count = fields.u32("count of frames")?;
    if count > FRAMES_MAX || (codec == DataCodec::Plain && count > 0) {
        let max = if codec == DataCodec::Plain { 0 } else { FRAMES_MAX };
        return Err(at.corrupt(format_args!("{count} frames; at most {max}")));
    }
    // Bounds come first: what follows must be there.
    let mut frames: Vec<Frame> = Vec::new();
    let (mut end_decoded, mut end_encoded) = (0, 0);
    for _ in 0..count {
        let at = fields.clone();
        let start = (fields.i64("start decoded")?, fields.i64("start encoded")?);
        let len = (fields.i32("length decoded")?, fields.i32("length encoded")?);
        let (Ok(decoded_at), Ok(encoded_at)) = (u64::try_from(start.0), u64::try_from(start.1))
        else {
            return Err(at.corrupt("a frame with a start below 0"));
        };
        let (Ok(decoded_bytes @ 1..), Ok(encoded_bytes @ 1..)) =
            (u32::try_from(len.0), u32::try_from(len.1))
        else {
            return Err(at.corrupt(format_args!(
                "a frame of {} bytes in {}; expected more than 0",
                len.0, len.1
            )));
        };
        if decoded_at < end_decoded || encoded_at < end_encoded {
            return Err(at.corrupt(format_args!(
                "a frame at {decoded_at} in {encoded_at} overlaps the one before; expected from \
                 {end_decoded} in {end_encoded}"
            )));
        }
        let frame = Frame { decoded_at, encoded_at, decoded_bytes, encoded_bytes };
        frame.check().map_err(|why| at.corrupt(why))?;
        end_decoded = decoded_at + u64::from(decoded_bytes);
        end_encoded = encoded_at + u64::from(encoded_bytes);
        frames.push(frame);
    }
    Ok(frames)
}

fn encode_builds(builds: &BTreeMap<Uuid, BuildEntry>, bytes: &mut Vec<u8>) -> Result<()> {
    let too_many = || Error::new(ErrorKind::Unsupported, "more builds or frames than E2B reads");
    let count = u32::try_from(builds.len()).map_err(|_| too_many())?;
    bytes.extend(count.to_le_bytes());
    for (id, entry) in builds {
        bytes.extend(id.as_bytes());
        bytes.extend(entry.size_bytes.to_le_bytes());
        bytes.extend(entry.sha256.unwrap_or_default());
        let codec: u32 = match entry.codec {
            DataCodec::Plain => 0,
            DataCodec::Zstd => 1,
            DataCodec::Lz4 => 2,
        };
        bytes.extend(codec.to_le_bytes());
        let frames = u32::try_from(entry.frames.len())
            .ok()
            .filter(|&frames| frames <= FRAMES_MAX)
            .ok_or_else(too_many)?;
        bytes.extend(frames.to_le_bytes());
        for frame in &entry.frames {
            bytes.extend(frame.decoded_at.to_le_bytes());
            bytes.extend(frame.encoded_at.to_le_bytes());
            bytes.extend(frame.decoded_bytes.to_le_bytes());
            bytes.extend(frame.encoded_bytes.to_le_bytes());
        }
    }
    Ok(())
}
