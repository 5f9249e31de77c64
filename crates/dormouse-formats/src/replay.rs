//! The second way to a device that is made of builds' data: each data file from its first byte to
//! its last, decoded as one stream, and each run where it comes by.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::PathBuf;
use std::sync::Arc;

use dormouse_image::block::BLOCK_BYTES;
use lz4_flex::frame::FrameDecoder;
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};
use crate::page_map::{PAGE_BYTES, PageMap, Run};
use crate::verify::{Compare, Replay};

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
    pub(crate) path: PathBuf,
    pub(crate) codec: DataCodec,
    /// SHA-256 of the bytes when decoded, where the header has it.
    pub(crate) sha256: Option<[u8; 32]>,
}

/// All runs of a map, in the order of their builds' files.
#[derive(Debug)]
pub(crate) struct StoredReplay {
    map: Arc<PageMap>,
    files: Vec<StoredFile>,
}

impl StoredReplay {
    /// The files of the map's builds, in their order.
    pub(crate) fn new(map: Arc<PageMap>, files: Vec<StoredFile>) -> StoredReplay {
        StoredReplay { map, files }
    }

    /// The same, of files that are not compressed.
    pub(crate) fn plain(map: Arc<PageMap>, paths: Vec<PathBuf>) -> StoredReplay {
        let files = paths
            .into_iter()
            .map(|path| StoredFile { path, codec: DataCodec::Plain, sha256: None })
            .collect();
        StoredReplay { map, files }
    }
}

impl Replay for StoredReplay {
    fn replay(&self, compare: &mut Compare<'_>) -> Result<()> {
        compare.size(self.map.size_bytes())?;
        let mut of_builds: Vec<Vec<Run>> = vec![Vec::new(); self.files.len()];
        for run in self.map.runs() {
            match run.place {
                None => {
                    compare.zeros(run.start * PAGE_BYTES..(run.start + run.pages) * PAGE_BYTES)?;
                }
                Some(place) => match of_builds.get_mut(place.build as usize) {
                    Some(runs) => runs.push(run),
                    None => return Err(Error::corrupt("a run of a build without a file")),
                },
            }
        }
        for (file, mut runs) in self.files.iter().zip(of_builds) {
            runs.sort_unstable_by_key(|run| run.place.map_or(0, |place| place.page));
            replay_file(file, &runs, self.map.size_bytes(), compare)
                .context(|| format!("{} was read to its end", file.path.display()))?;
        }
        Ok(())
    }
}

fn replay_file(
    file: &StoredFile,
    runs: &[Run],
    device_bytes: u64,
    compare: &mut Compare<'_>,
) -> Result<()> {
    if runs.is_empty() && file.sha256.is_none() {
        return Ok(());
    }
    let opened =
        File::open(&file.path).context(|| format!("cannot open {}", file.path.display()))?;
    let reader = BufReader::with_capacity(PIECE_BYTES, &opened);
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
    let (mut next, mut active): (usize, Vec<Run>) = (0, Vec::new());
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
        while runs.get(next).is_some_and(|run| storage(run) < end) {
            active.extend(runs.get(next));
            next += 1;
        }
        for run in &active {
            let from = storage(run).max(at);
            let to = (storage(run) + run.pages * PAGE_BYTES).min(end);
            if from < to {
                let slice = index(from - at)..index(to - at);
                let target = run.start * PAGE_BYTES + (from - storage(run));
                if target < device_bytes {
                    compare.bytes(target, &buf[slice])?;
                }
            }
        }
        active.retain(|run| storage(run) + run.pages * PAGE_BYTES > end);
        at = end;
        if len < buf.len() {
            break;
        }
    }
    if let Some(run) = active.first().or(runs.get(next)) {
        return Err(Error::corrupt(format!(
            "it ends at byte {at}; the run at byte {} of the device lies at {}",
            run.start * PAGE_BYTES,
            storage(run)
        )));
    }
    match hash {
        Some((hash, expected)) if hash.clone().finalize().as_slice() != expected.as_slice() => {
            Err(Error::corrupt("its SHA-256 is not the one in the header"))
        }
        _ => Ok(()),
    }
}

fn storage(run: &Run) -> u64 {
    run.place.map_or(0, |place| u64::from(place.page) * PAGE_BYTES)
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
    reader: Option<BufReader<&'a File>>,
    decoder: Option<FrameDecoder<BufReader<&'a File>>>,
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
