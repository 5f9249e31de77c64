//! The layers of an overlay over its base, as they are at one moment; reading goes through here.
//!
//! A stack never changes. Whoever holds one reads the same layers to the end, whatever is put in
//! its place meanwhile: a sealed layer is not written to, and files outlive their names.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use dormouse_image::block::{BLOCK_BYTES_U64, blocks_in};

use crate::base::{Base, RunKind};
use crate::error::{Error, ErrorKind, Result};
use crate::failures::Failures;
use crate::layer::Layer;
use crate::states::BlockState;

/// Layers, newest first, and the base below them.
#[derive(Clone, Debug)]
pub(crate) struct Stack {
    pub(crate) layers: Vec<Arc<Layer>>,
    pub(crate) base: Arc<dyn Base>,
    pub(crate) size_bytes: u64,
}

/// Where a run of blocks is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The layer with this index, in which the blocks are dirty.
    Layer(usize),

    /// Nowhere: a layer says that they are zero.
    Zero,

    /// The base, or zeros past its end.
    Base,
}

/// A run of a disk, as a client may want to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskRun {
    /// Written since the base.
    Dirty,

    /// Zero since the base.
    Zero,

    /// As in the base.
    Base(RunKind),
}

/// Where a run of a disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunSource {
    /// In the overlay.
    Overlay,

    /// Nowhere: it is zero.
    Zero,

    /// In the base, which calls the place so.
    Base(u64),
}

impl Stack {
    /// Where `block` is read from, and the end of the run of blocks read from there.
    fn origin(&self, block: u64, end: u64) -> (Origin, u64) {
        let mut end = end;
        for (index, layer) in self.layers.iter().enumerate() {
            let (state, stop) = layer.states.run(block, end);
            end = stop;
            match state {
                BlockState::Untouched => {}
                BlockState::Dirty => return (Origin::Layer(index), end),
                BlockState::Zero => return (Origin::Zero, end),
            }
        }
        (Origin::Base, end)
    }

    /// Calls `visit` with the longest runs of blocks of one origin, in order.
    pub(crate) fn for_each_origin(
        &self,
        blocks: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, Origin) -> Result<()>,
    ) -> Result<()> {
        let mut start = blocks.start;
        if start >= blocks.end {
            return Ok(());
        }
        let (mut origin, mut at) = self.origin(start, blocks.end);
        // An upper layer's borders cut the runs of what lies below it; they are joined again.
        while at < blocks.end {
            let (next, end) = self.origin(at, blocks.end);
            if next != origin {
                visit(start..at, origin)?;
                (start, origin) = (at, next);
            }
            at = end;
        }
        visit(start..at, origin)
    }

    /// Fills `buf` from `offset`, which the caller has checked to lie on the disk.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64, failures: &Failures) -> Result<()> {
        let range = offset..offset + buf.len() as u64;
        let blocks = range.start / BLOCK_BYTES_U64..blocks_in(range.end);
        let mut rest = buf;
        self.for_each_origin(blocks, &mut |run, origin| {
            let start = (run.start * BLOCK_BYTES_U64).max(range.start);
            let end = (run.end * BLOCK_BYTES_U64).min(range.end);
            let len = usize::try_from(end - start).unwrap_or(usize::MAX);
            let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            match origin {
                Origin::Zero => part.fill(0),
                Origin::Base => self.read_base(part, start)?,
                Origin::Layer(index) => {
                    read_layer(&self.layers[index], part, start, failures)?;
                }
            }
            Ok(())
        })?;
        failures.was_read(&range);
        Ok(())
    }

    fn read_base(&self, part: &mut [u8], offset: u64) -> Result<()> {
        let there = self.base.size_bytes().saturating_sub(offset).min(part.len() as u64);
        let (from_base, past) = part.split_at_mut(usize::try_from(there).unwrap_or(0));
        if !from_base.is_empty() {
            self.base.read_at(from_base, offset)?;
        }
        past.fill(0);
        Ok(())
    }

    /// Calls `visit` with the parts of `range` that are read from the base, which does not end
    /// before them; breaks off where it says so.
    pub(crate) fn for_each_base_range(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let range = range.start..range.end.min(self.base.size_bytes());
        let blocks = range.start / BLOCK_BYTES_U64..blocks_in(range.end);
        self.for_each_origin(blocks, &mut |run, origin| {
            let start = (run.start * BLOCK_BYTES_U64).max(range.start);
            let end = (run.end * BLOCK_BYTES_U64).min(range.end);
            if origin == Origin::Base && start < end { visit(start..end) } else { Ok(()) }
        })
    }

    /// Calls `visit` with the runs of `range`, cut to it, and where they are stored.
    pub(crate) fn for_each_source(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, RunSource) -> Result<()>,
    ) -> Result<()> {
        self.for_each_run(range, &mut |run, kind| match kind {
            DiskRun::Dirty => visit(run, RunSource::Overlay),
            DiskRun::Zero | DiskRun::Base(RunKind::Zero) => visit(run, RunSource::Zero),
            DiskRun::Base(RunKind::Data) => {
                self.base.for_each_source(run, &mut |part, id| visit(part, RunSource::Base(id)))
            }
        })
    }

    /// Calls `visit` with the runs of `range`, cut to it; neighbours may be alike.
    pub(crate) fn for_each_run(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, DiskRun) -> Result<()>,
    ) -> Result<()> {
        let blocks = range.start / BLOCK_BYTES_U64..blocks_in(range.end);
        self.for_each_origin(blocks, &mut |run, origin| {
            let start = (run.start * BLOCK_BYTES_U64).max(range.start);
            let end = (run.end * BLOCK_BYTES_U64).min(range.end);
            match origin {
                Origin::Layer(_) => visit(start..end, DiskRun::Dirty),
                Origin::Zero => visit(start..end, DiskRun::Zero),
                Origin::Base => {
                    let border = self.base.size_bytes().clamp(start, end);
                    if start < border {
                        self.base.for_each_run(start..border, &mut |run, kind| {
                            visit(run, DiskRun::Base(kind))
                        })?;
                    }
                    if border < end {
                        visit(border..end, DiskRun::Base(RunKind::Zero))?;
                    }
                    Ok(())
                }
            }
        })
    }
}

fn read_layer(layer: &Layer, part: &mut [u8], offset: u64, failures: &Failures) -> Result<()> {
    layer.read(part, offset).map_err(|error| {
        let message = format!("cannot read byte {offset} in layer {}", layer.number);
        failures.add_read(offset..offset + part.len() as u64);
        if error.kind() == io::ErrorKind::UnexpectedEof {
            failures.poison(&format!("the data of layer {} was cut short", layer.number));
            return Error::with_source(ErrorKind::Corrupt, message, error);
        }
        Error::io(message, error)
    })
}
