//! The versions of VMMs' programs: asking one takes tens of milliseconds, more than all else of a wake.
//!
//! What was asked is kept for as long as the program's file is the same, and for the next command in
//! `live/.plane/versions`. A script is asked by each process anew: what it starts may be another file today.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use dormouse_sys::publish::{Existing, NewFile};
use dormouse_vmm::kind::{Kind as VmmKind, Version};
use dormouse_vmm::launch::program_version;
use serde::{Deserialize, Serialize};

/// The longest file that is read: some thousands of programs.
const BYTES_MAX: u64 = 1 << 20;

/// What tells a program's file from what was there before, or will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(program: &Path) -> Result<Stamp> {
        let metadata = fs::metadata(program)
            .with_context(|| format!("cannot look at {}", program.display()))?;
        Ok(Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

/// What a program said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Said {
    stamp: Stamp,
    version: String,
}

/// All that were asked.
#[derive(Debug)]
pub(super) struct Versions {
    file: PathBuf,
    known: Mutex<BTreeMap<PathBuf, Said>>,
}

impl Versions {
    /// Of the store in `store_dir`.
    pub(super) fn of(store_dir: &Path) -> Versions {
        Versions { file: store_dir.join("live/.plane/versions"), known: Mutex::default() }
    }

    /// A program's version.
    pub(super) fn get(&self, kind: VmmKind, program: &Path) -> Result<Version> {
        let stamp = Stamp::of(program)?;
        // Whatever is in it is whole.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let found = |known: &BTreeMap<PathBuf, Said>| {
            let said = known.get(program).filter(|said| said.stamp == stamp)?;
            said.version.parse::<Version>().ok()
        };
        if let Some(version) = found(&known) {
            return Ok(version);
        }
        // Who else asked meanwhile is heard, too. One that cannot be read is made anew.
        let mut kept = self.read().unwrap_or_default();
        if let Some(version) = found(&kept) {
            known.append(&mut kept);
            return Ok(version);
        }
        let version = program_version(kind, program)?;
        let said = Said { stamp, version: version.to_string() };
        known.insert(program.to_owned(), said.clone());
        if !is_script(program) {
            kept.insert(program.to_owned(), said);
            if let Err(error) = self.write(&kept) {
                tracing::debug!(%error, "the next command asks for the VMM's version again");
            }
        }
        Ok(version)
    }

    fn read(&self) -> io::Result<BTreeMap<PathBuf, Said>> {
        let mut bytes = Vec::new();
        File::open(&self.file)?.take(BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// In one piece for whoever reads it; nothing is lost if it does not survive a power cut.
    fn write(&self, kept: &BTreeMap<PathBuf, Said>) -> io::Result<()> {
        let new = NewFile::create(&self.file, Existing::Replace, 0o600)?;
        new.file().write_all(&serde_json::to_vec(kept)?)?;
        new.appear()
    }
}

/// Whether the kernel has another program run it.
fn is_script(program: &Path) -> bool {
    let mut head = [0; 2];
    // What cannot be looked at is not kept.
    File::open(program).and_then(|mut file| file.read_exact(&mut head)).is_err() || head == *b"#!"
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that is there, has no version of ours, and is no script.
    const PROGRAM: &str = "/bin/true";

    #[test]
    fn what_was_asked_is_kept_until_the_program_is_another() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("live/.plane")).unwrap();
        let program = folder.path().join("vmm");
        fs::copy(PROGRAM, &program).unwrap();
        let said = |version: &str| Said {
            stamp: Stamp::of(&program).unwrap(),
            version: version.to_owned(),
        };
        let versions = Versions::of(folder.path());
        // It cannot be asked: what is told is what was kept.
        assert!(versions.get(VmmKind::Qemu, &program).is_err());
        versions.write(&BTreeMap::from([(program.clone(), said("7.2.22"))])).unwrap();
        assert_eq!(versions.get(VmmKind::Qemu, &program).unwrap(), Version::new(7, 2, 22));
        let again = Versions::of(folder.path());
        assert_eq!(again.get(VmmKind::Qemu, &program).unwrap(), Version::new(7, 2, 22));
        // As an upgrade does it.
        let new = folder.path().join("new");
        fs::copy(PROGRAM, &new).unwrap();
        fs::rename(&new, &program).unwrap();
        assert!(again.get(VmmKind::Qemu, &program).is_err(), "another file");
        fs::write(&versions.file, "{").unwrap();
        assert!(again.get(VmmKind::Qemu, &program).is_err(), "a damaged file is none");
    }

    #[test]
    fn a_program_is_asked_once_and_a_script_by_each() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("live/.plane")).unwrap();
        let script = folder.path().join("script");
        fs::write(&script, "#!/bin/sh\necho QEMU emulator version 7.2.22\n").unwrap();
        let mut mode = fs::metadata(&script).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o755);
        fs::set_permissions(&script, mode).unwrap();
        let versions = Versions::of(folder.path());
        assert_eq!(versions.get(VmmKind::Qemu, &script).unwrap(), Version::new(7, 2, 22));
        assert!(!versions.file.exists());
        assert!(is_script(&script) && !is_script(Path::new(PROGRAM)));
    }
}
