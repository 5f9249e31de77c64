//! What the daemon may use: threads, descriptors, connections, and bytes of what it is sent.

use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::cli::daemon::DaemonArgs;
use crate::exit::{Fault, Kind};
use crate::vm::guest::GUEST_BYTES_MAX;
use crate::vm::wake::{FORKS_AT_ONCE, PREPARED_MAX};

/// Threads that look things up for requests which are no jobs.
pub(crate) const READERS: usize = 8;

/// Requests that wait for one of those threads; more are turned away.
pub(crate) const READERS_WAITING_MAX: usize = 256;

/// The longest body of a request: a guest, and what is said beside it.
pub(crate) const BODY_BYTES_MAX: usize = GUEST_BYTES_MAX + (64 << 10);

/// The longest head of a request, and the buffer of a connection.
pub(crate) const HEAD_BYTES_MAX: usize = 16 << 10;

/// Fields in a head.
pub(crate) const HEADERS_MAX: usize = 64;

/// How long a client may take for the head of a request; also how long a connection may idle.
pub(crate) const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take for the body.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(20);

/// How long it may take to take in anything more of an answer.
pub(crate) const WRITE_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a TLS handshake may take.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Strangers that are told at a time that they are not welcome; more are told nothing.
pub(crate) const STRANGERS_MAX: usize = 8;

/// Descriptors of a job: those of a store's packs, a VMM's socket and files, pipes of a child.
const DESCRIPTORS_OF_A_JOB: usize = 96;

/// Descriptors of each VM that a job wakes beside others.
const DESCRIPTORS_OF_A_FORK: usize = 24;

/// Descriptors of whatever is there once.
const DESCRIPTORS_OF_ALL: usize = 192;

/// What the daemon may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// Jobs at a time.
    pub(crate) jobs: usize,

    /// Jobs that wait.
    pub(crate) queue: usize,

    /// Connections at a time, on unix sockets and again on TCP.
    pub(crate) connections: usize,

    /// Whether there may be TCP.
    pub(crate) has_tcp: bool,

    /// Threads of the runtime.
    pub(crate) workers: usize,
}

impl Budget {
    /// The one that was asked for.
    pub(crate) fn of(args: &DaemonArgs) -> Budget {
        Budget {
            jobs: args.jobs.get(),
            queue: args.queue.get(),
            connections: args.connections.get(),
            has_tcp: args.tls.is_some(),
            workers: args.threads.get(),
        }
    }

    /// Threads on which something may block: jobs, look-ups, and the figures of a scrape.
    pub(crate) fn blocking_threads(&self) -> usize {
        self.jobs + READERS + 1
    }

    /// Threads in all: also those of jobs that wake several VMs, each with one that makes it durable
    /// meanwhile, and the one that waits for children.
    pub(crate) fn threads(&self) -> usize {
        self.blocking_threads() + self.jobs * FORKS_AT_ONCE * 2 + self.workers + 2
    }

    /// Descriptors that are needed at most.
    pub(crate) fn descriptors(&self) -> u64 {
        // A fork holds the locks of all VMs that it prepares.
        let jobs = (self.jobs + READERS) * DESCRIPTORS_OF_A_JOB
            + self.jobs * (FORKS_AT_ONCE * DESCRIPTORS_OF_A_FORK + PREPARED_MAX);
        let connections = self.connections * (1 + usize::from(self.has_tcp));
        (jobs + connections + DESCRIPTORS_OF_ALL) as u64
    }

    /// Sees to it that so many descriptors can be had; raises the limit as far as that is ours to do.
    pub(crate) fn reserve_descriptors(&self) -> Result<u64> {
        let needed = self.descriptors();
        let limit = getrlimit(Resource::Nofile);
        if limit.current.is_none_or(|current| current >= needed) {
            return Ok(needed);
        }
        if limit.maximum.is_some_and(|maximum| maximum < needed) {
            let message = format!(
                "{needed} descriptors may be needed and only {} can be had; raise the limit \
                 (LimitNOFILE=, ulimit -Hn), or give fewer --jobs or --connections",
                limit.maximum.unwrap_or_default()
            );
            return Err(Fault::new(Kind::Refused, message).into());
        }
        let wanted = Rlimit { current: Some(needed), maximum: limit.maximum };
        setrlimit(Resource::Nofile, wanted).context("cannot raise the limit of descriptors")?;
        Ok(needed)
    }
}
