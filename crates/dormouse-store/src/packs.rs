//! The packs of a store: finding, opening and reading them through bounded caches.
//!
//! A pack is a file of its own or lies in a bundle, and compaction may move it from one to the other
//! at any time. So a pack that is not where it was, or a slot that is missing from the file that was
//! open, is looked for again once before it counts as lost. Every writing of a pack has a salt of
//! its own; frames are cached under it, so that places in one file are never looked up in another.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use dormouse_image::codec::Decoder;
use dormouse_image::digest::{Digest, DomainKey};
use dormouse_image::error::{Error, ErrorKind, Result};
use dormouse_image::map::{Node, NodeRef, NodeSource};
use dormouse_image::pack::{
    Bundle, BundleEntry, DecodedFrame, FRAME_BLOCKS, LazyFrame, PackId, PackReader, ReadAt,
    SEGMENT_SLOTS, Segment,
};
use quick_cache::Weighter;
use quick_cache::sync::{Cache, GuardResult};

use crate::disk::{Disk, DiskFile};
use crate::layout::{BUNDLES, pack_path};
use crate::reader::Others;

/// How often a file that was there a moment ago is looked for anew: each time a compaction came
/// between.
const MOVES_MAX: usize = 8;

/// Open pack files are kept up to this number: well under the usual limit of 1,024 descriptors.
const OPEN_FILES_MAX: u64 = 400;

thread_local! {
    /// Decompression tables, kept per thread: making them costs more than decoding a frame.
    static DECODER: RefCell<Option<Decoder>> = const { RefCell::new(None) };
}

/// The packs of a store.
#[derive(Debug)]
pub(crate) struct Packs {
    disk: Arc<dyn Disk>,
    key: Option<DomainKey>,
    open: Cache<PackId, Arc<PackReader>, OneEach>,
    nodes: Cache<NodeRef, Node, NodeBytes>,
    segments: Cache<(PackId, u32), Arc<LoadedSegment>, SegmentBytes>,
    frames: Cache<FrameKey, Arc<LazyFrame>, FrameBytes>,
    /// Where the packs of bundles lie. Never held over I/O.
    bundles: RwLock<HashMap<PackId, BundlePlace>>,
    decoded_frames: AtomicU64,
    found_frames: AtomicU64,
}

/// A segment, and which writing of its pack it was read from.
#[derive(Debug)]
pub(crate) struct LoadedSegment {
    pub(crate) segment: Segment,
    pub(crate) salt: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FrameKey {
    pack: PackId,
    salt: u32,
    segment: u32,
    frame: u32,
}

#[derive(Clone, Debug)]
struct BundlePlace {
    path: Arc<str>,
    entry: BundleEntry,
}

/// A file of the store as the pack reader sees it.
#[derive(Debug)]
struct StoreFile(Arc<dyn DiskFile>);

impl ReadAt for StoreFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }
}

/// A frame in the cache, and where in it the blocks are that were asked for.
struct FoundBlocks {
    key: FrameKey,
    frame: Arc<LazyFrame>,
    range: Range<usize>,
}

/// Blocks of a frame that were checked.
#[derive(Clone, Debug)]
pub(crate) struct CheckedBlocks {
    pub(crate) frame: Arc<LazyFrame>,
    pub(crate) range: Range<usize>,
}

/// Why a frame was not decoded.
enum Undecoded {
    /// The pack was written again since its segment was read.
    Moved,

    Failed(Error),
}

/// The frame that holds a slot, where in it, and how many slots from this one on it holds without a
/// gap, at most `wanted`.
fn frame_of(
    pack: PackId,
    slot: u32,
    wanted: usize,
    loaded: &LoadedSegment,
) -> Option<(FrameKey, Range<usize>)> {
    let segment = &loaded.segment;
    let (frame, position) = segment.locate(slot % SEGMENT_SLOTS)?;
    // Where slots were dropped, neighbours in a frame are not neighbours in the pack.
    let run = segment.run_from(slot % SEGMENT_SLOTS).min(wanted).min(FRAME_BLOCKS - position);
    let key = FrameKey {
        pack,
        salt: loaded.salt,
        segment: slot / SEGMENT_SLOTS,
        frame: u32::try_from(frame).unwrap_or(u32::MAX),
    };
    Some((key, position..position + run.max(1)))
}

/// A pack's place in its file.
#[derive(Clone, Debug)]
pub(crate) struct PackPlace {
    pub(crate) path: String,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl Packs {
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        key: Option<DomainKey>,
        frame_bytes: u64,
        node_bytes: u64,
    ) -> Packs {
        let items =
            |bytes: u64, each: u64| usize::try_from(bytes / each).unwrap_or(1 << 20).max(16);
        Packs {
            disk,
            key,
            open: Cache::with_weighter(512, OPEN_FILES_MAX, OneEach),
            nodes: Cache::with_weighter(items(node_bytes, 32 << 10), node_bytes / 2, NodeBytes),
            segments: Cache::with_weighter(
                items(node_bytes, 17 << 10),
                node_bytes / 2,
                SegmentBytes,
            ),
            frames: Cache::with_weighter(items(frame_bytes, 64 << 10), frame_bytes, FrameBytes),
            bundles: RwLock::new(HashMap::new()),
            decoded_frames: AtomicU64::new(0),
            found_frames: AtomicU64::new(0),
        }
    }

    /// The key, or the error that says it is lost.
    pub(crate) fn key(&self) -> Result<&DomainKey> {
        self.key.as_ref().ok_or_else(|| Error::wrong_key("store", "no key", "the file in keys/"))
    }

    /// The open pack.
    pub(crate) fn reader(&self, pack: PackId) -> Result<Arc<PackReader>> {
        self.open.get_or_insert_with(&pack, || self.open_pack(pack).map(Arc::new))
    }

    /// Forgets what is open and cached of a pack, as after its file was replaced.
    pub(crate) fn forget(&self, pack: PackId) {
        self.open.remove(&pack);
        self.segments.retain(|key, _| key.0 != pack);
        self.bundles.write().unwrap_or_else(PoisonError::into_inner).remove(&pack);
    }

    /// Forgets everything that is cached.
    pub(crate) fn forget_all(&self) {
        self.open.clear();
        self.nodes.clear();
        self.segments.clear();
        self.frames.clear();
        self.bundles.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether the pack can be opened.
    pub(crate) fn exists(&self, pack: PackId) -> bool {
        // What is cached may be a file that was deleted since.
        if self.disk.open(&pack_path(pack)).is_ok() {
            return true;
        }
        matches!(self.bundle_place(pack), Ok(Some(_)))
    }

    /// Where the pack lies.
    pub(crate) fn place(&self, pack: PackId) -> Result<PackPlace> {
        let path = pack_path(pack);
        match self.disk.open(&path) {
            Ok(file) => Ok(PackPlace { path, offset: 0, bytes: file.len() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let place = self.bundle_place(pack)?.ok_or_else(|| lost(pack))?;
                Ok(PackPlace {
                    path: place.path.to_string(),
                    offset: place.entry.offset,
                    bytes: place.entry.bytes,
                })
            }
            Err(error) => Err(Error::io("pack", error)),
        }
    }

    /// The digest of a slot.
    pub(crate) fn digest(&self, pack: PackId, slot: u32) -> Result<Digest> {
        let loaded = self.segment(pack, slot / SEGMENT_SLOTS)?;
        loaded
            .segment
            .digest(slot % SEGMENT_SLOTS)
            .ok_or_else(|| Error::corrupt("slot", slot, "one that the pack has"))
    }

    /// A segment of a pack.
    pub(crate) fn segment(&self, pack: PackId, number: u32) -> Result<Arc<LoadedSegment>> {
        self.segments.get_or_insert_with(&(pack, number), || {
            self.again_if_moved(pack, |reader| {
                let segment = reader.segment(number as usize)?;
                Ok(Arc::new(LoadedSegment { segment, salt: reader.params().salt }))
            })
        })
    }

    /// Calls `use_blocks` with the block of a slot and those behind it whose slots run on, at most
    /// `wanted` and to the end of the frame, one behind the other and checked.
    pub(crate) fn with_blocks<T>(
        &self,
        pack: PackId,
        slot: u32,
        wanted: usize,
        use_blocks: impl FnOnce(&[u8]) -> T,
    ) -> Result<T> {
        let found = match self.find_once(pack, slot, wanted)? {
            Some(found) => found,
            None => {
                // The pack was written again while we had its old places at hand.
                self.forget(pack);
                self.find_once(pack, slot, wanted)?
                    .ok_or_else(|| Error::missing("slot", "one that was dropped", slot))?
            }
        };
        match found.frame.checked(found.range, self.key()?) {
            Ok(blocks) => Ok(use_blocks(blocks)),
            Err(error) => {
                // The file may be repaired by the time of the next try.
                self.frames.remove(&found.key);
                Err(error)
            }
        }
    }

    /// The block of a slot and those behind it whose slots run on, at most `wanted` and to the end of
    /// the frame: the frame that holds them, and where. They are checked.
    pub(crate) fn blocks(&self, pack: PackId, slot: u32, wanted: usize) -> Result<CheckedBlocks> {
        let mut found = self.find_once(pack, slot, wanted)?;
        if found.is_none() {
            // As in `with_blocks`.
            self.forget(pack);
            found = self.find_once(pack, slot, wanted)?;
        }
        let found = found.ok_or_else(|| Error::missing("slot", "one that was dropped", slot))?;
        self.check(found)
    }

    /// The same, if the frame is decoded and nothing has to be read to find it.
    pub(crate) fn cached_blocks(
        &self,
        pack: PackId,
        slot: u32,
        wanted: usize,
    ) -> Result<Option<CheckedBlocks>> {
        let Some(loaded) = self.segments.get(&(pack, slot / SEGMENT_SLOTS)) else {
            return Ok(None);
        };
        let Some((key, range)) = frame_of(pack, slot, wanted, &loaded) else { return Ok(None) };
        let Some(frame) = self.frames.get(&key) else { return Ok(None) };
        self.found_frames.fetch_add(1, Ordering::Relaxed);
        let range = range.start..range.end.min(frame.blocks());
        self.check(FoundBlocks { key, frame, range }).map(Some)
    }

    fn check(&self, found: FoundBlocks) -> Result<CheckedBlocks> {
        let FoundBlocks { key, frame, range } = found;
        match frame.checked(range.clone(), self.key()?).map(<[u8]>::len) {
            Ok(_) => Ok(CheckedBlocks { frame, range }),
            Err(error) => {
                self.frames.remove(&key);
                Err(error)
            }
        }
    }

    fn find_once(&self, pack: PackId, slot: u32, wanted: usize) -> Result<Option<FoundBlocks>> {
        let loaded = self.segment(pack, slot / SEGMENT_SLOTS)?;
        let Some((key, range)) = frame_of(pack, slot, wanted, &loaded) else { return Ok(None) };
        // Others who want the frame wait for the one that decodes it.
        let mut is_found = true;
        let decode = || {
            is_found = false;
            self.decode_as_located(&key, &loaded)
        };
        match self.frames.get_or_insert_with(&key, decode) {
            Ok(frame) => {
                self.found_frames.fetch_add(u64::from(is_found), Ordering::Relaxed);
                let range = range.start..range.end.min(frame.blocks());
                Ok(Some(FoundBlocks { key, frame, range }))
            }
            Err(Undecoded::Moved) => Ok(None),
            Err(Undecoded::Failed(error)) => Err(error),
        }
    }

    fn decode_as_located(
        &self,
        key: &FrameKey,
        loaded: &LoadedSegment,
    ) -> std::result::Result<Arc<LazyFrame>, Undecoded> {
        let reader = self.reader(key.pack).map_err(Undecoded::Failed)?;
        if reader.params().salt != loaded.salt {
            return Err(Undecoded::Moved);
        }
        let domain_key = self.key().map_err(Undecoded::Failed)?;
        self.decoded_frames.fetch_add(1, Ordering::Relaxed);
        let (number, frame) = (key.segment as usize, key.frame as usize);
        let decoded = with_decoder(|decoder| {
            reader.lazy_frame(number, &loaded.segment, frame, domain_key, decoder)
        });
        decoded.map(Arc::new).map_err(Undecoded::Failed)
    }

    /// Has the frame of a slot in the cache and its blocks from this slot on checked, unless somebody
    /// else is decoding it and is not to be waited for. How many slots that goes for.
    pub(crate) fn warm(&self, pack: PackId, slot: u32, others: Others) -> Result<u32> {
        let loaded = self.segment(pack, slot / SEGMENT_SLOTS)?;
        let slots = |range: &Range<usize>| u32::try_from(range.len()).unwrap_or(1).max(1);
        let place = frame_of(pack, slot, FRAME_BLOCKS, &loaded);
        let (key, range) = match (place, others) {
            (Some(place), Others::Pass) => place,
            // Dropped from where it was known, perhaps: reading finds out where it is now.
            _ => return Ok(slots(&self.blocks(pack, slot, FRAME_BLOCKS)?.range)),
        };
        if let GuardResult::Guard(guard) =
            self.frames.get_value_or_guard(&key, Some(Duration::ZERO))
        {
            match self.decode_as_located(&key, &loaded) {
                Ok(frame) => {
                    // A guard is refused only where its place was removed meanwhile.
                    drop(guard.insert(Arc::clone(&frame)));
                    let range = range.start..range.end.min(frame.blocks());
                    self.check(FoundBlocks { key, frame, range })?;
                }
                Err(Undecoded::Moved) => {}
                Err(Undecoded::Failed(error)) => return Err(error),
            }
        }
        Ok(slots(&range))
    }

    /// How many slots from this one on are in one frame of the cache, if any.
    pub(crate) fn cached_run(&self, pack: PackId, slot: u32) -> Option<u32> {
        let loaded = self.segments.get(&(pack, slot / SEGMENT_SLOTS))?;
        let (key, range) = frame_of(pack, slot, FRAME_BLOCKS, &loaded)?;
        let run = u32::try_from(range.len()).unwrap_or(1);
        self.frames.contains_key(&key).then_some(run)
    }

    /// A map node, if it is in the cache.
    pub(crate) fn cached_node(&self, at: NodeRef) -> Option<Node> {
        self.nodes.get(&at)
    }

    /// Bytes that the frame cache has now.
    pub(crate) fn cached_frame_bytes(&self) -> u64 {
        self.frames.weight()
    }

    /// The budget of the frame cache.
    pub(crate) fn frame_cache_bytes(&self) -> u64 {
        self.frames.capacity()
    }

    /// Decodes and checks a frame past the cache.
    pub(crate) fn decode(
        &self,
        reader: &PackReader,
        number: u32,
        segment: &Segment,
        frame: usize,
    ) -> Result<DecodedFrame> {
        let key = self.key()?;
        self.decoded_frames.fetch_add(1, Ordering::Relaxed);
        with_decoder(|decoder| reader.frame(number as usize, segment, frame, key, decoder))
    }

    /// Frames that were decoded so far.
    pub(crate) fn decoded_frames(&self) -> u64 {
        self.decoded_frames.load(Ordering::Relaxed)
    }

    /// Times that a frame was wanted and found decoded.
    pub(crate) fn found_frames(&self) -> u64 {
        self.found_frames.load(Ordering::Relaxed)
    }

    /// All pack files: packs of their own, and bundles with their packs.
    pub(crate) fn list(&self) -> io::Result<(Vec<PackId>, Vec<String>)> {
        let mut packs = Vec::new();
        let mut bundles = Vec::new();
        for folder in self.disk.list(crate::layout::PACKS)?.into_iter().filter(|entry| entry.is_dir)
        {
            let path = format!("{}/{}", crate::layout::PACKS, folder.name);
            for entry in self.disk.list(&path)? {
                if path == BUNDLES {
                    if entry.name.ends_with(".bundle") {
                        bundles.push(format!("{BUNDLES}/{}", entry.name));
                    }
                } else if let Some(pack) = entry.name.strip_suffix(".pack").and_then(PackId::parse)
                {
                    packs.push(pack);
                }
            }
        }
        packs.sort_unstable();
        bundles.sort_unstable();
        Ok((packs, bundles))
    }

    /// Reads the directory of a bundle.
    pub(crate) fn bundle(&self, path: &str) -> Result<Bundle> {
        let file = self.disk.open(path).map_err(|error| cannot_open("bundle", path, error))?;
        let len = file.len();
        Bundle::open(&StoreFile(file), len)
    }

    /// The raw file that holds a pack, for reading past the caches.
    pub(crate) fn raw_file(&self, path: &str) -> Result<Arc<dyn ReadAt>> {
        let file = self.disk.open(path).map_err(|error| cannot_open("pack", path, error))?;
        Ok(Arc::new(StoreFile(file)))
    }

    /// Opens the pack as it lies there now, past the caches.
    pub(crate) fn open_afresh(&self, pack: PackId) -> Result<PackReader> {
        self.bundles.write().unwrap_or_else(PoisonError::into_inner).remove(&pack);
        self.open_pack(pack)
    }

    /// A segment of the pack as it lies there now, which the cache holds from then on.
    pub(crate) fn segment_afresh(&self, pack: PackId, number: u32) -> Result<Arc<LoadedSegment>> {
        let reader = self.open_afresh(pack)?;
        let segment = reader.segment(number as usize)?;
        let loaded = Arc::new(LoadedSegment { segment, salt: reader.params().salt });
        self.segments.insert((pack, number), Arc::clone(&loaded));
        Ok(loaded)
    }

    fn open_pack(&self, pack: PackId) -> Result<PackReader> {
        let mut moves = 0;
        loop {
            let place = self.place(pack)?;
            match self.raw_file(&place.path) {
                // It was moved since its place was looked up.
                Err(error) if error.kind() == ErrorKind::Missing && moves < MOVES_MAX => {
                    moves += 1;
                    self.bundles.write().unwrap_or_else(PoisonError::into_inner).remove(&pack);
                }
                file => {
                    let reader = PackReader::open(file?, place.offset, place.bytes)?;
                    if reader.id() != pack {
                        return Err(Error::corrupt("pack id", reader.id(), pack));
                    }
                    return Ok(reader);
                }
            }
        }
    }

    fn again_if_moved<T>(
        &self,
        pack: PackId,
        read: impl Fn(&PackReader) -> Result<T>,
    ) -> Result<T> {
        let first = self.reader(pack).and_then(|reader| read(&reader));
        match first {
            Err(error) if error.kind() == ErrorKind::Missing => {
                self.forget(pack);
                self.reader(pack).and_then(|reader| read(&reader))
            }
            result => result,
        }
    }

    fn bundle_place(&self, pack: PackId) -> Result<Option<BundlePlace>> {
        let known = {
            let bundles = self.bundles.read().unwrap_or_else(PoisonError::into_inner);
            bundles.get(&pack).cloned()
        };
        if let Some(place) = known
            && self.disk.open(&place.path).is_ok()
        {
            return Ok(Some(place));
        }
        let mut moves = 0;
        loop {
            let (found, has_moved) = self.read_bundles()?;
            let place = found.get(&pack).cloned();
            *self.bundles.write().unwrap_or_else(PoisonError::into_inner) = found;
            if place.is_some() || !has_moved || moves == MOVES_MAX {
                return Ok(place);
            }
            moves += 1;
        }
    }

    /// The places of all packs in bundles, and whether a bundle went away while they were read: what
    /// was in it is in one then that was not listed yet.
    fn read_bundles(&self) -> Result<(HashMap<PackId, BundlePlace>, bool)> {
        let mut found = HashMap::new();
        let mut has_moved = false;
        let entries = match self.disk.list(BUNDLES) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Error::io("bundles", error)),
        };
        let mut names: Vec<String> = entries
            .into_iter()
            .map(|entry| entry.name)
            .filter(|name| name.ends_with(".bundle"))
            .collect();
        // Later bundles have later names; a pack is read from the newest that has it.
        names.sort_unstable();
        for name in names {
            let path: Arc<str> = format!("{BUNDLES}/{name}").into();
            match self.bundle(&path) {
                Ok(bundle) => found.extend(
                    bundle
                        .entries
                        .into_iter()
                        .map(|entry| (entry.pack, BundlePlace { path: Arc::clone(&path), entry })),
                ),
                Err(error) if error.kind() == ErrorKind::Missing => has_moved = true,
                // A damaged bundle hides its packs only; `verify` names it.
                Err(error) => tracing::warn!(%path, %error, "cannot read a bundle"),
            }
        }
        Ok((found, has_moved))
    }
}

impl NodeSource for Packs {
    fn node(&self, at: NodeRef) -> Result<Node> {
        self.nodes
            .get_or_insert_with(&at, || self.again_if_moved(at.pack, |reader| reader.node(at.node)))
    }
}

/// Runs `use_decoder` with this thread's decoder.
pub(crate) fn with_decoder<T>(use_decoder: impl FnOnce(&mut Decoder) -> Result<T>) -> Result<T> {
    DECODER.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Some(Decoder::new()?);
        }
        match slot {
            Some(decoder) => use_decoder(decoder),
            None => Err(Error::missing("decoder", "none", "one")),
        }
    })
}

fn cannot_open(what: &'static str, path: &str, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => Error::missing(what, "no file", path),
        _ => Error::io(what, error),
    }
}

fn lost(pack: PackId) -> Error {
    Error::missing("pack", pack, "a file or bundle that holds it")
}

#[derive(Clone, Debug)]
struct OneEach;

impl<K, V> Weighter<K, V> for OneEach {
    fn weight(&self, _: &K, _: &V) -> u64 {
        1
    }
}

#[derive(Clone, Debug)]
struct NodeBytes;

impl<K> Weighter<K, Node> for NodeBytes {
    fn weight(&self, _: &K, node: &Node) -> u64 {
        node.memory_bytes() as u64 + 64
    }
}

#[derive(Clone, Debug)]
struct SegmentBytes;

impl<K> Weighter<K, Arc<LoadedSegment>> for SegmentBytes {
    fn weight(&self, _: &K, loaded: &Arc<LoadedSegment>) -> u64 {
        loaded.segment.memory_bytes() as u64 + 64
    }
}

#[derive(Clone, Debug)]
struct FrameBytes;

impl<K> Weighter<K, Arc<LazyFrame>> for FrameBytes {
    fn weight(&self, _: &K, frame: &Arc<LazyFrame>) -> u64 {
        frame.memory_bytes() as u64 + 64
    }
}
