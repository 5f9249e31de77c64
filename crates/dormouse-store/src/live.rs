//! What live VMs hold: a pin that outlives processes and power cuts.
//!
//! A live VM has a folder `live/NAME/`. Its file `pin` names the map roots that its disks and memory
//! lie over, in the lines of an ordinary pin. It is replaced at once and durably, before anything
//! is relied on, and read by every collection whether or not a process serves the VM. That of a VM which a
//! power cut ends anyway may become durable later.

use std::io;

use dormouse_image::map::Map;
use uuid::Uuid;

use crate::disk::{Disk, LockKind, LockWait, read_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::layout::{GC_LOCK, LIVE};
use crate::name::Name;
use crate::pin::{PIN_BYTES_MAX, Pinned, parse_pin, root_lines};

/// When something new survives a power cut; it survives processes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durable {
    /// When it is there.
    AtOnce,

    /// When whoever made it, and the folder before, has synced it, its folder and those above: before
    /// anybody relies on it.
    Later,
}

/// The path of a live VM's folder.
pub(crate) fn live_folder(name: &Name) -> String {
    format!("{LIVE}/{name}")
}

/// Makes a live VM hold `maps` beside what it holds. The caller must hold them already, and keep
/// others from changing the pin.
pub(crate) fn hold_too(disk: &dyn Disk, name: &Name, maps: &[Map], durable: Durable) -> Result<()> {
    let path = format!("{}/pin", live_folder(name));
    let mut pinned = Pinned::default();
    match read_file(disk, &path, PIN_BYTES_MAX) {
        Ok(bytes) => parse_pin(&path, &bytes, &mut pinned)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io(format!("cannot read {path}"), error)),
    }
    let mut all = pinned.roots;
    all.extend(maps.iter().filter(|map| !all.contains(map)).copied().collect::<Vec<_>>());
    hold(disk, name, &all, durable)
}

/// Makes a live VM hold `maps` and nothing else. The caller must hold them already.
pub(crate) fn hold(disk: &dyn Disk, name: &Name, maps: &[Map], durable: Durable) -> Result<()> {
    let folder = live_folder(name);
    let (tmp, path) = (format!("{folder}/pin.{}", Uuid::new_v4()), format!("{folder}/pin"));
    let cannot = || format!("cannot write {path}");
    // A collection reads either the old pin, whose maps the caller still holds, or the new one.
    let _shared = disk
        .lock(GC_LOCK, LockKind::Shared, LockWait::Wait, true)
        .context(|| format!("cannot lock {GC_LOCK}"))?
        .ok_or_else(|| Error::new(ErrorKind::Busy, format!("{GC_LOCK} is taken")))?;
    let is_now = durable == Durable::AtOnce;
    if is_now {
        disk.create_dir_all(&folder).context(cannot)?;
    }
    let mut file = disk.create(&tmp).context(cannot)?;
    let text = format!("dormouse-pin 1 0 live {name}\n{}", root_lines(maps.iter().copied()));
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| if is_now { file.sync() } else { Ok(()) })
        .and_then(|()| disk.rename(&tmp, &path));
    if let Err(error) = written {
        return Err(match disk.remove(&tmp) {
            Ok(()) => Error::io(cannot(), error),
            // The next collection tries again.
            Err(_) => Error::io(format!("{}, and {tmp} stays", cannot()), error),
        });
    }
    if is_now { disk.sync_dir(&folder).context(cannot) } else { Ok(()) }
}

/// Reads what all live VMs hold. With `sweep`, removes pins that never came to their place, of processes
/// that died on the way; `gc.lock` must then be held exclusively. Returns how many were removed.
pub(crate) fn read_held(disk: &dyn Disk, pinned: &mut Pinned, sweep: bool) -> Result<u64> {
    let entries = match disk.list(LIVE) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Error::io(format!("cannot list {LIVE}"), error)),
    };
    let mut swept = 0;
    for entry in entries.into_iter().filter(|entry| entry.is_dir) {
        let folder = format!("{LIVE}/{}", entry.name);
        let path = format!("{folder}/pin");
        match read_file(disk, &path, PIN_BYTES_MAX) {
            Ok(bytes) => parse_pin(&path, &bytes, pinned)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(format!("cannot read {path}"), error)),
        }
        if sweep {
            swept += sweep_unplaced(disk, &folder)
                .context(|| format!("cannot sweep what nobody holds in {folder}"))?;
        }
    }
    Ok(swept)
}

/// Removes pins that never came to their place: with `gc.lock` held exclusively nobody is about to move one.
fn sweep_unplaced(disk: &dyn Disk, folder: &str) -> io::Result<u64> {
    let entries = match disk.list(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut swept = 0;
    for entry in entries.into_iter().filter(|entry| !entry.is_dir) {
        let id = entry.name.strip_prefix("pin.").and_then(|id| Uuid::try_parse(id).ok());
        if id.is_none() {
            continue;
        }
        match disk.remove(&format!("{folder}/{}", entry.name)) {
            Ok(()) => swept += 1,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(swept)
}
