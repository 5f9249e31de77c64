//! The frames of the protocol, as functions of their bytes.
//!
//! ```text
//! request    u16 command, 6 bytes (Start: u16 version), u64 length; then so many bytes
//! response   u16 status (1 ok, 2 error), 6 bytes, u64 length; then so many bytes
//! page fault u64 guest-physical address, u64 length
//! ```
//!
//! All little-endian. A second connection starts with a u16: what it is for.

use crate::error::{Error, ErrorKind, Result};

/// Bytes of a request or response.
pub const HEAD_BYTES: usize = 16;

/// The version of the protocol that is spoken here, the only one so far.
pub const PROTOCOL_VERSION: u16 = 0;

/// Bytes of a configuration or state. Those of real guests have some hundreds of KiB.
pub const JSON_BYTES_MAX: u64 = 64 << 20;

/// Bytes of a page: the largest huge page of x86.
pub const PAGE_BYTES_MAX: u64 = 1 << 30;

/// The word with which a connection for page faults starts.
pub const FAULT_CONNECTION: u16 = 2;

/// Commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The first.
    Start,
    /// A configuration.
    Config,
    /// The state.
    State,
    /// Bytes of memory, of a migration that is not local.
    Memory,
    /// The last; the guest is to run.
    Complete,
    /// The sender gave up.
    Abandon,
    /// A descriptor of memory.
    MemoryFd,
    /// The last; the guest stays paused.
    CompletePaused,
    /// A page is missing.
    PageFault,
}

const COMMANDS: [(u16, Command); 9] = [
    (1, Command::Start),
    (2, Command::Config),
    (3, Command::State),
    (4, Command::Memory),
    (5, Command::Complete),
    (6, Command::Abandon),
    (7, Command::MemoryFd),
    (8, Command::CompletePaused),
    (9, Command::PageFault),
];

/// A request's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What.
    pub command: Command,
    /// Of a start: the version of the protocol.
    pub version: u16,
    /// Bytes that follow.
    pub length: u64,
}

/// How a response turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Well.
    Ok,
    /// Not.
    Error,
}

/// A response's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// How it turned out.
    pub status: Status,
    /// Bytes that follow.
    pub length: u64,
}

/// A page that is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// Its guest-physical address.
    pub gpa: u64,
    /// Its bytes.
    pub length: u64,
}

impl Request {
    /// A request of this protocol's version.
    pub fn new(command: Command, length: u64) -> Request {
        Request { command, version: PROTOCOL_VERSION, length }
    }

    /// Reads one, and refuses lengths that its command cannot have.
    pub fn parse(bytes: &[u8; HEAD_BYTES]) -> Result<Request> {
        let [a, b, c, d, ..] = *bytes;
        let code = u16::from_le_bytes([a, b]);
        let command =
            COMMANDS.iter().find(|(known, _)| *known == code).map(|(_, command)| *command);
        let Some(command) = command else {
            return Err(bad(format!("command {code}")));
        };
        let version = u16::from_le_bytes([c, d]);
        let length = length(bytes);
        let is_possible = match command {
            Command::Start | Command::Complete | Command::CompletePaused | Command::Abandon => {
                length == 0
            }
            Command::Config | Command::State => (1..=JSON_BYTES_MAX).contains(&length),
            Command::MemoryFd => length == 4,
            Command::PageFault => length == 16,
            Command::Memory => true,
        };
        if !is_possible {
            return Err(bad(format!("{command:?} with {length} bytes")));
        }
        if command == Command::Start && version != PROTOCOL_VERSION {
            let context = format!(
                "Cloud Hypervisor speaks version {version} of its migration protocol, \
                 and {PROTOCOL_VERSION} is known here"
            );
            return Err(Error::new(ErrorKind::Incompatible, context));
        }
        Ok(Request { command, version, length })
    }

    /// Its bytes.
    pub fn to_bytes(self) -> [u8; HEAD_BYTES] {
        let code = COMMANDS.iter().find(|(_, command)| *command == self.command);
        head(code.map_or(0, |(code, _)| *code), self.version, self.length)
    }
}

impl Response {
    /// Reads one.
    pub fn parse(bytes: &[u8; HEAD_BYTES]) -> Result<Response> {
        let status = match u16::from_le_bytes([bytes[0], bytes[1]]) {
            1 => Status::Ok,
            2 => Status::Error,
            other => return Err(bad(format!("status {other}"))),
        };
        Ok(Response { status, length: length(bytes) })
    }

    /// Its bytes.
    pub fn to_bytes(self) -> [u8; HEAD_BYTES] {
        let code = match self.status {
            Status::Ok => 1,
            Status::Error => 2,
        };
        head(code, 0, self.length)
    }
}

impl PageFault {
    /// Reads one, and refuses what is no page.
    pub fn parse(bytes: &[u8; 16]) -> Result<PageFault> {
        let [gpa, length] = [0, 8].map(|at| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        });
        let is_page = length.is_power_of_two()
            && (4096..=PAGE_BYTES_MAX).contains(&length)
            && gpa.is_multiple_of(length)
            && gpa.checked_add(length).is_some();
        if !is_page {
            return Err(bad(format!("a page of {length:#x} bytes at {gpa:#x}")));
        }
        Ok(PageFault { gpa, length })
    }

    /// Its bytes.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.gpa.to_le_bytes());
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }
}

fn length(bytes: &[u8; HEAD_BYTES]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[8..]);
    u64::from_le_bytes(word)
}

fn head(code: u16, version: u16, length: u64) -> [u8; HEAD_BYTES] {
    let mut bytes = [0; HEAD_BYTES];
    bytes[..2].copy_from_slice(&code.to_le_bytes());
    bytes[2..4].copy_from_slice(&version.to_le_bytes());
    bytes[8..].copy_from_slice(&length.to_le_bytes());
    bytes
}

fn bad(what: String) -> Error {
    Error::new(ErrorKind::Protocol, format!("Cloud Hypervisor's migration protocol: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_go_there_and_back() {
        for (_, command) in COMMANDS {
            let length = match command {
                Command::MemoryFd => 4,
                Command::PageFault => 16,
                Command::Config | Command::State | Command::Memory => 100,
                _ => 0,
            };
            let request = Request::new(command, length);
            assert_eq!(Request::parse(&request.to_bytes()).unwrap(), request);
        }
        for status in [Status::Ok, Status::Error] {
            let response = Response { status, length: 4096 };
            assert_eq!(Response::parse(&response.to_bytes()).unwrap(), response);
        }
        let fault = PageFault { gpa: 1 << 32, length: 1 << 21 };
        assert_eq!(PageFault::parse(&fault.to_bytes()).unwrap(), fault);
        let start = [1, 0, 0, 0, 9, 9, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(Request::parse(&start).unwrap(), Request::new(Command::Start, 0));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let mut newer = Request::new(Command::Start, 0);
        newer.version = 1;
        let error = Request::parse(&newer.to_bytes()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Incompatible);
        for (command, length) in [
            (Command::Config, JSON_BYTES_MAX + 1),
            (Command::State, 0),
            (Command::MemoryFd, 8),
            (Command::Complete, 1),
        ] {
            assert!(Request::parse(&Request::new(command, length).to_bytes()).is_err());
        }
        assert!(Request::parse(&[0; HEAD_BYTES]).is_err());
        assert!(Response::parse(&[0; HEAD_BYTES]).is_err());
        for (gpa, length) in [(0, 0), (0, 100), (4096, 8192), (0, 1 << 31), (u64::MAX - 4095, 4096)]
        {
            assert!(PageFault::parse(&PageFault { gpa, length }.to_bytes()).is_err());
        }
    }
}
