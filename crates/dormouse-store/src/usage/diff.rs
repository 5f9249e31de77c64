//! What differs between two snapshots, by content: what lies elsewhere now is not changed.

use std::collections::BTreeSet;
use std::sync::Arc;

use dormouse_image::block::BLOCK_BYTES_U64;
use dormouse_image::digest::Digest;
use dormouse_image::error::{Error as ImageError, Result as ImageResult};
use dormouse_image::map::{LEAF_BYTES, Leaf, LeafDiff, Map, Source};
use dormouse_image::pack::{PackId, SEGMENT_SLOTS};

use super::ImageDiff;
use crate::error::{Context, Result};
use crate::manifest::ImageEntry;
use crate::packs::{LoadedSegment, Packs};
use crate::progress::Job;
use crate::store::{Snapshot, Store};

/// What differs, image by image; see [`Store::diff`].
pub(crate) fn diff(
    store: &Store,
    old: &Snapshot,
    new: &Snapshot,
    job: Job<'_>,
) -> Result<Vec<ImageDiff>> {
    job.progress.begin("diff", None);
    let (old, new) = (old.manifest(), new.manifest());
    let images: BTreeSet<_> =
        old.images.iter().chain(&new.images).map(|entry| &entry.image).collect();
    let mut diffs = Vec::new();
    for image in images {
        let sides = [old.image(image), new.image(image)];
        let maps = [map_of(sides[0])?, map_of(sides[1])?];
        let sizes = sides.map(|side| side.map(|entry| entry.size_bytes));
        let mut compare = Compare {
            packs: store.packs(),
            segments: [None, None],
            end: sizes.iter().flatten().copied().max().unwrap_or(0),
            diff: ImageDiff {
                image: image.clone(),
                old_size_bytes: sizes[0],
                new_size_bytes: sizes[1],
                changed_bytes: 0,
                now_zero_bytes: 0,
                was_zero_bytes: 0,
                regions: Vec::new(),
            },
        };
        let mut stopped = None;
        let zero = Arc::new(Leaf::zero());
        let walked = maps[0].diff(&**store.packs(), &maps[1], &mut |leaf| {
            if let Err(error) = job.check() {
                stopped = Some(error);
                return Err(ImageError::missing("diff", "a wish to stop", "patience"));
            }
            let old = leaf.old.as_ref().unwrap_or(&zero);
            let new = leaf.new.as_ref().unwrap_or(&zero);
            old.diff(new).try_for_each(|run| compare.run(leaf.leaf * LEAF_BYTES, &run))
        });
        if let Some(error) = stopped {
            return Err(error);
        }
        walked.context(|| {
            format!("cannot compare {image} of {} and {}", old.display_name(), new.display_name())
        })?;
        diffs.push(compare.diff);
    }
    Ok(diffs)
}

fn map_of(side: Option<&ImageEntry>) -> Result<Map> {
    side.map_or(Ok(Map::zero(0)), ImageEntry::map)
}

struct Compare<'a> {
    packs: &'a Packs,
    /// The segment that was last looked at, on either side.
    segments: [Option<(PackId, u32, Arc<LoadedSegment>)>; 2],
    end: u64,
    diff: ImageDiff,
}

impl Compare<'_> {
    /// Takes in a run in which the two sides name different sources.
    fn run(&mut self, leaf_at: u64, run: &LeafDiff) -> ImageResult<()> {
        let at = leaf_at + u64::from(run.start) * BLOCK_BYTES_U64;
        let (Source::Stored { .. }, Source::Stored { .. }) = (run.old, run.new) else {
            let changed = self.add(at, u64::from(run.len));
            if run.new == Source::Zero {
                self.diff.now_zero_bytes += changed;
            } else {
                self.diff.was_zero_bytes += changed;
            }
            return Ok(());
        };
        for block in 0..run.len {
            if self.digest(0, run.old.advance(block))? != self.digest(1, run.new.advance(block))? {
                self.add(at + u64::from(block) * BLOCK_BYTES_U64, 1);
            }
        }
        Ok(())
    }

    /// Adds changed blocks, cut to the image's end, and returns their bytes.
    fn add(&mut self, at: u64, blocks: u64) -> u64 {
        let length = (blocks * BLOCK_BYTES_U64).min(self.end.saturating_sub(at));
        if length == 0 {
            return 0;
        }
        self.diff.changed_bytes += length;
        match self.diff.regions.last_mut() {
            Some(last) if last.0 + last.1 == at => last.1 += length,
            _ => self.diff.regions.push((at, length)),
        }
        length
    }

    fn digest(&mut self, side: usize, source: Source) -> ImageResult<Option<Digest>> {
        let Source::Stored { pack, slot } = source else { return Ok(None) };
        let number = slot / SEGMENT_SLOTS;
        let known = self.segments[side].take().filter(|known| (known.0, known.1) == (pack, number));
        let segment = match known {
            Some((_, _, segment)) => segment,
            None => self.packs.segment(pack, number)?,
        };
        let digest = segment
            .segment
            .digest(slot % SEGMENT_SLOTS)
            .ok_or_else(|| ImageError::corrupt("slot", slot, "one that the pack has"))?;
        self.segments[side] = Some((pack, number, segment));
        Ok(Some(digest))
    }
}
