//! Generic netlink: requests to a named part of the kernel, and its answers.
//!
//! Messages are those of `linux/netlink.h` and `linux/genetlink.h`: in the host's byte order, each
//! message and attribute begins at a multiple of four bytes. Building and parsing do no I/O.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `sizeof(struct nlmsghdr)`.
const HEADER_BYTES: usize = 16;

/// `sizeof(struct genlmsghdr)`.
const GENERIC_HEADER_BYTES: usize = 4;

/// `sizeof(struct nlattr)`.
const ATTRIBUTE_HEADER_BYTES: usize = 4;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_TYPE_MASK: u16 = !(0b11 << 14);

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_VERSION: u8 = 2;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// The longest answer: a family's description has a few hundred bytes.
const ANSWER_BYTES: usize = 32 << 10;

/// The kernel answers at once; this is for one that does not.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A request while it is built.
#[derive(Clone, Debug)]
pub struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A command to a family; its number `sequence` is on the answers.
    pub fn new(family: u16, sequence: u32, command: u8, version: u8) -> Request {
        let mut bytes = Vec::with_capacity(128);
        // The length is known in the end.
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend(family.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        // The kernel fills in the port.
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend([command, version, 0, 0]);
        Request { bytes }
    }

    /// Adds an attribute.
    pub fn put(&mut self, kind: u16, value: &[u8]) {
        let begin = self.begin(kind);
        self.bytes.extend(value);
        self.end(begin);
    }

    /// Adds an attribute of 32 bits.
    pub fn put_u32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_ne_bytes());
    }

    /// Adds an attribute of 64 bits.
    pub fn put_u64(&mut self, kind: u16, value: u64) {
        self.put(kind, &value.to_ne_bytes());
    }

    /// Adds an attribute that holds those that `fill` adds.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Request)) {
        let begin = self.begin(kind | NLA_F_NESTED);
        fill(self);
        self.end(begin);
    }

    /// The message.
    pub fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }

    fn begin(&mut self, kind: u16) -> usize {
        let begin = self.bytes.len();
        self.bytes.extend(0_u16.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        begin
    }

    fn end(&mut self, begin: usize) {
        // Requests of ours have some hundred bytes.
        let length = u16::try_from(self.bytes.len() - begin).unwrap_or(u16::MAX);
        self.bytes[begin..begin + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A message of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// The request was carried out; nothing more comes.
    Done,

    /// It was refused with this error number; nothing more comes.
    Refused(i32),

    /// The attributes of a message of the family.
    Attributes(&'a [u8]),
}

/// Splits what was received into the messages that answer request `sequence`; others are passed
/// over.
pub fn answers(mut bytes: &[u8], sequence: u32) -> io::Result<Vec<Answer<'_>>> {
    let short = || io::Error::new(io::ErrorKind::InvalidData, "a netlink message is cut short");
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let length = u32_at(bytes, 0).and_then(|length| usize::try_from(length).ok());
        let length = length.filter(|&length| length >= HEADER_BYTES && length <= bytes.len());
        let message = &bytes[..length.ok_or_else(short)?];
        bytes = &bytes[message.len().next_multiple_of(4).min(bytes.len())..];
        if u32_at(message, 8) != Some(sequence) {
            continue;
        }
        let body = &message[HEADER_BYTES..];
        found.push(if u16_at(message, 4) == Some(NLMSG_ERROR) {
            match u32_at(body, 0).ok_or_else(short)?.cast_signed() {
                0 => Answer::Done,
                negative => Answer::Refused(negative.saturating_neg()),
            }
        } else {
            Answer::Attributes(body.get(GENERIC_HEADER_BYTES..).ok_or_else(short)?)
        });
    }
    Ok(found)
}

/// The value of the first attribute of a kind.
pub fn attribute(mut bytes: &[u8], kind: u16) -> Option<&[u8]> {
    while let (Some(length), Some(found)) = (u16_at(bytes, 0), u16_at(bytes, 2)) {
        let length = usize::from(length);
        let value = bytes.get(ATTRIBUTE_HEADER_BYTES..length)?;
        if found & NLA_TYPE_MASK == kind {
            return Some(value);
        }
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    None
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// A part of the kernel that was found by its name.
#[derive(Debug)]
pub struct Family {
    socket: OwnedFd,
    id: u16,
    sequence: u32,
}

impl Family {
    /// Looks a family up; `NotFound` where the kernel has none of that name, as before its module
    /// is loaded.
    pub fn find(name: &str) -> io::Result<Family> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(netlink::GENERIC),
        )?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        let mut control = Family { socket, id: GENL_ID_CTRL, sequence: 0 };
        let id = control.ask(CTRL_CMD_GETFAMILY, CTRL_VERSION, |request| {
            request.put(CTRL_ATTR_FAMILY_NAME, &[name.as_bytes(), b"\0"].concat());
        })?;
        let id = attribute(&id, CTRL_ATTR_FAMILY_ID).and_then(|id| u16_at(id, 0));
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "a family without an id");
        Ok(Family { id: id.ok_or_else(missing)?, ..control })
    }

    /// Sends a command and gives the attributes of its answer, which may be none.
    pub fn ask(
        &mut self,
        command: u8,
        version: u8,
        fill: impl FnOnce(&mut Request),
    ) -> io::Result<Vec<u8>> {
        self.sequence += 1;
        let mut request = Request::new(self.id, self.sequence, command, version);
        fill(&mut request);
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.socket, &request.finish(), SendFlags::empty(), &kernel)?;
        let mut attributes = Vec::new();
        let mut buffer = vec![0; ANSWER_BYTES];
        loop {
            let (_, count) = rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            for answer in answers(&buffer[..count.min(ANSWER_BYTES)], self.sequence)? {
                match answer {
                    Answer::Done => return Ok(attributes),
                    Answer::Refused(number) => return Err(io::Error::from_raw_os_error(number)),
                    Answer::Attributes(bytes) => attributes = bytes.to_vec(),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER_BYTES + body.len()).unwrap();
        let mut bytes = Vec::new();
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(0_u16.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(77_u32.to_ne_bytes());
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// The bytes are those of a little-endian host.
    #[test]
    #[cfg(target_endian = "little")]
    fn a_request_is_laid_out_as_the_kernel_reads_it() {
        let mut request = Request::new(GENL_ID_CTRL, 9, CTRL_CMD_GETFAMILY, CTRL_VERSION);
        request.put(CTRL_ATTR_FAMILY_NAME, b"nbd\0");
        request.nest(7, |inner| inner.put(1, &[5]));
        let expected = [
            &[40, 0, 0, 0, 16, 0, 5, 0, 9, 0, 0, 0, 0, 0, 0, 0][..],
            &[3, 2, 0, 0],
            &[8, 0, 2, 0, b'n', b'b', b'd', 0],
            &[12, 0, 7, 0x80, 5, 0, 1, 0, 5, 0, 0, 0],
        ];
        assert_eq!(request.finish(), expected.concat());
    }

    #[test]
    fn answers_are_told_apart() {
        let mut attributes = Request::new(30, 5, 1, 1);
        attributes.put(3, b"abc");
        attributes.put_u32(1, 4);
        let attributes = &attributes.finish()[HEADER_BYTES..];
        let stream = [
            message(30, 4, &[0; 8]),
            message(30, 5, attributes),
            message(NLMSG_ERROR, 5, &0_i32.to_ne_bytes()),
            message(NLMSG_ERROR, 5, &(-2_i32).to_ne_bytes()),
        ]
        .concat();
        let found = answers(&stream, 5).unwrap();
        let [Answer::Attributes(bytes), Answer::Done, Answer::Refused(2)] = found[..] else {
            panic!("{found:?}");
        };
        assert_eq!(attribute(bytes, 3), Some(&b"abc"[..]));
        assert_eq!(attribute(bytes, 1), Some(&4_u32.to_ne_bytes()[..]));
        assert_eq!(attribute(bytes, 2), None);
    }

    #[test]
    fn no_cut_or_length_leads_astray() {
        let stream = message(NLMSG_ERROR, 5, &0_i32.to_ne_bytes());
        for len in 1..stream.len() {
            assert!(answers(&stream[..len], 5).is_err(), "{len}");
        }
        for length in 0..64_u32 {
            let mut bad = stream.clone();
            bad[..4].copy_from_slice(&length.to_ne_bytes());
            // It may be an error or not; it ends and does not panic.
            let _ = answers(&bad, 5);
            let mut bad = vec![0; 16];
            bad[..2].copy_from_slice(&u16::try_from(length).unwrap().to_ne_bytes());
            assert!(!(4..=16).contains(&length) || attribute(&bad, 0).is_some());
            let _ = attribute(&bad, 9);
        }
    }

    /// The controller is a family of its own that every kernel has.
    #[test]
    fn the_kernel_answers() {
        let family = Family::find("nlctrl").unwrap();
        assert_eq!(family.id, GENL_ID_CTRL);
        let error = Family::find("no-such-family").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
