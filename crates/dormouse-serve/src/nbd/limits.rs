//! What a server lets its clients take. Memory of a connection is bounded by these numbers:
//! its workers' buffers and, for clients without structured replies, one large one.

use std::time::Duration;

/// Largest READ or WRITE, as told to clients. 32 MiB is what clients assume that ask nothing.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// Preferred granularity of requests: the block of images and overlays.
pub const BLOCK_BYTES_PREFERRED: u32 = 4096;

/// Largest data of an option; names and queries are at most 4 KiB each.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;

/// Options in one handshake. A real client sends fewer than ten.
pub(crate) const OPTIONS_MAX: u32 = 1024;

/// Longest string in an option, by the protocol.
pub(crate) const STRING_BYTES_MAX: usize = 4096;

/// Extents in the reply to one BLOCK_STATUS in each context: a mebibyte in the extended form.
/// The client asks again from where the reply ends.
pub const EXTENTS_MAX: usize = 64 << 10;

/// Zeroing, trimming and prefetching go to the device in pieces of this size, between which other
/// requests run: writing so many zeros takes a few milliseconds where nothing can be punched.
pub(crate) const PIECE_BYTES: u64 = 16 << 20;

/// Larger zeroings and trims than this leave the workers to other requests.
pub(crate) const BULK_BYTES_MIN: u64 = 1 << 20;

/// READ and WRITE are served in pieces of this size, which is what a worker's buffer holds. QEMU and
/// nbdcopy send at most this much at once, so pieces are rare.
pub(crate) const TRANSFER_BYTES: usize = 2 << 20;

/// A worker's buffers begin with this much each, and grow once if a larger request comes: guests
/// that only send short ones cost little, and threads that only stand by cost nothing.
pub(crate) const FIRST_BUFFER_BYTES: usize = 256 << 10;

/// Requests up to this size are served where they are read while the device is quick.
pub(crate) const INLINE_BYTES_MAX: u64 = 64 << 10;

/// A device that takes longer than this for an inline request is not quick.
pub(crate) const INLINE_NS_MAX: u64 = 50_000;

/// After so many requests that came one at a time a peer counts as one that waits for each reply.
pub(crate) const COMPANY_REQUESTS: u32 = 64;

/// Replies are gathered up to this size while more requests are there to be served.
pub(crate) const GATHER_BYTES: usize = 64 << 10;

/// What is read from a socket at once: some hundred headers, or 15 writes of 4 KiB.
pub(crate) const INPUT_BYTES: usize = 64 << 10;

/// The send buffer that a socket is asked to have, so that a reply of the largest common size does
/// not wait for its reader. The kernel takes what `net.core.wmem_max` allows.
pub(crate) const SEND_BUFFER_BYTES: usize = 4 << 20;

/// A payload of a refused request up to this size is read and dropped; one that pretends to be
/// longer ends the connection.
pub(crate) const DISCARD_BYTES_MAX: u64 = u32::MAX as u64;

/// Bounds on connections and what is under way in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time over all listeners. A further one takes the place of the one that has
    /// stalled longest, if any has; else it is closed at once.
    pub connections: usize,

    /// Milliseconds without a byte after which a connection has stalled: its client does not take
    /// replies, or has sent a part of a request. One that waits between requests never does, and
    /// one that has stalled is let be while there is room: its VM may be frozen.
    pub stall_ms: u64,

    /// Threads that serve one connection's requests, 1 to 64. With 1 everything is served in the
    /// order it comes.
    pub workers: usize,

    /// Large zeroings and trims under way or waiting on one connection; then nothing more is read
    /// from it until one is done.
    pub bulk_requests: usize,

    /// Milliseconds from connecting to the first request being allowed, TLS included.
    pub handshake_ms: u64,

    /// Milliseconds that a stopping server waits for requests under way.
    pub drain_ms: u64,
}

impl Limits {
    /// What fits a host with some dozens of guests.
    pub const STANDARD: Limits = Limits {
        connections: 256,
        stall_ms: 60_000,
        workers: 4,
        bulk_requests: 64,
        handshake_ms: 10_000,
        drain_ms: 10_000,
    };

    /// Requests of one connection that can be under way at once.
    pub fn requests_in_flight(&self) -> usize {
        self.workers + self.bulk_requests
    }

    /// Bytes of buffers that one connection can come to use; what requests never filled costs
    /// address space only.
    pub fn bytes_in_flight(&self) -> usize {
        let worker = 2 * TRANSFER_BYTES + WORKER_SLACK_BYTES;
        (self.workers + 1) * worker + INPUT_BYTES + PAYLOAD_BYTES_MAX as usize
    }

    pub(crate) fn handshake_time(&self) -> Duration {
        Duration::from_millis(self.handshake_ms)
    }

    pub(crate) fn stall_time(&self) -> Duration {
        Duration::from_millis(self.stall_ms)
    }

    pub(crate) fn drain_time(&self) -> Duration {
        Duration::from_millis(self.drain_ms)
    }
}

/// Room in a worker's buffer beside one transfer: gathered replies, headers, chunks of holes.
pub(crate) const WORKER_SLACK_BYTES: usize = 256 << 10;
