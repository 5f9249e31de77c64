//! The bytes behind a map: data files of builds, plain or in compressed frames, and the layer that
//! the store reads them through.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use dormouse_store::source::{LayerRun, LayerSource};

use crate::error::{Context, Error, Result};
use crate::page_map::{PAGE_BYTES, PageMap, Run};

pub use crate::stable_file::StableFile;
pub(crate) use crate::stable_file::WholeFile;

/// Zero or unchanged pages between two runs that are read along with them: a piece of 64 KiB costs
/// less to look at than a piece of its own costs to hand around.
const JOIN_PAGES: u64 = 16;

/// Stretches of data and holes that one walk finds in sparse data files. A header of a few MiB may
/// refer to one file with many holes again and again, which would be looked at for days.
const STRETCHES_MAX: u64 = 16 << 20;

/// Bytes that can be read anywhere, from several threads.
pub trait RandomRead: fmt::Debug + Send + Sync {
    /// The length.
    fn size_bytes(&self) -> u64;

    /// Fills `buf` from `offset`; what is past the end is an error.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Fails if the bytes are known to have changed since they were opened.
    fn check_unchanged(&self) -> Result<()>;

    /// Fails if a part of a range cannot be read, though it lies before the end.
    fn check_covers(&self, range: Range<u64>) -> Result<()> {
        let _ = range;
        Ok(())
    }

    /// Calls `visit` with the holes in a range, in order, where they can be told for less than
    /// reading costs. An error of `visit` ends it.
    fn for_each_hole(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let (_, _) = (range, visit);
        Ok(())
    }

    /// Gives back descriptors until the next read. A lineage of many builds has more files than a
    /// process may hold open at once.
    fn release(&self) {}
}

/// A device made of builds' data: what the store reads. The runs that differ from the device before
/// are found while they are walked, and none is kept: memory is that of the maps.
#[derive(Debug)]
pub struct MappedDevice {
    label: String,
    map: Arc<PageMap>,
    /// By the numbers of the builds.
    data: Vec<Arc<dyn RandomRead>>,
    /// What is as here is not walked.
    before: Option<Arc<PageMap>>,
    stretches_max: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WalkRun {
    start: u64,
    end: u64,
    kind: LayerRun,
}

impl MappedDevice {
    /// A device with the data of its builds, in their order. Every run must lie inside its build's
    /// data. With `before`, only what differs from it is walked.
    pub fn new(
        label: String,
        map: Arc<PageMap>,
        data: Vec<Arc<dyn RandomRead>>,
        before: Option<Arc<PageMap>>,
    ) -> Result<MappedDevice> {
        check_inside(&map, &data).context(|| format!("{label} is damaged"))?;
        // All generations are looked at before the first one is read.
        data.iter().for_each(|data| data.release());
        Ok(MappedDevice { label, map, data, before, stretches_max: STRETCHES_MAX })
    }

    fn walk(&self, visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>) -> Result<()> {
        let mut walk = Walk { size_bytes: self.map.size_bytes(), held: [None, None], visit };
        let mut stretches = 0_u64;
        let mut add = |run: Run, same: bool| {
            if same {
                return Ok(());
            }
            let file =
                run.place.and_then(|place| Some((place, self.data.get(place.build as usize)?)));
            let Some((place, file)) = file else { return walk.push(&run) };
            // What a sparse data file does not have needs no reading.
            let storage = u64::from(place.page) * PAGE_BYTES;
            let mut at = run.start;
            file.for_each_hole(storage..storage + run.pages * PAGE_BYTES, &mut |hole| {
                stretches += 1;
                if stretches > self.stretches_max {
                    return Err(Error::corrupt(format!(
                        "more than {} holes in the data files up to byte {} of the device, where \
                         its run lies at byte {} of the data; expected at most as many: write the \
                         data files without holes (cp --sparse=never)",
                        self.stretches_max,
                        at * PAGE_BYTES,
                        hole.start
                    )));
                }
                let first = run.start + (hole.start - storage).div_ceil(PAGE_BYTES);
                let last = run.start + (hole.end - storage) / PAGE_BYTES;
                if last > first + JOIN_PAGES {
                    walk.push(&Run { pages: first - at, ..run.tail(at) })?;
                    walk.push(&Run { start: first, pages: last - first, place: None })?;
                    at = last;
                }
                Ok(())
            })?;
            walk.push(&run.tail(at))
        };
        match &self.before {
            Some(before) => self.map.against(before, &mut add)?,
            None => self.map.runs().try_for_each(|run| add(run, false))?,
        }
        walk.finish()
    }

    /// The map.
    pub fn map(&self) -> &Arc<PageMap> {
        &self.map
    }

    fn fill(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        debug_assert!(offset.is_multiple_of(PAGE_BYTES), "runs are whole pages");
        let first = offset / PAGE_BYTES;
        let mut runs = self.map.runs_from(first).peekable();
        let mut at = 0;
        // Runs of one build whose storage runs on are read at once, then spread from the last one.
        let mut parts: Vec<(usize, usize)> = Vec::new();
        while at < buf.len() {
            let Some(run) = runs.next() else {
                return Err(Error::corrupt(format!("byte {offset} is past the end")));
            };
            let begin = at;
            at = buf.len().min(at.saturating_add(bytes_of(run.pages)));
            let Some(place) = run.place else {
                buf[begin..at].fill(0);
                continue;
            };
            parts.clear();
            parts.push((begin, at - begin));
            let mut total = at - begin;
            let mut next_page = u64::from(place.page) + run.pages;
            while at < buf.len()
                && let Some(next) = runs.peek()
            {
                let len = bytes_of(next.pages).min(buf.len() - at);
                match next.place {
                    None => {}
                    Some(other)
                        if other.build == place.build && u64::from(other.page) == next_page =>
                    {
                        next_page += next.pages;
                        parts.push((at, len));
                        total += len;
                    }
                    Some(_) => break,
                }
                at += len;
                runs.next();
            }
            let data = self
                .data
                .get(place.build as usize)
                .ok_or_else(|| Error::corrupt("a build without data"))?;
            read_padded(
                &**data,
                &mut buf[begin..begin + total],
                u64::from(place.page) * PAGE_BYTES,
            )?;
            let mut source = total;
            let mut zero_end = at;
            for &(target, len) in parts.iter().rev() {
                source -= len;
                buf.copy_within(begin + source..begin + source + len, target);
                buf[target + len..zero_end].fill(0);
                zero_end = target;
            }
        }
        Ok(())
    }
}

fn bytes_of(pages: u64) -> usize {
    usize::try_from(pages.saturating_mul(PAGE_BYTES)).unwrap_or(usize::MAX)
}

/// Reads with zeros behind the end: a data file of a device whose length is no multiple of a page.
fn read_padded(data: &dyn RandomRead, buf: &mut [u8], offset: u64) -> Result<()> {
    let there = data.size_bytes().saturating_sub(offset).min(buf.len() as u64);
    let (head, tail) = buf.split_at_mut(usize::try_from(there).unwrap_or(usize::MAX));
    tail.fill(0);
    data.read_at(head, offset)
}

/// Runs on their way to who asked, of which the last two may still become one with the next.
struct Walk<'a> {
    size_bytes: u64,
    held: [Option<WalkRun>; 2],
    visit: &'a mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
}

impl Walk<'_> {
    fn push(&mut self, run: &Run) -> Result<()> {
        if run.pages == 0 {
            return Ok(());
        }
        let kind = if run.place.is_some() { LayerRun::Data } else { LayerRun::Zero };
        let (start, end) = (run.start, run.start + run.pages);
        if let [Some(before), Some(last)] = &mut self.held
            && kind == LayerRun::Data
            && last.kind == LayerRun::Zero
            && before.kind == LayerRun::Data
            && last.end == start
            && before.end == last.start
            && last.end - last.start <= JOIN_PAGES
        {
            // Short zeros between two runs of data become data.
            before.end = end;
            self.held = [None, Some(*before)];
            return Ok(());
        }
        if let Some(last) = &mut self.held[1]
            && last.kind == kind
            && start - last.end <= if kind == LayerRun::Data { JOIN_PAGES } else { 0 }
        {
            last.end = end;
            return Ok(());
        }
        let [first, last] = self.held;
        self.held = [last, Some(WalkRun { start, end, kind })];
        self.pass(first)
    }

    fn pass(&mut self, run: Option<WalkRun>) -> Result<()> {
        let Some(run) = run else { return Ok(()) };
        let end = (run.end * PAGE_BYTES).min(self.size_bytes);
        (self.visit)(run.start * PAGE_BYTES..end, run.kind)
            .map_err(|error| Error::io("the store did not take it", error))
    }

    fn finish(mut self) -> Result<()> {
        let [first, last] = self.held;
        self.pass(first)?;
        self.pass(last)
    }
}

/// Every run lies inside its build's data, of which the last page may be short.
fn check_inside(map: &PageMap, data: &[Arc<dyn RandomRead>]) -> Result<()> {
    let pages: Vec<u64> = data.iter().map(|data| data.size_bytes().div_ceil(PAGE_BYTES)).collect();
    for run in map.runs() {
        let Some(place) = run.place else { continue };
        let end = u64::from(place.page) + run.pages;
        let there = pages.get(place.build as usize).copied().unwrap_or(0);
        if end > there {
            let build = map.builds().get(place.build as usize).copied().unwrap_or_default();
            return Err(Error::corrupt(format!(
                "the run at byte {} lies at bytes {} to {} of the data of build {build}, which has {}",
                run.start * PAGE_BYTES,
                u64::from(place.page) * PAGE_BYTES,
                end * PAGE_BYTES,
                data.get(place.build as usize).map_or(0, |data| data.size_bytes()),
            )));
        }
        if let Some(data) = data.get(place.build as usize) {
            data.check_covers(u64::from(place.page) * PAGE_BYTES..end * PAGE_BYTES)?;
        }
    }
    Ok(())
}

impl LayerSource for MappedDevice {
    fn size_bytes(&self) -> u64 {
        self.map.size_bytes()
    }

    fn label(&self) -> String {
        self.label.clone()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        Ok(self.fill(buf, offset).context(|| format!("cannot read {}", self.label))?)
    }

    fn check_unchanged(&self) -> io::Result<()> {
        Ok(self.data.iter().try_for_each(|data| data.check_unchanged())?)
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()> {
        Ok(self.walk(visit).context(|| format!("cannot walk {}", self.label))?)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::page_map::{PageMapBuilder, Record};

    #[derive(Debug)]
    struct Bytes(Vec<u8>);

    impl RandomRead for Bytes {
        fn size_bytes(&self) -> u64 {
            self.0.len() as u64
        }

        fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
            let from = usize::try_from(offset).unwrap();
            let bytes = self.0.get(from..from + buf.len());
            buf.copy_from_slice(bytes.ok_or_else(|| Error::corrupt("past the end"))?);
            Ok(())
        }

        fn check_unchanged(&self) -> Result<()> {
            Ok(())
        }
    }

    /// Any map over any two builds reads as its records say, in pieces of any place.
    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "devices of tests are small")]
    fn pieces_are_what_the_records_say() {
        use proptest::prelude::*;
        let records = proptest::collection::vec((0..3_u8, 1..6_u64, 0..40_u64), 1..40);
        let strategy = (records, any::<prop::sample::Index>(), any::<prop::sample::Index>());
        proptest!(|((records, from, len) in strategy)| {
            let builds: Vec<Vec<u8>> = (0..2_u8)
                .map(|build| (0..64_u8).flat_map(|page| [build * 64 + page + 1; 4096]).collect())
                .collect();
            let pages: u64 = records.iter().map(|record| record.1).sum();
            let mut builder = PageMapBuilder::new(pages * PAGE_BYTES).unwrap();
            let mut model = Vec::new();
            // So that half of the runs go on where the one before ended, as packed files do.
            let mut next = [0_u64; 2];
            for &(build, length, storage) in &records {
                let offset = model.len() as u64;
                let storage = match build {
                    0 => 0,
                    _ if storage % 2 == 0 && next[usize::from(build) - 1] + length <= 64 => {
                        next[usize::from(build) - 1]
                    }
                    _ => storage,
                };
                let id = Uuid::from_bytes([build; 16]);
                builder.push(&Record {
                    offset, length: length * PAGE_BYTES, build: id, storage: storage * PAGE_BYTES,
                }).unwrap();
                for page in 0..length {
                    let byte = match build {
                        0 => 0,
                        _ => builds[usize::from(build) - 1][((storage + page) * PAGE_BYTES) as usize],
                    };
                    model.extend([byte; 4096]);
                }
                if build > 0 {
                    next[usize::from(build) - 1] = storage + length;
                }
            }
            let map = Arc::new(builder.finish().unwrap());
            let data = map.builds().iter().map(|build| {
                let bytes = builds[usize::from(build.as_bytes()[0]) - 1].clone();
                Arc::new(Bytes(bytes)) as Arc<dyn RandomRead>
            }).collect();
            let device = MappedDevice::new("test".to_owned(), map, data, None).unwrap();
            let first = from.index(pages as usize);
            let count = 1 + len.index(pages as usize - first);
            let mut buf = vec![0xee; count * 4096];
            device.read_at(&mut buf, first as u64 * PAGE_BYTES).unwrap();
            prop_assert!(buf == model[first * 4096..(first + count) * 4096]);
            let mut at = 0;
            device.for_each_run(&mut |run, kind| {
                assert_eq!(run.start, at, "without a map before, everything is walked");
                if kind == LayerRun::Zero {
                    assert!(model[run.start as usize..run.end as usize].iter().all(|&b| b == 0));
                }
                at = run.end;
                Ok(())
            }).unwrap();
            prop_assert_eq!(at, pages * PAGE_BYTES);
        });
    }

    /// Bytes of which every other stretch of 32 pages is a hole.
    #[derive(Debug)]
    struct Sieve(u64);

    impl RandomRead for Sieve {
        fn size_bytes(&self) -> u64 {
            self.0
        }

        fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> {
            Err(Error::corrupt("a walk reads nothing"))
        }

        fn check_unchanged(&self) -> Result<()> {
            Ok(())
        }

        fn for_each_hole(
            &self,
            range: Range<u64>,
            visit: &mut dyn FnMut(Range<u64>) -> Result<()>,
        ) -> Result<()> {
            let step = 32 * PAGE_BYTES;
            let mut at = range.start.next_multiple_of(2 * step);
            while at < range.end {
                visit(at..(at + step).min(range.end))?;
                at += 2 * step;
            }
            Ok(())
        }
    }

    /// A header of 16 KiB made its import hold 10 GB: each of its runs was all of one sparse file,
    /// and the list had every stretch of data and every hole of each.
    #[test]
    fn runs_over_one_file_with_many_holes_are_walked_without_a_list_and_come_to_an_end() {
        const FILE: u64 = 64 << 30;
        let build = Uuid::from_bytes([1; 16]);
        let mut builder = PageMapBuilder::new(200 * FILE).unwrap();
        for number in 0..200 {
            builder
                .push(&Record { offset: number * FILE, length: FILE, build, storage: 0 })
                .unwrap();
        }
        let map = Arc::new(builder.finish().unwrap());
        let data: Vec<Arc<dyn RandomRead>> = vec![Arc::new(Sieve(FILE))];
        let mut device = MappedDevice::new("test".to_owned(), map, data, None).unwrap();
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * PAGE_BYTES
        };
        let before = resident();
        let (mut runs, mut most) = (0_u64, before);
        let error = device
            .for_each_run(&mut |_, _| {
                runs += 1;
                if runs.is_multiple_of(1 << 20) {
                    most = most.max(resident());
                }
                Ok(())
            })
            .unwrap_err();
        assert!(runs > 2 * STRETCHES_MAX - 1000, "{runs} runs");
        assert!(most - before < 256 << 20, "{} bytes for {runs} runs", most - before);
        let why = error.get_ref().unwrap().downcast_ref::<Error>().unwrap();
        let why = std::error::Error::source(why).unwrap().to_string();
        assert!(why.starts_with(&format!("more than {STRETCHES_MAX} holes")), "{why}");
        // 262,144 holes in each run: the budget ends with the first hole of run 64.
        assert!(why.contains(&format!("up to byte {} of the device", 64 * FILE)), "{why}");
        // What is not hostile passes.
        device.stretches_max = 200 * (FILE >> 18);
        device.for_each_run(&mut |_, _| Ok(())).unwrap();
    }
}
