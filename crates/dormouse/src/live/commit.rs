//! A commit of live disks: sealed, captured in the background of whoever writes on, and rebased.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result};
use dormouse_image::block::HoleMeaning;
use dormouse_live::overlay::{Sealed, SealedRun};
use dormouse_store::commit::{CommitReport, CommitRequest, NewImage, Parent};
use dormouse_store::name::{ImageName, Name, SnapRef};
use dormouse_store::progress::Job;
use dormouse_store::source::{LayerRun, LayerSource, Source};
use dormouse_store::store::Store;
use serde::{Deserialize, Serialize};

use super::LiveDisks;
use super::base::{BaseLabel, ImageBase};

/// What to commit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LiveCommit {
    /// One disk, or all.
    pub(crate) disk: Option<Name>,

    /// The snapshot's name.
    pub(crate) name: Name,

    /// `auto`, `none` or a snapshot.
    pub(crate) parent: String,

    /// Labels.
    pub(crate) labels: BTreeMap<String, String>,
}

/// Commits the disks of a live VM and lays them over what was committed. Writers go on meanwhile.
/// After a failure nothing is lost: what was sealed belongs to the next commit.
pub(crate) fn commit(
    store: &Store,
    live: &LiveDisks,
    wanted: &LiveCommit,
    job: Job<'_>,
) -> Result<(CommitReport, Duration)> {
    let chosen = live.chosen(wanted.disk.as_ref())?;
    let labels = live.folder.labels()?;
    let mut request = CommitRequest::new(wanted.name.clone());
    request.parent = match wanted.parent.as_str() {
        "auto" => Parent::Auto,
        "none" => Parent::None,
        snap => Parent::Snapshot(snap.parse()?),
    };
    request.labels.clone_from(&wanted.labels);
    let mut sealed = Vec::new();
    for disk in &chosen {
        let label = labels.get(&disk.id).context("a disk without a description")?;
        let base = label.open(store, &live.folder.live)?;
        let layer = Arc::new(SealedLayer::new(disk.overlay.seal()?));
        request.images.push(NewImage {
            image: ImageName::Disk(disk.id.clone()),
            source: Source::Layer { layer: Arc::clone(&layer) as Arc<dyn LayerSource>, base },
            holes: HoleMeaning::Parent,
        });
        sealed.push((*disk, layer));
    }
    let freeze = sealed.iter().map(|(_, layer)| layer.freeze).sum();
    let report = store.commit(request, job)?;
    rebase(store, live, &report, sealed)?;
    Ok((report, freeze))
}

/// Lays the disks over the images that were just committed. Until the last one is, the live VM
/// holds old and new bases; and if one fails, until a later commit succeeds for that one.
fn rebase(
    store: &Store,
    live: &LiveDisks,
    report: &CommitReport,
    sealed: Vec<(&super::LiveDisk, Arc<SealedLayer>)>,
) -> Result<()> {
    let snap = SnapRef { name: report.manifest.name.clone(), number: Some(report.manifest.number) };
    let snapshot = store.snapshot(&snap)?;
    let _pin = live.folder.lock_pin()?;
    let mut held = Vec::new();
    let mut rebased = Vec::new();
    for (disk, layer) in sealed {
        let image = snapshot.image(&ImageName::Disk(disk.id.clone()))?;
        held.push(image.clone());
        rebased.push((disk, layer, image));
    }
    store.hold_for_live_too(&live.folder.live, &held.iter().collect::<Vec<_>>())?;
    // Names are inserted and removed one by one, whoever panicked.
    let mut in_doubt = live.in_doubt.lock().unwrap_or_else(PoisonError::into_inner);
    in_doubt.extend(rebased.iter().map(|(disk, ..)| disk.id.clone()));
    for (disk, layer, image) in rebased {
        let name = format!("{}:disk/{}", report.manifest.display_name(), disk.id);
        let label = BaseLabel::of(&image, name).to_text()?;
        let sealed = layer.take().context("a sealed layer is used twice")?;
        disk.overlay.rebase(sealed, Arc::new(ImageBase::new(image)), &label)?;
        in_doubt.remove(&disk.id);
    }
    if !in_doubt.is_empty() {
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
    /// Taken away when the commit is done with it, whoever may still know the source.
    sealed: RwLock<Option<Sealed>>,
}

impl SealedLayer {
    fn new(sealed: Sealed) -> SealedLayer {
        SealedLayer {
            size_bytes: sealed.size_bytes(),
            freeze: sealed.freeze(),
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
        self.with(|sealed| {
            sealed.for_each_run(&mut |range, run| {
                let kind = match run {
                    SealedRun::Dirty => LayerRun::Data,
                    SealedRun::Zero => LayerRun::Zero,
                };
                visit(range, kind)
                    .map_err(|error| dormouse_live::error::Error::io("cannot hand on a run", error))
            })
        })
    }
}
