//! What every verb is given: the store's place, how to print, and how to be stopped.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use dormouse_store::store::{Config, Store};
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing_subscriber::EnvFilter;

use crate::cli::daemon::LogFormat;
use crate::cli::{Cli, Command};
use crate::exit::Kind;
use crate::output::colour::Palette;
use crate::output::stream::Out;
use crate::progress::Display;

/// The environment variable with a filter for the log, such as `dormouse_store=debug`.
const LOG_VARIABLE: &str = "DORMOUSE_LOG";

/// A run of the command.
#[derive(Debug)]
pub(crate) struct App {
    /// The folder of the store.
    pub(crate) store_dir: PathBuf,

    /// Whether results and errors are JSON objects.
    pub(crate) json: bool,

    /// Whether summaries are left out.
    pub(crate) quiet: bool,

    /// Whether what is asked of VMs is done here, though the store has a daemon.
    pub(crate) no_daemon: bool,

    /// Standard output.
    pub(crate) out: Out,

    /// Colours of standard output.
    pub(crate) palette: Palette,

    cancel: Arc<AtomicBool>,
}

impl App {
    /// A run with the options that all verbs share.
    pub(crate) fn new(cli: &Cli) -> App {
        App {
            store_dir: cli.store.clone(),
            json: cli.json,
            quiet: cli.quiet,
            no_daemon: cli.no_daemon,
            out: Out::stdout(),
            palette: Palette::of_stdout(),
            cancel: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Opens the store.
    pub(crate) fn open(&self) -> Result<Store> {
        Ok(Store::open(&self.store_dir, Config::STANDARD)?)
    }

    /// Begins long work: progress is shown, the first SIGINT or SIGTERM asks it to stop, and a
    /// second one ends the process at once. Before this, the first one does.
    pub(crate) fn work(&self) -> Result<Display> {
        for signal in [SIGINT, SIGTERM] {
            // In this order: the flag is still unset when the first signal passes the shutdown.
            signal_hook::flag::register_conditional_shutdown(
                signal,
                Kind::Cancelled.code().into(),
                Arc::clone(&self.cancel),
            )
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&self.cancel)))
            .context("handle signals")?;
        }
        Ok(Display::new(self.json || self.quiet, Arc::clone(&self.cancel)))
    }

    /// Prints a line about what was done, for people; nothing with `--json` or `-q`.
    #[expect(clippy::print_stderr, reason = "the one place that prints summaries")]
    pub(crate) fn say(&self, line: &str) {
        if !self.json && !self.quiet {
            eprintln!("{line}");
        }
    }

    /// Prints a warning, also with `-q`.
    #[expect(clippy::print_stderr, reason = "the one place that prints warnings")]
    pub(crate) fn warn(&self, line: &str) {
        eprintln!("warning: {line}");
    }
}

/// Sends the log to standard error: warnings, more with each `-v`, or what the variable asks for. The
/// daemon tells what it does without being asked, and in objects if it is to.
pub(crate) fn log_to_stderr(cli: &Cli) {
    let daemon = match &cli.command {
        Command::Daemon(args) => Some(args),
        _ => None,
    };
    let level = match cli.verbose + u8::from(daemon.is_some() && !cli.quiet) {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if daemon.is_some_and(|args| args.log_format == LogFormat::Json) {
        log.json().flatten_event(true).init();
    } else {
        log.with_ansi(Palette::of_stderr().is_coloured()).init();
    }
}
