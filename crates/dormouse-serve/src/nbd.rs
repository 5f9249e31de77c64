//! An NBD server: fixed newstyle, structured and extended replies, block status, TLS.
//!
//! The protocol is that of `doc/proto.md` of the NetworkBlockDevice project. What is served is an
//! [`Export`]: a name, a description and a [`BlockDevice`]. A [`Server`] listens on unix sockets
//! and TCP addresses and serves all its exports on each of them.
//!
//! # Threads
//!
//! A connection has a few worker threads (see [`Limits`]). One of them *leads*: it reads from the
//! socket. It takes one request, gives the lead up, serves the request itself, and leads again.
//! While requests are short and the device is quick that is one thread doing everything, with many
//! requests read by one `recv` and many replies sent by one `send`, and no thread is ever woken.
//! Before a request that is going to take its time (large, a flush, or of a device that was slow
//! lately) the leader wakes another thread to lead, and a watchdog does the same within
//! milliseconds when a request turned out to be slow. Zeroing and trimming of more than a
//! piece goes to a thread of its own, piece by piece, all of them in turn, so any number of large
//! zeroings leaves the workers to other requests.
//!
//! # Invariants
//!
//! - **A reply is sent when it is true**: after FLUSH, and with FUA, not before the device has said
//!   so. A flush on one connection covers what was answered on any (MULTI_CONN).
//! - **An error of the device reaches the request that met it and no other**, and the connection
//!   lives.
//! - **Whoever does not read, or sends half a request, holds up only its own connection.**
//! - **Nothing is allocated for a request**: a worker's buffers have two sizes, and it grows from
//!   none to the first and from the first to the second once each.

mod protocol;
mod export;
mod stall;
mod stats;
mod limits;
mod input;
mod transport;
mod option;
mod meta;
mod handshake;
mod request;
mod reply;
mod pulse;
mod connection;
mod serve;
mod bulk;
mod tls;
mod server;

pub use self::connection::serve_stream;
pub use self::export::Export;
pub use self::limits::{
    BLOCK_BYTES_PREFERRED, EXTENTS_MAX, Limits, OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX,
};
pub use self::server::{Server, ServerBuilder};
pub use self::stats::{CommandStats, ExportStats, ServerStats};
pub use self::tls::{TlsConfig, TlsMode};
pub use crate::device::{
    BASE_ALLOCATION, BlockDevice, Context, DIRTY_CONTEXT, DeviceError, DeviceErrorKind,
    DeviceResult, Durability, FlagsWidth, HOLE, Run, SOURCE_CONTEXT, ZERO, ZeroMode,
};
