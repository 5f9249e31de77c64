//! A restore, with us as the sender, and pages as they are asked for.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};

use super::super::state::{self, Slot};
use super::frame::{Command, FAULT_CONNECTION};
use super::pages::read;
use super::wire::Wire;
use super::{
    Memory, MemorySource, OnDemand, PIECE_BYTES, PageRequests, PagesOfSlot, Restore, SLOTS_MAX,
};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Result};
use crate::vmm::Then;

/// Restores over a connection to the socket that Cloud Hypervisor listens on.
pub fn send(
    stream: UnixStream,
    socket: &Path,
    timeout: Duration,
    restore: Restore<'_>,
) -> Result<()> {
    let deadline = Deadline::after(timeout);
    let mut wire = Wire::new(stream, deadline);
    let slots = slots(restore.config)?;
    let memory = memory(&slots, &restore.memory)?;
    wire.ask(Command::Start, &[], None)?;
    for (of, file) in slots.iter().zip(&memory) {
        wire.ask(Command::MemoryFd, &of.slot.slot.to_le_bytes(), Some(file.as_fd()))?;
    }
    wire.ask(Command::Config, restore.config, None)?;
    if let Memory::OnDemand(_, serve) = restore.memory {
        let mut faults = Wire::new(crate::socket::connect(socket, deadline)?, deadline);
        faults
            .write(&FAULT_CONNECTION.to_le_bytes(), "the word of a connection for page faults")?;
        serve(PageRequests::new(faults.into_stream(), slots, memory)?).map_err(|error| {
            Error::with_source(ErrorKind::Sink, "nobody serves the guest's pages", error)
        })?;
    }
    wire.ask(Command::State, restore.state, None)?;
    let last = match restore.then {
        Then::Resume => Command::Complete,
        Then::StayPaused => Command::CompletePaused,
    };
    wire.ask(last, &[], None)
}

/// The slots of a configuration, in the order of the image.
fn slots(config: &[u8]) -> Result<Vec<PagesOfSlot>> {
    let slots = state::slots(config)?;
    if slots.len() > SLOTS_MAX {
        let context = format!("{} slots of memory, and {SLOTS_MAX} are supported", slots.len());
        return Err(Error::new(ErrorKind::InvalidFile, context));
    }
    let mut image_offset = 0;
    let place = |slot: Slot| {
        let of = PagesOfSlot { slot, image_offset };
        image_offset += slot.size;
        of
    };
    Ok(slots.into_iter().map(place).collect())
}

/// Memory for each slot; none if its pages are sent.
fn memory(slots: &[PagesOfSlot], how: &Memory<'_>) -> Result<Vec<File>> {
    if matches!(how, Memory::OnDemand(OnDemand::Private, _)) {
        return Ok(Vec::new());
    }
    let make = |of: &PagesOfSlot| {
        let file = empty(of.slot)?;
        if let Memory::Copied(source) = how {
            copy(*source, of.image_offset, &file, of.slot)?;
        }
        Ok(file)
    };
    slots.iter().map(make).collect()
}

fn empty(slot: Slot) -> Result<File> {
    let made = memfd_create(format!("guest-slot-{}", slot.slot), MemfdFlags::CLOEXEC);
    let file = made.map(File::from).map_err(std::io::Error::from).and_then(|file| {
        file.set_len(slot.file_offset + slot.size)?;
        Ok(file)
    });
    file.map_err(|error| Error::io(format!("cannot make slot {} of memory", slot.slot), error))
}

/// Copies a slot's memory; what is zero stays a hole.
fn copy(source: &dyn MemorySource, image_offset: u64, file: &File, slot: Slot) -> Result<()> {
    let mut buffer = Vec::new();
    let mut done = 0;
    while done < slot.size {
        let count = (slot.size - done).min(PIECE_BYTES);
        buffer.resize(usize::try_from(count).unwrap_or(0), 0);
        read(source, &mut buffer, image_offset + done)?;
        for (number, page) in buffer.chunks(4096).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                let at = slot.file_offset + done + number as u64 * 4096;
                file.write_all_at(page, at)
                    .map_err(|error| Error::io("cannot fill a slot of memory", error))?;
            }
        }
        done += count;
    }
    Ok(())
}
