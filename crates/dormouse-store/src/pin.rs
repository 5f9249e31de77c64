//! Pins: what a running process relies on, so that no collection takes it away.
//!
//! A pin is a file in `pins/` that its owner keeps locked as long as it lives; a pin that can be
//! locked belongs to nobody. It lists packs and map roots, a line each. The protocol:
//!
//! - **To rely on a pack or root**: take `gc.lock` shared, append the line, check that what it names
//!   is still there, release. From then on it stays.
//! - **To delete**: take `gc.lock` exclusive, read all pins, then all manifests, delete what none
//!   names. In this order, because a commit publishes and then lets go of its pin without a lock.
//!
//! So a pin is either read by the collector or refused by the check. Lock order: `gc.lock`, then a
//! snapshot's folder, then `index/merge.lock`; pins are locked at birth only, before any of them.
//! Nothing here needs to survive a power cut, because no owner does.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use dormouse_image::map::{Map, NodeRef};
use dormouse_image::pack::PackId;
use uuid::Uuid;

use crate::disk::{Disk, DiskLock, DiskWriter, LockKind, LockWait, read_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::layout::{GC_LOCK, PINS};

/// The longest pin that is read: 32 million packs.
pub(crate) const PIN_BYTES_MAX: u64 = 1 << 30;

/// A held pin. Dropping it lets go of everything.
#[derive(Debug)]
pub(crate) struct Pin {
    disk: Arc<dyn Disk>,
    id: Uuid,
    /// Guards the order of lines; taken after `gc.lock`.
    state: Mutex<PinState>,
    _lock: Box<dyn DiskLock>,
}

#[derive(Debug)]
struct PinState {
    file: Box<dyn DiskWriter>,
    packs: HashSet<PackId>,
}

/// What a pin's file names.
#[derive(Debug, Default)]
pub(crate) struct Pinned {
    pub(crate) packs: Vec<PackId>,
    pub(crate) roots: Vec<Map>,
}

impl Pin {
    /// Makes a pin that holds nothing yet. `owner` is for people who look at the file.
    pub(crate) fn new(disk: &Arc<dyn Disk>, owner: &str) -> Result<Pin> {
        let id = Uuid::new_v4();
        let path = format!("{PINS}/{id}");
        let cannot = || format!("cannot pin in {PINS}");
        // A sweeper may remove the file before it is locked; `create` then fails on the next line
        // of nobody's pin, so lock first, which makes the file, and write to the one that is held.
        let lock = disk
            .lock(&path, LockKind::Exclusive, LockWait::Wait, true)
            .context(cannot)?
            .ok_or_else(|| Error::new(ErrorKind::Busy, cannot()))?;
        let mut file = disk.append(&path).context(cannot)?;
        file.write_all(format!("dormouse-pin 1 {} {owner}\n", std::process::id()).as_bytes())
            .context(cannot)?;
        let state = Mutex::new(PinState { file, packs: HashSet::new() });
        Ok(Pin { disk: Arc::clone(disk), id, state, _lock: lock })
    }

    /// The path of a temporary file of this pin's owner.
    pub(crate) fn tmp_path(&self, kind: &str) -> String {
        format!("{}/{}.{kind}", crate::layout::TMP, self.id)
    }

    /// Holds a pack, if `exists` says that it is still there.
    pub(crate) fn hold_pack(&self, pack: PackId, exists: impl FnOnce() -> bool) -> Result<bool> {
        if self.lock_state().packs.contains(&pack) {
            return Ok(true);
        }
        let _shared = self.share()?;
        let mut state = self.lock_state();
        state
            .file
            .write_all(format!("pack {pack}\n").as_bytes())
            .context(|| "cannot write a pin".to_owned())?;
        if !exists() {
            return Ok(false);
        }
        state.packs.insert(pack);
        Ok(true)
    }

    /// Holds everything below some roots, if `exists` says that they are still there.
    pub(crate) fn hold_roots(
        &self,
        maps: impl IntoIterator<Item = Map>,
        exists: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let _shared = self.share()?;
        let lines = root_lines(maps);
        self.lock_state()
            .file
            .write_all(lines.as_bytes())
            .context(|| "cannot write a pin".to_owned())?;
        exists()
    }

    fn share(&self) -> Result<Box<dyn DiskLock>> {
        self.disk
            .lock(GC_LOCK, LockKind::Shared, LockWait::Wait, true)
            .context(|| format!("cannot lock {GC_LOCK}"))?
            .ok_or_else(|| Error::new(ErrorKind::Busy, format!("{GC_LOCK} is taken")))
    }

    fn lock_state(&self) -> std::sync::MutexGuard<'_, PinState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // A pin that cannot be removed is swept by the next collection.
        if let Err(error) = self.disk.remove(&format!("{PINS}/{}", self.id)) {
            tracing::debug!(pin = %self.id, %error, "pin left for the next gc");
        }
    }
}

/// The lines that name the roots of some maps.
pub(crate) fn root_lines(maps: impl IntoIterator<Item = Map>) -> String {
    maps.into_iter()
        .filter_map(|map| map.root.map(|root| (root, map.blocks)))
        .map(|(root, blocks)| format!("root {} {} {blocks}\n", root.pack, root.node))
        .collect()
}

/// Reads the pins of living owners and of live VMs. With `sweep`, removes those of dead ones; `gc.lock` must then be
/// held exclusively. Returns what is pinned, the ids of the living, and how many were removed.
pub(crate) fn read_pins(disk: &dyn Disk, sweep: bool) -> Result<(Pinned, HashSet<String>, u64)> {
    let mut pinned = Pinned::default();
    let mut living = HashSet::new();
    let mut swept = 0;
    let entries = disk.list(PINS).context(|| format!("cannot list {PINS}"))?;
    for entry in entries.into_iter().filter(|entry| !entry.is_dir) {
        let path = format!("{PINS}/{}", entry.name);
        match disk.lock(&path, LockKind::Exclusive, LockWait::Try, false) {
            Ok(Some(_dead)) => {
                if sweep {
                    match disk.remove(&path) {
                        Ok(()) => swept += 1,
                        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                        Err(error) => {
                            return Err(Error::io(format!("cannot remove {path}"), error));
                        }
                    }
                }
                continue;
            }
            Ok(None) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::io(format!("cannot lock {path}"), error)),
        }
        living.insert(entry.name);
        match read_file(disk, &path, PIN_BYTES_MAX) {
            Ok(bytes) => parse_pin(&path, &bytes, &mut pinned)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(format!("cannot read {path}"), error)),
        }
    }
    swept += crate::live::read_held(disk, &mut pinned, sweep)?;
    Ok((pinned, living, swept))
}

pub(crate) fn parse_pin(path: &str, bytes: &[u8], pinned: &mut Pinned) -> Result<()> {
    let text = String::from_utf8_lossy(bytes);
    for line in text.lines() {
        let mut words = line.split(' ');
        let parsed = match (words.next(), words.next(), words.next(), words.next()) {
            (Some("dormouse-pin"), Some("1"), ..) => Some(()),
            (Some("pack"), Some(id), None, None) => {
                PackId::parse(id).map(|pack| pinned.packs.push(pack))
            }
            (Some("root"), Some(id), Some(node), Some(blocks)) => PackId::parse(id)
                .zip(node.parse().ok())
                .zip(blocks.parse().ok())
                .map(|((pack, node), blocks)| {
                    pinned.roots.push(Map { blocks, root: Some(NodeRef { pack, node }) });
                }),
            _ => None,
        };
        // A living owner's pin that cannot be understood may hold anything: delete nothing.
        if parsed.is_none() {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{path} belongs to a running process and is not understood: {line:?}"),
            ));
        }
    }
    Ok(())
}
