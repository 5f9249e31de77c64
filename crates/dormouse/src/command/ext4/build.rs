//! `dormouse ext4 build`: a source becomes an image, in a file or straight in a commit.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use dormouse_ext4::input::layers::{Layer, Whiteouts, apply};
use dormouse_ext4::input::oci::manifest::Wanted;
use dormouse_ext4::input::oci::{self, Blobs, LayoutArchive, LayoutFolder, host_platform};
use dormouse_ext4::input::registry::credentials::Credentials;
use dormouse_ext4::input::registry::reference::Reference;
use dormouse_ext4::input::registry::{Registry, Transport};
use dormouse_ext4::input::{Limits, folder, inject, list};
use dormouse_ext4::layout::{Journal, Layout, Options, Size, Uuid};
use dormouse_ext4::stage::{Stage, Staged};
use dormouse_ext4::tree::owner::Ownership;
use dormouse_ext4::tree::{ROOT, Tree, mtree};
use dormouse_ext4::write::{LazyImage, Report, Run, write};
use dormouse_store::commit::CommitRequest;
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Progress;
use dormouse_store::source::{LayerRun, LayerSource, Source as CommitSource};
use dormouse_sys::publish::{Existing, NewFile};
use serde::Serialize;

use crate::app::App;
use crate::cli::ext4::BuildArgs;
use crate::command::ext4::open::Told;
use crate::exit::Fault;
use crate::output::size::{self, human};
use crate::progress::Display;

/// What stays free if nothing is said.
const SLACK_BYTES: u64 = 64 << 20;

/// The disk of a snapshot that an image is committed as.
const DISK: &str = "root";

/// The second that stands for now (reproducible-builds.org).
const EPOCH_VARIABLE: &str = "SOURCE_DATE_EPOCH";

#[derive(Serialize)]
struct BuildObject {
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<String>,
    uuid: String,
    entries: u64,
    size_bytes: u64,
    copied_bytes: u64,
    shared_bytes: u64,
    metadata_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    new_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest: Option<String>,
    seconds: f64,
}

/// Where a tree comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    Folder(PathBuf),
    Tar(PathBuf),
    Stdin,
    OciFolder(PathBuf, Option<String>),
    OciArchive(PathBuf, Option<String>),
    Registry(Reference),
}

/// Where an image goes.
pub(in crate::command) enum Target<'a> {
    File(&'a Path),
    Commit(&'a Name),
}

/// What came of an image.
pub(in crate::command) struct Built {
    pub(in crate::command) report: Report,
    /// The snapshot, and how many of its bytes the store did not have.
    pub(in crate::command) committed: Option<(String, u64)>,
}

pub(super) fn run(app: &mut App, args: &BuildArgs) -> Result<()> {
    let begun = Instant::now();
    let source = Source::parse(&args.source)?;
    let options = options(args)?;
    let limits = Limits { entries: args.limit_entries, unpacked_bytes: args.limit_bytes };
    let target = match (&args.output, &args.commit) {
        (Some(path), _) => Target::File(path),
        (None, Some(name)) => Target::Commit(name),
        (None, None) => return Err(Fault::usage("say where to: --output or --commit").into()),
    };
    let excluded = match &args.exclude_from {
        Some(path) => list::read(path)?,
        None => Vec::new(),
    };
    let injected = injections(args)?;
    let work = app.work()?;
    work.begin("build", None);
    let file = NewImage::begin(app, &target)?;
    let mut tree = Tree::new();
    let mut stage = Stage::new(file.file()?, options.size);
    if args.commit.is_some() {
        stage = stage.kept_in_cache();
    }
    let told = Told(&work);
    let manifest = source.read(&mut tree, &mut stage, args, &limits, &excluded, &told)?;
    if let Some(path) = &args.mtree {
        let text = std::fs::read_to_string(path);
        let text = text.with_context(|| format!("read manifest {}", path.display()))?;
        mtree::apply(&mut tree, &text).with_context(|| path.display().to_string())?;
    }
    ownership(args).apply(&mut tree)?;
    for (from, to) in &injected {
        inject::inject(&mut tree, from, to.as_bytes(), &limits, &told)?;
    }
    for path in &excluded {
        remove(&mut tree, path);
    }
    stage.release(&mut tree)?;
    let staged = if source.is_stream() { stage.finish()? } else { Staged::nothing() };
    let built = file.finish(app, tree, &options, &staged, &work)?;
    drop(work);
    let report = &built.report;
    let object = BuildObject {
        image: args.output.as_ref().map(|path| path.display().to_string()),
        snapshot: built.committed.as_ref().map(|(name, _)| name.clone()),
        new_bytes: built.committed.as_ref().map(|&(_, bytes)| bytes),
        uuid: uuid::Uuid::from_bytes(report.uuid).to_string(),
        entries: report.entries,
        size_bytes: report.size_bytes,
        copied_bytes: report.copied_bytes,
        shared_bytes: report.shared_bytes,
        metadata_bytes: report.metadata_bytes,
        manifest,
        seconds: begun.elapsed().as_secs_f64(),
    };
    show(app, &object)
}

fn show(app: &mut App, object: &BuildObject) -> Result<()> {
    if app.json {
        app.out.json(object)?;
        return Ok(());
    }
    if let Some(snapshot) = &object.snapshot {
        writeln!(app.out, "{snapshot}")?;
        app.out.flush()?;
    }
    let to = object.image.as_ref().or(object.snapshot.as_ref());
    app.say(&format!(
        "wrote {} files to {}, {}, in {:.2} s",
        object.entries,
        to.map_or("", String::as_str),
        human(object.size_bytes),
        object.seconds
    ));
    Ok(())
}

impl Source {
    fn parse(text: &str) -> Result<Source> {
        let tagged = |rest: &str| match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') && !Path::new(rest).exists() => {
                (PathBuf::from(path), Some(tag.to_owned()))
            }
            _ => (PathBuf::from(rest), None),
        };
        if let Some(rest) = text.strip_prefix("oci:") {
            let (path, tag) = tagged(rest);
            return Ok(Source::OciFolder(path, tag));
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (path, tag) = tagged(rest);
            return Ok(Source::OciArchive(path, tag));
        }
        if let Some(rest) = text.strip_prefix("docker://") {
            return Ok(Source::Registry(rest.parse()?));
        }
        if text == "-" {
            return Ok(Source::Stdin);
        }
        let path = PathBuf::from(text);
        let metadata = path.metadata().with_context(|| format!("read {text}"))?;
        Ok(if metadata.is_dir() { Source::Folder(path) } else { Source::Tar(path) })
    }

    /// Whether contents go by only once.
    fn is_stream(&self) -> bool {
        !matches!(self, Source::Folder(_))
    }

    /// Fills the tree. Returns the digest of an OCI image's manifest.
    fn read(
        &self,
        tree: &mut Tree,
        stage: &mut Stage,
        args: &BuildArgs,
        limits: &Limits,
        excluded: &[String],
        told: &Told<'_>,
    ) -> Result<Option<String>> {
        let blobs: (Arc<dyn Blobs>, Option<String>) = match self {
            Source::Folder(path) => {
                let is_excluded = |path: &[u8]| {
                    excluded.iter().any(|excluded| excluded.trim_matches('/').as_bytes() == path)
                };
                let exclude: folder::Exclude<'_> =
                    if excluded.is_empty() { None } else { Some(&is_excluded) };
                folder::read(tree, ROOT, path, limits, exclude, told)?;
                return Ok(None);
            }
            Source::Tar(path) => {
                let label = path.display().to_string();
                let path = path.clone();
                let open =
                    move || -> io::Result<Box<dyn Read + Send>> { Ok(Box::new(File::open(path)?)) };
                plain(tree, stage, open, &label, limits, told)?;
                return Ok(None);
            }
            Source::Stdin => {
                let open = || -> io::Result<Box<dyn Read + Send>> { Ok(Box::new(io::stdin())) };
                plain(tree, stage, open, "standard input", limits, told)?;
                return Ok(None);
            }
            Source::OciFolder(path, tag) => (Arc::new(LayoutFolder::new(path)), tag.clone()),
            Source::OciArchive(path, tag) => {
                (Arc::new(LayoutArchive::open(path, limits)?), tag.clone())
            }
            Source::Registry(reference) => (Arc::new(registry(reference, args)?), None),
        };
        let (blobs, tag) = blobs;
        let platform = args.platform.clone().unwrap_or_else(host_platform);
        let wanted = Wanted { tag, platform };
        let image = oci::read(tree, stage, &blobs, &wanted, limits, told)?;
        Ok(Some(image.manifest.to_string()))
    }
}

/// The registry of a reference, with the credentials that are found for it.
fn registry(reference: &Reference, args: &BuildArgs) -> Result<Registry> {
    let files = match &args.authfile {
        Some(path) => vec![path.clone()],
        None => Credentials::files(),
    };
    let mut credentials = None;
    for path in files {
        credentials = Credentials::from_file(&path, reference)?;
        if credentials.is_some() {
            break;
        }
    }
    let transport = if args.plain_http { Transport::Plain } else { Transport::Tls };
    Ok(Registry::new(reference.clone(), credentials, transport)?)
}

fn plain(
    tree: &mut Tree,
    stage: &mut Stage,
    open: impl FnOnce() -> io::Result<Box<dyn Read + Send>> + Send + 'static,
    label: &str,
    limits: &Limits,
    told: &Told<'_>,
) -> Result<()> {
    let layer = Layer { label, number: 0, whiteouts: Whiteouts::Plain };
    Ok(apply(tree, stage, open, layer, limits, told)?)
}

fn options(args: &BuildArgs) -> Result<Options> {
    let size = match args.size {
        Some(bytes) => Size::Exactly(bytes),
        None => Size::Slack(args.slack.unwrap_or(SLACK_BYTES)),
    };
    let journal = match args.journal.as_deref() {
        None => Journal::Standard,
        Some("none") => Journal::None,
        Some(text) => Journal::Bytes(size::parse(text).map_err(Fault::usage)?),
    };
    Ok(Options {
        label: args.label.clone(),
        uuid: args.uuid.map_or(Uuid::Derived, |uuid| Uuid::Given(uuid.into_bytes())),
        journal,
        reserved_percent: args.reserved,
        inodes: args.inodes,
        epoch: epoch()?,
        ..Options::new(size)
    })
}

/// The second that stands for now, if the environment says one.
pub(in crate::command) fn epoch() -> Result<Option<i64>> {
    let Some(text) = std::env::var_os(EPOCH_VARIABLE) else { return Ok(None) };
    let seconds = text.to_str().and_then(|text| text.parse().ok());
    let seconds = seconds.ok_or_else(|| {
        Fault::usage(format!("{EPOCH_VARIABLE} is {text:?}, not a number of seconds"))
    })?;
    Ok(Some(seconds))
}

fn ownership(args: &BuildArgs) -> Ownership {
    if let Some(owner) = args.owner {
        return Ownership::All(owner);
    }
    if args.uid_map.is_empty() && args.gid_map.is_empty() {
        return Ownership::Kept;
    }
    Ownership::Mapped { users: args.uid_map.clone(), groups: args.gid_map.clone() }
}

fn injections(args: &BuildArgs) -> Result<Vec<(PathBuf, String)>> {
    let mut all = args.inject.clone();
    if let Some(path) = &args.inject_from {
        all.extend(list::read(path)?);
    }
    all.iter().map(|text| pair(text)).collect()
}

/// `SRC:DST`.
pub(super) fn pair(text: &str) -> Result<(PathBuf, String)> {
    match text.rsplit_once(':') {
        Some((from, to)) if !from.is_empty() && !to.is_empty() => Ok((from.into(), to.to_owned())),
        _ => Err(Fault::usage(format!("{text:?} is not SRC:DST")).into()),
    }
}

fn remove(tree: &mut Tree, path: &str) {
    let path = path.trim_matches('/');
    let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
    if let Some(folder) = tree.lookup_path(parent.as_bytes()) {
        tree.remove(folder, name.as_bytes());
    }
}

/// An image under way: a file without a name, which it gets at the end, or never.
pub(in crate::command) struct NewImage<'a> {
    new: NewFile,
    commit: Option<&'a Name>,
}

impl<'a> NewImage<'a> {
    pub(in crate::command) fn begin(app: &App, target: &Target<'a>) -> Result<NewImage<'a>> {
        let (path, commit) = match target {
            Target::File(path) => (path.to_path_buf(), None),
            Target::Commit(name) => {
                // Fails early where there is no store.
                app.open()?;
                (app.store_dir.join(".ext4"), Some(*name))
            }
        };
        let new = NewFile::create(&path, Existing::Refuse, 0o644);
        let new = new.with_context(|| format!("make {}", path.display()))?;
        Ok(NewImage { new, commit })
    }

    /// The file, for contents to be staged in.
    pub(in crate::command) fn file(&self) -> Result<Arc<File>> {
        Ok(Arc::new(self.new.file().try_clone().context("open the image twice")?))
    }

    /// Plans, writes and publishes the image.
    pub(in crate::command) fn finish(
        self,
        app: &App,
        mut tree: Tree,
        options: &Options,
        staged: &Staged,
        work: &Display,
    ) -> Result<Built> {
        let layout = Layout::plan(&mut tree, options, staged)?;
        let told = Told(work);
        work.begin("write", Some(layout.copied_bytes(&tree)));
        let Some(name) = self.commit else {
            let report = write(&tree, &layout, self.new.file(), &told)?;
            self.new.publish().context("publish the image")?;
            return Ok(Built { report, committed: None });
        };
        let file = self.new.file().try_clone().context("open the image twice")?;
        let (image, report) = LazyImage::new(tree, &layout, file, &told)?;
        let source = CommitSource::Layer { layer: Arc::new(Lazy(image)), base: None };
        let request = CommitRequest::new(name.clone());
        let request = request.image(ImageName::Disk(Name::new(DISK)?), source);
        let committed = app.open()?.commit(request, work.job())?;
        let manifest = &committed.manifest;
        let committed = (manifest.display_name(), manifest.figures.new_bytes);
        Ok(Built { report, committed: Some(committed) })
    }
}

/// An image whose files are read while it is committed.
#[derive(Debug)]
struct Lazy(LazyImage);

impl LayerSource for Lazy {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset)
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()> {
        self.0.for_each_run(&mut |range, run| {
            let run = match run {
                Run::Data => LayerRun::Data,
                Run::Zero => LayerRun::Zero,
            };
            visit(range, run)
        })
    }
}
