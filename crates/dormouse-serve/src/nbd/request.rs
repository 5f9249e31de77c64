//! Requests: their headers, and what is wrong with them, decided without I/O.

use std::ops::Range;
use std::time::Instant;

use zerocopy::FromBytes;

use super::handshake::ReplyForm;
use super::limits::{DISCARD_BYTES_MAX, PAYLOAD_BYTES_MAX};
use super::meta::Selected;
use super::protocol::{
    CompactRequest, EXTENDED_REQUEST_MAGIC, Errno, ExtendedRequest, REQUEST_MAGIC, command,
    command_flag as flag,
};
use crate::device::{DeviceErrorKind, Durability, ZeroMode};
use crate::error::{Error, Result};

/// A header of either form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// A request that a device can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    pub(crate) durability: Durability,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) arrived: Instant,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read { whole: bool },
    Write,
    Flush,
    Trim,
    Cache,
    Zero(ZeroMode),
    BlockStatus { one: bool, contexts: ContextSet },
}

/// Of the contexts that a client selected, those that a BLOCK_STATUS is about, by their ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ContextSet(u64);

impl ContextSet {
    pub(crate) const ALL: ContextSet = ContextSet(u64::MAX);

    pub(crate) fn has(self, id: u32) -> bool {
        self.0 & ContextSet::bit(id) != 0
    }

    /// No device has 63 contexts; any beyond would share a bit.
    fn bit(id: u32) -> u64 {
        1 << id.min(63)
    }
}

/// Why a request is answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) errno: Errno,
    pub(crate) message: &'static str,
}

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    pub(crate) form: ReplyForm,
    pub(crate) size_bytes: u64,
    pub(crate) read_only: bool,
    pub(crate) has_contexts: bool,
    pub(crate) stopping: bool,
}

impl ReplyForm {
    pub(crate) fn request_bytes(self) -> usize {
        match self {
            ReplyForm::Simple | ReplyForm::Structured => size_of::<CompactRequest>(),
            ReplyForm::Extended => size_of::<ExtendedRequest>(),
        }
    }
}

impl Header {
    /// Reads [`ReplyForm::request_bytes`] bytes. A wrong magic ends the connection: nobody knows
    /// where the next request begins.
    pub(crate) fn parse(bytes: &[u8], form: ReplyForm) -> Result<Header> {
        let (magic, wanted, header) = if form == ReplyForm::Extended {
            let Ok(request) = ExtendedRequest::read_from_bytes(bytes) else {
                return Err(Error::protocol("a request header of the wrong size"));
            };
            let header = Header {
                flags: request.flags.get(),
                command: request.command.get(),
                cookie: request.cookie.get(),
                offset: request.offset.get(),
                length: request.length.get(),
            };
            (request.magic.get(), EXTENDED_REQUEST_MAGIC, header)
        } else {
            let Ok(request) = CompactRequest::read_from_bytes(bytes) else {
                return Err(Error::protocol("a request header of the wrong size"));
            };
            let header = Header {
                flags: request.flags.get(),
                command: request.command.get(),
                cookie: request.cookie.get(),
                offset: request.offset.get(),
                length: u64::from(request.length.get()),
            };
            (request.magic.get(), REQUEST_MAGIC, header)
        };
        if magic != wanted {
            return Err(Error::protocol(format!("request magic {magic:#x}, not {wanted:#x}")));
        }
        Ok(header)
    }

    /// A BLOCK_STATUS with a payload, which says how many bytes it is about and which of the
    /// selected contexts: the same without a payload, and these contexts.
    pub(crate) fn narrowed(
        self,
        payload: &[u8],
        selected: &[Selected],
    ) -> std::result::Result<(Header, ContextSet), Refusal> {
        let wrong = |message| refuse(Errno::Einval, message);
        let Some((length, ids)) = payload.split_first_chunk::<8>() else {
            return wrong("a payload without a length");
        };
        let (ids, rest) = ids.as_chunks::<4>();
        if ids.is_empty() || !rest.is_empty() {
            return wrong("a payload of no whole contexts");
        }
        let mut contexts = ContextSet(0);
        for id in ids.iter().map(|id| u32::from_be_bytes(*id)) {
            if !selected.iter().any(|one| one.id == id) {
                return wrong("a context that was not selected");
            }
            if contexts.has(id) {
                return wrong("a context twice");
            }
            contexts.0 |= ContextSet::bit(id);
        }
        let flags = self.flags & !flag::PAYLOAD_LEN;
        Ok((Header { flags, length: u64::from_be_bytes(*length), ..self }, contexts))
    }

    /// Bytes that follow the header, whatever becomes of the request.
    pub(crate) fn payload_bytes(&self, form: ReplyForm) -> Result<u64> {
        let has_payload = match form {
            ReplyForm::Extended => self.flags & flag::PAYLOAD_LEN != 0,
            ReplyForm::Simple | ReplyForm::Structured => self.command == command::WRITE,
        };
        let bytes = if has_payload { self.length } else { 0 };
        if bytes > DISCARD_BYTES_MAX {
            return Err(Error::protocol(format!("a payload of {bytes} bytes")));
        }
        Ok(bytes)
    }

    /// The request, or what is wrong with it. DISC is not for here.
    pub(crate) fn check(
        &self,
        facts: &Facts,
        arrived: Instant,
    ) -> std::result::Result<Request, Refusal> {
        if facts.stopping {
            return refuse(Errno::Eshutdown, "the server is stopping");
        }
        let (kind, known_flags) = self.kind(facts)?;
        if self.flags & !known_flags != 0 {
            return refuse(Errno::Einval, "a flag that this command does not have");
        }
        let extended_write = facts.form == ReplyForm::Extended && kind == Kind::Write;
        if extended_write && self.flags & flag::PAYLOAD_LEN == 0 {
            return refuse(Errno::Einval, "a write without its payload");
        }
        let writes = matches!(kind, Kind::Write | Kind::Trim | Kind::Zero(_));
        if writes && facts.read_only {
            return refuse(Errno::Eperm, "the export is read-only");
        }
        if matches!(kind, Kind::BlockStatus { .. }) {
            if !facts.has_contexts {
                return refuse(Errno::Einval, "no metadata context was selected");
            }
            if self.length == 0 {
                return refuse(Errno::Einval, "block status of no bytes");
            }
        }
        if matches!(kind, Kind::Read { .. } | Kind::Write)
            && self.length > u64::from(PAYLOAD_BYTES_MAX)
        {
            return match kind {
                Kind::Read { whole: true } => {
                    refuse(Errno::Eoverflow, "more than 32 MiB in one chunk")
                }
                _ => refuse(Errno::Einval, "more than 32 MiB in one request"),
            };
        }
        let past_end =
            self.offset.checked_add(self.length).is_none_or(|end| end > facts.size_bytes);
        // Offset and length of a flush are reserved; it means everything whatever they say.
        if past_end && kind != Kind::Flush {
            return match kind {
                Kind::Write | Kind::Zero(_) => refuse(Errno::Enospc, "past the end of the export"),
                _ => refuse(Errno::Einval, "past the end of the export"),
            };
        }
        let fua = writes && self.flags & flag::FUA != 0;
        Ok(Request {
            kind,
            durability: if fua { Durability::Now } else { Durability::Later },
            cookie: self.cookie,
            offset: self.offset,
            length: if kind == Kind::Flush { 0 } else { self.length },
            arrived,
        })
    }

    /// The command, and the flags that may come with it. FUA may come with each.
    fn kind(&self, facts: &Facts) -> std::result::Result<(Kind, u16), Refusal> {
        let has = |bit: u16| self.flags & bit != 0;
        let when = |condition: bool, bit: u16| if condition { bit } else { 0 };
        let structured = facts.form != ReplyForm::Simple;
        let extended = facts.form == ReplyForm::Extended;
        let (kind, flags) = match self.command {
            command::READ => (Kind::Read { whole: has(flag::DF) }, when(structured, flag::DF)),
            command::WRITE => (Kind::Write, when(extended, flag::PAYLOAD_LEN)),
            command::FLUSH => (Kind::Flush, 0),
            command::TRIM => (Kind::Trim, 0),
            command::CACHE => (Kind::Cache, 0),
            command::WRITE_ZEROES => {
                let mode =
                    ZeroMode { may_punch: !has(flag::NO_HOLE), fast_only: has(flag::FAST_ZERO) };
                (Kind::Zero(mode), flag::NO_HOLE | flag::FAST_ZERO)
            }
            command::BLOCK_STATUS => {
                let one = has(flag::REQ_ONE);
                (Kind::BlockStatus { one, contexts: ContextSet::ALL }, flag::REQ_ONE)
            }
            _ => return refuse(Errno::Einval, "unknown command"),
        };
        Ok((kind, flags | flag::FUA))
    }
}

impl Request {
    /// The same, about these contexts only.
    pub(crate) fn about(self, only: ContextSet) -> Request {
        let kind = match self.kind {
            Kind::BlockStatus { one, .. } => Kind::BlockStatus { one, contexts: only },
            kind => kind,
        };
        Request { kind, ..self }
    }

    pub(crate) fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.length
    }
}

impl From<DeviceErrorKind> for Refusal {
    fn from(kind: DeviceErrorKind) -> Refusal {
        let (errno, message) = match kind {
            DeviceErrorKind::Io => (Errno::Eio, "the device could not read or write"),
            DeviceErrorKind::NoSpace => (Errno::Enospc, "the device has no room left"),
            DeviceErrorKind::ReadOnly => (Errno::Eperm, "the device is read-only"),
            DeviceErrorKind::NotSupported => (Errno::Enotsup, "the device cannot do that"),
            DeviceErrorKind::Invalid => (Errno::Einval, "the device does not understand that"),
            DeviceErrorKind::Shutdown => (Errno::Eshutdown, "the device is shutting down"),
        };
        Refusal { errno, message }
    }
}

fn refuse<T>(errno: Errno, message: &'static str) -> std::result::Result<T, Refusal> {
    Err(Refusal { errno, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn facts(form: ReplyForm) -> Facts {
        Facts { form, size_bytes: 64 * MIB, read_only: false, has_contexts: true, stopping: false }
    }

    fn verdict(facts: &Facts, command: u16, flags: u16, offset: u64, length: u64) -> Option<Errno> {
        let header = Header { flags, command, cookie: 9, offset, length };
        header.check(facts, Instant::now()).err().map(|refusal| refusal.errno)
    }

    #[test]
    fn every_wrong_thing_has_its_number() {
        use ReplyForm::{Extended, Simple, Structured};
        let end = 64 * MIB;
        for (form, command, flags, offset, length, expected) in [
            (Simple, command::READ, 0, 0, 4096, None),
            (Simple, command::READ, 0, end, 0, None),
            (Simple, command::READ, flag::FUA, 1, 1, None),
            (Simple, command::READ, flag::DF, 0, 1, Some(Errno::Einval)),
            (Structured, command::READ, flag::DF, 0, 1, None),
            (Structured, command::READ, flag::NO_HOLE, 0, 1, Some(Errno::Einval)),
            (Simple, command::READ, 0, end - 1, 2, Some(Errno::Einval)),
            (Simple, command::READ, 0, u64::MAX, 2, Some(Errno::Einval)),
            (Simple, command::READ, 0, 0, 32 * MIB, None),
            (Simple, command::READ, 0, 0, 32 * MIB + 1, Some(Errno::Einval)),
            (Structured, command::READ, flag::DF, 0, 32 * MIB + 1, Some(Errno::Eoverflow)),
            (Simple, command::WRITE, flag::FUA, 0, 32 * MIB, None),
            (Simple, command::WRITE, 0, 0, 32 * MIB + 1, Some(Errno::Einval)),
            (Simple, command::WRITE, 0, end, 1, Some(Errno::Enospc)),
            (Simple, command::WRITE, flag::PAYLOAD_LEN, 0, 1, Some(Errno::Einval)),
            (Extended, command::WRITE, flag::PAYLOAD_LEN, 0, 1, None),
            (Extended, command::WRITE, 0, 0, 1, Some(Errno::Einval)),
            (Extended, command::READ, flag::PAYLOAD_LEN, 0, 1, Some(Errno::Einval)),
            (Simple, command::FLUSH, 0, u64::MAX, 7, None),
            (Simple, command::FLUSH, flag::REQ_ONE, 0, 0, Some(Errno::Einval)),
            (Simple, command::TRIM, flag::FUA, 0, end, None),
            (Simple, command::TRIM, 0, 1, end, Some(Errno::Einval)),
            (Simple, command::WRITE_ZEROES, 0x13, 0, end, None),
            (Simple, command::WRITE_ZEROES, flag::DF, 0, 1, Some(Errno::Einval)),
            (Extended, command::WRITE_ZEROES, 0, 0, u64::MAX, Some(Errno::Enospc)),
            (Simple, command::CACHE, 0, 0, end, None),
            (Simple, command::CACHE, 0, end, 1, Some(Errno::Einval)),
            (Structured, command::BLOCK_STATUS, flag::REQ_ONE, 0, end, None),
            (Structured, command::BLOCK_STATUS, 0, 0, 0, Some(Errno::Einval)),
            (Structured, command::BLOCK_STATUS, 0, end, 1, Some(Errno::Einval)),
            (Simple, 8, 0, 0, 0, Some(Errno::Einval)),
            (Simple, u16::MAX, u16::MAX, u64::MAX, u64::MAX, Some(Errno::Einval)),
        ] {
            let got = verdict(&facts(form), command, flags, offset, length);
            assert_eq!(got, expected, "{form:?} {command} {flags:#x} {offset}+{length}");
        }
    }

    #[test]
    fn what_the_export_is_decides_too() {
        let read_only = Facts { read_only: true, ..facts(ReplyForm::Structured) };
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(verdict(&read_only, command, 0, 0, 1), Some(Errno::Eperm));
        }
        assert_eq!(verdict(&read_only, command::READ, 0, 0, 1), None);
        assert_eq!(verdict(&read_only, command::FLUSH, 0, 0, 0), None);
        let stopping = Facts { stopping: true, ..facts(ReplyForm::Structured) };
        assert_eq!(verdict(&stopping, command::READ, 0, 0, 1), Some(Errno::Eshutdown));
        let plain = Facts { has_contexts: false, ..facts(ReplyForm::Structured) };
        assert_eq!(verdict(&plain, command::BLOCK_STATUS, 0, 0, 1), Some(Errno::Einval));
    }

    #[test]
    fn flags_and_command_are_two_fields() {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend([0, 3, 0, 6]);
        bytes.extend([0; 20]);
        let header = Header::parse(&bytes, ReplyForm::Simple).unwrap();
        assert_eq!((header.flags, header.command), (3, 6));
        let request = header.check(&facts(ReplyForm::Simple), Instant::now()).unwrap();
        assert_eq!(request.kind, Kind::Zero(ZeroMode { may_punch: false, fast_only: false }));
        assert_eq!(request.durability, Durability::Now);
    }

    #[test]
    fn payloads_are_known_before_the_request_is_understood() {
        let header =
            |command, flags, length| Header { flags, command, cookie: 0, offset: 0, length };
        let write = header(command::WRITE, 0xfff0, 77);
        assert_eq!(write.payload_bytes(ReplyForm::Simple).unwrap(), 77);
        let read = header(command::READ, flag::PAYLOAD_LEN, 77);
        assert_eq!(read.payload_bytes(ReplyForm::Structured).unwrap(), 0);
        assert_eq!(read.payload_bytes(ReplyForm::Extended).unwrap(), 77);
        let huge = header(command::WRITE, flag::PAYLOAD_LEN, 1 << 32);
        assert!(huge.payload_bytes(ReplyForm::Extended).is_err());
    }
}
