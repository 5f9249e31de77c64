//! A snapshot, with Cloud Hypervisor as the sender.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::super::state::{self, Slot};
use super::frame::{Command, Request, Status};
use super::wire::Wire;
use super::{Commit, Received, SLOTS_MAX};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Result};

/// Takes a snapshot from a connection that Cloud Hypervisor made, has it committed, and answers.
///
/// # Errors
///
/// `Refused` if Cloud Hypervisor gave up; `Protocol`, `InvalidFile` or `Incompatible` for what is
/// out of order, incomplete or not local; `Sink` if the commit failed. The other end is told of
/// all of these, and keeps its guest.
pub fn receive(stream: UnixStream, timeout: Duration, commit: &mut Commit<'_>) -> Result<()> {
    let mut wire = Wire::new(stream, Deadline::after(timeout));
    let received = take(&mut wire).and_then(|received| {
        commit(&received).map_err(|error| {
            let context = "the snapshot could not be made durable";
            Error::with_source(ErrorKind::Sink, context, error)
        })
    });
    match received {
        Ok(()) => wire.answer(Status::Ok),
        Err(error) => {
            // Who gave up is answered as who is done; who is gone need not hear.
            let status =
                if error.kind() == ErrorKind::Refused { Status::Ok } else { Status::Error };
            if let Err(unheard) = wire.answer(status) {
                tracing::debug!(%unheard, "Cloud Hypervisor was not told that its snapshot failed");
            }
            Err(error)
        }
    }
}

/// Everything up to the last command, which is not answered yet.
fn take(wire: &mut Wire) -> Result<Received> {
    let start = next(wire)?;
    expect(start.command == Command::Start, start, "the start")?;
    wire.answer(Status::Ok)?;
    let mut memory: Vec<(u32, File)> = Vec::new();
    let mut config: Option<(Vec<u8>, Vec<Slot>)> = None;
    let mut state = None;
    loop {
        let request = next(wire)?;
        match request.command {
            Command::MemoryFd => {
                expect(config.is_none(), request, "a descriptor before the configuration")?;
                let mut number = [0; 4];
                wire.read(&mut number, "the number of a slot")?;
                let mut descriptors = wire.take_descriptors();
                let (Some(descriptor), true) = (descriptors.pop(), descriptors.is_empty()) else {
                    let context = "a slot of memory came without a descriptor, or with several";
                    return Err(Error::new(ErrorKind::Protocol, context));
                };
                if memory.len() == SLOTS_MAX {
                    let context = format!("more than {SLOTS_MAX} slots of memory");
                    return Err(Error::new(ErrorKind::Protocol, context));
                }
                memory.push((u32::from_le_bytes(number), File::from(descriptor)));
            }
            Command::Config => {
                expect(config.is_none(), request, "one configuration")?;
                let bytes = wire.read_all(request.length, "the configuration")?;
                let slots = state::slots(&bytes)?;
                config = Some((bytes, slots));
            }
            Command::State => {
                expect(config.is_some() && state.is_none(), request, "one state, configured")?;
                let bytes = wire.read_all(request.length, "the state")?;
                serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).map_err(|error| {
                    let context = "the state is damaged or cut short";
                    Error::with_source(ErrorKind::InvalidFile, context, error)
                })?;
                state = Some(bytes);
            }
            Command::Complete | Command::CompletePaused => {
                let (Some((config, slots)), Some(state)) = (config, state) else {
                    let context = "the snapshot is complete before its configuration and state";
                    return Err(Error::new(ErrorKind::Protocol, context));
                };
                let slots = matched(slots, memory)?;
                let was_running = request.command == Command::Complete;
                return Ok(Received { config, state, slots, was_running });
            }
            Command::Abandon => {
                let context = "Cloud Hypervisor gave its snapshot up; its log says why";
                return Err(Error::new(ErrorKind::Refused, context));
            }
            Command::Memory => {
                let context = "Cloud Hypervisor sends its memory instead of descriptors; \
                               its guest needs --memory shared=on, and the migration local=on";
                return Err(Error::new(ErrorKind::Incompatible, context));
            }
            Command::Start | Command::PageFault => {
                expect(false, request, "a part of a snapshot")?;
            }
        }
        wire.answer(Status::Ok)?;
    }
}

fn next(wire: &mut Wire) -> Result<Request> {
    wire.request("the next command of a snapshot")?.ok_or_else(|| {
        let context = "Cloud Hypervisor is gone in the middle of its snapshot";
        Error::new(ErrorKind::Gone, context)
    })
}

fn expect(is_so: bool, request: Request, what: &str) -> Result<()> {
    if is_so {
        return Ok(());
    }
    let context = format!("Cloud Hypervisor sent {:?}, expected {what}", request.command);
    Err(Error::new(ErrorKind::Protocol, context))
}

/// Each slot with its descriptor, long enough.
fn matched(slots: Vec<Slot>, mut memory: Vec<(u32, File)>) -> Result<Vec<(Slot, File)>> {
    let bad = |what: String| Error::new(ErrorKind::Protocol, what);
    let mut matched = Vec::new();
    for slot in slots {
        let at = memory.iter().position(|(number, _)| *number == slot.slot).ok_or_else(|| {
            bad(format!(
                "slot {} of memory came without a descriptor; is it --memory shared=on?",
                slot.slot
            ))
        })?;
        let (_, file) = memory.swap_remove(at);
        let length = file.metadata().map(|file| file.len());
        let length = length.map_err(|error| Error::io("cannot look at a slot of memory", error))?;
        if length < slot.file_offset + slot.size {
            return Err(bad(format!(
                "slot {} of memory has {length} bytes behind it, expected {} at {}",
                slot.slot, slot.size, slot.file_offset
            )));
        }
        matched.push((slot, file));
    }
    match memory.first() {
        None => Ok(matched),
        Some((number, _)) => Err(bad(format!("a descriptor of slot {number}, which is not there"))),
    }
}
