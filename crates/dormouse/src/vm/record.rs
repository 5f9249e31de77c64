//! `live/NAME/vm`: what a VM is and what it is doing, replaced whole whenever that changes.
//!
//! ```text
//! {"format":"dormouse-vm","version":1,"checksum":"xxh3:HEX","vm":{…}}
//! ```
//!
//! The checksum is of the body's bytes as they stand in the file.
//!
//! Beside it there is an empty file `vm.unsettled` as long as a VM is being made and its record need not
//! survive a power cut.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dormouse_image::digest::checksum;
use dormouse_store::manifest::MemoryRegion;
use dormouse_sys::publish::{Existing, NewFile};
use dormouse_vmm::kind::Kind as VmmKind;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::guest::Guest;
use super::phase::Phase;
use super::process::ProcessId;
use crate::exit::{Fault, Kind};
use crate::live::BaseLabel;

const FORMAT: &str = "dormouse-vm";
const VERSION: u32 = 1;

const UNSETTLED: &str = "vm.unsettled";

/// The longest record: a template of 4,096 arguments and a Firecracker configuration.
const RECORD_BYTES_MAX: u64 = 4 << 20;

/// A VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// What it is doing.
    pub(crate) phase: Phase,

    /// How it is made.
    pub(crate) guest: Guest,

    /// The VMM's version.
    pub(crate) version: String,

    /// The snapshot that it woke from, or was last stored as, `NAME@N`; none for one that booted.
    pub(crate) over: Option<String>,

    /// Where its memory comes from.
    pub(crate) memory: Memory,

    /// The VMM's process, once it was started.
    pub(crate) process: Option<ProcessId>,

    /// When it was made.
    pub(crate) since: jiff::Timestamp,

    /// Why it was not stored when that was last asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) trouble: Option<String>,
}

/// Where a VM's memory is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Memory {
    /// The VMM's own, since it booted.
    Own,

    /// A file of the VM's folder on which the guest runs.
    File,

    /// A snapshot's, mapped privately out of the mount. What the guest changed is told by the VMM's page
    /// tables.
    Mapped(Woken),

    /// A snapshot's, of which the VMM makes itself a copy, at once or bit by bit.
    Copied(Woken),

    /// A snapshot's, which the VMM asks for page by page (userfaultfd). What the guest changed is known to
    /// the data plane; so is what it lies over since it was last stored.
    Served(Woken),
}

/// The memory of a snapshot that a VM woke from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Woken {
    /// `NAME@N`.
    pub(crate) snapshot: String,

    /// Its memory image, which the live VM's pin keeps, whatever becomes of the snapshot.
    pub(crate) image: BaseLabel,

    /// Where that memory lies in the guest.
    #[serde(default)]
    pub(crate) layout: Vec<MemoryRegion>,

    /// When it was stored.
    #[serde(default)]
    pub(crate) created: jiff::Timestamp,
}

impl Record {
    /// Which VMM it is.
    pub(crate) fn kind(&self) -> VmmKind {
        self.guest.launch.vmm
    }

    /// The snapshot whose memory it woke from.
    pub(crate) fn woken(&self) -> Option<&Woken> {
        match &self.memory {
            Memory::Own | Memory::File => None,
            Memory::Mapped(woken) | Memory::Copied(woken) | Memory::Served(woken) => Some(woken),
        }
    }

    /// The snapshot whose memory it needs, whatever it was stored as since.
    pub(crate) fn relies_on(&self) -> Option<&Woken> {
        self.woken().filter(|_| !self.is_served())
    }

    /// Whether its memory is asked for page by page.
    pub(crate) fn is_served(&self) -> bool {
        matches!(self.memory, Memory::Served(_))
    }

    /// Reads the record in a live VM's folder; none if that is no VM, but disks alone.
    pub(crate) fn read(folder: &Path) -> Result<Option<Record>> {
        let path = path(folder);
        let mut bytes = Vec::new();
        let cannot = || format!("cannot read {}", path.display());
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => {
                file.with_context(cannot)?
                    .take(RECORD_BYTES_MAX + 1)
                    .read_to_end(&mut bytes)
                    .with_context(cannot)?;
            }
        }
        Record::parse(&bytes).with_context(|| format!("{} is damaged", path.display())).map(Some)
    }

    fn parse(bytes: &[u8]) -> Result<Record> {
        #[derive(Deserialize)]
        struct File<'a> {
            format: &'a str,
            version: u32,
            checksum: Option<&'a str>,
            #[serde(borrow)]
            vm: Option<&'a RawValue>,
        }
        let corrupt = |what: String| Fault::new(Kind::Corrupt, what);
        if bytes.len() as u64 > RECORD_BYTES_MAX {
            return Err(corrupt(format!("more than {RECORD_BYTES_MAX} bytes")).into());
        }
        let file: File<'_> =
            serde_json::from_slice(bytes).map_err(|error| corrupt(error.to_string()))?;
        if file.format != FORMAT {
            return Err(corrupt(format!("format {:?}, expected {FORMAT:?}", file.format)).into());
        }
        if file.version != VERSION {
            let message = format!("a VM of version {}; this build reads {VERSION}", file.version);
            return Err(Fault::new(Kind::Unsupported, message).into());
        }
        let (Some(expected), Some(body)) = (file.checksum, file.vm) else {
            return Err(corrupt("no checksum, or no vm".to_owned()).into());
        };
        let got = sum(body.get());
        if got != expected {
            return Err(corrupt(format!("checksum {got}, expected {expected}")).into());
        }
        Ok(serde_json::from_str(body.get()).map_err(|error| corrupt(error.to_string()))?)
    }

    fn encode(&self) -> Result<String> {
        let body = serde_json::to_string(self)?;
        let sum = sum(&body);
        Ok(format!(r#"{{"format":"{FORMAT}","version":{VERSION},"checksum":"{sum}","vm":{body}}}"#))
    }

    /// Puts the record in the place of the one that is there, at once and durably.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        self.put(folder, |new| new.publish().map(drop))
    }

    /// The same of a VM that nobody was told of yet: the record is there whichever processes die, and
    /// need not be after a power cut, which ends the VM. Until it is [written](Record::write) durably and
    /// [`settled`] was called, a damaged one is one that a power cut took.
    pub(crate) fn write_unsettled(&self, folder: &Path) -> Result<()> {
        let mark = folder.join(UNSETTLED);
        File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&mark)
            .with_context(|| format!("cannot make {}", mark.display()))?;
        self.put(folder, NewFile::appear)
    }

    fn put(&self, folder: &Path, publish: fn(NewFile) -> io::Result<()>) -> Result<()> {
        let path = path(folder);
        let record = self.encode()?;
        NewFile::create(&path, Existing::Replace, 0o600)
            .and_then(|new| {
                new.file().write_all(record.as_bytes())?;
                publish(new)
            })
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Says that the record in a folder is durable.
pub(crate) fn settled(folder: &Path) -> Result<()> {
    let mark = folder.join(UNSETTLED);
    match fs::remove_file(&mark) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", mark.display()))
        }
        _ => Ok(()),
    }
}

/// Whether the record in a folder may be one that a power cut took before anybody relied on it.
pub(crate) fn is_unsettled(folder: &Path) -> bool {
    folder.join(UNSETTLED).exists()
}

fn path(folder: &Path) -> PathBuf {
    folder.join("vm")
}

fn sum(body: &str) -> String {
    format!("xxh3:{:016x}", checksum(&[body.as_bytes()]))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn record() -> Record {
        let image =
            BaseLabel::Image { image: "vm@3:memory".to_owned(), root: None, size_bytes: 4096 };
        Record {
            phase: Phase::Awake,
            guest: Guest::parse(
                br#"{"launch":{"vmm":"qemu","args":["-machine","q35"],"memory_bytes":4096}}"#,
            )
            .unwrap(),
            version: "10.0.2".to_owned(),
            over: Some("vm@3".to_owned()),
            memory: Memory::Mapped(Woken {
                snapshot: "vm@3".to_owned(),
                image,
                layout: Vec::new(),
                created: jiff::Timestamp::UNIX_EPOCH,
            }),
            process: Some(ProcessId { pid: 7, started: 9, boot: "b".to_owned() }),
            since: jiff::Timestamp::UNIX_EPOCH,
            trouble: None,
        }
    }

    #[test]
    fn it_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Record::read(folder.path()).unwrap().is_none());
        record().write(folder.path()).unwrap();
        assert_eq!(Record::read(folder.path()).unwrap().unwrap(), record());
        let failed = Record { phase: Phase::Failed { why: "so".to_owned() }, ..record() };
        failed.write(folder.path()).unwrap();
        assert_eq!(Record::read(folder.path()).unwrap().unwrap(), failed);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn one_that_need_not_last_is_read_and_told_from_one_that_must() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!is_unsettled(folder.path()));
        record().write_unsettled(folder.path()).unwrap();
        let later = Record { version: "11".to_owned(), ..record() };
        later.write_unsettled(folder.path()).unwrap();
        assert_eq!(Record::read(folder.path()).unwrap().unwrap(), later);
        assert!(is_unsettled(folder.path()));
        let mark = fs::metadata(folder.path().join(UNSETTLED)).unwrap();
        assert_eq!(mark.permissions().mode() & 0o777, 0o600, "as all files of a store");
        record().write(folder.path()).unwrap();
        settled(folder.path()).unwrap();
        settled(folder.path()).unwrap();
        assert!(!is_unsettled(folder.path()));
        assert_eq!(Record::read(folder.path()).unwrap().unwrap(), record());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn no_flipped_bit_and_no_cut_is_believed() {
        let text = record().encode().unwrap();
        for len in 0..text.len() {
            assert!(Record::parse(&text.as_bytes()[..len]).is_err(), "{len} bytes");
        }
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            if let Ok(read) = Record::parse(&bytes) {
                assert_eq!(read, record(), "byte {at}");
            }
        }
        let later = text.replace("\"version\":1", "\"version\":2");
        assert_eq!(Kind::of(&Record::parse(later.as_bytes()).unwrap_err()), Kind::Unsupported);
    }
}
