//! The store: a folder of packs and manifests.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use crate::catalog::Catalog;
use crate::commit::{self, CommitReport, CommitRequest, StageRequest};
use crate::disk::{Disk, RealDisk};
use crate::error::{Error, ErrorKind, Result};
use crate::gc::{self, CompactOptions, CompactReport, GcOptions, GcReport, KeepRules, PruneReport};
use crate::index::Index;
use crate::layout::{self, Parameters};
use crate::live;
pub use crate::live::Durable;
use crate::manifest::{Figures, ImageEntry, Manifest, RootRef};
use crate::name::{ImageName, Name, SnapRef};
use crate::packs::Packs;
use crate::pin::Pin;
use crate::progress::Job;
use crate::reader::ImageReader;
use crate::source::Staged;
use crate::trace;
use crate::usage::{self, ImageDiff, PackUse, Usage};
use crate::verify::{self, VerifyOptions, VerifyReport};

/// How a store is opened.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes of decoded frames kept in memory.
    pub frame_cache_bytes: u64,

    /// Bytes of map nodes, segments and tables of contents kept in memory.
    pub node_cache_bytes: u64,

    /// Bytes of index filters kept in memory; beyond it they are read from the file.
    pub index_filter_bytes: u64,

    /// Threads that hash and compress; 0 is one a core.
    pub threads: usize,
}

impl Config {
    /// What a command uses: 256 MiB in all.
    pub const STANDARD: Config = Config {
        frame_cache_bytes: 64 << 20,
        node_cache_bytes: 64 << 20,
        index_filter_bytes: 128 << 20,
        threads: 0,
    };
}

/// An open store. Cheap to clone; clones share caches.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    disk: Arc<dyn Disk>,
    parameters: Parameters,
    packs: Arc<Packs>,
    index: Index,
    catalog: Catalog,
    threads: usize,
}

/// The snapshots that were found, and what could not be read.
#[derive(Debug)]
pub struct Listing {
    /// By name, then number.
    pub snapshots: Vec<Manifest>,

    /// `NAME@N` and what is wrong with its manifest.
    pub damaged: Vec<(String, Error)>,
}

/// A snapshot held open: as long as this or an image of it lives, no collection takes its blocks
/// away, not even after `rm`.
#[derive(Clone, Debug)]
pub struct Snapshot {
    store: Store,
    manifest: Arc<Manifest>,
    pin: Option<Arc<Pin>>,
}

impl Store {
    /// Makes an empty store in a folder that is empty or not there yet, and opens it.
    pub fn init(dir: &Path, config: Config) -> Result<Store> {
        Store::init_on(Arc::new(RealDisk::new(dir)), config).map_err(|error| in_folder(dir, error))
    }

    /// Opens a store. One that may not be written to can still be read.
    pub fn open(dir: &Path, config: Config) -> Result<Store> {
        Store::open_on(Arc::new(RealDisk::new(dir)), config).map_err(|error| in_folder(dir, error))
    }

    /// As [`Store::init`], on any [`Disk`].
    pub fn init_on(disk: Arc<dyn Disk>, config: Config) -> Result<Store> {
        layout::init(&*disk)?;
        Store::open_on(disk, config)
    }

    /// As [`Store::open`], on any [`Disk`].
    pub fn open_on(disk: Arc<dyn Disk>, config: Config) -> Result<Store> {
        let (parameters, key) = layout::open(&*disk)?;
        let threads = match config.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let packs =
            Packs::new(Arc::clone(&disk), key, config.frame_cache_bytes, config.node_cache_bytes);
        Ok(Store {
            inner: Arc::new(Inner {
                packs: Arc::new(packs),
                index: Index::new(Arc::clone(&disk), config.index_filter_bytes),
                catalog: Catalog::new(Arc::clone(&disk)),
                parameters,
                disk,
                threads,
            }),
        })
    }

    /// The store's id.
    pub fn id(&self) -> Uuid {
        self.inner.parameters.id
    }

    /// Captures images and publishes them as a snapshot. Blocks that the parent has at the same
    /// offset, or that are stored anywhere in the store, are not stored again.
    ///
    /// On any error the store is as it was, but for files that nothing refers to and `gc` deletes.
    /// See [`CommitRequest`] for what is refused.
    pub fn commit(&self, request: CommitRequest, job: Job<'_>) -> Result<CommitReport> {
        self.commit_and_tell(request, &mut || {}, job)
    }

    /// The same; `on_read` is called when all of the images was read, before it is durable: whoever kept
    /// them from changing need not any longer.
    pub fn commit_and_tell(
        &self,
        request: CommitRequest,
        on_read: &mut dyn FnMut(),
        job: Job<'_>,
    ) -> Result<CommitReport> {
        commit::commit(self, request, on_read, job)
    }

    /// Captures an image while it is written, durably, to be in a commit by
    /// [`Source::Staged`](crate::source::Source::Staged) later. Returns when the last of it was
    /// given. What is staged and never committed `gc` deletes once nobody holds it.
    pub fn stage(&self, request: StageRequest, job: Job<'_>) -> Result<Staged> {
        commit::stage(self, request, job)
    }

    /// An image that another process staged and still holds, held here, too.
    pub fn staged_image(
        &self,
        label: &str,
        root: Option<&RootRef>,
        size_bytes: u64,
        figures: Figures,
    ) -> Result<Staged> {
        let image = self.held_image(label, root, size_bytes)?;
        // If nobody held it any more when it was pinned here, a collection may have taken it: its
        // root first of all, which no snapshot has.
        if let Some(root) = image.map().root
            && !self.packs().exists(root.pack)
        {
            let message = format!("{label} was let go of before it was committed");
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        Ok(Staged::new(image, figures))
    }

    /// All names that have or had snapshots.
    pub fn names(&self) -> Result<Vec<Name>> {
        self.catalog().names()
    }

    /// The numbers of a name's snapshots, ascending; none if there are none.
    pub fn numbers(&self, name: &Name) -> Result<Vec<u64>> {
        self.catalog().numbers(name)
    }

    /// All snapshots, or those of one name.
    pub fn list(&self, name: Option<&Name>) -> Result<Listing> {
        self.catalog().list(name)
    }

    /// A snapshot's manifest.
    pub fn manifest(&self, snap: &SnapRef) -> Result<Manifest> {
        self.catalog().manifest(snap)
    }

    /// Opens a snapshot and pins it.
    pub fn snapshot(&self, snap: &SnapRef) -> Result<Snapshot> {
        let snap = self.resolve(snap)?;
        let (pin, manifest) = match Pin::new(self.disk(), &format!("read {snap}")) {
            Ok(pin) => {
                let manifest = self.hold(&pin, &snap)?;
                (Some(Arc::new(pin)), manifest)
            }
            // Where nothing may be written nothing is deleted by us, either; what another user
            // takes away meanwhile is an error, never other bytes.
            Err(error) if error.is_not_allowed() => {
                tracing::debug!(%error, "reading without a pin");
                (None, self.manifest(&snap)?)
            }
            Err(error) => return Err(error),
        };
        Ok(Snapshot { store: self.clone(), manifest: Arc::new(manifest), pin })
    }

    /// The snapshot that a reference means, with its number; it need not be readable.
    pub fn resolve(&self, snap: &SnapRef) -> Result<SnapRef> {
        let number = self.catalog().resolve(snap)?;
        Ok(SnapRef { name: snap.name.clone(), number: Some(number) })
    }

    /// Removes a snapshot, also a damaged one; its number is never given out again. Space is freed
    /// by `gc`.
    pub fn remove(&self, snap: &SnapRef) -> Result<()> {
        self.catalog().remove(snap)
    }

    /// Removes the snapshots of a name that no rule keeps.
    pub fn prune(&self, name: &Name, keep: &KeepRules, dry_run: bool) -> Result<PruneReport> {
        gc::prune(self, name, keep, dry_run)
    }

    /// Deletes packs that nothing refers to, sweeps what crashed processes left, merges the index.
    pub fn gc(&self, options: &GcOptions, job: Job<'_>) -> Result<GcReport> {
        gc::gc(self, options, job)
    }

    /// Writes packs that are mostly dead, or too many and too small, again.
    pub fn compact(&self, options: &CompactOptions, job: Job<'_>) -> Result<CompactReport> {
        gc::compact(self, options, job)
    }

    /// Checks manifests, maps and packs; see [`VerifyOptions`].
    pub fn verify(&self, options: &VerifyOptions, job: Job<'_>) -> Result<VerifyReport> {
        verify::verify(self, options, job)
    }

    /// Who uses how much.
    pub fn usage(&self, job: Job<'_>) -> Result<Usage> {
        usage::usage(self, job)
    }

    /// What differs between two snapshots, image by image.
    pub fn diff(&self, old: &Snapshot, new: &Snapshot, job: Job<'_>) -> Result<Vec<ImageDiff>> {
        usage::diff(self, old, new, job)
    }

    /// Makes the live VM `name` hold what some images lie over, and nothing else, until its folder
    /// `live/NAME/` is removed. Unlike an open snapshot's pin this survives processes and power cuts.
    pub fn hold_for_live(&self, name: &Name, images: &[&ImageReader]) -> Result<()> {
        let maps: Vec<_> = images.iter().map(|image| *image.map()).collect();
        live::hold(&**self.disk(), name, &maps, Durable::AtOnce)
    }

    /// Makes the live VM `name` hold some images beside what it holds. Two callers at once may
    /// lose each other's. The pin that is to be synced later is the file `live/NAME/pin`.
    pub fn hold_for_live_too(
        &self,
        name: &Name,
        images: &[&ImageReader],
        durable: Durable,
    ) -> Result<()> {
        let maps: Vec<_> = images.iter().map(|image| *image.map()).collect();
        live::hold_too(&**self.disk(), name, &maps, durable)
    }

    /// An image that a live VM holds, by its root; the snapshot it came from may be gone.
    pub fn held_image(
        &self,
        label: &str,
        root: Option<&RootRef>,
        size_bytes: u64,
    ) -> Result<ImageReader> {
        let entry =
            ImageEntry { image: ImageName::Memory, size_bytes, root: root.cloned(), figures: None };
        let map = entry.map()?;
        let pin = Pin::new(self.disk(), &format!("live {label}"))?;
        // The live VM's own pin holds it; this one lets the reader outlive that.
        pin.hold_roots([map], || Ok(()))?;
        Ok(ImageReader::new(
            Arc::clone(self.packs()),
            Some(Arc::new(pin)),
            label.to_owned(),
            map,
            size_bytes,
            self.threads(),
        ))
    }

    /// Bytes that the frame cache has now; at most [`Config::frame_cache_bytes`].
    pub fn cached_frame_bytes(&self) -> u64 {
        self.packs().cached_frame_bytes()
    }

    /// Frames that were read and decoded since the store was opened.
    pub fn decoded_frames(&self) -> u64 {
        self.packs().decoded_frames()
    }

    /// Times that a frame was wanted since then and found decoded, in the frame cache.
    pub fn found_frames(&self) -> u64 {
        self.packs().found_frames()
    }

    pub(crate) fn disk(&self) -> &Arc<dyn Disk> {
        &self.inner.disk
    }

    pub(crate) fn packs(&self) -> &Arc<Packs> {
        &self.inner.packs
    }

    pub(crate) fn index(&self) -> &Index {
        &self.inner.index
    }

    pub(crate) fn catalog(&self) -> &Catalog {
        &self.inner.catalog
    }

    pub(crate) fn threads(&self) -> usize {
        self.inner.threads
    }

    /// Pins all that a snapshot refers to and returns its manifest.
    pub(crate) fn hold(&self, pin: &Pin, snap: &SnapRef) -> Result<Manifest> {
        let manifest = self.manifest(snap)?;
        let maps = manifest.images.iter().map(ImageEntry::map).collect::<Result<Vec<_>>>()?;
        // It must still be there once the pin says so, or a collection may have missed it.
        pin.hold_roots(maps, || self.manifest(snap).map(drop))?;
        Ok(manifest)
    }
}

impl Snapshot {
    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Opens an image.
    pub fn image(&self, image: &ImageName) -> Result<ImageReader> {
        let entry = self.manifest.image(image).ok_or_else(|| {
            let names: Vec<_> =
                self.manifest.images.iter().map(|entry| entry.image.to_string()).collect();
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "{} has no image {image}; it has {}",
                    self.manifest.display_name(),
                    names.join(", ")
                ),
            )
        })?;
        Ok(ImageReader::new(
            Arc::clone(self.store.packs()),
            self.pin.clone(),
            format!("{}:{image}", self.manifest.display_name()),
            entry.map()?,
            entry.size_bytes,
            self.store.threads(),
        ))
    }

    /// The trace that was last put beside the snapshot, as it was put.
    pub fn trace(&self) -> Result<Option<Vec<u8>>> {
        trace::read(&**self.store.disk(), self.manifest.uuid)
    }

    /// Replaces the snapshot's trace, at once and durably: bytes that the store does not look at, at
    /// most [`TRACE_BYTES_MAX`](crate::trace::TRACE_BYTES_MAX). Of two put at once one stays. `gc`
    /// deletes it after the snapshot was removed.
    pub fn put_trace(&self, trace: &[u8]) -> Result<()> {
        trace::put(&self.store, self.manifest.uuid, trace)
    }

    /// The packs that the snapshot's images use, and how much of each.
    pub fn packs(&self, job: Job<'_>) -> Result<Vec<PackUse>> {
        usage::packs_of(&self.store, &self.manifest, job)
    }
}

fn in_folder(dir: &Path, error: Error) -> Error {
    Error::with_source(error.kind(), format!("cannot use the store {}", dir.display()), error)
}
