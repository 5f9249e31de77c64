//! What is shown of snapshots that were removed: the memory of those from which live VMs woke, as long
//! as they live. A VMM may still have to open it, and a successor of this process opens it again; the
//! live VM's pin keeps its blocks.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use dormouse_serve::fuse::{Entry, Kind, Opened, TreeError, TreeErrorKind, TreeResult};
use dormouse_store::name::{ImageName, Name, SnapRef};
use dormouse_store::store::Store;

use super::live::failed;
use super::snapshots::MEMORY_PERMISSIONS;
use super::tree::folder;
use crate::exit::Kind as FaultKind;
use crate::live::{ImageDevice, LiveFolder};
use crate::vm::{Record, Woken};

/// The removed snapshots of a store. Each question comes with the answer that there is no such
/// snapshot, which stands if no VM woke from it.
#[derive(Debug)]
pub(super) struct Removed {
    pub(super) store: Store,
    pub(super) store_dir: PathBuf,
}

impl Removed {
    pub(super) fn new(store: Store, store_dir: &Path) -> Removed {
        Removed { store, store_dir: store_dir.to_owned() }
    }

    pub(super) fn name(&self, name: &Name, missing: TreeError) -> TreeResult<Entry> {
        self.find(missing, |snap| snap.name == *name).map(|_| folder(SystemTime::UNIX_EPOCH))
    }

    pub(super) fn folder(&self, snap: &SnapRef, missing: TreeError) -> TreeResult<Entry> {
        let (_, woken) = self.find(missing, |of| of == snap)?;
        Ok(folder(SystemTime::from(woken.created)))
    }

    pub(super) fn image(
        &self,
        snap: &SnapRef,
        image: &ImageName,
        missing: TreeError,
    ) -> TreeResult<Entry> {
        let (live, woken) = self.find_memory(snap, image, missing)?;
        let image = woken.image.open(&self.store, &live).map_err(failed)?;
        Ok(Entry {
            kind: Kind::File,
            identity: 0,
            size_bytes: image.ok_or(TreeErrorKind::NotFound)?.size_bytes(),
            allocated_bytes: 0,
            modified: SystemTime::from(woken.created),
            permissions: MEMORY_PERMISSIONS,
            is_fixed: true,
        })
    }

    /// Opens it, whatever for: every write to it is refused.
    pub(super) fn open(
        &self,
        snap: &SnapRef,
        image: &ImageName,
        missing: TreeError,
    ) -> TreeResult<Opened> {
        let (live, woken) = self.find_memory(snap, image, missing)?;
        let image = woken.image.open(&self.store, &live).map_err(failed)?;
        Ok(Opened::Image(Arc::new(ImageDevice::new(image.ok_or(TreeErrorKind::NotFound)?))))
    }

    fn find_memory(
        &self,
        snap: &SnapRef,
        image: &ImageName,
        missing: TreeError,
    ) -> TreeResult<(Name, Woken)> {
        if *image != ImageName::Memory {
            return Err(missing);
        }
        self.find(missing, |of| of == snap)
    }

    /// A VM that woke from a snapshot.
    fn find(
        &self,
        missing: TreeError,
        is_it: impl Fn(&SnapRef) -> bool,
    ) -> TreeResult<(Name, Woken)> {
        if missing.kind() != TreeErrorKind::NotFound {
            return Err(missing);
        }
        let mut unknown = None;
        for folder in LiveFolder::all(&self.store_dir).map_err(failed)? {
            let record = match Record::read(folder.path()) {
                Ok(Some(record)) => record,
                Ok(None) => continue,
                // One that is damaged tells nothing; one that cannot be read now may be it.
                Err(error) if FaultKind::of(&error) == FaultKind::Corrupt => continue,
                Err(error) => {
                    unknown = Some(failed(error));
                    continue;
                }
            };
            let Some(woken) = record.relies_on() else { continue };
            if woken.snapshot.parse().is_ok_and(|of| is_it(&of)) {
                return Ok((folder.live, woken.clone()));
            }
        }
        Err(unknown.unwrap_or(missing))
    }
}
