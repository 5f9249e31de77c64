//! Errors as the numbers that programs get, and as lines in the log.

use std::error::Error as StdError;

use fuser::Errno;

use super::tree::{TreeError, TreeErrorKind};
use crate::device::{DeviceError, DeviceErrorKind};

/// The number for a device's error. `ENOSYS` is never among them: the kernel would take it for all
/// files and all time.
pub(super) fn of_device(error: &DeviceError) -> Errno {
    match error.kind() {
        DeviceErrorKind::Io | DeviceErrorKind::Shutdown => Errno::EIO,
        DeviceErrorKind::NoSpace => Errno::ENOSPC,
        DeviceErrorKind::ReadOnly => Errno::EROFS,
        DeviceErrorKind::NotSupported => Errno::EOPNOTSUPP,
        DeviceErrorKind::Invalid => Errno::EINVAL,
    }
}

/// The number for a tree's error; what nobody asked for goes to the log.
pub(super) fn of_tree(path: &str, error: &TreeError) -> Errno {
    match error.kind() {
        TreeErrorKind::Io | TreeErrorKind::Busy => {
            tracing::warn!(path, error = causes(error), "cannot be opened or looked at");
        }
        _ => tracing::debug!(path, error = causes(error), "refused"),
    }
    match error.kind() {
        TreeErrorKind::NotFound => Errno::ENOENT,
        TreeErrorKind::AlreadyExists => Errno::EEXIST,
        TreeErrorKind::Busy => Errno::EBUSY,
        TreeErrorKind::ReadOnly => Errno::EROFS,
        TreeErrorKind::NotPermitted => Errno::EPERM,
        TreeErrorKind::NotEmpty => Errno::ENOTEMPTY,
        TreeErrorKind::Invalid => Errno::EINVAL,
        TreeErrorKind::NoSpace => Errno::ENOSPC,
        TreeErrorKind::Io => Errno::EIO,
    }
}

/// An error and what caused it, in one line.
pub(super) fn causes(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
