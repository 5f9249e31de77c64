//! A commit of a live VM: disks and memory are sealed, captured in the background of a guest that goes
//! on, and lie over what was committed afterwards.

mod lineage;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result};
use dormouse_image::block::HoleMeaning;
use dormouse_live::overlay::{Overlay, Sealed, SealedRun};
use dormouse_store::commit::{CommitReport, CommitRequest, NewImage, Parent};
use dormouse_store::name::{ImageName, Name, SnapRef};
use dormouse_store::progress::Job;
use dormouse_store::source::{LayerRun, LayerSource, Source};
use dormouse_store::store::Store;
use serde::{Deserialize, Serialize};

use super::base::{BaseLabel, ImageBase};
use super::memory::{CapturedMemory, LiveMemory};
use super::{LiveDisk, LiveDisks};
use crate::exit::{Fault, Kind};
use crate::mount::captures::CapturedImage;

/// What to commit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LiveCommit {
    /// What of the live VM.
    pub(crate) scope: Scope,

    /// State files to be stored with it.
    pub(crate) states: Vec<LiveState>,

    /// What was captured of it while a VMM wrote it. Whoever asks sees to it that it stays until the
    /// commit is done.
    pub(crate) captured: Vec<CapturedImage>,

    /// The snapshot's name.
    pub(crate) name: Name,

    /// `auto`, `none` or a snapshot.
    pub(crate) parent: String,

    /// Labels.
    pub(crate) labels: BTreeMap<String, String>,
}

impl LiveCommit {
    /// Whether its memory was captured, and is not to be captured once more.
    fn has_captured_memory(&self) -> bool {
        self.captured.iter().any(|captured| captured.image == ImageName::Memory)
    }
}

/// What of a live VM is meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Scope {
    /// All its disks, and its memory if it woke from a snapshot's.
    All,

    /// All its disks.
    Disks,

    /// One disk.
    Disk(Name),
}

impl Scope {
    /// A disk, or all of them.
    pub(crate) fn disk(disk: Option<Name>) -> Scope {
        disk.map_or(Scope::Disks, Scope::Disk)
    }
}

/// A state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LiveState {
    /// What it will be called.
    pub(crate) name: Name,

    /// Where it is; absolute, as another process may read it.
    pub(crate) path: PathBuf,
}

/// What came of a commit.
#[derive(Debug)]
pub(crate) struct Committed {
    pub(crate) report: CommitReport,

    /// How long sealing the disks and the memory took.
    pub(crate) freeze: Duration,

    /// Of that, the memory; none if it was not committed.
    pub(crate) memory_freeze: Option<Duration>,

    /// Whether the guest might have gone on as soon as all was sealed.
    pub(crate) is_live: bool,
}

/// What was sealed.
#[derive(Debug, Default)]
struct Sealing<'a> {
    disks: Vec<(&'a LiveDisk, ImageName, Arc<SealedLayer>)>,
    memory: Option<(&'a LiveMemory, Arc<CapturedMemory>)>,
}

/// Commits a live VM and lays it over what was committed. `memory` is what this process has of it.
///
/// The guest must be paused until all is sealed if its memory is committed, and until this returns
/// if its changes are not tracked. Otherwise it goes on meanwhile. After a failure nothing is lost:
/// what was sealed belongs to the next commit.
pub(crate) fn commit(
    store: &Store,
    live: &LiveDisks,
    memory: Option<&LiveMemory>,
    wanted: &LiveCommit,
    job: Job<'_>,
) -> Result<Committed> {
    let mut request = CommitRequest::new(wanted.name.clone());
    request.parent = match wanted.parent.as_str() {
        "auto" => lineage::parent(store, &live.folder, wanted)?,
        "none" => Parent::None,
        snap => Parent::Snapshot(snap.parse()?),
    };
    request.labels.clone_from(&wanted.labels);
    let memory = memory.filter(|_| !wanted.has_captured_memory());
    let sealing = seal(store, live, memory, wanted, &mut request)?;
    for state in &wanted.states {
        let image = ImageName::State(state.name.clone());
        let source = Source::File(state.path.clone());
        request.images.push(NewImage { image, source, holes: HoleMeaning::Zero });
    }
    for captured in &wanted.captured {
        let source = Source::Staged(captured.hold(store)?);
        let image = captured.image.clone();
        request.images.push(NewImage { image, source, holes: HoleMeaning::Zero });
    }
    let memory_freeze = sealing.memory.as_ref().map(|(_, captured)| captured.freeze());
    // The disks are sealed together.
    let disks_freeze = sealing.disks.iter().map(|(.., layer)| layer.freeze).max();
    let is_live = sealing.memory.as_ref().is_none_or(|(_, captured)| captured.is_live());
    let report = store.commit(request, job)?;
    rebase(store, live, memory, &report, sealing)?;
    let freeze = disks_freeze.unwrap_or_default() + memory_freeze.unwrap_or_default();
    Ok(Committed { report, freeze, memory_freeze, is_live })
}

/// Seals what is wanted and adds it to the request.
fn seal<'a>(
    store: &Store,
    live: &'a LiveDisks,
    memory: Option<&'a LiveMemory>,
    wanted: &LiveCommit,
    request: &mut CommitRequest,
) -> Result<Sealing<'a>> {
    let (chosen, wants_memory) = match &wanted.scope {
        Scope::All => {
            let has_memory = memory.is_some() || live.folder.has_memory()?;
            (live.disks.iter().collect(), has_memory && !wanted.has_captured_memory())
        }
        Scope::Disks => (live.chosen(None)?, false),
        Scope::Disk(id) => (live.chosen(Some(id))?, false),
    };
    let labels = live.folder.labels()?;
    let mut sealing = Sealing::default();
    if wants_memory {
        let Some(memory) = memory else {
            let live = &live.folder.live;
            let message = format!(
                "nobody serves the memory of {live}; `dormouse serve memory --take-over {live}` does"
            );
            return Err(Fault::new(Kind::NotFound, message).into());
        };
        let captured = Arc::new(memory.seal()?);
        request.images.push(NewImage {
            image: ImageName::Memory,
            source: Source::Layer {
                layer: Arc::clone(&captured) as Arc<dyn LayerSource>,
                base: Some(captured.base().clone()),
            },
            holes: HoleMeaning::Parent,
        });
        sealing.memory = Some((memory, captured));
    }
    let bases: Vec<_> = chosen
        .iter()
        .map(|disk| {
            let label = labels.get(&disk.id).context("a disk without a description")?;
            label.open(store, &live.folder.live)
        })
        .collect::<Result<_>>()?;
    let overlays: Vec<&Overlay> = chosen.iter().map(|disk| &*disk.overlay).collect();
    let sealed = Overlay::seal_together(&overlays)?;
    for ((disk, base), sealed) in chosen.into_iter().zip(bases).zip(sealed) {
        let label = labels.get(&disk.id);
        let is_over_file = matches!(label, Some(BaseLabel::File { .. }));
        let image = label
            .map_or_else(|| ImageName::Disk(disk.id.clone()), |label| label.image_name(&disk.id));
        let layer = Arc::new(SealedLayer::new(sealed, is_over_file));
        request.images.push(NewImage {
            image: image.clone(),
            source: Source::Layer { layer: Arc::clone(&layer) as Arc<dyn LayerSource>, base },
            holes: HoleMeaning::Parent,
        });
        sealing.disks.push((disk, image, layer));
    }
    Ok(sealing)
}

/// Lays disks and memory over the images that were just committed. Until the last one is, the live VM
/// holds old and new bases; and if one fails, until a later commit succeeds for that one.
fn rebase(
    store: &Store,
    live: &LiveDisks,
    memory: Option<&LiveMemory>,
    report: &CommitReport,
    sealing: Sealing<'_>,
) -> Result<()> {
    let snap = SnapRef { name: report.manifest.name.clone(), number: Some(report.manifest.number) };
    let snapshot = store.snapshot(&snap)?;
    let _pin = live.folder.lock_pin()?;
    let mut held = Vec::new();
    let mut rebased = Vec::new();
    for (disk, name, layer) in sealing.disks {
        let image = snapshot.image(&name)?;
        held.push(image.clone());
        rebased.push((disk, name, layer, image));
    }
    let remembered = sealing
        .memory
        .map(|(memory, captured)| {
            anyhow::Ok((memory, captured, snapshot.image(&ImageName::Memory)?))
        })
        .transpose()?;
    held.extend(remembered.iter().map(|(.., image)| image.clone()));
    store.hold_for_live_too(&live.folder.live, &held.iter().collect::<Vec<_>>())?;
    let display = report.manifest.display_name();
    if let Some((memory, captured, image)) = remembered {
        memory.rebase(&image, format!("{display}:memory"), &captured)?;
    }
    // Names are inserted and removed one by one, whoever panicked.
    let mut in_doubt = live.in_doubt.lock().unwrap_or_else(PoisonError::into_inner);
    in_doubt.extend(rebased.iter().map(|(disk, ..)| disk.id.clone()));
    for (disk, name, layer, image) in rebased {
        let label = BaseLabel::of(&image, format!("{display}:{name}")).to_text()?;
        let sealed = layer.take().context("a sealed layer is used twice")?;
        disk.overlay.rebase(sealed, Arc::new(ImageBase::new(image)), &label)?;
        in_doubt.remove(&disk.id);
    }
    if !in_doubt.is_empty() || memory.is_some_and(LiveMemory::is_in_doubt) {
        return Ok(());
    }
    let held = live.folder.bases(store)?;
    Ok(store.hold_for_live(&live.folder.live, &held.iter().collect::<Vec<_>>())?)
}

/// Sealed layers as a commit reads them.
#[derive(Debug)]
struct SealedLayer {
    size_bytes: u64,
    freeze: Duration,
    /// Whether what shows through belongs to it: the base is a file, which no snapshot has.
    has_base: bool,
    /// Taken away when the commit is done with it, whoever may still know the source.
    sealed: RwLock<Option<Sealed>>,
}

impl SealedLayer {
    fn new(sealed: Sealed, has_base: bool) -> SealedLayer {
        SealedLayer {
            size_bytes: sealed.size_bytes(),
            freeze: sealed.freeze(),
            has_base,
            sealed: RwLock::new(Some(sealed)),
        }
    }

    fn take(&self) -> Option<Sealed> {
        self.sealed.write().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn with<T>(
        &self,
        read: impl FnOnce(&Sealed) -> dormouse_live::error::Result<T>,
    ) -> io::Result<T> {
        let sealed = self.sealed.read().unwrap_or_else(PoisonError::into_inner);
        let sealed = sealed.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        read(sealed).map_err(io::Error::other)
    }
}

impl LayerSource for SealedLayer {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|sealed| sealed.read_at(buf, offset))
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()> {
        let failed = |error| dormouse_live::error::Error::io("cannot hand on a run", error);
        self.with(|sealed| {
            let mut at = 0;
            sealed.for_each_run(&mut |range, run| {
                let kind = match run {
                    SealedRun::Dirty => LayerRun::Data,
                    SealedRun::Zero => LayerRun::Zero,
                };
                if self.has_base && at < range.start {
                    visit(at..range.start, LayerRun::Data).map_err(failed)?;
                }
                at = range.end;
                visit(range, kind).map_err(failed)
            })?;
            if self.has_base && at < self.size_bytes {
                visit(at..self.size_bytes, LayerRun::Data).map_err(failed)?;
            }
            Ok(())
        })
    }
}
