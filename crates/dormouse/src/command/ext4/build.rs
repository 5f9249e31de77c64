//! `dormouse ext4 build`: a source becomes an image, in a file or straight in a commit.

use std::fs::File;
use std::io::{self, Read, Write};
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
use dormouse_ext4::layout::{Journal, Options, Size, Uuid};
use dormouse_ext4::stage::{Stage, Staged};
use dormouse_ext4::tree::owner::Ownership;
use dormouse_ext4::tree::{ROOT, Tree, mtree};
use dormouse_store::progress::Progress;
use serde::Serialize;

use crate::app::App;
use crate::cli::ext4::BuildArgs;
use crate::command::ext4::image::{NewImage, Target};
use crate::command::ext4::open::Told;
use crate::exit::Fault;
use crate::output::size::{self, human};

/// What stays free if nothing is said.
const SLACK_BYTES: u64 = 64 << 20;

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
    let mut image = NewImage::begin(app, &target)?;
    let wanted = Wishes { args, limits, excluded, injected };
    let told = Told(&work);
    let filled = image.stage(options.size).and_then(|stage| wanted.fill(&source, stage, &told));
    let filled = filled.map_err(|error| image.reason(error))?;
    if let Some(warning) = source.misread(&filled.tree) {
        app.warn(&warning);
    }
    let built = image.finish(filled.tree, &options, &filled.staged, &work)?;
    drop(work);
    let report = &built.report;
    let object = BuildObject {
        image: args.output.as_ref().map(|path| path.display().to_string()),
        snapshot: built.committed.as_ref().map(|(name, _)| name.clone()),
        new_bytes: built.committed.as_ref().map(|&(_, bytes)| bytes),
        uuid: uuid::Uuid::from_bytes(report.uuid).to_string(),
        entries: report.entries,
        size_bytes: report.size_bytes,
        copied_bytes: report.copied_bytes + filled.staged.copied_bytes(),
        shared_bytes: report.shared_bytes,
        metadata_bytes: report.metadata_bytes,
        manifest: filled.manifest,
        seconds: begun.elapsed().as_secs_f64(),
    };
    show(app, &object)
}

/// A tree, and what was staged of its contents.
struct Filled {
    tree: Tree,
    staged: Staged,
    /// The digest of an OCI image's manifest.
    manifest: Option<String>,
}

/// What a tree shall be made of, beside its source.
struct Wishes<'a> {
    args: &'a BuildArgs,
    limits: Limits,
    excluded: Vec<String>,
    injected: Vec<(PathBuf, String)>,
}

impl Wishes<'_> {
    fn fill(&self, source: &Source, mut stage: Stage<'_>, told: &Told<'_>) -> Result<Filled> {
        let mut tree = Tree::new();
        let manifest = source.read(&mut tree, &mut stage, self, told)?;
        if let Some(path) = &self.args.mtree {
            let text = std::fs::read_to_string(path);
            let text = text.with_context(|| format!("read manifest {}", path.display()))?;
            mtree::apply(&mut tree, &text).with_context(|| path.display().to_string())?;
        }
        ownership(self.args).apply(&mut tree)?;
        for (from, to) in &self.injected {
            inject::inject(&mut tree, from, to.as_bytes(), &self.limits, told)?;
        }
        for path in &self.excluded {
            remove(&mut tree, path);
        }
        stage.release(&mut tree)?;
        let staged = if source.is_stream() { stage.finish()? } else { Staged::nothing() };
        Ok(Filled { tree, staged, manifest })
    }
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

    /// What should be said of a folder or tar that is an image in a form of its own.
    fn misread(&self, tree: &Tree) -> Option<String> {
        let (Source::Folder(path) | Source::Tar(path)) = self else { return None };
        let path = path.display();
        let has = |name: &str| tree.lookup(ROOT, name.as_bytes()).is_some();
        if has("oci-layout") && has("index.json") && has("blobs") {
            let word = if matches!(self, Source::Folder(_)) { "oci" } else { "oci-archive" };
            return Some(format!(
                "{path} is an OCI layout and was taken as plain files; {word}:{path} takes \
                 the image in it"
            ));
        }
        let is_saved = has("manifest.json") && (has("repositories") || has("blobs"));
        let is_saved = is_saved
            || has("manifest.json")
                && tree
                    .entries(ROOT)
                    .any(|entry| entry.name.ends_with(b".json") && entry.name != b"manifest.json");
        is_saved.then(|| {
            format!(
                "{path} looks like what `docker save` writes and was taken as plain files; \
                 `skopeo copy docker-archive:{path} oci:DIR` makes a layout of it, and oci:DIR takes \
                 the image in it"
            )
        })
    }

    /// Whether contents go by only once.
    fn is_stream(&self) -> bool {
        !matches!(self, Source::Folder(_))
    }

    /// Fills the tree. Returns the digest of an OCI image's manifest.
    fn read(
        &self,
        tree: &mut Tree,
        stage: &mut Stage<'_>,
        wishes: &Wishes<'_>,
        told: &Told<'_>,
    ) -> Result<Option<String>> {
        let Wishes { args, limits, excluded, .. } = wishes;
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
    stage: &mut Stage<'_>,
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
