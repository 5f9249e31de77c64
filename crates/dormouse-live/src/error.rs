//! What can go wrong with a live disk, and what the user can do about it.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::io;

/// A `Result` of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// The kinds of failure, for matching. A server turns each into an errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A range, size or name that is not allowed.
    InvalidInput,

    /// A file that is not there.
    NotFound,

    /// Something that is there already.
    AlreadyExists,

    /// Another process has the disk, or another commit of it is under way.
    Busy,

    /// A structure that is not what it should be, or a file that somebody cut short.
    Corrupt,

    /// A structure of a later version.
    Unsupported,

    /// The file system under the overlay is full.
    NoSpace,

    /// Reading or writing failed.
    Io,

    /// An earlier request failed to write, and its bytes were not written again since.
    Unresolved,

    /// Something failed after which the overlay's files cannot be believed before it is opened
    /// again.
    Poisoned,
}

/// A failure with what was being done, and where it came from. One that is known beforehand allocates
/// nothing.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: Cow<'static, str>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// A failure that is its own cause.
    pub fn new(kind: ErrorKind, context: impl Into<Cow<'static, str>>) -> Error {
        Error { kind, context: context.into(), source: None }
    }

    /// A failed read or write, with what was being done.
    pub fn io(context: impl Into<Cow<'static, str>>, source: io::Error) -> Error {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Error { kind, context: context.into(), source: Some(Box::new(source)) }
    }

    /// A failure with a cause.
    pub fn with_source(
        kind: ErrorKind,
        context: impl Into<Cow<'static, str>>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Error {
        Error { kind, context: context.into(), source: Some(source.into()) }
    }

    /// A structure that breaks a rule of its format.
    pub(crate) fn corrupt(
        what: &str,
        got: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Error {
        Error::new(ErrorKind::Corrupt, format!("corrupt {what}: got {got}, expected {expected}"))
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

/// Turns the errors of files into ours, saying what was being done.
pub(crate) trait Context<T> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::io(context(), source))
    }
}
