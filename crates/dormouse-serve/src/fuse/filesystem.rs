//! The requests of the kernel, answered from the tree and from open files.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::OFlags;

use super::errno;
use super::handover::Ledger;
use super::inodes::{Inode, Inodes, Opening, ROOT, join, number_of};
use super::open_file::{OpenFile, Seek};
use super::read_ahead::ReadAheadPool;
use super::traffic::Counters;
use super::tree::{Access, Creation, Entry, Kind, Opened, Tree, TreeError, TreeErrorKind};

/// How long the kernel may rely on what stays as it is.
const FIXED: Duration = Duration::from_secs(24 * 3600);

/// What one write carries at most; the kernel sends no more than this by default anyway.
const WRITE_BYTES_MAX: u32 = 1 << 20;

/// Requests of the kernel's own (read-ahead, write-back) that may be under way.
const BACKGROUND_REQUESTS_MAX: u16 = 64;

/// How long requests of a successor wait for somebody who has a disk that a predecessor had open, such as
/// a command that stores it.
const REOPEN_TIMEOUT: Duration = Duration::from_secs(60);
const REOPEN_REST: Duration = Duration::from_millis(20);

/// Folders below this depth are not searched for an inode that a predecessor gave out.
const DEPTH_MAX: usize = 8;

const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;

thread_local! {
    /// What reads are answered from, grown to the largest read once.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A tree as a file system of the `fuser` crate.
pub(super) struct TreeFilesystem {
    tree: Arc<dyn Tree>,
    ledger: Arc<Ledger>,
    inodes: Inodes,
    pool: Arc<ReadAheadPool>,
    /// Listings of open folders.
    folders: Mutex<HashMap<u64, Arc<[Listed]>>>,
    next_folder: AtomicU64,
    counters: Arc<Counters>,
    begun: Instant,
    owner: (u32, u32),
}

#[derive(Debug)]
struct Listed {
    number: u64,
    kind: Kind,
    name: Box<str>,
}

impl TreeFilesystem {
    pub(super) fn new(
        tree: Arc<dyn Tree>,
        ledger: Arc<Ledger>,
        pool: Arc<ReadAheadPool>,
        counters: Arc<Counters>,
    ) -> TreeFilesystem {
        let owner = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let inodes = Inodes::default();
        for line in ledger.open_files() {
            if let Some(inode) = inodes.enter(line.inode, &line.path, 0) {
                let mut opening = inode.opening();
                opening.set_opens(line.opens);
                opening.set_slot(Some(line.slot));
            }
        }
        TreeFilesystem {
            tree,
            ledger,
            inodes,
            pool,
            folders: Mutex::default(),
            // Handles of a predecessor must not be taken for ours.
            next_folder: AtomicU64::new(u64::from(std::process::id()) << 32 | 1),
            counters,
            begun: Instant::now(),
            owner,
        }
    }

    /// The inode of a request.
    fn inode(&self, number: INodeNo) -> Result<Arc<Inode>, Errno> {
        if let Some(inode) = self.inodes.get(number.0) {
            return Ok(inode);
        }
        let path = if number.0 == ROOT {
            String::new()
        } else {
            // A predecessor told the kernel of it.
            self.find("", number.0, DEPTH_MAX).ok_or(Errno::ESTALE)?
        };
        self.inodes.enter(number.0, &path, 0).ok_or(Errno::EIO)
    }

    fn find(&self, folder: &str, number: u64, depth: usize) -> Option<String> {
        let mut folders = Vec::new();
        let mut found = None;
        let listed = self.tree.list(folder, &mut |item| {
            let path = join(folder, item.name);
            if number_of(&path, item.identity) == number {
                found = Some(path);
            } else if item.kind == Kind::Folder {
                folders.push(path);
            }
        });
        if let Err(error) = listed {
            tracing::debug!(folder, error = errno::causes(&error), "not searched");
        }
        if found.is_some() || depth == 0 {
            return found;
        }
        folders.iter().find_map(|folder| self.find(folder, number, depth - 1))
    }

    fn entry(&self, path: &str) -> Result<Entry, Errno> {
        self.tree.entry(path).map_err(|error| errno::of_tree(path, &error))
    }

    /// An entry found by its name, told to the kernel once more.
    fn look_up(&self, parent: INodeNo, name: &OsStr) -> Result<(Entry, FileAttr), Errno> {
        let path = join(&self.inode(parent)?.path, name.to_str().ok_or(Errno::ENOENT)?);
        let entry = self.entry(&path)?;
        let number = number_of(&path, entry.identity);
        let inode = self.inodes.enter(number, &path, 1).ok_or(Errno::EIO)?;
        Ok((entry, self.attributes(&inode, &entry)))
    }

    fn attributes(&self, inode: &Inode, entry: &Entry) -> FileAttr {
        let size = match entry.kind {
            Kind::Folder => 0,
            Kind::File => entry.size_bytes,
        };
        FileAttr {
            ino: INodeNo(inode.number),
            size,
            blocks: entry.allocated_bytes.div_ceil(512),
            atime: entry.modified,
            mtime: entry.modified,
            ctime: entry.modified,
            crtime: SystemTime::UNIX_EPOCH,
            kind: file_type(entry.kind),
            perm: entry.permissions,
            nlink: if entry.kind == Kind::Folder { 2 } else { 1 },
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// Attributes of an inode: those of its path, or of the file if that is open and its name gone.
    fn current(&self, inode: &Inode) -> Result<(Entry, FileAttr), Errno> {
        let entry = match self.tree.entry(&inode.path) {
            Ok(entry) => entry,
            Err(error) if error.kind() == TreeErrorKind::NotFound && inode.file().is_some() => {
                let size_bytes = inode.file().map_or(0, |file| file.size_bytes());
                Entry {
                    kind: Kind::File,
                    identity: 0,
                    size_bytes,
                    allocated_bytes: 0,
                    modified: SystemTime::UNIX_EPOCH,
                    permissions: 0o444,
                    is_fixed: false,
                }
            }
            Err(error) => return Err(errno::of_tree(&inode.path, &error)),
        };
        Ok((entry, self.attributes(inode, &entry)))
    }

    /// The open file of an inode; what a predecessor had open is opened again.
    fn file(&self, number: INodeNo) -> Result<Arc<OpenFile>, Errno> {
        let inode = self.inode(number)?;
        if let Some(file) = inode.file() {
            return Ok(file);
        }
        let mut opening = inode.opening();
        if let Some(file) = opening.file() {
            return Ok(Arc::clone(file));
        }
        loop {
            match self.open_again(&inode, &mut opening) {
                // A command has it that found no server, and must not cost its guest a request.
                Err(Errno::EBUSY)
                    if opening.opens() > 0 && self.begun.elapsed() < REOPEN_TIMEOUT =>
                {
                    thread::sleep(REOPEN_REST);
                }
                opened => return opened,
            }
        }
    }

    fn open_again(&self, inode: &Inode, opening: &mut Opening<'_>) -> Result<Arc<OpenFile>, Errno> {
        // Whoever had it open for writing may go on to write; whoever had not does not ask to.
        let opened = self
            .tree
            .open(&inode.path, Access::Write)
            .or_else(|error| match error.kind() {
                TreeErrorKind::Busy => Err(error),
                _ => self.tree.open(&inode.path, Access::Read),
            })
            .map_err(|error| errno::of_tree(&inode.path, &error))?;
        let file = Arc::new(OpenFile::new(&inode.path, opened, &self.pool));
        // What nobody has open (a truncation by path) is closed when this request is over.
        if opening.opens() > 0 {
            opening.set_file(Arc::clone(&file));
        }
        Ok(file)
    }

    /// Opens again what a predecessor had open, before anybody asks: whoever does something to a live
    /// disk finds that this process has it. One that another process has just now keeps nobody from the
    /// others: its own requests wait for it.
    pub(super) fn reopen(&self) {
        for line in self.ledger.open_files() {
            let opened = self
                .inode(INodeNo(line.inode))
                .and_then(|inode| self.open_again(&inode, &mut inode.opening()).map(drop));
            if let Err(error) = opened {
                tracing::warn!(path = line.path, ?error, "is not open again yet");
            }
        }
    }

    /// Counts an open of an inode, opening it if nobody has it open.
    fn open_inode(
        &self,
        inode: &Inode,
        access: Access,
        open: impl FnOnce() -> Result<Opened, TreeError>,
    ) -> Result<FopenFlags, Errno> {
        let mut opening = inode.opening();
        let file = match opening.file() {
            Some(file) => Arc::clone(file),
            None => {
                let opened = open().map_err(|error| errno::of_tree(&inode.path, &error))?;
                Arc::new(OpenFile::new(&inode.path, opened, &self.pool))
            }
        };
        let opens = opening.opens() + 1;
        let slot = self.ledger.opened(opening.slot(), inode.number, &inode.path, opens)?;
        opening.set_slot(Some(slot));
        opening.set_opens(opens);
        let mut flags = file.flags(access);
        if opens == 1 && file.is_memory() {
            // Nobody knows who changed it while it was not open here.
            flags.remove(FopenFlags::FOPEN_KEEP_CACHE);
        }
        opening.set_file(file);
        Ok(flags)
    }

    fn close_inode(&self, inode: &Inode) {
        let mut opening = inode.opening();
        let opens = opening.opens().saturating_sub(1);
        opening.set_opens(opens);
        if let Some(slot) = opening.slot() {
            self.ledger.closed(slot, opens);
        }
        if opens > 0 {
            return;
        }
        opening.set_slot(None);
        // Dropped before the next open of it can begin.
        drop(opening.take_file());
    }

    fn list(&self, inode: &Inode) -> Result<Vec<Listed>, Errno> {
        let parent = match inode.path.rsplit_once('/') {
            Some((parent, _)) => {
                self.entry(parent).map(|entry| number_of(parent, entry.identity))?
            }
            None => ROOT,
        };
        let folder = |number, name: &str| Listed { number, kind: Kind::Folder, name: name.into() };
        let mut listed = vec![folder(inode.number, "."), folder(parent, "..")];
        self.tree
            .list(&inode.path, &mut |item| {
                let number = number_of(&join(&inode.path, item.name), item.identity);
                listed.push(Listed { number, kind: item.kind, name: item.name.into() });
            })
            .map_err(|error| errno::of_tree(&inode.path, &error))?;
        Ok(listed)
    }

    fn listing(&self, handle: FileHandle, number: INodeNo) -> Result<Arc<[Listed]>, Errno> {
        let folders = self.folders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listed) = folders.get(&handle.0) {
            return Ok(Arc::clone(listed));
        }
        drop(folders);
        // A predecessor opened it.
        let inode = self.inode(number)?;
        self.list(&inode).map(Arc::from)
    }
}

/// How long the kernel may rely on an entry and its attributes.
fn ttl(entry: &Entry) -> Duration {
    if entry.is_fixed { FIXED } else { Duration::ZERO }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Folder => FileType::Directory,
        Kind::File => FileType::RegularFile,
    }
}

fn access_of(flags: OpenFlags) -> Access {
    match flags.acc_mode() {
        OpenAccMode::O_RDONLY => Access::Read,
        OpenAccMode::O_WRONLY | OpenAccMode::O_RDWR => Access::Write,
    }
}

fn answer(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

/// Answers a request that may take long on a thread of its own, so that those that answer all others
/// are not kept. It lasts so much longer than starting a thread that none are kept for it. Where no
/// thread can be started the request is dropped, and its drop says that it failed.
fn aside<R: Send + 'static>(reply: R, work: impl FnOnce(R) + Send + 'static) {
    let started = thread::Builder::new().name("fuse-aside".to_owned()).spawn(move || work(reply));
    if let Err(error) = started {
        tracing::error!(%error, "cannot start a thread");
    }
}

impl Filesystem for TreeFilesystem {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wanted in
            [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_HAS_RESEND]
        {
            if let Err(missing) = config.add_capabilities(wanted) {
                tracing::debug!(?missing, "the kernel is too old for");
            }
        }
        // The values are within what the crate allows, or the nearest one is as good.
        let _ = config.set_max_write(WRITE_BYTES_MAX);
        let _ = config.set_max_background(BACKGROUND_REQUESTS_MAX);
        let _ = config.set_congestion_threshold(BACKGROUND_REQUESTS_MAX);
        self.ledger.negotiated(config.kernel_abi(), config.capabilities());
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.look_up(parent, name) {
            Ok((entry, attributes)) => reply.entry(&ttl(&entry), &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn forget(&self, _request: &Request, ino: INodeNo, nlookup: u64) {
        self.inodes.forget(ino.0, nlookup);
    }

    fn getattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        match self.inode(ino).and_then(|inode| self.current(&inode)) {
            Ok((entry, attributes)) => reply.attr(&ttl(&entry), &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = || {
            let inode = self.inode(ino)?;
            let (entry, _) = self.current(&inode)?;
            if entry.is_fixed {
                return Err(Errno::EROFS);
            }
            if uid.is_some_and(|uid| uid != self.owner.0)
                || gid.is_some_and(|gid| gid != self.owner.1)
                || entry.kind == Kind::Folder
                || mode.is_some_and(|mode| mode & 0o7777 != u32::from(entry.permissions))
                    && inode.file().is_none()
            {
                return Err(Errno::EPERM);
            }
            if let Some(size) = size {
                self.file(ino)?.set_size(size)?;
            }
            // Times are when it was really written to; setting them is let pass for `cp` and `touch`.
            self.current(&inode)
        };
        match set() {
            Ok((entry, attributes)) => reply.attr(&ttl(&entry), &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn mkdir(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let make = || {
            let path = join(&self.inode(parent)?.path, name.to_str().ok_or(Errno::EINVAL)?);
            self.tree.make_folder(&path).map_err(|error| errno::of_tree(&path, &error))?;
            self.look_up(parent, name)
        };
        match make() {
            Ok((entry, attributes)) => reply.entry(&ttl(&entry), &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(reply, self.remove(parent, name, Kind::File));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(reply, self.remove(parent, name, Kind::Folder));
    }

    fn open(&self, _request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let access = access_of(flags);
        let opened = self.inode(ino).and_then(|inode| {
            self.open_inode(&inode, access, || self.tree.open(&inode.path, access))
        });
        match opened {
            Ok(flags) => reply.opened(FileHandle(0), flags),
            Err(error) => reply.error(error),
        }
    }

    fn create(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let is_new = OFlags::from_bits_retain(flags.cast_unsigned()).contains(OFlags::EXCL);
        let creation = if is_new { Creation::Only } else { Creation::OrOpen };
        let make = || {
            let path = join(&self.inode(parent)?.path, name.to_str().ok_or(Errno::EINVAL)?);
            let opened = self.tree.create(&path, creation);
            let opened = opened.map_err(|error| errno::of_tree(&path, &error))?;
            let (entry, attributes) = self.look_up(parent, name)?;
            let inode = self.inode(attributes.ino)?;
            let flags = self.open_inode(&inode, Access::Write, || Ok(opened))?;
            Ok((entry, attributes, flags))
        };
        match make() {
            Ok((entry, attributes, flags)) => {
                reply.created(&ttl(&entry), &attributes, Generation(0), FileHandle(0), flags);
            }
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let file = match self.file(ino) {
            Ok(file) => file,
            Err(error) => return reply.error(error),
        };
        BUFFER.with_borrow_mut(|buffer| {
            let size = size as usize;
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            let begun = Instant::now();
            let result = file.read(&mut buffer[..size], offset);
            self.counters.read(&result, begun);
            match result {
                Ok(len) => reply.data(&buffer[..len]),
                Err(error) => reply.error(error),
            }
        });
    }

    fn write(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let file = match self.file(ino) {
            Ok(file) => file,
            Err(error) => return reply.error(error),
        };
        let counters = Arc::clone(&self.counters);
        let answer = move |result: Result<usize, Errno>, reply: ReplyWrite| {
            counters.written(&result);
            match result {
                Ok(len) => reply.written(u32::try_from(len).unwrap_or(u32::MAX)),
                Err(error) => reply.error(error),
            }
        };
        if file.write_will_wait() {
            let data = data.to_vec();
            aside(reply, move |reply| answer(file.write(&data, offset), reply));
        } else {
            answer(file.write(data, offset), reply);
        }
    }

    fn flush(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.flush_file(ino, reply);
    }

    fn fsync(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.flush_file(ino, reply);
    }

    fn release(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if let Some(inode) = self.inodes.get(ino.0) {
            self.close_inode(&inode);
            // It may have been forgotten while it was open.
            self.inodes.forget(ino.0, 0);
        }
        reply.ok();
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.inode(ino).and_then(|inode| self.list(&inode)) {
            Ok(listed) => {
                let handle = self.next_folder.fetch_add(1, Ordering::Relaxed);
                let mut folders = self.folders.lock().unwrap_or_else(PoisonError::into_inner);
                folders.insert(handle, listed.into());
                reply.opened(FileHandle(handle), FopenFlags::empty());
            }
            Err(error) => reply.error(error),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listed = match self.listing(handle, ino) {
            Ok(listed) => listed,
            Err(error) => return reply.error(error),
        };
        for (at, item) in (1..).zip(&*listed).skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            let kind = file_type(item.kind);
            if reply.add(INodeNo(item.number), at, kind, OsStr::new(&*item.name)) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.folders.lock().unwrap_or_else(PoisonError::into_inner).remove(&handle.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
    }

    fn fallocate(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let result = match offset.checked_add(length) {
            None => Err(Errno::EFBIG),
            Some(end) => match self.file(ino) {
                Ok(file) if file.is_patient() => {
                    return aside(reply, move |reply| {
                        answer(reply, file.fallocate(offset..end, mode));
                    });
                }
                file => file.and_then(|file| file.fallocate(offset..end, mode)),
            },
        };
        answer(reply, result);
    }

    fn lseek(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let seek = || {
            let wanted = match whence {
                SEEK_DATA => Seek::Data,
                SEEK_HOLE => Seek::Hole,
                _ => return Err(Errno::EINVAL),
            };
            let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
            let found = self.file(ino)?.seek(offset, wanted)?;
            i64::try_from(found).map_err(|_| Errno::EOVERFLOW)
        };
        match seek() {
            Ok(offset) => reply.offset(offset),
            Err(error) => reply.error(error),
        }
    }
}

impl TreeFilesystem {
    fn flush_file(&self, number: INodeNo, reply: ReplyEmpty) {
        match self.file(number) {
            Ok(file) if file.is_patient() => {
                aside(reply, move |reply| answer(reply, file.flush()));
            }
            file => answer(reply, file.and_then(|file| file.flush())),
        }
    }

    fn remove(&self, parent: INodeNo, name: &OsStr, kind: Kind) -> Result<(), Errno> {
        let path = join(&self.inode(parent)?.path, name.to_str().ok_or(Errno::ENOENT)?);
        self.tree.remove(&path, kind).map_err(|error| errno::of_tree(&path, &error))
    }
}
