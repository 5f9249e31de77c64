//! `dormouse ext4 free`, and sources of commits without what their file systems do not use.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use dormouse_ext4::read::Ext4;
use dormouse_store::source::{LayerRun, LayerSource, Source};
use dormouse_sys::sparse::data_extents;
use serde::Serialize;

use crate::app::App;
use crate::cli::ext4::FreeArgs;
use crate::command::ext4::open::open;
use crate::output::size::{human, percent};

/// The unit in which the store keeps images.
const BLOCK_BYTES: u64 = 4096;

#[derive(Serialize)]
struct FreeObject {
    image: String,
    size_bytes: u64,
    free_bytes: u64,
    journal_replayed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    ranges: Option<Vec<[u64; 2]>>,
}

pub(super) fn run(app: &mut App, args: &FreeArgs) -> Result<()> {
    let image = open(app, &args.image)?;
    let free = image.free_ranges()?;
    let free_bytes = free.iter().map(|range| range.end - range.start).sum();
    let size_bytes = image.used_bytes();
    if app.json {
        let ranges = free.iter().map(|range| [range.start, range.end]).collect();
        app.out.json(&FreeObject {
            image: args.image.clone(),
            size_bytes,
            free_bytes,
            journal_replayed: image.was_replayed(),
            ranges: args.ranges.then_some(ranges),
        })?;
        return Ok(());
    }
    writeln!(
        app.out,
        "{} of {} are free ({})",
        human(free_bytes),
        human(size_bytes),
        percent(free_bytes, size_bytes)
    )?;
    if args.ranges {
        for range in free {
            writeln!(app.out, "{}-{}", range.start, range.end)?;
        }
    }
    Ok(())
}

/// A disk without the blocks that its file system calls free.
#[derive(Debug)]
struct UsedBlocks {
    label: String,
    file: File,
    bytes: u64,
    modified: (i64, i64),
    runs: Vec<Range<u64>>,
}

impl LayerSource for UsedBlocks {
    fn size_bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)?;
        // Asked after each read, so that nothing is committed that was read of two states.
        let metadata = self.file.metadata()?;
        if (metadata.mtime(), metadata.mtime_nsec()) != self.modified {
            let what = format!("{} was written to while it was read", self.label);
            return Err(io::Error::other(what));
        }
        Ok(())
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()> {
        self.runs.iter().try_for_each(|run| visit(run.clone(), LayerRun::Data))
    }
}

/// The disk in a file, without the blocks that its ext4 file system calls free.
pub(in crate::command) fn drop_free(path: &Path) -> Result<Source> {
    let label = path.display().to_string();
    let what = || format!("find the free blocks of {label}");
    let file = File::open(path).with_context(what)?;
    let metadata = file.metadata().with_context(what)?;
    let image = Ext4::open_file(file.try_clone().with_context(what)?).with_context(what)?;
    let size = dormouse_sys::file_size::file_size(&file).with_context(what)?;
    let bytes = size.bytes.unwrap_or(0);
    let free = image.free_ranges().with_context(what)?;
    let runs = used_runs(&file, bytes, &free).with_context(what)?;
    let modified = (metadata.mtime(), metadata.mtime_nsec());
    let layer = Arc::new(UsedBlocks { label, file, bytes, modified, runs });
    Ok(Source::Layer { layer, base: None })
}

/// The file's data, in whole blocks, without those that are free from front to end.
fn used_runs(file: &File, bytes: u64, free: &[Range<u64>]) -> io::Result<Vec<Range<u64>>> {
    let mut free = free
        .iter()
        .map(|range| {
            range.start.next_multiple_of(BLOCK_BYTES)..range.end / BLOCK_BYTES * BLOCK_BYTES
        })
        .filter(|range| !range.is_empty())
        .peekable();
    let mut runs: Vec<Range<u64>> = Vec::new();
    for extent in data_extents(file, 0..bytes) {
        let extent = extent?;
        let mut at = extent.start / BLOCK_BYTES * BLOCK_BYTES;
        at = at.max(runs.last().map_or(0, |run| run.end));
        let end = extent.end.next_multiple_of(BLOCK_BYTES).min(bytes);
        while at < end {
            while free.next_if(|range| range.end <= at).is_some() {}
            let stop = match free.peek() {
                Some(range) if range.start <= at => {
                    at = range.end;
                    continue;
                }
                Some(range) => range.start.min(end),
                None => end,
            };
            match runs.last_mut() {
                Some(last) if last.end == at => last.end = stop,
                _ => runs.push(at..stop),
            }
            at = stop;
        }
    }
    Ok(runs)
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "runs are what is tested")]
mod tests {
    use super::*;

    #[test]
    fn only_whole_free_blocks_are_left_out() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 40_960], 0).unwrap();
        file.set_len(81_920).unwrap();
        let runs = |free: &[Range<u64>]| used_runs(&file, 81_920, free).unwrap();
        assert_eq!(runs(&[]), [0..40_960]);
        assert_eq!(runs(&[0..4096, 8192..16_384]), [4096..8192, 16_384..40_960]);
        // A file system of 1 KiB blocks may use a part of a block.
        assert_eq!(runs(&[1024..9216]), [0..4096, 8192..40_960]);
        assert_eq!(runs(&[36_864..81_920]), [0..36_864]);
        assert_eq!(runs(&[0..81_920]), []);
    }
}
