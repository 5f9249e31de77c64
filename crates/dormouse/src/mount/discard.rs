//! Files that swallow what is written and keep its length: for the memory dump that a VMM cannot leave
//! out though nobody needs it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use dormouse_serve::device::DeviceResult;
use dormouse_serve::fuse::{
    Access, Creation, Entry, Kind, Opened, Sink, TreeErrorKind, TreeResult,
};

use super::tree::{folder, missing};

/// Files and folders at once. They are in memory, and whoever writes here may be a guest's VMM.
const NODES_MAX: usize = 1 << 16;

/// All that is below the folder, by path. A folder's path comes before those in it.
#[derive(Debug, Default)]
pub(super) struct Discard(Mutex<BTreeMap<String, Node>>);

#[derive(Clone, Debug)]
enum Node {
    Folder,
    File(Arc<Swallowed>),
}

/// The length of a file that has nothing else.
#[derive(Debug, Default)]
struct Swallowed(AtomicU64);

impl Discard {
    pub(super) fn entry(&self, path: &str) -> TreeResult<Entry> {
        let writable = Entry { permissions: 0o777, ..folder(SystemTime::UNIX_EPOCH) };
        if path.is_empty() {
            return Ok(writable);
        }
        match self.nodes().get(path).ok_or_else(missing)? {
            Node::Folder => Ok(writable),
            Node::File(file) => Ok(Entry {
                kind: Kind::File,
                size_bytes: file.size_bytes(),
                permissions: 0o666,
                ..writable
            }),
        }
    }

    pub(super) fn list(&self, path: &str) -> TreeResult<Vec<(String, Kind)>> {
        let nodes = self.nodes();
        if !path.is_empty() && !matches!(nodes.get(path), Some(Node::Folder)) {
            return Err(missing());
        }
        let inside = nodes.iter().filter_map(|(one, node)| Some((name_in(path, one)?, node)));
        Ok(inside.map(|(name, node)| (name.to_owned(), node.kind())).collect())
    }

    /// Opens a file, which a successor of the process that made it has never heard of.
    pub(super) fn open(&self, path: &str, access: Access) -> TreeResult<Opened> {
        match access {
            Access::Read => Err(TreeErrorKind::NotPermitted.into()),
            Access::Write => self.create(path, Creation::OrOpen),
        }
    }

    pub(super) fn create(&self, path: &str, creation: Creation) -> TreeResult<Opened> {
        let mut nodes = self.nodes();
        match (nodes.get(path), creation) {
            (Some(Node::Folder), _) => return Err(TreeErrorKind::AlreadyExists.into()),
            (Some(Node::File(_)), Creation::Only) => {
                return Err(TreeErrorKind::AlreadyExists.into());
            }
            (Some(Node::File(file)), Creation::OrOpen) => {
                return Ok(Opened::Sink(Arc::clone(file) as Arc<dyn Sink>));
            }
            (None, _) => {}
        }
        let file = Arc::new(Swallowed::default());
        insert(&mut nodes, path, Node::File(Arc::clone(&file)))?;
        Ok(Opened::Sink(file))
    }

    pub(super) fn make_folder(&self, path: &str) -> TreeResult<()> {
        let mut nodes = self.nodes();
        if nodes.contains_key(path) {
            return Err(TreeErrorKind::AlreadyExists.into());
        }
        insert(&mut nodes, path, Node::Folder)
    }

    pub(super) fn remove(&self, path: &str, kind: Kind) -> TreeResult<()> {
        let mut nodes = self.nodes();
        if nodes.get(path).ok_or_else(missing)?.kind() != kind {
            return Err(TreeErrorKind::Invalid.into());
        }
        if kind == Kind::Folder && nodes.keys().any(|one| name_in(path, one).is_some()) {
            return Err(TreeErrorKind::NotEmpty.into());
        }
        nodes.remove(path);
        Ok(())
    }

    fn nodes(&self) -> MutexGuard<'_, BTreeMap<String, Node>> {
        // A map that is changed by single insertions and removals.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Node {
    fn kind(&self) -> Kind {
        match self {
            Node::Folder => Kind::Folder,
            Node::File(_) => Kind::File,
        }
    }
}

fn insert(nodes: &mut BTreeMap<String, Node>, path: &str, node: Node) -> TreeResult<()> {
    if nodes.len() >= NODES_MAX {
        return Err(TreeErrorKind::NoSpace.into());
    }
    if let Some((above, _)) = path.rsplit_once('/')
        && !matches!(nodes.get(above), Some(Node::Folder))
    {
        return Err(missing());
    }
    nodes.insert(path.to_owned(), node);
    Ok(())
}

/// The name of a path that lies right in a folder.
fn name_in<'a>(folder: &str, path: &'a str) -> Option<&'a str> {
    let rest = match folder {
        "" => path,
        _ => path.strip_prefix(folder)?.strip_prefix('/')?,
    };
    (!rest.contains('/')).then_some(rest)
}

impl Sink for Swallowed {
    fn size_bytes(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> DeviceResult<()> {
        self.0.fetch_max(offset.saturating_add(data.len() as u64), Ordering::AcqRel);
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> DeviceResult<()> {
        self.0.fetch_max(range.end, Ordering::AcqRel);
        Ok(())
    }

    fn set_size(&self, size_bytes: u64) -> DeviceResult<()> {
        self.0.store(size_bytes, Ordering::Release);
        Ok(())
    }

    fn flush(&self) -> DeviceResult<()> {
        Ok(())
    }
}
