//! What can go wrong with an image, and where it came from.

use std::error::Error as StdError;
use std::fmt;
use std::io;

/// A `Result` of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// The kinds of failure, for matching.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An option, a list or a reference that makes no sense.
    InvalidInput,

    /// An archive or a layer that breaks a rule, or lies: see the message for entry and layer.
    BadArchive,

    /// More entries or bytes than the caller allows.
    Limit,

    /// A tree that does not fit into the wanted size, or that ext4 cannot hold.
    DoesNotFit,

    /// A file, path, tag or layer that is not there.
    NotFound,

    /// A file that changed while it was read.
    Changed,

    /// An image whose structures contradict each other or fail their checksums.
    Corrupt,

    /// An image with a feature that this crate does not know, or a tree that it cannot write.
    Unsupported,

    /// A request that would lose data.
    Refused,

    /// The caller asked to stop.
    Cancelled,

    /// Reading or writing failed.
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

    /// A failed read or write, with what was being done.
    pub fn io(context: impl Into<String>, source: io::Error) -> Error {
        // A failure of ours that passed through a `Read`.
        let source = match source.downcast::<Error>() {
            Ok(error) => {
                let (kind, context) = (error.kind, context.into());
                return Error { kind, context, source: Some(Box::new(error)) };
            }
            Err(source) => source,
        };
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            _ => ErrorKind::Io,
        };
        Error { kind, context: context.into(), source: Some(Box::new(source)) }
    }

    /// The same failure, with what was being done around it.
    #[must_use]
    pub fn within(self, context: impl Into<String>) -> Error {
        Error { kind: self.kind, context: context.into(), source: Some(Box::new(self)) }
    }

    /// The same failure, as one of another kind: what is wrong in an option may be damage in an
    /// archive.
    #[must_use]
    pub(crate) fn of_kind(self, kind: ErrorKind) -> Error {
        Error { kind, ..self }
    }

    /// The request was given up because its caller said so.
    pub fn cancelled() -> Error {
        Error::new(ErrorKind::Cancelled, "cancelled")
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

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        io::Error::other(error)
    }
}

/// Turns the errors of files into ours, saying what was being done.
pub(crate) trait Context<T> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::io(context(), source))
    }
}

/// A structure of an image that is not what it should be.
pub(crate) fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}
