//! What a guest changed whose VMM maps a snapshot's memory privately, out of a mount of the store.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use dormouse_live::pages::{PAGE_BYTES, PageChanges};
use dormouse_serve::mapped::{MappedFile, MappedMemory};
use dormouse_store::name::ImageName;
use dormouse_store::source::{LayerRun, LayerSource, Source};
use dormouse_store::store::Snapshot;
use dormouse_sys::page_map;
use dormouse_sys::peer::Peer;
use serde_json::Value;

use super::captured::for_each_change;
use crate::exit::{Fault, Kind};

/// The memory of a process that maps `NAME/N/memory` of a mount, as a source over that image.
///
/// The process must be paused until it is read. That the mount shows this very snapshot is told by
/// the manifest beside the file, as the process sees it.
pub(crate) fn mapped_memory(pid: u32, snapshot: &Snapshot) -> Result<Source> {
    let manifest = snapshot.manifest();
    let base = snapshot.image(&ImageName::Memory)?;
    let end = format!("{}/{}/memory", manifest.name, manifest.number);
    let peer = Peer::by_pid(pid).with_context(|| format!("cannot find process {pid}"))?;
    check_uuid(pid, &end, &manifest.uuid.to_string())?;
    let layout = manifest.memory_layout.iter();
    let regions: Vec<_> =
        layout.map(|row| row.image_offset..row.image_offset + row.length).collect();
    let file = MappedFile::PathEnd(&end);
    let memory = MappedMemory::find(peer, file, base.size_bytes(), &regions)?;
    let changes = memory.changes()?;
    let layer = Arc::new(MappedLayer { memory, changes });
    Ok(Source::Layer { layer, base: Some(base) })
}

/// Refuses a process whose map with that path is of another snapshot, such as one of another store.
fn check_uuid(pid: u32, end: &str, uuid: &str) -> Result<()> {
    let maps =
        page_map::maps(pid).with_context(|| format!("cannot look at the maps of process {pid}"))?;
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

/// The pages that a guest changed.
#[derive(Debug)]
struct MappedLayer {
    memory: MappedMemory,
    changes: PageChanges,
}

impl LayerSource for MappedLayer {
    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let whole = buf.len() / PAGE * PAGE;
        let (pages, rest) = buf.split_at_mut(whole);
        let first = offset / PAGE_BYTES;
        self.memory.read(first, pages).map_err(io::Error::other)?;
        if !rest.is_empty() {
            // The end of an image that is not made of whole pages.
            let mut last = [0; PAGE];
            let page = first + (whole / PAGE) as u64;
            self.memory.read(page, &mut last).map_err(io::Error::other)?;
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
