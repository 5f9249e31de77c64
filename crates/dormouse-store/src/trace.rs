//! Traces beside snapshots: bytes that the store keeps, replaces at once, and does not understand.
//!
//! They are advice, so nothing waits for them: of two that are put at the same time one stays, and
//! one whose snapshot is gone is deleted by the next collection.

use std::collections::HashSet;
use std::io;

use uuid::Uuid;

use crate::disk::{Disk, read_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::layout::TRACES;
use crate::pin::Pin;
use crate::store::Store;

/// The longest trace.
pub const TRACE_BYTES_MAX: u64 = 32 << 20;

fn trace_path(snapshot: Uuid) -> String {
    format!("{TRACES}/{snapshot}")
}

/// The trace of a snapshot, if there is one.
pub(crate) fn read(disk: &dyn Disk, snapshot: Uuid) -> Result<Option<Vec<u8>>> {
    let path = trace_path(snapshot);
    match read_file(disk, &path, TRACE_BYTES_MAX) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("cannot read {path}"), error)),
    }
}

/// Replaces the trace of a snapshot.
pub(crate) fn put(store: &Store, snapshot: Uuid, bytes: &[u8]) -> Result<()> {
    let len = bytes.len() as u64;
    if len > TRACE_BYTES_MAX {
        let message = format!("a trace of {len} bytes; expected {TRACE_BYTES_MAX} at most");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let (disk, path) = (store.disk(), trace_path(snapshot));
    let cannot = || format!("cannot write {path}");
    // Whose name the file under `tmp/` has, so that a collection sweeps it after a crash only.
    let pin = Pin::new(disk, &format!("trace {snapshot}"))?;
    let tmp = pin.tmp_path("trace");
    disk.create_dir_all(TRACES).context(cannot)?;
    let mut file = disk.create(&tmp).context(cannot)?;
    let put = file
        .write_all(bytes)
        .and_then(|()| file.sync())
        .and_then(|()| disk.rename(&tmp, &path))
        .and_then(|()| disk.sync_dir(TRACES));
    if put.is_err() {
        // What cannot be removed now, or is renamed already, is swept or used later.
        let _ = disk.remove(&tmp);
    }
    put.context(cannot)
}

/// Deletes traces of snapshots that are not among `there`, and tells how many there were. Files of
/// other names are left alone.
pub(crate) fn sweep(disk: &dyn Disk, there: &HashSet<Uuid>, dry_run: bool) -> Result<u64> {
    let entries = match disk.list(TRACES) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Error::io(format!("cannot list {TRACES}"), error)),
    };
    let mut swept = 0;
    for entry in entries {
        let uuid = Uuid::try_parse(&entry.name).ok().filter(|uuid| uuid.to_string() == entry.name);
        let Some(uuid) = uuid.filter(|uuid| !there.contains(uuid)) else { continue };
        let path = trace_path(uuid);
        if !dry_run {
            match disk.remove(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("cannot remove {path}"), error));
                }
                _ => {}
            }
        }
        swept += 1;
    }
    Ok(swept)
}
