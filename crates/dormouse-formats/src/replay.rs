//! The second way to a device that is made of builds' data: each data file from its first byte to
//! its last, decoded as one stream, and each record where it comes by. The header is read again, too,
//! by other code than the import's.

mod plain_header;

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;

use dormouse_image::block::BLOCK_BYTES;
use lz4_flex::frame::FrameDecoder;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::data::{RandomRead, StableFile};
use crate::error::{Context, Error, Result};
use crate::page_map::{PAGE_BYTES, PageMap};
use crate::verify::{Compare, Replay};
use plain_header::{PlainHeader, PlainRecord};

/// Bytes looked at at once; whole pages.
const PIECE_BYTES: usize = 1 << 20;

/// How a data file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataCodec {
    /// Not at all.
    Plain,

    /// Frames of zstd, one behind the other.
    Zstd,

    /// Frames of LZ4, one behind the other.
    Lz4,
}

/// A build's data file.
#[derive(Clone, Debug)]
pub(crate) struct StoredFile {
    pub(crate) build: Uuid,
    pub(crate) file: Arc<StableFile>,
    pub(crate) codec: DataCodec,
    /// SHA-256 of the bytes when decoded, where the header has it.
    pub(crate) sha256: Option<[u8; 32]>,
}

/// Where a header is read again.
#[derive(Debug)]
pub(crate) enum HeaderSource {
    /// A file of at most so many bytes.
    File(Arc<StableFile>, u64),

    /// There is none: the device is a build's data of this length as it is.
    None(Uuid, u64),
}

/// All records of a header, in the order of their builds' files.
#[derive(Debug)]
pub(crate) struct StoredReplay {
    header: HeaderSource,
    files: Vec<StoredFile>,
}

impl StoredReplay {
    /// The files of the header's builds.
    pub(crate) fn new(header: HeaderSource, files: Vec<StoredFile>) -> StoredReplay {
        StoredReplay { header, files }
    }

    fn header(&self) -> Result<PlainHeader> {
        match &self.header {
            HeaderSource::File(file, max) => {
                let bytes = file.read_all(*max)?;
                file.release();
                plain_header::read(&bytes)
            }
            HeaderSource::None(build, size_bytes) => {
                let pages = size_bytes.div_ceil(PAGE_BYTES);
                let record = PlainRecord { page: 0, pages, stored: Some((*build, 0)) };
                let records = if pages == 0 { Vec::new() } else { vec![record] };
                Ok(PlainHeader { size_bytes: *size_bytes, records })
            }
        }
    }
}

/// Whether a header that is read again says of each page what its map says: for the fuzzers of both.
pub fn check_plain(bytes: &[u8], map: &PageMap) -> Result<()> {
    let PlainHeader { size_bytes, records } = plain_header::read(bytes)?;
    let mut end = 0;
    let mut check = |record: &PlainRecord| -> Result<()> {
        let differs = |page: u64| Err(Error::corrupt(format!("page {page} lies elsewhere")));
        if record.page != end {
            return differs(end);
        }
        end += record.pages;
        let mut page = record.page;
        while page < end {
            let Some(run) = map.lookup(page) else { return differs(page) };
            let theirs = run.place.map(|place| {
                (map.builds().get(place.build as usize).copied(), u64::from(place.page))
            });
            let ours =
                record.stored.map(|(build, storage)| (Some(build), storage + (page - record.page)));
            if ours != theirs {
                return differs(page);
            }
            page += run.pages;
        }
        Ok(())
    };
    records.iter().try_for_each(&mut check)?;
    if size_bytes != map.size_bytes() || end != map.pages() {
        return Err(Error::corrupt(format!("{end} pages; expected {}", map.pages())));
    }
    Ok(())
}

/// A record, from the side of its build's data.
#[derive(Clone, Copy, Debug)]
struct Stored {
    storage: u64,
    page: u64,
    pages: u64,
}

impl Stored {
    fn end(&self) -> u64 {
        self.storage.saturating_add(self.pages.saturating_mul(PAGE_BYTES))
    }
}

impl Replay for StoredReplay {
    fn replay(&self, compare: &mut Compare<'_>) -> Result<()> {
        let PlainHeader { size_bytes, records } = self.header()?;
        compare.size(size_bytes)?;
        let mut of_builds: HashMap<Uuid, Vec<Stored>> = HashMap::new();
        for PlainRecord { page, pages, stored } in records {
            match stored {
                None => compare.zeros(page * PAGE_BYTES..(page + pages) * PAGE_BYTES)?,
                Some((build, storage)) => {
                    let storage = storage.saturating_mul(PAGE_BYTES);
                    of_builds.entry(build).or_default().push(Stored { storage, page, pages });
                }
            }
        }
        for file in &self.files {
            let mut records = of_builds.remove(&file.build).unwrap_or_default();
            records.sort_unstable_by_key(|record| record.storage);
            replay_file(file, &records, size_bytes, compare)
                .context(|| format!("{} was read to its end", file.file.label()))?;
            file.file.release();
        }
        match of_builds.keys().next() {
            Some(build) => Err(Error::corrupt(format!("a record of build {build} without a file"))),
            None => Ok(()),
        }
    }
}

/// A file that is open, from its first byte to its last.
struct InOrder<'a> {
    file: &'a StableFile,
    at: u64,
}

impl Read for InOrder<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.file.size_bytes().saturating_sub(self.at).min(buf.len() as u64);
        let len = usize::try_from(left).unwrap_or(buf.len());
        self.file.read_at(&mut buf[..len], self.at)?;
        self.at += left;
        Ok(len)
    }
}

fn replay_file(
    file: &StoredFile,
    records: &[Stored],
    device_bytes: u64,
    compare: &mut Compare<'_>,
) -> Result<()> {
    if records.is_empty() && file.sha256.is_none() {
        return Ok(());
    }
    let in_order = InOrder { file: &file.file, at: 0 };
    let reader = BufReader::with_capacity(PIECE_BYTES, in_order);
    let mut stream: Box<dyn Read + '_> = match file.codec {
        DataCodec::Plain => Box::new(reader),
        DataCodec::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(reader);
            Box::new(decoder.context(|| "cannot begin to decode".to_owned())?)
        }
        DataCodec::Lz4 => Box::new(Lz4Frames { reader: Some(reader), decoder: None }),
    };
    let mut hash = file.sha256.map(|expected| (Sha256::new(), expected));
    let mut buf = vec![0; PIECE_BYTES];
    let (mut next, mut active): (usize, Vec<Stored>) = (0, Vec::new());
    let mut at = 0_u64;
    loop {
        let len =
            read_full(&mut *stream, &mut buf).context(|| format!("cannot read on at byte {at}"))?;
        if let Some((hash, _)) = &mut hash {
            hash.update(&buf[..len]);
        }
        // A device's last page may be short in its file.
        let padded = len.next_multiple_of(BLOCK_BYTES);
        buf[len..padded].fill(0);
        let end = at + padded as u64;
        while records.get(next).is_some_and(|record| record.storage < end) {
            active.extend(records.get(next));
            next += 1;
        }
        for record in &active {
            let from = record.storage.max(at);
            let to = record.end().min(end);
            let target = record.page * PAGE_BYTES + (from - record.storage);
            if from < to && target < device_bytes {
                compare.bytes(target, &buf[index(from - at)..index(to - at)])?;
            }
        }
        active.retain(|record| record.end() > end);
        at = end;
        if len < buf.len() {
            break;
        }
    }
    if let Some(record) = active.first().or(records.get(next)) {
        return Err(Error::corrupt(format!(
            "it ends at byte {at}; the record at byte {} of the device lies at {}",
            record.page * PAGE_BYTES,
            record.storage
        )));
    }
    match hash {
        Some((hash, expected)) if hash.clone().finalize().as_slice() != expected.as_slice() => {
            Err(Error::corrupt("its SHA-256 is not the one in the header"))
        }
        _ => Ok(()),
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

fn read_full(stream: &mut dyn Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buf.len() {
        match stream.read(&mut buf[len..]) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// LZ4 frames one behind the other; a decoder stops at the end of each.
struct Lz4Frames<'a> {
    reader: Option<BufReader<InOrder<'a>>>,
    decoder: Option<FrameDecoder<BufReader<InOrder<'a>>>>,
}

impl Read for Lz4Frames<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(decoder) = &mut self.decoder {
                let read = decoder.read(buf)?;
                if read > 0 {
                    return Ok(read);
                }
                self.reader = self.decoder.take().map(FrameDecoder::into_inner);
            }
            let Some(reader) = &mut self.reader else { return Ok(0) };
            if reader.fill_buf()?.is_empty() {
                return Ok(0);
            }
            self.decoder = self.reader.take().map(FrameDecoder::new);
        }
    }
}
