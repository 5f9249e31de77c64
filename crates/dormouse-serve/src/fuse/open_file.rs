//! An open file: what requests on it become for the device or sink behind it.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fuser::{Errno, FopenFlags};
use rustix::fs::FallocateFlags;

use super::errno;
use super::read_ahead::{ReadAhead, ReadAheadPool};
use super::tree::{Access, Opened};
use crate::device::{
    BASE_ALLOCATION, BlockDevice, DeviceError, DeviceResult, Durability, HOLE, ZeroMode,
};

/// A file that is open, however often.
#[derive(Debug)]
pub(super) struct OpenFile {
    path: Box<str>,
    opened: Opened,
    read_ahead: Option<ReadAhead>,
    failures: AtomicU64,
}

/// Which way a search in a file goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seek {
    Data,
    Hole,
}

impl OpenFile {
    pub(super) fn new(path: &str, opened: Opened, pool: &Arc<ReadAheadPool>) -> OpenFile {
        let read_ahead = match &opened {
            Opened::Image(device) => Some(ReadAhead::new(Arc::clone(device), Arc::clone(pool))),
            _ => None,
        };
        OpenFile { path: path.into(), opened, read_ahead, failures: AtomicU64::new(0) }
    }

    /// How the kernel shall treat an open.
    pub(super) fn flags(&self, access: Access) -> FopenFlags {
        match (&self.opened, access) {
            (Opened::Image(_), Access::Read) => FopenFlags::FOPEN_KEEP_CACHE,
            // Without a cache there are no shared mappings, and so no way to change the pages that
            // others see.
            (Opened::Image(_), Access::Write) => FopenFlags::FOPEN_DIRECT_IO,
            (Opened::Disk(_), _) => {
                FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            }
            (Opened::Memory(_), _) => FopenFlags::FOPEN_KEEP_CACHE,
            // A sink's writes come in the order they were made in.
            (Opened::Sink(_), _) => FopenFlags::FOPEN_DIRECT_IO,
        }
    }

    /// The length.
    pub(super) fn size_bytes(&self) -> u64 {
        match &self.opened {
            Opened::Image(device) | Opened::Disk(device) | Opened::Memory(device) => {
                device.size_bytes()
            }
            Opened::Sink(sink) => sink.size_bytes(),
        }
    }

    /// Whether it is written back by the kernel.
    pub(super) fn is_memory(&self) -> bool {
        matches!(self.opened, Opened::Memory(_))
    }

    /// Whether whoever answers for it may keep a request for long.
    pub(super) fn is_patient(&self) -> bool {
        matches!(&self.opened, Opened::Sink(sink) if sink.is_patient())
    }

    /// Whether a write would be kept for long just now.
    pub(super) fn write_will_wait(&self) -> bool {
        matches!(&self.opened, Opened::Sink(sink) if sink.is_patient() && sink.write_will_wait())
    }

    /// Fills `buffer` from `offset` and tells how much there was.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let device = match &self.opened {
            Opened::Sink(sink) => return self.told(sink.read_at(buffer, offset), "read", offset),
            Opened::Image(device) | Opened::Disk(device) | Opened::Memory(device) => device,
        };
        let left = device.size_bytes().saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        if len == 0 {
            return Ok(0);
        }
        if let Some(read_ahead) = &self.read_ahead {
            read_ahead.note(offset..offset + len as u64);
        }
        self.told(device.read_at(&mut buffer[..len], offset), "read", offset)?;
        Ok(len)
    }

    /// Writes all of `data`, or as much as the file is long.
    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<usize, Errno> {
        if let Opened::Sink(sink) = &self.opened {
            self.told(sink.write_at(data, offset), "write", offset)?;
            return Ok(data.len());
        }
        let device = self.writable()?;
        let left = device.size_bytes().saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
        if len == 0 && !data.is_empty() {
            // What a block device says to whoever writes behind its end.
            return Err(Errno::ENOSPC);
        }
        self.told(device.write_at(&data[..len], offset, Durability::Later), "write", offset)?;
        Ok(len)
    }

    /// Everything that was written is durable, or taken, on return.
    pub(super) fn flush(&self) -> Result<(), Errno> {
        match &self.opened {
            Opened::Image(_) => Ok(()),
            Opened::Disk(device) | Opened::Memory(device) => self.told(device.flush(), "flush", 0),
            Opened::Sink(sink) => self.told(sink.flush(), "flush", 0),
        }
    }

    /// Punches a hole, makes zeros, or grows a sink.
    pub(super) fn fallocate(&self, range: Range<u64>, mode: i32) -> Result<(), Errno> {
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        let keeps_size = mode.contains(FallocateFlags::KEEP_SIZE);
        let is_punch = mode == FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let is_zero = mode.difference(FallocateFlags::KEEP_SIZE) == FallocateFlags::ZERO_RANGE;
        if let Opened::Sink(sink) = &self.opened {
            return match (is_punch || is_zero, mode.is_empty()) {
                (true, _) => {
                    let end = if keeps_size { range.end.min(sink.size_bytes()) } else { range.end };
                    if range.start >= end {
                        return Ok(());
                    }
                    self.told(sink.zero(range.start..end), "zero", range.start)
                }
                // Nothing can be promised about room; what fails will fail at the write.
                (false, true) if range.end > sink.size_bytes() => {
                    self.told(sink.set_size(range.end), "grow", range.end)
                }
                (false, true) => Ok(()),
                _ => Err(Errno::EOPNOTSUPP),
            };
        }
        let device = self.writable()?;
        let size = device.size_bytes();
        if range.end > size && !keeps_size {
            return Err(Errno::EPERM);
        }
        let range = range.start..range.end.min(size);
        if range.is_empty() {
            return Ok(());
        }
        let start = range.start;
        if is_punch {
            // A hole reads as zeros, which a bare trim does not promise.
            let mode = ZeroMode { may_punch: true, fast_only: false };
            self.told(device.zero(range, mode, Durability::Later), "punch", start)
        } else if is_zero {
            let mode = ZeroMode { may_punch: false, fast_only: false };
            self.told(device.zero(range, mode, Durability::Later), "zero", start)
        } else {
            // Among them plain allocation: room cannot be promised.
            Err(Errno::EOPNOTSUPP)
        }
    }

    /// The first byte of data, or of a hole, from `offset` on.
    pub(super) fn seek(&self, offset: u64, wanted: Seek) -> Result<u64, Errno> {
        let size = self.size_bytes();
        if offset >= size {
            return Err(Errno::ENXIO);
        }
        let Some(device) = self.device() else {
            return Ok(if wanted == Seek::Data { offset } else { size });
        };
        let mut at = offset;
        let mut found = None;
        let walked = device.extents(BASE_ALLOCATION, offset..size, &mut |run| {
            if (run.flags & HOLE != 0) == (wanted == Seek::Hole) {
                found = Some(at);
                return ControlFlow::Break(());
            }
            at = at.saturating_add(run.length);
            ControlFlow::Continue(())
        });
        self.told(walked, "walk", offset)?;
        match (found.filter(|&found| found < size), wanted) {
            (Some(found), _) => Ok(found),
            // The end of a file counts as a hole.
            (None, Seek::Hole) => Ok(size),
            (None, Seek::Data) => Err(Errno::ENXIO),
        }
    }

    /// Sets the length, which only a sink's can be.
    pub(super) fn set_size(&self, size_bytes: u64) -> Result<(), Errno> {
        match &self.opened {
            Opened::Sink(sink) => self.told(sink.set_size(size_bytes), "truncate", size_bytes),
            Opened::Image(_) => Err(Errno::EROFS),
            Opened::Disk(device) | Opened::Memory(device) => {
                if device.size_bytes() == size_bytes {
                    Ok(())
                } else {
                    Err(Errno::EPERM)
                }
            }
        }
    }

    fn device(&self) -> Option<&Arc<dyn BlockDevice>> {
        match &self.opened {
            Opened::Image(device) | Opened::Disk(device) | Opened::Memory(device) => Some(device),
            Opened::Sink(_) => None,
        }
    }

    fn writable(&self) -> Result<&Arc<dyn BlockDevice>, Errno> {
        match &self.opened {
            Opened::Disk(device) | Opened::Memory(device) if !device.is_read_only() => Ok(device),
            _ => Err(Errno::EROFS),
        }
    }

    /// An error as its number; the log has the cause, ever less often if it goes on.
    fn told<T>(&self, result: DeviceResult<T>, what: &str, offset: u64) -> Result<T, Errno> {
        result.map_err(|error: DeviceError| {
            let number = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
            if number.is_power_of_two() {
                let error = errno::causes(&error);
                tracing::warn!(path = &*self.path, what, offset, number, error, "request failed");
            }
            errno::of_device(&error)
        })
    }
}
