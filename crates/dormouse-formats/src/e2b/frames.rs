//! Data objects of frames, each a whole frame of zstd or LZ4, whose places stand in headers.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use crate::data::{RandomRead, StableFile};
use crate::error::{Context, Error, Result};
use crate::replay::DataCodec;

/// The longest frame, decoded or not. E2B's have 2 MiB; what a hostile header may make us hold is
/// this for each thread that decodes.
pub const FRAME_BYTES_MAX: u32 = 64 << 20;

/// Decoded bytes that are kept: pieces of one frame are asked for by several threads.
const CACHE_BYTES: usize = 128 << 20;

/// A frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its first byte when decoded.
    pub decoded_at: u64,

    /// Its first byte in the object.
    pub encoded_at: u64,

    /// Its length when decoded.
    pub decoded_bytes: u32,

    /// Its length in the object.
    pub encoded_bytes: u32,
}

impl Frame {
    /// Whether its numbers are within bounds.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        if self.decoded_bytes.max(self.encoded_bytes) > FRAME_BYTES_MAX {
            return Err(format!(
                "a frame of {} bytes in {}; at most {FRAME_BYTES_MAX}",
                self.decoded_bytes, self.encoded_bytes
            ));
        }
        // What is past 16 TiB cannot be a page's.
        let max = dormouse_image::block::IMAGE_BYTES_MAX;
        if self.decoded_at > max || self.encoded_at > max {
            return Err(format!("a frame at {} in {}", self.decoded_at, self.encoded_at));
        }
        Ok(())
    }

    fn end(&self) -> u64 {
        self.decoded_at + u64::from(self.decoded_bytes)
    }
}

/// Decoded frames of all objects of an import.
#[derive(Debug, Default)]
pub(crate) struct FrameCache {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Newest last.
    slots: VecDeque<(Key, Arc<Slot>)>,
    bytes: usize,
}

type Key = (u64, u64);

/// A frame that somebody decodes or decoded. The lock is held while it is decoded, so that it is
/// decoded once; the cache's own is not.
#[derive(Debug)]
struct Slot {
    bytes: usize,
    decoded: Mutex<Option<Arc<Vec<u8>>>>,
}

impl FrameCache {
    /// A decoded frame. While somebody else decodes it, `meanwhile` is run once: the next frame can
    /// be decoded then.
    fn get(
        &self,
        key: Key,
        bytes: usize,
        decode: &dyn Fn() -> Result<Vec<u8>>,
        meanwhile: &dyn Fn(),
    ) -> Result<Arc<Vec<u8>>> {
        let slot = self.slot(key, bytes);
        let mut decoded = match slot.decoded.try_lock() {
            Ok(decoded) => decoded,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                meanwhile();
                slot.decoded.lock().unwrap_or_else(PoisonError::into_inner)
            }
        };
        if let Some(decoded) = &*decoded {
            return Ok(Arc::clone(decoded));
        }
        let bytes = Arc::new(decode()?);
        *decoded = Some(Arc::clone(&bytes));
        Ok(bytes)
    }

    /// Decodes a frame unless it is or is being decoded.
    fn prepare(&self, key: Key, bytes: usize, decode: &dyn Fn() -> Result<Vec<u8>>) {
        let slot = self.slot(key, bytes);
        let Ok(mut decoded) = slot.decoded.try_lock() else { return };
        if decoded.is_none()
            && let Ok(bytes) = decode()
        {
            // A failure is told to whoever needs the frame.
            *decoded = Some(Arc::new(bytes));
        }
    }

    fn slot(&self, key: Key, bytes: usize) -> Arc<Slot> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = kept.slots.iter().position(|(other, _)| *other == key)
            && let Some(found) = kept.slots.remove(at)
        {
            let slot = Arc::clone(&found.1);
            kept.slots.push_back(found);
            return slot;
        }
        let slot = Arc::new(Slot { bytes, decoded: Mutex::new(None) });
        kept.slots.push_back((key, Arc::clone(&slot)));
        kept.bytes += bytes;
        while kept.bytes > CACHE_BYTES && kept.slots.len() > 1 {
            if let Some((_, old)) = kept.slots.pop_front() {
                kept.bytes -= old.bytes;
            }
        }
        slot
    }
}

/// A data object with the frames that a header names.
#[derive(Debug)]
pub(crate) struct FramedFile {
    file: Arc<StableFile>,
    codec: DataCodec,
    frames: Vec<Frame>,
    /// What frames hold without a gap, in order: a header may have many runs over many frames.
    covered: Vec<Range<u64>>,
    cache: Arc<FrameCache>,
    /// Tells this file's frames from others' in the cache.
    number: u64,
}

impl FramedFile {
    /// The frames, sorted, must lie inside the file.
    pub(crate) fn new(
        file: Arc<StableFile>,
        codec: DataCodec,
        frames: Vec<Frame>,
        cache: Arc<FrameCache>,
        number: u64,
    ) -> Result<FramedFile> {
        for frame in &frames {
            let end = frame.encoded_at + u64::from(frame.encoded_bytes);
            if end > file.size_bytes() {
                return Err(Error::corrupt(format!(
                    "the frame at byte {} ends at {end}; {} has {}",
                    frame.encoded_at,
                    file.label(),
                    file.size_bytes()
                )));
            }
        }
        let mut covered: Vec<Range<u64>> = Vec::new();
        for frame in &frames {
            match covered.last_mut() {
                Some(last) if last.end == frame.decoded_at => last.end = frame.end(),
                _ => covered.push(frame.decoded_at..frame.end()),
            }
        }
        Ok(FramedFile { file, codec, frames, covered, cache, number })
    }

    fn uncovered(&self, offset: u64) -> Error {
        Error::corrupt(format!(
            "no frame of {} holds byte {offset} of the decoded data",
            self.file.label()
        ))
    }

    fn frame_at(&self, offset: u64) -> Result<usize> {
        let after = self.frames.partition_point(|frame| frame.decoded_at <= offset);
        after
            .checked_sub(1)
            .filter(|&number| self.frames.get(number).is_some_and(|frame| offset < frame.end()))
            .ok_or_else(|| self.uncovered(offset))
    }

    fn decoded(&self, number: usize) -> Result<Arc<Vec<u8>>> {
        let frame = self.frames[number];
        let (key, len) = self.place(&frame);
        self.cache.get(key, len, &|| self.decode(&frame), &|| {
            if let Some(next) = self.frames.get(number + 1) {
                let (key, len) = self.place(next);
                self.cache.prepare(key, len, &|| self.decode(next));
            }
        })
    }

    fn place(&self, frame: &Frame) -> (Key, usize) {
        ((self.number, frame.encoded_at), frame.decoded_bytes as usize)
    }

    fn decode(&self, frame: &Frame) -> Result<Vec<u8>> {
        let mut encoded = vec![0; frame.encoded_bytes as usize];
        self.file.read_at(&mut encoded, frame.encoded_at)?;
        decode(self.codec, &encoded, frame.decoded_bytes as usize).map_err(|why| {
            Error::corrupt(format!(
                "the frame at byte {} of {}: {why}",
                frame.encoded_at,
                self.file.label()
            ))
        })
    }
}

thread_local! {
    /// What a thread decodes with: tables of some 100 KiB, made once for all of its frames.
    static ZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Decodes one frame of exactly `len` bytes, which must be all there is.
pub fn decode(
    codec: DataCodec,
    encoded: &[u8],
    len: usize,
) -> std::result::Result<Vec<u8>, String> {
    let mut decoded = vec![0; len];
    let got = match codec {
        DataCodec::Plain => return Err("plain data has no frames".to_owned()),
        DataCodec::Zstd => ZSTD
            .with_borrow_mut(|kept| {
                let decoder = match kept {
                    Some(decoder) => decoder,
                    none => none.insert(zstd::bulk::Decompressor::new()?),
                };
                decoder.decompress_to_buffer(encoded, &mut decoded)
            })
            .map_err(|error: io::Error| error.to_string())?,
        DataCodec::Lz4 => {
            let (got, taken) = super::lz4_frame::decode(encoded, &mut decoded)?;
            if taken < encoded.len() {
                return Err(format!("{} bytes are left behind its end", encoded.len() - taken));
            }
            got
        }
    };
    if got != len {
        return Err(format!("it has {got} bytes; expected {len}"));
    }
    Ok(decoded)
}

impl RandomRead for FramedFile {
    fn size_bytes(&self) -> u64 {
        self.frames.last().map_or(0, Frame::end)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let number = self.frame_at(at)?;
            let decoded = self.decoded(number)?;
            let skip = usize::try_from(at - self.frames[number].decoded_at).unwrap_or(usize::MAX);
            let part = decoded.get(skip..).unwrap_or_default();
            let len = part.len().min(rest.len());
            let (head, tail) = rest.split_at_mut(len);
            head.copy_from_slice(&part[..len]);
            rest = tail;
            at += len as u64;
        }
        Ok(())
    }

    fn check_unchanged(&self) -> Result<()> {
        self.file.check_unchanged()
    }

    fn check_covers(&self, range: Range<u64>) -> Result<()> {
        let end = range.end.min(self.size_bytes());
        if range.start >= end {
            return Ok(());
        }
        let after = self.covered.partition_point(|covered| covered.start <= range.start);
        let covered = after.checked_sub(1).and_then(|number| self.covered.get(number));
        match covered.map_or(range.start, |covered| covered.end.max(range.start)) {
            at if at < end => Err(self.uncovered(at)),
            _ => Ok(()),
        }
    }

    fn release(&self) {
        self.file.release();
    }
}

/// Encodes one frame as E2B does: zstd with a checksum of the content, LZ4 with one of each block.
pub(super) fn encode(codec: DataCodec, bytes: &[u8]) -> Result<Vec<u8>> {
    use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
    use std::io::Write;
    let what = || "cannot compress a frame".to_owned();
    match codec {
        DataCodec::Plain => Ok(bytes.to_vec()),
        DataCodec::Zstd => {
            let mut encoder = zstd::bulk::Compressor::new(3).context(what)?;
            encoder.set_parameter(zstd::zstd_safe::CParameter::ChecksumFlag(true)).context(what)?;
            encoder.compress(bytes).context(what)
        }
        DataCodec::Lz4 => {
            let info = FrameInfo::new()
                .block_size(BlockSize::Max4MB)
                .block_mode(BlockMode::Independent)
                .block_checksums(true);
            let mut encoder = FrameEncoder::with_frame_info(info, Vec::new());
            encoder.write_all(bytes).context(what)?;
            encoder.finish().map_err(|error| Error::corrupt(format!("{}: {error}", what())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(frames: Vec<Frame>) -> FramedFile {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memfile.zstd");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        let file = Arc::new(StableFile::open(&path).unwrap());
        FramedFile::new(file, DataCodec::Zstd, frames, Arc::new(FrameCache::default()), 1).unwrap()
    }

    fn frame(number: u64, decoded_at: u64, decoded_bytes: u32) -> Frame {
        Frame { decoded_at, encoded_at: number, decoded_bytes, encoded_bytes: 1 }
    }

    #[test]
    fn a_range_is_covered_if_no_byte_of_it_lies_in_a_gap_between_frames() {
        let file = framed(vec![frame(0, 4096, 4096), frame(1, 8192, 100), frame(2, 16384, 8192)]);
        for (range, missing) in [
            (4096..8192, None),
            (5000..8292, None),
            (16384..24576, None),
            // The last page of a device may be short in its data.
            (20480..28672, None),
            (0..4096, Some(0)),
            (4095..4096, Some(4095)),
            (4096..8293, Some(8292)),
            (8292..8300, Some(8292)),
            (12288..20480, Some(12288)),
        ] {
            let got = file.check_covers(range.clone()).map_err(|error| error.to_string());
            let expected = match missing {
                None => Ok(()),
                Some(at) => Err(file.uncovered(at).to_string()),
            };
            assert_eq!(got, expected, "{range:?}");
        }
    }

    /// A header of a few MiB can have millions of runs, each over a million frames of one byte.
    #[test]
    fn many_runs_over_many_frames_are_checked_in_no_time() {
        let frames = (0..1 << 20).map(|number| frame(number, number, 1)).collect();
        let file = framed(frames);
        let begin = std::time::Instant::now();
        for _ in 0..100_000 {
            file.check_covers(0..1 << 20).unwrap();
        }
        assert!(begin.elapsed().as_secs() < 10, "{:?}", begin.elapsed());
    }
}
