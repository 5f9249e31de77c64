//! What a guest changed whose VMM maps a snapshot's memory privately, out of a mount of the store.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use dormouse_live::pages::{PAGE_BYTES, PageChanges};
use dormouse_serve::mapped::{MappedFile, MappedMemory, not_allowed};
use dormouse_store::manifest::MemoryRegion;
use dormouse_store::name::ImageName;
use dormouse_store::reader::ImageReader;
use dormouse_store::source::{LayerRun, LayerSource, Source};
use dormouse_store::store::Snapshot;
use dormouse_sys::mapping::prefer_huge_pages;
use dormouse_sys::page_map;
use dormouse_sys::peer::Peer;
use serde_json::Value;

use super::captured::for_each_change;
use crate::exit::{Fault, Kind};

/// The memory of a process that maps `NAME/N/memory` of a mount, as a source over that image.
///
/// The process must be paused until it is read.
pub(crate) fn mapped_memory(pid: u32, snapshot: &Snapshot) -> Result<Source> {
    Ok(MappedMemoryLayer::of(pid, snapshot)?.into_source())
}

/// Refuses a process whose map with that path is of another snapshot, such as one of another store.
fn check_uuid(pid: u32, end: &str, uuid: &str) -> Result<()> {
    let maps = page_map::maps(pid).map_err(not_allowed);
    let maps = maps.with_context(|| format!("cannot look at the maps of process {pid}"))?;
    let Some(entry) = maps.iter().find(|entry| entry.path.ends_with(end)) else {
        let message = format!(
            "process {pid} does not map {end} of a mount; is it the VMM, and was it woken from there?"
        );
        return Err(Fault::new(Kind::NotFound, message).into());
    };
    let beside = entry.path.with_file_name("manifest.json");
    let seen = Path::new("/proc").join(pid.to_string()).join("root");
    let path = seen.join(beside.strip_prefix("/").unwrap_or(&beside));
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let manifest: Value = serde_json::from_slice(&text)
        .with_context(|| format!("{} is no manifest", path.display()))?;
    if manifest["manifest"]["uuid"].as_str() != Some(uuid) {
        let message =
            format!("what process {pid} maps as {end} is another snapshot, of another store");
        return Err(Fault::new(Kind::Refused, message).into());
    }
    Ok(())
}

/// Bytes of a page.
const PAGE: usize = 4096;

/// Pages that are copied at once.
const STEP_PAGES: u64 = 512;

/// What one thread copies faster than it starts another.
const ALONE_BYTES_MAX: u64 = 4 << 20;

/// The pages that a guest changed, in its VMM's memory or copied out of it.
#[derive(Debug)]
pub(crate) struct MappedMemoryLayer {
    base: ImageReader,
    memory: MappedMemory,
    changes: PageChanges,
    /// The changed pages, one after the other, if they were copied.
    staged: Option<Vec<u8>>,
}

impl MappedMemoryLayer {
    /// What the guest of a paused VMM changed since it woke from `snapshot`.
    ///
    /// That the mount shows this very snapshot is told by the manifest beside the file, as the process
    /// sees it.
    pub(crate) fn of(pid: u32, snapshot: &Snapshot) -> Result<MappedMemoryLayer> {
        let manifest = snapshot.manifest();
        let base = snapshot.image(&ImageName::Memory)?;
        let end = format!("{}/{}/memory", manifest.name, manifest.number);
        check_uuid(pid, &end, &manifest.uuid.to_string())?;
        MappedMemoryLayer::at(pid, Path::new(&end), base, &manifest.memory_layout)
    }

    /// The same, of one that maps the file at `path`, or with such an end, which is known to have the
    /// bytes of `base`.
    pub(crate) fn at(
        pid: u32,
        path: &Path,
        base: ImageReader,
        layout: &[MemoryRegion],
    ) -> Result<MappedMemoryLayer> {
        let peer = Peer::by_pid(pid).with_context(|| format!("cannot find process {pid}"))?;
        let regions: Vec<_> =
            layout.iter().map(|row| row.image_offset..row.image_offset + row.length).collect();
        let file = MappedFile::PathEnd(path);
        let memory = MappedMemory::find(peer, file, base.size_bytes(), &regions)?;
        let changes = memory.changes()?;
        Ok(MappedMemoryLayer { base, memory, changes, staged: None })
    }

    /// Copies the changed pages if they are at most `bytes_max`, so that the VMM may go on. Whether it
    /// may.
    pub(crate) fn stage(&mut self, bytes_max: u64) -> Result<bool> {
        let bytes = self.changes.dirty.len() * PAGE_BYTES;
        if bytes > bytes_max {
            return Ok(false);
        }
        let mut staged = vec![0; usize::try_from(bytes)?];
        prefer_huge_pages(&mut staged);
        let mut steps = Vec::new();
        let mut rest = &mut staged[..];
        for_each_change(&self.changes, &mut |range, run| {
            if run == LayerRun::Zero {
                return Ok(());
            }
            let (mut page, end) = (range.start / PAGE_BYTES, range.end / PAGE_BYTES);
            while page < end {
                let count = STEP_PAGES.min(end - page);
                let len = usize::try_from(count * PAGE_BYTES).map_err(io::Error::other)?;
                let (step, left) = std::mem::take(&mut rest).split_at_mut(len);
                steps.push((page, step));
                rest = left;
                page += count;
            }
            Ok(())
        })
        .context("cannot tell what the guest changed")?;
        // The guest waits for this.
        let both = Mutex::new(steps.into_iter());
        let copy = || -> Result<()> {
            loop {
                let next = both.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((page, step)) = next else { return Ok(()) };
                self.memory.read(page, step).context("cannot copy what the guest changed")?;
            }
        };
        if bytes < ALONE_BYTES_MAX {
            copy()?;
        } else {
            thread::scope(|scope| {
                let other = scope.spawn(copy);
                let mine = copy();
                let panicked = |_| Err(anyhow::anyhow!("copying what the guest changed panicked"));
                other.join().unwrap_or_else(panicked).and(mine)
            })?;
        }
        self.staged = Some(staged);
        Ok(true)
    }

    /// As a commit reads it.
    pub(crate) fn into_source(self) -> Source {
        let base = Some(self.base.clone());
        Source::Layer { layer: Arc::new(self), base }
    }

    /// Fills `pages` from `first` on, all of them changed.
    fn read_pages(&self, first: u64, pages: &mut [u8]) -> io::Result<()> {
        let Some(staged) = &self.staged else {
            return self.memory.read(first, pages).map_err(io::Error::other);
        };
        let bad =
            || io::Error::new(io::ErrorKind::InvalidInput, format!("page {first} was not copied"));
        let page = u32::try_from(first).map_err(|_| bad())?;
        if !self.changes.dirty.contains(page) {
            return Err(bad());
        }
        // A run of changed pages lies in one piece.
        let before = self.changes.dirty.rank(page) - 1;
        let at = usize::try_from(before * PAGE_BYTES).map_err(|_| bad())?;
        pages.copy_from_slice(staged.get(at..at + pages.len()).ok_or_else(bad)?);
        Ok(())
    }
}

impl LayerSource for MappedMemoryLayer {
    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let whole = buf.len() / PAGE * PAGE;
        let (pages, rest) = buf.split_at_mut(whole);
        let first = offset / PAGE_BYTES;
        self.read_pages(first, pages)?;
        if !rest.is_empty() {
            // The end of an image that is not made of whole pages.
            let mut last = [0; PAGE];
            let page = first + (whole / PAGE) as u64;
            self.read_pages(page, &mut last)?;
            rest.copy_from_slice(&last[..rest.len()]);
        }
        Ok(())
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()> {
        for_each_change(&self.changes, visit)
    }
}
