//! What a live disk lies over: an image of the store, found again by the root of its map.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};
use dormouse_image::map::Source;
use dormouse_live::base::{Base, BlankBase, RunKind};
use dormouse_live::error::{Error as LiveError, ErrorKind as LiveErrorKind, Result as LiveResult};
use dormouse_store::manifest::RootRef;
use dormouse_store::name::Name;
use dormouse_store::reader::ImageReader;
use dormouse_store::store::Store;
use serde::{Deserialize, Serialize};

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
}

impl BaseLabel {
    /// The label of an image that is called `name`.
    pub(crate) fn of(image: &ImageReader, name: String) -> BaseLabel {
        BaseLabel::Image { image: name, root: image.root(), size_bytes: image.size_bytes() }
    }

    pub(crate) fn to_text(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    pub(crate) fn from_text(text: &str) -> Result<BaseLabel> {
        serde_json::from_str(text).context("a live disk's base is not one of ours")
    }

    /// The image, which the live VM's pin keeps; none if the disk began blank.
    pub(crate) fn open(&self, store: &Store, live: &Name) -> Result<Option<ImageReader>> {
        match self {
            BaseLabel::Blank => Ok(None),
            BaseLabel::Image { root, size_bytes, .. } => {
                let label = format!("the base of {live}");
                Ok(Some(store.held_image(&label, root.as_ref(), *size_bytes)?))
            }
        }
    }

    /// What people call it.
    pub(crate) fn display(&self) -> &str {
        match self {
            BaseLabel::Blank => "-",
            BaseLabel::Image { image, .. } => image,
        }
    }
}

/// The base that a label names, for an overlay that is being opened.
pub(super) fn open(store: &Store, live: &Name, label: &str) -> LiveResult<Arc<dyn Base>> {
    let image = BaseLabel::from_text(label).and_then(|label| label.open(store, live));
    match image {
        Ok(Some(image)) => Ok(Arc::new(ImageBase(image))),
        Ok(None) => Ok(Arc::new(BlankBase)),
        Err(error) => {
            let message = format!("cannot open the base of {live}");
            Err(LiveError::with_source(LiveErrorKind::Io, message, error))
        }
    }
}

/// An image of the store as a base.
#[derive(Debug)]
pub(super) struct ImageBase(pub(super) ImageReader);

impl Base for ImageBase {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> LiveResult<()> {
        self.0.read_at(buf, offset).map_err(unreadable)
    }

    fn for_each_run(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, RunKind) -> LiveResult<()>,
    ) -> LiveResult<()> {
        let mut failed = None;
        let walked = self.0.for_each_extent(range, &mut |extent| {
            let kind = match extent.source {
                Source::Zero => RunKind::Zero,
                Source::Stored { .. } => RunKind::Data,
            };
            visit(extent.range, kind).map_err(|error| {
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

fn unreadable(error: dormouse_store::error::Error) -> LiveError {
    LiveError::with_source(LiveErrorKind::Io, "cannot read the base", error)
}
