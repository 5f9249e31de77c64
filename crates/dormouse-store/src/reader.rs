//! Reads an image of a snapshot: lazily, checked, through one cache of decoded frames.

mod ahead;
mod export;
mod folder;
mod pieces;

use std::fmt;
use std::io::Write;
use std::ops::Range;
use std::sync::Arc;

use dormouse_image::block::{BLOCK_BYTES, BLOCK_BYTES_U64, blocks_in};
use dormouse_image::map::{LEAF_BLOCKS, LEAF_BYTES, Leaf, Map, Source};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::manifest::RootRef;
use crate::packs::Packs;
use crate::pin::Pin;
use crate::progress::Job;

pub(crate) use ahead::Others;
pub use ahead::ReadAhead;
pub use export::{EXPORT_MODE, ExportReport, ExportTarget};
pub use folder::{NewFolder, private_folder};
pub use pieces::{Effort, Piece, PieceContent};

/// Bytes read at once when an image is streamed.
const STREAM_BYTES: usize = 1 << 20;

/// An image of a snapshot, open for reading. Cheap to clone; all clones and all images of a store
/// share one cache, and each keeps its snapshot pinned.
#[derive(Clone)]
pub struct ImageReader {
    packs: Arc<Packs>,
    pin: Option<Arc<Pin>>,
    label: Arc<str>,
    map: Map,
    size_bytes: u64,
    threads: usize,
}

impl fmt::Debug for ImageReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageReader")
            .field("label", &self.label)
            .field("size_bytes", &self.size_bytes)
            .finish_non_exhaustive()
    }
}

/// A run of an image's bytes with one source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageExtent {
    /// The bytes, cut to the image's length.
    pub range: Range<u64>,

    /// Where they come from.
    pub source: Source,
}

impl ImageReader {
    pub(crate) fn new(
        packs: Arc<Packs>,
        pin: Option<Arc<Pin>>,
        label: String,
        map: Map,
        size_bytes: u64,
        threads: usize,
    ) -> ImageReader {
        ImageReader { packs, pin, label: label.into(), map, size_bytes, threads }
    }

    /// The image's length in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The image's map.
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// The root of the image's map, for [`Store::held_image`](crate::store::Store::held_image).
    pub fn root(&self) -> Option<RootRef> {
        self.map.root.map(|root| RootRef { pack: root.pack.to_string(), node: root.node })
    }

    /// Whether a collection is kept from taking the image's blocks. False only where the store
    /// may not be written to.
    pub fn is_pinned(&self) -> bool {
        self.pin.is_some()
    }

    /// Fills `buf` from `offset`; reading past the end is an error, as is a block that cannot be
    /// read or does not match its digest. Then nothing in `buf` may be used.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|&end| end <= self.size_bytes);
        let Some(end) = end else {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{} bytes at {offset} are not all inside {}, which has {}",
                    buf.len(),
                    self.label,
                    self.size_bytes
                ),
            ));
        };
        let mut rest = buf;
        let mut at = offset;
        while at < end {
            let leaf_number = at / LEAF_BYTES;
            let leaf_end = end.min((leaf_number + 1) * LEAF_BYTES);
            let len = usize::try_from(leaf_end - at).unwrap_or(rest.len());
            let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
            let leaf = self.leaf(leaf_number)?;
            match &leaf {
                None => part.fill(0),
                Some(leaf) => self.read_in_leaf(leaf, part, at - leaf_number * LEAF_BYTES, at)?,
            }
            rest = after;
            at = leaf_end;
        }
        Ok(())
    }

    /// The whole extent that holds the byte at `offset`, cut to its leaf and the image's length.
    pub fn extent_at(&self, offset: u64) -> Result<ImageExtent> {
        if offset >= self.size_bytes {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("byte {offset} is not in {}, which has {}", self.label, self.size_bytes),
            ));
        }
        let number = offset / LEAF_BYTES;
        let base = number * LEAF_BYTES;
        let (start, end, source) = match self.leaf(number)? {
            None => (0, LEAF_BLOCKS, Source::Zero),
            Some(leaf) => {
                let extent = leaf.lookup(block_in_leaf(offset - base));
                (extent.start, extent.end(), extent.source)
            }
        };
        let start = base + u64::from(start) * BLOCK_BYTES_U64;
        let end = base + u64::from(end) * BLOCK_BYTES_U64;
        Ok(ImageExtent { range: start..end.min(self.size_bytes), source })
    }

    /// Calls `visit` with the extents of `range` in order. Extents end at the borders of leaves.
    pub fn for_each_extent(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(ImageExtent) -> Result<()>,
    ) -> Result<()> {
        let end = range.end.min(self.size_bytes);
        let mut at = range.start;
        while at < end {
            let number = at / LEAF_BYTES;
            let base = number * LEAF_BYTES;
            let leaf_end = end.min(base + LEAF_BYTES);
            match self.leaf(number)? {
                None => visit(ImageExtent { range: at..leaf_end, source: Source::Zero })?,
                Some(leaf) => {
                    let blocks = block_in_leaf(at - base)..block_in_leaf_up(leaf_end - base);
                    for extent in leaf.iter_range(blocks) {
                        let start = base + u64::from(extent.start) * BLOCK_BYTES_U64;
                        let stop = base + u64::from(extent.end()) * BLOCK_BYTES_U64;
                        visit(ImageExtent {
                            range: start.max(at)..stop.min(leaf_end),
                            source: extent.source,
                        })?;
                    }
                }
            }
            at = leaf_end;
        }
        Ok(())
    }

    /// Writes the whole image to `sink`, zeros included, and returns its length.
    pub fn write_to(&self, sink: &mut dyn Write, job: Job<'_>) -> Result<u64> {
        job.progress.begin("read", Some(self.size_bytes));
        let mut buf = vec![0; STREAM_BYTES];
        let mut at = 0;
        while at < self.size_bytes {
            job.check()?;
            let len =
                usize::try_from(self.size_bytes - at).unwrap_or(STREAM_BYTES).min(STREAM_BYTES);
            self.read_at(&mut buf[..len], at)?;
            sink.write_all(&buf[..len]).context(|| format!("cannot pass on {}", self.label))?;
            at += len as u64;
            job.progress.advance(len as u64);
        }
        Ok(at)
    }

    pub(crate) fn leaf(&self, number: u64) -> Result<Option<Arc<Leaf>>> {
        self.map
            .leaf(&*self.packs, number)
            .context(|| format!("cannot read the map of {}", self.label))
    }

    /// Fills `part` from byte `within` of a leaf; `at` is where that is in the image.
    fn read_in_leaf(&self, leaf: &Leaf, part: &mut [u8], within: u64, at: u64) -> Result<()> {
        let end = within + part.len() as u64;
        let mut done = 0;
        for extent in leaf.iter_range(block_in_leaf(within)..block_in_leaf_up(end)) {
            let mut from = (u64::from(extent.start) * BLOCK_BYTES_U64).max(within);
            let to = (u64::from(extent.end()) * BLOCK_BYTES_U64).min(end);
            let len = usize::try_from(to - from).unwrap_or(0);
            let (run, _) = part[done..].split_at_mut(len);
            done += len;
            match extent.source {
                Source::Zero => run.fill(0),
                Source::Stored { pack, slot } => {
                    let mut rest = run;
                    while !rest.is_empty() {
                        let block = block_in_leaf(from);
                        let first = slot + (block - extent.start);
                        let skip = usize::try_from(from % BLOCK_BYTES_U64).unwrap_or(0);
                        let wanted = (skip + rest.len()).div_ceil(BLOCK_BYTES);
                        let copied = self.packs.with_blocks(pack, first, wanted, |blocks| {
                            let source = &blocks[skip..];
                            let len = source.len().min(rest.len());
                            rest[..len].copy_from_slice(&source[..len]);
                            len
                        });
                        let len = copied.context(|| {
                            format!(
                                "cannot read {} at byte {} (pack {pack}, slot {first})",
                                self.label,
                                at + (from - within)
                            )
                        })?;
                        let (_, tail) = std::mem::take(&mut rest).split_at_mut(len);
                        rest = tail;
                        from += len as u64;
                    }
                }
            }
        }
        Ok(())
    }

    /// How many leaves have to be gone through.
    fn leaves(&self) -> u64 {
        blocks_in(self.size_bytes).div_ceil(u64::from(LEAF_BLOCKS))
    }
}

/// The block that holds a byte of a leaf.
fn block_in_leaf(within: u64) -> u32 {
    u32::try_from(within / BLOCK_BYTES_U64).expect("a byte of a leaf")
}

/// The block behind the last byte before `within`.
fn block_in_leaf_up(within: u64) -> u32 {
    u32::try_from(within.div_ceil(BLOCK_BYTES_U64)).expect("a byte of a leaf")
}
