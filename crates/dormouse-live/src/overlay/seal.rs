//! Sealing: the layers as they are at one moment, for a commit, while the guest writes on.
//!
//! ```text
//!  before        sealed            committed        or failed, and sealed again
//!   ┌─────┐      ┌─────┐ new top    ┌─────┐          ┌─────┐ new top
//!   │  1  │      │  2  │            │  2  │          │  3  │
//!   ├─────┤      ├─────┤ sealed     ├─────┤          ├─────┤ sealed
//!   │base │      │  1  │            │base'│          │  2  │
//!   └─────┘      ├─────┤            └─────┘          ├─────┤ sealed
//!                │base │                             │  1  │
//!                └─────┘                             └─────┘ …
//! ```
//!
//! The new, empty layer is durable and described before it is put on top. A crash at any moment
//! leaves a description of layers with the same content: with the empty layer or without it, with
//! the sealed layers or with the base that has taken them in.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dormouse_image::block::{BLOCK_BYTES_U64, blocks_in};

use super::{Administration, Overlay, check_base, publish, remove_layers};
use crate::base::Base;
use crate::description::{Description, LAYERS_MAX};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::failures::Failures;
use crate::layer::Layer;
use crate::stack::{Origin, Stack};
use crate::states::BlockState;
use crate::sync::{AtomicBool, MutexGuard};

/// Bytes that are copied at once where layers are folded.
const FOLD_BYTES: usize = 1 << 20;

/// The content of an overlay at the moment of a seal, for one commit.
///
/// Dropping it says that the commit failed: its layers stay where they are, and the next seal
/// has them, too. [`Overlay::rebase`] says that it succeeded.
#[derive(Debug)]
pub struct Sealed {
    /// The sealed layers, over the base.
    stack: Stack,
    failures: Arc<Failures>,
    freeze: Duration,
    is_committing: Committing,
}

/// Lets the next seal come when it is dropped.
#[derive(Debug)]
struct Committing(Arc<AtomicBool>);

impl Drop for Committing {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// What the sealed layers have of a run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealedRun {
    /// Bytes, to be read with [`Sealed::read_at`].
    Dirty,

    /// Zeros.
    Zero,
}

impl Sealed {
    /// Bytes of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.stack.size_bytes
    }

    /// How long the overlay was frozen: the time it took to put the new top in place.
    pub fn freeze(&self) -> Duration {
        self.freeze
    }

    /// Calls `visit` with the byte ranges that differ from the base, in order: the union of all
    /// sealed layers, the newest wins. Neighbours differ; what is in neither is as in the base.
    pub fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, SealedRun) -> Result<()>,
    ) -> Result<()> {
        let size = self.stack.size_bytes;
        let mut pending: Option<(Range<u64>, SealedRun)> = None;
        self.stack.for_each_origin(0..blocks_in(size), &mut |blocks, origin| {
            let run = match origin {
                Origin::Base => return Ok(()),
                Origin::Zero => SealedRun::Zero,
                Origin::Layer(_) => SealedRun::Dirty,
            };
            let start = blocks.start * BLOCK_BYTES_U64;
            let end = (blocks.end * BLOCK_BYTES_U64).min(size);
            match &mut pending {
                Some((range, same)) if *same == run && range.end == start => range.end = end,
                _ => {
                    if let Some((range, run)) = pending.replace((start..end, run)) {
                        visit(range, run)?;
                    }
                }
            }
            Ok(())
        })?;
        match pending {
            Some((range, run)) => visit(range, run),
            None => Ok(()),
        }
    }

    /// Fills `buf` from `offset` with the disk as it was sealed, the base included.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.stack.size_bytes) {
            let message = format!("{} bytes at {offset} are not all on the disk", buf.len());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        self.stack.read_at(buf, offset, &self.failures)
    }
}

/// An overlay whose new top is described, and not in place.
struct Prepared<'a> {
    overlay: &'a Overlay,

    /// Until the top is in place nobody else may change the layers.
    _administration: MutexGuard<'a, Administration>,
    old: Arc<Stack>,
    new: Arc<Stack>,
    is_committing: Committing,
}

impl Prepared<'_> {
    /// What is sealed, once the top is in place and nobody works on the old stack.
    fn sealed(self, freeze: Duration) -> Result<Sealed> {
        // A request that was under way may have failed since the first look.
        self.overlay.failures.check()?;
        let stack = Stack::clone(&self.old);
        let failures = Arc::clone(&self.overlay.failures);
        Ok(Sealed { stack, failures, freeze, is_committing: self.is_committing })
    }
}

impl Overlay {
    /// Seals the overlay for a commit. Writers go on, into a new layer.
    ///
    /// All that was written before this call is sealed, nothing that began after it returned is,
    /// and of what was written meanwhile nothing without what was written before it. Fails with
    /// `Busy` while there is another [`Sealed`], and while failures are not made good.
    pub fn seal(&self) -> Result<Sealed> {
        let prepared = self.prepare()?;
        let begin = Instant::now();
        self.stack.store(Arc::clone(&prepared.new));
        let freeze = begin.elapsed();
        self.drain_stripes();
        prepared.sealed(freeze)
    }

    /// Seals several overlays at one moment, as [`Overlay::seal`] does one: a write that began after
    /// another one ended, be it to another overlay, is not sealed without it.
    ///
    /// Writers of all of them wait while the tops are put in place, and that waits for the writes
    /// under way; [`Sealed::freeze`] is that time. If one cannot be sealed none is.
    pub fn seal_together(overlays: &[&Overlay]) -> Result<Vec<Sealed>> {
        if let [only] = overlays {
            return Ok(vec![only.seal()?]);
        }
        let mut prepared = Vec::new();
        let mut failed = None;
        for overlay in overlays {
            match overlay.prepare() {
                Ok(one) => prepared.push(one),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        let begin = Instant::now();
        // No writer has stripes of two overlays, and nobody else takes all of one.
        let stripes: Vec<_> = prepared.iter().map(|one| one.overlay.lock_all_stripes()).collect();
        for one in &prepared {
            // After a failure, too: the new tops are described already.
            one.overlay.stack.store(Arc::clone(&one.new));
        }
        drop(stripes);
        let freeze = begin.elapsed();
        match failed {
            Some(error) => Err(error),
            None => prepared.into_iter().map(|one| one.sealed(freeze)).collect(),
        }
    }

    /// Makes and describes a new top, which must then be put in place.
    fn prepare(&self) -> Result<Prepared<'_>> {
        if self.is_committing.swap(true, Ordering::AcqRel) {
            return Err(Error::new(ErrorKind::Busy, "another commit of the disk is under way"));
        }
        let is_committing = Committing(Arc::clone(&self.is_committing));
        self.failures.check()?;
        let mut administration = self.administration();
        let mut old = self.stack.load_full();
        for layer in &old.layers {
            layer.check_length().inspect_err(|error| self.failures.poison(&error.to_string()))?;
        }
        if old.layers.len() >= LAYERS_MAX {
            self.fold(&mut administration, &old)?;
            old = self.stack.load_full();
        }
        let top = self.add_layer(&mut administration)?;
        let mut layers = vec![Arc::new(top)];
        layers.extend(old.layers.iter().cloned());
        let new = Arc::new(Stack { layers, ..Stack::clone(&old) });
        Ok(Prepared { overlay: self, _administration: administration, old, new, is_committing })
    }

    /// Says that `sealed` is committed, and that `base` has its content: from now on the overlay
    /// lies over `base`, and the sealed layers are dropped.
    ///
    /// After an error the overlay is as if the commit had failed. Its description may name the
    /// new base all the same, if the folder could not be synced; both bases must then be kept
    /// until a later rebase succeeds or the overlay is opened again.
    pub fn rebase(&self, sealed: Sealed, base: Arc<dyn Base>, base_label: &str) -> Result<()> {
        check_base(&*base, self.size_bytes)?;
        let mut administration = self.administration();
        let old = self.stack.load_full();
        let is_ours = old.layers.len() == sealed.stack.layers.len() + 1
            && old.layers[1..].iter().zip(&sealed.stack.layers).all(|(a, b)| Arc::ptr_eq(a, b));
        if !is_ours {
            let message = "the sealed layers are not those of this disk";
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let description = Description {
            base_label: base_label.to_owned(),
            layers: vec![old.layers[0].number],
            ..administration.description.clone()
        };
        // No flush may find the layers half removed.
        let flushing = self.flushed();
        publish(&*self.folder, &description).map_err(super::Unpublished::into_error)?;
        administration.description = description;
        let layers = vec![Arc::clone(&old.layers[0])];
        self.stack.store(Arc::new(Stack { layers, base, size_bytes: self.size_bytes }));
        self.failures.forget_reads();
        remove_layers(&*self.folder, &old.layers[1..]);
        drop(flushing);
        drop(sealed.is_committing);
        Ok(())
    }

    /// Makes an empty layer and describes it as the top.
    fn add_layer(&self, administration: &mut Administration) -> Result<Layer> {
        let number = administration.description.next_layer;
        // Used up even if what follows fails: there may be files of this number from now on.
        administration.description.next_layer += 1;
        let mut layers = vec![number];
        layers.extend(&administration.description.layers);
        let description = Description { layers, ..administration.description.clone() };
        let layer = Layer::create(
            &*self.folder,
            number,
            self.size_bytes,
            self.config.log_bytes_min,
            &self.notes,
        )?;
        if let Err(unpublished) = publish(&*self.folder, &description) {
            // In doubt whoever opens the overlay after a power cut may need the files.
            if !unpublished.is_in_doubt {
                remove_layers(&*self.folder, &[Arc::new(layer)]);
            }
            return Err(unpublished.error);
        }
        administration.description = description;
        Ok(layer)
    }

    /// Folds the newest sealed layer into the next older one, which then has what both had.
    ///
    /// Every block that is written in the older layer is hidden by the newer one until that one is
    /// dropped, so that neither readers nor a crash see anything of it.
    fn fold(&self, administration: &mut Administration, stack: &Stack) -> Result<()> {
        let (newer, older) = (&stack.layers[1], &stack.layers[2]);
        let context = || format!("cannot fold layer {} into {}", newer.number, older.number);
        let mut buf = vec![0; FOLD_BYTES];
        let blocks = blocks_in(self.size_bytes);
        let mut at = 0;
        while at < blocks {
            let (state, end) = newer.states.run(at, blocks);
            let _room = self.room_for_notes(1)?;
            match state {
                BlockState::Untouched => {}
                BlockState::Zero => older.zero(at..end).context(context)?,
                BlockState::Dirty => {
                    let bytes = at * BLOCK_BYTES_U64..end * BLOCK_BYTES_U64;
                    let mut from = bytes.start;
                    while from < bytes.end {
                        let len = (bytes.end - from).min(FOLD_BYTES as u64);
                        let part = &mut buf[..usize::try_from(len).unwrap_or(FOLD_BYTES)];
                        newer.read(part, from).context(context)?;
                        older.write(part, from).context(context)?;
                        from += len;
                    }
                    older.mark(at..end, BlockState::Dirty).context(context)?;
                }
            }
            at = end;
        }
        let flushing = self.flushed();
        older.flush(&*self.folder, &self.failures)?;
        let mut description = administration.description.clone();
        description.layers.retain(|number| *number != newer.number);
        publish(&*self.folder, &description).map_err(super::Unpublished::into_error)?;
        administration.description = description;
        let mut layers = stack.layers.clone();
        layers.remove(1);
        self.stack.store(Arc::new(Stack { layers, ..stack.clone() }));
        remove_layers(&*self.folder, std::slice::from_ref(newer));
        drop(flushing);
        Ok(())
    }
}
