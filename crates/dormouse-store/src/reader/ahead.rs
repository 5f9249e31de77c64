//! Reading ahead: what is going to be read is decoded into the store's frame cache before.
//!
//! Frames are decoded under the cache's budget and checked like all others; nothing is kept
//! anywhere else. Who decodes a frame that somebody else wants waits for nobody: a frame has one
//! decoder at a time, and reading ahead passes over those that are being decoded.

use std::fmt;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, OnceLock};
use std::thread;

use dormouse_image::block::BLOCK_BYTES_U64;
use dormouse_image::error::{Error as ImageError, Result as ImageResult};
use dormouse_image::map::{LEAF_BLOCKS, LEAF_BYTES, Node, NodeRef, NodeSource, Source};

use super::{ImageReader, block_in_leaf, block_in_leaf_up};
use crate::error::{Context, Result};
use crate::packs::Packs;

/// Readers of one image that are told apart; the one that was silent longest makes room.
const STREAMS: usize = 8;

/// Reads of one client that are under way at once, and so may come in any order: as many as a
/// connection of the NBD server has threads.
const OUT_OF_ORDER: u64 = 4;

/// Reads in a row after which a stream counts as sequential.
const HITS_MIN: u32 = 2;

/// The first window of a stream; it doubles up to the last one.
const WINDOW_BYTES_MIN: u64 = 512 << 10;

/// The widest window; with all streams at it half of the standard cache.
const WINDOW_BYTES_MAX: u64 = 4 << 20;

/// Ranges that wait to be read ahead; beyond it they are forgotten.
const QUEUE: usize = STREAMS;

/// What becomes of a frame that somebody else is decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Others {
    /// It is waited for.
    Wait,

    /// It is passed over.
    Pass,
}

impl ImageReader {
    /// Whether reading `range` would wait for neither a disk nor a decoder. Cheap, and of the past
    /// when it returns.
    pub fn is_cached(&self, range: Range<u64>) -> bool {
        let nodes = CachedNodes(&self.packs);
        let end = range.end.min(self.size_bytes);
        let mut at = range.start;
        while at < end {
            let number = at / LEAF_BYTES;
            let base = number * LEAF_BYTES;
            let leaf_end = end.min(base + LEAF_BYTES);
            let Ok(leaf) = self.map.leaf(&nodes, number) else { return false };
            let blocks = block_in_leaf(at - base)..block_in_leaf_up(leaf_end - base);
            let extents = leaf.iter().flat_map(|leaf| leaf.iter_range(blocks.clone()));
            for extent in extents {
                let Source::Stored { pack, slot } = extent.source else { continue };
                let first = extent.start.max(blocks.start);
                let mut slot = slot + (first - extent.start);
                let last = slot + (extent.end().min(blocks.end) - first);
                while slot < last {
                    match self.packs.cached_run(pack, slot) {
                        Some(run) => slot += run,
                        None => return false,
                    }
                }
            }
            at = leaf_end;
        }
        true
    }

    /// Decodes what `range` needs into the store's frame cache, checked. A range larger than the
    /// cache leaves its end there.
    pub fn prefetch(&self, range: Range<u64>) -> Result<()> {
        self.warm(range, Others::Wait)
    }

    fn warm(&self, range: Range<u64>, others: Others) -> Result<()> {
        self.for_each_extent(range, &mut |extent| {
            let Source::Stored { pack, slot } = extent.source else { return Ok(()) };
            let blocks = (extent.range.end - extent.range.start).div_ceil(BLOCK_BYTES_U64);
            // An extent ends with its leaf.
            let mut slot = slot;
            let last = slot + u32::try_from(blocks).unwrap_or(LEAF_BLOCKS);
            while slot < last {
                slot += self
                    .packs
                    .warm(pack, slot, others)
                    .context(|| format!("cannot read ahead (pack {pack}, slot {slot})"))?;
            }
            Ok(())
        })
    }
}

/// Map nodes that are in memory; all others are an error.
pub(super) struct CachedNodes<'a>(pub(super) &'a Packs);

impl NodeSource for CachedNodes<'_> {
    fn node(&self, at: NodeRef) -> ImageResult<Node> {
        self.0.cached_node(at).ok_or_else(|| ImageError::missing("node", "none", "a cached one"))
    }
}

/// An image whose sequential readers find what comes next decoded. Has a thread of its own from
/// the first sequential reader on.
pub struct ReadAhead {
    image: ImageReader,
    window_bytes_max: u64,

    /// Guards who reads where. Held for a look at it, and passed over when somebody else has it.
    streams: Mutex<Streams>,
    queue: OnceLock<Option<SyncSender<Range<u64>>>>,
}

impl ReadAhead {
    /// An image with nothing read ahead yet.
    pub fn new(image: ImageReader) -> ReadAhead {
        let share = image.packs.frame_cache_bytes() / 2 / STREAMS as u64;
        ReadAhead {
            image,
            window_bytes_max: WINDOW_BYTES_MAX.min(share),
            streams: Mutex::default(),
            queue: OnceLock::new(),
        }
    }

    /// The image.
    pub fn image(&self) -> &ImageReader {
        &self.image
    }

    /// As [`ImageReader::read_at`].
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.note(offset..offset.saturating_add(buf.len() as u64));
        self.image.read_at(buf, offset)
    }

    /// Looks whether a read goes on where an earlier one ended, and has what follows read ahead.
    fn note(&self, range: Range<u64>) {
        let Ok(mut streams) = self.streams.try_lock() else { return };
        let ahead = streams.note(&range, self.window_bytes_max);
        drop(streams);
        let Some(ahead) = ahead else { return };
        let ahead = ahead.start..ahead.end.min(self.image.size_bytes);
        if ahead.is_empty() {
            return;
        }
        if let Some(queue) = self.queue.get_or_init(|| start(&self.image)) {
            // A full queue is far enough ahead.
            let _ = queue.try_send(ahead);
        }
    }
}

impl fmt::Debug for ReadAhead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadAhead").field("image", &self.image).finish_non_exhaustive()
    }
}

/// Starts the thread, which ends when nobody can send it more.
fn start(image: &ImageReader) -> Option<SyncSender<Range<u64>>> {
    let (sender, receiver) = sync_channel(QUEUE);
    let image = image.clone();
    let started = thread::Builder::new()
        .name("read-ahead".to_owned())
        .spawn(move || read_ahead(&image, &receiver));
    match started {
        Ok(_) => Some(sender),
        Err(error) => {
            tracing::warn!(%error, "nothing is read ahead");
            None
        }
    }
}

fn read_ahead(image: &ImageReader, queue: &Receiver<Range<u64>>) {
    for range in queue {
        if let Err(error) = image.warm(range, Others::Pass) {
            // Whoever comes to read it is told.
            tracing::debug!(error = &error as &dyn std::error::Error, "cannot read ahead");
        }
    }
}

#[derive(Debug, Default)]
struct Streams {
    list: [Stream; STREAMS],
    clock: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// Where the furthest read ended.
    next: u64,

    /// Reads that went on where others had ended.
    hits: u32,

    /// Up to here it was asked to be read ahead.
    ahead_to: u64,
    window_bytes: u64,
    last_used: u64,
}

impl Streams {
    /// What to read ahead now that `range` is read. Requests of a client that has several under
    /// way come a little out of order.
    fn note(&mut self, range: &Range<u64>, window_bytes_max: u64) -> Option<Range<u64>> {
        self.clock += 1;
        let slack = OUT_OF_ORDER * (range.end - range.start);
        let goes_on = |stream: &&mut Stream| {
            stream.last_used > 0 && range.start.abs_diff(stream.next) <= slack
        };
        let Some(stream) = self.list.iter_mut().find(goes_on) else {
            if let Some(oldest) = self.list.iter_mut().min_by_key(|stream| stream.last_used) {
                *oldest = Stream { next: range.end, last_used: self.clock, ..Stream::default() };
            }
            return None;
        };
        stream.last_used = self.clock;
        if range.end > stream.next {
            stream.next = range.end;
            stream.hits = stream.hits.saturating_add(1);
        }
        let far_enough = stream.ahead_to >= stream.next + stream.window_bytes / 2;
        if stream.hits < HITS_MIN || (far_enough && stream.window_bytes > 0) {
            return None;
        }
        stream.window_bytes = (stream.window_bytes * 2).max(WINDOW_BYTES_MIN).min(window_bytes_max);
        let ahead = stream.ahead_to.max(stream.next)..stream.next + stream.window_bytes;
        stream.ahead_to = ahead.end.max(stream.ahead_to);
        Some(ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_grow_to_their_limit_and_never_overlap() {
        let mut streams = Streams::default();
        let mut covered = 0;
        let mut widest = 0;
        for step in 0..200_u64 {
            let range = step * 262_144..(step + 1) * 262_144;
            if let Some(ahead) = streams.note(&range, WINDOW_BYTES_MAX) {
                assert!(ahead.start >= covered && ahead.start >= range.end, "{ahead:?}");
                assert!(ahead.end <= range.end + WINDOW_BYTES_MAX);
                covered = ahead.end;
                widest = widest.max(ahead.end - ahead.start);
            }
            assert!(step < 3 || covered > range.end, "step {step}: nothing is ahead");
        }
        assert!(widest >= WINDOW_BYTES_MAX / 2);
    }

    #[test]
    fn random_reads_read_nothing_ahead() {
        let mut streams = Streams::default();
        let mut seed = 1_u64;
        for _ in 0..10_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
            let at = (seed >> 20) & !4095;
            assert_eq!(streams.note(&(at..at + 4096), WINDOW_BYTES_MAX), None);
        }
    }

    /// A client with many requests under way was taken for several readers, as each of the server's
    /// threads has another one of them.
    #[test]
    fn requests_of_one_client_in_any_order_are_one_reader() {
        const LEN: u64 = 256 << 10;
        let mut streams = Streams::default();
        let mut covered = 0;
        for group in 0..50_u64 {
            for number in [3, 1, 2, 0] {
                let at = (group * 4 + number) * LEN;
                if let Some(ahead) = streams.note(&(at..at + LEN), WINDOW_BYTES_MAX) {
                    assert!(ahead.start >= covered, "{ahead:?} again");
                    covered = ahead.end;
                }
            }
            assert!(
                group < 2 || covered > (group + 1) * 4 * LEN,
                "group {group}: nothing is ahead"
            );
        }
        assert_eq!(streams.list.iter().filter(|stream| stream.last_used > 0).count(), 1);
    }

    #[test]
    fn readers_are_told_apart() {
        let mut streams = Streams::default();
        let mut ahead = [0_u32; 4];
        for step in 0..64_u64 {
            for reader in 0..4_u64 {
                let at = (reader << 30) + step * 4096;
                let noted = streams.note(&(at..at + 4096), WINDOW_BYTES_MAX);
                ahead[usize::try_from(reader).unwrap()] += u32::from(noted.is_some());
            }
        }
        assert!(ahead.iter().all(|&count| count > 0), "{ahead:?}");
    }
}
