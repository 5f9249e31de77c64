//! The whole tree: what each place shows, and who answers for it.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use dormouse_serve::fuse::{
    Access, Creation, Entry, Item, Kind, Mount, Opened, Tree, TreeError, TreeErrorKind, TreeResult,
};
use dormouse_store::store::Store;

use super::FaultFigures;
use super::captures::Captures;
use super::discard::Discard;
use super::journal::Journal;
use super::keeping::MountKeeping;
use super::live::LiveVms;
use super::memories::{Memories, MountRequest};
use super::path::{CAPTURE, DISCARD, Group, LIVE, MANIFEST, Place};
use super::removed::Removed;
use super::snapshots::{Snapshots, members};
use crate::live::control::{Control, Tell};
use crate::live::memory::Successor;

/// A store and its live VMs as a tree.
#[derive(Debug)]
pub(crate) struct StoreTree {
    snapshots: Snapshots,
    removed: Removed,
    live: LiveVms,
    memories: Arc<Memories>,
    captures: Captures,
    discard: Discard,
}

impl StoreTree {
    pub(crate) fn new(store: Store, store_dir: &Path) -> StoreTree {
        let memories = Arc::new(Memories::new(store.clone(), store_dir));
        let live = LiveVms::new(store.clone(), store_dir, Arc::clone(&memories));
        let captures = Captures::new(store.clone());
        let removed = Removed::new(store.clone(), store_dir);
        StoreTree {
            snapshots: Snapshots { store },
            removed,
            live,
            memories,
            captures,
            discard: Discard::default(),
        }
    }

    /// Tells where the tree is mounted, once it is.
    pub(crate) fn mounted(&self, place: &Path) {
        self.live.mounted(place);
    }

    /// Notes from now on what is written to live disks, so that a successor may do it again.
    pub(crate) fn keep_journal(&mut self) -> anyhow::Result<()> {
        self.live.keep_journal(Journal::new()?);
        Ok(())
    }

    /// Does what a predecessor had answered and nothing had made durable.
    pub(crate) fn take_over(&mut self, journal: Journal) -> anyhow::Result<()> {
        self.live.replay(&journal)?;
        self.live.keep_journal(journal);
        Ok(())
    }

    /// Has what a successor needs kept.
    pub(crate) fn keep(
        &self,
        keeping: &MountKeeping,
        mount: &Mount,
        successor: Successor,
    ) -> anyhow::Result<()> {
        self.live.journal().map_or(Ok(()), |journal| keeping.keep(mount, journal, successor))
    }

    /// Answers for the memory of the store's VMs at `control` from now on, and goes on with that of those
    /// whose server is gone.
    pub(crate) fn serve_memory(&self, control: &Path) -> anyhow::Result<Control> {
        self.memories.take_over()?;
        let memories = Arc::clone(&self.memories);
        let answerer = move |request: MountRequest, _: Tell<'_>| memories.answer(request);
        Control::start(control, Arc::new(answerer))
    }

    /// What was done for guests that ask for their memory page by page.
    pub(crate) fn fault_figures(&self) -> FaultFigures {
        self.memories.fault_figures()
    }

    /// Makes durable what was written to live disks that are open.
    pub(crate) fn flush(&self) -> anyhow::Result<()> {
        self.live.flush()
    }
}

impl Tree for StoreTree {
    fn entry(&self, path: &str) -> TreeResult<Entry> {
        match Place::parse(path).ok_or_else(missing)? {
            Place::Root | Place::Lives => Ok(folder(SystemTime::UNIX_EPOCH)),
            Place::Name(name) => {
                let there = self.snapshots.numbers(&name).map(drop);
                let entry = there.map(|()| folder(SystemTime::UNIX_EPOCH));
                entry.or_else(|error| self.removed.name(&name, error))
            }
            Place::Snapshot(snap) => {
                let entry = self.snapshots.folder(&snap);
                entry.or_else(|error| self.removed.folder(&snap, error))
            }
            Place::Images(snap, group) => self.snapshots.group(&snap, group),
            Place::Image(snap, image) => {
                let entry = self.snapshots.image(&snap, &image);
                entry.or_else(|error| self.removed.image(&snap, &image, error))
            }
            Place::Manifest(snap) => self.snapshots.manifest_file(&snap),
            Place::Live(live) | Place::LiveDisks(live) => self.live.folder(&live),
            Place::LiveMemory(live) => self.live.memory(&live),
            Place::LiveDisk(live, id) => self.live.disk(&live, &id),
            Place::Captures => Ok(Captures::root()),
            Place::Capture(id) => self.captures.folder(&id),
            Place::Captured(id, name) => self.captures.file(&id, &name),
            Place::Discard(path) => self.discard.entry(&path),
        }
    }

    fn list(&self, path: &str, visit: &mut dyn FnMut(Item<'_>)) -> TreeResult<()> {
        let mut show = |kind, name: &str, identity| visit(Item { name, kind, identity });
        match Place::parse(path).ok_or_else(missing)? {
            Place::Root => {
                show(Kind::Folder, LIVE, 0);
                show(Kind::Folder, CAPTURE, 0);
                show(Kind::Folder, DISCARD, 0);
                let names = self.snapshots.names()?;
                names.iter().for_each(|name| show(Kind::Folder, name.as_str(), 0));
            }
            Place::Name(name) => {
                for number in self.snapshots.numbers(&name)? {
                    show(Kind::Folder, &number.to_string(), 0);
                }
            }
            Place::Snapshot(snap) => {
                let manifest = self.snapshots.manifest(&snap)?;
                show(Kind::File, MANIFEST, 0);
                if manifest.image(&dormouse_store::name::ImageName::Memory).is_some() {
                    show(Kind::File, "memory", 0);
                }
                for group in Group::ALL {
                    if members(&manifest, group).next().is_some() {
                        show(Kind::Folder, group.name(), 0);
                    }
                }
            }
            Place::Images(snap, group) => {
                let manifest = self.snapshots.manifest(&snap)?;
                members(&manifest, group).for_each(|name| show(Kind::File, name.as_str(), 0));
            }
            Place::Lives => {
                for live in self.live.names()? {
                    show(Kind::Folder, live.as_str(), 0);
                }
            }
            Place::Live(live) => {
                self.live.folder(&live)?;
                show(Kind::Folder, "disk", 0);
                if let Ok(entry) = self.live.memory(&live) {
                    show(Kind::File, "memory", entry.identity);
                }
            }
            Place::LiveDisks(live) => {
                for (id, identity) in self.live.disks(&live)? {
                    show(Kind::File, id.as_str(), identity);
                }
            }
            Place::Captures => {
                for id in self.captures.ids() {
                    let identity = self.captures.folder(&id).map_or(0, |entry| entry.identity);
                    show(Kind::Folder, id.as_str(), identity);
                }
            }
            Place::Capture(id) => {
                for (name, identity) in self.captures.names(&id)? {
                    show(Kind::File, &name, identity);
                }
            }
            Place::Discard(path) => {
                for (name, kind) in self.discard.list(&path)? {
                    show(kind, &name, 0);
                }
            }
            Place::Image(..)
            | Place::Manifest(_)
            | Place::LiveMemory(_)
            | Place::LiveDisk(..)
            | Place::Captured(..) => {
                return Err(TreeErrorKind::Invalid.into());
            }
        }
        Ok(())
    }

    fn open(&self, path: &str, access: Access) -> TreeResult<Opened> {
        match Place::parse(path).ok_or_else(missing)? {
            Place::Image(snap, image) => {
                let opened = self.snapshots.open_image(&snap, &image, access);
                opened.or_else(|error| self.removed.open(&snap, &image, error))
            }
            Place::Manifest(snap) => self.snapshots.open_manifest(&snap, access),
            Place::LiveMemory(live) => self.live.open_memory(&live),
            Place::LiveDisk(live, id) => self.live.open_disk(&live, &id),
            Place::Captured(id, name) => self.captures.open(&id, &name, access),
            Place::Discard(path) => self.discard.open(&path, access),
            _ => Err(TreeErrorKind::Invalid.into()),
        }
    }

    fn create(&self, path: &str, creation: Creation) -> TreeResult<Opened> {
        match Place::parse(path) {
            Some(Place::Captured(id, name)) => self.captures.create(&id, &name, creation),
            place => self.discard.create(&discarded(place)?, creation),
        }
    }

    fn make_folder(&self, path: &str) -> TreeResult<()> {
        match Place::parse(path) {
            Some(Place::Capture(id)) => self.captures.make_folder(&id),
            place => self.discard.make_folder(&discarded(place)?),
        }
    }

    fn remove(&self, path: &str, kind: Kind) -> TreeResult<()> {
        match (Place::parse(path), kind) {
            (Some(Place::Capture(id)), Kind::Folder) => self.captures.remove_folder(&id),
            (Some(Place::Captured(id, name)), Kind::File) => self.captures.remove_file(&id, &name),
            (place, kind) => self.discard.remove(&discarded(place)?, kind),
        }
    }
}

/// The path below `discard`; elsewhere nothing is made or removed.
fn discarded(place: Option<Place>) -> TreeResult<String> {
    match place {
        Some(Place::Discard(path)) if !path.is_empty() => Ok(path),
        _ => Err(TreeErrorKind::ReadOnly.into()),
    }
}

/// There is nothing at that path.
pub(super) fn missing() -> TreeError {
    TreeErrorKind::NotFound.into()
}

/// A folder in which things come and go.
pub(super) fn folder(modified: SystemTime) -> Entry {
    Entry {
        kind: Kind::Folder,
        identity: 0,
        size_bytes: 0,
        allocated_bytes: 0,
        modified,
        permissions: 0o555,
        is_fixed: false,
    }
}
