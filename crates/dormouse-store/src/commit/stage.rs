//! Staging: an image is captured while somebody writes it, and waits for the commit that it belongs
//! to.
//!
//! What is written goes through the pipeline of a commit at once, so it needs no room of its own; its
//! pack is durable and indexed when this returns, and held by a pin as no manifest names it yet.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use dormouse_image::block::HoleMeaning;
use dormouse_image::codec::Codec;
use dormouse_image::map::Map;
use dormouse_image::pack::PackId;
use uuid::Uuid;

use super::{SyncClock, TmpFile, index_pack, put_pack, refresh_index};
use crate::capture::{Capture, CaptureContext, CaptureInput, ParentImage};
use crate::error::{Context, Result};
use crate::pin::Pin;
use crate::progress::Job;
use crate::reader::ImageReader;
use crate::source::{Body, OpenSource, Staged, WriteSource};
use crate::store::Store;

/// An image to be captured as it is written.
pub struct StageRequest {
    /// What messages and pins call it.
    pub label: String,

    /// Its bytes.
    pub writes: Box<dyn WriteSource>,

    /// What it lies over, or was before: blocks that are the same are not stored again. It must stay
    /// open until the image is staged.
    pub base: Option<ImageReader>,

    /// What was never written: zero, or as in the base.
    pub holes: HoleMeaning,

    /// How new blocks are compressed.
    pub codec: Codec,
}

impl fmt::Debug for StageRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StageRequest").field("label", &self.label).finish_non_exhaustive()
    }
}

/// Captures an image; see [`Store::stage`].
pub(crate) fn stage(store: &Store, request: StageRequest, job: Job<'_>) -> Result<Staged> {
    let StageRequest { label, writes, base, holes, codec } = request;
    let key = store.packs().key().context(|| "cannot capture".to_owned())?.clone();
    let pin = Arc::new(Pin::new(store.disk(), &format!("capture {label}"))?);
    let parent =
        base.as_ref().map(|base| ParentImage { map: *base.map(), size_bytes: base.size_bytes() });
    pin.hold_roots(parent.map(|parent| parent.map), || Ok(()))?;
    refresh_index(store)?;
    let context = CaptureContext {
        disk: store.disk(),
        packs: store.packs(),
        pin: &pin,
        runs: store.index().runs(),
        key: key.clone(),
        codec,
        threads: store.threads(),
        disk_slots: HashMap::new(),
        job,
    };
    let tmp = pin.tmp_path("pack");
    let tmp_file = TmpFile { store, path: tmp.clone() };
    let mut capture = Capture::begin(&context, &tmp, Uuid::new_v4().as_fields().0)?;
    let source = OpenSource { label: label.clone(), body: Body::Written(writes) };
    let mut image = capture.image(CaptureInput { source, holes, parent, is_disk: false })?;
    let (pack, mut own) = capture.finish()?;
    job.check()?;
    let mut id = PackId::SELF;
    if let Some(pack) = pack {
        image.figures.stored_bytes += pack.last_frame_bytes;
        id = put_pack(store, &pin, &tmp, pack, &mut SyncClock::default())?.0;
        index_pack(store, &pin, &mut own, id);
    }
    drop(tmp_file);
    drop(own);
    let map = Map { root: image.map.root.map(|root| root.resolve(id)), ..image.map };
    // From now on the map keeps what it needs, whatever the pin's packs are for.
    pin.hold_roots([map], || Ok(()))?;
    let packs = Arc::clone(store.packs());
    let threads = store.threads();
    let reader =
        ImageReader::new(packs, Some(Arc::clone(&pin)), label, map, image.size_bytes, threads);
    Ok(Staged::new(reader, image.figures))
}
