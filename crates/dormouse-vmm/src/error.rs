//! What can go wrong between us and a VMM, and what the user can do about it.
//!
//! What a VMM answered is kept as it was said ([`Answer`]): which call, which status, which words.

use std::error::Error as StdError;
use std::fmt;
use std::io;

/// A `Result` of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// The kinds of failure, for matching.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A name, path or combination that is not allowed; nothing was asked of the VMM.
    InvalidInput,

    /// A program, socket or file that is not there.
    NotFound,

    /// The VMM understood, and said no. It goes on as before.
    Refused,

    /// The VMM did not answer in time. What it does with the request is not known.
    Timeout,

    /// The VMM's process or its socket is gone.
    Gone,

    /// This version of the VMM cannot do it, or not with this snapshot.
    Incompatible,

    /// The VMM said something that its protocol has no room for.
    Protocol,

    /// A file of the VMM's is not what it should be.
    InvalidFile,

    /// Who takes the guest's memory could not.
    Sink,

    /// Reading, writing or starting a thread failed.
    Io,
}

/// What a VMM answered to a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The call, such as `PUT /snapshot/create` or `migrate`.
    pub call: String,

    /// The HTTP status, where there is one.
    pub status: Option<u16>,

    /// Its words, cut to [`Answer::BODY_CHARS_MAX`].
    pub body: String,
}

impl Answer {
    /// Characters of a body that are kept. Firecracker's longest messages have some hundreds.
    pub const BODY_CHARS_MAX: usize = 4096;

    /// An answer, its body cut.
    pub fn new(call: impl Into<String>, status: Option<u16>, body: &str) -> Answer {
        let body = body.trim().chars().take(Answer::BODY_CHARS_MAX).collect();
        Answer { call: call.into(), status, body }
    }
}

/// A failure with what was being done, and where it came from.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    answer: Option<Box<Answer>>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// A failure that is its own cause.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Error {
        Error { kind, context: context.into(), answer: None, source: None }
    }

    /// A failed system call, with what was being done.
    pub fn io(context: impl Into<String>, source: io::Error) -> Error {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ErrorKind::Timeout,
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::UnexpectedEof => ErrorKind::Gone,
            _ => ErrorKind::Io,
        };
        Error { kind, context: context.into(), answer: None, source: Some(Box::new(source)) }
    }

    /// A failed read or write of a file, whose end or absence says nothing about the VMM.
    pub(crate) fn file(context: impl Into<String>, source: io::Error) -> Error {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => ErrorKind::InvalidFile,
            _ => ErrorKind::Io,
        };
        Error { kind, context: context.into(), answer: None, source: Some(Box::new(source)) }
    }

    /// A failure with a cause.
    pub fn with_source(
        kind: ErrorKind,
        context: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Error {
        Error { kind, context: context.into(), answer: None, source: Some(source.into()) }
    }

    /// A VMM that said no.
    pub(crate) fn refused(answer: Answer) -> Error {
        let status = answer.status.map(|status| format!(" with status {status}"));
        let context = format!(
            "the VMM refused {}{}: {}",
            answer.call,
            status.unwrap_or_default(),
            if answer.body.is_empty() { "(no words)" } else { &answer.body },
        );
        Error { kind: ErrorKind::Refused, context, answer: Some(Box::new(answer)), source: None }
    }

    /// This failure, with what the VMM answered.
    #[must_use]
    pub(crate) fn with_answer(mut self, answer: Answer) -> Error {
        self.answer = Some(Box::new(answer));
        self
    }

    /// This failure with another kind, where the caller knows better what it means.
    #[must_use]
    pub fn into_kind(mut self, kind: ErrorKind) -> Error {
        self.kind = kind;
        self
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What the VMM answered, if it did.
    pub fn answer(&self) -> Option<&Answer> {
        self.answer.as_deref()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_call_status_and_words() {
        let body = format!("{{\"fault_message\":\"{}\"}}", "x".repeat(10_000));
        let error = Error::refused(Answer::new("PUT /snapshot/load", Some(400), &body));
        assert_eq!(error.kind(), ErrorKind::Refused);
        let text = error.to_string();
        assert!(text.starts_with("the VMM refused PUT /snapshot/load with status 400: {\"fault"));
        let answer = error.answer().unwrap();
        assert_eq!(answer.body.chars().count(), Answer::BODY_CHARS_MAX);
        let silent = Error::refused(Answer::new("stop", None, ""));
        assert_eq!(silent.to_string(), "the VMM refused stop: (no words)");
    }
}
