//! What can go wrong with a foreign snapshot, and what the user can do about it.

use std::error::Error as StdError;
use std::fmt;
use std::io;

use dormouse_store::error::{Error as StoreError, ErrorKind as StoreErrorKind};

/// A `Result` of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// The kinds of failure, for matching. The command turns each into an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An option or a path that makes no sense.
    InvalidInput,

    /// A file or build that is not there.
    NotFound,

    /// Something that is there already.
    AlreadyExists,

    /// A foreign file that is not what it should be: what, where, got and expected.
    Corrupt,

    /// A version, codec or layout that is not understood.
    Unsupported,

    /// A snapshot whose bytes are known to be wrong, or a request that would mix up data.
    Refused,

    /// What was stored differs from its source.
    Differs,

    /// Another program failed, or is not there.
    Tool,

    /// Reading or writing failed; the cause tells.
    Io,

    /// The store failed; the cause tells.
    Store,
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

    /// A foreign file that is not what it should be.
    pub fn corrupt(context: impl Into<String>) -> Error {
        Error::new(ErrorKind::Corrupt, context)
    }

    /// A failed read or write, with what was being done.
    pub fn io(context: impl Into<String>, source: io::Error) -> Error {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
            _ => ErrorKind::Io,
        };
        Error { kind, context: context.into(), source: Some(Box::new(source)) }
    }

    /// This failure as the cause of another that says where it was.
    #[must_use]
    pub fn within(self, context: impl Into<String>) -> Error {
        Error { kind: self.kind, context: context.into(), source: Some(Box::new(self)) }
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

impl From<StoreError> for Error {
    /// A failure of the store. Where the store was told by a reader of this crate that its source is
    /// damaged, the kind is that of the damage.
    fn from(source: StoreError) -> Error {
        if source.kind() == StoreErrorKind::AlreadyExists {
            // Of what was to be written, which need not be in the store.
            let context = source.to_string();
            let kind = ErrorKind::AlreadyExists;
            return Error { kind, context, source: Some(Box::new(source)) };
        }
        let mut kind = ErrorKind::Store;
        let mut next: Option<&(dyn StdError + 'static)> = Some(&source);
        while let Some(error) = next {
            let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            if let Some(ours) = inner.and_then(|inner| inner.downcast_ref::<Error>()) {
                kind = ours.kind;
            }
            next = error.source();
        }
        Error {
            kind,
            context: "the store did not take it".to_owned(),
            source: Some(Box::new(source)),
        }
    }
}

/// Says what was being done when a read or write failed.
pub(crate) trait Context<T> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::io(context(), source))
    }
}

impl<T> Context<T> for Result<T> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| source.within(context()))
    }
}
