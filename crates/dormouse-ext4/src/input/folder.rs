//! A folder of the host as a tree. Its files stay where they are.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use dormouse_sys::own_folder::OwnFolder;
use dormouse_sys::sparse::data_extents;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::disk::BLOCK;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::input::Limits;
use crate::input::follow::{Missing, follow};
use crate::tree::content::{Contents, FileId, Opened};
use crate::tree::{Attributes, Kind, NodeId, Time, Tree, Xattr};
use crate::write::Watch;

/// The longest path that is opened in one step (`PATH_MAX` with its zero byte).
const PATH_BYTES_MAX: usize = 4095;

/// The longest list of extended attributes, and the longest value (`xattr(7)`).
const XATTR_BYTES_MAX: usize = 64 << 10;

/// What opening without a mark of the time fails with where the file is another's.
const PERM: i32 = Errno::PERM.raw_os_error();

/// Folders whose attributes wait to be listed; each keeps a descriptor open.
const LISTINGS_MAX: usize = 16;

/// Entries that are handed over at once.
const LISTING_ENTRIES_MAX: usize = 1024;

/// What to leave out, by path in the tree without a leading slash.
pub type Exclude<'a> = Option<&'a dyn Fn(&[u8]) -> bool>;

/// Puts what is in a folder of the host into `tree`, below `into`.
///
/// The folder's own attributes become those of `into`. Folders that are in `into` already stay as they are,
/// with what comes beside what is in them, and so do links to folders; all else takes the place of what was there. Symlinks are kept as they are and never
/// followed, but for `path` itself. Sockets, devices and pipes are kept; what is mounted below is
/// read like the rest.
pub fn read(
    tree: &mut Tree,
    into: NodeId,
    path: &Path,
    limits: &Limits,
    exclude: Exclude<'_>,
    watch: &dyn Watch,
) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(path, flags, Mode::empty());
    let root =
        root.map_err(io::Error::from).context(|| format!("cannot open {}", path.display()))?;
    let stat = rustix::fs::fstat(&root).map_err(io::Error::from);
    let stat = stat.context(|| format!("cannot look at {}", path.display()))?;
    tree.set_attributes(into, &attributes(&stat));
    let host = HostFolder {
        root,
        label: path.display().to_string(),
        folders: vec![HostDir { parent: 0, name: Box::from(&b""[..]) }],
        names: Vec::new(),
        files: Vec::new(),
        is_owner: AtomicBool::new(true),
    };
    let source = tree.add_source(Arc::new(Placeholder))?;
    let (sender, receiver) = sync_channel(LISTINGS_MAX);
    let lister = thread::spawn(move || list_all(&receiver));
    let (is_over, links) = (!tree.is_empty(), HashMap::new());
    let first = u32::try_from(tree.nodes.len()).unwrap_or(u32::MAX);
    let mut walk =
        Walk { tree, host, source, is_over, first, links, limits, exclude, watch, lister: sender };
    let own = format!("/proc/self/fd/{}", walk.host.root.as_raw_fd());
    let own = xattrs_behind(OsStr::new(&own));
    let own = own.context(|| format!("cannot read attributes of {}", path.display()))?;
    if !own.is_empty() {
        walk.tree.set_xattrs(into, own)?;
    }
    let mut pending = vec![(0, into)];
    while let Some((folder, node)) = pending.pop() {
        walk.folder(folder, node, &mut pending)?;
    }
    let Walk { host, lister: sender, .. } = walk;
    drop(sender);
    let listed = lister.join().unwrap_or_else(|_| {
        Err((into, io::Error::other("the thread that lists attributes panicked")))
    });
    let listed = listed.map_err(|(node, error)| {
        Error::io(format!("cannot read attributes of {}", tree.path_of(node)), error)
    })?;
    for (node, xattrs) in listed {
        tree.set_xattrs(node, xattrs)?;
    }
    tree.replace_source(source, Arc::new(host));
    Ok(())
}

/// Stands for a source until it is complete.
#[derive(Debug)]
struct Placeholder;

impl Contents for Placeholder {
    fn open(&self, _key: u64) -> io::Result<Opened> {
        Err(io::ErrorKind::NotFound.into())
    }
}

struct HostDir {
    parent: u32,
    name: Box<[u8]>,
}

struct HostFile {
    folder: u32,
    name_at: u32,
    name_len: u8,
}

/// The files of a folder that a tree was read from.
struct HostFolder {
    root: OwnedFd,
    label: String,
    folders: Vec<HostDir>,
    names: Vec<u8>,
    files: Vec<HostFile>,
    /// Until a file turns out to be somebody else's.
    is_owner: AtomicBool,
}

impl fmt::Debug for HostFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostFolder")
            .field("root", &self.label)
            .field("folders", &self.folders.len())
            .field("files", &self.files.len())
            .finish_non_exhaustive()
    }
}

impl HostFolder {
    /// Opens what lies in a folder under a name, in steps where the path is long.
    fn open_in(&self, folder: u32, name: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        let mut parts: Vec<&[u8]> = Vec::new();
        if !name.is_empty() {
            parts.push(name);
        }
        let mut at = folder;
        while at != 0 {
            let folder = &self.folders[at as usize];
            parts.push(&folder.name);
            at = folder.parent;
        }
        let mut base: Option<OwnedFd> = None;
        let mut path = Vec::new();
        let through = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        while let Some(part) = parts.pop() {
            if path.len() + 1 + part.len() > PATH_BYTES_MAX {
                let here = base.as_ref().unwrap_or(&self.root);
                let next = rustix::fs::openat(here, path.as_slice(), through, Mode::empty())?;
                base = Some(next);
                path.clear();
            }
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(part);
        }
        if path.is_empty() {
            path.push(b'.');
        }
        let here = base.as_ref().unwrap_or(&self.root);
        Ok(rustix::fs::openat(here, path.as_slice(), flags, Mode::empty())?)
    }
}

impl Contents for HostFolder {
    fn open(&self, key: u64) -> io::Result<Opened> {
        let file = usize::try_from(key).ok().and_then(|key| self.files.get(key));
        let file = file.ok_or(io::ErrorKind::NotFound)?;
        let name = &self.names[file.name_at as usize..][..usize::from(file.name_len)];
        // Not blocking, should a pipe lie there by now.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut found = Err(Errno::PERM.into());
        if self.is_owner.load(Ordering::Relaxed) {
            // Being read into an image is no use that anybody asks about.
            found = self.open_in(file.folder, name, flags | OFlags::NOATIME);
        }
        if matches!(&found, Err(error) if error.raw_os_error() == Some(PERM)) {
            // Only owners may say so.
            self.is_owner.store(false, Ordering::Relaxed);
            found = self.open_in(file.folder, name, flags);
        }
        Ok(Opened::File { file: Arc::new(found?.into()), offset: 0 })
    }
}

struct Walk<'a> {
    tree: &'a mut Tree,
    host: HostFolder,
    source: u16,
    /// Whether something may be there already at the names that come.
    is_over: bool,
    /// The first inode that comes from here.
    first: u32,
    /// Files with several names, by device and inode.
    links: HashMap<(u64, u64), NodeId>,
    limits: &'a Limits,
    exclude: Exclude<'a>,
    watch: &'a dyn Watch,
    /// Lists attributes meanwhile, which takes as long as all the rest.
    lister: SyncSender<Listing>,
}

/// New entries of a folder, of which attributes are to be listed.
struct Listing {
    folder: Arc<OwnedFd>,
    entries: Vec<(CString, NodeId)>,
}

type Listed = std::result::Result<Vec<(NodeId, Vec<Xattr>)>, (NodeId, io::Error)>;

/// Lists attributes until nothing more comes. Keeps those of entries that have any.
fn list_all(receiver: &Receiver<Listing>) -> Listed {
    let mut value = vec![0; XATTR_BYTES_MAX];
    let mut found = Vec::new();
    let mut path = Vec::new();
    // Where sandboxes forbid it, the way there is longer.
    let own = OwnFolder::new().ok();
    for listing in receiver {
        let is_inside = own.as_ref().is_some_and(|own| own.enter(&*listing.folder).is_ok());
        let prefix = match is_inside {
            true => String::new(),
            false => format!("/proc/self/fd/{}/", listing.folder.as_raw_fd()),
        };
        for (name, node) in listing.entries {
            path.clear();
            path.extend_from_slice(prefix.as_bytes());
            path.extend_from_slice(name.as_bytes());
            match xattrs_of(OsStr::from_bytes(&path), Follow::No, &mut value) {
                Ok(xattrs) if xattrs.is_empty() => {}
                Ok(xattrs) => found.push((node, xattrs)),
                Err(error) => return Err((node, error)),
            }
        }
    }
    Ok(found)
}

impl Walk<'_> {
    fn folder(
        &mut self,
        folder: u32,
        node: NodeId,
        pending: &mut Vec<(u32, NodeId)>,
    ) -> Result<()> {
        if self.watch.is_cancelled() {
            return Err(Error::cancelled());
        }
        let what = |walk: &Walk<'_>| format!("cannot read {}", walk.tree.path_of(node));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = self.host.open_in(folder, b"", flags).context(|| what(self))?;
        let dir = Dir::read_from(&fd).map_err(io::Error::from).context(|| what(self))?;
        let fd = Arc::new(fd);
        let mut new = Vec::new();
        for entry in dir {
            let entry = entry.map_err(io::Error::from).context(|| what(self))?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            if let Some(found) = self.entry(&fd, folder, node, name, pending)? {
                new.push((name.to_owned(), found));
            }
            if new.len() >= LISTING_ENTRIES_MAX {
                self.list(&fd, std::mem::take(&mut new));
            }
        }
        self.list(&fd, new);
        Ok(())
    }

    fn list(&self, folder: &Arc<OwnedFd>, entries: Vec<(CString, NodeId)>) {
        // The lister hangs up only after an error, which it tells at the end.
        let _ = self.lister.send(Listing { folder: Arc::clone(folder), entries });
    }

    /// Takes an entry over, and returns its inode if that is a new one.
    fn entry(
        &mut self,
        fd: &OwnedFd,
        folder: u32,
        parent: NodeId,
        name: &CStr,
        pending: &mut Vec<(u32, NodeId)>,
    ) -> Result<Option<NodeId>> {
        let bytes = name.to_bytes();
        let shown = |walk: &Walk<'_>| {
            format!("cannot read {} in {}", bytes.escape_ascii(), walk.tree.path_of(parent))
        };
        if self.is_excluded(parent, bytes) {
            return Ok(None);
        }
        let stat = rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW);
        let stat = stat.map_err(io::Error::from).context(|| shown(self))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if self.is_over
            && let Some(there) = self.make_way(parent, bytes, kind, &attributes(&stat))?
        {
            self.descend(folder, bytes, there, pending);
            return Ok(None);
        }
        if kind != FileType::Directory && stat.st_nlink > 1 {
            let id = (stat.st_dev, stat.st_ino);
            if let Some(&node) = self.links.get(&id) {
                return self.tree.link(parent, bytes, 0, node).map(|()| None);
            }
        }
        if self.tree.len() > self.limits.entries {
            let most = self.limits.entries;
            let what = format!("{} has more than {most} entries", self.host.label);
            return Err(Error::new(ErrorKind::Limit, what));
        }
        self.watch.entries(1);
        let found = self.kind(fd, folder, name, &stat, kind).context(|| shown(self))?;
        let node = self.tree.add(parent, bytes, 0, &attributes(&stat), found.as_kind())?;
        if kind == FileType::Directory {
            self.descend(folder, bytes, node, pending);
        } else if stat.st_nlink > 1 {
            self.links.insert((stat.st_dev, stat.st_ino), node);
        }
        Ok(Some(node))
    }

    /// Lets what is in a folder be read later.
    fn descend(
        &mut self,
        folder: u32,
        name: &[u8],
        node: NodeId,
        pending: &mut Vec<(u32, NodeId)>,
    ) {
        let number = u32::try_from(self.host.folders.len()).unwrap_or(u32::MAX);
        self.host.folders.push(HostDir { parent: folder, name: Box::from(name) });
        pending.push((number, node));
    }

    /// Removes what is at a name where something else is to be; a folder stays as it is for a folder, whose
    /// entries are put into it, and is returned. So is the one that a link there leads to.
    fn make_way(
        &mut self,
        parent: NodeId,
        name: &[u8],
        kind: FileType,
        made: &Attributes,
    ) -> Result<Option<NodeId>> {
        let Some(there) = self.tree.lookup(parent, name) else { return Ok(None) };
        let is_folder = |tree: &Tree, node| tree.node(node).is_folder();
        if kind == FileType::Directory && self.tree.node(there).is_symlink() {
            let leads = follow(self.tree, parent, name, Missing::Make(made))?;
            let leads = leads.filter(|&node| is_folder(self.tree, node));
            return leads.map(Some).ok_or_else(|| {
                let path = self.tree.path_of(there);
                let what = format!("{path} leads to no folder in the image, and is one in");
                Error::new(ErrorKind::Refused, format!("{what} {}", self.host.label))
            });
        }
        if kind == FileType::Directory && is_folder(self.tree, there) {
            return Ok(Some(there));
        }
        let path = self.tree.path_of(there);
        if is_folder(self.tree, there) {
            let what = format!("{path} is a folder in the image, and none in {}", self.host.label);
            return Err(Error::new(ErrorKind::Refused, what));
        }
        // Which of the two came first is the host's whim.
        if there.0 >= self.first {
            let what = format!("{path} is there twice in {}, by a link", self.host.label);
            return Err(Error::new(ErrorKind::Refused, what));
        }
        self.tree.remove(parent, name);
        Ok(None)
    }

    fn is_excluded(&self, parent: NodeId, name: &[u8]) -> bool {
        let Some(exclude) = self.exclude else { return false };
        let mut path = self.tree.path_bytes(parent);
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        exclude(&path)
    }

    fn kind(
        &mut self,
        fd: &OwnedFd,
        folder: u32,
        name: &CStr,
        stat: &Stat,
        kind: FileType,
    ) -> io::Result<OwnedKind> {
        let device = || {
            let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
            (major, minor)
        };
        Ok(match kind {
            FileType::Directory => OwnedKind::Plain(Kind::Folder),
            FileType::RegularFile => {
                let bytes = u64::try_from(stat.st_size).map_err(io::Error::other)?;
                let allocated = u64::try_from(stat.st_blocks).map_err(io::Error::other)? * 512;
                // Some file systems keep short files in the inode and count no blocks for them.
                let data = if allocated < bytes && bytes >= BLOCK {
                    Some(data_of(&self.open(fd, name)?, bytes)?)
                } else {
                    None
                };
                let content = if bytes == 0 {
                    FileId::empty()
                } else {
                    let key = self.host.files.len() as u64;
                    let name = name.to_bytes();
                    let name_at = u32::try_from(self.host.names.len()).map_err(io::Error::other)?;
                    let name_len = u8::try_from(name.len()).map_err(io::Error::other)?;
                    self.host.names.extend_from_slice(name);
                    self.host.files.push(HostFile { folder, name_at, name_len });
                    FileId::new(self.source, key)
                };
                OwnedKind::Plain(Kind::File { bytes, content, data })
            }
            FileType::Symlink => OwnedKind::Symlink(rustix::fs::readlinkat(fd, name, Vec::new())?),
            FileType::CharacterDevice => {
                let (major, minor) = device();
                OwnedKind::Plain(Kind::CharDevice { major, minor })
            }
            FileType::BlockDevice => {
                let (major, minor) = device();
                OwnedKind::Plain(Kind::BlockDevice { major, minor })
            }
            FileType::Fifo => OwnedKind::Plain(Kind::Fifo),
            FileType::Socket => OwnedKind::Plain(Kind::Socket),
            FileType::Unknown => return Err(io::Error::other("a file of no known kind")),
        })
    }

    fn open(&self, fd: &OwnedFd, name: &CStr) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(fd.as_fd(), name, flags, Mode::empty())?.into())
    }
}

/// Whether a symlink stands for what it leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Follow {
    Yes,
    No,
}

/// The extended attributes of a file of the host; of a symlink its own.
pub fn xattrs(path: &Path) -> Result<Vec<Xattr>> {
    let found = xattrs_of(path.as_os_str(), Follow::No, &mut vec![0; XATTR_BYTES_MAX]);
    found.context(|| format!("cannot read attributes of {}", path.display()))
}

/// The attributes of what a path leads to.
pub(crate) fn xattrs_behind(path: &OsStr) -> io::Result<Vec<Xattr>> {
    xattrs_of(path, Follow::Yes, &mut vec![0; XATTR_BYTES_MAX])
}

/// The attributes of what lies at a path.
fn xattrs_of(path: &OsStr, follow: Follow, value: &mut [u8]) -> io::Result<Vec<Xattr>> {
    let path = CString::new(path.as_bytes())?;
    let listed = match follow {
        Follow::Yes => rustix::fs::listxattr(&path, &mut *value),
        Follow::No => rustix::fs::llistxattr(&path, &mut *value),
    };
    let listed = match listed {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Ok(listed) => listed,
        Err(error) => return Err(error.into()),
    };
    let names = value[..listed].to_vec();
    let mut xattrs = Vec::new();
    for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let c_name = CString::new(name)?;
        let read = match follow {
            Follow::Yes => rustix::fs::getxattr(&path, &c_name, &mut *value),
            Follow::No => rustix::fs::lgetxattr(&path, &c_name, &mut *value),
        };
        match read {
            Ok(len) => xattrs.push(Xattr { name: name.to_vec(), value: value[..len].to_vec() }),
            // Removed meanwhile, or a name that is listed to everybody and shown to few.
            Err(Errno::NODATA | Errno::PERM | Errno::ACCESS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(xattrs)
}

/// A kind with a target of its own.
enum OwnedKind {
    Plain(Kind<'static>),
    Symlink(CString),
}

impl OwnedKind {
    fn as_kind(&self) -> Kind<'_> {
        match self {
            OwnedKind::Plain(kind) => kind.clone(),
            OwnedKind::Symlink(target) => Kind::Symlink(target.to_bytes()),
        }
    }
}

/// The blocks of a file that hold data, by its holes.
pub(crate) fn data_of(file: &File, bytes: u64) -> io::Result<Vec<Range<u64>>> {
    let mut data: Vec<Range<u64>> = Vec::new();
    for extent in data_extents(file, 0..bytes) {
        let extent = extent?;
        let blocks = extent.start / BLOCK..extent.end.div_ceil(BLOCK);
        match data.last_mut() {
            Some(last) if blocks.start <= last.end => last.end = last.end.max(blocks.end),
            _ => data.push(blocks),
        }
    }
    Ok(data)
}

pub(crate) fn attributes(stat: &Stat) -> Attributes {
    let nanoseconds = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    Attributes {
        mode: u16::try_from(stat.st_mode & 0o7777).unwrap_or(0),
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: Time { seconds: stat.st_mtime, nanoseconds },
    }
}
