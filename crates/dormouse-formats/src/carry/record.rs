//! The header and the records.

use std::collections::BTreeMap;
use std::io::{ErrorKind as IoErrorKind, Read, Write};

use dormouse_image::block::{BLOCK_BYTES, BLOCK_BYTES_U64, IMAGE_BYTES_MAX};
use dormouse_image::digest::checksum;
use dormouse_store::manifest::{
    IMAGES_MAX, LABEL_BYTES_MAX, LABELS_MAX, MemoryRegion, REGIONS_MAX, Vmm,
};
use dormouse_store::name::{ImageName, Name};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Context, Error, ErrorKind, Result};

/// The first 16 bytes.
pub const MAGIC: [u8; 16] = *b"dormouse-carry\n\0";

/// The one version there is.
const VERSION: u32 = 1;

/// The longest JSON of a header.
const JSON_BYTES_MAX: u32 = 64 << 20;

/// Snapshots of one carry.
const SNAPSHOTS_MAX: usize = 4096;

/// Blocks of one record: 1 MiB.
pub(super) const RECORD_BLOCKS_MAX: u32 = 256;

const RECORD_HEAD_BYTES: usize = 32;

/// What a carry has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The snapshots, each over the one before or over one that the receiver has.
    pub snapshots: Vec<CarriedSnapshot>,
}

/// A snapshot in a carry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CarriedSnapshot {
    /// Its UUID where it was made.
    pub uuid: Uuid,

    /// Its name at the sender's.
    pub name: Name,

    /// Its number there.
    pub number: u64,

    /// The snapshot that its images are changes of.
    pub base: Option<Uuid>,

    /// Its images, sorted.
    pub images: Vec<CarriedImage>,

    /// Where memory lies in the guest.
    #[serde(default)]
    pub memory_layout: Vec<MemoryRegion>,

    /// What ran the guest.
    #[serde(default)]
    pub vmm: Vmm,

    /// The user's own.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// An image of a snapshot in a carry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CarriedImage {
    /// Which one.
    pub image: ImageName,

    /// Its length.
    pub size_bytes: u64,

    /// Whether its records are only what differs from the base's image.
    pub is_changes: bool,

    /// What the base's image holds, if that is a snapshot that the receiver has: see
    /// [`content_digest`](super::content_digest).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_digest: Option<String>,
}

/// A record behind the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The first byte of the image.
    pub offset: u64,

    /// What is there.
    pub body: RecordBody,
}

/// What a record holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordBody {
    /// Whole blocks.
    Data(Vec<u8>),

    /// So many bytes of zeros.
    Zero(u64),

    /// The image ends.
    ImageEnd,

    /// All ends, after so many records.
    End(u64),
}

impl Header {
    /// Reads a header from the first bytes of a stream.
    pub fn read(source: &mut dyn Read) -> Result<Header> {
        let mut head = [0; 32];
        read_exact(source, &mut head, "the header")?;
        if head[..16] != MAGIC {
            return Err(Error::corrupt("carry at byte 0: it does not begin as a carry does"));
        }
        let version = number32(&head, 16);
        if version != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("carry at byte 16: version {version}; expected {VERSION}"),
            ));
        }
        let len = number32(&head, 20);
        if len > JSON_BYTES_MAX {
            return Err(Error::corrupt(format!(
                "carry at byte 20: a header of {len} bytes; at most {JSON_BYTES_MAX}"
            )));
        }
        // Bytes are taken as they come, so a length that lies costs nothing.
        let mut json = Vec::new();
        source
            .take(u64::from(len))
            .read_to_end(&mut json)
            .context(|| "cannot read the header".to_owned())?;
        if json.len() as u64 != u64::from(len) {
            return Err(Error::corrupt(format!(
                "carry at byte 32: the header ends after {} bytes; expected {len}",
                json.len()
            )));
        }
        let (got, expected) = (checksum(&[&head[..24], &json]), number64(&head, 24));
        if got != expected {
            return Err(Error::corrupt(format!(
                "carry at byte 24: checksum {expected:#018x}; the header has {got:#018x}"
            )));
        }
        let header: Header = serde_json::from_slice(&json)
            .map_err(|error| Error::corrupt(format!("carry at byte 32: {error}")))?;
        header.check()?;
        Ok(header)
    }

    /// Writes a header.
    pub fn write(&self, sink: &mut dyn Write) -> Result<()> {
        let json = serde_json::to_vec(self)
            .map_err(|error| Error::corrupt(format!("cannot write a header: {error}")))?;
        let len = u32::try_from(json.len()).ok().filter(|&len| len <= JSON_BYTES_MAX);
        let len = len.ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, "more snapshots than one carry holds")
        })?;
        let mut head = MAGIC.to_vec();
        head.extend(VERSION.to_le_bytes());
        head.extend(len.to_le_bytes());
        let sum = checksum(&[&head, &json]);
        head.extend(sum.to_le_bytes());
        sink.write_all(&head)
            .and_then(|()| sink.write_all(&json))
            .context(|| "cannot write the carry".to_owned())
    }

    fn check(&self) -> Result<()> {
        let bad = |why: String| Err(Error::corrupt(format!("carry's header: {why}")));
        if self.snapshots.len() > SNAPSHOTS_MAX {
            return bad(format!("{} snapshots; at most {SNAPSHOTS_MAX}", self.snapshots.len()));
        }
        for snapshot in &self.snapshots {
            let images = &snapshot.images;
            if images.len() > IMAGES_MAX
                || snapshot.memory_layout.len() > REGIONS_MAX
                || snapshot.labels.len() > LABELS_MAX
                || snapshot.labels.values().any(|value| value.len() > LABEL_BYTES_MAX)
            {
                return bad(format!("snapshot {} has more than one may have", snapshot.uuid));
            }
            if !images.windows(2).all(|pair| pair[0].image < pair[1].image) {
                return bad(format!("the images of {} are not sorted", snapshot.uuid));
            }
            for image in images {
                if image.size_bytes > IMAGE_BYTES_MAX {
                    return bad(format!("{} has {} bytes", image.image, image.size_bytes));
                }
                if image.is_changes && snapshot.base.is_none() {
                    return bad(format!("{} is changes of nothing", image.image));
                }
            }
        }
        Ok(())
    }
}

impl Record {
    /// Reads the next record, with its position in the stream for messages.
    pub fn read(source: &mut dyn Read, position: &mut u64) -> Result<Record> {
        let at = *position;
        let bad = |why: String| Error::corrupt(format!("carry's record at byte {at}: {why}"));
        let mut head = [0; RECORD_HEAD_BYTES];
        read_exact(source, &mut head, &format!("the record at byte {at}"))?;
        let (kind, codec) = (head[0], head[1]);
        let (stored, blocks) = (number32(&head, 4), number32(&head, 16));
        let first = number64(&head, 8);
        let bytes = u64::from(blocks) * BLOCK_BYTES_U64;
        let data_bytes_max = u64::from(RECORD_BLOCKS_MAX) * BLOCK_BYTES_U64;
        let is_data = kind == 1;
        if is_data && (blocks == 0 || bytes > data_bytes_max || u64::from(stored) > bytes) {
            return Err(bad(format!("{stored} bytes for {blocks} blocks")));
        }
        if !is_data && stored != 0 {
            return Err(bad(format!("{stored} bytes in a record of kind {kind}")));
        }
        let mut body = vec![0; usize::try_from(stored).unwrap_or(0)];
        read_exact(source, &mut body, &format!("the record at byte {at}"))?;
        let (got, expected) = (checksum(&[&head[..24], &body]), number64(&head, 24));
        if got != expected {
            return Err(bad(format!("checksum {expected:#018x}; it has {got:#018x}")));
        }
        *position += (RECORD_HEAD_BYTES + body.len()) as u64;
        let offset = first.checked_mul(BLOCK_BYTES_U64).filter(|&at| at <= IMAGE_BYTES_MAX);
        let in_image = || offset.ok_or_else(|| bad(format!("block {first} is past 16 TiB")));
        match kind {
            1 => {
                let len = usize::try_from(bytes).unwrap_or(0);
                let decoded = match codec {
                    0 if body.len() == len => body,
                    1 => decode(&body, len).map_err(bad)?,
                    other => return Err(bad(format!("codec {other} with {stored} bytes"))),
                };
                Ok(Record { offset: in_image()?, body: RecordBody::Data(decoded) })
            }
            2 => {
                // Zeros may be long: their blocks are counted in what data has no use for.
                let run = u64::from(blocks) | u64::from(number32(&head, 20)) << 32;
                let len = run.checked_mul(BLOCK_BYTES_U64).filter(|&len| len <= IMAGE_BYTES_MAX);
                let len = len.filter(|&len| len > 0);
                let len = len.ok_or_else(|| bad(format!("{run} blocks of zeros")))?;
                Ok(Record { offset: in_image()?, body: RecordBody::Zero(len) })
            }
            3 => Ok(Record { offset: 0, body: RecordBody::ImageEnd }),
            4 => Ok(Record { offset: 0, body: RecordBody::End(first) }),
            other => Err(bad(format!("kind {other}; expected 1 to 4"))),
        }
    }

    /// Writes a record.
    pub fn write(&self, sink: &mut dyn Write) -> Result<()> {
        let (kind, run, first): (u8, u64, u64) = match &self.body {
            RecordBody::Data(bytes) => {
                (1, (bytes.len() / BLOCK_BYTES) as u64, self.offset / BLOCK_BYTES_U64)
            }
            RecordBody::Zero(len) => {
                (2, len.div_ceil(BLOCK_BYTES_U64), self.offset / BLOCK_BYTES_U64)
            }
            RecordBody::ImageEnd => (3, 0, 0),
            RecordBody::End(records) => (4, 0, *records),
        };
        let (codec, body) = match &self.body {
            RecordBody::Data(bytes) => {
                let packed = zstd::bulk::compress(bytes, 3)
                    .context(|| "cannot compress a record".to_owned())?;
                if packed.len() < bytes.len() { (1, packed) } else { (0, bytes.clone()) }
            }
            _ => (0, Vec::new()),
        };
        let stored =
            u32::try_from(body.len()).map_err(|_| Error::corrupt("a record over 4 GiB"))?;
        let mut head = vec![kind, codec, 0, 0];
        head.extend(stored.to_le_bytes());
        head.extend(first.to_le_bytes());
        head.extend(run.to_le_bytes());
        let sum = checksum(&[&head, &body]);
        head.extend(sum.to_le_bytes());
        sink.write_all(&head)
            .and_then(|()| sink.write_all(&body))
            .context(|| "cannot write the carry".to_owned())
    }
}

fn decode(body: &[u8], len: usize) -> std::result::Result<Vec<u8>, String> {
    let decoded = zstd::bulk::decompress(body, len).map_err(|error| error.to_string())?;
    if decoded.len() == len { Ok(decoded) } else { Err(format!("{} bytes decoded", decoded.len())) }
}

fn read_exact(source: &mut dyn Read, buf: &mut [u8], what: &str) -> Result<()> {
    source.read_exact(buf).map_err(|error| match error.kind() {
        IoErrorKind::UnexpectedEof => Error::corrupt(format!("the carry ends within {what}")),
        _ => Error::io(format!("cannot read {what}"), error),
    })
}

fn number32(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn number64(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}
