//! A connection of the protocol, with a deadline on every read and write.

use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::sleep;
use std::time::Duration;

use dormouse_sys::passing;

use super::frame::{Command, HEAD_BYTES, Request, Response, Status};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Result};

/// Between two looks at a listener.
const LOOK: Duration = Duration::from_millis(1);

/// A connection.
#[derive(Debug)]
pub(super) struct Wire {
    stream: UnixStream,
    deadline: Deadline,
    /// Descriptors that came and were not asked for yet.
    descriptors: Vec<OwnedFd>,
}

impl Wire {
    pub(super) fn new(stream: UnixStream, deadline: Deadline) -> Wire {
        Wire { stream, deadline, descriptors: Vec::new() }
    }

    pub(super) fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Fills a buffer; false if the other end closed before its first byte.
    pub(super) fn read_or_end(&mut self, buffer: &mut [u8], what: &str) -> Result<bool> {
        let mut filled = 0;
        while filled < buffer.len() {
            let left = self.deadline.left(what)?;
            let received = self.stream.set_read_timeout(Some(left)).and_then(|()| {
                passing::receive(&self.stream, &mut buffer[filled..], &mut self.descriptors)
            });
            match received {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(gone(what)),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(self.deadline.passed(what));
                }
                Err(error) => return Err(Error::io(format!("cannot receive {what}"), error)),
            }
        }
        Ok(true)
    }

    pub(super) fn read(&mut self, buffer: &mut [u8], what: &str) -> Result<()> {
        if self.read_or_end(buffer, what)? { Ok(()) } else { Err(gone(what)) }
    }

    pub(super) fn read_all(&mut self, length: u64, what: &str) -> Result<Vec<u8>> {
        // The length was bounded with its head; memory is taken as bytes come.
        let mut bytes = Vec::new();
        let mut missing = usize::try_from(length).unwrap_or(usize::MAX);
        while missing > 0 {
            let start = bytes.len();
            bytes.resize(start + missing.min(1 << 20), 0);
            self.read(&mut bytes[start..], what)?;
            missing -= bytes.len() - start;
        }
        Ok(bytes)
    }

    /// The descriptors that came so far.
    pub(super) fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.descriptors)
    }

    pub(super) fn write(&mut self, bytes: &[u8], what: &str) -> Result<()> {
        let failed = |error| Error::io(format!("cannot send {what}"), error);
        self.stream.set_write_timeout(Some(self.deadline.left(what)?)).map_err(failed)?;
        self.stream.write_all(bytes).map_err(failed)
    }

    pub(super) fn request(&mut self, what: &str) -> Result<Option<Request>> {
        let mut head = [0; HEAD_BYTES];
        match self.read_or_end(&mut head, what)? {
            true => Request::parse(&head).map(Some),
            false => Ok(None),
        }
    }

    pub(super) fn answer(&mut self, status: Status) -> Result<()> {
        self.write(&Response { status, length: 0 }.to_bytes(), "an answer")
    }

    /// Sends a request with what follows it, and wants the answer to be fine.
    pub(super) fn ask(
        &mut self,
        command: Command,
        payload: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let what = format!("{command:?}");
        self.write(&Request::new(command, payload.len() as u64).to_bytes(), &what)?;
        match descriptor {
            Some(descriptor) => passing::send(&self.stream, payload, &[descriptor])
                .map_err(|error| Error::io(format!("cannot send {what}"), error))?,
            None if payload.is_empty() => {}
            None => self.write(payload, &what)?,
        }
        let mut head = [0; HEAD_BYTES];
        self.read(&mut head, &format!("the answer to {what}"))?;
        match Response::parse(&head)? {
            Response { status: Status::Ok, length: 0 } => Ok(()),
            Response { status: Status::Ok, length } => {
                let context = format!("the answer to {what} has {length} bytes, expected none");
                Err(Error::new(ErrorKind::Protocol, context))
            }
            Response { status: Status::Error, .. } => {
                let context = format!("Cloud Hypervisor refused {what}; its log says why");
                Err(Error::new(ErrorKind::Refused, context))
            }
        }
    }
}

fn gone(what: &str) -> Error {
    Error::new(ErrorKind::Gone, format!("Cloud Hypervisor closed the connection before {what}"))
}

/// Waits for a connection, until `is_over`.
pub(super) fn accept(
    listener: &UnixListener,
    deadline: Deadline,
    is_over: &dyn Fn() -> bool,
) -> Result<UnixStream> {
    let failed = |error| Error::io("cannot accept a connection", error);
    listener.set_nonblocking(true).map_err(failed)?;
    loop {
        let over = is_over();
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).map_err(failed)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed(error)),
        }
        if over {
            let context = "Cloud Hypervisor did not connect for its snapshot";
            return Err(Error::new(ErrorKind::Gone, context));
        }
        deadline.left("a connection for a snapshot")?;
        sleep(LOOK);
    }
}
