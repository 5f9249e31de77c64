//! Capture: images go in, and blocks that are not stored yet come out as one pack.
//!
//! ```text
//! feeder ─ pieces ─► workers: read, zero test, digest ─► sequencer: parent? continued run? this
//!    ▲                                                   commit's own? index? else new ─┐
//!    └──────────── buffers ◄──────────────────────────────────────┘                     │
//!                              workers: compress ◄── 16 new blocks ─────────────────────┘
//!                                  └─► sequencer: append to the pack in order
//! ```
//!
//! Everything that decides happens in one thread, in the order of the image; everything that costs
//! happens in the workers. Memory is bounded by 6 pieces of 512 KiB and
//! 32 frames of 64 KiB for each thread, the digests of 900,000 new blocks,
//! and 32 bytes for each leaf and each 1,024 new blocks.

mod feed;
mod image;
mod own;
mod pool;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::BufWriter;
use std::sync::Arc;

use dormouse_image::block::{BLOCK_BYTES, HoleMeaning};
use dormouse_image::codec::Codec;
use dormouse_image::digest::{Digest, DomainKey};
use dormouse_image::map::Map;
use dormouse_image::pack::{
    EncodedFrame, FRAME_BLOCKS, FinishedPack, PackId, PackParams, PackWriter,
};

use crate::disk::{Disk, DiskSink, DiskWriter};
use crate::error::{Context, Error, Result};
use crate::index::{Index, IndexHit, IndexRun};
use crate::manifest::Figures;
use crate::packs::{LoadedSegment, Packs};
use crate::pin::Pin;
use crate::progress::Job;
use crate::source::OpenSource;

pub(crate) use own::OwnBlocks;
use pool::{Done, FRAMES_PER_THREAD, Pool, Task};

pub(crate) use pool::PIECE_BYTES;

/// Bytes gathered before they are written to the pack.
const WRITE_BUFFER_BYTES: usize = 1 << 20;

/// What a capture works with.
pub(crate) struct CaptureContext<'a> {
    pub(crate) disk: &'a Arc<dyn Disk>,
    pub(crate) packs: &'a Packs,
    pub(crate) pin: &'a Arc<Pin>,
    pub(crate) runs: Vec<Arc<IndexRun>>,
    pub(crate) key: DomainKey,
    pub(crate) codec: Codec,
    pub(crate) threads: usize,
    /// So many first slots of known packs hold blocks of disks.
    pub(crate) disk_slots: HashMap<PackId, u32>,
    pub(crate) job: Job<'a>,
}

/// An image to be captured.
pub(crate) struct CaptureInput {
    pub(crate) source: OpenSource,
    pub(crate) holes: HoleMeaning,
    pub(crate) parent: Option<ParentImage>,
    pub(crate) is_disk: bool,
}

/// The parent's image of the same name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ParentImage {
    pub(crate) map: Map,
    pub(crate) size_bytes: u64,
}

/// An image that was captured; its map names the new pack [`PackId::SELF`] until it is finished.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CapturedImage {
    pub(crate) map: Map,
    pub(crate) size_bytes: u64,
    pub(crate) figures: Figures,
}

/// A capture under way.
pub(crate) struct Capture<'a> {
    context: &'a CaptureContext<'a>,
    pool: Pool,
    writer: PackWriter<BufWriter<DiskSink>>,
    own: OwnBlocks<'a>,
    /// New blocks that wait for their frame to become full.
    frame: Vec<u8>,
    frame_digests: Vec<Digest>,
    next_slot: u32,
    frames_sent: u64,
    frames_written: u64,
    frames_waiting: BTreeMap<u64, EncodedFrame>,
    frames_in_flight_max: u64,
    stored_bytes: u64,
    /// Packs that may be relied on, each with the salt of a writing that was there after it was
    /// pinned, and packs that are gone.
    relied: HashMap<PackId, u32>,
    gone: HashSet<PackId>,
    /// The segment that was asked last, as runs ask the same one again and again.
    last_segment: Option<(PackId, u32, Arc<LoadedSegment>)>,
    disk_slots: u32,
}

/// What a capture left in the temporary file, if it left anything.
pub(crate) struct CapturedPack {
    pub(crate) finished: FinishedPack,
    pub(crate) file: Box<dyn DiskWriter>,
    pub(crate) disk_slots: u32,
    /// What the last blocks took, which did not fill a frame; in no image's figures yet.
    pub(crate) last_frame_bytes: u64,
}

impl<'a> Capture<'a> {
    /// Begins a pack in `path`.
    pub(crate) fn begin(
        context: &'a CaptureContext<'a>,
        path: &str,
        salt: u32,
    ) -> Result<Capture<'a>> {
        let file = context.disk.create(path).context(|| format!("cannot make {path}"))?;
        let sink = BufWriter::with_capacity(WRITE_BUFFER_BYTES, DiskSink(file));
        let params = PackParams::new(context.key.id(), salt);
        let writer = PackWriter::new(sink, params).context(|| format!("cannot write {path}"))?;
        let threads = context.threads;
        Ok(Capture {
            context,
            pool: Pool::start(threads, &context.key, context.codec)?,
            writer,
            own: OwnBlocks::new(&**context.disk, context.pin),
            frame: Vec::with_capacity(FRAME_BLOCKS * BLOCK_BYTES),
            frame_digests: Vec::with_capacity(FRAME_BLOCKS),
            next_slot: 0,
            frames_sent: 0,
            frames_written: 0,
            frames_waiting: BTreeMap::new(),
            frames_in_flight_max: (threads * FRAMES_PER_THREAD) as u64,
            stored_bytes: 0,
            relied: HashMap::new(),
            gone: HashSet::new(),
            last_segment: None,
            disk_slots: 0,
        })
    }

    /// Writes what is left and ends the pack. `None` if nothing new was found; the temporary file
    /// is then of no use.
    pub(crate) fn finish(mut self) -> Result<(Option<CapturedPack>, OwnBlocks<'a>)> {
        let stored_before = self.stored_bytes;
        if !self.frame_digests.is_empty() {
            self.send_frame()?;
        }
        self.write_sent_frames()?;
        let last_frame_bytes = self.stored_bytes - stored_before;
        let cannot = || "cannot write the pack".to_owned();
        let (finished, sink) = self.writer.finish().context(cannot)?;
        if finished.toc.slots == 0 && finished.toc.nodes.is_empty() {
            return Ok((None, self.own));
        }
        let file = sink.into_inner().map_err(|error| Error::io(cannot(), error.into_error()))?.0;
        let pack = CapturedPack { finished, file, disk_slots: self.disk_slots, last_frame_bytes };
        Ok((Some(pack), self.own))
    }

    /// Stores a block that is nowhere yet and returns its slot.
    fn store(&mut self, digest: Digest, block: &[u8]) -> Result<u32> {
        let slot = self.next_slot;
        self.next_slot = slot.checked_add(1).ok_or_else(|| {
            Error::new(
                crate::error::ErrorKind::Unsupported,
                "more than 16 TiB of new blocks in one commit; use several",
            )
        })?;
        self.own.insert(digest, slot)?;
        self.frame.extend_from_slice(block);
        self.frame_digests.push(digest);
        if self.frame_digests.len() == FRAME_BLOCKS {
            self.send_frame()?;
        }
        Ok(slot)
    }

    fn send_frame(&mut self) -> Result<()> {
        let blocks =
            std::mem::replace(&mut self.frame, Vec::with_capacity(FRAME_BLOCKS * BLOCK_BYTES));
        let digests = std::mem::replace(&mut self.frame_digests, Vec::with_capacity(FRAME_BLOCKS));
        self.pool.send(Task::Compress { number: self.frames_sent, blocks, digests })?;
        self.frames_sent += 1;
        Ok(())
    }

    /// Whether enough frames are being compressed that nothing should be added.
    fn is_full(&self) -> bool {
        self.frames_sent - self.frames_written >= self.frames_in_flight_max
    }

    /// Waits for all frames that are being compressed and writes them.
    fn write_sent_frames(&mut self) -> Result<()> {
        while self.frames_written < self.frames_sent {
            match self.pool.wait(self.context.job)? {
                Done::Compressed { number, frame } => self.write_frame(number, frame)?,
                Done::Failed(error) => return Err(error),
                Done::Piece { .. } => {}
            }
        }
        Ok(())
    }

    fn write_frame(&mut self, number: u64, frame: EncodedFrame) -> Result<()> {
        self.frames_waiting.insert(number, frame);
        while let Some(frame) = self.frames_waiting.remove(&self.frames_written) {
            self.writer.push_frame(&frame).context(|| "cannot write the pack".to_owned())?;
            self.stored_bytes += frame.stored_bytes() as u64;
            self.frames_written += 1;
        }
        Ok(())
    }

    /// Whether slot `slot` of `pack` is in its file and has this digest. Damage counts as no.
    fn slot_has(&mut self, pack: PackId, slot: u32, digest: &Digest) -> bool {
        use dormouse_image::pack::SEGMENT_SLOTS;
        let number = slot / SEGMENT_SLOTS;
        let known =
            matches!(&self.last_segment, Some((last, at, _)) if *last == pack && *at == number);
        if !known {
            match self.segment(pack, number) {
                Ok(segment) => self.last_segment = Some((pack, number, segment)),
                Err(error) => {
                    tracing::debug!(%pack, slot, %error, "cannot compare with a stored block");
                    return false;
                }
            }
        }
        let within = slot % SEGMENT_SLOTS;
        self.last_segment.as_ref().is_some_and(|(_, _, loaded)| {
            loaded.segment.digest(within) == Some(*digest) && loaded.segment.is_present(within)
        })
    }

    /// A segment; of a pack that is relied on not from before it was pinned, when a compaction may
    /// still have dropped slots. Somebody who reads at the same time may have put such a one into
    /// the cache.
    fn segment(
        &mut self,
        pack: PackId,
        number: u32,
    ) -> dormouse_image::error::Result<Arc<LoadedSegment>> {
        let packs = self.context.packs;
        let loaded = packs.segment(pack, number)?;
        match self.relied.get_mut(&pack) {
            Some(salt) if *salt != loaded.salt => {
                let loaded = packs.segment_afresh(pack, number)?;
                *salt = loaded.salt;
                Ok(loaded)
            }
            _ => Ok(loaded),
        }
    }

    /// Pins a pack before its blocks are relied on; false if it is gone or cannot be opened.
    fn rely_on(&mut self, pack: PackId) -> Result<bool> {
        if self.relied.contains_key(&pack) {
            return Ok(true);
        }
        if self.gone.contains(&pack) {
            return Ok(false);
        }
        let packs = self.context.packs;
        if !self.context.pin.hold_pack(pack, || packs.exists(pack))? {
            self.gone.insert(pack);
            return Ok(false);
        }
        // What is cached may be from before a compaction that dropped slots; from now on none can.
        packs.forget(pack);
        self.last_segment = None;
        match packs.open_afresh(pack) {
            Ok(reader) => {
                self.relied.insert(pack, reader.params().salt);
                Ok(true)
            }
            Err(error) => {
                tracing::debug!(%pack, %error, "cannot compare with stored blocks");
                self.gone.insert(pack);
                Ok(false)
            }
        }
    }

    /// A stored block with this digest, the one nearest to `previous` if there are several.
    fn find_stored(
        &mut self,
        digest: &Digest,
        previous: Option<(PackId, u32)>,
    ) -> Result<Option<IndexHit>> {
        let mut hits: Vec<IndexHit> = Vec::new();
        Index::lookup(&self.context.runs, digest, &mut |hit| {
            if !hits.contains(&hit) {
                hits.push(hit);
            }
        });
        if let Some((pack, slot)) = previous {
            hits.sort_by_key(|hit| (hit.pack != pack, hit.slot.abs_diff(slot)));
        }
        for hit in hits {
            if self.rely_on(hit.pack)? && self.slot_has(hit.pack, hit.slot, digest) {
                return Ok(Some(hit));
            }
        }
        Ok(None)
    }
}
