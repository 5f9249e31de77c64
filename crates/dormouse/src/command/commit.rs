//! `dormouse commit`: captures images as a new snapshot.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dormouse_image::block::HoleMeaning;
use dormouse_store::commit::{CommitReport, CommitRequest, CommitSeconds, NewImage, Parent};
use dormouse_store::error::ErrorKind;
use dormouse_store::manifest::{Figures, MemoryRegion, Vmm};
use dormouse_store::name::{ImageName, Name};
use dormouse_store::source::Source;
use dormouse_store::store::Store;
use serde::Serialize;
use uuid::Uuid;

use super::disk::commit_live;
use crate::app::App;
use crate::cli::{CommitArgs, NamedFile};
use crate::command::ext4;
use crate::exit::{Fault, Kind};
use crate::live::memory::mapped_memory;
use crate::live::{LiveCommit, LiveFolder, LiveState, Scope};
use crate::mount::captures::TakenCapture;
use crate::output::size::human;

/// What a disk is called that was given without an id.
const DEFAULT_DISK: &str = "root";

/// What a state is called that was given without a name.
const DEFAULT_STATE: &str = "vmstate";

/// The longest memory layout: 4,096 rows of a few hundred bytes.
const LAYOUT_BYTES_MAX: u64 = 4 << 20;

#[derive(Serialize)]
struct CommitObject {
    snapshot: String,
    uuid: Uuid,
    number: u64,
    parent: Option<String>,
    figures: Figures,
    images: BTreeMap<String, Figures>,
    left_out: Vec<String>,
    written_bytes: u64,
    seconds: CommitSeconds,
}

pub(super) fn run(app: &mut App, args: CommitArgs) -> Result<()> {
    if let Some(live) = &args.live {
        return commit_all_of(app, live, &args);
    }
    let (drop_free_blocks, fs_frozen) = (args.drop_free_blocks, args.fs_frozen);
    let memory_of = args.memory_of;
    let capture = args.capture.clone();
    let mut request = request(args)?;
    let store = app.open()?;
    let taken = capture.map(|folder| TakenCapture::take(&folder, &store)).transpose()?;
    if let Some(taken) = &taken {
        add_capture(taken, &mut request)?;
    }
    if let Some(pid) = memory_of {
        take_memory_of(pid, &store, &mut request)?;
    }
    if drop_free_blocks {
        if !fs_frozen && has_memory(&store, &request)? {
            return Err(Fault::new(
                Kind::Refused,
                "the snapshot has memory, and its guest may own blocks that the disk calls free; \
                 freeze the file systems in the guest before the pause and say --fs-frozen",
            )
            .into());
        }
        for new in &mut request.images {
            match (&new.image, new.holes, &new.source) {
                (ImageName::Disk(_), HoleMeaning::Zero, Source::File(path)) => {
                    new.source = ext4::drop_free(path)?;
                }
                (ImageName::Disk(_), HoleMeaning::Zero, _) => {
                    return Err(Fault::usage(format!(
                        "{} comes from standard input, where free blocks cannot be found first",
                        new.image
                    ))
                    .into());
                }
                _ => {}
            }
        }
    }
    let work = app.work()?;
    let report = store.commit(request, work.job())?;
    drop(work);
    if let Some(taken) = taken {
        remove_capture(app, taken);
    }
    if app.json {
        app.out.json(&object(&report))?;
    } else {
        writeln!(app.out, "{}", report.manifest.display_name())?;
        app.out.flush()?;
        app.say(&summary(&report));
        let names: Vec<_> = report.left_out.iter().map(ToString::to_string).collect();
        if !names.is_empty() {
            app.say(&left_out(&names.join(", ")));
        }
    }
    Ok(())
}

/// Adds a capture's images to a request, and its parent where none is named.
fn add_capture(taken: &TakenCapture, request: &mut CommitRequest) -> Result<()> {
    if let (Parent::Auto, Some(parent)) = (&request.parent, taken.parent()?) {
        request.parent = Parent::Snapshot(parent);
    }
    for (captured, held) in taken.held() {
        let (image, source) = (captured.image.clone(), Source::Staged(held.clone()));
        request.images.push(NewImage { image, source, holes: HoleMeaning::Zero });
    }
    Ok(())
}

/// Removes a capture, as the snapshot has it now.
fn remove_capture(app: &App, taken: TakenCapture) {
    let folder = taken.folder().display().to_string();
    if let Err(error) = taken.remove() {
        app.warn(&format!("cannot remove {folder}: {error}"));
    }
}

/// Adds the memory of a process that maps the parent's.
fn take_memory_of(pid: u32, store: &Store, request: &mut CommitRequest) -> Result<()> {
    let Parent::Snapshot(parent) = &request.parent else {
        let message = "--memory-of wants the snapshot that the process woke from as --parent";
        return Err(Fault::usage(message).into());
    };
    let source = mapped_memory(pid, &store.snapshot(parent)?)?;
    request.images.push(NewImage { image: ImageName::Memory, source, holes: HoleMeaning::Parent });
    Ok(())
}

/// Whether the snapshot will have memory, of its own or its parent's.
fn has_memory(store: &Store, request: &CommitRequest) -> Result<bool> {
    let is_memory = |image: &ImageName| *image == ImageName::Memory;
    if request.images.iter().any(|new| is_memory(&new.image)) {
        return Ok(true);
    }
    if request.drop.iter().any(is_memory) {
        return Ok(false);
    }
    let parent = match &request.parent {
        Parent::None => return Ok(false),
        Parent::Auto => request.name.as_str().parse()?,
        Parent::Snapshot(snap) => snap.clone(),
    };
    match store.manifest(&parent) {
        Ok(manifest) => Ok(manifest.images.iter().any(|entry| is_memory(&entry.image))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Disks and memory of a live VM, in one snapshot.
fn commit_all_of(app: &mut App, live: &Name, args: &CommitArgs) -> Result<()> {
    let store = app.open()?;
    let folder = LiveFolder::new(&app.store_dir, live);
    folder.check()?;
    let mut states: Vec<LiveState> = Vec::new();
    for NamedFile { id, file } in &args.state {
        let name = name_or(id.as_ref(), DEFAULT_STATE)?;
        if states.iter().any(|state| state.name == name) {
            return Err(Fault::usage(format!("state {name} is given twice")).into());
        }
        if file.as_os_str() == "-" {
            let message = "the state of a live VM is read by the process that has it: give a file";
            return Err(Fault::usage(message).into());
        }
        let path = std::path::absolute(file)
            .with_context(|| format!("cannot tell where {} is", file.display()))?;
        states.push(LiveState { name, path });
    }
    let taken =
        args.capture.as_ref().map(|folder| TakenCapture::take(folder, &store)).transpose()?;
    let captured = taken.as_ref().map(|taken| taken.images().to_vec()).unwrap_or_default();
    let twice = captured
        .iter()
        .find(|one| states.iter().any(|state| one.image == ImageName::State(state.name.clone())));
    if let Some(twice) = twice {
        return Err(Fault::usage(format!("{} is captured, and given, too", twice.image)).into());
    }
    let mut labels = BTreeMap::new();
    for (key, value) in &args.label {
        if labels.insert(key.clone(), value.clone()).is_some() {
            return Err(Fault::usage(format!("label {key} is given twice")).into());
        }
    }
    let over = taken.as_ref().map(TakenCapture::parent).transpose()?.flatten();
    let parent = match &args.parent.0 {
        Parent::Auto => over.map_or("auto".to_owned(), |over| over.to_string()),
        Parent::None => "none".to_owned(),
        Parent::Snapshot(snap) => snap.to_string(),
    };
    let wanted = LiveCommit {
        states,
        captured,
        parent,
        labels,
        ..LiveCommit::new(Scope::All, args.name.clone())
    };
    commit_live(app, &store, &folder, &wanted)?;
    if let Some(taken) = taken {
        remove_capture(app, taken);
    }
    Ok(())
}

fn request(args: CommitArgs) -> Result<CommitRequest> {
    let mut request = CommitRequest::new(args.name);
    request.images = images(&NewFiles {
        memory: args.memory,
        memory_diff: args.memory_diff,
        disk: args.disk,
        disk_diff: args.disk_diff,
        state: args.state,
    })?;
    request.parent = args.parent.0;
    request.drop = args.drop;
    for (key, value) in args.label {
        if request.labels.contains_key(&key) {
            return Err(Fault::usage(format!("label {key} is given twice")).into());
        }
        request.labels.insert(key, value);
    }
    if let Some(path) = &args.memory_layout {
        request.memory_layout = read_layout(path)?;
    }
    request.vmm = Vmm {
        kind: args.vmm,
        version: args.vmm_version,
        cpu_model: args.cpu_model,
        host_kernel: args.host_kernel,
        arch: args.arch,
        vcpus: args.vcpus,
    };
    request.codec = args.codec;
    Ok(request)
}

#[derive(Debug, Default)]
struct NewFiles {
    memory: Option<PathBuf>,
    memory_diff: Option<PathBuf>,
    disk: Vec<NamedFile>,
    disk_diff: Vec<NamedFile>,
    state: Vec<NamedFile>,
}

fn images(files: &NewFiles) -> Result<Vec<NewImage>> {
    let disk = |file: &NamedFile| -> Result<ImageName> {
        Ok(ImageName::Disk(name_or(file.id.as_ref(), DEFAULT_DISK)?))
    };
    let state = |file: &NamedFile| -> Result<ImageName> {
        Ok(ImageName::State(name_or(file.id.as_ref(), DEFAULT_STATE)?))
    };
    let mut images = Vec::new();
    let mut push = |image: ImageName, file: &Path, holes| -> Result<()> {
        images.push(NewImage { source: source(file, holes, &image)?, image, holes });
        Ok(())
    };
    for file in &files.disk {
        push(disk(file)?, &file.file, HoleMeaning::Zero)?;
    }
    for file in &files.disk_diff {
        push(disk(file)?, &file.file, HoleMeaning::Parent)?;
    }
    if let Some(file) = &files.memory {
        push(ImageName::Memory, file, HoleMeaning::Zero)?;
    }
    if let Some(file) = &files.memory_diff {
        push(ImageName::Memory, file, HoleMeaning::Parent)?;
    }
    for file in &files.state {
        push(state(file)?, &file.file, HoleMeaning::Zero)?;
    }
    let mut from_stdin = images.iter().filter(|new| matches!(new.source, Source::Stdin));
    if let (Some(first), Some(second)) = (from_stdin.next(), from_stdin.next()) {
        return Err(Fault::usage(format!(
            "{} and {} cannot both be read from standard input",
            first.image, second.image
        ))
        .into());
    }
    Ok(images)
}

fn name_or(id: Option<&Name>, default: &str) -> Result<Name> {
    Ok(id.cloned().map_or_else(|| Name::new(default), Ok)?)
}

fn source(file: &Path, holes: HoleMeaning, image: &ImageName) -> Result<Source> {
    if file.as_os_str() != "-" {
        return Ok(Source::File(file.to_owned()));
    }
    if holes == HoleMeaning::Parent {
        return Err(Fault::new(
            Kind::Refused,
            format!(
                "a diff of {image} cannot come from standard input: a stream has no holes, so what \
                 did not change could not be told from zeros; give the file itself"
            ),
        )
        .into());
    }
    Ok(Source::Stdin)
}

fn read_layout(path: &Path) -> Result<Vec<MemoryRegion>> {
    let what = || format!("read memory layout {}", path.display());
    // A device or pipe has no length to ask for.
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LAYOUT_BYTES_MAX + 1).read_to_end(&mut bytes))
        .with_context(what)?;
    if bytes.len() as u64 > LAYOUT_BYTES_MAX {
        return Err(Fault::usage(format!(
            "memory layout {} has more than the {LAYOUT_BYTES_MAX} bytes that one may have",
            path.display()
        ))
        .into());
    }
    serde_json::from_slice(&bytes).map_err(|error| {
        Fault::usage(format!(
            "{} is not a memory layout, a JSON array of rows as docs/cli.md describes it: {error}",
            path.display()
        ))
        .into()
    })
}

fn object(report: &CommitReport) -> CommitObject {
    let manifest = &report.manifest;
    let parent = manifest.parent.as_ref();
    CommitObject {
        snapshot: manifest.display_name(),
        uuid: manifest.uuid,
        number: manifest.number,
        parent: parent.map(|parent| format!("{}@{}", parent.name, parent.number)),
        figures: manifest.figures,
        images: report
            .images
            .iter()
            .map(|(image, figures)| (image.to_string(), *figures))
            .collect(),
        left_out: report.left_out.iter().map(ToString::to_string).collect(),
        written_bytes: report.written_bytes,
        seconds: report.seconds,
    }
}

/// What is said of images that do not go with new disks.
pub(super) fn left_out(names: &str) -> String {
    format!("left out, as it remembers the disks of before: {names}")
}

fn summary(report: &CommitReport) -> String {
    let figures = &report.manifest.figures;
    format!(
        "{} raw, {} not zero, {} changed, {} new; {} written in {:.2} s ({:.2} s of it fsync)",
        human(figures.raw_bytes),
        human(figures.nonzero_bytes),
        human(figures.changed_bytes),
        human(figures.new_bytes),
        human(report.written_bytes),
        report.seconds.total,
        report.seconds.fsync,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(file: &str) -> NamedFile {
        NamedFile { id: None, file: file.into() }
    }

    #[test]
    fn files_become_images_with_the_meaning_of_their_holes() {
        let files = NewFiles {
            memory_diff: Some("m".into()),
            disk: vec![named("-")],
            disk_diff: vec![NamedFile { id: Some(Name::new("data").unwrap()), file: "d".into() }],
            state: vec![named("s")],
            ..NewFiles::default()
        };
        let images = images(&files).unwrap();
        let seen: Vec<(String, HoleMeaning)> =
            images.iter().map(|new| (new.image.to_string(), new.holes)).collect();
        let expected = [
            ("disk/root", HoleMeaning::Zero),
            ("disk/data", HoleMeaning::Parent),
            ("memory", HoleMeaning::Parent),
            ("state/vmstate", HoleMeaning::Zero),
        ];
        assert_eq!(seen, expected.map(|(image, holes)| (image.to_owned(), holes)));
        assert!(matches!(images[0].source, Source::Stdin));
    }

    #[test]
    fn standard_input_is_read_once_and_never_as_a_diff() {
        let twice =
            NewFiles { memory: Some("-".into()), state: vec![named("-")], ..NewFiles::default() };
        assert_eq!(Kind::of(&images(&twice).unwrap_err()), Kind::Usage);
        let diff = NewFiles { memory_diff: Some("-".into()), ..NewFiles::default() };
        assert_eq!(Kind::of(&images(&diff).unwrap_err()), Kind::Refused);
    }
}
