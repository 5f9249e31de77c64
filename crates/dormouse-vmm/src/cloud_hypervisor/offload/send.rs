//! A restore, with us as the sender, and pages as they are asked for.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};

use super::super::state::{self, Slot};
use super::frame::{Command, FAULT_CONNECTION, PageFault, Response, Status};
use super::wire::Wire;
use super::{MemorySource, Restore, SLOTS_MAX, Transfer};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Result};
use crate::vmm::Then;

/// Bytes that are copied at once: a huge page.
const PIECE_BYTES: usize = 2 << 20;

/// How long a page may take to be sent to a Cloud Hypervisor that asked for it; and how long none
/// may be asked for, which is for ever.
const FAULT_TIMEOUT: Duration = Duration::MAX;

/// Pages that are served to a guest that goes on.
///
/// They are served until Cloud Hypervisor has all of them or ends. Dropping this does not stop it.
#[derive(Debug)]
pub struct Faults {
    thread: JoinHandle<Result<u64>>,
}

impl Faults {
    /// Whether the last page was served, or something went wrong.
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until it is over. How many pages were asked for; or why one could not be served, after
    /// which the guest must not go on: kill it.
    pub fn wait(self) -> Result<u64> {
        self.thread.join().unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Io, "the thread that serves pages panicked"))
        })
    }
}

/// A slot of memory, where it is in the image, and its descriptor if it has one.
#[derive(Debug)]
struct Part {
    slot: Slot,
    image_offset: u64,
    memory: Option<File>,
}

/// Restores over a connection to the socket that Cloud Hypervisor listens on.
pub fn send(
    stream: UnixStream,
    socket: &Path,
    timeout: Duration,
    restore: &Restore<'_>,
) -> Result<Option<Faults>> {
    let deadline = Deadline::after(timeout);
    let mut wire = Wire::new(stream, deadline);
    let parts = parts(restore)?;
    wire.ask(Command::Start, &[], None)?;
    for part in &parts {
        if let Some(memory) = &part.memory {
            wire.ask(Command::MemoryFd, &part.slot.slot.to_le_bytes(), Some(memory.as_fd()))?;
        }
    }
    wire.ask(Command::Config, restore.config, None)?;
    let faults = match restore.transfer.is_on_demand() {
        true => Some(serve(crate::socket::connect(socket, deadline)?, parts, restore)?),
        false => None,
    };
    let finished = wire.ask(Command::State, restore.state, None).and_then(|()| {
        let last = match restore.then {
            Then::Resume => Command::Complete,
            Then::StayPaused => Command::CompletePaused,
        };
        wire.ask(last, &[], None)
    });
    match (finished, faults) {
        (Ok(()), faults) => Ok(faults),
        // A page that could not be served is why.
        (Err(error), Some(faults)) if faults.is_over() => Err(match faults.wait() {
            Err(cause) if cause.kind() == ErrorKind::Sink => cause,
            _ => error,
        }),
        (Err(error), _) => Err(error),
    }
}

/// The slots of the configuration, with memory behind them as the transfer wants it.
fn parts(restore: &Restore<'_>) -> Result<Vec<Part>> {
    let slots = state::slots(restore.config)?;
    if slots.len() > SLOTS_MAX {
        let context = format!("{} slots of memory, and {SLOTS_MAX} are supported", slots.len());
        return Err(Error::new(ErrorKind::InvalidFile, context));
    }
    let mut parts = Vec::new();
    let mut image_offset = 0;
    for slot in slots {
        let memory = match restore.transfer {
            Transfer::OnDemandPrivate => None,
            Transfer::OnDemandShared => Some(empty(slot)?),
            Transfer::Copied => {
                let file = empty(slot)?;
                copy(&*restore.memory, image_offset, &file, slot)?;
                Some(file)
            }
        };
        parts.push(Part { slot, image_offset, memory });
        image_offset += slot.size;
    }
    Ok(parts)
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
    let mut buffer = vec![0; PIECE_BYTES];
    let mut done = 0;
    while done < slot.size {
        let count = (slot.size - done).min(PIECE_BYTES as u64);
        let piece = &mut buffer[..usize::try_from(count).unwrap_or(PIECE_BYTES)];
        read(source, piece, image_offset + done)?;
        for (number, page) in piece.chunks(4096).enumerate() {
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

fn read(source: &dyn MemorySource, buffer: &mut [u8], offset: u64) -> Result<()> {
    source.read_at(buffer, offset).map_err(|error| {
        let context = format!("memory at {offset:#x} of the image cannot be read");
        Error::with_source(ErrorKind::Sink, context, error)
    })
}

fn serve(stream: UnixStream, parts: Vec<Part>, restore: &Restore<'_>) -> Result<Faults> {
    let mut wire = Wire::new(stream, Deadline::after(FAULT_TIMEOUT));
    wire.write(&FAULT_CONNECTION.to_le_bytes(), "the word of a connection for page faults")?;
    let source = Arc::clone(&restore.memory);
    let serving = move || {
        let served = serve_faults(&mut wire, &parts, &*source);
        if let Err(error) = &served {
            tracing::error!(%error, "a guest's page was not served");
            // It may be gone.
            drop(wire.answer(Status::Error));
        }
        served
    };
    let thread = std::thread::Builder::new().name("page-faults".to_owned()).spawn(serving);
    let thread =
        thread.map_err(|error| Error::io("cannot start a thread for page faults", error))?;
    Ok(Faults { thread })
}

fn serve_faults(wire: &mut Wire, parts: &[Part], source: &dyn MemorySource) -> Result<u64> {
    let mut served = 0;
    let mut buffer = Vec::new();
    while let Some(request) = wire.request("a page fault")? {
        match request.command {
            Command::PageFault => {}
            Command::Abandon => {
                wire.answer(Status::Ok)?;
                break;
            }
            other => {
                let context = format!("Cloud Hypervisor sent {other:?}, expected a page fault");
                return Err(Error::new(ErrorKind::Protocol, context));
            }
        }
        let mut bytes = [0; 16];
        wire.read(&mut bytes, "the page of a fault")?;
        let fault = PageFault::parse(&bytes)?;
        let inside = |part: &&Part| {
            let (start, end) = (part.slot.gpa, part.slot.gpa + part.slot.size);
            fault.gpa >= start && fault.gpa < end && fault.length <= end - fault.gpa
        };
        let Some(part) = parts.iter().find(inside) else {
            let context = format!("a page at {:#x}, where the guest has no memory", fault.gpa);
            return Err(Error::new(ErrorKind::Protocol, context));
        };
        page(wire, part, fault, source, &mut buffer)?;
        served += 1;
    }
    Ok(served)
}

/// Serves one page. Nothing is said of it until all of it was read.
fn page(
    wire: &mut Wire,
    part: &Part,
    fault: PageFault,
    source: &dyn MemorySource,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    let within = fault.gpa - part.slot.gpa;
    let Some(memory) = &part.memory else {
        if fault.length > PIECE_BYTES as u64 {
            let context = format!(
                "pages of {} bytes of private memory cannot be sent; share the guest's memory",
                fault.length
            );
            return Err(Error::new(ErrorKind::Incompatible, context));
        }
        buffer.resize(usize::try_from(fault.length).unwrap_or(PIECE_BYTES), 0);
        read(source, buffer, part.image_offset + within)?;
        let head = Response { status: Status::Ok, length: fault.length };
        wire.write(&head.to_bytes(), "a page")?;
        return wire.write(buffer, "a page");
    };
    let mut done = 0;
    while done < fault.length {
        let count = (fault.length - done).min(PIECE_BYTES as u64);
        buffer.resize(usize::try_from(count).unwrap_or(PIECE_BYTES), 0);
        read(source, buffer, part.image_offset + within + done)?;
        memory
            .write_all_at(buffer, part.slot.file_offset + within + done)
            .map_err(|error| Error::io("cannot fill a page of a guest", error))?;
        done += count;
    }
    wire.answer(Status::Ok)
}
