//! Maps and data files for an export: the pages that a generation adds, one behind the other in the
//! order of the device, as wrenn and E2B pack them.

use std::io::Write;
use std::ops::Range;

use dormouse_image::map::Source;
use dormouse_store::progress::Job;
use dormouse_store::reader::ImageReader;
use uuid::Uuid;

use crate::error::{Context, Error, Result};
use crate::page_map::{PAGE_BYTES, PageMap, PageMapBuilder, Place, Run};

/// Bytes copied at once.
const COPY_BYTES: usize = 1 << 20;

/// The map of an image as one build's, with all pages that are not zero.
pub(crate) fn full(image: &ImageReader, build: Uuid) -> Result<PageMap> {
    let mut packer = Packer::new(image, build)?;
    packer.changed(0..image.size_bytes())?;
    packer.builder.finish()
}

/// The map of an image over that of an earlier one: what differs is the new build's, the rest stays.
pub(crate) fn over(
    image: &ImageReader,
    before: &ImageReader,
    before_map: &PageMap,
    build: Uuid,
) -> Result<PageMap> {
    let mut packer = Packer::new(image, build)?;
    let mut changes = Vec::new();
    image.for_each_change(before, &mut |range| {
        changes.push(range);
        Ok(())
    })?;
    for range in changes {
        packer.unchanged(before_map, range.start / PAGE_BYTES)?;
        packer.changed(range)?;
    }
    let pages = packer.builder.pages();
    packer.unchanged(before_map, pages)?;
    packer.builder.finish()
}

struct Packer<'a> {
    image: &'a ImageReader,
    build: Uuid,
    builder: PageMapBuilder,
    packed: u32,
}

impl Packer<'_> {
    fn new(image: &ImageReader, build: Uuid) -> Result<Packer<'_>> {
        let builder = PageMapBuilder::new(image.size_bytes())?;
        Ok(Packer { image, build, builder, packed: 0 })
    }

    /// Takes pages of the new build, but for the zeros among them.
    fn changed(&mut self, range: Range<u64>) -> Result<()> {
        let mut runs: Vec<(u64, bool)> = Vec::new();
        self.image.for_each_extent(range, &mut |extent| {
            let pages = (extent.range.end - extent.range.start).div_ceil(PAGE_BYTES);
            runs.push((pages, extent.source == Source::Zero));
            Ok(())
        })?;
        for (pages, zero) in runs {
            if zero {
                self.builder.push_pages(pages, None)?;
                continue;
            }
            let build = self.builder.build_number(self.build)?;
            self.builder.push_pages(pages, Some(Place { build, page: self.packed }))?;
            self.packed = u32::try_from(pages)
                .ok()
                .and_then(|pages| self.packed.checked_add(pages))
                .ok_or_else(|| Error::corrupt("more than 16 TiB of data"))?;
        }
        Ok(())
    }

    /// Takes the pages up to `end` as they were; behind the end of the earlier device are zeros.
    fn unchanged(&mut self, before: &PageMap, end: u64) -> Result<()> {
        let at = self.builder.end();
        for run in before.runs_from(at) {
            if run.start >= end {
                break;
            }
            let pages = run.pages.min(end - run.start);
            let place = match run.place {
                None => None,
                Some(place) => {
                    let id = before.builds().get(place.build as usize).copied().unwrap_or_default();
                    Some(Place { build: self.builder.build_number(id)?, page: place.page })
                }
            };
            self.builder.push_pages(pages, place)?;
        }
        let rest = end.saturating_sub(self.builder.end());
        self.builder.push_pages(rest, None)
    }
}

/// Writes the data file of `build`: the pages of its runs, in order. Returns its length.
pub(crate) fn write_data(
    image: &ImageReader,
    map: &PageMap,
    build: Uuid,
    sink: &mut dyn Write,
    job: Job<'_>,
) -> Result<u64> {
    let mut buf = vec![0; COPY_BYTES];
    let mut written = 0;
    for run in runs_of(map, build) {
        let (mut at, end) = (run.start * PAGE_BYTES, (run.start + run.pages) * PAGE_BYTES);
        while at < end {
            job.check()?;
            let len = usize::try_from(end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            let there = image.size_bytes().saturating_sub(at).min(len as u64);
            let there = usize::try_from(there).unwrap_or(len);
            buf[there..len].fill(0);
            image.read_at(&mut buf[..there], at)?;
            sink.write_all(&buf[..len]).context(|| "cannot write a data file".to_owned())?;
            at += len as u64;
            written += len as u64;
            job.progress.advance(len as u64);
        }
    }
    Ok(written)
}

/// The runs of one build, in the order of the device.
pub(crate) fn runs_of(map: &PageMap, build: Uuid) -> impl Iterator<Item = Run> + '_ {
    let number = map.builds().iter().position(|&id| id == build);
    map.runs().filter(move |run| {
        run.place.is_some_and(|place| number == usize::try_from(place.build).ok())
    })
}
