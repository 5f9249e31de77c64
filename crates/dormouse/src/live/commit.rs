//! A commit of a live VM: disks and memory are sealed, captured in the background of a guest that goes
//! on, and lie over what was committed afterwards.

mod descriptors;
mod lineage;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dormouse_image::block::HoleMeaning;
use dormouse_live::overlay::{Overlay, Sealed, SealedRun};
use dormouse_store::commit::{CommitReport, CommitRequest, NewImage, Parent};
use dormouse_store::manifest::{MemoryRegion, Vmm};
use dormouse_store::name::{ImageName, Name, SnapRef};
use dormouse_store::progress::Job;
use dormouse_store::source::{LayerRun, LayerSource, Source};
use dormouse_store::store::{Durable, Store};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub(crate) use self::descriptors::DescribedSlot;
use self::descriptors::DescriptorLayer;
use super::base::{BaseLabel, ImageBase};
use super::memory::{CapturedMemory, LiveMemory, MappedMemoryLayer};
use super::{LiveDisk, LiveDisks};
use crate::exit::{Fault, Kind};
use crate::mount::captures::CapturedImage;

/// What to commit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LiveCommit {
    /// What it is called where it is to be stopped.
    #[serde(default)]
    pub(crate) id: Uuid,

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

    /// Where the memory is, with [`Scope::All`].
    #[serde(default)]
    pub(crate) memory: MemoryFrom,

    /// Where memory lies in the guest; empty: as in the parent.
    #[serde(default)]
    pub(crate) memory_layout: Vec<MemoryRegion>,

    /// What ran the guest.
    #[serde(default)]
    pub(crate) vmm: Vmm,

    /// Whether all that there is of the VM is given: what else the parent has is not inherited, and one
    /// that was removed meanwhile is no parent.
    #[serde(default)]
    pub(crate) is_whole: bool,

    /// The copy that was made of its memory, if there is one.
    #[serde(default)]
    pub(crate) copy: Option<Uuid>,

    /// That copy, as whoever was asked for it has it.
    #[serde(skip)]
    pub(crate) copied: Arc<Mutex<Option<MappedMemoryLayer>>>,

    /// What [`MemoryFrom::Descriptors`] means, in its order; sent beside the request.
    #[serde(skip)]
    pub(crate) descriptors: Arc<Vec<OwnedFd>>,
}

impl LiveCommit {
    /// Of `scope` as `name`, over whatever `auto` finds.
    pub(crate) fn new(scope: Scope, name: Name) -> LiveCommit {
        LiveCommit {
            id: Uuid::new_v4(),
            scope,
            states: Vec::new(),
            captured: Vec::new(),
            name,
            parent: "auto".to_owned(),
            labels: BTreeMap::new(),
            memory: MemoryFrom::default(),
            memory_layout: Vec::new(),
            vmm: Vmm::default(),
            is_whole: false,
            copy: None,
            copied: Arc::default(),
            descriptors: Arc::default(),
        }
    }
}

/// Where a live VM's memory is that is committed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MemoryFrom {
    /// What this process serves over userfaultfd, if it does.
    #[default]
    Served,

    /// In a paused process that maps a snapshot's memory privately, out of a mount.
    Mapped {
        /// The VMM's.
        pid: u32,

        /// The file that it maps.
        path: PathBuf,

        /// The image in that file, which the live VM's pin keeps.
        image: BaseLabel,

        /// Where it lies in the guest.
        layout: Vec<MemoryRegion>,
    },

    /// In a file, whole, on which its guest runs. Nobody may change it before it was read.
    File {
        /// Where it is; absolute, as another process may read it.
        path: PathBuf,
    },

    /// In a file, whole, into which its VMM dumped it. It stays as it is until the commit is over.
    Dump {
        /// As of a file on which a guest runs.
        path: PathBuf,
    },

    /// Behind descriptors that a VMM handed over, whose guest stays paused until the commit is over.
    Descriptors {
        /// One for each slot of memory, in the order of the image.
        slots: Vec<DescribedSlot>,

        /// What the guest woke from, if it did: what is as it was there is not stored again.
        image: Option<BaseLabel>,
    },
}

/// What a guest changed is to be copied now, for a commit that asks for the copy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct EarlyCopy {
    /// What the copy is called.
    pub(crate) id: Uuid,

    /// Where the memory is.
    pub(crate) memory: MemoryFrom,
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

    /// What the guest had to wait for.
    pub(crate) freeze: Freeze,
}

/// Changed pages that are copied so that their guest can go on; more are read while it waits.
const STAGED_BYTES_MAX: u64 = 256 << 20;

/// What was sealed.
#[derive(Debug, Default)]
struct Sealing<'a> {
    disks: Vec<(&'a LiveDisk, ImageName, Arc<SealedLayer>)>,
    memory: Option<(&'a LiveMemory, Arc<CapturedMemory>)>,
    /// How long sealing memory took that this process does not serve, and whether it may change now.
    other_memory: Option<(Duration, bool)>,
}

/// What a guest waited for, told before anything is captured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Freeze {
    /// How long sealing the disks and the memory took.
    pub(crate) total: Duration,

    /// Of that, the memory; none if it is not committed.
    pub(crate) memory: Option<Duration>,

    /// Whether the guest may go on now, and not only when the commit is over.
    pub(crate) is_over: bool,
}

/// What a commit tells before its end.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// All is sealed, while the guest may still wait.
    Sealed(Freeze),

    /// All of it was read: nobody has to wait any more for whom that does not last until the end.
    Read,

    /// It is published and durable, as `NAME@N`. Laying the VM over it may still fail, which costs
    /// nothing but that.
    Stored(String),
}

/// What is to happen at each step.
pub(crate) type OnStep<'a> = &'a mut dyn FnMut(Step);

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
    on_step: OnStep<'_>,
    job: Job<'_>,
) -> Result<Committed> {
    let mut request = CommitRequest::new(wanted.name.clone());
    request.parent = match wanted.parent.as_str() {
        "auto" => lineage::parent(store, &live.folder, wanted)?,
        "none" => Parent::None,
        snap => Parent::Snapshot(snap.parse()?),
    };
    request.labels.clone_from(&wanted.labels);
    request.memory_layout.clone_from(&wanted.memory_layout);
    request.vmm.clone_from(&wanted.vmm);
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
    request.is_whole = wanted.is_whole;
    let freeze = sealing.freeze();
    on_step(Step::Sealed(freeze));
    let report = store.commit_and_tell(request, &mut || on_step(Step::Read), job)?;
    on_step(Step::Stored(report.manifest.display_name()));
    rebase(store, live, memory, &report, sealing)?;
    Ok(Committed { report, freeze })
}

impl Sealing<'_> {
    fn freeze(&self) -> Freeze {
        let served = self.memory.as_ref();
        let served = served.map(|(_, captured)| (captured.freeze(), captured.is_live()));
        let memory = served.or(self.other_memory);
        // The disks are sealed together.
        let disks = self.disks.iter().map(|(.., layer)| layer.freeze).max().unwrap_or_default();
        Freeze {
            total: disks + memory.map(|(freeze, _)| freeze).unwrap_or_default(),
            memory: memory.map(|(freeze, _)| freeze),
            is_over: memory.is_none_or(|(_, is_over)| is_over),
        }
    }
}

/// Seals what is wanted and adds it to the request.
fn seal<'a>(
    store: &Store,
    live: &'a LiveDisks,
    memory: Option<&'a LiveMemory>,
    wanted: &LiveCommit,
    request: &mut CommitRequest,
) -> Result<Sealing<'a>> {
    let (chosen, is_all) = match &wanted.scope {
        Scope::All => (live.disks.iter().collect(), !wanted.has_captured_memory()),
        Scope::Disks => (live.chosen(None)?, false),
        Scope::Disk(id) => (live.chosen(Some(id))?, false),
    };
    let is_served = wanted.memory == MemoryFrom::Served;
    let wants_memory = is_all && is_served && (memory.is_some() || live.folder.has_memory()?);
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
    if is_all && !is_served {
        let other = seal_other(store, &live.folder.live, wanted, request)?;
        sealing.other_memory = Some(other);
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

/// Adds memory to the request that this process does not serve.
fn seal_other(
    store: &Store,
    live: &Name,
    wanted: &LiveCommit,
    request: &mut CommitRequest,
) -> Result<(Duration, bool)> {
    let begun = Instant::now();
    let (source, holes, is_over) = match &wanted.memory {
        MemoryFrom::Served => anyhow::bail!("memory that is served is sealed with its pager"),
        memory @ MemoryFrom::Mapped { .. } => {
            let copied = wanted.copied.lock().unwrap_or_else(PoisonError::into_inner).take();
            let (layer, is_copied) = match copied {
                Some(copied) => (copied, true),
                None => copy_mapped(store, live, memory)?,
            };
            (layer.into_source(), HoleMeaning::Parent, is_copied)
        }
        MemoryFrom::File { path } => (Source::File(path.clone()), HoleMeaning::Zero, false),
        MemoryFrom::Dump { path } => (Source::File(path.clone()), HoleMeaning::Zero, true),
        MemoryFrom::Descriptors { slots, image } => {
            let base = image.as_ref().map(|image| image.open(store, live)).transpose()?.flatten();
            let layer = Arc::new(DescriptorLayer::new(slots, &wanted.descriptors)?);
            (Source::Layer { layer, base }, HoleMeaning::Parent, false)
        }
    };
    request.images.push(NewImage { image: ImageName::Memory, source, holes });
    Ok((begun.elapsed(), is_over))
}

/// Copies what a guest changed, before it is known what else will be committed. None if that is more than
/// is copied.
///
/// Nothing may change it any more, until the commit.
pub(crate) fn copy_early(
    store: &Store,
    live: &Name,
    memory: &MemoryFrom,
) -> Result<Option<MappedMemoryLayer>> {
    let (layer, is_copied) = copy_mapped(store, live, memory)?;
    Ok(is_copied.then_some(layer))
}

/// What a guest changed whose VMM maps its memory, and whether it was copied.
fn copy_mapped(
    store: &Store,
    live: &Name,
    memory: &MemoryFrom,
) -> Result<(MappedMemoryLayer, bool)> {
    let MemoryFrom::Mapped { pid, path, image, layout } = memory else {
        anyhow::bail!("only memory that its VMM maps can be copied");
    };
    let base = image.open(store, live)?.context("memory that lies over no image")?;
    let mut layer = MappedMemoryLayer::at(*pid, path, base, layout)?;
    let is_copied = layer.stage(STAGED_BYTES_MAX)?;
    Ok((layer, is_copied))
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
    let all: Vec<_> = held.iter().collect();
    store.hold_for_live_too(&live.folder.live, &all, Durable::AtOnce)?;
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
