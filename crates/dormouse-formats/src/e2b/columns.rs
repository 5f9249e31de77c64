//! The mappings of a header of version 5: columns of numbers, in pages of 4 KiB.
//!
//! ```text
//! u32 M; M × 16           builds that are referred to, never nil
//! u32 N                   runs that are not zero
//! N × uvarint             starts, each from the start before
//! N × uvarint             lengths
//! N × zigzag varint       storage starts, each from the storage start before, across builds
//! N × uvarint             numbers of builds
//! ```
//!
//! What no run covers is zero; so no run at all is a device of zeros, while in every earlier version
//! it is the build's data as it is.

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::fields::{Fields, put_uvarint, put_varint};
use crate::page_map::{BUILDS_MAX, PageMap, PageMapBuilder, Place};

/// Runs that E2B's own reader accepts: what fits into 256 MiB of its records.
const RUNS_MAX: u32 = (256 << 20) / 42;

/// The most that a number in a column may be.
const VALUE_MAX: u64 = u32::MAX as u64;

pub(super) fn parse(fields: &mut Fields<'_>, size_bytes: u64) -> Result<PageMap> {
    let at = fields.clone();
    let count = usize::try_from(fields.u32("count of builds")?).unwrap_or(usize::MAX);
    if count > BUILDS_MAX {
        return Err(at.corrupt(format_args!("{count} builds; at most {BUILDS_MAX}")));
    }
    let mut builder = PageMapBuilder::new(size_bytes)?;
    let mut numbers = Vec::new();
    let at = fields.clone();
    for chunk in fields.take(count * 16, "build ids")?.chunks_exact(16) {
        let mut id = [0; 16];
        id.copy_from_slice(chunk);
        if id == [0; 16] {
            return Err(at.corrupt("the nil build is listed"));
        }
        let number = builder.build_number(Uuid::from_bytes(id))?;
        if usize::try_from(number).ok() != Some(numbers.len()) {
            return Err(at.corrupt("a build is listed twice"));
        }
        numbers.push(number);
    }
    let at = fields.clone();
    let runs = fields.u32("count of runs")?;
    let runs_max = RUNS_MAX.min(u32::try_from(fields.remaining() / 4).unwrap_or(u32::MAX));
    if runs > runs_max {
        return Err(at.corrupt(format_args!("{runs} runs; at most {runs_max}")));
    }
    let starts = column(fields, runs, "start")?;
    let lengths = column(fields, runs, "length")?;
    let mut storage_starts = Vec::with_capacity(starts.len());
    let mut storage = 0_i64;
    for _ in 0..runs {
        let at = fields.clone();
        let delta = fields.varint("storage start")?;
        let next = storage.checked_add(delta).and_then(|next| u32::try_from(next).ok());
        let Some(next) = next else {
            return Err(at.corrupt(format_args!("storage start {storage} and {delta}")));
        };
        storage = i64::from(next);
        storage_starts.push(next);
    }
    builder.reserve(starts.len());
    let mut start = 0_u64;
    for ((delta, length), storage) in starts.into_iter().zip(lengths).zip(storage_starts) {
        let at = fields.clone();
        let index = fields.uvarint(VALUE_MAX, "number of a build")?;
        start += u64::from(delta);
        let Some(&build) = usize::try_from(index).ok().and_then(|index| numbers.get(index)) else {
            return Err(at.corrupt(format_args!("build {index} of {}", numbers.len())));
        };
        if length == 0 || storage.checked_add(length).is_none() {
            return Err(at.corrupt(format_args!(
                "a run of {length} pages at page {start}, stored at page {storage}"
            )));
        }
        let end = builder.end();
        let Some(gap) = start.checked_sub(end) else {
            return Err(at.corrupt(format_args!(
                "a run at page {start} overlaps the one before; expected from page {end}"
            )));
        };
        builder.push_pages(gap, None)?;
        builder.push_pages(u64::from(length), Some(Place { build, page: storage }))?;
    }
    let rest = builder.pages() - builder.end();
    builder.push_pages(rest, None)?;
    builder.finish()
}

fn column(fields: &mut Fields<'_>, runs: u32, name: &str) -> Result<Vec<u32>> {
    (0..runs)
        .map(|_| {
            fields.uvarint(VALUE_MAX, name).map(|value| u32::try_from(value).unwrap_or(u32::MAX))
        })
        .collect()
}

pub(super) fn encode(map: &PageMap, bytes: &mut Vec<u8>) -> Result<()> {
    let runs: Vec<_> = map.runs().filter_map(|run| run.place.map(|place| (run, place))).collect();
    let count = u32::try_from(runs.len()).ok().filter(|&count| count <= RUNS_MAX);
    let Some(count) = count else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{} runs; E2B reads at most {RUNS_MAX}", runs.len()),
        ));
    };
    let builds = u32::try_from(map.builds().len()).unwrap_or(u32::MAX);
    bytes.extend(builds.to_le_bytes());
    map.builds().iter().for_each(|build| bytes.extend(build.as_bytes()));
    bytes.extend(count.to_le_bytes());
    let mut start = 0;
    for (run, _) in &runs {
        put_uvarint(bytes, run.start - start);
        start = run.start;
    }
    runs.iter().for_each(|(run, _)| put_uvarint(bytes, run.pages));
    let mut storage = 0;
    for (_, place) in &runs {
        put_varint(bytes, i64::from(place.page) - storage);
        storage = i64::from(place.page);
    }
    runs.iter().for_each(|(_, place)| put_uvarint(bytes, u64::from(place.build)));
    Ok(())
}
