//! A commit: images captured into one pack, and one manifest that publishes them.

mod stage;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::Instant;

use dormouse_image::block::{BLOCK_BYTES_U64, HoleMeaning};
use dormouse_image::codec::Codec;
use dormouse_image::map::Map;
use dormouse_image::pack::PackId;
use dormouse_sys::sparse::hole_granularity_beside;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::capture::{
    Capture, CaptureContext, CaptureInput, CapturedImage, CapturedPack, OwnBlocks, ParentImage,
};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::index::MergeScope;
use crate::layout::{pack_folder, pack_path};
use crate::manifest::{
    Figures, ImageEntry, Manifest, MemoryRegion, OwnPack, ParentRef, RootRef, Vmm, check_layout,
};
use crate::name::{ImageName, Name, SnapRef};
use crate::pin::Pin;
use crate::progress::Job;
use crate::source::{OpenSource, Source, Staged};
use crate::store::Store;

pub use stage::StageRequest;
pub(crate) use stage::stage;

/// Ancestors whose packs are looked at to tell blocks of disks from others, for the figures only.
const FIGURE_ANCESTORS_MAX: usize = 64;

/// Which snapshot a commit is taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parent {
    /// The newest of the same name, if any. Publishing fails with `Conflict` if there is a newer
    /// one by then.
    Auto,

    /// None, even if the name has snapshots.
    None,

    /// This one, of any name.
    Snapshot(SnapRef),
}

/// An image to be captured.
#[derive(Debug)]
pub struct NewImage {
    /// What it will be called.
    pub image: ImageName,

    /// Its bytes.
    pub source: Source,

    /// What holes in it mean. `Parent` needs a regular file, on a file system that reports holes of
    /// 4 KiB, and a parent that has the image; memory must also be as long as the parent's, while
    /// disks may grow and shrink.
    pub holes: HoleMeaning,
}

/// What to commit.
#[derive(Debug)]
pub struct CommitRequest {
    /// The snapshot's name; its number is given by the store.
    pub name: Name,

    /// What it is taken over.
    pub parent: Parent,

    /// New images. Those of the parent that are neither here nor in `drop` are inherited; but a parent's
    /// memory, and the states beside it, do not go with a disk of another time, whose guest would write
    /// what it remembers of the old one: where disks alone are given in the place of the parent's, they
    /// are left out.
    pub images: Vec<NewImage>,

    /// Images of the parent that the snapshot shall not have.
    pub drop: Vec<ImageName>,

    /// Whether it has what is given and nothing of the parent's, which need not be there any more: one
    /// that was removed is no parent.
    pub is_whole: bool,

    /// The user's own.
    pub labels: BTreeMap<String, String>,

    /// Where memory lies in the guest; empty: as in the parent if the size is the same.
    pub memory_layout: Vec<MemoryRegion>,

    /// What ran the guest; fields that are not given are inherited.
    pub vmm: Vmm,

    /// How new blocks are compressed.
    pub codec: Codec,
}

impl CommitRequest {
    /// A request for `name` over its newest snapshot, with no images yet.
    pub fn new(name: Name) -> CommitRequest {
        CommitRequest {
            name,
            parent: Parent::Auto,
            images: Vec::new(),
            drop: Vec::new(),
            is_whole: false,
            labels: BTreeMap::new(),
            memory_layout: Vec::new(),
            vmm: Vmm::default(),
            codec: Codec::DEFAULT,
        }
    }

    /// Adds an image whose holes are zeros.
    #[must_use]
    pub fn image(mut self, image: ImageName, source: Source) -> CommitRequest {
        self.images.push(NewImage { image, source, holes: HoleMeaning::Zero });
        self
    }
}

/// How long the stages of a commit took, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CommitSeconds {
    /// Everything.
    pub total: f64,

    /// Reading, hashing, looking up, compressing and writing, which overlap.
    pub capture: f64,

    /// Making the pack, the index run and the manifest durable.
    pub fsync: f64,

    /// Taking the number and publishing the manifest, its fsync apart.
    pub publish: f64,
}

/// What became of a commit.
#[derive(Clone, Debug)]
pub struct CommitReport {
    /// The published snapshot, with its figures.
    pub manifest: Manifest,

    /// Figures of the images that were captured.
    pub images: Vec<(ImageName, Figures)>,

    /// Images of the parent that do not go with the new disks, and were not inherited.
    pub left_out: Vec<ImageName>,

    /// Bytes written: pack, index run and manifest.
    pub written_bytes: u64,

    /// How long it took.
    pub seconds: CommitSeconds,
}

/// Adds up the time that durability costs.
#[derive(Debug, Default)]
pub(crate) struct SyncClock(f64);

impl SyncClock {
    pub(crate) fn time(&mut self, sync: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        let begin = Instant::now();
        let result = sync();
        self.0 += begin.elapsed().as_secs_f64();
        result
    }
}

/// Captures images and publishes them; see [`Store::commit_and_tell`].
pub(crate) fn commit(
    store: &Store,
    mut request: CommitRequest,
    on_read: &mut dyn FnMut(),
    job: Job<'_>,
) -> Result<CommitReport> {
    let begin = Instant::now();
    let key = store.packs().key().context(|| "cannot commit".to_owned())?.clone();
    let pin = Arc::new(Pin::new(store.disk(), &format!("commit {}", request.name))?);
    let (parent, newest) = find_parent(store, &request, &pin)?;
    if let (true, Some(parent)) = (request.is_whole, &parent) {
        let is_given = |image: &ImageName| request.images.iter().any(|new| new.image == *image);
        let others = parent.images.iter().map(|entry| &entry.image);
        request.drop = others.filter(|image| !is_given(image)).cloned().collect();
    }
    check_request(&request, parent.as_ref())?;
    let left_out = parent.as_ref().map(|parent| of_another_time(&request, parent));
    let left_out = left_out.unwrap_or_default();
    request.drop.extend(left_out.iter().cloned());
    let lower = staged_below(&request.images);
    let (images, staged) = split_staged(request.images);
    let inputs = open_inputs(images, parent.as_ref(), &pin)?;
    refresh_index(store)?;
    let total = inputs.iter().map(|(_, input)| input.source.bytes()).sum::<Option<u64>>();
    job.progress.begin("capture", total);
    let context = CaptureContext {
        disk: store.disk(),
        packs: store.packs(),
        pin: &pin,
        runs: store.index().runs(),
        key: key.clone(),
        codec: request.codec,
        threads: store.threads(),
        disk_slots: disk_slots(store, parent.as_ref()),
        job,
    };
    let tmp = pin.tmp_path("pack");
    let tmp_file = TmpFile { store, path: tmp.clone() };
    let mut capture = Capture::begin(&context, &tmp, Uuid::new_v4().as_fields().0)?;
    let mut captured = Vec::new();
    for (image, input) in inputs {
        captured.push((image, capture.image(input)?));
    }
    on_read();
    let (pack, mut own) = capture.finish()?;
    if let Some(pack) = &pack
        && let Some((_, image)) =
            captured.iter_mut().rev().find(|(_, image)| image.figures.new_bytes > 0)
    {
        image.figures.stored_bytes += pack.last_frame_bytes;
    }
    for (image, captured) in &mut captured {
        if let Some((_, lower)) = lower.iter().find(|(of, _)| of == image) {
            captured.figures = captured.figures.over(lower);
        }
    }
    let capture_seconds = begin.elapsed().as_secs_f64();
    job.check()?;
    job.progress.begin("publish", None);
    let mut clock = SyncClock::default();
    let publish_begin = Instant::now();
    let mut written_bytes = 0;
    let own_pack = match pack {
        None => None,
        Some(pack) => {
            written_bytes += pack.finished.bytes;
            Some(put_pack(store, &pin, &tmp, pack, &mut clock)?)
        }
    };
    drop(tmp_file);
    for (image, staged) in staged {
        captured.push((image, hold_staged(&pin, &staged)?));
    }
    let own_id = own_pack.as_ref().map_or(PackId::SELF, |(id, _)| *id);
    let mut manifest = Manifest {
        uuid: Uuid::now_v7(),
        name: request.name,
        number: 0,
        parent: parent.as_ref().map(|parent| ParentRef {
            uuid: parent.uuid,
            name: parent.name.clone(),
            number: parent.number,
        }),
        created: Timestamp::now(),
        key_id: key.id().to_string(),
        pack: own_pack.as_ref().map(|(id, pack)| OwnPack {
            id: id.to_string(),
            bytes: pack.finished.bytes,
            slots: pack.finished.toc.slots,
            disk_slots: pack.disk_slots,
        }),
        images: merge_images(parent.as_ref(), &captured, &request.drop, own_id),
        memory_layout: Vec::new(),
        vmm: inherit_vmm(request.vmm, parent.as_ref()),
        labels: request.labels,
        figures: Figures::default(),
    };
    manifest.memory_layout = choose_layout(request.memory_layout, parent.as_ref(), &manifest)?;
    captured.iter().for_each(|(_, image)| manifest.figures.add(&image.figures));
    let manifest_bytes = store.catalog().publish(&pin, &mut manifest, newest, &mut clock)?;
    written_bytes += manifest_bytes;
    let publish_seconds = publish_begin.elapsed().as_secs_f64() - clock.0;
    if let Some((id, _)) = own_pack {
        // The snapshot stands, whatever becomes of this.
        written_bytes += index_pack(store, &pin, &mut own, id);
    }
    Ok(CommitReport {
        images: captured.into_iter().map(|(image, captured)| (image, captured.figures)).collect(),
        left_out,
        manifest,
        written_bytes,
        seconds: CommitSeconds {
            total: begin.elapsed().as_secs_f64(),
            capture: capture_seconds,
            fsync: clock.0,
            publish: publish_seconds,
        },
    })
}

/// Looks for new runs of the index.
fn refresh_index(store: &Store) -> Result<()> {
    for path in store.index().refresh()? {
        tracing::warn!(path, "damaged index run; `dormouse gc` makes it again");
    }
    Ok(())
}

/// Makes a finished pack durable and gives it its name.
fn put_pack(
    store: &Store,
    pin: &Pin,
    tmp: &str,
    mut pack: CapturedPack,
    clock: &mut SyncClock,
) -> Result<(PackId, CapturedPack)> {
    let id = pack.finished.id;
    clock.time(&mut || pack.file.sync()).context(|| format!("cannot sync {tmp}"))?;
    // Held before it has its name, so that no collection sees it without an owner.
    pin.hold_pack(id, || true)?;
    let folder = pack_folder(id);
    let path = pack_path(id);
    let disk = store.disk();
    disk.create_dir_all(&folder)
        .and_then(|()| disk.rename(tmp, &path))
        .and_then(|()| clock.time(&mut || disk.sync_dir(&folder)))
        .context(|| format!("cannot put {path} in place"))?;
    store.packs().forget(id);
    Ok((id, pack))
}

/// Has the blocks of a pack found again, and tells the bytes that took. Without its run they are not
/// until `gc`.
fn index_pack(store: &Store, pin: &Pin, own: &mut OwnBlocks<'_>, id: PackId) -> u64 {
    let run = pin.tmp_path("run");
    let indexed = own
        .write_run(&run, id)
        .and_then(|bytes| store.index().publish(&run).map(|()| bytes))
        .and_then(|bytes| store.index().merge(pin, MergeScope::Tier, &|_| true).map(|_| bytes));
    indexed.unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot index the new pack; `dormouse gc` will");
        0
    })
}

/// Images to be captured, and those that are.
fn split_staged(images: Vec<NewImage>) -> (Vec<NewImage>, Vec<(ImageName, Staged)>) {
    let mut staged = Vec::new();
    let mut others = Vec::new();
    for new in images {
        match new.source {
            Source::Staged(image) => staged.push((new.image, image)),
            source => others.push(NewImage { source, ..new }),
        }
    }
    (others, staged)
}

/// What the images stored that others lie over.
fn staged_below(images: &[NewImage]) -> Vec<(ImageName, Figures)> {
    let staged = images.iter().filter_map(|new| match &new.source {
        Source::Over { staged, .. } => Some((new.image.clone(), *staged.figures())),
        _ => None,
    });
    staged.collect()
}

/// A staged image as one that this commit captured, held by it.
fn hold_staged(pin: &Pin, staged: &Staged) -> Result<CapturedImage> {
    let map = *staged.image().map();
    // Whoever staged it is there and pins it; from here on so do we.
    pin.hold_roots([map], || Ok(()))?;
    let size_bytes = staged.image().size_bytes();
    Ok(CapturedImage { map, size_bytes, figures: *staged.figures() })
}

/// Removes a temporary file unless it was moved away.
struct TmpFile<'a> {
    store: &'a Store,
    path: String,
}

impl Drop for TmpFile<'_> {
    fn drop(&mut self) {
        match self.store.disk().remove(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::debug!(path = self.path, %error, "temporary file left for gc");
            }
            _ => {}
        }
    }
}

/// The parent, pinned, and what must be the newest number of the name at publishing, if anything.
#[expect(clippy::option_option, reason = "nothing to check, or a newest snapshot, or none")]
fn find_parent(
    store: &Store,
    request: &CommitRequest,
    pin: &Pin,
) -> Result<(Option<Manifest>, Option<Option<u64>>)> {
    let (snap, newest) = match &request.parent {
        Parent::None => return Ok((None, None)),
        Parent::Snapshot(snap) => {
            let number = match store.catalog().resolve(snap) {
                Err(error) if request.is_whole && error.kind() == ErrorKind::NotFound => {
                    return Ok((None, None));
                }
                number => number?,
            };
            (SnapRef { name: snap.name.clone(), number: Some(number) }, None)
        }
        Parent::Auto => match store.catalog().numbers(&request.name)?.last() {
            None => return Ok((None, Some(None))),
            Some(&number) => {
                (SnapRef { name: request.name.clone(), number: Some(number) }, Some(Some(number)))
            }
        },
    };
    match store.hold(pin, &snap) {
        // Removed just now.
        Err(error) if request.is_whole && error.kind() == ErrorKind::NotFound => Ok((None, None)),
        manifest => Ok((Some(manifest?), newest)),
    }
}

/// What would mix up or lose data, and what makes no sense.
fn check_request(request: &CommitRequest, parent: Option<&Manifest>) -> Result<()> {
    let refuse = |why: String| Err(Error::new(ErrorKind::Refused, why));
    let mut seen = HashSet::new();
    for new in &request.images {
        if !seen.insert(&new.image) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{} is given twice", new.image),
            ));
        }
        if request.drop.contains(&new.image) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{} is both given and dropped", new.image),
            ));
        }
        let is_complete =
            matches!(new.source, Source::Layer { .. } | Source::Staged(_) | Source::Over { .. });
        if new.holes == HoleMeaning::Parent && !is_complete {
            if !matches!(request.parent, Parent::Snapshot(_)) {
                return refuse(format!(
                    "{} is a diff: name the snapshot that it is against with --parent",
                    new.image
                ));
            }
            if parent.is_none_or(|parent| parent.image(&new.image).is_none()) {
                return refuse(format!(
                    "{} is a diff, but the parent has no such image",
                    new.image
                ));
            }
        }
    }
    for image in &request.drop {
        if parent.is_none_or(|parent| parent.image(image).is_none()) {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("cannot drop {image}: the parent does not have it"),
            ));
        }
    }
    let inherits = |wanted: fn(&ImageName) -> bool| {
        parent.is_some_and(|parent| {
            parent.images.iter().any(|entry| {
                wanted(&entry.image)
                    && !seen.contains(&entry.image)
                    && !request.drop.contains(&entry.image)
            })
        })
    };
    let is_memory = |image: &ImageName| *image == ImageName::Memory;
    let is_state = |image: &ImageName| matches!(image, ImageName::State(_));
    if seen.iter().any(|image| is_memory(image)) && inherits(is_state) {
        return refuse(
            "new memory over the parent's old state resumes garbage: give the state, too, or drop it"
                .to_owned(),
        );
    }
    if seen.iter().any(|image| is_state(image)) && inherits(is_memory) {
        return refuse(
            "a new state over the parent's old memory resumes garbage: give the memory, too, or \
             drop it"
                .to_owned(),
        );
    }
    // Over a named parent this makes a snapshot of another name; over the newest it is a mistake.
    let is_same =
        request.drop.is_empty() && request.labels.is_empty() && request.parent == Parent::Auto;
    if seen.is_empty() && (parent.is_none() || is_same) {
        return Err(Error::new(ErrorKind::InvalidInput, "there is nothing to commit"));
    }
    Ok(())
}

/// A parent's memory and states, if disks alone are given in the place of its own: they remember those.
fn of_another_time(request: &CommitRequest, parent: &Manifest) -> Vec<ImageName> {
    let are_disks = request.images.iter().all(|new| new.image.is_disk());
    let is_replaced = request.images.iter().any(|new| parent.image(&new.image).is_some());
    let has_memory = parent.image(&ImageName::Memory).is_some();
    if !are_disks || !is_replaced || !has_memory {
        return Vec::new();
    }
    let names = parent.images.iter().map(|entry| &entry.image);
    let inherited = names.filter(|image| !image.is_disk() && !request.drop.contains(image));
    inherited.cloned().collect()
}

/// Opens all sources, disks first, then memory, then states.
fn open_inputs(
    images: Vec<NewImage>,
    parent: Option<&Manifest>,
    pin: &Pin,
) -> Result<Vec<(ImageName, CaptureInput)>> {
    let mut inputs = Vec::new();
    for new in images {
        let source = new.source.open()?;
        let lower = match &new.source {
            Source::Layer { base, .. } => Some(base.as_ref()),
            Source::Over { staged, .. } => Some(Some(staged.image())),
            _ => None,
        };
        let (parent, holes) = match lower {
            Some(base) => {
                let base = base
                    .map(|base| ParentImage { map: *base.map(), size_bytes: base.size_bytes() });
                // The reader is there and pins it; from here on so do we.
                pin.hold_roots(base.map(|base| base.map), || Ok(()))?;
                (base, HoleMeaning::Parent)
            }
            None => {
                let entry = parent.and_then(|parent| parent.image(&new.image));
                let parent = entry
                    .map(|entry| {
                        entry.map().map(|map| ParentImage { map, size_bytes: entry.size_bytes })
                    })
                    .transpose()?;
                if new.holes == HoleMeaning::Parent {
                    check_diff(&new.image, &new.source, &source, parent)?;
                }
                (parent, new.holes)
            }
        };
        let is_disk = new.image.is_disk();
        inputs.push((new.image, CaptureInput { source, holes, parent, is_disk }));
    }
    inputs.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(inputs)
}

fn check_diff(
    image: &ImageName,
    source: &Source,
    open: &OpenSource,
    parent: Option<ParentImage>,
) -> Result<()> {
    let refuse = |why: String| Err(Error::new(ErrorKind::Refused, why));
    let label = &open.label;
    // A device, pipe or buffer gives zeros where a file has a hole, and what did not change would
    // be lost.
    let (Source::File(path), Some(bytes), true) = (source, open.bytes(), open.is_regular_file())
    else {
        return refuse(format!(
            "{label} cannot be a diff of {image}: only a regular file has holes that tell what did \
             not change; give the file that the VMM wrote"
        ));
    };
    if let (ImageName::Memory, Some(parent)) = (image, parent)
        && parent.size_bytes != bytes
    {
        return refuse(format!(
            "{label} has {bytes} bytes and the parent's memory {}, so it is no diff against it; name \
             the snapshot that it is against with --parent",
            parent.size_bytes
        ));
    }
    let granularity = hole_granularity_beside(path)
        .context(|| format!("cannot find out how holes are reported at {}", path.display()))?;
    match granularity {
        Some(granularity) if granularity <= BLOCK_BYTES_U64 => Ok(()),
        Some(granularity) => refuse(format!(
            "the file system of {} reports holes in units of {granularity} bytes, so unchanged pages \
             would be taken for zeros; write the diff to ext4, xfs or tmpfs with 4 KiB blocks",
            path.display()
        )),
        None => refuse(format!(
            "the file system of {} does not report holes, so unchanged pages would be taken for \
             zeros; write the diff to ext4, xfs or tmpfs",
            path.display()
        )),
    }
}

fn merge_images(
    parent: Option<&Manifest>,
    captured: &[(ImageName, CapturedImage)],
    drop: &[ImageName],
    own: PackId,
) -> Vec<ImageEntry> {
    let mut images: BTreeMap<ImageName, ImageEntry> = parent
        .into_iter()
        .flat_map(|parent| &parent.images)
        .filter(|entry| !drop.contains(&entry.image))
        .map(|entry| (entry.image.clone(), ImageEntry { figures: None, ..entry.clone() }))
        .collect();
    for (image, captured) in captured {
        images.insert(
            image.clone(),
            ImageEntry {
                image: image.clone(),
                size_bytes: captured.size_bytes,
                root: root_ref(&captured.map, own),
                figures: Some(captured.figures),
            },
        );
    }
    images.into_values().collect()
}

fn root_ref(map: &Map, own: PackId) -> Option<RootRef> {
    map.root
        .map(|root| root.resolve(own))
        .map(|root| RootRef { pack: root.pack.to_string(), node: root.node })
}

/// The given layout, or the parent's if the memory is as long as it was.
fn choose_layout(
    given: Vec<MemoryRegion>,
    parent: Option<&Manifest>,
    manifest: &Manifest,
) -> Result<Vec<MemoryRegion>> {
    let bytes = manifest.image(&ImageName::Memory).map(|entry| entry.size_bytes);
    if !given.is_empty() {
        check_layout(&given, bytes)?;
        return Ok(given);
    }
    let inherited = parent.filter(|parent| {
        bytes.is_some() && parent.image(&ImageName::Memory).map(|entry| entry.size_bytes) == bytes
    });
    Ok(inherited.map(|parent| parent.memory_layout.clone()).unwrap_or_default())
}

fn inherit_vmm(given: Vmm, parent: Option<&Manifest>) -> Vmm {
    let old = parent.map(|parent| parent.vmm.clone()).unwrap_or_default();
    Vmm {
        kind: given.kind.or(old.kind),
        version: given.version.or(old.version),
        cpu_model: given.cpu_model.or(old.cpu_model),
        host_kernel: given.host_kernel.or(old.host_kernel),
        arch: given.arch.or(old.arch),
        vcpus: given.vcpus.or(old.vcpus),
    }
}

/// How many first slots of the lineage's packs hold blocks of disks.
fn disk_slots(store: &Store, parent: Option<&Manifest>) -> HashMap<PackId, u32> {
    let mut slots = HashMap::new();
    let mut next = parent.cloned();
    for _ in 0..FIGURE_ANCESTORS_MAX {
        let Some(manifest) = next else { break };
        if let Some(pack) = &manifest.pack
            && let Some(id) = PackId::parse(&pack.id)
        {
            slots.insert(id, pack.disk_slots);
        }
        next = manifest.parent.and_then(|parent| {
            let snap = SnapRef { name: parent.name, number: Some(parent.number) };
            store.catalog().manifest(&snap).ok()
        });
    }
    slots
}
