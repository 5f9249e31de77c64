//! Who serves on when a server is gone: its holder runs another one, so that a guest whose server was
//! killed waits for a moment, and for no command.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use dormouse_serve::holder::Holder;

use super::keeping::SERVER;
use crate::background::{self, OURSELVES};

/// Rest before a server that ends again and again is started, doubled each time: guests wait for it.
const REST_MIN: Duration = Duration::from_millis(20);
const REST_MAX: Duration = Duration::from_secs(2);

/// How long a server lives that does not end again and again.
const STEADY: Duration = Duration::from_secs(60);

/// What serves on when a server is gone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Successor {
    /// Those of a `dormouse` that takes over what is kept, wherever it is started; nothing serves on
    /// if there are none.
    pub(crate) arguments: Vec<OsString>,

    /// Where it says why it could not.
    pub(crate) log: Option<PathBuf>,
}

/// The successors of a server.
#[derive(Debug)]
pub(super) struct Succession {
    holder: Holder,
    successor: Successor,
    rest: Duration,
    begun: Option<Instant>,
}

impl Succession {
    /// Nobody has succeeded yet.
    pub(super) fn new(holder: Holder, successor: Successor) -> Succession {
        Succession { holder, successor, rest: REST_MIN, begun: None }
    }

    /// Starts the next one, without waiting for it: it asks the holder for what is kept.
    pub(super) fn begin(&mut self) {
        if self.successor.arguments.is_empty() {
            return;
        }
        let is_early = self.begun.is_some_and(|begun| begun.elapsed() < STEADY);
        let first_rest = if is_early { self.rest } else { Duration::ZERO };
        self.rest = if is_early { (self.rest * 2).min(REST_MAX) } else { REST_MIN };
        self.begun = Some(Instant::now());
        let (holder, successor) = (self.holder.clone(), self.successor.clone());
        let started = thread::Builder::new()
            .name("succession".to_owned())
            .spawn(move || start(&holder, &successor, first_rest));
        if let Err(error) = started {
            tracing::error!(%error, "no thread to start a successor; the next command starts one");
        }
    }
}

/// Starts a server until there is one, or nothing to be served any more.
fn start(holder: &Holder, successor: &Successor, first_rest: Duration) {
    let mut rest = first_rest;
    loop {
        thread::sleep(rest);
        match holder.names() {
            Ok(names) if names.iter().any(|name| name == SERVER) => return,
            // It ended, and this process with it.
            Ok(names) if names.is_empty() => return,
            // One that cannot be asked now may be asked later.
            Ok(_) | Err(_) => {}
        }
        let log = successor.log.as_ref();
        let log = log.and_then(|path| File::options().append(true).create(true).open(path).ok());
        let status = Command::new(OURSELVES)
            .arg0("dormouse")
            .args(&successor.arguments)
            .env_remove(background::VARIABLE)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.map_or_else(Stdio::null, Stdio::from))
            .status();
        if status.is_ok_and(|status| status.success()) {
            return;
        }
        rest = (rest * 2).clamp(REST_MIN, REST_MAX);
    }
}
