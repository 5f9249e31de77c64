//! What every protocol needs of the thing it serves: a flat, fixed-size space of bytes.
//!
//! Every method is called from several threads at once. Ranges are non-empty and lie within
//! `0..size_bytes()`; nothing is aligned unless the client aligned it.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::ops::{ControlFlow, Range};

/// The context that tells holes and zeros from data: flags [`HOLE`] and [`ZERO`].
pub const BASE_ALLOCATION: &str = "base:allocation";

/// The context of overlays that tells what was written since they were made.
pub const DIRTY_CONTEXT: &str = "dormouse:dirty";

/// The context that tells which pack or generation a run comes from.
pub const SOURCE_CONTEXT: &str = "dormouse:source";

/// Flag of [`BASE_ALLOCATION`]: nothing is allocated for the run.
pub const HOLE: u64 = 1;

/// Flag of [`BASE_ALLOCATION`]: the run reads as zeros.
pub const ZERO: u64 = 2;

/// A device that can be served.
///
/// The provided methods make a device that is read-only, all data, and has nothing to prefetch.
pub trait BlockDevice: Send + Sync {
    /// Bytes of the device; the same as long as it is served.
    fn size_bytes(&self) -> u64;

    /// Whether writing, zeroing and trimming are refused.
    fn is_read_only(&self) -> bool;

    /// Fills `buffer` with the bytes from `offset` on.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<()>;

    /// Writes all of `data` at `offset`.
    fn write_at(&self, data: &[u8], offset: u64, durability: Durability) -> DeviceResult<()> {
        let _ = (data, offset, durability);
        Err(DeviceErrorKind::ReadOnly.into())
    }

    /// Makes the range read as zeros.
    fn zero(&self, range: Range<u64>, mode: ZeroMode, durability: Durability) -> DeviceResult<()> {
        let _ = (range, mode, durability);
        Err(DeviceErrorKind::ReadOnly.into())
    }

    /// Forgets the range; what it reads as until it is written is the device's choice.
    fn trim(&self, range: Range<u64>, durability: Durability) -> DeviceResult<()> {
        let _ = (range, durability);
        Err(DeviceErrorKind::ReadOnly.into())
    }

    /// Returns when everything that was written, zeroed or trimmed before the call is durable.
    fn flush(&self) -> DeviceResult<()> {
        Ok(())
    }

    /// Makes a later read of the range quicker, if there is a way.
    fn prefetch(&self, range: Range<u64>) -> DeviceResult<()> {
        let _ = range;
        Ok(())
    }

    /// The contexts that [`extents`](BlockDevice::extents) knows, in the order they are listed.
    fn contexts(&self) -> &[Context] {
        &[Context::ALLOCATION]
    }

    /// Tells the runs of `range` in the named context, in order and without gaps, until it is told
    /// or `sink` breaks. The last run may go on past the range; neighbours may have equal flags.
    fn extents(
        &self,
        context: &str,
        range: Range<u64>,
        sink: &mut dyn FnMut(Run) -> ControlFlow<()>,
    ) -> DeviceResult<()> {
        let _ = context;
        // The sink has no more to say: there is one run.
        let _ = sink(Run { length: range.end - range.start, flags: 0 });
        Ok(())
    }

    /// Reads of at least this many bytes are first asked for zero runs, so that these are sent as
    /// holes. Where [`extents`](BlockDevice::extents) costs a system call it pays only for large reads.
    fn hole_probe_bytes_min(&self) -> u32 {
        4096
    }

    /// Whether a read of the range probably waits for a disk, a network or a decoder; then other
    /// requests of the connection are not kept waiting for it. Cheap, and may be wrong.
    fn read_will_wait(&self, range: Range<u64>) -> bool {
        let _ = range;
        false
    }
}

/// Whether a change must be on stable storage before the call returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The next flush makes it durable.
    Later,

    /// It is durable on return (FUA).
    Now,
}

/// How a range becomes zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroMode {
    /// Whether its space may be given back; else it stays allocated (NO_HOLE).
    pub may_punch: bool,

    /// Fail with [`DeviceErrorKind::NotSupported`] where it would be no faster than writing zeros.
    pub fast_only: bool,
}

/// A run of equal flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Bytes, not zero.
    pub length: u64,

    /// Flags in the sense of the context.
    pub flags: u64,
}

/// A metadata context that a device offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// `namespace:leaf`.
    pub name: &'static str,

    /// How wide its flags are.
    pub flags: FlagsWidth,
}

impl Context {
    /// [`BASE_ALLOCATION`].
    pub const ALLOCATION: Context = Context { name: BASE_ALLOCATION, flags: FlagsWidth::U32 };
}

/// How wide the flags of a context are. [`FlagsWidth::U64`] needs a client that knows extended
/// headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlagsWidth {
    /// 32 bits.
    U32,

    /// 64 bits.
    U64,

    /// 64 bits of which the upper 32 tell enough: they are what clients without extended headers
    /// are told.
    U64Prefix,
}

/// A `Result` of a device.
pub type DeviceResult<T> = Result<T, DeviceError>;

/// Why a device refused or failed; decides the error number that the client gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceErrorKind {
    /// Reading or writing failed, or what was read did not match (EIO).
    Io,

    /// No room for what was to be written (ENOSPC).
    NoSpace,

    /// The device takes no writes (EPERM).
    ReadOnly,

    /// The device cannot do that, or not fast (ENOTSUP).
    NotSupported,

    /// The request makes no sense to the device (EINVAL).
    Invalid,

    /// The device is going away (ESHUTDOWN).
    Shutdown,
}

/// A failed request to a device.
#[derive(Debug)]
pub struct DeviceError {
    kind: DeviceErrorKind,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl DeviceError {
    /// A failure with its cause, which goes to the log.
    pub fn new(
        kind: DeviceErrorKind,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> DeviceError {
        DeviceError { kind, source: Some(source.into()) }
    }

    /// The kind of failure.
    pub fn kind(&self) -> DeviceErrorKind {
        self.kind
    }
}

impl From<DeviceErrorKind> for DeviceError {
    fn from(kind: DeviceErrorKind) -> DeviceError {
        DeviceError { kind, source: None }
    }
}

impl From<io::Error> for DeviceError {
    fn from(error: io::Error) -> DeviceError {
        let kind = match error.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => DeviceErrorKind::NoSpace,
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                DeviceErrorKind::ReadOnly
            }
            io::ErrorKind::Unsupported => DeviceErrorKind::NotSupported,
            io::ErrorKind::InvalidInput => DeviceErrorKind::Invalid,
            _ => DeviceErrorKind::Io,
        };
        DeviceError::new(kind, error)
    }
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            DeviceErrorKind::Io => "the device could not read or write",
            DeviceErrorKind::NoSpace => "the device has no room left",
            DeviceErrorKind::ReadOnly => "the device is read-only",
            DeviceErrorKind::NotSupported => "the device cannot do that",
            DeviceErrorKind::Invalid => "the device does not understand the request",
            DeviceErrorKind::Shutdown => "the device is shutting down",
        })
    }
}

impl StdError for DeviceError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_system_get_the_kind_the_client_should_see() {
        for (errno, kind) in [
            (rustix::io::Errno::NOSPC, DeviceErrorKind::NoSpace),
            (rustix::io::Errno::DQUOT, DeviceErrorKind::NoSpace),
            (rustix::io::Errno::FBIG, DeviceErrorKind::NoSpace),
            (rustix::io::Errno::ROFS, DeviceErrorKind::ReadOnly),
            (rustix::io::Errno::ACCESS, DeviceErrorKind::ReadOnly),
            (rustix::io::Errno::OPNOTSUPP, DeviceErrorKind::NotSupported),
            (rustix::io::Errno::INVAL, DeviceErrorKind::Invalid),
            (rustix::io::Errno::IO, DeviceErrorKind::Io),
            (rustix::io::Errno::NOMEM, DeviceErrorKind::Io),
        ] {
            assert_eq!(DeviceError::from(io::Error::from(errno)).kind(), kind, "{errno:?}");
        }
    }
}
