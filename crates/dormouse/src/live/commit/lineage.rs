//! Which snapshot a live VM's commit continues where the user names none: the newest of the name, if
//! what is taken over from it is what the live VM lies over.
//!
//! Forks of one snapshot are committed under one name, in any order. An image that a commit does
//! not store is taken over from the parent, and must not be another fork's.

use std::collections::BTreeMap;

use anyhow::Result;
use dormouse_store::commit::Parent;
use dormouse_store::manifest::{ImageEntry, Manifest};
use dormouse_store::name::{ImageName, ImageRef, Name, SnapRef};
use dormouse_store::store::Store;

use super::{LiveCommit, Scope};
use crate::exit::{Fault, Kind};
use crate::live::{BaseLabel, LiveFolder};

/// The newest snapshot of the name; refused where images of another fork would be taken over.
pub(super) fn parent(store: &Store, folder: &LiveFolder, wanted: &LiveCommit) -> Result<Parent> {
    let Some(&number) = store.numbers(&wanted.name)?.last() else { return Ok(Parent::Auto) };
    let newest = SnapRef { name: wanted.name.clone(), number: Some(number) };
    let manifest = store.manifest(&newest)?;
    let labels = folder.labels()?;
    let with_memory = wanted.scope == Scope::All && folder.has_memory()?;
    let is_stored = |image: &ImageName| match image {
        _ if wanted.captured.iter().any(|captured| captured.image == *image) => true,
        ImageName::Memory => {
            with_memory
                || labels.iter().any(|(id, label)| {
                    label.image_name(id) == ImageName::Memory
                        && is_committed(&wanted.scope, &labels, id)
                })
        }
        ImageName::Disk(id) => is_committed(&wanted.scope, &labels, id),
        ImageName::State(name) => wanted.states.iter().any(|state| state.name == *name),
    };
    let taken_over: Vec<&ImageEntry> =
        manifest.images.iter().filter(|entry| !is_stored(&entry.image)).collect();
    if taken_over.is_empty() {
        return Ok(Parent::Auto);
    }
    let mut over = Vec::new();
    for (id, label) in &labels {
        if let BaseLabel::Image { image, .. } = label
            && is_committed(&wanted.scope, &labels, id)
        {
            over.push(image.parse::<ImageRef>()?.snap);
        }
    }
    // What is taken over is what was looked at here, whatever is committed meanwhile.
    let parent = Parent::Snapshot(newest.clone());
    if over.is_empty() || over.contains(&newest) {
        return Ok(parent);
    }
    // One that was removed tells nothing.
    let bases: Vec<Manifest> = over.iter().filter_map(|snap| store.manifest(snap).ok()).collect();
    let is_ours = |entry: &ImageEntry| {
        if let ImageName::Disk(id) = &entry.image
            && let Some(BaseLabel::Image { root, size_bytes, .. }) = labels.get(id)
        {
            return (root, *size_bytes) == (&entry.root, entry.size_bytes);
        }
        bases.iter().filter_map(|base| base.image(&entry.image)).any(|base| base.root == entry.root)
    };
    match taken_over.iter().find(|entry| !is_ours(entry)) {
        None => Ok(parent),
        Some(foreign) => {
            let message = format!(
                "{} would be taken over from {newest}, which {} does not lie over; \
                 give --parent {}, or commit under another name",
                foreign.image, folder.live, over[0]
            );
            Err(Fault::new(Kind::Refused, message).into())
        }
    }
}

fn is_committed(scope: &Scope, labels: &BTreeMap<Name, BaseLabel>, id: &Name) -> bool {
    match scope {
        Scope::All | Scope::Disks => labels.contains_key(id),
        Scope::Disk(one) => one == id,
    }
}
