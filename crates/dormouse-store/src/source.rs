//! Where a commit reads an image from.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use dormouse_sys::file_size::{FileKind, file_size};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::manifest::Figures;
use crate::reader::ImageReader;

/// The bytes of an image to be captured.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Source {
    /// A regular file, whose holes are never read, or a block device, or a pipe until its end. A
    /// file that is changed meanwhile is refused.
    File(PathBuf),

    /// Standard input until its end.
    Stdin,

    /// Bytes in memory.
    Bytes(Arc<[u8]>),

    /// An image of a store.
    Image(ImageReader),

    /// Bytes that somebody else keeps and knows the runs of: what was written over an image, as a
    /// live disk has it, or a file of another format. Blocks in neither kind of run are as in
    /// `base`, whatever the commit's parent; without a base they are zero. Those that are not zero
    /// are compared with `base`, so one is worth giving even where the runs cover everything.
    Layer {
        /// The writes.
        layer: Arc<dyn LayerSource>,

        /// What they lie over.
        base: Option<ImageReader>,
    },

    /// An image whose blocks are stored already; see [`Store::stage`](crate::store::Store::stage).
    Staged(Staged),

    /// One with runs over it that are not stored yet. Between them it is as staged, and what it
    /// stored counts as this commit's.
    Over {
        /// The runs.
        layer: Arc<dyn LayerSource>,

        /// What they lie over.
        staged: Staged,
    },
}

/// An image that was captured and is in no snapshot yet. As long as this lives no collection takes
/// its blocks away.
#[derive(Clone, Debug)]
pub struct Staged {
    image: ImageReader,
    figures: Figures,
}

impl Staged {
    pub(crate) fn new(image: ImageReader, figures: Figures) -> Staged {
        Staged { image, figures }
    }

    /// The image.
    pub fn image(&self) -> &ImageReader {
        &self.image
    }

    /// What capturing it found and stored.
    pub fn figures(&self) -> &Figures {
        &self.figures
    }

    /// The same image, with what capturing `lower` stored counted in: that is what it was captured
    /// over.
    #[must_use]
    pub fn over(self, lower: &Staged) -> Staged {
        Staged { figures: self.figures.over(&lower.figures), ..self }
    }
}

/// Bytes of an image as somebody writes them, from its start to its end.
pub trait WriteSource: Send {
    /// Waits for what is written next. `spare` is a buffer of any length that may be used for it; one
    /// that is not used may be kept.
    ///
    /// What comes starts behind what came before, at a whole block, is made of whole blocks, and
    /// lies within one aligned stretch of [`WRITTEN_BYTES_MAX`].
    fn next(&mut self, spare: Vec<u8>) -> io::Result<Written>;
}

/// What lies between two pieces that are given was never written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// Bytes.
    Data {
        /// Where they go.
        offset: u64,

        /// Whole blocks.
        bytes: Vec<u8>,
    },

    /// The end, and the image's length: within the last block that was given, or behind it.
    End {
        /// Bytes of the image.
        size_bytes: u64,
    },
}

/// Bytes of a piece of [`Written`].
pub const WRITTEN_BYTES_MAX: usize = crate::capture::PIECE_BYTES;

/// What a run of a layer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerRun {
    /// Bytes to be read.
    Data,

    /// Zeros.
    Zero,
}

/// Runs of bytes that lie over an image, or over nothing.
pub trait LayerSource: fmt::Debug + Send + Sync {
    /// The length of the whole, which may differ from that of what lies below.
    fn size_bytes(&self) -> u64;

    /// What messages call it.
    fn label(&self) -> String {
        "a live disk".to_owned()
    }

    /// Fills `buf` from `offset`, which lies in a run of data. Called from several threads, once
    /// for each byte of the runs of data, in pieces that may be asked for while the walk goes on.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Called when everything was read, before anything is published: fails if what was read is
    /// known to have changed meanwhile.
    fn check_unchanged(&self) -> io::Result<()> {
        Ok(())
    }

    /// Calls `visit` with the runs in order, each of whole blocks but at the very end. An error of
    /// `visit` ends the walk and is returned.
    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()>;
}

/// A source that was opened and looked at.
pub(crate) struct OpenSource {
    /// What messages call it.
    pub(crate) label: String,
    pub(crate) body: Body,
}

pub(crate) enum Body {
    /// Bytes that can be read anywhere, of which workers read pieces.
    Seekable {
        bytes: u64,
        reader: Arc<dyn ReadPiece>,
        /// The file, if it is one whose holes can be skipped.
        file: Option<Unchanged>,
    },

    /// Writes over an image.
    Layer(Arc<dyn LayerSource>),

    /// Bytes that come once, in order.
    Stream(Box<dyn Read + Send>),

    /// Bytes that come once, in order, with holes between them.
    Written(Box<dyn WriteSource>),
}

/// A regular file as it was when it was opened.
pub(crate) struct Unchanged {
    label: String,
    file: Arc<File>,
    bytes: u64,
    modified: Option<SystemTime>,
}

/// What is looked at when all of a source was read.
pub(crate) enum EndCheck {
    /// Nothing can have changed.
    Nothing,

    /// A file is as it was.
    File(Unchanged),

    /// A layer says so itself.
    Layer(Arc<dyn LayerSource>),
}

impl EndCheck {
    /// Fails if the source changed while it was read.
    pub(crate) fn check(self) -> Result<()> {
        match self {
            EndCheck::Nothing => Ok(()),
            EndCheck::File(unchanged) => unchanged.check(),
            EndCheck::Layer(layer) => layer.check_unchanged().map_err(|error| {
                let why = format!("{} changed while it was read", layer.label());
                Error::with_source(ErrorKind::Refused, why, error)
            }),
        }
    }
}

/// Reads pieces of a source, from several threads.
pub(crate) trait ReadPiece: Send + Sync {
    /// Fills `buf` from `offset`.
    fn read_piece(&self, buf: &mut [u8], offset: u64) -> Result<()>;
}

struct FilePiece {
    file: Arc<File>,
    label: String,
}

impl ReadPiece for FilePiece {
    fn read_piece(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buf, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => changed(&self.label, "became shorter"),
            _ => Error::io(format!("cannot read {} at byte {offset}", self.label), error),
        })
    }
}

/// A layer whose pieces are read by workers.
pub(crate) struct LayerPiece(pub(crate) Arc<dyn LayerSource>);

impl ReadPiece for LayerPiece {
    fn read_piece(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0
            .read_at(buf, offset)
            .context(|| format!("cannot read {} at byte {offset}", self.0.label()))
    }
}

impl ReadPiece for Arc<[u8]> {
    fn read_piece(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let from = usize::try_from(offset).map_err(|_| changed("the buffer", "is shorter"))?;
        let bytes = self.get(from..from + buf.len());
        buf.copy_from_slice(bytes.ok_or_else(|| changed("the buffer", "is shorter"))?);
        Ok(())
    }
}

impl ReadPiece for ImageReader {
    fn read_piece(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read_at(buf, offset)
    }
}

impl Source {
    /// Opens the source; a folder or something else without bytes is refused.
    pub(crate) fn open(&self) -> Result<OpenSource> {
        match self {
            Source::File(path) => open_file(path),
            Source::Stdin => Ok(OpenSource {
                label: "standard input".to_owned(),
                body: Body::Stream(Box::new(io::stdin())),
            }),
            Source::Bytes(bytes) => Ok(OpenSource {
                label: "a buffer".to_owned(),
                body: Body::Seekable {
                    bytes: bytes.len() as u64,
                    reader: Arc::new(Arc::clone(bytes)),
                    file: None,
                },
            }),
            Source::Image(image) => Ok(OpenSource {
                label: "an image".to_owned(),
                body: Body::Seekable {
                    bytes: image.size_bytes(),
                    reader: Arc::new(image.clone()),
                    file: None,
                },
            }),
            Source::Staged(_) => {
                Err(Error::new(ErrorKind::InvalidInput, "a staged image is captured already"))
            }
            Source::Layer { layer, .. } | Source::Over { layer, .. } => {
                Ok(OpenSource { label: layer.label(), body: Body::Layer(Arc::clone(layer)) })
            }
        }
    }
}

impl OpenSource {
    /// Whether this is a regular file: nothing else has holes.
    pub(crate) fn is_regular_file(&self) -> bool {
        matches!(self.body, Body::Seekable { file: Some(_), .. })
    }

    /// The length, if it is known before the end was reached.
    pub(crate) fn bytes(&self) -> Option<u64> {
        match &self.body {
            Body::Seekable { bytes, .. } => Some(*bytes),
            Body::Layer(layer) => Some(layer.size_bytes()),
            Body::Stream(_) | Body::Written(_) => None,
        }
    }
}

impl Unchanged {
    /// The file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Fails if the file grew, shrank or was written to since.
    pub(crate) fn check(self) -> Result<()> {
        let Unchanged { label, file, bytes, modified } = self;
        let now = file_size(&file).context(|| format!("cannot look at {label}"))?.bytes;
        if now != Some(bytes) {
            let how = format!("went from {bytes} to {} bytes", now.unwrap_or(0));
            return Err(changed(&label, &how));
        }
        if modification_time(&file) != modified {
            return Err(changed(&label, "was written to"));
        }
        Ok(())
    }
}

fn modification_time(file: &File) -> Option<SystemTime> {
    file.metadata().ok().and_then(|metadata| metadata.modified().ok())
}

fn open_file(path: &Path) -> Result<OpenSource> {
    let label = path.display().to_string();
    let file = match File::open(path) {
        Ok(file) => file,
        // The kernel says "no such device" to those who open one.
        Err(_) if path.metadata().is_ok_and(|metadata| metadata.file_type().is_socket()) => {
            return Err(no_bytes(&label, FileKind::Socket));
        }
        Err(error) => return Err(Error::io(format!("cannot open {label}"), error)),
    };
    let size = file_size(&file).context(|| format!("cannot look at {label}"))?;
    let body = match (size.kind, size.bytes) {
        // Files of procfs and sysfs say that they are empty and are not: read them to their end.
        (FileKind::Regular, Some(0)) => Body::Stream(Box::new(file)),
        (FileKind::Regular | FileKind::BlockDevice, Some(bytes)) => {
            let modified = modification_time(&file);
            let file = Arc::new(file);
            let reader = Arc::new(FilePiece { file: Arc::clone(&file), label: label.clone() });
            let unchanged = Unchanged { label: label.clone(), file, bytes, modified };
            let file = (size.kind == FileKind::Regular).then_some(unchanged);
            Body::Seekable { bytes, reader, file }
        }
        (FileKind::Fifo | FileKind::Socket | FileKind::CharacterDevice, _) => {
            Body::Stream(Box::new(file))
        }
        (kind, _) => return Err(no_bytes(&label, kind)),
    };
    Ok(OpenSource { label, body })
}

fn no_bytes(label: &str, kind: FileKind) -> Error {
    let why = format!("{label} is {}; expected a file, a block device or a pipe", kind.describe());
    Error::new(ErrorKind::InvalidInput, why)
}

fn changed(label: &str, how: &str) -> Error {
    Error::new(
        ErrorKind::Refused,
        format!("{label} {how} while it was read; pause the guest before committing"),
    )
}
