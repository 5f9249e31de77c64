//! What can go wrong in a store, and what the user can do about it.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::io;

use dormouse_image::error::{Error as ImageError, ErrorKind as ImageErrorKind};

/// A `Result` of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// The kinds of failure, for matching. The command turns each into an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A name, number, size or combination that is not allowed.
    InvalidInput,

    /// A store, snapshot, image or file that is not there.
    NotFound,

    /// Something that is there already.
    AlreadyExists,

    /// Somebody else published a snapshot of the name meanwhile.
    Conflict,

    /// A request that would lose or mix up data.
    Refused,

    /// A structure or block that is not what it should be.
    Corrupt,

    /// A store or structure of a later version.
    Unsupported,

    /// The key of the store's digests is missing or another one.
    Key,

    /// Somebody else holds what is needed.
    Busy,

    /// The caller asked to stop.
    Cancelled,

    /// Reading or writing failed.
    Io,
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

    /// A structure of the data model that could not be read or written.
    pub fn image(context: impl Into<Cow<'static, str>>, source: ImageError) -> Error {
        let kind = match source.kind() {
            ImageErrorKind::Unsupported => ErrorKind::Unsupported,
            ImageErrorKind::WrongKey => ErrorKind::Key,
            ImageErrorKind::Io => ErrorKind::Io,
            _ => ErrorKind::Corrupt,
        };
        Error { kind, context: context.into(), source: Some(Box::new(source)) }
    }

    /// The request was given up because its caller said so.
    pub fn cancelled() -> Error {
        Error::new(ErrorKind::Cancelled, "cancelled")
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether the file system or its permissions forbade it.
    pub(crate) fn is_not_allowed(&self) -> bool {
        let cause = self.source.as_ref().and_then(|source| source.downcast_ref::<io::Error>());
        cause.is_some_and(|cause| {
            matches!(
                cause.kind(),
                io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
            )
        })
    }

    /// This failure with another kind, where the caller knows better what it means.
    #[must_use]
    pub fn into_kind(mut self, kind: ErrorKind) -> Error {
        self.kind = kind;
        self
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

/// Turns the errors of files and of the data model into ours, saying what was being done.
pub(crate) trait Context<T> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::io(context(), source))
    }
}

impl<T> Context<T> for dormouse_image::error::Result<T> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::image(context(), source))
    }
}
