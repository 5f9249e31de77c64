//! A new file that appears under its name whole and durable, or not at all (`O_TMPFILE` and
//! `linkat(2)`, `renameat2(2)`, `fsync(2)`).
//!
//! The order is: write, `fsync` the file, give it its name, `fsync` the folder. Before the third
//! step a crash leaves nothing where files without a name exist, and a `.dormouse-*.tmp` in the
//! folder where they do not. Bytes never written are holes.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, RenameFlags};
use rustix::io::Errno;

use crate::temp_file;

/// What to do when the name is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Fail with [`io::ErrorKind::AlreadyExists`] and leave the file there alone.
    Refuse,

    /// Put the new file in its place in one step; who has the old one open keeps it.
    Replace,
}

/// A file being written that has no name yet.
///
/// Dropping it without [`NewFile::publish`] leaves nothing behind.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    folder: File,
    name: OsString,
    existing: Existing,
    /// Its name for now, where the file system needs one.
    temp_name: Option<String>,
}

impl NewFile {
    /// Begins a file that is to be `path`, empty, with permissions `mode` less the umask.
    ///
    /// With [`Existing::Refuse`] a name that is taken is refused here already, and again, without
    /// a gap, when it is published. A `path` that ends in a folder, `..` or nothing is
    /// [`io::ErrorKind::InvalidInput`] or what the kernel says to it.
    pub fn create(path: &Path, existing: Existing, mode: u32) -> io::Result<NewFile> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let folder = temp_file::open_folder(folder)?;
        if existing == Existing::Refuse && exists(&folder, &name)? {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let mode = Mode::from_raw_mode(mode);
        let unnamed = temp_file::try_unnamed(&folder, mode)?
            // Without /proc there is no way for everybody to name it later.
            .filter(|file| Path::new(&proc_path(file)).exists());
        let (file, temp_name) = match unnamed {
            Some(file) => (file, None),
            None => {
                let (file, name) = temp_file::named(&folder, mode)?;
                (file, Some(name))
            }
        };
        Ok(NewFile { file, folder, name, existing, temp_name })
    }

    /// The file, open for reading and writing, at position 0.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes the file durable and gives it its name, durably too; returns it, still open.
    ///
    /// After an error the name is as it was before, with one exception: when the very last step,
    /// the `fsync` of the folder, fails after a file was replaced, the new one stays, because the
    /// old one is gone.
    pub fn publish(mut self) -> io::Result<File> {
        self.file.sync_all()?;
        self.give_name()?;
        if let Err(error) = self.folder.sync_all() {
            if self.existing == Existing::Refuse {
                // The error to tell is the first one; a name that stays is a whole file.
                let _ = rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty());
            }
            return Err(error);
        }
        self.file.try_clone()
    }

    /// Gives the file its name without making anything durable: whichever processes die, there is the
    /// whole file or none, but a power cut may leave its name and not its bytes.
    pub fn appear(mut self) -> io::Result<()> {
        self.give_name()
    }

    fn give_name(&mut self) -> io::Result<()> {
        match self.existing {
            Existing::Refuse => self.link_new(),
            Existing::Replace => {
                self.ensure_temp_name()?;
                Ok(self.rename_temp(RenameFlags::empty())?)
            }
        }
    }

    fn link_new(&mut self) -> io::Result<()> {
        if self.temp_name.is_none() {
            let from = proc_path(&self.file);
            let flags = AtFlags::SYMLINK_FOLLOW;
            return Ok(rustix::fs::linkat(CWD, from, &self.folder, &self.name, flags)?);
        }
        match self.rename_temp(RenameFlags::NOREPLACE) {
            // A file system without the flag; a second link refuses a taken name as well, and
            // dropping removes the first.
            Err(Errno::INVAL | Errno::NOSYS) => {
                let from = self.temp_name.as_deref().unwrap_or_default();
                let flags = AtFlags::empty();
                Ok(rustix::fs::linkat(&self.folder, from, &self.folder, &self.name, flags)?)
            }
            renamed => Ok(renamed?),
        }
    }

    /// Names the file so that it can be renamed: a link never replaces.
    fn ensure_temp_name(&mut self) -> io::Result<()> {
        if self.temp_name.is_none() {
            let from = proc_path(&self.file);
            let ((), name) = temp_file::with_free_name(|name| {
                rustix::fs::linkat(CWD, &from, &self.folder, name, AtFlags::SYMLINK_FOLLOW)
            })?;
            self.temp_name = Some(name);
        }
        Ok(())
    }

    fn rename_temp(&mut self, flags: RenameFlags) -> rustix::io::Result<()> {
        let from = self.temp_name.as_deref().unwrap_or_default();
        if flags.is_empty() {
            rustix::fs::renameat(&self.folder, from, &self.folder, &self.name)?;
        } else {
            rustix::fs::renameat_with(&self.folder, from, &self.folder, &self.name, flags)?;
        }
        self.temp_name = None;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(name) = &self.temp_name {
            // Nobody to tell: the folder may be gone, or read-only by now.
            let _ = rustix::fs::unlinkat(&self.folder, name, AtFlags::empty());
        }
    }
}

/// A path to an open file, for `linkat`: its descriptor itself may be linked only with
/// `CAP_DAC_READ_SEARCH` (`AT_EMPTY_PATH`).
fn proc_path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn exists(folder: &File, name: &OsStr) -> io::Result<bool> {
    match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileExt, PermissionsExt};
    use std::path::PathBuf;

    use super::*;

    /// A folder that is removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(parent: &str, name: &str) -> Folder {
            let path = Path::new(parent).join(format!("publish-{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Folder(path)
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.0).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    /// Turns a file without a name into one with a temporary name, as on NFS.
    fn with_temp_name(mut new: NewFile) -> NewFile {
        new.ensure_temp_name().unwrap();
        new
    }

    #[test]
    fn appears_whole_or_not_at_all() {
        for (parent, named) in
            [("/tmp", false), ("/tmp", true), ("/dev/shm", false), ("/dev/shm", true)]
        {
            let folder = Folder::new(parent, if named { "named" } else { "unnamed" });
            let path = folder.0.join("image");
            let create = |existing| {
                NewFile::create(&path, existing, 0o600)
                    .map(|new| if named { with_temp_name(new) } else { new })
            };

            let new = create(Existing::Refuse).unwrap();
            new.file().set_len(1 << 20).unwrap();
            assert!(!path.exists());
            drop(new);
            assert!(folder.names().is_empty(), "{:?}", folder.names());

            let new = create(Existing::Refuse).unwrap();
            new.file().set_len(1 << 20).unwrap();
            new.file().write_all_at(b"one", 4096).unwrap();
            let file = new.publish().unwrap();
            assert_eq!(folder.names(), ["image"]);
            assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            assert!(crate::sparse::allocated_bytes(&file).unwrap() < 64 << 10);

            let refused = create(Existing::Refuse).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);

            let new = create(Existing::Replace).unwrap();
            new.file().write_all_at(b"two", 0).unwrap();
            new.publish().unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"two");
            assert_eq!(folder.names(), ["image"]);
        }
    }

    #[test]
    fn a_name_taken_meanwhile_is_refused() {
        for named in [false, true] {
            let folder = Folder::new("/tmp", if named { "late-named" } else { "late" });
            let path = folder.0.join("image");
            let mut new = NewFile::create(&path, Existing::Refuse, 0o600).unwrap();
            if named {
                new = with_temp_name(new);
            }
            fs::write(&path, b"theirs").unwrap();
            assert_eq!(new.publish().unwrap_err().kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(fs::read(&path).unwrap(), b"theirs");
            assert_eq!(folder.names(), ["image"]);
        }
    }

    #[test]
    fn paths_without_a_name_are_refused() {
        for path in ["", "/", "..", "/tmp/.."] {
            assert!(NewFile::create(Path::new(path), Existing::Refuse, 0o600).is_err(), "{path}");
        }
        let missing = NewFile::create(Path::new("/nowhere/x"), Existing::Refuse, 0o600);
        assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
