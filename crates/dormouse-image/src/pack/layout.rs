//! The fixed structures of a pack: header, record header, footer.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::dropped::DROPPED_BYTES_MAX;
use super::frame::{FRAME_BYTES, FRAME_PAYLOAD_BYTES_MAX};
use super::id::PackId;
use super::segment::SEGMENT_BYTES_MAX;
use crate::codec::Encoding;
use crate::digest::{KeyId, checksum};
use crate::error::{Error, ErrorKind, Result};
use crate::map::NODE_BYTES_MAX;

pub(super) const HEADER_MAGIC: [u8; 8] = *b"\x89DMpack\n";
pub(super) const FOOTER_MAGIC: [u8; 8] = *b"\x89DMpend\n";
pub(super) const RECORD_MAGIC: [u8; 4] = *b"DMr\x1a";
pub(super) const VERSION: u16 = 1;

/// Keyed BLAKE3, first 16 bytes; the one digest algorithm of this version.
pub(super) const DIGEST_BLAKE3_128: u16 = 1;

/// Blocks are stored in clear; the one cipher of this version.
pub(super) const CIPHER_NONE: u16 = 0;

/// Bytes of a pack's header.
pub const HEADER_BYTES: usize = 72;

/// Bytes of a pack's footer.
pub const FOOTER_BYTES: usize = 64;

/// Bytes before a record's payload.
pub const RECORD_HEADER_BYTES: usize = 32;

/// [`RECORD_HEADER_BYTES`] for the 32-bit lengths of records.
pub(super) const RECORD_HEADER_U32: u32 = 32;

const _: () = assert!(RECORD_HEADER_U32 as usize == RECORD_HEADER_BYTES);

/// The longest table of contents: 2³² slots in 2²² segments and 2²¹ nodes, at 32 bytes, fit.
pub(super) const TOC_BYTES_MAX: u32 = 256 << 20;

/// Nodes in a pack: leaves for 64 TiB of images in one commit.
pub(super) const NODES_MAX: u32 = 1 << 21;

/// What a pack says about itself before its first record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackParams {
    /// How blocks are digested: 1 is keyed BLAKE3 cut to 16 bytes.
    pub digest_algorithm: u16,

    /// How payloads are enciphered: 0 is not at all.
    pub cipher: u16,

    /// The key of the digests.
    pub key_id: KeyId,

    /// The key of the cipher; zeros without one.
    pub cipher_key_id: KeyId,

    /// A random number that every record of this file repeats.
    pub salt: u32,
}

impl PackParams {
    /// The parameters of a new pack in clear.
    pub fn new(key_id: KeyId, salt: u32) -> PackParams {
        PackParams {
            digest_algorithm: DIGEST_BLAKE3_128,
            cipher: CIPHER_NONE,
            key_id,
            cipher_key_id: KeyId::default(),
            salt,
        }
    }

    /// Fails unless blocks of this pack can be checked with the key named `key_id`.
    pub fn check_key(&self, key_id: KeyId) -> Result<()> {
        if self.key_id == key_id {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::WrongKey, "pack", key_id, self.key_id))
        }
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    magic: [u8; 8],
    version: U16,
    header_bytes: U16,
    digest_algorithm: U16,
    cipher: U16,
    key_id: KeyId,
    cipher_key_id: KeyId,
    salt: U32,
    flags: U32,
    reserved: U64,
    checksum: U64,
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

impl Header {
    pub(super) fn new(params: &PackParams) -> Header {
        let mut header = Header {
            magic: HEADER_MAGIC,
            version: VERSION.into(),
            header_bytes: U16::new(72),
            digest_algorithm: params.digest_algorithm.into(),
            cipher: params.cipher.into(),
            key_id: params.key_id,
            cipher_key_id: params.cipher_key_id,
            salt: params.salt.into(),
            flags: U32::ZERO,
            reserved: U64::ZERO,
            checksum: U64::ZERO,
        };
        header.checksum = header.sum().into();
        header
    }

    fn sum(&self) -> u64 {
        checksum(&[&self.as_bytes()[..HEADER_BYTES - 8]])
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<PackParams> {
        let header = Header::ref_from_bytes(bytes)
            .map_err(|_| Error::corrupt("pack header length", bytes.len(), HEADER_BYTES))?;
        if header.magic != HEADER_MAGIC {
            return Err(Error::corrupt(
                "pack header magic",
                hex(&header.magic),
                hex(&HEADER_MAGIC),
            ));
        }
        if header.version.get() != VERSION {
            return Err(Error::unsupported("pack version", header.version, VERSION));
        }
        if header.checksum.get() != header.sum() {
            return Err(Error::corrupt("pack header checksum", header.sum(), header.checksum));
        }
        if header.digest_algorithm.get() != DIGEST_BLAKE3_128 {
            return Err(Error::unsupported("digest algorithm", header.digest_algorithm, 1));
        }
        if header.cipher.get() != CIPHER_NONE {
            return Err(Error::unsupported("cipher", header.cipher, 0));
        }
        if header.flags.get() != 0 || header.reserved.get() != 0 || header.header_bytes.get() != 72
        {
            return Err(Error::unsupported("pack flags", header.flags, 0));
        }
        Ok(PackParams {
            digest_algorithm: header.digest_algorithm.get(),
            cipher: header.cipher.get(),
            key_id: header.key_id,
            cipher_key_id: header.cipher_key_id,
            salt: header.salt.get(),
        })
    }
}

/// Set in a record's encoding byte when a frame's payload begins with its list of slots.
const SLOT_LIST: u8 = 0x80;

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum RecordKind {
    /// Blocks; `index` is the first slot, `count` how many.
    Frame = 1,

    /// Digests and frame places of a segment; `index` is its number, `count` its slots.
    Segment = 2,

    /// A map node; `index` is its number.
    Node = 3,

    /// The table of contents.
    Toc = 4,

    /// What was dropped as a whole when the pack was written again.
    Dropped = 5,
}

impl RecordKind {
    /// The longest payload and the most bytes that it decodes to.
    fn limits(self) -> (usize, usize) {
        match self {
            RecordKind::Frame => (FRAME_PAYLOAD_BYTES_MAX, FRAME_BYTES),
            RecordKind::Segment => (SEGMENT_BYTES_MAX, SEGMENT_BYTES_MAX),
            RecordKind::Node => (NODE_BYTES_MAX, NODE_BYTES_MAX),
            RecordKind::Toc => (TOC_BYTES_MAX as usize, TOC_BYTES_MAX as usize),
            RecordKind::Dropped => (DROPPED_BYTES_MAX, DROPPED_BYTES_MAX),
        }
    }
}

#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecordHeader {
    magic: [u8; 4],
    kind: u8,
    encoding: u8,
    count: U16,
    index: U32,
    stored_bytes: U32,
    raw_bytes: U32,
    salt: U32,
    checksum: U64,
}

const _: () = assert!(size_of::<RawRecordHeader>() == RECORD_HEADER_BYTES);

/// A record's header, checked but for its checksum.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecordHeader {
    pub(super) kind: RecordKind,
    pub(super) encoding: Encoding,
    /// Whether the payload begins with `count` slots, as 16-bit numbers within the segment.
    pub(super) slot_list: bool,
    pub(super) count: u16,
    pub(super) index: u32,
    pub(super) stored_bytes: u32,
    pub(super) raw_bytes: u32,
}

impl RecordHeader {
    /// The header's bytes; the checksum covers them and `payload`.
    pub(super) fn encode(&self, salt: u32, payload: &[&[u8]]) -> [u8; RECORD_HEADER_BYTES] {
        let mut raw = RawRecordHeader {
            magic: RECORD_MAGIC,
            kind: self.kind as u8,
            encoding: self.encoding as u8 | if self.slot_list { SLOT_LIST } else { 0 },
            count: self.count.into(),
            index: self.index.into(),
            stored_bytes: self.stored_bytes.into(),
            raw_bytes: self.raw_bytes.into(),
            salt: salt.into(),
            checksum: U64::ZERO,
        };
        raw.checksum = record_checksum(&raw, payload).into();
        let mut bytes = [0; RECORD_HEADER_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// Reads a header; how long its payload is, is known to be within limits.
    pub(super) fn parse(bytes: &[u8], salt: u32) -> Result<RecordHeader> {
        let raw = RawRecordHeader::ref_from_bytes(bytes).map_err(|_| {
            Error::corrupt("record header length", bytes.len(), RECORD_HEADER_BYTES)
        })?;
        if raw.magic != RECORD_MAGIC || raw.salt.get() != salt {
            return Err(Error::corrupt("record header magic", hex(&raw.magic), hex(&RECORD_MAGIC)));
        }
        let kind = match raw.kind {
            1 => RecordKind::Frame,
            2 => RecordKind::Segment,
            3 => RecordKind::Node,
            4 => RecordKind::Toc,
            5 => RecordKind::Dropped,
            kind => return Err(Error::unsupported("record kind", kind, "1 to 5")),
        };
        let (stored_max, raw_max) = kind.limits();
        for (bytes, limit) in [(raw.stored_bytes, stored_max), (raw.raw_bytes, raw_max)] {
            if bytes.get() as usize > limit {
                return Err(Error::corrupt("record length", bytes, limit));
            }
        }
        let header = RecordHeader {
            kind,
            encoding: Encoding::from_byte(raw.encoding & !SLOT_LIST)?,
            slot_list: raw.encoding & SLOT_LIST != 0,
            count: raw.count.get(),
            index: raw.index.get(),
            stored_bytes: raw.stored_bytes.get(),
            raw_bytes: raw.raw_bytes.get(),
        };
        if header.uses_only_its_fields() {
            Ok(header)
        } else {
            Err(Error::corrupt("record header", hex(bytes), "zeros where its kind has no meaning"))
        }
    }

    /// Whether fields that say nothing for this kind of record are as they are written.
    fn uses_only_its_fields(&self) -> bool {
        let plain = self.encoding == Encoding::Raw && self.raw_bytes == self.stored_bytes;
        match self.kind {
            RecordKind::Frame => true,
            RecordKind::Segment => plain && !self.slot_list,
            RecordKind::Node => !self.slot_list && self.count == 0,
            RecordKind::Toc | RecordKind::Dropped => {
                plain && !self.slot_list && self.count == 0 && self.index == 0
            }
        }
    }

    /// Header and payload of a record of the given kind, with the checksum checked.
    pub(super) fn open(
        record: &[u8],
        salt: u32,
        kind: RecordKind,
    ) -> Result<(RecordHeader, &[u8])> {
        let Some((head, payload)) = record.split_at_checked(RECORD_HEADER_BYTES) else {
            return Err(Error::corrupt("record length", record.len(), RECORD_HEADER_BYTES));
        };
        let header = RecordHeader::parse(head, salt)?;
        if header.kind != kind {
            return Err(Error::corrupt("record kind", header.kind as u8, kind as u8));
        }
        if header.stored_bytes as usize != payload.len() {
            return Err(Error::corrupt("record length", payload.len(), header.stored_bytes));
        }
        let raw = RawRecordHeader::ref_from_bytes(head)
            .map_err(|_| Error::corrupt("record header length", head.len(), RECORD_HEADER_BYTES))?;
        let sum = record_checksum(raw, &[payload]);
        if raw.checksum.get() != sum {
            return Err(Error::corrupt("record checksum", sum, raw.checksum));
        }
        Ok((header, payload))
    }
}

fn record_checksum(raw: &RawRecordHeader, payload: &[&[u8]]) -> u64 {
    let head = &raw.as_bytes()[..RECORD_HEADER_BYTES - 8];
    match payload {
        [one] => checksum(&[head, one]),
        [one, two] => checksum(&[head, one, two]),
        _ => checksum(&[head, &payload.concat()]),
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFooter {
    magic: [u8; 8],
    version: U16,
    reserved: U16,
    salt: U32,
    toc_offset: U64,
    toc_bytes: U64,
    region_bytes: U64,
    pack: PackId,
    checksum: U64,
}

const _: () = assert!(size_of::<RawFooter>() == FOOTER_BYTES);

/// The last bytes of a pack: where its table of contents is, and what the pack is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Footer {
    pub(super) salt: u32,
    pub(super) toc_offset: u64,
    pub(super) toc_bytes: u64,
    pub(super) region_bytes: u64,
    pub(super) pack: PackId,
}

impl Footer {
    pub(super) fn encode(&self) -> [u8; FOOTER_BYTES] {
        let mut raw = RawFooter {
            magic: FOOTER_MAGIC,
            version: VERSION.into(),
            reserved: U16::ZERO,
            salt: self.salt.into(),
            toc_offset: self.toc_offset.into(),
            toc_bytes: self.toc_bytes.into(),
            region_bytes: self.region_bytes.into(),
            pack: self.pack,
            checksum: U64::ZERO,
        };
        raw.checksum = checksum(&[&raw.as_bytes()[..FOOTER_BYTES - 8]]).into();
        let mut bytes = [0; FOOTER_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// What a sound footer says that its pack is called, and how long it is.
    pub(super) fn name_and_length(bytes: &[u8]) -> Option<(PackId, u64)> {
        let raw = RawFooter::ref_from_bytes(bytes).ok().filter(|raw| raw.magic == FOOTER_MAGIC)?;
        let footer = Footer::parse(bytes, raw.region_bytes.get()).ok()?;
        Some((footer.pack, footer.region_bytes))
    }

    /// Reads the footer of a region of `region_bytes` bytes.
    pub(super) fn parse(bytes: &[u8], region_bytes: u64) -> Result<Footer> {
        let raw = RawFooter::ref_from_bytes(bytes)
            .map_err(|_| Error::corrupt("pack footer length", bytes.len(), FOOTER_BYTES))?;
        if raw.magic != FOOTER_MAGIC {
            return Err(Error::corrupt("pack footer magic", hex(&raw.magic), hex(&FOOTER_MAGIC)));
        }
        if raw.version.get() != VERSION || raw.reserved.get() != 0 {
            return Err(Error::unsupported("pack version", raw.version, VERSION));
        }
        let sum = checksum(&[&raw.as_bytes()[..FOOTER_BYTES - 8]]);
        if raw.checksum.get() != sum {
            return Err(Error::corrupt("pack footer checksum", sum, raw.checksum));
        }
        if raw.region_bytes.get() != region_bytes {
            return Err(Error::corrupt("pack length", region_bytes, raw.region_bytes));
        }
        let (start, len) = (raw.toc_offset.get(), raw.toc_bytes.get());
        let end = region_bytes - (FOOTER_BYTES as u64).min(region_bytes);
        let limit = u64::from(TOC_BYTES_MAX) + RECORD_HEADER_BYTES as u64;
        if start.checked_add(len) != Some(end) || start < HEADER_BYTES as u64 || len > limit {
            return Err(Error::corrupt(
                "pack footer",
                format_args!("a table of contents of {len} bytes at {start}"),
                format_args!("one that ends at {end}"),
            ));
        }
        Ok(Footer {
            salt: raw.salt.get(),
            toc_offset: start,
            toc_bytes: len,
            region_bytes,
            pack: raw.pack,
        })
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SALT: u32 = 7;

    const KINDS: [RecordKind; 5] = [
        RecordKind::Frame,
        RecordKind::Segment,
        RecordKind::Node,
        RecordKind::Toc,
        RecordKind::Dropped,
    ];

    fn header(kind: RecordKind) -> RecordHeader {
        RecordHeader {
            kind,
            encoding: Encoding::Raw,
            slot_list: false,
            count: 0,
            index: 0,
            stored_bytes: 100,
            raw_bytes: 100,
        }
    }

    #[test]
    fn headers_round_trip() {
        let params = PackParams::new(KeyId([3; 16]), 99);
        assert_eq!(Header::parse(Header::new(&params).as_bytes()).unwrap(), params);
        for kind in KINDS {
            let bytes = header(kind).encode(SALT, &[&[5; 100]]);
            let record = [&bytes[..], &[5; 100]].concat();
            let (read, payload) = RecordHeader::open(&record, SALT, kind).unwrap();
            assert_eq!((read.kind, payload), (kind, &[5; 100][..]));
            RecordHeader::open(&record, SALT + 1, kind).unwrap_err();
            RecordHeader::open(&record[..131], SALT, kind).unwrap_err();
            RecordHeader::parse(&bytes[..31], SALT).unwrap_err();
        }
    }

    /// Bits that mean nothing were ignored; a later version could not have given them a meaning.
    #[test]
    fn fields_without_meaning_are_zero() {
        type Change = fn(&mut RecordHeader);
        let cases: [(RecordKind, Change); 10] = [
            (RecordKind::Segment, |header| header.encoding = Encoding::Lz4),
            (RecordKind::Segment, |header| header.raw_bytes = 101),
            (RecordKind::Segment, |header| header.slot_list = true),
            (RecordKind::Node, |header| header.slot_list = true),
            (RecordKind::Node, |header| header.count = 1),
            (RecordKind::Toc, |header| header.encoding = Encoding::Zstd),
            (RecordKind::Toc, |header| header.count = 1),
            (RecordKind::Toc, |header| header.index = 1),
            (RecordKind::Dropped, |header| header.encoding = Encoding::Zstd),
            (RecordKind::Dropped, |header| header.index = 1),
        ];
        for (kind, change) in cases {
            let mut changed = header(kind);
            change(&mut changed);
            RecordHeader::parse(&changed.encode(SALT, &[]), SALT).unwrap_err();
        }
    }

    /// Every kind of record could be 256 MiB long, and a search for records read that much.
    #[test]
    fn lengths_are_bounded_by_kind() {
        for kind in KINDS {
            let (stored, raw) = kind.limits();
            for (stored_bytes, raw_bytes) in [(stored + 1, raw), (stored, raw + 1)] {
                let long = RecordHeader {
                    stored_bytes: u32::try_from(stored_bytes).unwrap(),
                    raw_bytes: u32::try_from(raw_bytes).unwrap(),
                    ..header(kind)
                };
                RecordHeader::parse(&long.encode(SALT, &[]), SALT).unwrap_err();
            }
        }
    }

    #[test]
    fn footers_round_trip() {
        let footer = Footer {
            salt: 1,
            toc_offset: 100,
            toc_bytes: 50,
            region_bytes: 214,
            pack: PackId([2; 16]),
        };
        let bytes = footer.encode();
        assert_eq!(Footer::parse(&bytes, 214).unwrap(), footer);
        Footer::parse(&bytes, 215).unwrap_err();
        for lie in [
            Footer { toc_offset: 71, toc_bytes: 79, ..footer },
            Footer { toc_offset: 101, ..footer },
            Footer { toc_bytes: u64::MAX, ..footer },
        ] {
            Footer::parse(&lie.encode(), 214).unwrap_err();
        }
    }
}
