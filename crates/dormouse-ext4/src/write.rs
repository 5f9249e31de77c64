//! Turns a tree and its layout into the blocks of an image.

pub(crate) mod blocks;
pub(crate) mod buffer;
pub(crate) mod content_file;
pub(crate) mod data;
pub(crate) mod extent;
pub(crate) mod folder;
pub(crate) mod group;
pub(crate) mod inode;
pub(crate) mod lazy;
pub(crate) mod metadata;
pub(crate) mod table;
pub(crate) mod xattr;

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::disk::BLOCK;
use crate::error::{Context, Error, Result};
use crate::layout::Layout;
use crate::tree::{ROOT, Tree};
use crate::write::metadata::{Metadata, metadata};

pub use lazy::{LazyImage, Run};

/// Is told what is done, and says whether to go on.
pub trait Watch: Sync {
    /// So many more files were taken up.
    fn entries(&self, count: u64) {
        let _ = count;
    }

    /// So many more bytes of contents were moved.
    fn bytes(&self, count: u64) {
        let _ = count;
    }

    /// Whether to stop with [`crate::error::ErrorKind::Cancelled`].
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Nobody watches.
#[derive(Clone, Copy, Debug)]
pub struct Unwatched;

impl Watch for Unwatched {}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The image's length.
    pub size_bytes: u64,

    /// Inodes of the tree.
    pub entries: u64,

    /// Bytes of contents that were read and written.
    pub copied_bytes: u64,

    /// Bytes of contents that the file system shares with their source.
    pub shared_bytes: u64,

    /// Bytes of everything else.
    pub metadata_bytes: u64,

    /// What the image is known by.
    pub uuid: [u8; 16],
}

/// Writes a whole image into an empty file; contents that were staged are in it already.
///
/// The file is not synced. After an error it holds nothing of use.
pub fn write(tree: &Tree, layout: &Layout, image: &File, watch: &dyn Watch) -> Result<Report> {
    image.set_len(layout.size_bytes()).context(|| "cannot give the image its length".to_owned())?;
    let (report, copied) = std::thread::scope(|scope| {
        let copying = scope.spawn(|| data::copy(tree, layout, image, watch));
        let report = metadata_into(tree, layout, image, watch);
        let copied = copying.join().unwrap_or_else(|_| {
            Err(Error::new(crate::error::ErrorKind::Io, "the thread that copies contents panicked"))
        });
        (report, copied)
    });
    let (mut report, copied) = (report?, copied?);
    report.copied_bytes = copied.read_bytes;
    report.shared_bytes = copied.shared_bytes;
    Ok(report)
}

/// Writes everything but the contents of files into the image's file.
fn metadata_into(tree: &Tree, layout: &Layout, image: &File, watch: &dyn Watch) -> Result<Report> {
    let Metadata { report, superblocks } = metadata(tree, layout, &mut &*image, watch)?;
    for (block, bytes) in superblocks {
        let written = image.write_all_at(&bytes[..], block * BLOCK);
        written.context(|| format!("cannot write the image's block {block}"))?;
    }
    Ok(report)
}

const _: () = assert!(ROOT.0 == 0, "the order of inodes begins with the root");
