//! How a VMM hands over its memory: a table of regions and a userfaultfd, through a unix socket.
//!
//! Firecracker connects while it loads a snapshot, sends both in one message, and goes on: the first
//! faults come before its load call returns. A stream keeps no messages apart, so the table is read
//! until it is whole, in however many pieces, before its descriptor or after it.
//!
//! Reading the table is a function of the bytes alone ([`firecracker::parse`]); another VMM's form
//! is another function for [`receive_as`]. Nothing may be served before [`check`](fn@check) has passed.
//!
//! Bounds: [`MESSAGE_BYTES_MAX`] of table, [`REGIONS_MAX`] regions, [`DESCRIPTORS_MAX`] descriptors.

mod check;
pub mod firecracker;

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use dormouse_sys::peer::Peer;
use dormouse_sys::userfaultfd::{Features, Userfaultfd};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use crate::error::{Error, ErrorKind, Result};

pub use check::{BadRegion, Layout, RegionRule, check};

/// Bytes of a table: far beyond [`REGIONS_MAX`] rows of Firecracker's, which have 130 bytes.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Regions of a table. Firecracker has one on each side of every hole for devices.
pub const REGIONS_MAX: usize = 4096;

/// Descriptors of a handshake, the userfaultfd included. A fork of Firecracker sends three.
pub const DESCRIPTORS_MAX: usize = 16;

/// Bytes that are looked at in all, as an unfinished table is looked at again with each piece. Room
/// for the longest table in 64 pieces, and for 10 KiB byte by byte.
const LOOKED_AT_BYTES_MAX: usize = 64 << 20;

/// Bytes taken from the socket at once.
const PIECE_BYTES: usize = 64 << 10;

/// A range of the VMM's memory and the part of the image that belongs there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where it starts in the VMM's address space; what faults tell.
    pub address: u64,

    /// Bytes.
    pub size: u64,

    /// Where it starts in the image.
    pub offset: u64,

    /// Bytes of a page: what is installed is a multiple of it.
    pub page_bytes: u64,
}

impl Region {
    /// Its addresses in the VMM. Only for regions that passed [`check`](fn@check).
    pub fn addresses(&self) -> Range<u64> {
        self.address..self.address.saturating_add(self.size)
    }

    /// Its part of the image. Only for regions that passed [`check`](fn@check).
    pub fn image(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.size)
    }
}

/// What a VMM said of its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its regions, in the order it gave them.
    pub regions: Vec<Region>,

    /// What the end of the socket will mean.
    pub socket_end: SocketEnd,
}

/// What it means when the VMM's end of the socket is closed after the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketEnd {
    /// Nothing: this VMM closes the socket when it has sent its table.
    Nothing,

    /// The VMM is gone. [`Peer::has_ended`] may come a moment later.
    VmGone,
}

/// Reads a table. Pure; none if it is not whole yet.
pub type Parse = fn(&[u8]) -> Result<Option<Table>>;

/// Bounds of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From the start of [`receive`] until everything is there.
    pub timeout: Duration,
}

impl Limits {
    /// Ten seconds: a VMM that connected sends at once, if its host is not badly overloaded.
    pub const STANDARD: Limits = Limits { timeout: Duration::from_secs(10) };
}

/// What a VMM handed over.
#[derive(Debug)]
pub struct Handshake {
    /// Its regions, in the order it gave them; not [checked](fn@check) yet.
    pub regions: Vec<Region>,

    /// Its page faults.
    pub uffd: Userfaultfd,

    /// What the VMM asked the kernel for. Without [`Features::EVENT_REMOVE`] nobody is told of pages
    /// that it gives back.
    pub features: Features,

    /// Other descriptors, in the order they came. No released Firecracker sends any.
    pub others: Vec<OwnedFd>,

    /// Who connected.
    pub peer: Peer,

    /// What the end of the socket means from now on.
    pub socket_end: SocketEnd,
}

/// Takes Firecracker's handshake from a socket that it connected to.
///
/// Nothing is answered. The socket may or may not be blocking, and stays as it is.
///
/// # Errors
///
/// [`ErrorKind::TimedOut`] if something is missing when time is over, [`ErrorKind::Protocol`] for a
/// table or descriptors that are not what they should be and for an end before both are whole,
/// [`ErrorKind::Io`] if the peer or a descriptor cannot be looked at.
pub fn receive(socket: &UnixStream, limits: Limits) -> Result<Handshake> {
    receive_as(socket, limits, firecracker::parse)
}

/// The same with the table in the form of another VMM.
pub fn receive_as(socket: &UnixStream, limits: Limits, parse: Parse) -> Result<Handshake> {
    let deadline = Instant::now() + limits.timeout;
    let peer = Peer::of(socket)
        .map_err(|error| Error::io("cannot tell who connected to the memory socket", error))?;
    let mut inbox = Inbox::default();
    loop {
        if let (Some(_), Some(_)) = (&inbox.table, &inbox.uffd) {
            return inbox.finish(peer);
        }
        if !wait_readable(socket, deadline)? {
            let message = format!("{} after {:?}", inbox.missing(), limits.timeout);
            return Err(Error::new(ErrorKind::TimedOut, message));
        }
        inbox.take(socket, parse)?;
    }
}

/// Waits until there is something to read, or the end of it. False when time is over.
fn wait_readable(socket: &UnixStream, deadline: Instant) -> Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left)
            .map_err(|_| Error::new(ErrorKind::InvalidInput, "a timeout of centuries"))?;
        let mut poll = [PollFd::new(socket, PollFlags::IN)];
        match rustix::event::poll(&mut poll, Some(&left)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::io("cannot wait for a handshake", errno.into())),
        }
    }
}

/// What came so far.
#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
    looked_at_bytes: usize,
    table: Option<Table>,
    uffd: Option<Userfaultfd>,
    others: Vec<OwnedFd>,
}

impl Inbox {
    /// Takes what is there now.
    fn take(&mut self, socket: &UnixStream, parse: Parse) -> Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut into = [IoSliceMut::new(&mut piece)];
        let received = match recvmsg(socket, &mut into, &mut control, flags) {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            received => received.map_err(|errno| {
                Error::io("cannot read from the memory socket", io::Error::from(errno))
            })?,
        };
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = message {
                descriptors.extend(some);
            }
        }
        let is_end = received.bytes == 0 && descriptors.is_empty();
        let count = descriptors.len() + self.others.len() + usize::from(self.uffd.is_some());
        if received.flags.contains(ReturnFlags::CTRUNC) || count > DESCRIPTORS_MAX {
            let got = format!("more descriptors than can be taken; expected {DESCRIPTORS_MAX}");
            return Err(Error::protocol(format!("{got} at most")));
        }
        for descriptor in descriptors {
            self.sort(descriptor)?;
        }
        if is_end {
            let missing = self.missing();
            return Err(Error::protocol(format!("the VMM closed its memory socket: {missing}")));
        }
        self.read(&piece[..received.bytes], parse)
    }

    /// Puts a descriptor where it belongs, by what it is.
    fn sort(&mut self, descriptor: OwnedFd) -> Result<()> {
        let failed = |error| Error::io("cannot look at a descriptor of the VMM", error);
        let copy = descriptor.try_clone().map_err(failed)?;
        match (Userfaultfd::from_fd(copy), &self.uffd) {
            (Ok(uffd), None) => self.uffd = Some(uffd),
            (Ok(_), Some(_)) => return Err(Error::protocol("got two userfaultfds, expected one")),
            (Err(error), _) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                self.others.push(descriptor);
            }
            (Err(error), _) => return Err(failed(error)),
        }
        Ok(())
    }

    fn read(&mut self, piece: &[u8], parse: Parse) -> Result<()> {
        if self.table.is_some() {
            if piece.iter().all(u8::is_ascii_whitespace) {
                return Ok(());
            }
            return Err(Error::protocol("the VMM went on after its table"));
        }
        self.bytes.extend_from_slice(piece);
        self.looked_at_bytes += self.bytes.len();
        if self.bytes.len() > MESSAGE_BYTES_MAX {
            let message = format!("a memory table of more than {MESSAGE_BYTES_MAX} bytes");
            return Err(Error::protocol(message));
        }
        if self.looked_at_bytes > LOOKED_AT_BYTES_MAX {
            let bytes = self.bytes.len();
            let message = format!("a memory table in too many pieces, unfinished at {bytes} bytes");
            return Err(Error::protocol(message));
        }
        self.table = parse(&self.bytes)?;
        Ok(())
    }

    fn missing(&self) -> String {
        match (&self.table, &self.uffd, self.bytes.len(), self.others.len()) {
            (None, None, 0, 0) => "it sent nothing".to_owned(),
            (None, _, bytes, _) => format!("its table is unfinished at {bytes} bytes"),
            (Some(_), None, _, 0) => "its table came without a descriptor".to_owned(),
            (Some(_), None, _, others) => {
                format!("none of its {others} descriptors is a userfaultfd")
            }
            (Some(_), Some(_), ..) => "nothing is missing".to_owned(),
        }
    }

    fn finish(self, peer: Peer) -> Result<Handshake> {
        let (Some(table), Some(uffd)) = (self.table, self.uffd) else {
            return Err(Error::protocol("an unfinished handshake"));
        };
        let features = uffd
            .features()
            .map_err(|error| Error::io("cannot tell the features of a userfaultfd", error))?
            .ok_or_else(|| Error::protocol("a userfaultfd without an agreed API (UFFDIO_API)"))?;
        Ok(Handshake {
            regions: table.regions,
            uffd,
            features,
            others: self.others,
            peer,
            socket_end: table.socket_end,
        })
    }
}

#[cfg(test)]
mod tests;
