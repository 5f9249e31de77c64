//! The folder of a foreign snapshot, of which nothing outside of it is opened.
//!
//! Whoever made the folder could put a link to any file of this host into it, and an import would
//! take that file in and give it to whoever may read the store. So a name in a folder is followed
//! only to files inside of it; what the user names on the command line may lie anywhere.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::data::StableFile;
use crate::error::{Context, Error, ErrorKind, Result};

/// A folder and the place that its files must lie in.
#[derive(Clone, Debug)]
pub(crate) struct ForeignFolder {
    path: PathBuf,
    home: PathBuf,
}

impl ForeignFolder {
    /// A folder that the user named.
    pub(crate) fn open(path: &Path) -> Result<ForeignFolder> {
        let home = path.canonicalize().context(|| format!("cannot find {}", path.display()))?;
        Ok(ForeignFolder { path: path.to_owned(), home })
    }

    /// A folder in this one, which need not be there.
    pub(crate) fn folder(&self, name: &str) -> ForeignFolder {
        ForeignFolder { path: self.path.join(name), home: self.home.clone() }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a file in it, for messages.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Opens a regular file in it, if there is one of that name.
    pub(crate) fn file(&self, name: &str) -> Result<Option<StableFile>> {
        let path = self.path.join(name);
        match path.metadata() {
            Ok(metadata) if metadata.is_file() => {}
            Ok(_) => return Ok(None),
            Err(error) if is_nothing(&error) => return Ok(None),
            Err(error) => {
                return Err(Error::io(format!("cannot look at {}", path.display()), error));
            }
        }
        self.check(&path)?;
        let file = StableFile::open(&path)?;
        // A link that was put there between the look and the opening leads elsewhere now.
        let real = self.check(&path)?;
        file.check_same(&real)?;
        Ok(Some(file))
    }

    /// Opens a file that must be there.
    pub(crate) fn needed(&self, name: &str) -> Result<StableFile> {
        self.file(name)?.ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("there is no regular file {}", self.join(name).display()),
            )
        })
    }

    /// Whether a regular file of that name is in it.
    pub(crate) fn has(&self, name: &str) -> Result<bool> {
        Ok(self.file(name)?.is_some())
    }

    /// Whether a path lies in the folder, whatever links lead there.
    pub(crate) fn holds(&self, path: &Path) -> bool {
        path.canonicalize().is_ok_and(|real| real.starts_with(&self.home))
    }

    /// Where a path leads to, if that is inside.
    fn check(&self, path: &Path) -> Result<PathBuf> {
        let real = path.canonicalize().context(|| format!("cannot find {}", path.display()))?;
        if real.starts_with(&self.home) {
            return Ok(real);
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{} is a link to {}, which is outside of {}; whoever made a snapshot could link any \
                 file of this host, so put the file itself there",
                path.display(),
                real.display(),
                self.home.display()
            ),
        ))
    }

    /// The names in it, at most `max` of them.
    pub(crate) fn names(&self, max: usize) -> Result<Vec<String>> {
        let what = || format!("cannot look into {}", self.path.display());
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).context(what)?.take(max) {
            // No format has a name that is not UTF-8.
            names.extend(entry.context(what)?.file_name().into_string().ok());
        }
        names.sort_unstable();
        Ok(names)
    }
}

fn is_nothing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_are_followed_inside_and_refused_where_they_leave() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().join("snapshot");
        fs::create_dir_all(home.join("inner")).unwrap();
        fs::write(folder.path().join("secret"), "of the host").unwrap();
        fs::write(home.join("real"), "its own").unwrap();
        symlink("real", home.join("link")).unwrap();
        symlink("../secret", home.join("out")).unwrap();
        symlink(folder.path(), home.join("up")).unwrap();
        symlink("nowhere", home.join("dangling")).unwrap();
        let opened = ForeignFolder::open(&home).unwrap();
        assert!(opened.has("real").unwrap() && opened.has("link").unwrap());
        for absent in ["none", "inner", "dangling"] {
            assert!(!opened.has(absent).unwrap(), "{absent}");
        }
        for (at, name) in [(&opened, "out"), (&opened.folder("up"), "secret")] {
            let error = at.file(name).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused);
            let text = error.to_string();
            assert!(text.contains("secret, which is outside of"), "{text}");
        }
        // The folder itself may be named by a link.
        symlink(&home, folder.path().join("named")).unwrap();
        let named = ForeignFolder::open(&folder.path().join("named")).unwrap();
        assert!(named.has("real").unwrap());
    }
}
