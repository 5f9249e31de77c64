//! QEMU's migration stream, split as it passes: guest memory to one side, the rest to the other.
//!
//! ```text
//! "QEVM" u32 version 3
//! 07  u32 length, machine type                        configuration
//!       05 u8 length, name, u32 version, …              its subsections
//! 01  u32 section, u8 length, "ram", u32 instance, u32 version 4, RAM records
//! 02  u32 section, RAM records                        again and again
//! 03  u32 section, RAM records                        the last
//!       7e u32 section                                  behind each of them
//! 08  u16 command, u16 length, …                      commands
//! 04  …                                               devices, whose length only they know
//! 00, 06 u32 length, JSON                             the end, and a description of the devices
//! ```
//!
//! (All big-endian. Source: QEMU's `docs/devel/migration/main.rst` and its streams.)
//! RAM records are an address with flags in its low 12 bits: sizes of all blocks, a page, a page of
//! zeros, the end of the section; see `ram`.
//!
//! The stream that is left has everything but the pages of one block. QEMU loads it: it keeps for
//! that block what its memory file has. Sections of devices carry no length, so the first of them
//! ends what is parsed, and all that follows is passed on as it is. By then all of RAM has passed,
//! for QEMU sends it before any device, except with devices that want to be there early
//! (virtio-mem): those, and every way of sending RAM that is not understood here (multifd, mapped
//! RAM, postcopy, XBZRLE, compression, RDMA), are refused by their names.
//!
//! Memory: one buffer of [`BUFFER_BYTES`] each way, the table of blocks, and a bit for each page.

mod input;
#[cfg(test)]
mod tests;
mod ram;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::vmm::{PageSink, PagesPassed};
use input::Input;
use ram::Ram;

pub use input::BUFFER_BYTES;
pub use ram::Block;

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
const END: u8 = 0x00;
const SECTION_START: u8 = 0x01;
const SECTION_PART: u8 = 0x02;
const SECTION_END: u8 = 0x03;
const SECTION_FULL: u8 = 0x04;
const SUBSECTION: u8 = 0x05;
const CONFIGURATION: u8 = 0x07;
const COMMAND: u8 = 0x08;
const FOOTER: u8 = 0x7e;

/// Bytes of a machine type's name. The longest of QEMU's have some tens.
const MACHINE_BYTES_MAX: u32 = 256;
/// Capabilities that a stream may name. QEMU has about thirty.
const CAPABILITIES_MAX: u32 = 256;
/// The one that changes how blocks are listed.
const IGNORE_SHARED: &str = "x-ignore-shared";
/// Those with which RAM is not where this looks for it.
const CANNOT_SPLIT: [&str; 3] = ["mapped-ram", "multifd", "postcopy-ram"];
/// The command that switches the last phase on and has no data; all others are postcopy's or
/// COLO's. Streams of 10.1 and later have it.
const SWITCHOVER_START: u16 = 11;
/// Pings the destination, which answers only if it has a way back.
const PING: u16 = 2;

/// What becomes of the pages of the memory.
#[derive(Debug)]
pub enum Pages<'a> {
    /// They are dropped.
    Drop,
    /// They are handed over, and not written.
    Take(&'a mut dyn PageSink),
    /// They stay in the stream.
    Keep,
}

/// What passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The machine type, such as `pc-q35-7.2`.
    pub machine: String,
    /// The blocks of RAM.
    pub blocks: Vec<Block>,
    /// Which of them is the memory.
    pub memory: usize,
    /// Pages of it that passed.
    pub pages: PagesPassed,
    /// How many different ones.
    pub distinct_pages: u64,
}

/// Splits a stream: `memory` is the id of the block that is the guest's memory, which its memory
/// backend has.
///
/// # Errors
///
/// [`ErrorKind::InvalidFile`] for a stream that is not one or is cut short,
/// [`ErrorKind::Incompatible`] for one that cannot be split, [`ErrorKind::Sink`] if a page cannot
/// be taken, [`ErrorKind::Io`] if reading or writing fails.
pub fn split(
    from: &mut dyn Read,
    to: &mut dyn Write,
    memory: &str,
    pages: Pages<'_>,
) -> Result<Summary> {
    let mut input = Input::new(from, to);
    let (machine, has_addresses) = head(&mut input)?;
    let mut ram = Ram::new(memory, has_addresses, pages);
    let mut section = None;
    let mut is_complete = false;
    loop {
        let at = input.position();
        let kind = input.pass_u8()?;
        match kind {
            SECTION_START => {
                let id = input.pass_u32()?;
                let name = input.pass_name()?;
                let (_instance, version) = (input.pass_u32()?, input.pass_u32()?);
                if name != "ram" || version != 4 || section.is_some() {
                    let what = format!("a section {name:?} of version {version}");
                    return Err(unsupported(at, &what));
                }
                section = Some(id);
                ram.section(&mut input)?;
                footer(&mut input, id)?;
            }
            SECTION_PART | SECTION_END => {
                let id = input.pass_u32()?;
                if section != Some(id) || is_complete {
                    return Err(invalid(at, &format!("a part of section {id}, which is not open")));
                }
                ram.section(&mut input)?;
                footer(&mut input, id)?;
                is_complete = kind == SECTION_END;
            }
            COMMAND => {
                let (command, length) = (input.pass_u16()?, input.pass_u16()?);
                if !matches!(command, PING | SWITCHOVER_START) {
                    return Err(unsupported(at, &format!("command {command} (postcopy or COLO)")));
                }
                input.pass(usize::from(length))?;
            }
            SECTION_FULL | END if is_complete => {
                input.pass_rest()?;
                return ram.summary(machine);
            }
            SECTION_FULL => {
                let name = input.pass_u32().and_then(|_| input.pass_name())?;
                let what = format!("device {name:?} ahead of RAM (virtio-mem does that)");
                return Err(unsupported(at, &what));
            }
            other => return Err(invalid(at, &format!("a section of kind {other:#x}"))),
        }
    }
}

/// Refuses a file that does not start as a stream does; afterwards it is at its start again.
pub(crate) fn check_head(file: &mut File, path: &Path) -> Result<()> {
    let mut head = [0; 8];
    let read = file.read_exact(&mut head).and_then(|()| file.rewind());
    read.map_err(|error| Error::file(format!("cannot read {}", path.display()), error))?;
    let [magic, version] = [&head[..4], &head[4..]].map(|word| word.to_vec());
    if magic != MAGIC.to_be_bytes() || version != VERSION.to_be_bytes() {
        let context = format!("{} is no stream of QEMU's", path.display());
        return Err(Error::new(ErrorKind::InvalidFile, context));
    }
    Ok(())
}

/// Passes the header and the configuration; the machine type, and whether blocks have addresses.
fn head(input: &mut Input<'_>) -> Result<(String, bool)> {
    let (magic, version) = (input.pass_u32()?, input.pass_u32()?);
    if (magic, version) != (MAGIC, VERSION) {
        let context = format!(
            "magic {magic:#x} and version {version}, expected {MAGIC:#x} and {VERSION}; is it a stream of QEMU's?"
        );
        return Err(invalid(0, &context));
    }
    let (mut machine, mut has_addresses) = (String::new(), false);
    // Machines before 2.5 have none, and no footers either.
    if input.peek()? != CONFIGURATION {
        return Err(unsupported(8, "a machine type of 2.4 or earlier, without configuration"));
    }
    input.pass_u8()?;
    let length = input.pass_u32()?;
    if length > MACHINE_BYTES_MAX {
        return Err(invalid(9, &format!("a machine type of {length} bytes")));
    }
    machine.push_str(&String::from_utf8_lossy(input.pass(length as usize)?));
    while input.peek()? == SUBSECTION {
        let at = input.position();
        input.pass_u8()?;
        let name = input.pass_name()?;
        let version = input.pass_u32()?;
        match (name.as_str(), version) {
            ("configuration/capabilities", 1) => {
                let count = input.pass_u32()?;
                if count > CAPABILITIES_MAX {
                    return Err(invalid(at, &format!("{count} capabilities")));
                }
                for _ in 0..count {
                    let capability = input.pass_name()?;
                    if CANNOT_SPLIT.contains(&capability.as_str()) {
                        return Err(unsupported(at, &format!("the capability {capability}")));
                    }
                    has_addresses |= capability == IGNORE_SHARED;
                }
            }
            ("configuration/target-page-bits", 1) => {
                let bits = input.pass_u32()?;
                if bits != 12 {
                    return Err(unsupported(at, &format!("pages of 2^{bits} bytes")));
                }
            }
            ("configuration/uuid", 1) => {
                input.pass(16)?;
            }
            _ => {
                let what = format!("configuration {name:?} of version {version}");
                return Err(unsupported(at, &what));
            }
        }
    }
    Ok((machine, has_addresses))
}

fn footer(input: &mut Input<'_>, id: u32) -> Result<()> {
    let at = input.position();
    let (kind, of) = (input.pass_u8()?, input.pass_u32()?);
    if (kind, of) != (FOOTER, id) {
        let what = format!("{kind:#x} of section {of} where the footer of section {id} belongs");
        return Err(invalid(at, &what));
    }
    Ok(())
}

fn invalid(at: u64, what: &str) -> Error {
    Error::new(ErrorKind::InvalidFile, format!("QEMU's stream at byte {at}: {what}"))
}

fn unsupported(at: u64, what: &str) -> Error {
    let context = format!(
        "QEMU's stream at byte {at}: {what} cannot be split from memory; start QEMU without it"
    );
    Error::new(ErrorKind::Incompatible, context)
}
