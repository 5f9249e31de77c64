//! The persistent copy-on-write store of the kernel's dm-snapshot target, read without the kernel.
//!
//! ```text
//! chunk 0               header: u32 magic 0x70416e53 ("SnAp"), u32 valid, u32 version 1,
//!                       u32 chunk size in sectors of 512 bytes; all little-endian
//! chunk 1 + k·(n + 1)   area k: n = chunk bytes / 16 exceptions of u64 old chunk, u64 new chunk;
//!                       the first with new chunk 0 ends them
//! the n chunks behind   their data
//! ```
//!
//! What origin chunk `old` was written with is chunk `new` of the store; every other chunk is the
//! origin's. A chunk is a multiple of 4 KiB here; smaller ones, which nobody makes, are refused.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use dormouse_store::name::{ImageName, Name};
use uuid::Uuid;

use crate::data::{MappedDevice, RandomRead, StableFile};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fields::Fields;
use crate::format::Format;
use crate::import::{Body, Found, Generation, LookOptions, NewContent};
use crate::page_map::{PAGE_BYTES, PageMap, PageMapBuilder, Place, RUNS_MAX};
use crate::verify::{Compare, Replay};

/// The first four bytes.
pub const MAGIC: u32 = 0x7041_6e53;

/// Bytes of a header that are looked at.
const HEADER_BYTES: usize = 16;

/// Bytes of an exception.
const EXCEPTION_BYTES: u64 = 16;

const SECTOR_BYTES: u64 = 512;

/// The largest chunk: an area of it is read at once.
const CHUNK_BYTES_MAX: u64 = 64 << 20;

/// Stand for the two files in the map.
const ORIGIN: Uuid = Uuid::from_u128(1);
const STORE: u128 = 2;

/// The header of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of a chunk.
    pub chunk_bytes: u64,
}

/// A chunk that was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Its number in the origin.
    pub old: u64,

    /// Where it lies in the store.
    pub new: u64,
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: &[u8]) -> Result<Header> {
        let mut fields = Fields::new(bytes, "dm-snapshot store");
        let magic = fields.u32("magic")?;
        if magic != MAGIC {
            return Err(Error::corrupt(format!(
                "dm-snapshot store at byte 0: magic {magic:#010x}; expected {MAGIC:#010x}"
            )));
        }
        if fields.u32("valid")? == 0 {
            return Err(Error::new(
                ErrorKind::Refused,
                "the dm-snapshot store is marked invalid: it ran full or could not be written to, so \
                 what its device held is lost",
            ));
        }
        let version = fields.u32("version")?;
        if version != 1 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("dm-snapshot store at byte 8: version {version}; expected 1"),
            ));
        }
        let sectors = fields.u32("chunk size")?;
        let chunk_bytes = u64::from(sectors) * SECTOR_BYTES;
        if !chunk_bytes.is_multiple_of(PAGE_BYTES)
            || !chunk_bytes.is_power_of_two()
            || chunk_bytes > CHUNK_BYTES_MAX
        {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "dm-snapshot store at byte 12: chunks of {sectors} sectors; expected a power of \
                     two from 8 to {}",
                    CHUNK_BYTES_MAX / SECTOR_BYTES
                ),
            ));
        }
        Ok(Header { chunk_bytes })
    }

    /// Exceptions of an area.
    pub fn exceptions_per_area(&self) -> u64 {
        self.chunk_bytes / EXCEPTION_BYTES
    }

    /// The chunk with the exceptions of area `number`.
    pub fn area_chunk(&self, number: u64) -> Option<u64> {
        number.checked_mul(self.exceptions_per_area() + 1)?.checked_add(1)
    }

    /// Reads the exceptions of one area, which lies at `chunk`; whether it was full, so that another
    /// one follows.
    pub fn parse_area(
        &self,
        bytes: &[u8],
        chunk: u64,
        chunks: u64,
        exceptions: &mut Vec<Exception>,
    ) -> Result<bool> {
        let origin = chunk.saturating_mul(self.chunk_bytes);
        let mut fields = Fields::at_origin(bytes, "dm-snapshot store", origin);
        for _ in 0..self.exceptions_per_area() {
            let at = fields.clone();
            let old = fields.u64("old chunk")?;
            let new = fields.u64("new chunk")?;
            if new == 0 {
                return Ok(false);
            }
            if new >= chunks {
                return Err(at.corrupt(format_args!(
                    "chunk {old} lies at chunk {new}; the store has {chunks}"
                )));
            }
            if new % (self.exceptions_per_area() + 1) == 1 {
                return Err(at.corrupt(format_args!(
                    "chunk {old} lies at chunk {new}, which has exceptions and no data"
                )));
            }
            exceptions.push(Exception { old, new });
        }
        Ok(true)
    }
}

/// Reads all exceptions of a store, sorted by origin chunk.
pub fn read_exceptions(store: &dyn RandomRead) -> Result<(Header, Vec<Exception>)> {
    let len = store.size_bytes().min(HEADER_BYTES as u64);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(HEADER_BYTES)];
    store.read_at(&mut bytes, 0)?;
    let header = Header::parse(&bytes)?;
    let chunks = store.size_bytes() / header.chunk_bytes;
    let mut exceptions = Vec::new();
    let mut area = vec![0; usize::try_from(header.chunk_bytes).unwrap_or(0)];
    for number in 0.. {
        // The kernel wipes the next area before it takes a full one for done, so a store that ends
        // where an area should begin was cut, and what was written later is missing.
        let chunk = header.area_chunk(number).filter(|&chunk| chunk < chunks).ok_or_else(|| {
            Error::corrupt(format!(
                "the store ends after {chunks} chunks of {} bytes; expected area {number} of \
                 exceptions behind them",
                header.chunk_bytes
            ))
        })?;
        store.read_at(&mut area, chunk * header.chunk_bytes)?;
        if !header.parse_area(&area, chunk, chunks, &mut exceptions)? {
            break;
        }
        if exceptions.len() > RUNS_MAX {
            return Err(Error::corrupt(format!("more than {RUNS_MAX} exceptions")));
        }
    }
    exceptions.sort_unstable_by_key(|exception| exception.old);
    if let Some(pair) = exceptions.windows(2).find(|pair| pair[0].old == pair[1].old) {
        return Err(Error::corrupt(format!(
            "chunk {} of the origin lies at chunk {} and at chunk {} of the store",
            pair[0].old, pair[0].new, pair[1].new
        )));
    }
    Ok((header, exceptions))
}

/// The device that a store makes of an origin of `size_bytes`.
pub fn device_map(header: Header, exceptions: &[Exception], size_bytes: u64) -> Result<PageMap> {
    store_map(header, exceptions, size_bytes, Uuid::from_u128(STORE))
}

fn store_map(
    header: Header,
    exceptions: &[Exception],
    size_bytes: u64,
    store: Uuid,
) -> Result<PageMap> {
    let mut builder = PageMapBuilder::new(size_bytes)?;
    let chunk_pages = header.chunk_bytes / PAGE_BYTES;
    let origin = builder.build_number(ORIGIN)?;
    let store = builder.build_number(store)?;
    let page32 = |page: u64| {
        u32::try_from(page).map_err(|_| Error::corrupt(format!("page {page} is past 16 TiB")))
    };
    for exception in exceptions {
        let start = exception.old.checked_mul(chunk_pages).filter(|&start| start < builder.pages());
        let Some(start) = start else {
            return Err(Error::corrupt(format!(
                "chunk {} was written to, but the origin has {} bytes: is it another one?",
                exception.old, size_bytes
            )));
        };
        let at = builder.end();
        builder.push_pages(start - at, Some(Place { build: origin, page: page32(at)? }))?;
        let pages = chunk_pages.min(builder.pages() - start);
        let page = exception.new.saturating_mul(chunk_pages);
        builder.push_pages(pages, Some(Place { build: store, page: page32(page)? }))?;
    }
    let at = builder.end();
    let rest = builder.pages() - at;
    builder.push_pages(
        rest,
        Some(Place { build: origin, page: page32(at.min(u64::from(u32::MAX)))? }),
    )?;
    builder.finish()
}

/// A disk that is a store over an origin.
#[derive(Debug)]
pub(crate) struct CowDisk {
    pub(crate) content: NewContent,

    /// Bytes of chunks that were written to.
    pub(crate) changed_bytes: u64,

    /// Of what the disk is made.
    pub(crate) map: Arc<PageMap>,

    /// What it lies over.
    pub(crate) origin: Arc<StableFile>,
}

/// The disk that a store over an origin is. With the one of the generation before, which lies over
/// the same origin, what neither has written to is not read: it is the origin's in both. What is in
/// the stores is, as a chunk that is written to again stays where it is.
pub(crate) fn disk(
    image: ImageName,
    cow: StableFile,
    origin: StableFile,
    before: Option<&CowDisk>,
) -> Result<CowDisk> {
    let (header, exceptions) =
        read_exceptions(&cow).context(|| format!("{} is damaged", cow.label()))?;
    let before = before.filter(|before| before.origin.is_one_with(&origin));
    let store_id = Uuid::from_u128(match before {
        // No place in this store is the same as one in another.
        Some(before) => 1 + before.map.builds().iter().map(Uuid::as_u128).max().unwrap_or(STORE),
        None => STORE,
    });
    let map = store_map(header, &exceptions, RandomRead::size_bytes(&origin), store_id)
        .context(|| format!("{} does not fit {}", cow.label(), origin.label()))?;
    let (map, cow, origin) = (Arc::new(map), Arc::new(cow), Arc::new(origin));
    let replay = CowReplay { store: Arc::clone(&cow), origin: Arc::clone(&origin) };
    let device = Arc::new(MappedDevice::new(
        cow.label().to_owned(),
        Arc::clone(&map),
        vec![Arc::clone(&origin) as Arc<dyn RandomRead>, cow],
        before.map(|before| Arc::clone(&before.map)),
    )?);
    let body = if before.is_some() { Body::Changes(device) } else { Body::Whole(device) };
    let content = NewContent { image, body, replay: Some(Box::new(replay)) };
    let changed_bytes = exceptions.len() as u64 * header.chunk_bytes;
    Ok(CowDisk { content, changed_bytes, map, origin })
}

/// Chunk by chunk: each is looked up in a table of what the store says, which is read again.
#[derive(Debug)]
struct CowReplay {
    store: Arc<StableFile>,
    origin: Arc<StableFile>,
}

impl Replay for CowReplay {
    fn replay(&self, compare: &mut Compare<'_>) -> Result<()> {
        let number = |bytes: &[u8], at: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(number)
        };
        let mut head = [0; 16];
        RandomRead::read_at(&*self.store, &mut head, 0)?;
        let chunk_bytes = (number(&head, 8) >> 32) * SECTOR_BYTES;
        let mut buf = vec![0; usize::try_from(chunk_bytes).unwrap_or(0)];
        let mut places: HashMap<u64, u64> = HashMap::new();
        let mut area = 1;
        'areas: loop {
            RandomRead::read_at(&*self.store, &mut buf, area * chunk_bytes)?;
            for exception in buf.chunks_exact(16) {
                let (old, new) = (number(exception, 0), number(exception, 8));
                if new == 0 {
                    break 'areas;
                }
                places.insert(old, new);
            }
            area += 1 + chunk_bytes / EXCEPTION_BYTES;
        }
        let size = RandomRead::size_bytes(&*self.origin);
        compare.size(size)?;
        for chunk in 0..size.div_ceil(chunk_bytes) {
            let at = chunk * chunk_bytes;
            let len = usize::try_from((size - at).min(chunk_bytes)).unwrap_or(0);
            match places.get(&chunk) {
                Some(&new) => {
                    RandomRead::read_at(&*self.store, &mut buf[..len], new * chunk_bytes)?;
                }
                None => RandomRead::read_at(&*self.origin, &mut buf[..len], at)?,
            }
            compare.bytes(at, &buf[..len])?;
        }
        Ok(())
    }
}

/// Looks at a store; the origin must be given.
pub fn look(path: &Path, options: &LookOptions) -> Result<Found> {
    let origin = options.origin.as_deref().ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{} lies over a disk that it does not name: give --origin FILE",
                path.display()
            ),
        )
    })?;
    let name = options.disk.clone().map_or_else(|| Name::new("root"), Ok)?;
    let (cow, base) = (StableFile::open(path)?, StableFile::open(origin)?);
    let CowDisk { content, changed_bytes: changed, .. } =
        disk(ImageName::Disk(name), cow, base, None)?;
    let mut generation = Generation::new(path.display().to_string());
    generation.images.push(content);
    Ok(Found {
        format: Format::DmSnapshot,
        version: "1".to_owned(),
        generations: vec![generation],
        notes: vec![format!("{changed} bytes of chunks lie over {}", origin.display())],
        is_whole: false,
        base: None,
    })
}
