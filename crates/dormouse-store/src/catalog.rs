//! The catalogue: which snapshots there are, and the one step that adds or removes one.
//!
//! A name's folder is locked while a number is taken and while one is removed, so that numbers only
//! ever count up: a name's next number is over that of every manifest that is there and not below
//! what the file `next` says, which `rm` writes before it takes the newest away.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::commit::SyncClock;
use crate::disk::{Disk, DiskLock, LockKind, LockWait, read_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::layout::{SNAPSHOTS, manifest_path, snapshot_folder};
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::name::{Name, SnapRef};
use crate::pin::Pin;
use crate::store::Listing;

/// The file in a name's folder that is locked; it also remembers numbers of removed snapshots.
const NEXT: &str = "next";

/// The last number, so that there is one after it. Only a file put there by hand comes near.
const NUMBER_MAX: u64 = u64::MAX - 1;

/// The snapshots of a store.
#[derive(Debug)]
pub(crate) struct Catalog {
    disk: Arc<dyn Disk>,
}

impl Catalog {
    pub(crate) fn new(disk: Arc<dyn Disk>) -> Catalog {
        Catalog { disk }
    }

    /// All names that have or had snapshots.
    pub(crate) fn names(&self) -> Result<Vec<Name>> {
        let entries = self.disk.list(SNAPSHOTS).context(|| format!("cannot list {SNAPSHOTS}"))?;
        let mut names: Vec<Name> = entries
            .into_iter()
            .filter(|entry| entry.is_dir)
            .filter_map(|entry| Name::new(entry.name).ok())
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    /// The numbers of a name's snapshots, ascending.
    pub(crate) fn numbers(&self, name: &Name) -> Result<Vec<u64>> {
        let folder = snapshot_folder(name);
        let entries = match self.disk.list(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Error::io(format!("cannot list {folder}"), error)),
        };
        let mut numbers: Vec<u64> = entries
            .iter()
            .filter_map(|entry| entry.name.strip_suffix(".json"))
            .filter_map(|digits| digits.parse().ok().filter(|n: &u64| n.to_string() == digits))
            .filter(|&number| number <= NUMBER_MAX)
            .collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// The number that a reference means.
    pub(crate) fn resolve(&self, snap: &SnapRef) -> Result<u64> {
        match snap.number {
            Some(number) => Ok(number),
            None => self.numbers(&snap.name)?.last().copied().ok_or_else(|| self.not_found(snap)),
        }
    }

    /// A snapshot's manifest.
    pub(crate) fn manifest(&self, snap: &SnapRef) -> Result<Manifest> {
        let number = self.resolve(snap)?;
        self.read(&snap.name, number).map_err(|error| match error.kind() {
            ErrorKind::NotFound => self.not_found(snap),
            _ => error,
        })
    }

    /// All manifests, or those of one name, read by two threads: a listing is all small files.
    pub(crate) fn list(&self, name: Option<&Name>) -> Result<Listing> {
        let names = match name {
            Some(name) => vec![name.clone()],
            None => self.names()?,
        };
        let mut wanted = Vec::new();
        for name in &names {
            wanted.extend(self.numbers(name)?.into_iter().map(|number| (name, number)));
        }
        let next = AtomicUsize::new(0);
        let threads = if wanted.len() < 64 { 1 } else { 2 };
        let read = || {
            let mut found = Vec::new();
            loop {
                let first = next.fetch_add(32, Ordering::Relaxed);
                if first >= wanted.len() {
                    return found;
                }
                for (at, (name, number)) in wanted.iter().enumerate().skip(first).take(32) {
                    found.push((at, self.read(name, *number)));
                }
            }
        };
        let mut found: Vec<(usize, Result<Manifest>)> = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(read)).collect();
            let mut found = read();
            for other in others {
                // A manifest that is left out is one whose packs a collection deletes.
                found.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            found
        });
        found.sort_unstable_by_key(|(at, _)| *at);
        let mut listing =
            Listing { snapshots: Vec::with_capacity(found.len()), damaged: Vec::new() };
        for (at, result) in found {
            let (name, number) = wanted[at];
            match result {
                Ok(manifest) => listing.snapshots.push(manifest),
                // Removed since its folder was listed.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => listing.damaged.push((format!("{name}@{number}"), error)),
            }
        }
        Ok(listing)
    }

    /// Publishes a manifest, giving it its number. With `newest`, the name's newest snapshot must
    /// still be that one (`Some(None)`: there must be none). This is the commit point.
    pub(crate) fn publish(
        &self,
        pin: &Pin,
        manifest: &mut Manifest,
        newest: Option<Option<u64>>,
        clock: &mut SyncClock,
    ) -> Result<u64> {
        let name = manifest.name.clone();
        let folder = snapshot_folder(&name);
        self.disk.create_dir_all(&folder).context(|| format!("cannot make {folder}"))?;
        let _lock = self.lock(&name)?;
        let numbers = self.numbers(&name)?;
        if let Some(newest) = newest
            && numbers.last().copied() != newest
        {
            return Err(conflict(&name, numbers.last().copied(), newest));
        }
        let next = numbers.last().map_or(1, |last| last + 1).max(self.remembered(&name)?);
        if next > NUMBER_MAX {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("{name} has used up its numbers; take another name"),
            ));
        }
        manifest.number = next;
        let bytes = manifest.encode()?;
        let path = manifest_path(&name, next);
        let tmp = pin.tmp_path("json");
        let cannot = || format!("cannot publish {path}");
        let mut file = self.disk.create(&tmp).context(cannot)?;
        let published = file
            .write_all(&bytes)
            .and_then(|()| clock.time(&mut || file.sync()))
            .and_then(|()| self.disk.link(&tmp, &path))
            .and_then(|()| clock.time(&mut || self.disk.sync_dir(&folder)));
        // The manifest has its own name now or never will; a rest is swept by `gc`.
        let _ = self.disk.remove(&tmp);
        match published {
            Ok(()) => Ok(bytes.len() as u64),
            Err(error) => {
                // A name whose durability is unknown must not be taken for a snapshot, and as somebody
                // may have seen it, its number is not given out again. The error to tell is the
                // first one. A name that was taken is not ours.
                if error.kind() != io::ErrorKind::AlreadyExists {
                    if self.disk.open(&path).is_ok() {
                        let _ = self.remember(&name, next.saturating_add(1));
                    }
                    let _ = self.disk.remove(&path);
                }
                Err(Error::io(cannot(), error))
            }
        }
    }

    /// Removes a snapshot, also one whose manifest is damaged.
    pub(crate) fn remove(&self, snap: &SnapRef) -> Result<()> {
        let folder = snapshot_folder(&snap.name);
        match self.disk.list(&folder) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(self.not_found(snap));
            }
            Err(error) => return Err(Error::io(format!("cannot list {folder}"), error)),
        }
        let _lock = self.lock(&snap.name)?;
        let number = self.resolve(snap)?;
        if self.numbers(&snap.name)?.last() == Some(&number) {
            self.remember(&snap.name, number.saturating_add(1))?;
        }
        let path = manifest_path(&snap.name, number);
        self.disk
            .remove(&path)
            .and_then(|()| self.disk.sync_dir(&folder))
            .context(|| format!("cannot remove {path}"))
    }

    fn read(&self, name: &Name, number: u64) -> Result<Manifest> {
        let path = manifest_path(name, number);
        let bytes = read_file(&*self.disk, &path, MANIFEST_BYTES_MAX)
            .context(|| format!("cannot read {path}"))?;
        let manifest = Manifest::decode(&bytes).map_err(|error| {
            let kind = error.kind();
            Error::with_source(kind, format!("cannot use {path}"), error)
        })?;
        if manifest.name != *name || manifest.number != number {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{path} is the manifest of {}", manifest.display_name()),
            ));
        }
        Ok(manifest)
    }

    fn lock(&self, name: &Name) -> Result<Box<dyn DiskLock>> {
        let path = format!("{}/{NEXT}.lock", snapshot_folder(name));
        self.disk
            .lock(&path, LockKind::Exclusive, LockWait::Wait, true)
            .context(|| format!("cannot lock {path}"))?
            .ok_or_else(|| Error::new(ErrorKind::Busy, format!("{path} is taken")))
    }

    fn remembered(&self, name: &Name) -> Result<u64> {
        let path = format!("{}/{NEXT}", snapshot_folder(name));
        match read_file(&*self.disk, &path, 64) {
            Ok(bytes) => std::str::from_utf8(&bytes)
                .ok()
                .and_then(|text| text.strip_suffix('\n')?.parse().ok())
                .ok_or_else(|| {
                    Error::new(
                        ErrorKind::Corrupt,
                        format!("{path} is damaged; write the lowest number never used into it"),
                    )
                }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(1),
            Err(error) => Err(Error::io(format!("cannot read {path}"), error)),
        }
    }

    fn remember(&self, name: &Name, next: u64) -> Result<()> {
        if self.remembered(name)? >= next {
            return Ok(());
        }
        let folder = snapshot_folder(name);
        let (tmp, path) = (format!("{folder}/{NEXT}.tmp"), format!("{folder}/{NEXT}"));
        let cannot = || format!("cannot write {path}");
        match self.disk.remove(&tmp) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(cannot(), error));
            }
            _ => {}
        }
        let mut file = self.disk.create(&tmp).context(cannot)?;
        file.write_all(format!("{next}\n").as_bytes())
            .and_then(|()| file.sync())
            .and_then(|()| self.disk.rename(&tmp, &path))
            .and_then(|()| self.disk.sync_dir(&folder))
            .context(cannot)
    }

    fn not_found(&self, snap: &SnapRef) -> Error {
        let numbers = self.numbers(&snap.name).unwrap_or_default();
        let hint = match (numbers.first(), numbers.last()) {
            (Some(first), Some(last)) if first != last => {
                format!("; {} has {} snapshots from @{first} to @{last}", snap.name, numbers.len())
            }
            (Some(only), _) => format!("; {} has only @{only}", snap.name),
            _ => "; `dormouse ls` shows what there is".to_owned(),
        };
        Error::new(ErrorKind::NotFound, format!("there is no snapshot {snap}{hint}"))
    }
}

fn conflict(name: &Name, found: Option<u64>, expected: Option<u64>) -> Error {
    let text = |number: Option<u64>| number.map_or("none".to_owned(), |n| format!("{name}@{n}"));
    Error::new(
        ErrorKind::Conflict,
        format!(
            "somebody else changed {name} meanwhile: its newest snapshot is {}, this commit was over \
             {}; commit again, or name the parent with --parent",
            text(found),
            text(expected)
        ),
    )
}
