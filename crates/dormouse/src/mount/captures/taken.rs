//! A capture that becomes part of a snapshot.

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::Result;
use dormouse_store::name::SnapRef;
use dormouse_store::source::Staged;
use dormouse_store::store::Store;

use super::description::{Captured, CapturedImage};
use crate::exit::{Fault, Kind};

/// What a capture has, held by this process, too: whatever becomes of the one that mounts, it stays until
/// this is dropped.
#[derive(Debug)]
pub(crate) struct TakenCapture {
    folder: PathBuf,
    captured: Captured,
    held: Vec<Staged>,
}

impl TakenCapture {
    /// Takes the capture in `folder`, a folder of a mount of `store`.
    pub(crate) fn take(folder: &Path, store: &Store) -> Result<TakenCapture> {
        let captured = Captured::read(folder, store)?;
        let held: Result<_> = captured.images.iter().map(|image| image.hold(store)).collect();
        // The mount still holds it: then nothing was lost before it was held here.
        if Captured::read(folder, store)? != captured {
            let message = format!("{} was written to meanwhile", folder.display());
            return Err(Fault::new(Kind::Conflict, message).into());
        }
        Ok(TakenCapture { folder: folder.to_owned(), captured, held: held? })
    }

    /// What it has, for another process to hold.
    pub(crate) fn images(&self) -> &[CapturedImage] {
        &self.captured.images
    }

    /// The same, as it is held here.
    pub(crate) fn held(&self) -> impl Iterator<Item = (&CapturedImage, &Staged)> {
        self.captured.images.iter().zip(&self.held)
    }

    /// What capturing it wrote: data, maps and digests.
    pub(crate) fn written_bytes(&self) -> u64 {
        let each = self.held.iter().map(Staged::figures);
        each.map(|figures| figures.stored_bytes + figures.map_bytes).sum()
    }

    /// The snapshot that it lies over.
    pub(crate) fn parent(&self) -> Result<Option<SnapRef>> {
        self.captured.parent()
    }

    /// Its folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Removes it from the mount.
    pub(crate) fn remove(self) -> io::Result<()> {
        fs::remove_dir_all(&self.folder)
    }
}
