//! The beginning of a migration stream, up to the end of the list of RAM blocks.
//!
//! ```text
//! u32 0x5145564d ("QEVM"), u32 version 3; big-endian all of it, but for bitmaps
//! 0x07 configuration: u32 length, machine; then subsections 0x05: u8 length, name, u32 version, and
//!      capabilities: u32 count, each u8 length, name │ target-page-bits: u32 │ uuid: 16 bytes
//! 0x01 section: u32 id, u8 length "ram", u32 instance, u32 version 4
//!      u64 total │ 4, then for each block: u8 length, name, u64 bytes in use,
//!      with x-ignore-shared: u64 address
//!      with mapped-ram: u32 version 1, u64 page size, u64 bitmap offset, u64 pages offset;
//!        the next block begins behind its pages
//! ```
//!
//! What follows, QEMU's devices, stays closed.

use crate::data::RandomRead;
use crate::error::{Error, ErrorKind, Result};
use crate::fields::Fields;

/// "QEVM".
pub const MAGIC: u32 = 0x5145_564d;

const VERSION: u32 = 3;
const SECTION_START: u8 = 0x01;
const SUBSECTION: u8 = 0x05;
const CONFIGURATION: u8 = 0x07;
const RAM_VERSION: u32 = 4;
const FLAG_MEM_SIZE: u64 = 0x04;
const FLAGS: u64 = 0xfff;

/// Bytes read at once for the parts that have no length: far more than they need.
const HEAD_BYTES: usize = 64 << 10;

/// RAM blocks of one guest, a few dozen at most.
const BLOCKS_MAX: usize = 4096;

/// Capabilities that a stream lists, and bytes of a machine's name.
const CAPABILITIES_MAX: u32 = 256;

/// A RAM block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name of it.
    pub name: String,

    /// Bytes in use.
    pub bytes: u64,

    /// Its guest-physical address, where the stream has it.
    pub address: Option<u64>,

    /// Where its pages are in a mapped-ram file.
    pub mapped: Option<MappedBlock>,
}

/// Where the pages of a RAM block are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedBlock {
    /// Bytes of a page.
    pub page_bytes: u64,

    /// The first byte of the bitmap: words of 64 bits of the host, bit 0 first.
    pub bitmap_offset: u64,

    /// The first byte of page 0.
    pub pages_offset: u64,
}

/// The beginning of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The machine's name and version.
    pub machine: String,

    /// The capabilities that the stream was written with.
    pub capabilities: Vec<String>,

    /// The RAM blocks, in order.
    pub blocks: Vec<RamBlock>,
}

impl Stream {
    /// Whether a capability was on.
    pub fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|name| name == capability)
    }

    /// Reads the beginning of a stream.
    pub fn read(source: &dyn RandomRead) -> Result<Stream> {
        let head = window(source, 0)?;
        let mut fields = Fields::new(&head, "QEMU stream");
        let magic = fields.u32_be("magic")?;
        if magic != MAGIC {
            return Err(Error::corrupt(format!(
                "QEMU stream at byte 0: magic {magic:#010x}; expected {MAGIC:#010x}"
            )));
        }
        let version = fields.u32_be("version")?;
        if version != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("QEMU stream at byte 4: version {version}; expected {VERSION}"),
            ));
        }
        let mut stream =
            Stream { machine: String::new(), capabilities: Vec::new(), blocks: Vec::new() };
        let mut kind = fields.u8("section")?;
        if kind == CONFIGURATION {
            stream.configuration(&mut fields)?;
            kind = fields.u8("section")?;
        }
        let at = fields.clone();
        let name = if kind == SECTION_START {
            fields.u32_be("section id")?;
            fields.short_string("section name")?
        } else {
            ""
        };
        if name != "ram" {
            return Err(Error::new(
                ErrorKind::Unsupported,
                at.corrupt(format_args!("section {kind:#04x} {name:?}; expected the RAM's"))
                    .to_string(),
            ));
        }
        fields.u32_be("instance")?;
        let version = fields.u32_be("version of the RAM section")?;
        if version != RAM_VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                at.corrupt(format_args!("RAM version {version}; expected {RAM_VERSION}"))
                    .to_string(),
            ));
        }
        let at = fields.clone();
        let total = fields.u64_be("total of RAM")?;
        if total & FLAGS != FLAG_MEM_SIZE {
            return Err(at.corrupt(format_args!("flags {:#x}; expected 0x4", total & FLAGS)));
        }
        stream.blocks(source, fields.position(), total & !FLAGS)?;
        Ok(stream)
    }

    fn configuration(&mut self, fields: &mut Fields<'_>) -> Result<()> {
        let at = fields.clone();
        let len =
            usize::try_from(fields.u32_be("length of the machine's name")?).unwrap_or(usize::MAX);
        let name = fields.take(len, "machine's name")?;
        self.machine = std::str::from_utf8(name)
            .map_err(|_| at.corrupt("the machine's name is not UTF-8"))?
            .to_owned();
        while fields.rest().first() == Some(&SUBSECTION) {
            fields.u8("subsection")?;
            let at = fields.clone();
            let name = fields.short_string("subsection's name")?;
            fields.u32_be("subsection's version")?;
            match name {
                "configuration/capabilities" => {
                    let count = fields.u32_be("count of capabilities")?;
                    if count > CAPABILITIES_MAX {
                        return Err(at.corrupt(format_args!(
                            "{count} capabilities; at most {CAPABILITIES_MAX}"
                        )));
                    }
                    for _ in 0..count {
                        self.capabilities.push(fields.short_string("capability")?.to_owned());
                    }
                }
                "configuration/target-page-bits" => {
                    fields.u32_be("page bits")?;
                }
                "configuration/uuid" => {
                    fields.take(16, "UUID")?;
                }
                other => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        at.corrupt(format_args!("subsection {other:?} is not known")).to_string(),
                    ));
                }
            }
        }
        Ok(())
    }

    fn blocks(&mut self, source: &dyn RandomRead, from: u64, total: u64) -> Result<()> {
        let (shared, mapped) = (self.has("x-ignore-shared"), self.has("mapped-ram"));
        let mut at = from;
        let mut left = total;
        while left > 0 {
            if self.blocks.len() == BLOCKS_MAX {
                return Err(Error::corrupt(format!("more than {BLOCKS_MAX} RAM blocks")));
            }
            let head = window(source, at)?;
            let mut fields = Fields::at_origin(&head, "QEMU stream", at);
            let begin = fields.clone();
            let name = fields.short_string("RAM block's name")?.to_owned();
            let bytes = fields.u64_be("RAM block's length")?;
            let Some(rest) = left.checked_sub(bytes).filter(|_| bytes > 0) else {
                return Err(begin.corrupt(format_args!(
                    "RAM block {name:?} has {bytes} bytes; {left} are left of {total}"
                )));
            };
            left = rest;
            let address = if shared { Some(fields.u64_be("RAM block's address")?) } else { None };
            let placed = if mapped { Some(mapped_block(&mut fields, bytes)?) } else { None };
            at = match placed {
                // The sum was checked.
                Some(placed) => placed.pages_offset.saturating_add(bytes),
                None => fields.position(),
            };
            self.blocks.push(RamBlock { name, bytes, address, mapped: placed });
        }
        Ok(())
    }
}

fn mapped_block(fields: &mut Fields<'_>, bytes: u64) -> Result<MappedBlock> {
    let at = fields.clone();
    let version = fields.u32_be("version of mapped-ram")?;
    if version != 1 {
        return Err(Error::new(
            ErrorKind::Unsupported,
            at.corrupt(format_args!("mapped-ram version {version}; expected 1")).to_string(),
        ));
    }
    let page_bytes = fields.u64_be("page size")?;
    let bitmap_offset = fields.u64_be("bitmap offset")?;
    let pages_offset = fields.u64_be("pages offset")?;
    let bad = |why: String| Err(at.corrupt(why));
    if page_bytes < 4096 || !page_bytes.is_power_of_two() || !bytes.is_multiple_of(page_bytes) {
        return bad(format!("pages of {page_bytes} bytes in a block of {bytes}"));
    }
    let bitmap_end = bitmap_offset.checked_add(bitmap_bytes(bytes, page_bytes));
    let pages_end = pages_offset.checked_add(bytes);
    if bitmap_offset < fields.position()
        || bitmap_end.is_none_or(|end| end > pages_offset)
        || pages_end.is_none_or(|end| end > 1 << 62)
        || !pages_offset.is_multiple_of(4096)
    {
        return bad(format!(
            "bitmap at {bitmap_offset} and pages at {pages_offset}; expected the header, the bitmap \
             and whole pages one behind the other"
        ));
    }
    Ok(MappedBlock { page_bytes, bitmap_offset, pages_offset })
}

/// Bytes of a bitmap: whole words of 64 bits.
pub fn bitmap_bytes(bytes: u64, page_bytes: u64) -> u64 {
    (bytes / page_bytes).div_ceil(64) * 8
}

fn window(source: &dyn RandomRead, at: u64) -> Result<Vec<u8>> {
    let there = source.size_bytes().saturating_sub(at).min(HEAD_BYTES as u64);
    let mut bytes = vec![0; usize::try_from(there).unwrap_or(HEAD_BYTES)];
    source.read_at(&mut bytes, at)?;
    Ok(bytes)
}

impl RandomRead for Vec<u8> {
    fn size_bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|from| self.get(from..from.checked_add(buf.len())?))
            .ok_or_else(|| {
                Error::corrupt(format!("{} bytes at {offset} are past the end", buf.len()))
            })?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }
}
