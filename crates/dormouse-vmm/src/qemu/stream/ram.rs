//! The records of a stream's RAM: an address with flags in its low 12 bits, and what these say.
//!
//! ```text
//! 004  total; then a block each: u8 length, name, u64 bytes[, u64 address]
//! 002  offset; the block unless 020; u8 what the page is full of
//! 008  offset; the block unless 020; 4096 bytes
//! 010  the end of the section
//! 020  with the others: the block of the record before
//! ```

use super::input::Input;
use super::{Pages, Summary, invalid, unsupported};
use crate::error::{Error, ErrorKind, Result};
use crate::vmm::{PAGE_BYTES, PageSink, PagesPassed};

/// A page that is full of one byte.
const ZERO: u64 = 0x02;
/// The sizes of all blocks.
const SIZES: u64 = 0x04;
/// A page.
const PAGE: u64 = 0x08;
/// The end of the section.
const END: u64 = 0x10;
/// The block is that of the record before.
const SAME_BLOCK: u64 = 0x20;
const XBZRLE: u64 = 0x40;
const HOOK: u64 = 0x80;
const COMPRESSED: u64 = 0x100;
const MULTIFD: u64 = 0x200;
const FLAGS: u64 = 0xfff;

/// Bytes of memory: a bit for each of its pages is 128 MiB.
const MEMORY_BYTES_MAX: u64 = 4 << 40;

/// Blocks of RAM. A machine has some tens: memory, firmware, one for each device with a ROM.
const BLOCKS_MAX: usize = 4096;

/// A block of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// QEMU's name of it.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
}

/// RAM as it passes.
pub(super) struct Ram<'a> {
    /// The name of the block that is the memory.
    wanted: String,
    has_addresses: bool,
    pages: Pages<'a>,
    blocks: Vec<Block>,
    memory: Option<usize>,
    /// The block of the last record.
    current: Option<usize>,
    passed: PagesPassed,
    seen: Vec<u64>,
}

impl<'a> Ram<'a> {
    pub(super) fn new(wanted: &str, has_addresses: bool, pages: Pages<'a>) -> Ram<'a> {
        let (blocks, seen, passed) = (Vec::new(), Vec::new(), PagesPassed::default());
        let wanted = wanted.to_owned();
        Ram { wanted, has_addresses, pages, blocks, memory: None, current: None, passed, seen }
    }

    /// Records up to the end of a section.
    pub(super) fn section(&mut self, input: &mut Input<'_>) -> Result<()> {
        loop {
            let at = input.position();
            let header = input.take_u64()?;
            let (offset, flags) = (header & !FLAGS, header & FLAGS);
            match flags & !SAME_BLOCK {
                END => return input.put(&header.to_be_bytes()),
                SIZES => {
                    input.put(&header.to_be_bytes())?;
                    self.sizes(input, at, offset)?;
                }
                PAGE | ZERO => self.page(input, at, offset, flags)?,
                _ => return Err(refusal(at, flags)),
            }
        }
    }

    fn sizes(&mut self, input: &mut Input<'_>, at: u64, total: u64) -> Result<()> {
        if !self.blocks.is_empty() {
            return Err(invalid(at, "a second table of blocks"));
        }
        let mut left = total;
        while left > 0 {
            let name = input.pass_name()?;
            let bytes = input.pass_u64()?;
            if self.has_addresses {
                input.pass_u64()?;
            }
            if bytes == 0 || bytes > left || self.blocks.len() == BLOCKS_MAX {
                let what = format!("block {name:?} of {bytes} bytes, where {left} are left");
                return Err(invalid(at, &what));
            }
            left -= bytes;
            self.blocks.push(Block { name, bytes });
        }
        let is_memory = |block: &Block| {
            block.name == self.wanted
                || block.name.strip_prefix("/objects/") == Some(self.wanted.as_str())
        };
        let Some(memory) = self.blocks.iter().position(is_memory) else {
            let names: Vec<&str> = self.blocks.iter().map(|block| block.name.as_str()).collect();
            let context = format!(
                "QEMU's stream has no block {:?} but {}; is it the id of the memory backend?",
                self.wanted,
                names.join(", ")
            );
            return Err(Error::new(ErrorKind::Incompatible, context));
        };
        let bytes = self.blocks[memory].bytes;
        if !bytes.is_multiple_of(PAGE_BYTES as u64) || bytes > MEMORY_BYTES_MAX {
            return Err(invalid(at, &format!("a memory of {bytes} bytes")));
        }
        self.passed.total = bytes / PAGE_BYTES as u64;
        self.memory = Some(memory);
        Ok(())
    }

    fn page(&mut self, input: &mut Input<'_>, at: u64, offset: u64, flags: u64) -> Result<()> {
        let name = match flags & SAME_BLOCK {
            0 => Some(input.take_name()?),
            _ => None,
        };
        let block = match &name {
            None => self.current,
            Some(name) => self.blocks.iter().position(|block| block.name == *name),
        };
        let Some(block) = block else {
            return Err(invalid(at, &format!("a page of block {name:?}, which is not listed")));
        };
        self.current = Some(block);
        if offset >= self.blocks[block].bytes {
            let Block { name, bytes } = &self.blocks[block];
            let what = format!("a page at {offset:#x} of block {name:?} of {bytes:#x} bytes");
            return Err(invalid(at, &what));
        }
        let is_memory = self.memory == Some(block);
        if !is_memory || matches!(self.pages, Pages::Keep) {
            input.put(&(offset | flags).to_be_bytes())?;
            if let Some(name) = &name {
                // It was read with a length of one byte.
                #[expect(clippy::cast_possible_truncation, reason = "at most 255 bytes")]
                input.put(&[name.len() as u8])?;
                input.put(name.as_bytes())?;
            }
            let is_page = flags & PAGE != 0;
            input.pass(if is_page { PAGE_BYTES } else { 1 })?;
            if is_memory {
                self.count(offset, is_page);
            }
            return Ok(());
        }
        let mut filled = [0; PAGE_BYTES];
        let bytes: &[u8; PAGE_BYTES] = match flags & PAGE {
            0 => {
                filled.fill(input.take_u8()?);
                &filled
            }
            _ => input.take(PAGE_BYTES)?.first_chunk().unwrap_or(&filled),
        };
        let is_zero = flags & ZERO != 0 && bytes[0] == 0;
        if let Pages::Take(sink) = &mut self.pages {
            take(&mut **sink, offset, if is_zero { None } else { Some(bytes) })?;
        }
        self.count(offset, !is_zero);
        Ok(())
    }

    fn count(&mut self, offset: u64, is_data: bool) {
        let counter = if is_data { &mut self.passed.data } else { &mut self.passed.zero };
        *counter += 1;
        let page = offset / PAGE_BYTES as u64;
        let word = usize::try_from(page / 64).expect("inside a block of memory");
        if word >= self.seen.len() {
            self.seen.resize(word + 1, 0);
        }
        self.seen[word] |= 1 << (page % 64);
    }

    pub(super) fn summary(self, machine: String) -> Result<Summary> {
        let Some(memory) = self.memory else {
            return Err(invalid(0, "no table of blocks"));
        };
        let distinct_pages = self.seen.iter().map(|word| u64::from(word.count_ones())).sum();
        let pages = self.passed;
        Ok(Summary { machine, blocks: self.blocks, memory, pages, distinct_pages })
    }
}

fn take(sink: &mut dyn PageSink, offset: u64, page: Option<&[u8; PAGE_BYTES]>) -> Result<()> {
    let taken = match page {
        Some(bytes) => sink.page(offset, bytes),
        None => sink.zero(offset),
    };
    taken.map_err(|error| {
        let context = format!("the memory's page at {offset:#x} cannot be taken");
        Error::with_source(ErrorKind::Sink, context, error)
    })
}

fn refusal(at: u64, flags: u64) -> Error {
    for (flag, what) in
        [(MULTIFD, "multifd"), (COMPRESSED, "compression"), (HOOK, "RDMA"), (XBZRLE, "XBZRLE")]
    {
        if flags & flag != 0 {
            return unsupported(at, what);
        }
    }
    invalid(at, &format!("a record with the flags {flags:#x}"))
}
