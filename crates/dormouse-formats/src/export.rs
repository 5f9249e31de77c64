//! Giving a snapshot back in another format.

use std::collections::BTreeSet;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use dormouse_store::manifest::Manifest;
use dormouse_store::name::{ImageName, Name, SnapRef};
use dormouse_store::progress::Job;
use dormouse_store::reader::{EXPORT_MODE, ExportTarget};
use dormouse_store::store::{Snapshot, Store};
use dormouse_sys::publish::{Existing, NewFile};
use uuid::Uuid;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::Format;
use crate::replay::DataCodec;

/// Generations of one export; a folder for each is what some formats need.
const LINE_MAX: usize = 4096;

/// How to export.
#[derive(Clone, Debug, Default)]
pub struct ExportRequest {
    /// The format's version, if not its usual one.
    pub version: Option<String>,

    /// How data objects are compressed, where the format has several ways.
    pub data_codec: Option<DataCodec>,

    /// The id of the newest build, if not the snapshot's UUID.
    pub build_id: Option<Uuid>,

    /// The snapshot that the export begins with, or that a diff is against.
    pub base: Option<SnapRef>,

    /// The disk to write, where a format has one.
    pub disk: Option<String>,

    /// Snapshots that the receiver of a carry has, by the UUIDs that they had where they were made.
    pub has: BTreeSet<Uuid>,

    /// Paths in configuration files that become others.
    pub rewrite: Vec<(String, String)>,
}

impl ExportRequest {
    /// Fails if anything was given that a format has no use for.
    fn check(&self, format: Format) -> Result<()> {
        let given = [
            ("version", self.version.is_some()),
            ("compression", self.data_codec.is_some()),
            ("base", self.base.is_some()),
            ("build-id", self.build_id.is_some()),
            ("disk", self.disk.is_some()),
            ("has", !self.has.is_empty()),
            ("rewrite", !self.rewrite.is_empty()),
        ];
        format.check_options(format.export_options(), &given)
    }
}

/// What an export wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportReport {
    /// Whose it is.
    pub format: Format,

    /// The format's version.
    pub version: String,

    /// Where it is.
    pub path: PathBuf,

    /// The files in it, with their lengths.
    pub files: Vec<(String, u64)>,

    /// What a user should know.
    pub notes: Vec<String>,
}

impl ExportReport {
    pub(crate) fn new(format: Format, version: String, path: &Path) -> ExportReport {
        ExportReport {
            format,
            version,
            path: path.to_owned(),
            files: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Notes a file that was written into `folder`.
    pub(crate) fn wrote(&mut self, name: &str, folder: &Path) -> Result<()> {
        let path = folder.join(name);
        let len = path.metadata().context(|| format!("cannot look at {}", path.display()))?.len();
        self.files.push((name.to_owned(), len));
        Ok(())
    }

    /// Notes that what was written is one file of a length.
    pub(crate) fn is_itself(&mut self, bytes: u64) {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        self.files.push((name.to_string_lossy().into_owned(), bytes));
    }

    /// Notes images that the format has no place for.
    pub(crate) fn skipped(&mut self, manifest: &Manifest, written: &[&str]) {
        for entry in &manifest.images {
            let image = entry.image.to_string();
            if !written.contains(&image.as_str()) {
                self.notes.push(format!(
                    "{image} of {} skipped: the format has no place for it",
                    manifest.display_name()
                ));
            }
        }
    }
}

/// Snapshots from a base to the one that is exported, each the parent of the next.
#[derive(Debug)]
pub struct Line {
    snapshots: Vec<Snapshot>,
}

impl Line {
    /// The snapshot alone, or with all from `base` on.
    pub fn open(store: &Store, snap: &SnapRef, base: Option<&SnapRef>) -> Result<Line> {
        let newest = store.snapshot(snap)?;
        let mut snapshots = vec![newest];
        let Some(base) = base else { return Ok(Line { snapshots }) };
        let base = store.snapshot(base)?;
        while let Some(last) = snapshots.last()
            && last.manifest().uuid != base.manifest().uuid
        {
            let parent = last.manifest().parent.clone();
            let Some(parent) = parent.filter(|_| snapshots.len() < LINE_MAX) else {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "{} is no ancestor of {snap}; `dormouse log {snap}` shows which are",
                        base.manifest().display_name()
                    ),
                ));
            };
            let at = SnapRef { name: parent.name, number: Some(parent.number) };
            snapshots.push(store.snapshot(&at)?);
        }
        snapshots.reverse();
        Ok(Line { snapshots })
    }

    /// All of them, oldest first; at least one.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    /// The one that is exported.
    pub fn newest(&self) -> &Snapshot {
        // `open` puts it there.
        &self.snapshots[self.snapshots.len() - 1]
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.newest().manifest().display_name()
    }

    /// The id of the build that a snapshot of the line becomes.
    pub(crate) fn build_id(&self, number: usize, request: &ExportRequest) -> Uuid {
        match request.build_id {
            Some(id) if number + 1 == self.snapshots.len() => id,
            _ => self.snapshots[number].manifest().uuid,
        }
    }
}

/// Writes a snapshot to `path` as `format`.
pub fn export(
    store: &Store,
    snap: &SnapRef,
    path: &Path,
    format: Format,
    request: &ExportRequest,
    job: Job<'_>,
) -> Result<ExportReport> {
    if request.build_id.is_some_and(|id| id.is_nil()) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "the nil build id stands for zeros; give another one",
        ));
    }
    request.check(format)?;
    let line = || -> Result<Line> {
        let line = Line::open(store, snap, request.base.as_ref())?;
        if let Some(id) = request.build_id {
            check_build_id(store, &line, id)?;
        }
        Ok(line)
    };
    match format {
        Format::Wrenn => crate::wrenn::export(&line()?, path, request, job),
        Format::E2b => crate::e2b::export(&line()?, path, request, job),
        Format::Firecracker => crate::firecracker::export(&line()?, path, job),
        Format::CloudHypervisor => crate::cloud_hypervisor::export(&line()?, path, request, job),
        Format::Qemu => crate::qemu::export_backend(&line()?, path, job),
        Format::MappedRam => crate::qemu::export_mapped_ram(&line()?, path, job),
        Format::Qcow2 => crate::disk::export(&line()?, path, request, job),
        Format::Carry => carry(store, &line()?, path, request, job),
        Format::Raw => raw(&line()?, path, request, job),
        Format::DmSnapshot => Err(Error::new(
            ErrorKind::Unsupported,
            "dm-snapshot stores can be imported, not exported",
        )),
    }
}

/// Fails if headers may refer to a build of this id that is another: the one that a snapshot of the
/// line was imported as, or one of what was before it.
fn check_build_id(store: &Store, line: &Line, id: Uuid) -> Result<()> {
    let clash = |whose: String| {
        Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "--build-id {id} is {whose}, and other builds may refer to places in that one; give \
                 an id that no build has, or none"
            ),
        ))
    };
    let mut next = Some(line.newest().manifest().clone());
    for _ in 0..LINE_MAX {
        let Some(manifest) = next.take() else { break };
        let imported_as = manifest.labels.get(crate::e2b::BUILD_LABEL);
        if imported_as.is_some_and(|label| label.parse() == Ok(id)) {
            return clash(format!("the id that {} was imported with", manifest.display_name()));
        }
        let Some(parent) = manifest.parent else { break };
        if parent.uuid == id {
            return clash(format!("that of {}@{}", parent.name, parent.number));
        }
        let at = SnapRef { name: parent.name, number: Some(parent.number) };
        // What is before one that was removed cannot be known.
        next = store.manifest(&at).ok().filter(|manifest| manifest.uuid == parent.uuid);
    }
    Ok(())
}

/// A carry, to a file or to standard output.
fn carry(
    store: &Store,
    line: &Line,
    path: &Path,
    request: &ExportRequest,
    job: Job<'_>,
) -> Result<ExportReport> {
    let mut report = ExportReport::new(Format::Carry, "1".to_owned(), path);
    let bytes = if path.as_os_str() == "-" {
        let mut sink =
            Counted { sink: BufWriter::with_capacity(1 << 20, io::stdout().lock()), bytes: 0 };
        let bytes = crate::carry::send(store, line, &request.has, &mut sink, job)?;
        sink.flush().context(|| "cannot write to standard output".to_owned())?;
        report.files.push(("-".to_owned(), sink.bytes));
        bytes
    } else {
        let what = || format!("cannot write {}", path.display());
        let new = NewFile::create(path, Existing::Refuse, EXPORT_MODE).context(what)?;
        let mut sink = BufWriter::with_capacity(1 << 20, new.file());
        let bytes = crate::carry::send(store, line, &request.has, &mut sink, job)?;
        sink.flush().context(what)?;
        drop(sink);
        let len = new.file().metadata().context(what)?.len();
        new.publish().context(what)?;
        report.is_itself(len);
        bytes
    };
    report.notes.push(format!("{bytes} bytes of blocks, before compression"));
    Ok(report)
}

/// Counts what goes through it.
struct Counted<W> {
    sink: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.sink.write(buf)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// One disk, as a sparse file.
fn raw(line: &Line, path: &Path, request: &ExportRequest, job: Job<'_>) -> Result<ExportReport> {
    let id = request.disk.as_deref().unwrap_or("root");
    let snapshot = line.newest();
    let image = ImageName::Disk(Name::new(id)?);
    let written = snapshot.image(&image)?.export(path, ExportTarget::New, job)?;
    let mut report = ExportReport::new(Format::Raw, "bytes".to_owned(), path);
    report.is_itself(written.size_bytes);
    report.skipped(snapshot.manifest(), &[image.to_string().as_str()]);
    Ok(report)
}
