//! The verb `daemon`.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// The examples of `daemon`.
pub(super) const EXAMPLES: &str = "\
Examples:
  dormouse daemon
  dormouse daemon --tcp 0.0.0.0:7420 --tls /etc/dormouse/tls --log-format json
  curl --unix-socket dormouse-store/live/.daemon/api http://dormouse/v1/vms

One daemon a store. Its socket is live/.daemon/api of the store, or --socket PATH, or whatever systemd \
passes; commands find it there. VMs run on when it ends, however it ends. docs/api.md has its API.";

/// How the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people
    Text,

    /// An object a line
    Json,
}

/// Arguments of `daemon`.
#[derive(Clone, Debug, Args)]
pub(crate) struct DaemonArgs {
    /// Listen on this unix socket
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// The socket's mode; whoever connects must be of the daemon's user, or root, all the same
    #[arg(long, value_name = "OCTAL", default_value = "600", value_parser = parse_mode)]
    pub(crate) socket_mode: u32,

    /// Listen on TCP, too; clients must show a certificate
    #[arg(long, value_name = "ADDR:PORT", requires = "tls")]
    pub(crate) tcp: Option<SocketAddr>,

    /// The folder with ca-cert.pem, server-cert.pem and server-key.pem
    #[arg(long, value_name = "DIR")]
    pub(crate) tls: Option<PathBuf>,

    /// How the log looks
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,

    /// Jobs at a time: wakes, sleeps, forks, collections
    #[arg(long, value_name = "N", default_value = "8", value_parser = parse_count::<256>)]
    pub(crate) jobs: NonZeroUsize,

    /// Jobs that may wait for their turn; more are turned away
    #[arg(long, value_name = "N", default_value = "256", value_parser = parse_count::<65536>)]
    pub(crate) queue: NonZeroUsize,

    /// Connections at a time, on unix sockets and again on TCP; more wait to be accepted
    #[arg(long, value_name = "N", default_value = "256", value_parser = parse_count::<16384>)]
    pub(crate) connections: NonZeroUsize,

    /// Threads that answer requests, beside one for each job and eight that look things up
    #[arg(long, value_name = "N", default_value = "2", value_parser = parse_count::<64>)]
    pub(crate) threads: NonZeroUsize,

    /// Seconds that running jobs are given at the end before they are told to stop
    #[arg(long, value_name = "SECONDS", default_value = "60")]
    pub(crate) grace: u32,

    /// Print what the API is, as OpenAPI, and end
    #[arg(long)]
    pub(crate) print_openapi: bool,
}

fn parse_mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| format!("{text:?} is not a mode in octal digits, such as 600"))
}

fn parse_count<const MAX: usize>(text: &str) -> Result<NonZeroUsize, String> {
    text.parse::<NonZeroUsize>()
        .ok()
        .filter(|count| count.get() <= MAX)
        .ok_or_else(|| format!("{text:?} is not a number from 1 to {MAX}"))
}
