//! An image under way: a file that gets its name at the end, or a commit.
//!
//! ```text
//!  contents of streams, as they are read ──► the store ◄── metadata, from its beginning on
//!                                              ▲
//!  the commit: contents that are elsewhere, ───┘ over both
//!  superblocks, zeros for what was removed
//! ```
//!
//! A commit has no file in between. Each of the three goes through the store in ascending order, and
//! lies over the one before; the first two are in no snapshot until the last one is, and `gc` takes
//! them away if that never comes.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use dormouse_ext4::layout::{Layout, Options, Size};
use dormouse_ext4::sink::Sink;
use dormouse_ext4::stage::{Stage, Staged};
use dormouse_ext4::tree::Tree;
use dormouse_ext4::write::{LazyImage, Report, Run, write};
use dormouse_image::block::HoleMeaning;
use dormouse_store::commit::CommitRequest;
use dormouse_store::error::Error as StoreError;
use dormouse_store::name::{ImageName, Name, SnapRef};
use dormouse_store::progress::Progress;
use dormouse_store::source::{LayerRun, LayerSource, Source, Staged as StagedImage};
use dormouse_store::store::Store;
use dormouse_sys::publish::{Existing, NewFile};

use crate::app::App;
use crate::command::ext4::open::Told;
use crate::progress::Display;
use crate::segment::{Below, Segment};

/// The disk of a snapshot that an image is committed as.
const DISK: &str = "root";

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

/// An image under way.
pub(in crate::command) enum NewImage<'a> {
    File(NewFile),
    Commit(Box<NewCommit<'a>>),
}

impl<'a> NewImage<'a> {
    pub(in crate::command) fn begin(app: &App, target: &Target<'a>) -> Result<NewImage<'a>> {
        match *target {
            Target::File(path) => {
                let new = NewFile::create(path, Existing::Refuse, 0o644);
                let new = new.with_context(|| format!("make {}", path.display()))?;
                Ok(NewImage::File(new))
            }
            // Fails early where there is no store.
            Target::Commit(name) => {
                let commit = NewCommit::begin(app.open()?, name)?;
                Ok(NewImage::Commit(Box::new(commit)))
            }
        }
    }

    /// Where contents of streams go.
    pub(in crate::command) fn stage(&mut self, size: Size) -> Result<Stage<'_>> {
        match self {
            NewImage::File(new) => {
                let file: File = new.file().try_clone().context("open the image twice")?;
                Ok(Stage::new(Arc::new(file), size))
            }
            NewImage::Commit(commit) => Ok(Stage::into_sink(&mut commit.contents, size)),
        }
    }

    /// Why something failed: the store knows better than who found it shut.
    pub(in crate::command) fn reason(&mut self, error: anyhow::Error) -> anyhow::Error {
        match self {
            NewImage::File(_) => error,
            NewImage::Commit(commit) => commit.contents.reason(error),
        }
    }

    /// Plans, writes and publishes the image.
    pub(in crate::command) fn finish(
        self,
        mut tree: Tree,
        options: &Options,
        staged: &Staged,
        work: &Display,
    ) -> Result<Built> {
        let layout = Layout::plan(&mut tree, options, staged)?;
        work.begin("write", Some(layout.copied_bytes(&tree)));
        match self {
            NewImage::File(new) => {
                let report = write(&tree, &layout, new.file(), &Told(work))?;
                new.publish().context("publish the image")?;
                Ok(Built { report, committed: None })
            }
            NewImage::Commit(commit) => commit.finish(tree, &layout, staged, work),
        }
    }
}

/// An image on its way into a store.
pub(in crate::command) struct NewCommit<'a> {
    name: &'a Name,
    store: Store,
    /// The image that the name has until now, with which blocks are compared first.
    previous: Below,
    contents: StoreSink,
}

impl<'a> NewCommit<'a> {
    fn begin(store: Store, name: &'a Name) -> Result<NewCommit<'a>> {
        let disk = disk()?;
        let mut base = None;
        if !store.numbers(name)?.is_empty() {
            let snapshot = store.snapshot(&SnapRef { name: name.clone(), number: None })?;
            if snapshot.manifest().image(&disk).is_some() {
                base = Some(snapshot.image(&disk)?);
            }
        }
        let previous = Below { base, holes: HoleMeaning::Zero };
        let contents = StoreSink::new(&store, name, previous.clone());
        Ok(NewCommit { name, store, previous, contents })
    }

    fn finish(self, tree: Tree, layout: &Layout, staged: &Staged, work: &Display) -> Result<Built> {
        let NewCommit { name, store, previous, contents } = self;
        let contents = contents.finish(staged.end_bytes())?;
        let below = match &contents {
            Some(contents) => {
                Below { base: Some(contents.image().clone()), holes: HoleMeaning::Parent }
            }
            None => previous,
        };
        let mut metadata = StoreSink::new(&store, name, below);
        let copied_bytes = layout.copied_bytes(&tree);
        let image = LazyImage::new(tree, layout, &mut metadata, &Told(work));
        let (image, mut report) = image.map_err(|error| metadata.reason(error.into()))?;
        // Its contents are read by the commit.
        report.copied_bytes = copied_bytes;
        let metadata = metadata.finish(layout.size_bytes())?;
        let lower = match (metadata, contents) {
            (Some(metadata), Some(contents)) => Some(metadata.over(&contents)),
            (metadata, contents) => metadata.or(contents),
        };
        let layer: Arc<dyn LayerSource> = Arc::new(Lazy(image));
        let source = match lower {
            Some(staged) => Source::Over { layer, staged },
            None => Source::Layer { layer, base: None },
        };
        let request = CommitRequest::new(name.clone()).image(disk()?, source);
        let committed = store.commit(request, work.job())?;
        let manifest = &committed.manifest;
        let committed = (manifest.display_name(), manifest.figures.new_bytes);
        Ok(Built { report, committed: Some(committed) })
    }
}

fn disk() -> Result<ImageName> {
    Ok(ImageName::Disk(Name::new(DISK)?))
}

/// What goes into the store as it comes, from the first byte that does.
struct StoreSink {
    store: Store,
    label: String,
    below: Below,
    segment: Option<Segment>,
    failure: Option<StoreError>,
}

impl fmt::Debug for StoreSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreSink").field("segment", &self.segment).finish_non_exhaustive()
    }
}

impl StoreSink {
    fn new(store: &Store, name: &Name, below: Below) -> StoreSink {
        let label = format!("ext4 image for {name}");
        StoreSink { store: store.clone(), label, below, segment: None, failure: None }
    }

    fn take(&mut self, bytes: &[u8], offset: u64) -> Result<(), StoreError> {
        let segment = match &mut self.segment {
            Some(segment) => segment,
            None => {
                let segment = Segment::start(&self.store, &self.label, self.below.clone())?;
                self.segment.insert(segment)
            }
        };
        segment.write(bytes, offset)
    }

    /// Makes durable what was taken, as an image of a length; nothing if nothing was.
    fn finish(mut self, size_bytes: u64) -> Result<Option<StagedImage>> {
        let Some(segment) = self.segment.take() else { return Ok(None) };
        Ok(Some(segment.finish(size_bytes)?))
    }

    /// Why `error` came, if it was from here.
    fn reason(&mut self, error: anyhow::Error) -> anyhow::Error {
        self.failure.take().map_or(error, Into::into)
    }
}

impl Sink for StoreSink {
    fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.take(bytes, offset).map_err(|error| {
            let told = io::Error::other(error.to_string());
            self.failure = Some(error);
            told
        })
    }
}

impl Drop for StoreSink {
    fn drop(&mut self) {
        // So that nothing is left of it when the process ends.
        if let Some(segment) = self.segment.take() {
            segment.abandon();
        }
    }
}

/// What lies over the metadata; files are read while they are committed.
#[derive(Debug)]
struct Lazy(LazyImage);

impl LayerSource for Lazy {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn label(&self) -> String {
        "the ext4 image".to_owned()
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
