//! From the paths a user names to the files that are punched.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::FolderFiles;

/// Names in a folder that begin like this are memory files.
const MEMORY_PREFIX: &[u8] = b"memory";

/// A file to punch, or a path through which none was found.
#[derive(Debug)]
pub(super) enum Target {
    File { path: PathBuf, len: u64 },
    Failed { path: PathBuf, action: &'static str, error: io::Error },
}

impl Target {
    pub(super) fn path(&self) -> &Path {
        match self {
            Target::File { path, .. } | Target::Failed { path, .. } => path,
        }
    }

    pub(super) fn len(&self) -> u64 {
        match self {
            Target::File { len, .. } => *len,
            Target::Failed { .. } => 0,
        }
    }
}

/// The targets behind `paths`, each file once.
pub(super) fn targets(paths: &[PathBuf], folder_files: FolderFiles) -> Vec<Target> {
    let mut targets = Vec::new();
    let mut seen = HashSet::new();
    for path in paths {
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {
                match files_of_folder(path, folder_files, &mut seen) {
                    Ok(files) => targets.extend(files),
                    Err(error) => {
                        let action = "list its files";
                        targets.push(Target::Failed { path: path.clone(), action, error });
                    }
                }
            }
            Ok(metadata) => {
                if seen.insert((metadata.dev(), metadata.ino())) {
                    targets.push(Target::File { path: path.clone(), len: metadata.len() });
                }
            }
            Err(error) => {
                targets.push(Target::Failed { path: path.clone(), action: "open it", error });
            }
        }
    }
    targets
}

fn files_of_folder(
    folder: &Path,
    wanted: FolderFiles,
    seen: &mut HashSet<(u64, u64)>,
) -> io::Result<Vec<Target>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let is_wanted = match wanted {
            FolderFiles::Memory => entry.file_name().as_bytes().starts_with(MEMORY_PREFIX),
            FolderFiles::All => true,
        };
        if is_wanted && entry.file_type()?.is_file() {
            paths.push(entry.path());
        }
    }
    paths.sort();
    let mut targets = Vec::new();
    for path in paths {
        match fs::symlink_metadata(&path) {
            Ok(metadata) if seen.insert((metadata.dev(), metadata.ino())) => {
                targets.push(Target::File { path, len: metadata.len() });
            }
            Ok(_) => {}
            Err(error) => targets.push(Target::Failed { path, action: "stat it", error }),
        }
    }
    Ok(targets)
}
