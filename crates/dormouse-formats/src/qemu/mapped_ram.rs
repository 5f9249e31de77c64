//! A mapped-ram file, in and out.
//!
//! The pages of all RAM blocks become the memory image, one block behind the other, and the file
//! with its pages taken out the state `mapped-ram`. Going out, the pages and bitmaps are put back
//! where the block headers in that state say. So any memory of the same blocks can be put in, and
//! QEMU loads it: a page whose bit is not set is zero to it, whatever the file has there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use dormouse_image::map::Source;
use dormouse_store::manifest::{MemoryRegion, Vmm};
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::reader::{EXPORT_MODE, ImageReader};
use dormouse_sys::publish::{Existing, NewFile};
use uuid::Uuid;

use super::stream::{MappedBlock, RamBlock, Stream, bitmap_bytes};
use crate::data::{MappedDevice, RandomRead, StableFile};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::export::{ExportReport, Line};
use crate::format::Format;
use crate::import::{Body, Found, Generation, LookOptions, NewContent};
use crate::page_map::{PAGE_BYTES, PageMap, PageMapBuilder, Place};
use crate::stored::{for_each_piece, stored_runs};
use crate::verify::{Compare, Replay};

/// Bytes of a bitmap, or of pages, handled at once.
const PIECE_BYTES: usize = 1 << 20;

/// Stands for the file in maps.
const FILE: Uuid = Uuid::from_u128(1);

const STATE: &str = "mapped-ram";

/// Looks at a file.
pub fn look(path: &Path, options: &LookOptions) -> Result<Found> {
    let file = Arc::new(StableFile::open(path)?);
    let stream = Stream::read(&*file).context(|| format!("{} cannot be read", path.display()))?;
    let blocks =
        mapped_blocks(&stream).context(|| format!("{} is no mapped-ram file", path.display()))?;
    let [memory, rest] = maps_of(&*file, &blocks)?.map(Arc::new);
    let mut generation = Generation::new(path.display().to_string());
    generation.memory_layout = rows(&blocks);
    generation.vmm = Vmm {
        kind: Some("qemu".to_owned()),
        version: options.vmm_version.clone(),
        ..Vmm::default()
    };
    generation.labels.insert("qemu.machine".to_owned(), stream.machine.chars().take(100).collect());
    let state = ImageName::State(Name::new(STATE)?);
    for (image, map) in [(ImageName::Memory, memory), (state, rest)] {
        let data: Vec<Arc<dyn RandomRead>> =
            map.builds().iter().map(|_| Arc::clone(&file) as Arc<dyn RandomRead>).collect();
        let replay =
            MappedReplay { file: Arc::clone(&file), is_memory: image == ImageName::Memory };
        let label = path.display().to_string();
        let layer = MappedDevice::new(label, Arc::clone(&map), data, None)?;
        generation.images.push(NewContent {
            image,
            body: Body::Whole(Arc::new(layer)),
            replay: Some(Box::new(replay)),
        });
    }
    Ok(Found {
        format: Format::MappedRam,
        version: format!("stream 3, {}", stream.machine.chars().take(100).collect::<String>()),
        generations: vec![generation],
        notes: Vec::new(),
        is_whole: false,
        base: None,
    })
}

/// The memory and the rest of a file.
pub fn maps(file: &dyn RandomRead) -> Result<[PageMap; 2]> {
    let stream = Stream::read(file)?;
    maps_of(file, &mapped_blocks(&stream)?)
}

fn maps_of(file: &dyn RandomRead, blocks: &[(&RamBlock, MappedBlock)]) -> Result<[PageMap; 2]> {
    Ok([memory_map(file, blocks)?, rest_map(file.size_bytes(), blocks)?])
}

fn mapped_blocks(stream: &Stream) -> Result<Vec<(&RamBlock, MappedBlock)>> {
    if stream.has("x-ignore-shared") {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "mapped-ram together with x-ignore-shared: its RAM is in other files",
        ));
    }
    let blocks: Option<Vec<_>> =
        stream.blocks.iter().map(|block| Some((block, block.mapped?))).collect();
    let blocks = blocks.ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            "the stream was not written with the capability mapped-ram",
        )
    })?;
    if let Some((block, mapped)) = blocks.iter().find(|(_, mapped)| mapped.page_bytes != PAGE_BYTES)
    {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "RAM block {:?} has pages of {} bytes; expected {PAGE_BYTES}",
                block.name, mapped.page_bytes
            ),
        ));
    }
    Ok(blocks)
}

fn rows(blocks: &[(&RamBlock, MappedBlock)]) -> Vec<MemoryRegion> {
    let mut image_offset = 0;
    blocks
        .iter()
        .map(|(block, mapped)| {
            let row = MemoryRegion {
                block: block.name.clone(),
                image_offset,
                guest_address: None,
                length: block.bytes,
                page_size: mapped.page_bytes,
                plugged: true,
            };
            image_offset += block.bytes;
            row
        })
        .collect()
}

/// The memory: pages whose bit is set.
fn memory_map(file: &dyn RandomRead, blocks: &[(&RamBlock, MappedBlock)]) -> Result<PageMap> {
    let total = blocks.iter().try_fold(0_u64, |sum, (block, _)| sum.checked_add(block.bytes));
    let mut builder =
        PageMapBuilder::new(total.ok_or_else(|| Error::corrupt("more than 16 EiB of RAM"))?)?;
    let number = builder.build_number(FILE)?;
    let mut piece = vec![0; PIECE_BYTES];
    for (block, mapped) in blocks {
        let first = mapped.pages_offset / PAGE_BYTES;
        let pages = block.bytes / PAGE_BYTES;
        let bytes = bitmap_bytes(block.bytes, PAGE_BYTES);
        let mut page = 0;
        let mut at = 0;
        while at < bytes {
            let len = usize::try_from(bytes - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            file.read_at(&mut piece[..len], mapped.bitmap_offset + at)
                .context(|| format!("the bitmap of {:?} is cut", block.name))?;
            for word in piece[..len].chunks_exact(8) {
                let mut le = [0; 8];
                le.copy_from_slice(word);
                let bits = u64::from_le_bytes(le);
                let count = (pages - page).min(64);
                let mut bit = 0;
                while bit < count {
                    let set = bits >> bit & 1 == 1;
                    let run = if set {
                        (bits >> bit).trailing_ones()
                    } else {
                        (bits >> bit).trailing_zeros()
                    };
                    let run = u64::from(run).min(count - bit);
                    let storage = first + page + bit;
                    let place = set
                        .then(|| u32::try_from(storage).map(|page| Place { build: number, page }))
                        .transpose()
                        .map_err(|_| Error::corrupt("pages past 16 TiB"))?;
                    builder.push_pages(run, place)?;
                    bit += run;
                }
                page += count;
            }
            at += len as u64;
        }
    }
    builder.finish()
}

/// The file without the pages.
fn rest_map(size_bytes: u64, blocks: &[(&RamBlock, MappedBlock)]) -> Result<PageMap> {
    let mut builder = PageMapBuilder::new(size_bytes)?;
    let number = builder.build_number(FILE)?;
    let mut push = |to: u64, zero: bool| -> Result<()> {
        let at = builder.end();
        let to = to.min(builder.pages());
        let page = u32::try_from(at).map_err(|_| Error::corrupt("a file over 16 TiB"))?;
        let place = (!zero).then_some(Place { build: number, page });
        builder.push_pages(to.saturating_sub(at), place)
    };
    for (block, mapped) in blocks {
        push(mapped.pages_offset / PAGE_BYTES, false)?;
        push((mapped.pages_offset + block.bytes) / PAGE_BYTES, true)?;
    }
    push(u64::MAX, false)?;
    builder.finish()
}

/// Page by page: of each its bit is looked at, and the file is read from the block headers on again.
#[derive(Debug)]
struct MappedReplay {
    file: Arc<StableFile>,
    /// The pages, or the file without them.
    is_memory: bool,
}

impl Replay for MappedReplay {
    fn replay(&self, compare: &mut Compare<'_>) -> Result<()> {
        let stream = Stream::read(&*self.file)?;
        let blocks = mapped_blocks(&stream)?;
        let page_len = usize::try_from(PAGE_BYTES).unwrap_or(0);
        if !self.is_memory {
            let size = self.file.size_bytes();
            compare.size(size)?;
            let mut page = vec![0; page_len];
            for at in (0..size).step_by(page_len) {
                let is_page = blocks.iter().any(|(block, mapped)| {
                    (mapped.pages_offset..mapped.pages_offset + block.bytes).contains(&at)
                });
                let len = usize::try_from((size - at).min(PAGE_BYTES)).unwrap_or(page_len);
                if is_page {
                    compare.zeros(at..at + len as u64)?;
                } else {
                    self.file.read_at(&mut page[..len], at)?;
                    compare.bytes(at, &page[..len])?;
                }
            }
            return Ok(());
        }
        compare.size(blocks.iter().map(|(block, _)| block.bytes).sum())?;
        let mut offset = 0;
        let mut page = vec![0; page_len];
        for (block, mapped) in &blocks {
            let len = bitmap_bytes(block.bytes, PAGE_BYTES);
            let mut bitmap =
                vec![0; usize::try_from(len).map_err(|_| Error::corrupt("a bitmap too long"))?];
            self.file.read_at(&mut bitmap, mapped.bitmap_offset)?;
            for (number, at) in (0..block.bytes).step_by(page_len).enumerate() {
                if bitmap[number / 8] >> (number % 8) & 1 == 1 {
                    self.file.read_at(&mut page, mapped.pages_offset + at)?;
                    compare.bytes(offset + at, &page)?;
                } else {
                    compare.zeros(offset + at..offset + at + PAGE_BYTES)?;
                }
            }
            offset += block.bytes;
        }
        Ok(())
    }
}

impl RandomRead for ImageReader {
    fn size_bytes(&self) -> u64 {
        ImageReader::size_bytes(self)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Ok(ImageReader::read_at(self, buf, offset)?)
    }

    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }
}

/// Writes a file that QEMU loads.
pub fn export(line: &Line, path: &Path, job: Job<'_>) -> Result<ExportReport> {
    let snapshot = line.newest();
    let state = snapshot.image(&ImageName::State(Name::new(STATE)?))?;
    let memory = snapshot.image(&ImageName::Memory)?;
    let stream = Stream::read(&state).context(|| format!("state/{STATE} of {}", line.name()))?;
    let blocks = mapped_blocks(&stream)?;
    let total: u64 = blocks.iter().map(|(block, _)| block.bytes).sum();
    if total != memory.size_bytes() {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "the memory of {} has {} bytes, but the RAM blocks of its state {total}",
                line.name(),
                memory.size_bytes()
            ),
        ));
    }
    let what = || format!("cannot write {}", path.display());
    let new = NewFile::create(path, Existing::Refuse, EXPORT_MODE).context(what)?;
    new.file().set_len(state.size_bytes()).context(what)?;
    job.progress.begin("export", Some(memory.size_bytes()));
    copy(&state, 0..state.size_bytes(), new.file(), 0, job)?;
    let mut offset = 0;
    for (block, mapped) in &blocks {
        let range = offset..offset + block.bytes;
        copy(&memory, range.clone(), new.file(), mapped.pages_offset, job)?;
        write_bitmap(&memory, range, new.file(), mapped)?;
        offset += block.bytes;
    }
    new.publish().context(what)?;
    let mut report = ExportReport::new(Format::MappedRam, "stream 3".to_owned(), path);
    report.is_itself(state.size_bytes());
    report.skipped(snapshot.manifest(), &["memory", "state/mapped-ram"]);
    Ok(report)
}

/// Copies what is not zero of a range of an image to `target` in a file.
pub(crate) fn copy(
    image: &ImageReader,
    range: std::ops::Range<u64>,
    file: &File,
    target: u64,
    job: Job<'_>,
) -> Result<()> {
    let runs = stored_runs(image, range.clone())?;
    for_each_piece(image, runs, job, &mut |piece, at| {
        file.write_all_at(piece, target + (at - range.start))
            .context(|| "cannot write the file".to_owned())
    })
}

fn write_bitmap(
    memory: &ImageReader,
    range: std::ops::Range<u64>,
    file: &File,
    mapped: &MappedBlock,
) -> Result<()> {
    let bytes = bitmap_bytes(range.end - range.start, mapped.page_bytes);
    let mut bitmap = vec![0_u8; usize::try_from(bytes).map_err(|_| Error::corrupt("too long"))?];
    memory.for_each_extent(range.clone(), &mut |extent| {
        if extent.source != Source::Zero {
            let first = (extent.range.start - range.start) / mapped.page_bytes;
            let last = (extent.range.end - range.start).div_ceil(mapped.page_bytes);
            for page in first..last {
                // Words are little-endian on the hosts that we run on, so bytes go up, too.
                if let Some(byte) = usize::try_from(page / 8).ok().and_then(|at| bitmap.get_mut(at))
                {
                    *byte |= 1 << (page % 8);
                }
            }
        }
        Ok(())
    })?;
    file.write_all_at(&bitmap, mapped.bitmap_offset).context(|| "cannot write a bitmap".to_owned())
}
