//! What was served, counted per export and command, with waiting and serving apart.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::request::Kind;

/// Figures of one export over all its connections since the server started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportStats {
    /// Name of the export.
    pub name: String,

    /// Connections that are past the handshake.
    pub connections: u64,

    /// READ.
    pub read: CommandStats,

    /// WRITE.
    pub write: CommandStats,

    /// FLUSH. Flushes that a FUA asked for count with their command.
    pub flush: CommandStats,

    /// TRIM.
    pub trim: CommandStats,

    /// WRITE_ZEROES.
    pub zero: CommandStats,

    /// CACHE.
    pub cache: CommandStats,

    /// BLOCK_STATUS.
    pub block_status: CommandStats,

    /// Requests that were refused before a device saw them: unknown, malformed, out of range,
    /// against a read-only export, or after the server was told to stop.
    pub refused: u64,
}

/// Figures of one command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommandStats {
    /// Requests that were answered, failed ones included.
    pub requests: u64,

    /// Bytes that they were about.
    pub bytes: u64,

    /// Requests that failed in the device.
    pub errors: u64,

    /// Time from the request being read to the device being asked.
    pub waiting: Duration,

    /// Time in the device.
    pub serving: Duration,
}

/// Figures of a server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerStats {
    /// Its exports, in the order they were given.
    pub exports: Vec<ExportStats>,

    /// Connections now, those in the handshake included.
    pub connections: u64,

    /// Connections that were accepted.
    pub accepted: u64,

    /// Connections that were closed at once because there were too many.
    pub turned_away: u64,

    /// Connections that ended because the peer broke the protocol or took too long to begin.
    pub failed: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) connections: AtomicU64,
    pub(crate) refused: AtomicU64,
    commands: [CommandCounters; 7],
}

#[derive(Debug, Default)]
struct CommandCounters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    waiting_ns: AtomicU64,
    serving_ns: AtomicU64,
}

impl Counters {
    pub(crate) fn count(
        &self,
        kind: Kind,
        bytes: u64,
        failed: bool,
        waiting: Duration,
        serving: Duration,
    ) {
        let command = &self.commands[index(kind)];
        command.requests.fetch_add(1, Ordering::Relaxed);
        command.bytes.fetch_add(bytes, Ordering::Relaxed);
        command.errors.fetch_add(u64::from(failed), Ordering::Relaxed);
        command.waiting_ns.fetch_add(nanos(waiting), Ordering::Relaxed);
        command.serving_ns.fetch_add(nanos(serving), Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self, name: &str) -> ExportStats {
        let [read, write, flush, trim, zero, cache, block_status] =
            [0, 1, 2, 3, 4, 5, 6].map(|index: usize| self.commands[index].snapshot());
        ExportStats {
            name: name.to_owned(),
            connections: self.connections.load(Ordering::Relaxed),
            read,
            write,
            flush,
            trim,
            zero,
            cache,
            block_status,
            refused: self.refused.load(Ordering::Relaxed),
        }
    }
}

impl CommandCounters {
    fn snapshot(&self) -> CommandStats {
        CommandStats {
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            waiting: Duration::from_nanos(self.waiting_ns.load(Ordering::Relaxed)),
            serving: Duration::from_nanos(self.serving_ns.load(Ordering::Relaxed)),
        }
    }
}

/// Saturating: 584 years.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn index(kind: Kind) -> usize {
    match kind {
        Kind::Read { .. } => 0,
        Kind::Write => 1,
        Kind::Flush => 2,
        Kind::Trim => 3,
        Kind::Zero(_) => 4,
        Kind::Cache => 5,
        Kind::BlockStatus { .. } => 6,
    }
}
