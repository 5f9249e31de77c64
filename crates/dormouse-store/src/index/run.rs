//! A run: sorted entries, and in front of them a filter.
//!
//! ```text
//! entries     n × (prefix u64, pack u32, slot u32), ascending by prefix
//! packs       p × 16 bytes
//! buckets     (b + 1) × u32, the first entry of each bucket; a prefix's bucket is ⌊prefix × b / 2⁶⁴⌋
//! filter      f × 32 bytes
//! footer      64 bytes: magic, version, n, p, b, f, checksums
//! ```
//!
//! All little-endian. The last three parts have one checksum and are read at once, the filter only
//! while the memory budget lasts; entries have another that is checked when runs are merged. A
//! prefix is the first half of a digest; whether the whole digest is meant, the pack tells.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dormouse_image::digest::{Digest, checksum};
use dormouse_image::pack::PackId;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::filter::{self, FilterBuilder};
use crate::disk::{Disk, DiskFile, DiskWriter};
use crate::error::{Context, Error, ErrorKind, Result};

const MAGIC: [u8; 8] = *b"\x89DMindx\n";
const VERSION: u16 = 1;
const FOOTER_BYTES: u64 = 64;

/// Bytes of an entry.
pub(super) const ENTRY_BYTES: usize = 16;

/// A bucket is read at once: 64 entries are a kilobyte, a third of what a page holds.
const BUCKET_ENTRIES: u64 = 64;

/// How much of a filter is read at once.
const FILTER_PIECE_BYTES: u64 = 4 << 20;

/// Entries of a run: their numbers have 32 bits.
const ENTRIES_MAX: u64 = u32::MAX as u64;

/// The longest bucket that is read: digests are spread evenly, so a longer one is damage or
/// somebody's attempt to make us allocate.
const BUCKET_ENTRIES_MAX: u64 = 64 << 10;

/// A place where a block may be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IndexHit {
    /// The pack.
    pub pack: PackId,

    /// The slot in it.
    pub slot: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFooter {
    magic: [u8; 8],
    version: U16,
    reserved: U16,
    packs: U32,
    entries: U64,
    buckets: U32,
    filter_blocks: U32,
    entries_checksum: U64,
    meta_checksum: U64,
    unused: U64,
    checksum: U64,
}

const _: () = assert!(size_of::<RawFooter>() as u64 == FOOTER_BYTES);

/// An open run.
#[derive(Debug)]
pub struct IndexRun {
    path: String,
    file: Arc<dyn DiskFile>,
    packs: Vec<PackId>,
    buckets: Vec<u32>,
    filter_blocks: u64,
    /// Where the filter lies in the file, for when it is not in memory.
    filter_offset: u64,
    filter: Option<Vec<u8>>,
    entries: u64,
    entries_checksum: u64,
    /// Whether somebody was told that the run cannot be read.
    failed: AtomicBool,
}

impl IndexRun {
    /// Opens a run; its filter is kept in memory if it fits in `filter_bytes`.
    pub fn open(disk: &dyn Disk, path: &str, filter_bytes: u64) -> Result<IndexRun> {
        let file = disk.open(path).context(|| format!("cannot open {path}"))?;
        let read = |offset: u64, len: u64| -> Result<Vec<u8>> {
            let len = usize::try_from(len).map_err(|_| damaged(path, "a length"))?;
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, offset).context(|| format!("cannot read {path}"))?;
            Ok(bytes)
        };
        let footer_at =
            file.len().checked_sub(FOOTER_BYTES).ok_or_else(|| damaged(path, "its length"))?;
        let footer_bytes = read(footer_at, FOOTER_BYTES)?;
        let footer =
            RawFooter::ref_from_bytes(&footer_bytes).map_err(|_| damaged(path, "its footer"))?;
        if footer.magic != MAGIC || footer.checksum.get() != checksum(&[&footer_bytes[..56]]) {
            return Err(damaged(path, "its footer"));
        }
        if footer.version.get() != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{path} has version {}, this build knows {VERSION}", footer.version),
            ));
        }
        if footer.reserved.get() != 0 || footer.unused.get() != 0 {
            return Err(damaged(path, "its footer"));
        }
        let (entries, packs) = (footer.entries.get(), u64::from(footer.packs.get()));
        let buckets = u64::from(footer.buckets.get()) + 1;
        let filter_blocks = u64::from(footer.filter_blocks.get());
        let meta_at = entries
            .checked_mul(ENTRY_BYTES as u64)
            .filter(|_| entries <= ENTRIES_MAX)
            .ok_or_else(|| damaged(path, "its footer"))?;
        let small = packs * 16 + buckets * 4;
        let filter_len = filter_blocks * filter::BLOCK_BYTES as u64;
        if meta_at + small + filter_len != footer_at || filter_blocks == 0 || buckets < 2 {
            return Err(damaged(path, "its footer"));
        }
        let head = read(meta_at, small)?;
        let mut sum = Summer::default();
        sum.add(&head);
        // A filter that is not kept is checked in pieces, so that it is never in memory whole.
        let mut filter = (filter_len <= filter_bytes).then(Vec::new);
        let mut at = 0;
        while at < filter_len {
            let piece = read(meta_at + small + at, FILTER_PIECE_BYTES.min(filter_len - at))?;
            sum.add(&piece);
            at += piece.len() as u64;
            if let Some(filter) = &mut filter {
                filter.extend_from_slice(&piece);
            }
        }
        if sum.finish() != footer.meta_checksum.get() {
            return Err(damaged(path, "its filter or directory"));
        }
        let (ids, rest) =
            head.split_at(head.len() - usize::try_from(buckets * 4).unwrap_or(head.len()));
        let buckets: Vec<u32> =
            rest.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        let ascending = buckets.windows(2).all(|pair| pair[0] <= pair[1]);
        if !ascending || buckets.last().map(|&last| u64::from(last)) != Some(entries) {
            return Err(damaged(path, "its directory"));
        }
        Ok(IndexRun {
            path: path.to_owned(),
            packs: ids.as_chunks::<16>().0.iter().map(|id| PackId(*id)).collect(),
            buckets,
            filter_blocks,
            filter_offset: meta_at + small,
            filter,
            entries,
            entries_checksum: footer.entries_checksum.get(),
            failed: AtomicBool::new(false),
            file,
        })
    }

    /// The path in the store.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The packs whose blocks are in the run.
    pub fn packs(&self) -> &[PackId] {
        &self.packs
    }

    /// How many entries there are.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// The file's length.
    pub(super) fn file_bytes(&self) -> u64 {
        self.file.len()
    }

    /// Bytes that the run holds in memory.
    pub fn resident_bytes(&self) -> u64 {
        (self.filter.as_ref().map_or(0, Vec::len) + self.buckets.len() * 4 + self.packs.len() * 16)
            as u64
    }

    /// Calls `visit` with the places where a block with this digest may be.
    pub fn lookup(&self, digest: &Digest, visit: &mut dyn FnMut(IndexHit)) -> Result<()> {
        let prefix = digest.prefix();
        if !self.may_hold(prefix)? {
            return Ok(());
        }
        let buckets = self.buckets.len() as u64 - 1;
        let bucket = filter::block_of(prefix, buckets);
        let (first, end) = (u64::from(self.buckets[bucket]), u64::from(self.buckets[bucket + 1]));
        if end - first > BUCKET_ENTRIES_MAX {
            return Err(damaged(&self.path, "its directory"));
        }
        let mut small = [0_u8; 4096];
        let mut large;
        let len = usize::try_from(end - first).unwrap_or(0) * ENTRY_BYTES;
        let bytes = if len <= small.len() {
            &mut small[..len]
        } else {
            large = vec![0; len];
            &mut large[..]
        };
        self.file
            .read_exact_at(bytes, first * ENTRY_BYTES as u64)
            .context(|| format!("cannot read {}", self.path))?;
        let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
        let begin = entries.partition_point(|entry| entry_of(entry).0 < prefix);
        for entry in &entries[begin..] {
            let (found, pack, slot) = entry_of(entry);
            if found != prefix {
                break;
            }
            if let Some(&pack) = self.packs.get(pack as usize) {
                visit(IndexHit { pack, slot });
            }
        }
        Ok(())
    }

    /// Calls `visit` with every entry, prefix and place, in order. Fails if they are damaged, which
    /// may be known only at the end.
    pub fn for_each(&self, visit: &mut dyn FnMut(u64, IndexHit) -> Result<()>) -> Result<()> {
        let mut scan = self.scan();
        while let Some((prefix, hit)) = scan.next()? {
            visit(prefix, hit)?;
        }
        Ok(())
    }

    /// True for the first failed lookup: whoever asks a million times is told once.
    pub(super) fn is_first_failure(&self) -> bool {
        !self.failed.swap(true, Ordering::Relaxed)
    }

    fn may_hold(&self, prefix: u64) -> Result<bool> {
        let at = filter::block_of(prefix, self.filter_blocks) * filter::BLOCK_BYTES;
        let mut block = [0; filter::BLOCK_BYTES];
        match &self.filter {
            Some(filter) => block.copy_from_slice(&filter[at..][..filter::BLOCK_BYTES]),
            None => self
                .file
                .read_exact_at(&mut block, self.filter_offset + at as u64)
                .context(|| format!("cannot read {}", self.path))?,
        }
        Ok(filter::may_hold(&block, prefix))
    }

    /// Reads the entries in order, a stretch at a time, and checks their checksum at the end.
    pub(super) fn scan(&self) -> RunScan<'_> {
        RunScan {
            run: self,
            next: 0,
            buffer: Vec::new(),
            position: 0,
            sum: Summer::default(),
            last: 0,
        }
    }
}

/// The entries of a run in order.
#[derive(Debug)]
pub(super) struct RunScan<'a> {
    run: &'a IndexRun,
    next: u64,
    buffer: Vec<u8>,
    position: usize,
    sum: Summer,
    last: u64,
}

/// Entries that a scan reads at once.
const SCAN_ENTRIES: u64 = 4096;

impl RunScan<'_> {
    /// The next entry: prefix, place.
    pub(super) fn next(&mut self) -> Result<Option<(u64, IndexHit)>> {
        if self.position == self.buffer.len() {
            let count = SCAN_ENTRIES.min(self.run.entries - self.next);
            if count == 0 {
                if std::mem::take(&mut self.sum).finish() != self.run.entries_checksum {
                    return Err(damaged(&self.run.path, "its entries"));
                }
                return Ok(None);
            }
            let len = usize::try_from(count).unwrap_or(0) * ENTRY_BYTES;
            self.buffer.resize(len, 0);
            self.run
                .file
                .read_exact_at(&mut self.buffer, self.next * ENTRY_BYTES as u64)
                .context(|| format!("cannot read {}", self.run.path))?;
            self.sum.add(&self.buffer);
            self.next += count;
            self.position = 0;
        }
        let (entries, _) = self.buffer[self.position..].as_chunks::<ENTRY_BYTES>();
        let (prefix, pack, slot) = entry_of(&entries[0]);
        self.position += ENTRY_BYTES;
        let Some(&pack) = self.run.packs.get(pack as usize) else {
            return Err(damaged(&self.run.path, "its entries"));
        };
        if prefix < self.last {
            return Err(damaged(&self.run.path, "its entries"));
        }
        self.last = prefix;
        Ok(Some((prefix, IndexHit { pack, slot })))
    }
}

/// Writes a run from entries that come in order.
pub struct RunWriter {
    file: Box<dyn DiskWriter>,
    path: String,
    buffer: Vec<u8>,
    packs: Vec<PackId>,
    numbers: std::collections::HashMap<PackId, u32>,
    filter: FilterBuilder,
    buckets: Vec<u32>,
    entries: u64,
    last: u64,
    sum: Summer,
}

impl std::fmt::Debug for RunWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunWriter").field("path", &self.path).finish_non_exhaustive()
    }
}

impl RunWriter {
    /// Begins a run of at most `entries` entries in a new file. `packs` are covered even if none
    /// of their blocks come.
    pub fn create(
        disk: &dyn Disk,
        path: &str,
        entries: u64,
        packs: &[PackId],
    ) -> Result<RunWriter> {
        if entries > ENTRIES_MAX {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{entries} entries in one index run, at most {ENTRIES_MAX}"),
            ));
        }
        let buckets = entries.div_ceil(BUCKET_ENTRIES).max(1);
        let mut writer = RunWriter {
            file: disk.create(path).context(|| format!("cannot make {path}"))?,
            path: path.to_owned(),
            buffer: Vec::with_capacity(WRITE_BYTES),
            packs: Vec::new(),
            numbers: std::collections::HashMap::new(),
            filter: FilterBuilder::new(entries),
            buckets: vec![0; usize::try_from(buckets + 1).unwrap_or(usize::MAX)],
            entries: 0,
            last: 0,
            sum: Summer::default(),
        };
        packs.iter().for_each(|&pack| {
            writer.number(pack);
        });
        Ok(writer)
    }

    /// Appends an entry.
    ///
    /// # Panics
    ///
    /// If `prefix` is below that of the entry before.
    pub fn push(&mut self, prefix: u64, hit: IndexHit) -> Result<()> {
        assert!(prefix >= self.last, "entries come in order");
        self.last = prefix;
        let pack = self.number(hit.pack);
        self.buffer.extend(prefix.to_le_bytes());
        self.buffer.extend(pack.to_le_bytes());
        self.buffer.extend(hit.slot.to_le_bytes());
        self.filter.insert(prefix);
        let bucket = filter::block_of(prefix, self.buckets.len() as u64 - 1);
        self.buckets[bucket + 1] += 1;
        self.entries += 1;
        if self.buffer.len() >= WRITE_BYTES { self.flush() } else { Ok(()) }
    }

    /// Ends the run and makes it durable, for one that takes the place of others.
    pub fn finish_durably(mut self) -> Result<u64> {
        let bytes = self.write_end()?;
        self.file.sync().context(|| format!("cannot sync {}", self.path))?;
        Ok(bytes)
    }

    /// Ends the run. It is not made durable: a run that is lost or torn is noticed and made again.
    pub fn finish(mut self) -> Result<u64> {
        self.write_end()
    }

    fn write_end(&mut self) -> Result<u64> {
        self.flush()?;
        let mut total = 0_u32;
        for bucket in &mut self.buckets {
            total += *bucket;
            *bucket = total;
        }
        let filter_blocks = self.filter.blocks();
        let mut meta: Vec<u8> = self.packs.iter().flat_map(|pack| pack.0).collect();
        meta.extend(self.buckets.iter().flat_map(|bucket| bucket.to_le_bytes()));
        meta.extend(self.filter.to_bytes());
        let number = |value: u64| u32::try_from(value).expect("limited by create");
        let mut footer = RawFooter {
            magic: MAGIC,
            version: VERSION.into(),
            reserved: U16::ZERO,
            packs: number(self.packs.len() as u64).into(),
            entries: self.entries.into(),
            buckets: number(self.buckets.len() as u64 - 1).into(),
            filter_blocks: number(filter_blocks).into(),
            entries_checksum: std::mem::take(&mut self.sum).finish().into(),
            meta_checksum: checksum(&[&meta]).into(),
            unused: U64::ZERO,
            checksum: U64::ZERO,
        };
        footer.checksum = checksum(&[&footer.as_bytes()[..56]]).into();
        meta.extend(footer.as_bytes());
        self.file.write_all(&meta).context(|| format!("cannot write {}", self.path))?;
        Ok(self.entries * ENTRY_BYTES as u64 + meta.len() as u64)
    }

    fn flush(&mut self) -> Result<()> {
        self.sum.add(&self.buffer);
        self.file.write_all(&self.buffer).context(|| format!("cannot write {}", self.path))?;
        self.buffer.clear();
        Ok(())
    }

    fn number(&mut self, pack: PackId) -> u32 {
        *self.numbers.entry(pack).or_insert_with(|| {
            self.packs.push(pack);
            u32::try_from(self.packs.len() - 1).expect("fewer packs than entries and 2^32")
        })
    }
}

const WRITE_BYTES: usize = 256 << 10;

/// A checksum over bytes that come in pieces.
#[derive(Default)]
struct Summer(twox_hash::XxHash3_64);

impl std::fmt::Debug for Summer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Summer")
    }
}

impl Summer {
    fn add(&mut self, bytes: &[u8]) {
        std::hash::Hasher::write(&mut self.0, bytes);
    }

    fn finish(self) -> u64 {
        std::hash::Hasher::finish(&self.0)
    }
}

fn entry_of(entry: &[u8; ENTRY_BYTES]) -> (u64, u32, u32) {
    let (prefix, rest) = entry.split_at(8);
    let (pack, slot) = rest.split_at(4);
    let four = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let (low, high) = (four(&prefix[..4]), four(&prefix[4..]));
    (u64::from(low) | u64::from(high) << 32, four(pack), four(slot))
}

fn damaged(path: &str, part: &str) -> Error {
    Error::with_source(
        ErrorKind::Corrupt,
        format!("{path} is damaged"),
        io::Error::new(io::ErrorKind::InvalidData, format!("{part} is not what it should be")),
    )
}
