//! What can go wrong when a server starts or serves, and what the user can do about it.
//!
//! Failures of a device are another matter: they are answers to one request
//! ([`DeviceError`](crate::device::DeviceError)) and end nothing.

use std::error::Error as StdError;
use std::fmt;
use std::io;

/// A `Result` of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// The kinds of failure, for matching.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A name, address or combination that is not allowed.
    InvalidInput,

    /// A certificate, key or socket folder that is not there.
    NotFound,

    /// Another server listens there.
    InUse,

    /// Something else has the name.
    AlreadyExists,

    /// A certificate or key that cannot be used.
    Tls,

    /// The peer broke the protocol where it cannot go on.
    Protocol,

    /// The image of a guest's memory cannot be read, or is not what it should be.
    Source,

    /// A page of a guest's own is not where it was.
    Lost,

    /// Something else is under way; try again.
    Busy,

    /// The VMM is gone.
    Gone,

    /// The right to do it is missing.
    NotAllowed,

    /// A thread that answers faults panicked.
    Panicked,

    /// The peer said nothing for too long.
    TimedOut,

    /// Reading, writing or starting a thread failed.
    Io,
}

/// A failure with what was being done, and where it came from.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// A failure that is its own cause.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Error {
        Error { kind, context: context.into(), source: None }
    }

    /// A failed system call, with what was being done.
    pub fn io(context: impl Into<String>, source: io::Error) -> Error {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::AddrInUse => ErrorKind::InUse,
            _ => ErrorKind::Io,
        };
        Error { kind, context: context.into(), source: Some(Box::new(source)) }
    }

    /// A failure with a cause.
    pub fn with_source(
        kind: ErrorKind,
        context: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Error {
        Error { kind, context: context.into(), source: Some(source.into()) }
    }

    /// The peer said something after which nothing it says can be understood.
    pub(crate) fn protocol(context: impl Into<String>) -> Error {
        Error::new(ErrorKind::Protocol, context)
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn StdError + 'static))
    }
}
