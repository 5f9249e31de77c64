//! Where things are made, and what they are made from.

use std::cell::OnceCell;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dormouse_store::commit::{CommitReport, CommitRequest};
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};
use dormouse_testkit::guest::{Pause, PauseFiles, Pauses, cache_dir};
use tempfile::TempDir;

/// A folder on the machine's disk that goes when the bench ends.
#[derive(Debug)]
pub(crate) struct Scratch {
    dir: TempDir,
    five: OnceCell<Vec<CommitReport>>,
}

/// The store that [`Scratch::five_pauses`] fills.
pub(crate) const FIVE: &str = "five";

/// `target/bench`.
pub(crate) fn bench_dir() -> PathBuf {
    cache_dir().with_file_name("bench")
}

impl Scratch {
    pub(crate) fn make() -> Result<Scratch> {
        let dir = bench_dir();
        fs::create_dir_all(&dir)?;
        Ok(Scratch { dir: tempfile::tempdir_in(dir)?, five: OnceCell::new() })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An empty store in place of the last one of this name.
    pub(crate) fn store(&self, name: &str) -> Result<Store> {
        let dir = self.path(name);
        remove_dir(&dir)?;
        Ok(Store::init(&dir, Config::STANDARD)?)
    }

    /// The same store with nothing in its caches.
    pub(crate) fn reopen(&self, name: &str) -> Result<Store> {
        Ok(Store::open(&self.path(name), Config::STANDARD)?)
    }

    /// Commits memory, disk and state of all five pauses as `vm` into the store [`FIVE`], once.
    pub(crate) fn five_pauses(&self) -> Result<&[CommitReport]> {
        if let Some(reports) = self.five.get() {
            return Ok(reports);
        }
        let store = self.store(FIVE)?;
        let mut reports = Vec::new();
        for files in pauses()? {
            let request = CommitRequest::new(vm()?)
                .image(ImageName::Memory, Source::File(files.memory))
                .image(root_disk()?, Source::File(files.disk))
                .image(state()?, Source::File(files.state));
            reports.push(store.commit(request, Job::quiet())?);
        }
        Ok(self.five.get_or_init(|| reports))
    }

    /// A memory dump as Firecracker writes one, without holes, in page cache.
    pub(crate) fn dense(&self, image: &Path, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        let mut from = File::open(image).with_context(|| format!("no {}", image.display()))?;
        let mut to = File::create(&path)?;
        let mut buf = vec![0; 1 << 20];
        loop {
            let len = from.read(&mut buf)?;
            if len == 0 {
                break;
            }
            to.write_all(&buf[..len])?;
        }
        to.sync_all()?;
        Ok(path)
    }
}

/// A folder in memory, where syncing costs nothing; on the disk if there is none.
pub(crate) fn in_memory() -> Result<TempDir> {
    let shm = Path::new("/dev/shm");
    Ok(if shm.is_dir() { tempfile::tempdir_in(shm)? } else { tempfile::tempdir_in(bench_dir())? })
}

pub(crate) fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// The files of the five pauses, in order.
pub(crate) fn pauses() -> Result<Vec<PauseFiles>> {
    let pauses = Pauses::prepare(&cache_dir(), &mut |line| println!("{line}"))?;
    Ok(Pause::ALL.iter().map(|&pause| pauses.files(pause)).collect())
}

pub(crate) fn vm() -> Result<Name> {
    Ok(Name::new("vm")?)
}

pub(crate) fn root_disk() -> Result<ImageName> {
    Ok(ImageName::Disk(Name::new("root")?))
}

pub(crate) fn state() -> Result<ImageName> {
    Ok(ImageName::State(Name::new("vmstate")?))
}

/// The files under a folder, in no order.
pub(crate) fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files.extend(files_below(&entry.path())?);
        } else {
            files.push(entry.path());
        }
    }
    Ok(files)
}
