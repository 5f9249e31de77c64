//! What a live disk lies over: an image of the store, found again by the root of its map.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use dormouse_image::map::Source;
use dormouse_live::base::{Base, BlankBase, FileBase, RunKind};
use dormouse_live::error::{Error as LiveError, ErrorKind as LiveErrorKind, Result as LiveResult};
use dormouse_store::manifest::RootRef;
use dormouse_store::name::{ImageName, ImageRef, Name};
use dormouse_store::reader::{ImageReader, ReadAhead};
use dormouse_store::store::Store;
use serde::{Deserialize, Serialize};

use crate::exit::{Fault, Kind};

/// What an overlay's description calls its base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum BaseLabel {
    /// Nothing: the disk began blank.
    Blank,

    /// An image of the store. The snapshot's name is for people; the root finds it.
    Image {
        /// `NAME@N:disk/ID`.
        image: String,

        /// The root of its map; none if it is all zero.
        root: Option<RootRef>,

        /// Its length.
        size_bytes: u64,
    },

    /// A raw file, as it was when the disk was made.
    File {
        /// Where it is; absolute.
        path: String,

        /// Its length.
        size_bytes: u64,

        /// Its inode.
        inode: u64,

        /// When it was written to last, in nanoseconds since 1970.
        modified_ns: i128,
    },
}

impl BaseLabel {
    /// The label of an image that is called `name`.
    pub(crate) fn of(image: &ImageReader, name: String) -> BaseLabel {
        BaseLabel::Image { image: name, root: image.root(), size_bytes: image.size_bytes() }
    }

    /// The label of a raw file as it is now.
    pub(crate) fn of_file(path: &Path) -> Result<BaseLabel> {
        let cannot = || format!("cannot look at {}", path.display());
        let absolute = path.canonicalize().with_context(cannot)?;
        let metadata = absolute.metadata().with_context(cannot)?;
        let Some(path) = absolute.to_str().filter(|_| metadata.is_file()) else {
            let message = format!("{} is not a file with a name in UTF-8", path.display());
            return Err(Fault::usage(message).into());
        };
        let modified_ns =
            i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        let (size_bytes, inode) = (metadata.len(), metadata.ino());
        Ok(BaseLabel::File { path: path.to_owned(), size_bytes, inode, modified_ns })
    }

    /// Fails if it is a file that was changed since it became a base.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            BaseLabel::File { path, .. } if BaseLabel::of_file(Path::new(path))? != *self => {
                let message = format!(
                    "{path} was changed since a live disk lies over it; bring back what it was"
                );
                Err(Fault::new(Kind::Refused, message).into())
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn to_text(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    pub(crate) fn from_text(text: &str) -> Result<BaseLabel> {
        serde_json::from_str(text).context("a live disk's base is not one of ours")
    }

    /// The image, which the live VM's pin keeps; none if the disk lies over nothing or a file.
    pub(crate) fn open(&self, store: &Store, live: &Name) -> Result<Option<ImageReader>> {
        match self {
            BaseLabel::Blank | BaseLabel::File { .. } => Ok(None),
            BaseLabel::Image { root, size_bytes, .. } => {
                let label = format!("the base of {live}");
                Ok(Some(store.held_image(&label, root.as_ref(), *size_bytes)?))
            }
        }
    }

    /// What the overlay with this id is an image of: a guest's memory if it began as one.
    pub(crate) fn image_name(&self, id: &Name) -> ImageName {
        match self {
            BaseLabel::Image { image, .. }
                if image.parse().is_ok_and(|of: ImageRef| of.image == ImageName::Memory) =>
            {
                ImageName::Memory
            }
            _ => ImageName::Disk(id.clone()),
        }
    }

    /// What people call it.
    pub(crate) fn display(&self) -> &str {
        match self {
            BaseLabel::Blank => "-",
            BaseLabel::Image { image, .. } => image,
            BaseLabel::File { path, .. } => path,
        }
    }
}

/// The base that a label names, for an overlay that is being opened.
pub(super) fn open(store: &Store, live: &Name, label: &str) -> LiveResult<Arc<dyn Base>> {
    let label = BaseLabel::from_text(label);
    if let Ok(BaseLabel::File { path, .. }) = &label {
        return Ok(Arc::new(FileBase::open(Path::new(path))?));
    }
    let image = label.and_then(|label| label.open(store, live));
    match image {
        Ok(Some(image)) => Ok(Arc::new(ImageBase::new(image))),
        Ok(None) => Ok(Arc::new(BlankBase)),
        Err(error) => {
            let message = format!("cannot open the base of {live}");
            Err(LiveError::with_source(LiveErrorKind::Io, message, error))
        }
    }
}

/// An image of the store as a base.
#[derive(Debug)]
pub(super) struct ImageBase(ReadAhead);

impl ImageBase {
    pub(super) fn new(image: ImageReader) -> ImageBase {
        ImageBase(ReadAhead::new(image))
    }
}

impl Base for ImageBase {
    fn size_bytes(&self) -> u64 {
        self.0.image().size_bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> LiveResult<()> {
        self.0.read_at(buf, offset).map_err(unreadable)
    }

    fn for_each_run(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, RunKind) -> LiveResult<()>,
    ) -> LiveResult<()> {
        self.for_each_extent(range, &mut |run, source| {
            let kind = match source {
                Source::Zero => RunKind::Zero,
                Source::Stored { .. } => RunKind::Data,
            };
            visit(run, kind)
        })
    }

    fn for_each_source(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, u64) -> LiveResult<()>,
    ) -> LiveResult<()> {
        self.for_each_extent(range, &mut |run, source| visit(run, source_id(source)))
    }

    fn prefetch(&self, range: Range<u64>) -> LiveResult<()> {
        self.0.image().prefetch(range).map_err(unreadable)
    }

    fn read_will_wait(&self, range: Range<u64>) -> bool {
        !self.0.image().is_cached(range)
    }
}

impl ImageBase {
    fn for_each_extent(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, Source) -> LiveResult<()>,
    ) -> LiveResult<()> {
        let mut failed = None;
        let walked = self.0.image().for_each_extent(range, &mut |extent| {
            visit(extent.range, extent.source).map_err(|error| {
                failed = Some(error);
                dormouse_store::error::Error::cancelled()
            })
        });
        match failed {
            Some(error) => Err(error),
            None => walked.map_err(unreadable),
        }
    }
}

/// What `dormouse:source` calls a source: 0 for zeros, else how the pack's id begins.
pub(super) fn source_id(source: Source) -> u64 {
    match source {
        Source::Zero => 0,
        Source::Stored { pack, .. } => pack.source(),
    }
}

fn unreadable(error: dormouse_store::error::Error) -> LiveError {
    LiveError::with_source(LiveErrorKind::Io, "cannot read the base", error)
}
