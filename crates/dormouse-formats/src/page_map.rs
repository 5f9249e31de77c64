//! Where the pages of a device lie in the data files of builds: what the headers of wrenn and E2B
//! say, checked once and looked up often.
//!
//! A map covers its device from the first page to the last without gap or overlap; a run lies in one
//! build, or is zero. Runs are joined only where storage runs on, too: two neighbours of one build
//! need not lie beside each other in its file. Numbers of pages fit into 32 bits, as no device has
//! more than 16 TiB; a run takes 12 bytes.

use std::collections::HashMap;

use dormouse_image::block::IMAGE_BYTES_MAX;
use uuid::Uuid;

use crate::error::{Error, Result};

/// The unit of every map, whatever a header's block size says.
pub const PAGE_BYTES: u64 = 4096;

/// Builds that one map may refer to; E2B's V5 gives them 16 bits.
pub const BUILDS_MAX: usize = 65_535;

/// Runs of one map: as many as E2B's own reader accepts.
pub const RUNS_MAX: usize = 8_388_608;

/// Builds that are found again without the table.
const RECENT: usize = 4;

/// The number that stands for zeros.
const NIL: u32 = u32::MAX;

/// Where a page lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The number of the build in the map's list.
    pub build: u32,

    /// The page in the build's data.
    pub page: u32,
}

/// A run of pages with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first page on the device.
    pub start: u64,

    /// How many.
    pub pages: u64,

    /// Where the first one lies; none means zeros.
    pub place: Option<Place>,
}

/// A record of a header, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The first byte on the device.
    pub offset: u64,

    /// How many.
    pub length: u64,

    /// The build; nil means zeros.
    pub build: Uuid,

    /// The first byte in the build's data.
    pub storage: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packed {
    build: u32,
    page: u32,
}

/// A whole device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageMap {
    size_bytes: u64,
    starts: Vec<u32>,
    places: Vec<Packed>,
    builds: Vec<Uuid>,
}

/// Takes records in order and checks each.
#[derive(Debug)]
pub struct PageMapBuilder {
    size_bytes: u64,
    pages: u64,
    end: u64,
    starts: Vec<u32>,
    places: Vec<Packed>,
    builds: Vec<Uuid>,
    numbers: HashMap<Uuid, u32>,
    /// The builds met last: records of few builds in turn are the rule.
    recent: [(Uuid, u32); RECENT],
    oldest: usize,
}

impl PageMapBuilder {
    /// Begins the map of a device of `size_bytes`.
    pub fn new(size_bytes: u64) -> Result<PageMapBuilder> {
        if size_bytes > IMAGE_BYTES_MAX {
            return Err(Error::corrupt(format!(
                "a device of {size_bytes} bytes; expected at most 16 TiB"
            )));
        }
        Ok(PageMapBuilder {
            size_bytes,
            pages: size_bytes.div_ceil(PAGE_BYTES),
            end: 0,
            starts: Vec::new(),
            places: Vec::new(),
            builds: Vec::new(),
            numbers: HashMap::new(),
            recent: [(Uuid::nil(), NIL); RECENT],
            oldest: 0,
        })
    }

    /// Makes room for runs that are there to be read.
    pub(crate) fn reserve(&mut self, runs: usize) {
        self.starts.reserve(runs.min(RUNS_MAX));
        self.places.reserve(runs.min(RUNS_MAX));
    }

    /// Adds a record, which must begin where the one before ended.
    pub fn push(&mut self, record: &Record) -> Result<()> {
        let Record { offset, length, build, storage } = *record;
        if (offset | length | storage) % PAGE_BYTES != 0 {
            return Err(Error::corrupt(format!(
                "offset {offset}, length {length}, storage offset {storage}; expected multiples of \
                 {PAGE_BYTES}"
            )));
        }
        if length == 0 {
            return Err(Error::corrupt(format!("an empty record at offset {offset}")));
        }
        let expected = self.end * PAGE_BYTES;
        if offset != expected {
            let what = if offset < expected { "overlaps" } else { "leaves a gap after" };
            return Err(Error::corrupt(format!(
                "offset {offset} {what} the record before; expected {expected}"
            )));
        }
        let place = if build.is_nil() {
            None
        } else {
            let build = self.build_number(build)?;
            let page = storage / PAGE_BYTES;
            let last = page.checked_add(length / PAGE_BYTES);
            match (u32::try_from(page), last) {
                (Ok(page), Some(last)) if last <= u64::from(u32::MAX) => {
                    Some(Place { build, page })
                }
                _ => {
                    return Err(Error::corrupt(format!(
                        "storage offset {storage} and length {length} pass 16 TiB"
                    )));
                }
            }
        };
        self.push_pages(length / PAGE_BYTES, place)
    }

    /// Adds pages behind those that are there.
    pub(crate) fn push_pages(&mut self, pages: u64, place: Option<Place>) -> Result<()> {
        let start = self.end;
        let end = start.checked_add(pages).filter(|&end| end <= self.pages).ok_or_else(|| {
            Error::corrupt(format!(
                "{pages} pages from page {start} pass the end of the device, which has {}",
                self.pages
            ))
        })?;
        if pages == 0 {
            return Ok(());
        }
        if let Some(place) = place
            && u64::from(place.page) + pages > u64::from(u32::MAX)
        {
            return Err(Error::corrupt(format!(
                "{pages} pages stored at page {} pass 16 TiB",
                place.page
            )));
        }
        self.end = end;
        if let (Some(&from), Some(&last)) = (self.starts.last(), self.places.last()) {
            let joins = match place {
                None => last.build == NIL,
                Some(place) => {
                    last.build == place.build
                        && u64::from(last.page) + (start - u64::from(from)) == u64::from(place.page)
                }
            };
            if joins {
                return Ok(());
            }
        }
        if self.starts.len() == RUNS_MAX {
            return Err(Error::corrupt(format!("more than {RUNS_MAX} runs")));
        }
        self.starts.push(u32::try_from(start).map_err(|_| Error::corrupt("a device over 16 TiB"))?);
        self.places.push(match place {
            None => Packed { build: NIL, page: 0 },
            Some(Place { build, page }) => Packed { build, page },
        });
        Ok(())
    }

    /// The number of a build, which is given out when it is first met.
    pub(crate) fn build_number(&mut self, build: Uuid) -> Result<u32> {
        if let Some(&(_, number)) = self.recent.iter().find(|(recent, _)| *recent == build)
            && number != NIL
        {
            return Ok(number);
        }
        let next = self.builds.len();
        let number = match self.numbers.get(&build) {
            Some(&number) => number,
            None if next == BUILDS_MAX => {
                return Err(Error::corrupt(format!("more than {BUILDS_MAX} builds")));
            }
            None => {
                let number = u32::try_from(next).map_err(|_| Error::corrupt("too many builds"))?;
                self.builds.push(build);
                self.numbers.insert(build, number);
                number
            }
        };
        self.recent[self.oldest] = (build, number);
        self.oldest = (self.oldest + 1) % RECENT;
        Ok(number)
    }

    /// The first page that has no source yet.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// The pages of the device.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// The map, if the records reached the end of the device.
    pub fn finish(self) -> Result<PageMap> {
        if self.end != self.pages {
            return Err(Error::corrupt(format!(
                "the records end at byte {}; expected {}, the device's {} bytes in whole pages",
                self.end * PAGE_BYTES,
                self.pages * PAGE_BYTES,
                self.size_bytes
            )));
        }
        Ok(PageMap {
            size_bytes: self.size_bytes,
            starts: self.starts,
            places: self.places,
            builds: self.builds,
        })
    }
}

impl PageMap {
    /// A device that is one build's data as it is.
    pub fn identity(size_bytes: u64, build: Uuid) -> Result<PageMap> {
        let mut builder = PageMapBuilder::new(size_bytes)?;
        let number = builder.build_number(build)?;
        let pages = builder.pages();
        builder.push_pages(pages, Some(Place { build: number, page: 0 }))?;
        builder.finish()
    }

    /// The length of the device in bytes; need not be whole pages.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The pages of the device.
    pub fn pages(&self) -> u64 {
        self.size_bytes.div_ceil(PAGE_BYTES)
    }

    /// The builds, in the order of their numbers.
    pub fn builds(&self) -> &[Uuid] {
        &self.builds
    }

    /// How many runs.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether the device has no page.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The run with this number.
    fn run(&self, number: usize) -> Run {
        let start = u64::from(self.starts[number]);
        let end = self.starts.get(number + 1).map_or_else(|| self.pages(), |&next| u64::from(next));
        let Packed { build, page } = self.places[number];
        let place = (build != NIL).then_some(Place { build, page });
        Run { start, pages: end - start, place }
    }

    /// All runs in order.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        (0..self.starts.len()).map(|number| self.run(number))
    }

    /// The runs from the one that holds `page`, which begins there.
    pub fn runs_from(&self, page: u64) -> impl Iterator<Item = Run> + '_ {
        let first = self.starts.partition_point(|&start| u64::from(start) <= page);
        (first.saturating_sub(1)..self.starts.len())
            .map(|number| self.run(number))
            .filter(move |run| run.start + run.pages > page)
            .map(move |run| run.tail(page))
    }

    /// Where a page lies, and how many pages from it on lie behind each other; none past the end.
    pub fn lookup(&self, page: u64) -> Option<Run> {
        if page >= self.pages() {
            return None;
        }
        let after = self.starts.partition_point(|&start| u64::from(start) <= page);
        Some(self.run(after.checked_sub(1)?).tail(page))
    }

    /// Calls `visit` with runs of this map in order, each with whether `before` has the very same
    /// place for it. Pages behind the end of `before` differ.
    pub fn against(
        &self,
        before: &PageMap,
        visit: &mut dyn FnMut(Run, bool) -> Result<()>,
    ) -> Result<()> {
        let numbers: HashMap<Uuid, u32> =
            (0..).zip(&self.builds).map(|(number, &build)| (build, number)).collect();
        let theirs: Vec<Option<u32>> =
            before.builds.iter().map(|build| numbers.get(build).copied()).collect();
        let mut old = before.runs().peekable();
        for run in self.runs() {
            let mut at = run.start;
            let end = run.start + run.pages;
            while at < end {
                while old.peek().is_some_and(|old| old.start + old.pages <= at) {
                    old.next();
                }
                let (until, same) = match old.peek() {
                    None => (end, false),
                    Some(old) => {
                        let place = old.tail(at).place.map(|place| {
                            (theirs.get(place.build as usize).copied().flatten(), place.page)
                        });
                        let new = run.tail(at).place.map(|place| (Some(place.build), place.page));
                        (end.min(old.start + old.pages), place == new)
                    }
                };
                let part = run.tail(at);
                visit(Run { pages: until - at, ..part }, same)?;
                at = until;
            }
        }
        Ok(())
    }
}

impl Run {
    /// What is left of the run from `page` on, which lies in it or before it.
    pub(crate) fn tail(self, page: u64) -> Run {
        let skip = page.saturating_sub(self.start).min(self.pages);
        let place = self.place.map(|place| Place {
            // A run's storage does not pass 32 bits: the builder saw to it.
            page: place.page.saturating_add(u32::try_from(skip).unwrap_or(u32::MAX)),
            ..place
        });
        Run { start: self.start + skip, pages: self.pages - skip, place }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(offset: u64, length: u64, build: u8, storage: u64) -> Record {
        Record {
            offset: offset * PAGE_BYTES,
            length: length * PAGE_BYTES,
            build: Uuid::from_bytes([build; 16]),
            storage: storage * PAGE_BYTES,
        }
    }

    fn map(records: &[Record]) -> Result<PageMap> {
        let size = records.iter().map(|record| record.length).sum();
        let mut builder = PageMapBuilder::new(size)?;
        for record in records {
            builder.push(record)?;
        }
        builder.finish()
    }

    /// E2B joined neighbours of one build without looking at their storage, and read wrong bytes
    /// (#2848); wrenn has the same code.
    #[test]
    fn neighbours_of_one_build_are_not_joined_across_a_storage_gap() {
        let gap = map(&[record(0, 2, 7, 0), record(2, 2, 7, 5)]).unwrap();
        assert_eq!(gap.len(), 2);
        assert_eq!(gap.lookup(3).unwrap().place, Some(Place { build: 0, page: 6 }));
        let dense = map(&[record(0, 2, 7, 0), record(2, 2, 7, 2)]).unwrap();
        assert_eq!(dense.len(), 1);
        assert_eq!(dense.lookup(3).unwrap().place, Some(Place { build: 0, page: 3 }));
        let zeros = map(&[record(0, 2, 0, 0), record(2, 2, 0, 9)]).unwrap();
        assert_eq!(zeros.len(), 1, "zeros have no storage");
    }

    #[test]
    fn what_is_not_a_cover_is_refused_with_position_and_expectation() {
        let mut builder = PageMapBuilder::new(4 * PAGE_BYTES).unwrap();
        builder.push(&record(0, 2, 1, 0)).unwrap();
        for (bad, why) in [
            (
                record(3, 1, 1, 0),
                "offset 12288 leaves a gap after the record before; expected 8192",
            ),
            (record(1, 1, 1, 0), "offset 4096 overlaps the record before; expected 8192"),
            (record(2, 0, 1, 0), "an empty record at offset 8192"),
            (record(2, 3, 1, 0), "3 pages from page 2 pass the end of the device, which has 4"),
            (
                record(2, 1, 1, u64::from(u32::MAX)),
                "storage offset 17592186040320 and length 4096 pass 16 TiB",
            ),
        ] {
            assert_eq!(builder.push(&bad).unwrap_err().to_string(), why);
        }
        let odd = Record { storage: 1, ..record(2, 1, 1, 0) };
        assert!(builder.push(&odd).unwrap_err().to_string().contains("multiples of 4096"));
        assert_eq!(
            builder.finish().unwrap_err().to_string(),
            "the records end at byte 8192; expected 16384, the device's 16384 bytes in whole pages"
        );
    }

    #[test]
    fn maps_are_compared_by_place_not_by_number() {
        let old = map(&[record(0, 4, 1, 0), record(4, 2, 2, 0)]).unwrap();
        let new = map(&[record(0, 1, 9, 0), record(1, 3, 1, 1), record(4, 2, 2, 1)]).unwrap();
        let mut seen = Vec::new();
        new.against(&old, &mut |run, same| {
            seen.push((run.start, run.pages, same));
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, [(0, 1, false), (1, 3, true), (4, 2, false)]);
    }
}
