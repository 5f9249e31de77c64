//! The folders: the names that the running system sees, those surely on the medium, and the
//! changes between the two in the order they were made.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::Survive;
use super::inode::{Content, Inode};
use super::random::SplitMix64;

/// The number of a folder; the root is 0.
pub(super) type FolderId = u64;

const ROOT: FolderId = 0;

/// What a name stands for.
#[derive(Clone, Debug)]
pub(super) enum Entry {
    File(Arc<Inode>),
    Folder(FolderId),
}

/// A change of names in one folder that the medium takes whole or not at all.
#[derive(Clone, Debug)]
struct Change {
    names: Vec<(String, Option<Entry>)>,
}

#[derive(Debug, Default)]
struct Folder {
    seen: BTreeMap<String, Entry>,
    settled: BTreeMap<String, Entry>,
    pending: Vec<Change>,
}

/// Where a name is, or would be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) folder: FolderId,
    pub(super) name: String,
}

/// All folders, and the numbering of folders and inodes.
#[derive(Debug)]
pub(super) struct Tree {
    folders: BTreeMap<FolderId, Folder>,
    next_id: u64,
}

impl Tree {
    /// A tree with nothing but its root.
    pub(super) fn new() -> Tree {
        Tree { folders: BTreeMap::from([(ROOT, Folder::default())]), next_id: ROOT + 1 }
    }

    /// The folder at `path`.
    pub(super) fn folder(&self, path: &str) -> io::Result<FolderId> {
        self.walk(&parts(path)?)
    }

    /// Where the last part of `path` is.
    pub(super) fn place(&self, path: &str) -> io::Result<Place> {
        let parts = parts(path)?;
        let Some((name, parents)) = parts.split_last() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the root has no name"));
        };
        Ok(Place { folder: self.walk(parents)?, name: (*name).to_owned() })
    }

    /// What is at a place.
    pub(super) fn entry(&self, place: &Place) -> Option<&Entry> {
        self.folders[&place.folder].seen.get(&place.name)
    }

    /// The file at a place.
    pub(super) fn file_at(&self, place: &Place) -> io::Result<Arc<Inode>> {
        match self.entry(place) {
            Some(Entry::File(inode)) => Ok(Arc::clone(inode)),
            Some(Entry::Folder(_)) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// The file at `path`.
    pub(super) fn file(&self, path: &str) -> io::Result<Arc<Inode>> {
        if parts(path)?.is_empty() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        self.file_at(&self.place(path)?)
    }

    /// The names in a folder.
    pub(super) fn list(&self, folder: FolderId) -> impl Iterator<Item = (&String, &Entry)> {
        self.folders[&folder].seen.iter()
    }

    /// The paths of all files, sorted.
    pub(super) fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        let mut folders = vec![(ROOT, String::new())];
        while let Some((folder, prefix)) = folders.pop() {
            for (name, entry) in self.list(folder) {
                let path = format!("{prefix}{name}");
                match entry {
                    Entry::File(_) => paths.push(path),
                    Entry::Folder(id) => folders.push((*id, format!("{path}/"))),
                }
            }
        }
        paths.sort();
        paths
    }

    /// A new inode, without a name yet.
    pub(super) fn make_inode(&mut self, content: Content) -> Arc<Inode> {
        Arc::new(Inode::new(self.take_id(), content))
    }

    /// Lets a name stand for `entry`, or for nothing.
    pub(super) fn set(&mut self, place: Place, entry: Option<Entry>) {
        self.change(place.folder, Change { names: vec![(place.name, entry)] });
    }

    /// As [`Tree::set`], on the medium at once. Only this name: what else is pending stays so.
    pub(super) fn set_settled(&mut self, place: Place, entry: Entry) {
        let folder = self.folder_mut(place.folder);
        for change in &mut folder.pending {
            change.names.retain(|(name, _)| *name != place.name);
        }
        folder.pending.retain(|change| !change.names.is_empty());
        folder.settled.insert(place.name.clone(), entry.clone());
        folder.seen.insert(place.name, entry);
    }

    /// Moves a file: one change within a folder, two that know nothing of each other across.
    pub(super) fn rename(&mut self, from: Place, to: Place, inode: Arc<Inode>) {
        let gone = (from.name, None);
        let come = (to.name, Some(Entry::File(inode)));
        if from.folder == to.folder {
            self.change(from.folder, Change { names: vec![gone, come] });
        } else {
            self.change(to.folder, Change { names: vec![come] });
            self.change(from.folder, Change { names: vec![gone] });
        }
    }

    /// Makes at most `limit` of the missing folders of `path`, on the medium at once.
    pub(super) fn make_folders(&mut self, path: &str, limit: usize) -> io::Result<()> {
        let mut at = ROOT;
        let mut made = 0;
        let parts = parts(path)?;
        for (index, part) in parts.iter().copied().enumerate() {
            at = match self.folders[&at].seen.get(part) {
                Some(Entry::Folder(id)) => *id,
                Some(Entry::File(_)) if index + 1 == parts.len() => {
                    return Err(io::ErrorKind::AlreadyExists.into());
                }
                Some(Entry::File(_)) => return Err(io::ErrorKind::NotADirectory.into()),
                None if made == limit => return Ok(()),
                None => {
                    made += 1;
                    let id = self.take_id();
                    self.folders.insert(id, Folder::default());
                    let place = Place { folder: at, name: part.to_owned() };
                    self.set_settled(place, Entry::Folder(id));
                    id
                }
            };
        }
        Ok(())
    }

    /// Puts the oldest `limit` of the pending changes on the medium.
    pub(super) fn sync(&mut self, folder: FolderId, limit: usize) {
        let folder = self.folder_mut(folder);
        let count = limit.min(folder.pending.len());
        for change in folder.pending.drain(..count) {
            change.apply(&mut folder.settled);
        }
    }

    pub(super) fn pending(&self, folder: FolderId) -> usize {
        self.folders[&folder].pending.len()
    }

    /// What a power cut leaves of the folders and of the files they name.
    pub(super) fn after_power_cut(&self, survive: Survive, random: &mut SplitMix64) -> Tree {
        let mut tree = Tree { folders: BTreeMap::new(), next_id: self.next_id };
        let mut inodes: BTreeMap<u64, Arc<Inode>> = BTreeMap::new();
        let mut reachable = vec![ROOT];
        while let Some(id) = reachable.pop() {
            let mut names = self.folders[&id].after_power_cut(survive, random);
            for entry in names.values_mut() {
                match entry {
                    Entry::Folder(id) => reachable.push(*id),
                    Entry::File(inode) => {
                        let left = inodes.entry(inode.id).or_insert_with(|| {
                            let content = inode.content().after_power_cut(survive, random);
                            Arc::new(Inode::new(inode.id, content))
                        });
                        *inode = Arc::clone(left);
                    }
                }
            }
            let folder = Folder { seen: names.clone(), settled: names, pending: Vec::new() };
            tree.folders.insert(id, folder);
        }
        tree
    }

    fn walk(&self, parts: &[&str]) -> io::Result<FolderId> {
        let mut at = ROOT;
        for part in parts {
            at = match self.folders[&at].seen.get(*part) {
                Some(Entry::Folder(id)) => *id,
                Some(Entry::File(_)) => return Err(io::ErrorKind::NotADirectory.into()),
                None => return Err(io::ErrorKind::NotFound.into()),
            };
        }
        Ok(at)
    }

    fn change(&mut self, folder: FolderId, change: Change) {
        let folder = self.folder_mut(folder);
        change.clone().apply(&mut folder.seen);
        folder.pending.push(change);
    }

    fn folder_mut(&mut self, id: FolderId) -> &mut Folder {
        self.folders.get_mut(&id).expect("folders are kept for as long as the tree")
    }

    fn take_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }
}

impl Change {
    fn apply(self, names: &mut BTreeMap<String, Entry>) {
        for (name, entry) in self.names {
            match entry {
                Some(entry) => names.insert(name, entry),
                None => names.remove(&name),
            };
        }
    }
}

impl Folder {
    fn after_power_cut(
        &self,
        survive: Survive,
        random: &mut SplitMix64,
    ) -> BTreeMap<String, Entry> {
        let mut names = self.settled.clone();
        let quarters = random.up_to(4);
        for change in &self.pending {
            let survives = match survive {
                Survive::Nothing => false,
                Survive::Everything => true,
                Survive::Random(_) => random.up_to(3) < quarters,
            };
            if survives {
                change.clone().apply(&mut names);
            }
        }
        names
    }
}

fn parts(path: &str) -> io::Result<Vec<&str>> {
    if path.starts_with('/') || path.split('/').any(|part| part == "..") {
        let message = format!("{path} does not stay within the disk");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(path.split('/').filter(|part| !part.is_empty() && *part != ".").collect())
}
