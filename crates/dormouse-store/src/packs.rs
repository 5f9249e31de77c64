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

use dormouse_image::block::BLOCK_BYTES;
use dormouse_image::codec::Decoder;
use dormouse_image::digest::{Digest, DomainKey};
use dormouse_image::error::{Error, ErrorKind, Result};
use dormouse_image::map::{Node, NodeRef, NodeSource};
use dormouse_image::pack::{
    Bundle, BundleEntry, DecodedFrame, PackId, PackReader, ReadAt, SEGMENT_SLOTS, Segment,
};
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::disk::{Disk, DiskFile};
use crate::layout::{BUNDLES, pack_path};

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
    frames: Cache<FrameKey, Arc<DecodedFrame>, FrameBytes>,
    /// Where the packs of bundles lie. Never held over I/O.
    bundles: RwLock<HashMap<PackId, BundlePlace>>,
    decoded_frames: AtomicU64,
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

/// A block in a decoded and checked frame.
#[derive(Debug)]
pub(crate) struct FoundBlock {
    frame: Arc<DecodedFrame>,
    position: usize,
    run: usize,
}

impl FoundBlock {
    /// The block.
    pub(crate) fn block(&self) -> &[u8] {
        self.frame.block(self.position)
    }

    /// The frame, and the bytes of [`run`](FoundBlock::run) in it.
    pub(crate) fn into_run(self) -> (Arc<DecodedFrame>, Range<usize>) {
        let start = self.position * BLOCK_BYTES;
        (self.frame, start..start + self.run * BLOCK_BYTES)
    }

    /// The block and those behind it whose slots run on, one behind the other. Where slots were
    /// dropped, neighbours in a frame are not neighbours in the pack.
    pub(crate) fn run(&self) -> &[u8] {
        &self.frame.bytes()[self.position * BLOCK_BYTES..][..self.run * BLOCK_BYTES]
    }
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

    /// The block of a slot, in the frame that holds it.
    pub(crate) fn block(&self, pack: PackId, slot: u32) -> Result<FoundBlock> {
        match self.block_once(pack, slot)? {
            Some(found) => Ok(found),
            None => {
                // The pack was written again while we had its old places at hand.
                self.forget(pack);
                self.block_once(pack, slot)?
                    .ok_or_else(|| Error::missing("slot", "one that was dropped", slot))
            }
        }
    }

    /// The block of a slot, if its frame is decoded and nothing has to be read to find it.
    pub(crate) fn cached_block(&self, pack: PackId, slot: u32) -> Option<FoundBlock> {
        let number = slot / SEGMENT_SLOTS;
        let loaded = self.segments.get(&(pack, number))?;
        let (frame, position) = loaded.segment.locate(slot % SEGMENT_SLOTS)?;
        let frame = u32::try_from(frame).unwrap_or(u32::MAX);
        let key = FrameKey { pack, salt: loaded.salt, segment: number, frame };
        let frame = self.frames.get(&key)?;
        let run_on = loaded.segment.run_from(slot % SEGMENT_SLOTS);
        let run = run_on.min(frame.blocks().saturating_sub(position));
        Some(FoundBlock { frame, position, run })
    }

    fn block_once(&self, pack: PackId, slot: u32) -> Result<Option<FoundBlock>> {
        let number = slot / SEGMENT_SLOTS;
        let loaded = self.segment(pack, number)?;
        let Some((frame, position)) = loaded.segment.locate(slot % SEGMENT_SLOTS) else {
            return Ok(None);
        };
        let run_on = loaded.segment.run_from(slot % SEGMENT_SLOTS);
        let found = |frame: Arc<DecodedFrame>| {
            let run = run_on.min(frame.blocks().saturating_sub(position));
            Ok(Some(FoundBlock { frame, position, run }))
        };
        let frame_number = u32::try_from(frame).unwrap_or(u32::MAX);
        let key = FrameKey { pack, salt: loaded.salt, segment: number, frame: frame_number };
        if let Some(decoded) = self.frames.get(&key) {
            return found(decoded);
        }
        let reader = self.reader(pack)?;
        if reader.params().salt != loaded.salt {
            return Ok(None);
        }
        let decoded = Arc::new(self.decode(&reader, number, &loaded.segment, frame)?);
        self.frames.insert(key, Arc::clone(&decoded));
        found(decoded)
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

impl<K> Weighter<K, Arc<DecodedFrame>> for FrameBytes {
    fn weight(&self, _: &K, frame: &Arc<DecodedFrame>) -> u64 {
        frame.bytes().len() as u64 + 64
    }
}
