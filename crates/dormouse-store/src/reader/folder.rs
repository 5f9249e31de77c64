//! Writing a whole snapshot to a folder: filled beside its place and moved there when everything
//! in it is durable, so that nobody meets half a snapshot.
//!
//! ```text
//! DIR/memory
//! DIR/disk/ID
//! DIR/state/NAME
//! DIR/manifest.json
//! ```

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::{EXPORT_MODE, ExportReport, ExportTarget};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::name::ImageName;
use crate::progress::Job;
use crate::store::Snapshot;

/// What holds memory, states and disks has names and sizes to tell, too.
const FOLDER_MODE: u32 = 0o700;

impl Snapshot {
    /// Writes every image and the manifest to `dir`, which must be empty or not there, and tells
    /// what was written for each image. Every block is checked on the way; `dir` appears when all
    /// of it is durable, and after an error nothing is left.
    pub fn export(&self, dir: &Path, job: Job<'_>) -> Result<Vec<(ImageName, ExportReport)>> {
        let folder = NewFolder::create(dir)?;
        let reports = self.fill(folder.path(), job)?;
        folder.publish()?;
        Ok(reports)
    }

    fn fill(&self, dir: &Path, job: Job<'_>) -> Result<Vec<(ImageName, ExportReport)>> {
        let mut folders = vec![dir.to_owned()];
        let mut reports = Vec::new();
        for entry in &self.manifest().images {
            let path = dir.join(entry.image.to_string());
            let folder = parent_of(&path).to_owned();
            if !folders.contains(&folder) {
                private_folder(&folder)?;
                folders.push(folder);
            }
            let report = self.image(&entry.image)?.export(&path, ExportTarget::New, job)?;
            reports.push((entry.image.clone(), report));
        }
        let manifest = dir.join("manifest.json");
        let bytes = self.manifest().encode()?;
        File::options()
            .write(true)
            .create_new(true)
            .mode(EXPORT_MODE)
            .open(&manifest)
            .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
            .context(|| format!("cannot write {}", manifest.display()))?;
        folders.iter().rev().try_for_each(|folder| sync_folder(folder))?;
        job.check()?;
        Ok(reports)
    }
}

/// A folder while it is filled beside its place; whatever is left of it when this is dropped is
/// removed.
#[derive(Debug)]
pub struct NewFolder {
    path: PathBuf,
    dir: PathBuf,
}

impl NewFolder {
    /// Begins what will be `dir`, which must be empty or not there.
    pub fn create(dir: &Path) -> Result<NewFolder> {
        refuse_taken(dir)?;
        let name = dir.file_name().ok_or_else(|| {
            let why = format!("{} does not end in the name of a folder", dir.display());
            Error::new(ErrorKind::InvalidInput, why)
        })?;
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".dormouse-{}.tmp", Uuid::new_v4().simple()));
        let path = parent_of(dir).join(hidden);
        private_folder(&path)?;
        Ok(NewFolder { path, dir: dir.to_owned() })
    }

    /// Where to put what shall be in it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves it to its place. What is in it must be durable, but the folder itself.
    pub fn publish(self) -> Result<()> {
        sync_folder(&self.path)?;
        // Takes the place of an empty folder, and of nothing else.
        fs::rename(&self.path, &self.dir).map_err(|error| match error.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory => {
                taken(&self.dir, "was made meanwhile")
            }
            _ => Error::io(format!("cannot make {}", self.dir.display()), error),
        })?;
        sync_folder(parent_of(&self.dir))
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.path.display(), %error, "half an export is left behind");
            }
            _ => {}
        }
    }
}

/// Makes a folder for what is written out of a store, which is its owner's alone, whatever the umask.
pub fn private_folder(path: &Path) -> Result<()> {
    let made = DirBuilder::new().mode(FOLDER_MODE).create(path);
    made.context(|| format!("cannot make {}", path.display()))
}

/// Says early what the move at the end would say after all the work.
fn refuse_taken(dir: &Path) -> Result<()> {
    let look = || format!("cannot look at {}", dir.display());
    match fs::symlink_metadata(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).context(look),
        Ok(metadata) if !metadata.is_dir() => Err(taken(dir, "is there and is no folder")),
        Ok(_) if fs::read_dir(dir).context(look)?.next().is_some() => {
            Err(taken(dir, "is not empty"))
        }
        Ok(_) => Ok(()),
    }
}

fn taken(dir: &Path, how: &str) -> Error {
    let why = format!("{} {how}; name a folder that is not there yet", dir.display());
    Error::new(ErrorKind::AlreadyExists, why)
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|file| file.sync_all())
        .context(|| format!("cannot sync {}", folder.display()))
}
