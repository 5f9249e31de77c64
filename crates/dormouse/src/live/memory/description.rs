//! What a live VM's memory lies over and how it is served, as a file that outlives its server.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use dormouse_live::pages::Tracking;
use serde::{Deserialize, Serialize};

use super::NewMemory;
use crate::exit::{Fault, Kind};
use crate::live::BaseLabel;

/// The file's name in the folder.
pub(super) const NAME: &str = "description";

/// While it is written.
const NEW_NAME: &str = "description.new";

/// Longer files are not ours.
const BYTES_MAX: u64 = 64 << 10;

const FORMAT: &str = "dormouse-live-memory";
const VERSION: u32 = 1;

/// What is told first, so that a later version's is refused before it is misunderstood.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

/// A live VM's memory; `docs/format.md` has the fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Description {
    format: String,
    version: u32,

    /// What the pages are as in that the guest has not changed.
    pub(crate) base: BaseLabel,

    /// Whether changes are known to the page.
    pub(crate) tracking: TrackChanges,

    /// Bytes looked at around a fault.
    pub(crate) window_bytes: u64,

    /// What is installed before the guest asks.
    pub(crate) prefetch: Prefetch,

    /// Where the live VM's disks are served by the same process.
    pub(crate) nbd: Option<PathBuf>,
}

/// Whether changes are known to the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum TrackChanges {
    /// They are.
    On,

    /// Whatever was installed counts as changed.
    Off,
}

impl From<TrackChanges> for Tracking {
    fn from(track: TrackChanges) -> Tracking {
        match track {
            TrackChanges::On => Tracking::Exact,
            TrackChanges::Off => Tracking::Off,
        }
    }
}

/// What is installed before the guest asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Prefetch {
    /// Nothing.
    None,

    /// What VMs that woke from the snapshot touched first, in their order; what this one touches is
    /// noted for the next.
    Trace,

    /// All of it, from its start to its end.
    All,
}

impl Description {
    pub(super) fn new(base: BaseLabel, new: NewMemory) -> Description {
        Description {
            format: FORMAT.to_owned(),
            version: VERSION,
            base,
            tracking: new.tracking,
            window_bytes: new.window_bytes,
            prefetch: new.prefetch,
            nbd: new.nbd,
        }
    }

    /// The same over another base.
    pub(super) fn over(&self, base: BaseLabel) -> Description {
        Description { base, ..self.clone() }
    }

    pub(super) fn read(folder: &Path) -> Result<Description> {
        let path = folder.join(NAME);
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut bytes))
            .with_context(|| format!("cannot read {}", path.display()))?;
        Description::parse(&bytes).with_context(|| format!("cannot read {}", path.display()))
    }

    fn parse(bytes: &[u8]) -> Result<Description> {
        let corrupt = |error: serde_json::Error| {
            Fault::new(Kind::Corrupt, format!("not a description of a live VM's memory: {error}"))
        };
        let head: Head = serde_json::from_slice(bytes).map_err(corrupt)?;
        if head.format != FORMAT {
            let message = format!("{:?} is no description of a live VM's memory", head.format);
            return Err(Fault::new(Kind::Corrupt, message).into());
        }
        if head.version != VERSION {
            let message = format!("memory of version {}; this build reads {VERSION}", head.version);
            return Err(Fault::new(Kind::Unsupported, message).into());
        }
        Ok(serde_json::from_slice(bytes).map_err(corrupt)?)
    }

    /// Puts it in the place of the one that is there, at once and durably.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        self.create(folder)
            .and_then(|file| file.sync_all())
            .and_then(|()| rename(folder))
            .and_then(|()| File::open(folder)?.sync_all())
            .with_context(|| format!("cannot write to {}", folder.display()))
    }

    /// Puts it where none is. It is there at once, but not durable.
    pub(super) fn begin(&self, folder: &Path) -> Result<()> {
        self.create(folder)
            .and_then(|_| rename(folder))
            .with_context(|| format!("cannot write to {}", folder.display()))
    }

    fn create(&self, folder: &Path) -> io::Result<File> {
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(folder.join(NEW_NAME))?;
        file.write_all(&serde_json::to_vec(self)?)?;
        Ok(file)
    }
}

fn rename(folder: &Path) -> io::Result<()> {
    fs::rename(folder.join(NEW_NAME), folder.join(NAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> Description {
        let new = NewMemory {
            tracking: TrackChanges::On,
            window_bytes: 65536,
            prefetch: Prefetch::All,
            nbd: Some("/run/box.nbd".into()),
            of_vm: false,
        };
        let base =
            BaseLabel::Image { image: "vm@1:memory".to_owned(), root: None, size_bytes: 4096 };
        Description::new(base, new)
    }

    #[test]
    fn it_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        description().write(folder.path()).unwrap();
        assert_eq!(Description::read(folder.path()).unwrap(), description());
        let next = Description { tracking: TrackChanges::Off, ..description() };
        next.write(folder.path()).unwrap();
        assert_eq!(Description::read(folder.path()).unwrap(), next);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_ours_is_refused_by_kind() {
        let text = serde_json::to_string(&description()).unwrap();
        let changed = |from: &str, to: &str| {
            let changed = text.replace(from, to);
            assert_ne!(changed, text, "{from}");
            Kind::of(&Description::parse(changed.as_bytes()).unwrap_err())
        };
        assert_eq!(changed("\"version\":1", "\"version\":2,\"x\":0"), Kind::Unsupported);
        assert_eq!(changed("-live-memory", "-else"), Kind::Corrupt);
        assert_eq!(changed("\"nbd\"", "\"nbt\""), Kind::Corrupt);
        assert_eq!(changed("{", "["), Kind::Corrupt);
        for len in 0..text.len() {
            assert!(Description::parse(&text.as_bytes()[..len]).is_err(), "{len} bytes");
        }
    }
}
