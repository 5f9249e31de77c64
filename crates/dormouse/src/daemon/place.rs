//! Where the daemon of a store is: the lock that makes it the only one, and the address that commands
//! look for.
//!
//! The address is a line with the path of a unix socket. It is written once the daemon listens and
//! removed when it ends in order; one that was left by a crash names a socket on which nobody listens,
//! or another store's daemon, which tells by the header [`STORE_HEADER`] that it is not meant.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::exit::{Fault, Kind};

/// The header in which a command says which store it means: device and inode of its folder.
pub(crate) const STORE_HEADER: &str = "dormouse-store";

/// The longest address.
const ADDRESS_BYTES_MAX: u64 = 4096;

/// What [`STORE_HEADER`] says of a store.
pub(crate) fn store_mark(store_dir: &Path) -> io::Result<String> {
    let folder = fs::metadata(store_dir)?;
    Ok(format!("{}:{}", folder.dev(), folder.ino()))
}

/// The folder of a store's daemon, held by a lock.
#[derive(Debug)]
pub(crate) struct Place {
    folder: PathBuf,
    _lock: File,
}

impl Place {
    /// Takes the place; busy if another daemon has it.
    pub(crate) fn take(store_dir: &Path) -> Result<Place> {
        let folder = store_dir.join("live/.daemon");
        let mut make = DirBuilder::new();
        make.recursive(true).mode(0o700);
        make.create(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let path = folder.join("lock");
        let cannot = || format!("cannot lock {}", path.display());
        let mut options = File::options();
        let lock = options.write(true).create(true).truncate(false).mode(0o600).open(&path);
        let lock = lock.with_context(cannot)?;
        match lock.try_lock() {
            Ok(()) => Ok(Place { folder, _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                let message =
                    format!("another daemon has the store {}; one is enough", store_dir.display());
                Err(Fault::new(Kind::Busy, message).into())
            }
            Err(TryLockError::Error(error)) => Err(error).with_context(cannot),
        }
    }

    /// The socket where none was given.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("api")
    }

    /// Tells commands where the socket is.
    pub(crate) fn publish(&self, socket: &Path) -> Result<()> {
        let text = socket.to_str().map(|text| format!("{text}\n")).with_context(|| {
            format!("{} is not UTF-8, and cannot be told to commands", socket.display())
        })?;
        let (path, new) = (address(&self.folder), self.folder.join("address.new"));
        let mut options = File::options();
        // One that is left of a writer that was killed may be anybody's to read.
        let made = match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => options.write(true).create_new(true).mode(0o600).open(&new),
        };
        made.and_then(|mut file| file.write_all(text.as_bytes()))
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Takes the address away.
    pub(crate) fn withdraw(&self) {
        if let Err(error) = fs::remove_file(address(&self.folder)) {
            tracing::warn!(%error, "the daemon's address stays");
        }
    }
}

fn address(folder: &Path) -> PathBuf {
    folder.join("address")
}

/// Where the daemon of a store says that its socket is; none if none does.
pub(crate) fn find(store_dir: &Path) -> Result<Option<PathBuf>> {
    let path = address(&store_dir.join("live/.daemon"));
    let mut text = String::new();
    match File::open(&path) {
        Ok(file) => {
            file.take(ADDRESS_BYTES_MAX)
                .read_to_string(&mut text)
                .with_context(|| format!("cannot read {}", path.display()))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // No store at all; whoever opens it says so.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(None),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", path.display()));
        }
    }
    Ok(text.strip_suffix('\n').filter(|text| text.starts_with('/')).map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_the_place_and_its_address_is_found() {
        let store = tempfile::tempdir().unwrap();
        assert_eq!(find(store.path()).unwrap(), None);
        let place = Place::take(store.path()).unwrap();
        assert_eq!(Kind::of(&Place::take(store.path()).unwrap_err()), Kind::Busy);
        place.publish(&place.socket()).unwrap();
        assert_eq!(find(store.path()).unwrap().unwrap(), place.socket());
        let mode = fs::metadata(address(&place.folder)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600, "as all files of a store");
        place.withdraw();
        assert_eq!(find(store.path()).unwrap(), None);
        drop(place);
        Place::take(store.path()).unwrap();
    }
}
