//! Bundles: several packs in one file, so that thousands of small commits do not stay thousands of
//! files.
//!
//! ```text
//! pack │ pack │ … │ directory: n × (pack id 16 bytes, offset u64, bytes u64) │ footer
//! ```

use std::io::Write;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::id::PackId;
use super::layout::{FOOTER_BYTES, Footer, hex};
use super::reader::ReadAt;
use crate::digest::checksum;
use crate::error::{Error, Result};

const MAGIC: [u8; 8] = *b"\x89DMbndl\n";
const VERSION: u16 = 1;

/// Packs in a bundle; a directory of 32 MiB is read at once.
const PACKS_MAX: u32 = 1 << 20;

/// Where a pack lies in a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BundleEntry {
    /// The pack.
    pub pack: PackId,

    /// Its first byte.
    pub offset: u64,

    /// Its length.
    pub bytes: u64,
}

/// The directory of a bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// The packs in the order in which they lie.
    pub entries: Vec<BundleEntry>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    pack: PackId,
    offset: U64,
    bytes: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFooter {
    magic: [u8; 8],
    version: U16,
    reserved: U16,
    packs: U32,
    directory_offset: U64,
    directory_checksum: U64,
    file_bytes: U64,
    unused: [u8; 16],
    checksum: U64,
}

const _: () = assert!(size_of::<RawEntry>() == 32 && size_of::<RawFooter>() == FOOTER_BYTES);

impl Bundle {
    /// Where packs seem to lie in a file whose directory or footer is lost, by what looks like the
    /// footers of packs. Places that cannot be read are stepped over. A guest's disk may hold packs,
    /// too, so these may overlap and lie; only a pack that opens under its name is one.
    pub fn search(file: &dyn ReadAt, file_bytes: u64) -> Vec<BundleEntry> {
        const STEP: u64 = 64 << 10;
        let mut entries: Vec<BundleEntry> = Vec::new();
        let mut at = 0;
        while at < file_bytes {
            // A footer that begins in this step may end in the next.
            let window = (file_bytes - at).min(STEP + FOOTER_BYTES as u64 - 1);
            let mut bytes = vec![0; usize::try_from(window).expect("little over STEP")];
            if file.read_exact_at(&mut bytes, at).is_ok() {
                for (offset, footer) in (at..).zip(bytes.windows(FOOTER_BYTES)) {
                    let end = offset + FOOTER_BYTES as u64;
                    if let Some((pack, bytes)) = Footer::name_and_length(footer)
                        && let Some(start) = end.checked_sub(bytes)
                    {
                        entries.push(BundleEntry { pack, offset: start, bytes });
                    }
                }
            }
            at += STEP;
        }
        entries
    }

    /// Reads the directory of a file of `file_bytes` bytes.
    pub fn open(file: &dyn ReadAt, file_bytes: u64) -> Result<Bundle> {
        let footer_at = file_bytes
            .checked_sub(FOOTER_BYTES as u64)
            .ok_or_else(|| Error::corrupt("bundle length", file_bytes, "a footer"))?;
        let mut bytes = [0; FOOTER_BYTES];
        file.read_exact_at(&mut bytes, footer_at)
            .map_err(|error| Error::io("bundle", error).at(footer_at))?;
        let raw = RawFooter::ref_from_bytes(&bytes)
            .map_err(|_| Error::corrupt("bundle footer length", bytes.len(), FOOTER_BYTES))?;
        if raw.magic != MAGIC {
            return Err(Error::corrupt("bundle magic", hex(&raw.magic), hex(&MAGIC)));
        }
        if raw.version.get() != VERSION || raw.reserved.get() != 0 || raw.unused != [0; 16] {
            return Err(Error::unsupported("bundle version", raw.version, VERSION));
        }
        let sum = checksum(&[&bytes[..FOOTER_BYTES - 8]]);
        if raw.checksum.get() != sum {
            return Err(Error::corrupt("bundle checksum", sum, raw.checksum).at(footer_at));
        }
        let packs = raw.packs.get();
        let offset = raw.directory_offset.get();
        let directory_bytes = u64::from(packs) * 32;
        let ends = offset.checked_add(directory_bytes) == Some(footer_at);
        if raw.file_bytes.get() != file_bytes || packs > PACKS_MAX || !ends {
            return Err(Error::corrupt(
                "bundle footer",
                format_args!("{packs} packs, a directory at {offset}"),
                format_args!("a directory that ends at {footer_at}"),
            ));
        }
        let mut directory = vec![0; usize::try_from(directory_bytes).expect("under PACKS_MAX")];
        file.read_exact_at(&mut directory, offset)
            .map_err(|error| Error::io("bundle", error).at(offset))?;
        let sum = checksum(&[&directory]);
        if raw.directory_checksum.get() != sum {
            return Err(Error::corrupt("bundle directory checksum", sum, raw.directory_checksum));
        }
        let rows = <[RawEntry]>::ref_from_bytes(&directory)
            .map_err(|_| Error::corrupt("bundle directory", directory.len(), "whole entries"))?;
        let mut entries = Vec::with_capacity(rows.len());
        let mut end = 0;
        for row in rows {
            let entry =
                BundleEntry { pack: row.pack, offset: row.offset.get(), bytes: row.bytes.get() };
            let next = entry.offset.checked_add(entry.bytes).filter(|&next| next <= offset);
            let (true, Some(next)) = (entry.offset >= end, next) else {
                return Err(Error::corrupt(
                    "bundle directory",
                    format_args!("{} bytes at {}", entry.bytes, entry.offset),
                    format_args!("packs in order before {offset}"),
                ));
            };
            end = next;
            entries.push(entry);
        }
        Ok(Bundle { entries })
    }
}

/// Writes directory and footer behind the packs of `entries`, the last of which ends at `offset`.
pub fn write_bundle_end<W: Write>(
    sink: &mut W,
    entries: &[BundleEntry],
    offset: u64,
) -> Result<()> {
    let packs = u32::try_from(entries.len())
        .ok()
        .filter(|&packs| packs <= PACKS_MAX)
        .ok_or_else(|| Error::unsupported("bundle", entries.len(), PACKS_MAX))?;
    let rows: Vec<RawEntry> = entries
        .iter()
        .map(|entry| RawEntry {
            pack: entry.pack,
            offset: entry.offset.into(),
            bytes: entry.bytes.into(),
        })
        .collect();
    let directory = rows.as_bytes();
    let file_bytes = offset + directory.len() as u64 + FOOTER_BYTES as u64;
    let mut footer = RawFooter {
        magic: MAGIC,
        version: VERSION.into(),
        reserved: U16::ZERO,
        packs: packs.into(),
        directory_offset: offset.into(),
        directory_checksum: checksum(&[directory]).into(),
        file_bytes: file_bytes.into(),
        unused: [0; 16],
        checksum: U64::ZERO,
    };
    footer.checksum = checksum(&[&footer.as_bytes()[..FOOTER_BYTES - 8]]).into();
    sink.write_all(directory)
        .and_then(|()| sink.write_all(footer.as_bytes()))
        .map_err(|error| Error::io("bundle", error))
}
