//! How live disks come and go: a crash at any moment leaves a disk, none, or what `disk rm` takes
//! away.
//!
//! ```text
//! disk/.new-ID     a disk that is being made; its rename to ID makes it one
//! disk/.gone-ID    what was ID and is being removed
//! ../.gone-UUID    what was a live VM and is being removed
//! ```
//!
//! The first two are there under the lock of the pin only, or are left of a process that was killed. A disk
//! goes under its own lock, too; locks of disks are never waited for.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use dormouse_live::base::{Base, BlankBase, FileBase};
use dormouse_live::files::{Folder, FolderLock, RealFolder};
use dormouse_live::overlay::{NewOverlay, Overlay, OverlayConfig};
use dormouse_store::name::Name;
use dormouse_store::reader::ImageReader;
use dormouse_store::store::{Durable, Store};

use super::base::{BaseLabel, ImageBase};
use super::unsynced::UnsyncedFolder;
use super::{LiveDisks, LiveFolder, make_private, make_private_later};
use crate::exit::{Fault, Kind};

/// How what is left of a removed VM begins; nobody's name does.
const GONE_PREFIX: &str = ".gone-";

/// What a new disk lies over.
#[derive(Clone, Debug)]
pub(crate) enum NewBase<'a> {
    /// Nothing.
    Blank,

    /// An image of the store, and what people call it.
    Image(&'a ImageReader, String),

    /// A raw file, which nobody may change from now on.
    File(&'a Path),
}

impl LiveDisks {
    /// Makes a live disk over a base. The base is pinned before the disk is made.
    /// If it cannot be made nothing of it stays.
    ///
    /// One that is durable later is when its live VM is [settled](LiveFolder::settle).
    pub(crate) fn create(
        store: &Store,
        folder: &LiveFolder,
        id: &Name,
        from: NewBase<'_>,
        size_bytes: u64,
        durable: Durable,
    ) -> Result<()> {
        let _pin = folder.lock_pin()?;
        if folder.disk(id).exists() {
            let message = format!("there is a live disk {}/{id} already", folder.live);
            return Err(Fault::new(Kind::AlreadyExists, message).into());
        }
        let new = folder.hidden("new", id);
        let made = make(store, folder, id, &new, from, size_bytes, durable);
        if made.is_err() {
            let cleaned = remove_tree(&new)
                .and_then(|()| if folder.is_bare()? { remove_tree(&folder.path) } else { Ok(()) });
            if let Err(error) = cleaned {
                // What failed first is what the user has to know.
                tracing::warn!(%error, "a disk that was not made left something");
            }
        }
        made
    }
}

fn make(
    store: &Store,
    folder: &LiveFolder,
    id: &Name,
    new: &Path,
    from: NewBase<'_>,
    size_bytes: u64,
    durable: Durable,
) -> Result<()> {
    // Beside what it holds: a process that serves its other disks may need all of that.
    let image = match &from {
        NewBase::Image(image, _) => vec![*image],
        _ => Vec::new(),
    };
    store.hold_for_live_too(&folder.live, &image, durable)?;
    let (base, label): (Arc<dyn Base>, BaseLabel) = match from {
        NewBase::Blank => (Arc::new(BlankBase), BaseLabel::Blank),
        NewBase::File(path) => (Arc::new(FileBase::open(path)?), BaseLabel::of_file(path)?),
        NewBase::Image(image, name) => {
            (Arc::new(ImageBase::new(image.clone())), BaseLabel::of(image, name))
        }
    };
    remove_tree(new)?;
    let cannot = || format!("cannot make {}", new.display());
    let files: Arc<dyn Folder> = match durable {
        Durable::AtOnce => {
            make_private(new).with_context(cannot)?;
            Arc::new(RealFolder::new(new))
        }
        Durable::Later => {
            make_private_later(new).with_context(cannot)?;
            Arc::new(UnsyncedFolder::new(new))
        }
    };
    let overlay = NewOverlay { size_bytes, base, base_label: label.to_text()? };
    let config = OverlayConfig::STANDARD;
    // Let go of before others may find it.
    drop(Overlay::create(files, overlay, config)?);
    match durable {
        Durable::AtOnce => folder.rename_disk(new, &folder.disk(id)),
        Durable::Later => fs::rename(new, folder.disk(id)).with_context(cannot),
    }
}

impl LiveFolder {
    /// Whether there is anything of such a live VM, be it what an interrupted command left.
    pub(crate) fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// Whether there is neither a disk nor memory, nor a VM.
    pub(crate) fn is_bare(&self) -> Result<bool> {
        Ok(self.ids()?.is_empty() && !self.memory().exists() && !self.has_vm())
    }

    /// Removes the folder of a VM that was about to be made by somebody who was killed: nothing is in it,
    /// and nobody has its name.
    pub(crate) fn remove_if_never_made(&self) -> Result<()> {
        let _pin = self.lock_pin()?;
        let is_taken = ["vm.lock", "pin"].iter().any(|name| self.path.join(name).exists());
        if !is_taken && self.is_bare()? { self.remove_folder() } else { Ok(()) }
    }

    /// Makes the folder of a VM whose name nobody has yet, with the file that its lock is on; durable when
    /// it is [settled](LiveFolder::settle). It is locked from the first moment that others see it, or they
    /// would take the VM for one that was left.
    pub(crate) fn make_new(&self) -> Result<File> {
        make_private_later(&self.path)
            .with_context(|| format!("cannot make {}", self.path.display()))?;
        let _pin = self.lock_pin()?;
        let lock = self.path.join("vm.lock");
        if !self.is_bare()? || lock.exists() {
            let message = format!("there is a live VM {} already", self.live);
            return Err(Fault::new(Kind::AlreadyExists, message).into());
        }
        let new = self.path.join(".vm.lock.new");
        let made = || -> io::Result<File> {
            let mut options = File::options();
            let file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.lock()?;
            fs::rename(&new, &lock)?;
            Ok(file)
        };
        made().with_context(|| format!("cannot make {}", lock.display()))
    }

    /// Makes durable all that was made of a VM which is not served yet, or has only begun to be: its disks,
    /// its pin, and the names of all.
    pub(crate) fn settle(&self) -> Result<()> {
        // Files come and go under whoever serves the disk, who syncs them himself.
        let sync = |path: &Path| match File::open(path).and_then(|file| file.sync_all()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot sync {}", path.display()))
            }
            _ => Ok(()),
        };
        for id in self.ids()? {
            let disk = self.disk(&id);
            for name in RealFolder::new(&disk).list().context("cannot list a disk's files")? {
                sync(&disk.join(name))?;
            }
            sync(&disk)?;
        }
        sync(&self.path.join("disk"))?;
        sync(&self.path.join("pin"))?;
        sync(&self.path)?;
        // Of the store the folder of all VMs may be new, too.
        self.path.ancestors().skip(1).take(2).try_for_each(sync)
    }

    /// Takes all disks for this process, sound or not; busy if another process has one.
    pub(crate) fn lock_disks(&self) -> Result<Vec<(Name, Box<dyn FolderLock>)>> {
        self.ids()?
            .into_iter()
            .map(|id| {
                let lock = RealFolder::new(self.disk(&id)).lock();
                let lock = lock.with_context(|| format!("cannot lock disk {id}"))?;
                let lock = lock.ok_or_else(|| {
                    let live = &self.live;
                    let message = format!(
                        "another process has the live disk {live}/{id}; \
                         `dormouse serve stop {live}` ends a server that has it"
                    );
                    Fault::new(Kind::Busy, message)
                })?;
                Ok((id, lock))
            })
            .collect()
    }

    /// Removes everything, sound or not. Busy if a process has any of it.
    pub(crate) fn remove(&self) -> Result<()> {
        let _pin = self.lock_pin()?;
        let locks = self.lock_all()?;
        self.remove_memory()?;
        for (id, _) in &locks {
            self.remove_disk_folder(id)?;
        }
        self.remove_folder()
    }

    /// Removes one disk, sound or not, and the live VM with its last one. Busy if a process has
    /// any of the live VM.
    pub(crate) fn remove_disk(&self, store: &Store, id: &Name) -> Result<()> {
        let _pin = self.lock_pin()?;
        let locks = self.lock_all()?;
        if !locks.iter().any(|(one, _)| one == id) {
            let message = format!("there is no live disk {}/{id}", self.live);
            return Err(Fault::new(Kind::NotFound, message).into());
        }
        self.remove_disk_folder(id)?;
        if self.is_bare()? {
            return self.remove_folder();
        }
        for (other, _) in locks.iter().filter(|(other, _)| other != id) {
            // What its description says now must be what a power cut leaves before less is held.
            let synced = RealFolder::new(self.disk(other)).sync();
            synced.with_context(|| format!("cannot sync disk {other}"))?;
        }
        match self.bases(store) {
            Ok(bases) => {
                let held: Vec<_> = bases.iter().collect();
                Ok(store.hold_for_live(&self.live, &held)?)
            }
            Err(error) => {
                tracing::warn!(%error, live = %self.live, "what the removed disk held stays held");
                Ok(())
            }
        }
    }

    /// Keeps other processes from changing what the live VM holds, until it is dropped. Makes the
    /// folder if it is not there.
    pub(super) fn lock_pin(&self) -> Result<File> {
        let path = self.path.join("pin.lock");
        let lock = || -> io::Result<File> {
            let mut options = File::options();
            options.write(true).create(true).truncate(false).mode(0o600);
            loop {
                make_private(&self.path)?;
                let file = match options.open(&path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    file => file?,
                };
                file.lock()?;
                // Who had the lock before may have removed the folder.
                match fs::metadata(&path) {
                    Ok(named) if named.ino() == file.metadata()?.ino() => return Ok(file),
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
        };
        lock().with_context(|| format!("cannot lock {}", path.display()))
    }

    /// All disks, with nobody serving the memory.
    fn lock_all(&self) -> Result<Vec<(Name, Box<dyn FolderLock>)>> {
        if !self.is_memory_free()? {
            let message = format!("another process serves the memory of {}", self.live);
            return Err(Fault::new(Kind::Busy, message).into());
        }
        self.lock_disks()
    }

    /// Removes the folder, whatever is in it. At once for others, who may be about to take one of its
    /// locks and would make that file anew.
    fn remove_folder(&self) -> Result<()> {
        let gone = self.path.with_file_name(format!("{GONE_PREFIX}{}", uuid::Uuid::new_v4()));
        fs::rename(&self.path, &gone)
            .with_context(|| format!("cannot remove {}", self.path.display()))?;
        if let Err(error) = remove_tree(&gone) {
            tracing::warn!(error = &*error, "what is left is removed with the next collection");
        }
        Ok(())
    }

    fn hidden(&self, what: &str, id: &Name) -> PathBuf {
        self.path.join("disk").join(format!(".{what}-{id}"))
    }

    fn remove_disk_folder(&self, id: &Name) -> Result<()> {
        let gone = self.hidden("gone", id);
        remove_tree(&gone)?;
        self.rename_disk(&self.disk(id), &gone)?;
        remove_tree(&gone)
    }

    fn rename_disk(&self, from: &Path, to: &Path) -> Result<()> {
        fs::rename(from, to)
            .and_then(|()| File::open(self.path.join("disk"))?.sync_all())
            .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
    }
}

/// Removes what interrupted removals of live VMs left.
pub(crate) fn remove_leftovers(store_dir: &Path) -> Result<()> {
    let live = store_dir.join("live");
    let entries = match fs::read_dir(&live) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("cannot list {}", live.display()))?,
    };
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}", live.display()))?;
        if entry.file_name().as_encoded_bytes().starts_with(GONE_PREFIX.as_bytes())
            && let Err(error) = remove_tree(&entry.path())
        {
            // Somebody else may be at it.
            tracing::debug!(error = &*error, "left for the next collection");
        }
    }
    Ok(())
}

/// Removes a folder if it is there.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
