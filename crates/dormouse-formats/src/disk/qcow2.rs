//! Writing qcow2 of version 3 with clusters in zstd.
//!
//! ```text
//! cluster 0          header of 112 bytes; incompatible bit 3: the compression type is given (1, zstd)
//! from cluster 1     compressed clusters, packed behind each other
//! then, each from a cluster on: tables of level 2, level 1, refcount blocks, refcount table
//! ```
//!
//! A cluster is 64 KiB. An entry of level 2 for a compressed one has bit 62, the byte where it begins
//! (54 bits), and how many sectors of 512 bytes more than the first it touches. Clusters of zeros
//! have no entry. The file is written from front to back, but for the header at the end.

use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use dormouse_image::map::Source;
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::reader::{EXPORT_MODE, ImageReader};
use dormouse_sys::publish::{Existing, NewFile};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::export::{ExportReport, ExportRequest, Line};
use crate::format::Format;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
const L2_ENTRIES: u64 = CLUSTER / 8;
const REFCOUNTS_PER_BLOCK: u64 = CLUSTER / 2;
const COMPRESSED: u64 = 1 << 62;
const COPIED: u64 = 1 << 63;
/// Bits of a compressed cluster's place: the rest counts its sectors.
const PLACE_BITS: u32 = 62 - (CLUSTER_BITS - 8);
const LEVEL: i32 = 3;

/// Writes the disk of a snapshot.
pub fn export(
    line: &Line,
    path: &Path,
    request: &ExportRequest,
    job: Job<'_>,
) -> Result<ExportReport> {
    let snapshot = line.newest();
    let image = match &request.disk {
        Some(disk) => ImageName::Disk(Name::new(disk.as_str())?),
        None => {
            let mut disks = snapshot.manifest().images.iter().filter(|entry| entry.image.is_disk());
            match (disks.next(), disks.next()) {
                (Some(only), None) => only.image.clone(),
                _ => {
                    return Err(Error::new(
                        ErrorKind::InvalidInput,
                        format!("{} has not just one disk: say which with --disk ID", line.name()),
                    ));
                }
            }
        }
    };
    let what = || format!("cannot write {}", path.display());
    let reader = snapshot.image(&image)?;
    let new = NewFile::create(path, Existing::Refuse, EXPORT_MODE).context(what)?;
    let file = new.file().try_clone().context(what)?;
    let mut writer =
        Writer { sink: BufWriter::with_capacity(1 << 20, file), at: CLUSTER, refcounts: vec![1] };
    let len = writer.disk(&reader, job).context(what)?;
    drop(writer);
    new.publish().context(what)?;
    let mut report = ExportReport::new(Format::Qcow2, "3, zstd".to_owned(), path);
    report.is_itself(len);
    report.skipped(snapshot.manifest(), &[image.to_string().as_str()]);
    Ok(report)
}

struct Writer {
    sink: BufWriter<std::fs::File>,
    at: u64,
    /// By cluster of the file.
    refcounts: Vec<u16>,
}

impl Writer {
    fn disk(&mut self, image: &ImageReader, job: Job<'_>) -> Result<u64> {
        // A length in whole sectors is all that QEMU knows.
        let size = image.size_bytes().next_multiple_of(512);
        job.progress.begin("export", Some(size));
        self.seek(CLUSTER)?;
        let clusters = size.div_ceil(CLUSTER);
        let tables = clusters.div_ceil(L2_ENTRIES);
        let mut level2: Vec<Option<Vec<u64>>> = Vec::new();
        for table in 0..tables {
            job.check()?;
            let entries = self.clusters_of(image, table * L2_ENTRIES, job)?;
            level2.push(entries.iter().any(|&entry| entry != 0).then_some(entries));
        }
        self.align()?;
        let mut level1 = Vec::new();
        for entries in level2 {
            match entries {
                None => level1.push(0),
                Some(entries) => {
                    level1.push(self.at | COPIED);
                    self.table(&entries)?;
                }
            }
        }
        let level1_offset = self.at;
        // An empty disk has a table, too.
        let level1_len = level1.len().max(1);
        level1.resize(level1_len, 0);
        self.table(&level1)?;
        let (table_offset, table_clusters) = self.refcount_tables()?;
        let len = self.at;
        self.header(size, level1_len, level1_offset, table_offset, table_clusters)?;
        self.sink.flush().context(|| "cannot write".to_owned())?;
        Ok(len)
    }

    /// Writes the clusters that one table of level 2 is of, and returns its entries.
    fn clusters_of(&mut self, image: &ImageReader, first: u64, job: Job<'_>) -> Result<Vec<u64>> {
        let mut entries = vec![0; usize::try_from(L2_ENTRIES).unwrap_or(0)];
        let range = first * CLUSTER..((first + L2_ENTRIES) * CLUSTER).min(image.size_bytes());
        let mut wanted: Vec<u64> = Vec::new();
        image.for_each_extent(range, &mut |extent| {
            if extent.source != Source::Zero {
                // Two extents may lie in one cluster.
                let next = wanted.last().map_or(0, |last| last + 1);
                wanted.extend(
                    (extent.range.start / CLUSTER).max(next)..extent.range.end.div_ceil(CLUSTER),
                );
            }
            Ok(())
        })?;
        let mut compressor =
            zstd::bulk::Compressor::new(LEVEL).context(|| "cannot compress".to_owned())?;
        let mut buf = vec![0; usize::try_from(CLUSTER).unwrap_or(0)];
        for cluster in wanted {
            let at = cluster * CLUSTER;
            let there = usize::try_from((image.size_bytes() - at).min(CLUSTER)).unwrap_or(0);
            buf[there..].fill(0);
            image.read_at(&mut buf[..there], at)?;
            let packed = compressor.compress(&buf).context(|| "cannot compress".to_owned())?;
            let entry = if (packed.len() as u64) < CLUSTER {
                let place = self.at;
                let last = place + packed.len() as u64 - 1;
                let sectors = (last >> 9) - (place >> 9);
                self.write(&packed)?;
                (place / CLUSTER..=last / CLUSTER).for_each(|cluster| self.count(cluster));
                COMPRESSED | sectors << PLACE_BITS | place
            } else {
                self.align()?;
                let place = self.at;
                self.write(&buf)?;
                self.count(place >> CLUSTER_BITS);
                COPIED | place
            };
            if let Some(slot) =
                usize::try_from(cluster - first).ok().and_then(|at| entries.get_mut(at))
            {
                *slot = entry;
            }
            job.progress.advance(CLUSTER);
        }
        Ok(entries)
    }

    fn count(&mut self, cluster: u64) {
        let cluster = usize::try_from(cluster).unwrap_or(usize::MAX);
        if cluster >= self.refcounts.len() {
            self.refcounts.resize(cluster + 1, 0);
        }
        // A cluster of 64 KiB holds far fewer parts of others than 16 bits count.
        self.refcounts[cluster] = self.refcounts[cluster].saturating_add(1);
    }

    /// Writes the refcount blocks and their table, which count themselves, too.
    fn refcount_tables(&mut self) -> Result<(u64, u64)> {
        let used = self.at / CLUSTER;
        let (mut blocks, mut table) = (1, 1);
        loop {
            let total = used + blocks + table;
            let need = total.div_ceil(REFCOUNTS_PER_BLOCK);
            let need_table = (need * 8).div_ceil(CLUSTER);
            if need <= blocks && need_table <= table {
                break;
            }
            (blocks, table) = (need.max(blocks), need_table.max(table));
        }
        let first = self.at;
        for cluster in used..used + blocks + table {
            self.count(cluster);
        }
        let counts = std::mem::take(&mut self.refcounts);
        let per_block = usize::try_from(REFCOUNTS_PER_BLOCK).unwrap_or(1);
        let mut bytes = Vec::new();
        for block in 0..usize::try_from(blocks).unwrap_or(0) {
            bytes.clear();
            for count in counts.iter().skip(block * per_block).take(per_block) {
                bytes.extend(count.to_be_bytes());
            }
            bytes.resize(per_block * 2, 0);
            self.write(&bytes)?;
        }
        let offset = self.at;
        let places: Vec<u64> = (0..blocks).map(|block| first + block * CLUSTER).collect();
        self.numbers(&places)?;
        // What the loop reserved and the numbers did not fill.
        while self.at < offset + table * CLUSTER {
            self.write(&[0; 4096])?;
        }
        Ok((offset, table))
    }

    fn header(
        &mut self,
        size: u64,
        level1_len: usize,
        level1_offset: u64,
        table_offset: u64,
        table_clusters: u64,
    ) -> Result<()> {
        let too_long = || Error::new(ErrorKind::Unsupported, "a disk too long for qcow2");
        let narrow = |number: u64| u32::try_from(number).map_err(|_| too_long());
        let mut header = b"QFI\xfb".to_vec();
        header.extend(3_u32.to_be_bytes());
        header.extend([0; 12]);
        header.extend(CLUSTER_BITS.to_be_bytes());
        header.extend(size.to_be_bytes());
        header.extend(0_u32.to_be_bytes());
        header.extend(u32::try_from(level1_len).map_err(|_| too_long())?.to_be_bytes());
        header.extend(level1_offset.to_be_bytes());
        header.extend(table_offset.to_be_bytes());
        header.extend(narrow(table_clusters)?.to_be_bytes());
        header.extend([0; 12]);
        header.extend((1_u64 << 3).to_be_bytes());
        header.extend([0; 16]);
        header.extend(4_u32.to_be_bytes());
        header.extend(112_u32.to_be_bytes());
        // Compression type 1 is zstd; then padding and the end of the extensions.
        header.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        header.extend([0; 8]);
        self.seek(0)?;
        header.resize(usize::try_from(CLUSTER).unwrap_or(0), 0);
        self.write(&header)
    }

    fn numbers(&mut self, numbers: &[u64]) -> Result<()> {
        let mut bytes = Vec::with_capacity(numbers.len() * 8);
        numbers.iter().for_each(|number| bytes.extend(number.to_be_bytes()));
        self.write(&bytes)?;
        self.align()
    }

    /// Writes a table and counts its clusters.
    fn table(&mut self, numbers: &[u64]) -> Result<()> {
        let first = self.at / CLUSTER;
        self.numbers(numbers)?;
        (first..self.at / CLUSTER).for_each(|cluster| self.count(cluster));
        Ok(())
    }

    fn align(&mut self) -> Result<()> {
        let padding = self.at.next_multiple_of(CLUSTER) - self.at;
        self.write(&vec![0; usize::try_from(padding).unwrap_or(0)])
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.sink.write_all(bytes).context(|| "cannot write".to_owned())?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn seek(&mut self, to: u64) -> Result<()> {
        self.sink.seek(SeekFrom::Start(to)).context(|| "cannot seek".to_owned())?;
        self.at = to;
        Ok(())
    }
}
