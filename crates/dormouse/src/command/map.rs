//! `dormouse map`: draws where an image's bytes are.

use std::collections::HashMap;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dormouse_image::block::{BLOCK_BYTES_U64, blocks_in};
use dormouse_image::map::Source;
use dormouse_image::pack::PackId;
use dormouse_store::manifest::Manifest;
use dormouse_store::reader::ImageExtent;
use serde::Serialize;

use crate::app::App;
use crate::cli::MapArgs;
use crate::output::map::cells::{Cells, Origin};
use crate::output::map::{svg, terminal};

#[derive(Serialize)]
struct MapObject<'a> {
    image: &'a str,
    size_bytes: u64,
    cell_bytes: u64,
    totals: Shares,
    cells: Vec<Shares>,
    #[serde(skip_serializing_if = "Option::is_none")]
    svg: Option<String>,
}

#[derive(Serialize)]
struct Shares {
    zero_bytes: u64,
    own_bytes: u64,
    ancestor_bytes: u64,
    disk_bytes: u64,
}

pub(super) fn run(app: &mut App, args: &MapArgs) -> Result<()> {
    let store = app.open()?;
    let snapshot = store.snapshot(&args.image.snap)?;
    let image = snapshot.image(&args.image.image)?;
    let size_bytes = image.size_bytes();
    let mut cells = Cells::new(size_bytes);
    let work = app.work()?;
    let mut origins = Origins::new(snapshot.manifest());
    if !args.image.image.is_disk() {
        origins.add_packs(&store.list(None)?.snapshots);
        for entry in snapshot.manifest().images.iter().filter(|entry| entry.image.is_disk()) {
            let disk = snapshot.image(&entry.image)?;
            disk.for_each_extent(0..disk.size_bytes(), &mut |extent: ImageExtent| {
                work.job().check()?;
                origins.add_disk(&extent);
                Ok(())
            })?;
        }
        origins.sort();
    }
    image.for_each_extent(0..size_bytes, &mut |extent: ImageExtent| {
        work.job().check()?;
        origins.count(&extent, &mut cells);
        Ok(())
    })?;
    drop(work);
    let title = format!("{}:{}", snapshot.manifest().display_name(), args.image.image);
    if let Some(path) = &args.svg {
        write_picture(path, &svg::draw(&title, &cells))?;
    }
    if app.json {
        let object = MapObject {
            image: &title,
            size_bytes,
            cell_bytes: cells.cell_bytes(),
            totals: shares(&cells.totals()),
            cells: cells.iter().map(shares).collect(),
            svg: args.svg.as_ref().map(|path| path.display().to_string()),
        };
        app.out.json(&object)?;
    } else if let Some(path) = &args.svg {
        app.say(&format!("drew {title} to {}", path.display()));
    } else {
        let drawing = terminal::draw(&title, &cells, app.palette);
        app.out.write_all(drawing.as_bytes())?;
    }
    Ok(())
}

/// Tells where a run of blocks comes from.
#[derive(Debug, Default)]
struct Origins {
    own: Option<PackId>,

    /// Slots that hold blocks of disks: sorted and apart from each other, once all are added.
    on_disks: HashMap<PackId, Vec<Range<u64>>>,
}

impl Origins {
    fn new(manifest: &Manifest) -> Origins {
        let own = manifest.pack.as_ref().and_then(|pack| PackId::parse(&pack.id));
        Origins { own, on_disks: HashMap::new() }
    }

    /// Adds the slots that commits filled from disks. Snapshots that were removed tell no longer.
    fn add_packs(&mut self, snapshots: &[Manifest]) {
        for pack in snapshots.iter().filter_map(|manifest| manifest.pack.as_ref()) {
            if let Some(id) = PackId::parse(&pack.id) {
                self.on_disks.entry(id).or_default().push(0..u64::from(pack.disk_slots));
            }
        }
    }

    /// Adds the slots of a run of a disk of this very snapshot.
    fn add_disk(&mut self, extent: &ImageExtent) {
        if let Source::Stored { pack, slot } = extent.source {
            self.on_disks.entry(pack).or_default().push(slots(extent, slot));
        }
    }

    fn sort(&mut self) {
        for ranges in self.on_disks.values_mut() {
            ranges.sort_by_key(|range| range.start);
            ranges.dedup_by(|next, last| {
                let joins = next.start <= last.end;
                if joins {
                    last.end = last.end.max(next.end);
                }
                joins
            });
        }
    }

    /// Counts a run of the image that is drawn; a part of it may lie on disks.
    fn count(&self, extent: &ImageExtent, cells: &mut Cells) {
        let Source::Stored { pack, slot } = extent.source else {
            cells.add(extent.range.clone(), Origin::Zero);
            return;
        };
        let elsewhere = if self.own == Some(pack) { Origin::Own } else { Origin::Ancestor };
        let run = slots(extent, slot);
        let ranges = self.on_disks.get(&pack).map_or(&[][..], Vec::as_slice);
        let first = ranges.partition_point(|range| range.end <= run.start);
        let offset = |slot: u64| {
            let bytes = (slot - run.start) * BLOCK_BYTES_U64;
            extent.range.start.saturating_add(bytes).min(extent.range.end)
        };
        let mut at = run.start;
        for range in ranges[first..].iter().take_while(|range| range.start < run.end) {
            let (start, end) = (range.start.max(at), range.end.min(run.end));
            cells.add(offset(at)..offset(start), elsewhere);
            cells.add(offset(start)..offset(end), Origin::Disk);
            at = end;
        }
        cells.add(offset(at)..extent.range.end, elsewhere);
    }
}

/// The slots of a run that begins with `slot`.
fn slots(extent: &ImageExtent, slot: u32) -> Range<u64> {
    let start = u64::from(slot);
    start..start + blocks_in(extent.range.end - extent.range.start)
}

fn shares(bytes: &[u64; Origin::COUNT]) -> Shares {
    let of = |origin: Origin| bytes[origin as usize];
    Shares {
        zero_bytes: of(Origin::Zero),
        own_bytes: of(Origin::Own),
        ancestor_bytes: of(Origin::Ancestor),
        disk_bytes: of(Origin::Disk),
    }
}

fn write_picture(path: &Path, picture: &str) -> Result<()> {
    let path: PathBuf = path.to_owned();
    std::fs::write(&path, picture).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_cut_where_it_lies_on_disks() {
        let (own, other) = (PackId([1; 16]), PackId([2; 16]));
        let extent = |blocks: Range<u64>, pack, slot| ImageExtent {
            range: blocks.start * 4096..blocks.end * 4096,
            source: Source::Stored { pack, slot },
        };
        let mut origins = Origins { own: Some(own), on_disks: HashMap::new() };
        for (blocks, slot) in [(0..2, 12), (0..3, 20), (0..4, 10)] {
            origins.add_disk(&extent(blocks, other, slot));
        }
        origins.sort();
        assert_eq!(origins.on_disks[&other], [10..14, 20..23]);
        let mut cells = Cells::new(30 * 4096);
        origins.count(&extent(0..18, other, 8), &mut cells);
        origins.count(&extent(18..19, own, 12), &mut cells);
        let seen: Vec<_> = cells.iter().map(|cell| cell.map(|bytes| bytes / 4096)).collect();
        let (disk, ancestor) = ([0, 0, 0, 1], [0, 0, 1, 0]);
        assert_eq!(seen[..2], [ancestor; 2]);
        assert_eq!(seen[2..6], [disk; 4]);
        assert_eq!(seen[6..12], [ancestor; 6]);
        assert_eq!(seen[12..15], [disk; 3]);
        assert_eq!(seen[15..18], [ancestor; 3]);
        assert_eq!(seen[18], [0, 1, 0, 0]);
    }
}
