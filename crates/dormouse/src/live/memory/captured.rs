//! What a guest changed, sealed, as a commit reads it.

use std::io;
use std::iter::Peekable;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::Result;
use dormouse_live::pages::{PAGE_BYTES, PageChanges};
use dormouse_serve::uffd::{Capture, Vm};
use dormouse_store::reader::ImageReader;
use dormouse_store::source::{LayerRun, LayerSource};

/// Pages that differ from the image they were served from.
#[derive(Debug)]
pub(crate) struct CapturedMemory {
    base: Arc<ImageReader>,
    changes: PageChanges,
    is_live: bool,
    freeze: Duration,
    /// Taken away when the commit is done with it, whoever may still know the source.
    capture: RwLock<Option<Capture>>,
}

impl CapturedMemory {
    /// Seals what a guest changed since `base`. It must be paused.
    pub(super) fn seal(vm: &Arc<Vm>, base: Arc<ImageReader>) -> Result<CapturedMemory> {
        let begun = Instant::now();
        let capture = vm.seal()?;
        Ok(CapturedMemory {
            base,
            changes: capture.changes().clone(),
            is_live: capture.is_live(),
            freeze: begun.elapsed(),
            capture: RwLock::new(Some(capture)),
        })
    }

    /// What it lies over.
    pub(crate) fn base(&self) -> &ImageReader {
        &self.base
    }

    /// Whether the guest might have gone on as soon as it was sealed.
    pub(crate) fn is_live(&self) -> bool {
        self.is_live
    }

    /// How long sealing took.
    pub(crate) fn freeze(&self) -> Duration {
        self.freeze
    }

    pub(super) fn take(&self) -> Option<Capture> {
        self.capture.write().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl LayerSource for CapturedMemory {
    fn size_bytes(&self) -> u64 {
        self.base.size_bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let capture = self.capture.read().unwrap_or_else(PoisonError::into_inner);
        let capture = capture.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        capture.read(offset / PAGE_BYTES, buf).map_err(io::Error::other)
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()> {
        for_each_change(&self.changes, visit)
    }
}

/// Tells changed pages as runs of bytes, ascending.
pub(super) fn for_each_change(
    changes: &PageChanges,
    visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
) -> io::Result<()> {
    let mut dirty = Runs(changes.dirty.iter()).peekable();
    let mut zero = Runs(changes.zero.iter()).peekable();
    while let Some((run, kind)) = next_of(&mut dirty, &mut zero) {
        visit(run.start * PAGE_BYTES..run.end * PAGE_BYTES, kind)?;
    }
    Ok(())
}

fn next_of(
    dirty: &mut Peekable<impl Iterator<Item = Range<u64>>>,
    zero: &mut Peekable<impl Iterator<Item = Range<u64>>>,
) -> Option<(Range<u64>, LayerRun)> {
    let data_first = match (dirty.peek(), zero.peek()) {
        (Some(dirty), Some(zero)) => dirty.start < zero.start,
        (dirty, _) => dirty.is_some(),
    };
    if data_first {
        dirty.next().map(|run| (run, LayerRun::Data))
    } else {
        zero.next().map(|run| (run, LayerRun::Zero))
    }
}

/// Runs of pages that follow each other.
struct Runs<'a>(roaring::bitmap::Iter<'a>);

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let run = self.0.next_range()?;
        Some(u64::from(*run.start())..u64::from(*run.end()) + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_both_kinds_come_in_order() {
        let mut changes = PageChanges::default();
        changes.dirty.extend([0, 1, 2, 9, 70_000]);
        changes.zero.extend([3, 4, 8, 65_535, 65_536]);
        let mut dirty = Runs(changes.dirty.iter()).peekable();
        let mut zero = Runs(changes.zero.iter()).peekable();
        let runs: Vec<_> = std::iter::from_fn(|| next_of(&mut dirty, &mut zero)).collect();
        use LayerRun::{Data, Zero};
        let mut joined: Vec<(Range<u64>, LayerRun)> = Vec::new();
        for (run, kind) in runs {
            match joined.last_mut() {
                // Bitmaps are cut into containers, and so are their runs.
                Some((last, of)) if *of == kind && last.end == run.start => last.end = run.end,
                _ => joined.push((run, kind)),
            }
        }
        let expected = [
            (0..3, Data),
            (3..5, Zero),
            (8..9, Zero),
            (9..10, Data),
            (65_535..65_537, Zero),
            (70_000..70_001, Data),
        ];
        assert_eq!(joined, expected);
    }
}
