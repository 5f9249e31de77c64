//! The snapshots of a store as entries.

use std::sync::Arc;
use std::time::SystemTime;

use dormouse_serve::device::{BlockDevice, DeviceErrorKind, DeviceResult};
use dormouse_serve::fuse::{Access, Entry, Kind, Opened, TreeError, TreeErrorKind, TreeResult};
use dormouse_store::error::{Error, ErrorKind};
use dormouse_store::manifest::{ImageEntry, Manifest};
use dormouse_store::name::{ImageName, Name, SnapRef};
use dormouse_store::store::Store;

use super::path::Group;
use super::touches::Watched;
use super::tree::{folder, missing};
use crate::live::ImageDevice;

/// Read-only as seen, and yet openable for writing by whoever mounts: QEMU before 8.2 opens a
/// memory file so, also when it maps it privately.
pub(super) const MEMORY_PERMISSIONS: u16 = 0o644;

/// All that never changes.
const PERMISSIONS: u16 = 0o444;

/// The store's side of the tree.
#[derive(Debug)]
pub(super) struct Snapshots {
    pub(super) store: Store,
}

impl Snapshots {
    /// The names that have snapshots.
    pub(super) fn names(&self) -> TreeResult<Vec<Name>> {
        let mut names = self.store.names().map_err(failed)?;
        let mut error = None;
        names.retain(|name| match self.store.numbers(name) {
            Ok(numbers) => !numbers.is_empty(),
            Err(failure) => {
                error = Some(failure);
                false
            }
        });
        error.map_or(Ok(names), |error| Err(failed(error)))
    }

    pub(super) fn numbers(&self, name: &Name) -> TreeResult<Vec<u64>> {
        let numbers = self.store.numbers(name).map_err(failed)?;
        if numbers.is_empty() { Err(missing()) } else { Ok(numbers) }
    }

    pub(super) fn manifest(&self, snap: &SnapRef) -> TreeResult<Manifest> {
        self.store.manifest(snap).map_err(failed)
    }

    /// A snapshot's folder, or one in it. It is there for as long as the snapshot is, which is looked
    /// up each time.
    pub(super) fn folder(&self, snap: &SnapRef) -> TreeResult<Entry> {
        Ok(folder(SystemTime::from(self.manifest(snap)?.created)))
    }

    pub(super) fn group(&self, snap: &SnapRef, group: Group) -> TreeResult<Entry> {
        let manifest = self.manifest(snap)?;
        if members(&manifest, group).next().is_none() {
            return Err(missing());
        }
        Ok(Entry { is_fixed: true, ..folder(SystemTime::from(manifest.created)) })
    }

    pub(super) fn image(&self, snap: &SnapRef, image: &ImageName) -> TreeResult<Entry> {
        let manifest = self.manifest(snap)?;
        let entry = manifest.image(image).ok_or_else(missing)?;
        let is_memory = *image == ImageName::Memory;
        Ok(Entry {
            kind: Kind::File,
            identity: 0,
            size_bytes: entry.size_bytes,
            allocated_bytes: self.allocated_bytes(snap, entry)?,
            modified: SystemTime::from(manifest.created),
            permissions: if is_memory { MEMORY_PERMISSIONS } else { PERMISSIONS },
            is_fixed: true,
        })
    }

    pub(super) fn manifest_file(&self, snap: &SnapRef) -> TreeResult<Entry> {
        let manifest = self.manifest(snap)?;
        let size_bytes = manifest.encode().map_err(failed)?.len() as u64;
        Ok(Entry {
            kind: Kind::File,
            identity: 0,
            size_bytes,
            allocated_bytes: size_bytes,
            modified: SystemTime::from(manifest.created),
            permissions: PERMISSIONS,
            is_fixed: true,
        })
    }

    pub(super) fn open_image(
        &self,
        snap: &SnapRef,
        image: &ImageName,
        access: Access,
    ) -> TreeResult<Opened> {
        if access == Access::Write && *image != ImageName::Memory {
            return Err(TreeErrorKind::ReadOnly.into());
        }
        let snapshot = self.store.snapshot(snap).map_err(failed)?;
        let is_memory = *image == ImageName::Memory;
        let device = ImageDevice::new(snapshot.image(image).map_err(failed)?);
        Ok(Opened::Image(match is_memory {
            true => Arc::new(Watched::new(device, snapshot)),
            false => Arc::new(device),
        }))
    }

    pub(super) fn open_manifest(&self, snap: &SnapRef, access: Access) -> TreeResult<Opened> {
        if access == Access::Write {
            return Err(TreeErrorKind::ReadOnly.into());
        }
        let bytes = self.manifest(snap)?.encode().map_err(failed)?;
        Ok(Opened::Image(Arc::new(Bytes(bytes))))
    }

    /// Bytes of an image that are stored: the commit that captured it counted them; for one that was
    /// taken over as it was, its map tells.
    fn allocated_bytes(&self, snap: &SnapRef, entry: &ImageEntry) -> TreeResult<u64> {
        match &entry.figures {
            Some(figures) => Ok(figures.nonzero_bytes),
            None => {
                let snapshot = self.store.snapshot(snap).map_err(failed)?;
                let image = snapshot.image(&entry.image).map_err(failed)?;
                let mut bytes = 0;
                image
                    .for_each_extent(0..image.size_bytes(), &mut |extent| {
                        if extent.source != dormouse_image::map::Source::Zero {
                            bytes += (extent.range.end - extent.range.start).next_multiple_of(4096);
                        }
                        Ok(())
                    })
                    .map_err(failed)?;
                Ok(bytes)
            }
        }
    }
}

/// The names of a manifest's images in one group.
pub(super) fn members(manifest: &Manifest, group: Group) -> impl Iterator<Item = &Name> {
    manifest.images.iter().filter_map(move |entry| group.member(&entry.image))
}

/// An error of the store as one of the tree.
pub(super) fn failed(error: Error) -> TreeError {
    let kind = match error.kind() {
        ErrorKind::NotFound => TreeErrorKind::NotFound,
        ErrorKind::InvalidInput => TreeErrorKind::Invalid,
        ErrorKind::Busy => TreeErrorKind::Busy,
        _ => TreeErrorKind::Io,
    };
    TreeError::new(kind, error)
}

/// A small file in memory.
pub(super) struct Bytes(pub(super) Vec<u8>);

impl BlockDevice for Bytes {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<()> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.0.get(from..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(DeviceErrorKind::Invalid)?);
        Ok(())
    }
}
