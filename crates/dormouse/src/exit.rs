//! What a failure means to a script: one stable exit code and one stable word for each kind.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::process::ExitCode;

use clap::error::ErrorKind as ClapErrorKind;
use dormouse_ext4::error::{Error as Ext4Error, ErrorKind as Ext4ErrorKind};
use dormouse_formats::error::{Error as FormatsError, ErrorKind as FormatsErrorKind};
use dormouse_live::error::{Error as LiveError, ErrorKind as LiveErrorKind};
use dormouse_serve::error::{Error as ServeError, ErrorKind as ServeErrorKind};
use dormouse_store::error::{Error as StoreError, ErrorKind as StoreErrorKind};
use dormouse_store::punch::PunchError;
use dormouse_vmm::error::{Error as VmmError, ErrorKind as VmmErrorKind};
use serde::Serialize;
use serde_json::Value;

/// The kinds of failure. Codes and words are documented in `docs/cli.md` and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Anything that has no kind of its own.
    Other,

    /// A command line, name, number or combination that is not allowed.
    Usage,

    /// A store, snapshot, image or file that is not there.
    NotFound,

    /// Something that is there already.
    AlreadyExists,

    /// Somebody else published a snapshot of the name meanwhile.
    Conflict,

    /// A request that would lose or mix up data.
    Refused,

    /// Something stored is not what it should be.
    Corrupt,

    /// A store or structure of a later version.
    Unsupported,

    /// The key of the store's digests is missing or another one.
    Key,

    /// Somebody else holds what is needed.
    Busy,

    /// Reading or writing failed.
    Io,

    /// Stopped by a signal.
    Cancelled,
}

impl Kind {
    /// The exit code.
    pub(crate) fn code(self) -> u8 {
        match self {
            Kind::Other => 1,
            Kind::Usage => 2,
            Kind::NotFound => 3,
            Kind::AlreadyExists => 4,
            Kind::Conflict => 5,
            Kind::Refused => 6,
            Kind::Corrupt => 7,
            Kind::Unsupported => 8,
            Kind::Key => 9,
            Kind::Busy => 10,
            Kind::Io => 11,
            Kind::Cancelled => 130,
        }
    }

    /// The word in JSON.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Kind::Other => "other",
            Kind::Usage => "usage",
            Kind::NotFound => "not_found",
            Kind::AlreadyExists => "already_exists",
            Kind::Conflict => "conflict",
            Kind::Refused => "refused",
            Kind::Corrupt => "corrupt",
            Kind::Unsupported => "unsupported",
            Kind::Key => "key",
            Kind::Busy => "busy",
            Kind::Io => "io",
            Kind::Cancelled => "cancelled",
        }
    }

    /// The kind that a word in JSON means, such as another process answered with.
    pub(crate) fn from_word(word: &str) -> Kind {
        const ALL: [Kind; 11] = [
            Kind::Usage,
            Kind::NotFound,
            Kind::AlreadyExists,
            Kind::Conflict,
            Kind::Refused,
            Kind::Corrupt,
            Kind::Unsupported,
            Kind::Key,
            Kind::Busy,
            Kind::Io,
            Kind::Cancelled,
        ];
        ALL.into_iter().find(|kind| kind.word() == word).unwrap_or(Kind::Other)
    }

    /// The kind of a failure, told by the first of its causes that has one.
    pub(crate) fn of(error: &anyhow::Error) -> Kind {
        error.chain().find_map(Kind::of_cause).unwrap_or(Kind::Other)
    }

    fn of_cause(cause: &(dyn StdError + 'static)) -> Option<Kind> {
        if let Some(fault) = cause.downcast_ref::<Fault>() {
            return Some(fault.kind);
        }
        if let Some(told) = cause.downcast_ref::<Told>() {
            return Some(told.kind);
        }
        if let Some(error) = cause.downcast_ref::<StoreError>() {
            return Some(Kind::from(error.kind()));
        }
        if let Some(error) = cause.downcast_ref::<LiveError>() {
            return Kind::of_live(error.kind());
        }
        if let Some(error) = cause.downcast_ref::<ServeError>() {
            return Kind::of_server(error.kind());
        }
        if let Some(error) = cause.downcast_ref::<Ext4Error>() {
            return Kind::of_ext4(error.kind());
        }
        if let Some(error) = cause.downcast_ref::<VmmError>() {
            return Kind::of_vmm(error.kind());
        }
        if let Some(error) = cause.downcast_ref::<FormatsError>() {
            return Kind::of_formats(error.kind());
        }
        match cause.downcast_ref::<PunchError>() {
            Some(PunchError::MayBeDifference { .. }) => return Some(Kind::Refused),
            Some(PunchError::NotRegular { .. }) => return Some(Kind::Usage),
            Some(PunchError::Cancelled { .. }) => return Some(Kind::Cancelled),
            _ => {}
        }
        cause.downcast_ref::<io::Error>().map(|error| match error.kind() {
            io::ErrorKind::NotFound => Kind::NotFound,
            io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => Kind::AlreadyExists,
            _ => Kind::Io,
        })
    }

    /// The kind of an ext4 image's failure; none where its cause tells more.
    fn of_ext4(kind: Ext4ErrorKind) -> Option<Kind> {
        match kind {
            Ext4ErrorKind::InvalidInput => Some(Kind::Usage),
            Ext4ErrorKind::BadArchive | Ext4ErrorKind::Corrupt => Some(Kind::Corrupt),
            Ext4ErrorKind::Limit
            | Ext4ErrorKind::DoesNotFit
            | Ext4ErrorKind::Changed
            | Ext4ErrorKind::Refused => Some(Kind::Refused),
            Ext4ErrorKind::NotFound => Some(Kind::NotFound),
            Ext4ErrorKind::Unsupported => Some(Kind::Unsupported),
            Ext4ErrorKind::Cancelled => Some(Kind::Cancelled),
            _ => None,
        }
    }

    /// The kind of a foreign snapshot's failure; none where its cause tells more.
    fn of_formats(kind: FormatsErrorKind) -> Option<Kind> {
        match kind {
            FormatsErrorKind::InvalidInput => Some(Kind::Usage),
            FormatsErrorKind::NotFound => Some(Kind::NotFound),
            FormatsErrorKind::AlreadyExists => Some(Kind::AlreadyExists),
            FormatsErrorKind::Corrupt | FormatsErrorKind::Differs => Some(Kind::Corrupt),
            FormatsErrorKind::Unsupported => Some(Kind::Unsupported),
            FormatsErrorKind::Refused => Some(Kind::Refused),
            FormatsErrorKind::Tool => Some(Kind::Other),
            _ => None,
        }
    }

    /// The kind of a live disk's failure; none where its cause tells more.
    fn of_live(kind: LiveErrorKind) -> Option<Kind> {
        match kind {
            LiveErrorKind::InvalidInput => Some(Kind::Usage),
            LiveErrorKind::AlreadyExists => Some(Kind::AlreadyExists),
            LiveErrorKind::Busy => Some(Kind::Busy),
            LiveErrorKind::Corrupt => Some(Kind::Corrupt),
            LiveErrorKind::Unsupported => Some(Kind::Unsupported),
            LiveErrorKind::Unresolved | LiveErrorKind::Poisoned => Some(Kind::Io),
            _ => None,
        }
    }

    /// The kind of a server's failure to start; none where its cause tells more.
    fn of_server(kind: ServeErrorKind) -> Option<Kind> {
        match kind {
            ServeErrorKind::InvalidInput | ServeErrorKind::Tls => Some(Kind::Usage),
            ServeErrorKind::NotFound => Some(Kind::NotFound),
            ServeErrorKind::InUse => Some(Kind::Busy),
            ServeErrorKind::AlreadyExists => Some(Kind::AlreadyExists),
            _ => None,
        }
    }

    /// The kind of a VMM's failure; none where its cause tells more.
    fn of_vmm(kind: VmmErrorKind) -> Option<Kind> {
        match kind {
            VmmErrorKind::InvalidInput => Some(Kind::Usage),
            VmmErrorKind::NotFound => Some(Kind::NotFound),
            VmmErrorKind::Refused => Some(Kind::Refused),
            VmmErrorKind::Incompatible => Some(Kind::Unsupported),
            VmmErrorKind::InvalidFile => Some(Kind::Corrupt),
            VmmErrorKind::Timeout | VmmErrorKind::Gone | VmmErrorKind::Protocol => {
                Some(Kind::Other)
            }
            _ => None,
        }
    }

    /// What to do, where the kind or the cause alone tells it.
    fn advice(self, error: &anyhow::Error) -> Option<&'static str> {
        match self {
            Kind::Key => Some("bring back the store's folder keys, readable for you"),
            Kind::Io => {
                error.chain().find_map(|cause| match cause.downcast_ref::<io::Error>()?.kind() {
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                        Some("make room; `dormouse gc` frees what no snapshot needs")
                    }
                    io::ErrorKind::ReadOnlyFilesystem => {
                        Some("what is there can be read, but not changed: mount it writable")
                    }
                    io::ErrorKind::PermissionDenied => {
                        Some("run as somebody who may, or change who may")
                    }
                    _ => None,
                })
            }
            Kind::Conflict => Some("commit again, or name the parent with --parent"),
            // What is wrong with an image or an archive is not the store's.
            Kind::Corrupt if error.chain().any(|cause| cause.is::<Ext4Error>()) => None,
            Kind::Corrupt if is_foreign_damage(error) => None,
            Kind::Corrupt if is_live_damage(error) => Some(
                "`dormouse disk discard` takes a live disk back to its base, `disk rm` removes it",
            ),
            Kind::Corrupt => Some("`dormouse verify --deep` lists what is touched"),
            Kind::Busy => Some("try again when the other process is done"),
            _ => None,
        }
    }
}

/// Whether the files of a live disk are damaged, not those of the store.
fn is_live_damage(error: &anyhow::Error) -> bool {
    let cause = error.chain().find_map(|cause| cause.downcast_ref::<LiveError>());
    cause.is_some_and(|error| error.kind() == LiveErrorKind::Corrupt)
}

/// Whether a foreign snapshot is damaged, not something of the store.
fn is_foreign_damage(error: &anyhow::Error) -> bool {
    let cause = error.chain().find_map(|cause| cause.downcast_ref::<FormatsError>());
    cause.is_some_and(|error| {
        matches!(error.kind(), FormatsErrorKind::Corrupt | FormatsErrorKind::Differs)
    })
}

/// A failure and its causes in one line.
pub(crate) fn causes(error: &anyhow::Error) -> String {
    let messages: Vec<String> = error.chain().map(ToString::to_string).collect();
    messages.join(": ")
}

impl From<StoreErrorKind> for Kind {
    fn from(kind: StoreErrorKind) -> Kind {
        match kind {
            StoreErrorKind::InvalidInput => Kind::Usage,
            StoreErrorKind::NotFound => Kind::NotFound,
            StoreErrorKind::AlreadyExists => Kind::AlreadyExists,
            StoreErrorKind::Conflict => Kind::Conflict,
            StoreErrorKind::Refused => Kind::Refused,
            StoreErrorKind::Corrupt => Kind::Corrupt,
            StoreErrorKind::Unsupported => Kind::Unsupported,
            StoreErrorKind::Key => Kind::Key,
            StoreErrorKind::Busy => Kind::Busy,
            StoreErrorKind::Cancelled => Kind::Cancelled,
            StoreErrorKind::Io => Kind::Io,
            _ => Kind::Other,
        }
    }
}

/// A failure that the command itself found.
#[derive(Debug)]
pub(crate) struct Fault {
    kind: Kind,
    message: String,
}

impl Fault {
    /// A failure of a kind.
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Fault {
        Fault { kind, message: message.into() }
    }

    /// A combination of arguments that makes no sense.
    pub(crate) fn usage(message: impl Into<String>) -> Fault {
        Fault::new(Kind::Usage, message)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Fault {}

/// What else there is to know of a fork that failed: VMs that are awake all the same, as `--json` tells
/// of them.
#[derive(Debug)]
pub(crate) struct SomeAwake {
    pub(crate) awake: Vec<Value>,
}

impl fmt::Display for SomeAwake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.awake.iter().filter_map(|vm| vm["name"].as_str()).collect();
        write!(f, "not all are awake; {} are", names.join(", "))
    }
}

#[derive(Serialize)]
struct ErrorObject<'a> {
    version: u32,
    error: ErrorBody<'a>,
    #[serde(skip_serializing_if = "<[Value]>::is_empty")]
    awake: &'a [Value],
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    kind: &'a str,
    message: &'a str,
    causes: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<&'a str>,
}

/// A failure, as it is told to whoever asked: on standard error, or by the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) kind: Kind,
    pub(crate) message: String,
    pub(crate) causes: Vec<String>,
    pub(crate) advice: Option<String>,
    /// VMs of a fork that are awake all the same.
    pub(crate) awake: Vec<Value>,
}

impl Told {
    /// A failure without a cause.
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Told {
        let message = message.into();
        Told { kind, message, causes: Vec::new(), advice: None, awake: Vec::new() }
    }

    /// What failed, why, and what to do.
    pub(crate) fn of(error: &anyhow::Error) -> Told {
        // Another process has told it already.
        if let Some(told) = error.downcast_ref::<Told>() {
            return told.clone();
        }
        let mut messages: Vec<String> = error.chain().map(ToString::to_string).collect();
        // Some errors print their cause themselves.
        messages.dedup_by(|cause, effect| effect.ends_with(cause.as_str()));
        let kind = Kind::of(error);
        let advice = kind.advice(error).map(str::to_owned);
        let some = error.downcast_ref::<SomeAwake>();
        let awake = some.map(|some| some.awake.clone()).unwrap_or_default();
        Told { kind, message: messages.remove(0), causes: messages, advice, awake }
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.causes.iter().try_for_each(|cause| write!(f, ": {cause}"))
    }
}

impl StdError for Told {}

/// Tells on standard error what failed, why and what to do, and gives the exit code.
pub(crate) fn report(error: &anyhow::Error, json: bool) -> ExitCode {
    let told = Told::of(error);
    if json {
        print_object(&told);
    } else {
        print_lines(&told.message, &told.causes, told.advice.as_deref());
    }
    ExitCode::from(told.kind.code())
}

/// Tells what is wrong with the command line, or prints the help that was asked for.
pub(crate) fn parsing_failed(error: &clap::Error) -> ExitCode {
    let asked = matches!(error.kind(), ClapErrorKind::DisplayHelp | ClapErrorKind::DisplayVersion);
    if !asked && std::env::args_os().any(|argument| argument == "--json") {
        let text = error.to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        print_object(&Told::new(Kind::Usage, lines.next().unwrap_or("wrong usage")));
        return ExitCode::from(Kind::Usage.code());
    }
    match error.print() {
        Ok(()) if asked => ExitCode::SUCCESS,
        Err(error) if asked && error.kind() != io::ErrorKind::BrokenPipe => {
            ExitCode::from(Kind::Io.code())
        }
        _ if asked => ExitCode::SUCCESS,
        _ => ExitCode::from(Kind::Usage.code()),
    }
}

#[expect(clippy::print_stderr, reason = "the one place that prints errors")]
fn print_object(told: &Told) {
    let Told { kind, message, causes, advice, awake } = told;
    let error = ErrorBody { kind: kind.word(), message, causes, advice: advice.as_deref() };
    match serde_json::to_string(&ErrorObject { version: 1, error, awake }) {
        Ok(object) => eprintln!("{object}"),
        Err(_) => eprintln!("error: {message}"),
    }
}

/// A chain longer than this is printed a cause a line.
const LINE_CHARS_MAX: usize = 120;

#[expect(clippy::print_stderr, reason = "the one place that prints errors")]
fn print_lines(message: &str, causes: &[String], advice: Option<&str>) {
    let chars = message.len() + causes.iter().map(|cause| cause.len() + 2).sum::<usize>();
    let separator = if chars <= LINE_CHARS_MAX { ": " } else { "\n  because: " };
    let mut text = message.to_owned();
    for cause in causes {
        text.push_str(separator);
        text.push_str(cause);
    }
    eprintln!("error: {text}");
    if let Some(advice) = advice {
        eprintln!("what to do: {advice}");
    }
}
