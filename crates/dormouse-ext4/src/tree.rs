//! A file tree in little memory: inodes, the names that lead to them, and where contents are.
//!
//! Names lie one after the other in one buffer, inodes and links in one array each, and one hash
//! table finds a link by folder and name. That is about 140 bytes for an entry with a name of 20
//! bytes, whatever the depth. A removed entry leaves its place unused: what is removed are whiteouts
//! of layers, which are few.

pub mod content;
pub mod mtree;
pub mod owner;
pub(crate) mod xattr;

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{BuildHasher, BuildHasherDefault};
use std::ops::Range;
use std::sync::Arc;

use hashbrown::HashTable;

use crate::disk::{self, NAME_BYTES_MAX};
use crate::error::{Error, ErrorKind, Result};

pub use content::{Contents, FileId, Opened};
pub use xattr::Xattr;

/// An inode of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) u32);

/// The root folder.
pub const ROOT: NodeId = NodeId(0);

const NONE: u32 = u32::MAX;

/// Extended attributes, each set once, and maps of holes: more than any image has, and an end to
/// streams that would fill memory with them.
const EXTRA_BYTES_MAX: usize = 1 << 30;

/// A moment, in seconds since 1970 and nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,

    /// Nanoseconds beside them, below 1,000,000,000.
    pub nanoseconds: u32,
}

/// What every kind of file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Permissions with setuid, setgid and sticky bits: `0o7777` at most.
    pub mode: u16,

    /// The owner.
    pub uid: u32,

    /// The group.
    pub gid: u32,

    /// When the content was changed last.
    pub mtime: Time,
}

/// What a file is, with what only that kind has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind<'a> {
    /// A folder.
    Folder,

    /// A regular file.
    File {
        /// Its length.
        bytes: u64,

        /// Where its content is.
        content: FileId,

        /// The blocks of 4 KiB that hold data, if not all do. Sorted, apart from each other.
        data: Option<Vec<Range<u64>>>,
    },

    /// A symlink, with its target.
    Symlink(&'a [u8]),

    /// A character device.
    CharDevice {
        /// The driver's number.
        major: u32,
        /// The device's number.
        minor: u32,
    },

    /// A block device.
    BlockDevice {
        /// The driver's number.
        major: u32,
        /// The device's number.
        minor: u32,
    },

    /// A named pipe.
    Fifo,

    /// A socket.
    Socket,
}

#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) mode: u16,
    /// Whose content it is; see [`FileId`].
    pub(crate) source: u16,
    pub(crate) links: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime_seconds: i64,
    pub(crate) mtime_nanoseconds: u32,
    /// An index into `xattrs`.
    pub(crate) xattrs: u32,
    /// Of a file its length, of a symlink the target's length, of a device its number.
    pub(crate) size: u64,
    /// Of a file its key in the source, of a symlink where its target begins in `names`.
    pub(crate) key: u64,
    /// Of a folder its first link, of a file an index into `sparse`.
    pub(crate) first: u32,
    /// Of a folder its last link.
    pub(crate) last: u32,
    /// A link to it: of a folder the only one.
    pub(crate) link: u32,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    name_at: u32,
    folder: u32,
    /// `NONE` in a link that was removed.
    node: u32,
    next: u32,
    layer: u16,
    name_len: u8,
}

/// A file tree.
#[derive(Debug)]
pub struct Tree {
    pub(crate) nodes: Vec<Node>,
    links: Vec<Link>,
    names: Vec<u8>,
    index: HashTable<u32>,
    sources: Vec<Arc<dyn Contents>>,
    xattrs: Vec<Arc<[Xattr]>>,
    xattr_index: HashMap<Arc<[Xattr]>, u32>,
    sparse: Vec<Vec<Range<u64>>>,
    freed: Vec<NodeId>,
    live: u64,
    extra_bytes: usize,
}

impl Tree {
    /// A tree with nothing but a root folder, which belongs to root with mode 755.
    pub fn new() -> Tree {
        let root = Attributes { mode: 0o755, uid: 0, gid: 0, mtime: Time::default() };
        let mut tree = Tree {
            nodes: Vec::new(),
            links: Vec::new(),
            names: Vec::new(),
            index: HashTable::new(),
            sources: Vec::new(),
            xattrs: vec![Arc::from([])],
            xattr_index: HashMap::new(),
            sparse: Vec::new(),
            freed: Vec::new(),
            live: 1,
            extra_bytes: 0,
        };
        tree.xattr_index.insert(Arc::from([]), 0);
        tree.nodes.push(Node::new(disk::TYPE_FOLDER, &root));
        tree
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// Inodes of the tree, the root among them.
    pub fn len(&self) -> u64 {
        self.live
    }

    /// Whether there is nothing but the root.
    pub fn is_empty(&self) -> bool {
        self.nodes[0].first == NONE
    }

    /// What the blocks of all files take that hold data.
    pub fn content_bytes(&self) -> u64 {
        let files = (0u32..).zip(&self.nodes).filter(|(_, node)| node.is_file() && node.links > 0);
        files.map(|(id, _)| crate::layout::data_blocks(self, NodeId(id)) * disk::BLOCK).sum()
    }

    /// Makes the contents of `source` known; file ids of it are made from the number returned.
    pub fn add_source(&mut self, source: Arc<dyn Contents>) -> Result<u16> {
        let number = u16::try_from(self.sources.len()).ok().filter(|&n| n < FileId::PLACED);
        let number = number.ok_or_else(|| {
            Error::new(ErrorKind::Limit, "a tree of more than 65,000 sources of content")
        })?;
        self.sources.push(source);
        Ok(number)
    }

    /// Puts the complete source in the place of the one that held its number.
    pub(crate) fn replace_source(&mut self, number: u16, source: Arc<dyn Contents>) {
        self.sources[usize::from(number)] = source;
    }

    pub(crate) fn source(&self, number: u16) -> Option<&Arc<dyn Contents>> {
        self.sources.get(usize::from(number))
    }

    /// The entry `name` of a folder.
    pub fn lookup(&self, folder: NodeId, name: &[u8]) -> Option<NodeId> {
        self.find(folder, name).map(|link| NodeId(self.links[link as usize].node))
    }

    /// The inode at a path, whose empty components and `.` are ignored.
    pub fn lookup_path(&self, path: &[u8]) -> Option<NodeId> {
        path.split(|&byte| byte == b'/')
            .filter(|part| !part.is_empty() && *part != b".")
            .try_fold(ROOT, |at, part| self.lookup(at, part))
    }

    fn find(&self, folder: NodeId, name: &[u8]) -> Option<u32> {
        let hash = hash(folder.0, name);
        let found = self.index.find(hash, |&link| {
            let link = &self.links[link as usize];
            link.folder == folder.0 && self.name_of(link) == name
        });
        found.copied()
    }

    /// Puts a new inode into a folder under a name that is not taken.
    ///
    /// A folder is refused that is none, and a name that is empty, `.`, `..`, longer than 255
    /// bytes, or has a `/` or a zero byte in it.
    pub fn add(
        &mut self,
        folder: NodeId,
        name: &[u8],
        layer: u16,
        attributes: &Attributes,
        kind: Kind<'_>,
    ) -> Result<NodeId> {
        let id = u32::try_from(self.nodes.len()).ok().filter(|&id| id < NONE).ok_or_else(|| {
            Error::new(ErrorKind::Limit, "a tree of more than 4,000,000,000 inodes")
        })?;
        let mut node = Node::new(kind.type_bits(), attributes);
        match kind {
            Kind::Folder | Kind::Fifo | Kind::Socket => {}
            Kind::File { bytes, content, data } => {
                node.size = bytes;
                node.source = content.source;
                node.key = content.key;
                if let Some(data) = data {
                    self.take_extra(data.len() * size_of::<Range<u64>>())?;
                    node.first = u32::try_from(self.sparse.len()).unwrap_or(NONE);
                    self.sparse.push(data);
                }
            }
            Kind::Symlink(target) => {
                node.size = target.len() as u64;
                node.key = self.intern(target)?.into();
            }
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                node.size = u64::from(major) << 32 | u64::from(minor);
            }
        }
        self.nodes.push(node);
        if let Err(error) = self.link(folder, name, layer, NodeId(id)) {
            self.nodes.pop();
            return Err(error);
        }
        self.live += 1;
        Ok(NodeId(id))
    }

    /// Gives an inode one more name.
    pub fn link(&mut self, folder: NodeId, name: &[u8], layer: u16, node: NodeId) -> Result<()> {
        self.check_new_name(folder, name)?;
        if self.node(node).links >= disk::LINKS_MAX {
            let most = disk::LINKS_MAX;
            let what = format!("a file with more than {most} names, which ext4 cannot hold");
            return Err(Error::new(ErrorKind::DoesNotFit, what));
        }
        let link = u32::try_from(self.links.len())
            .map_err(|_| Error::new(ErrorKind::Limit, "a tree of more than 4,000,000,000 names"))?;
        let name_at = self.intern(name)?;
        let name_len = u8::try_from(name.len()).expect("checked above to have 255 bytes at most");
        let new = Link { name_at, name_len, folder: folder.0, node: node.0, next: NONE, layer };
        self.links.push(new);
        let (links, names) = (&self.links, &self.names);
        self.index.insert_unique(hash(folder.0, name), link, |&link| {
            let link = &links[link as usize];
            hash(link.folder, slice_of(names, link))
        });
        let folder = &mut self.nodes[folder.0 as usize];
        let last = std::mem::replace(&mut folder.last, link);
        if last == NONE {
            folder.first = link;
        } else {
            self.links[last as usize].next = link;
        }
        let node = &mut self.nodes[node.0 as usize];
        node.links += 1;
        node.link = link;
        Ok(())
    }

    fn check_new_name(&self, folder: NodeId, name: &[u8]) -> Result<()> {
        let wrong = |why: &str| {
            let name = name.escape_ascii();
            let folder = self.path_of(folder);
            Err(Error::new(ErrorKind::InvalidInput, format!("{name:.300} in {folder}: {why}")))
        };
        if name.is_empty() || name == b"." || name == b".." {
            return wrong("not a name");
        }
        if name.len() > NAME_BYTES_MAX {
            return wrong("a name of more than 255 bytes");
        }
        if name.iter().any(|&byte| byte == b'/' || byte == 0) {
            return wrong("a name with a slash or a zero byte");
        }
        if !self.node(folder).is_folder() {
            return wrong("what should be a folder is none");
        }
        if self.find(folder, name).is_some() {
            return wrong("the name is taken");
        }
        Ok(())
    }

    fn intern(&mut self, bytes: &[u8]) -> Result<u32> {
        let at = u32::try_from(self.names.len())
            .map_err(|_| Error::new(ErrorKind::Limit, "names of more than 4 GiB in one tree"))?;
        self.names.extend_from_slice(bytes);
        Ok(at)
    }

    /// Removes an entry, and if it is a folder all below it. Says whether there was one.
    pub fn remove(&mut self, folder: NodeId, name: &[u8]) -> bool {
        let Some(link) = self.find(folder, name) else { return false };
        let mut pending = vec![link];
        while let Some(link) = pending.pop() {
            let node = self.cut(link);
            if self.node(node).is_folder() {
                let mut at = self.node(node).first;
                while at != NONE {
                    let child = &self.links[at as usize];
                    if child.node != NONE {
                        pending.push(at);
                    }
                    at = child.next;
                }
                self.nodes[node.0 as usize].first = NONE;
            }
        }
        true
    }

    /// Takes a link out of its folder and returns what it led to.
    fn cut(&mut self, link: u32) -> NodeId {
        let Link { folder, node, .. } = self.links[link as usize];
        let name = slice_of(&self.names, &self.links[link as usize]);
        if let Ok(entry) = self.index.find_entry(hash(folder, name), |&other| other == link) {
            entry.remove();
        }
        self.links[link as usize].node = NONE;
        let target = &mut self.nodes[node as usize];
        target.links -= 1;
        if target.links == 0 {
            self.live -= 1;
            self.freed.push(NodeId(node));
        }
        NodeId(node)
    }

    /// Hides what earlier layers put into a folder, and into folders below it that `layer`
    /// has touched.
    pub(crate) fn hide_lower(&mut self, folder: NodeId, layer: u16) {
        let mut pending = vec![folder];
        while let Some(folder) = pending.pop() {
            let entries: Vec<(Vec<u8>, NodeId, u16)> = self
                .entries(folder)
                .map(|entry| (entry.name.to_vec(), entry.node, entry.layer))
                .collect();
            for (name, node, entry_layer) in entries {
                if entry_layer < layer {
                    self.remove(folder, &name);
                } else if self.node(node).is_folder() {
                    pending.push(node);
                }
            }
        }
    }

    /// Notes that `layer` speaks of an entry.
    pub(crate) fn touch(&mut self, folder: NodeId, name: &[u8], layer: u16) {
        if let Some(link) = self.find(folder, name) {
            self.links[link as usize].layer = layer;
        }
    }

    /// The layer that last spoke of an entry.
    pub(crate) fn layer_of(&self, folder: NodeId, name: &[u8]) -> Option<u16> {
        self.find(folder, name).map(|link| self.links[link as usize].layer)
    }

    /// Files that lost their last name since this was asked.
    pub(crate) fn take_freed(&mut self) -> Vec<NodeId> {
        std::mem::take(&mut self.freed)
    }

    /// Sets what every kind of file has.
    pub fn set_attributes(&mut self, node: NodeId, attributes: &Attributes) {
        let node = &mut self.nodes[node.0 as usize];
        node.mode = (node.mode & disk::TYPE_MASK) | (attributes.mode & 0o7777);
        node.uid = attributes.uid;
        node.gid = attributes.gid;
        node.mtime_seconds = attributes.mtime.seconds;
        node.mtime_nanoseconds = attributes.mtime.nanoseconds;
    }

    /// What every kind of file has.
    pub fn attributes(&self, node: NodeId) -> Attributes {
        let node = &self.node(node);
        Attributes { mode: node.mode & 0o7777, uid: node.uid, gid: node.gid, mtime: node.mtime() }
    }

    /// Sets the extended attributes, which are sorted by name here.
    pub fn set_xattrs(&mut self, node: NodeId, mut xattrs: Vec<Xattr>) -> Result<()> {
        xattrs.sort();
        xattrs.dedup_by(|later, earlier| later.name == earlier.name);
        let number = match self.xattr_index.get(&*xattrs) {
            Some(&number) => number,
            None => {
                let bytes = |xattr: &Xattr| {
                    size_of::<Xattr>() + xattr.name.capacity() + xattr.value.capacity()
                };
                self.take_extra(64 + xattrs.iter().map(bytes).sum::<usize>())?;
                let number = u32::try_from(self.xattrs.len()).unwrap_or(NONE);
                let set: Arc<[Xattr]> = xattrs.into();
                self.xattrs.push(Arc::clone(&set));
                self.xattr_index.insert(set, number);
                number
            }
        };
        self.nodes[node.0 as usize].xattrs = number;
        Ok(())
    }

    fn take_extra(&mut self, bytes: usize) -> Result<()> {
        self.extra_bytes += bytes;
        if self.extra_bytes > EXTRA_BYTES_MAX {
            let what = "extended attributes and maps of holes of more than 1 GiB in one tree";
            return Err(Error::new(ErrorKind::Limit, what));
        }
        Ok(())
    }

    /// The extended attributes, by name.
    pub fn xattrs(&self, node: NodeId) -> &Arc<[Xattr]> {
        &self.xattrs[self.node(node).xattrs as usize]
    }

    /// The target of a symlink.
    pub fn target(&self, node: NodeId) -> &[u8] {
        let node = &self.node(node);
        // Both were lengths of a buffer here.
        let [at, len] = [node.key, node.size].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        &self.names[at..at + len]
    }

    /// A folder's entries: in the order in which they came, or by name after [`Tree::sort`].
    pub fn entries(&self, folder: NodeId) -> Entries<'_> {
        let first = if self.node(folder).is_folder() { self.node(folder).first } else { NONE };
        Entries { tree: self, at: first }
    }

    /// The blocks of a file that hold data, if not all do.
    pub(crate) fn sparse(&self, node: NodeId) -> Option<&[Range<u64>]> {
        let node = &self.node(node);
        if !node.is_file() || node.first == NONE {
            return None;
        }
        self.sparse.get(node.first as usize).map(Vec::as_slice)
    }

    /// Puts the entries of every folder in the order of their names.
    pub fn sort(&mut self) {
        let mut order = Vec::new();
        for folder in 0..self.nodes.len() {
            if !self.nodes[folder].is_folder() {
                continue;
            }
            order.clear();
            let mut at = self.nodes[folder].first;
            while at != NONE {
                let link = &self.links[at as usize];
                if link.node != NONE {
                    order.push(at);
                }
                at = link.next;
            }
            let name = |&link: &u32| slice_of(&self.names, &self.links[link as usize]);
            if !order.is_sorted_by(|a, b| name(a) < name(b)) {
                order.sort_unstable_by(|a, b| name(a).cmp(name(b)));
            }
            let next = order.iter().skip(1).copied().chain([NONE]);
            for (&link, next) in order.iter().zip(next) {
                self.links[link as usize].next = next;
            }
            self.nodes[folder].first = order.first().copied().unwrap_or(NONE);
            self.nodes[folder].last = order.last().copied().unwrap_or(NONE);
        }
    }

    /// The folder that a folder lies in; the root lies in itself.
    pub fn parent(&self, folder: NodeId) -> NodeId {
        match self.node(folder).link {
            NONE => ROOT,
            link => NodeId(self.links[link as usize].folder),
        }
    }

    /// The path to an inode, for messages: one of them, if there are several.
    pub fn path_of(&self, node: NodeId) -> String {
        let mut parts = Vec::new();
        let mut at = node;
        while at != ROOT {
            let link = self.node(at).link;
            if link == NONE {
                break;
            }
            parts.push(link);
            at = NodeId(self.links[link as usize].folder);
        }
        let mut path = String::new();
        for &link in parts.iter().rev() {
            let name = self.name_of(&self.links[link as usize]);
            // Writing to a string cannot fail.
            let _ = write!(path, "/{}", String::from_utf8_lossy(name).escape_debug());
        }
        if path.is_empty() { "/".to_owned() } else { path }
    }

    /// The path to a folder, without a leading slash.
    pub(crate) fn path_bytes(&self, folder: NodeId) -> Vec<u8> {
        let mut parts = Vec::new();
        let mut at = folder;
        while self.node(at).link != NONE {
            let link = &self.links[self.node(at).link as usize];
            parts.push(self.name_of(link));
            at = NodeId(link.folder);
        }
        parts.reverse();
        parts.join(&b'/')
    }

    fn name_of(&self, link: &Link) -> &[u8] {
        slice_of(&self.names, link)
    }
}

impl Default for Tree {
    fn default() -> Tree {
        Tree::new()
    }
}

impl Node {
    fn new(type_bits: u16, attributes: &Attributes) -> Node {
        Node {
            mode: type_bits | (attributes.mode & 0o7777),
            source: FileId::EMPTY,
            links: 0,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime_seconds: attributes.mtime.seconds,
            mtime_nanoseconds: attributes.mtime.nanoseconds,
            xattrs: 0,
            size: 0,
            key: 0,
            first: NONE,
            last: NONE,
            link: NONE,
        }
    }

    pub(crate) fn type_bits(&self) -> u16 {
        self.mode & disk::TYPE_MASK
    }

    pub(crate) fn is_folder(&self) -> bool {
        self.type_bits() == disk::TYPE_FOLDER
    }

    pub(crate) fn is_file(&self) -> bool {
        self.type_bits() == disk::TYPE_FILE
    }

    pub(crate) fn is_symlink(&self) -> bool {
        self.type_bits() == disk::TYPE_SYMLINK
    }

    pub(crate) fn mtime(&self) -> Time {
        Time { seconds: self.mtime_seconds, nanoseconds: self.mtime_nanoseconds }
    }

    pub(crate) fn content(&self) -> FileId {
        FileId { source: self.source, key: self.key }
    }
}

impl Kind<'_> {
    fn type_bits(&self) -> u16 {
        match self {
            Kind::Folder => disk::TYPE_FOLDER,
            Kind::File { .. } => disk::TYPE_FILE,
            Kind::Symlink(_) => disk::TYPE_SYMLINK,
            Kind::CharDevice { .. } => disk::TYPE_CHAR,
            Kind::BlockDevice { .. } => disk::TYPE_BLOCK,
            Kind::Fifo => disk::TYPE_FIFO,
            Kind::Socket => disk::TYPE_SOCKET,
        }
    }
}

/// An entry of a folder.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The name.
    pub name: &'a [u8],

    /// What it leads to.
    pub node: NodeId,

    /// The layer that last spoke of it.
    pub layer: u16,
}

/// The entries of a folder.
#[derive(Debug)]
pub struct Entries<'a> {
    tree: &'a Tree,
    at: u32,
}

impl<'a> Iterator for Entries<'a> {
    type Item = Entry<'a>;

    fn next(&mut self) -> Option<Entry<'a>> {
        while self.at != NONE {
            let link = &self.tree.links[self.at as usize];
            self.at = link.next;
            if link.node != NONE {
                let name = self.tree.name_of(link);
                return Some(Entry { name, node: NodeId(link.node), layer: link.layer });
            }
        }
        None
    }
}

fn slice_of<'a>(names: &'a [u8], link: &Link) -> &'a [u8] {
    &names[link.name_at as usize..][..usize::from(link.name_len)]
}

fn hash(folder: u32, name: &[u8]) -> u64 {
    // The same in every run; nothing that is written depends on it.
    BuildHasherDefault::<DefaultHasher>::default().hash_one((folder, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Attributes =
        Attributes { mode: 0o644, uid: 1, gid: 2, mtime: Time { seconds: 3, nanoseconds: 4 } };

    fn names(tree: &Tree, folder: NodeId) -> Vec<String> {
        let name = |entry: Entry<'_>| String::from_utf8_lossy(entry.name).into_owned();
        tree.entries(folder).map(name).collect()
    }

    #[test]
    fn entries_are_found_sorted_and_removed_with_all_below_them() {
        let mut tree = Tree::new();
        let outer = tree.add(ROOT, b"outer", 0, &PLAIN, Kind::Folder).unwrap();
        let inner = tree.add(outer, b"inner", 0, &PLAIN, Kind::Folder).unwrap();
        let pipe = tree.add(inner, b"pipe", 0, &PLAIN, Kind::Fifo).unwrap();
        tree.add(ROOT, b"b", 0, &PLAIN, Kind::Symlink(b"to here")).unwrap();
        tree.link(ROOT, b"a", 0, pipe).unwrap();
        assert_eq!(tree.path_of(inner), "/outer/inner");
        assert_eq!(tree.lookup_path(b"./outer//inner/pipe"), Some(pipe));
        assert_eq!(tree.target(tree.lookup(ROOT, b"b").unwrap()), b"to here");
        tree.sort();
        assert_eq!(names(&tree, ROOT), ["a", "b", "outer"]);
        assert_eq!(tree.len(), 5);
        assert!(tree.remove(ROOT, b"outer"));
        assert!(!tree.remove(ROOT, b"outer"));
        assert_eq!((tree.len(), tree.node(pipe).links), (3, 1));
        assert_eq!(tree.lookup_path(b"outer/inner"), None);
        assert!(tree.remove(ROOT, b"a"));
        assert_eq!(names(&tree, ROOT), ["b"]);
        assert_eq!(tree.take_freed().len(), 3);
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let mut tree = Tree::new();
        let file = tree.add(ROOT, b"file", 0, &PLAIN, Kind::Fifo).unwrap();
        let long = [b'x'; 256];
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &long, b"file"] {
            assert!(tree.add(ROOT, name, 0, &PLAIN, Kind::Fifo).is_err(), "{name:?}");
        }
        assert!(tree.add(file, b"below", 0, &PLAIN, Kind::Fifo).is_err());
        assert!(tree.add(ROOT, &long[1..], 0, &PLAIN, Kind::Fifo).is_ok());
        assert_eq!(tree.len(), 3);
    }

    #[test]
    fn a_layer_hides_what_lower_ones_put_below_folders_that_it_touched() {
        let mut tree = Tree::new();
        let dir = tree.add(ROOT, b"dir", 0, &PLAIN, Kind::Folder).unwrap();
        let sub = tree.add(dir, b"sub", 0, &PLAIN, Kind::Folder).unwrap();
        tree.add(sub, b"old", 0, &PLAIN, Kind::Fifo).unwrap();
        tree.add(dir, b"gone", 0, &PLAIN, Kind::Folder).unwrap();
        tree.add(sub, b"new", 1, &PLAIN, Kind::Fifo).unwrap();
        tree.touch(dir, b"sub", 1);
        tree.hide_lower(dir, 1);
        assert_eq!(names(&tree, dir), ["sub"]);
        assert_eq!(names(&tree, sub), ["new"]);
    }
}
