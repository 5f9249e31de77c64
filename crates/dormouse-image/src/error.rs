//! What can be wrong with an image's structures.

use std::fmt;
use std::io;

/// A `Result` of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// The kinds of failure, for matching.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A structure breaks a rule of its format, or a checksum or digest does not match.
    Corrupt,

    /// A structure is of a later version or uses something that this build does not know.
    Unsupported,

    /// A block, node or segment was dropped from the file or never was in it.
    Missing,

    /// A pack was written under a key that is not the one at hand.
    WrongKey,

    /// Reading or writing failed.
    Io,
}

/// A failure with what was looked at, where, what was found and what was expected.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    what: &'static str,
    offset: Option<u64>,
    got: String,
    expected: String,
    source: Option<io::Error>,
}

impl Error {
    /// A structure that is not as its format says.
    pub fn corrupt(
        what: &'static str,
        got: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Error {
        Error::new(ErrorKind::Corrupt, what, got, expected)
    }

    /// A structure that this build is too old for.
    pub fn unsupported(
        what: &'static str,
        got: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Error {
        Error::new(ErrorKind::Unsupported, what, got, expected)
    }

    /// Something that is not there.
    pub fn missing(
        what: &'static str,
        got: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Error {
        Error::new(ErrorKind::Missing, what, got, expected)
    }

    /// A pack whose digests cannot be checked with the key at hand.
    pub fn wrong_key(
        what: &'static str,
        got: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Error {
        Error::new(ErrorKind::WrongKey, what, got, expected)
    }

    /// A failed read or write.
    pub fn io(what: &'static str, source: io::Error) -> Error {
        Error {
            kind: ErrorKind::Io,
            what,
            offset: None,
            got: String::new(),
            expected: String::new(),
            source: Some(source),
        }
    }

    pub(crate) fn new(
        kind: ErrorKind,
        what: &'static str,
        got: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Error {
        Error {
            kind,
            what,
            offset: None,
            got: got.to_string(),
            expected: expected.to_string(),
            source: None,
        }
    }

    /// Adds where in the file it was.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Error {
        self.offset.get_or_insert(offset);
        self
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What was looked at, in the words of `docs/format.md`.
    pub fn what(&self) -> &'static str {
        self.what
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            ErrorKind::Corrupt => write!(f, "corrupt {}", self.what)?,
            ErrorKind::Unsupported => write!(f, "unsupported {}", self.what)?,
            ErrorKind::Missing => write!(f, "missing {}", self.what)?,
            ErrorKind::WrongKey => write!(f, "wrong key for {}", self.what)?,
            ErrorKind::Io => write!(f, "cannot access {}", self.what)?,
        }
        if let Some(offset) = self.offset {
            write!(f, " at byte {offset}")?;
        }
        if !self.got.is_empty() || !self.expected.is_empty() {
            write!(f, ": got {}, expected {}", self.got, self.expected)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as &(dyn std::error::Error + 'static))
    }
}
