//! Contents of files on their way into the image: read in large pieces by several threads, or
//! shared with the source where the file system can.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::disk::{BLOCK, BLOCK_BYTES};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::layout::Layout;
use crate::tree::content::{FileId, ReadAt};
use crate::tree::{NodeId, Opened, Tree};
use crate::write::Watch;
use crate::write::buffer::Buffer;
use crate::write::content_file::{ContentFile, DIRECT_FROM_BYTES};

/// A buffer that a thread fills before it writes.
const BATCH_BYTES_MAX: usize = 1 << 20;

/// Batches that wait for a thread.
const BATCHES_MAX: usize = 4;

/// More threads than this only wait for each other's page cache, or for the disk.
const THREADS_MAX: usize = 4;

/// Shorter pieces are read, not shared: a share costs the file system an extent.
const SHARE_BYTES_MIN: u64 = 64 << 10;

/// `f_type` of file systems that share blocks between files: btrfs, XFS, bcachefs.
const SHARING_FILE_SYSTEMS: [u64; 3] = [0x9123_683e, 0x5846_5342, 0xca45_1a4e];

/// A piece of a file, and where it goes.
#[derive(Clone, Copy, Debug)]
struct Piece {
    node: NodeId,
    offset: u64,
    bytes: usize,
    block: u64,
}

/// How the contents came in.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Copied {
    pub(crate) read_bytes: u64,
    pub(crate) shared_bytes: u64,
}

/// Copies all contents that are not there yet.
pub(crate) fn copy(
    tree: &Tree,
    layout: &Layout,
    image: &File,
    watch: &dyn Watch,
) -> Result<Copied> {
    let sharing = sharing_device(image);
    // What is shared is not written.
    let target = if sharing.is_none() && layout.copied_bytes(tree) >= DIRECT_FROM_BYTES {
        ContentFile::direct(image)
    } else {
        ContentFile::cached(image)
    };
    let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    // While one waits for the disk another one reads.
    let threads = processors * if target.is_direct() { 2 } else { 1 };
    let threads = threads.min(THREADS_MAX);
    let work = Work {
        tree,
        image,
        target,
        watch,
        device: sharing,
        failed: AtomicBool::new(false),
        read: AtomicU64::new(0),
        shared: AtomicU64::new(0),
    };
    let (sender, receiver) = sync_channel::<Vec<Piece>>(BATCHES_MAX);
    let receiver = Mutex::new(receiver);
    let first_error = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| work.run(&receiver))).collect();
        let sent = send(tree, layout, sender, &work);
        let results = workers.into_iter().map(|worker| {
            worker.join().unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "a copier panicked")))
        });
        results.chain([sent]).find_map(Result::err)
    });
    match first_error {
        Some(error) => Err(error),
        None => Ok(Copied {
            read_bytes: work.read.into_inner(),
            shared_bytes: work.shared.into_inner(),
        }),
    }
}

/// Sends pieces that follow each other in the image in batches.
fn send(
    tree: &Tree,
    layout: &Layout,
    sender: SyncSender<Vec<Piece>>,
    work: &Work<'_>,
) -> Result<()> {
    let mut batch: Vec<Piece> = Vec::new();
    let (mut blocks, mut next) = (0, 0);
    for &node in &layout.order {
        let inode = &tree.node(node);
        if !inode.is_file() || matches!(inode.source, FileId::EMPTY | FileId::PLACED) {
            continue;
        }
        work.watch.entries(1);
        for extent in layout.extents(tree, node) {
            let begin = u64::from(extent.logical) * BLOCK;
            let end = (begin + u64::from(extent.blocks) * BLOCK).min(inode.size);
            let mut offset = begin;
            while offset < end {
                let block = extent.start + (offset - begin) / BLOCK;
                if block != next || blocks * BLOCK_BYTES >= BATCH_BYTES_MAX {
                    if work.is_over() {
                        return Ok(());
                    }
                    if !batch.is_empty() && sender.send(std::mem::take(&mut batch)).is_err() {
                        return Ok(());
                    }
                    blocks = 0;
                }
                let room = (BATCH_BYTES_MAX - blocks * BLOCK_BYTES) as u64;
                let bytes = if work.device.is_some() && end - offset >= SHARE_BYTES_MIN {
                    // Whole extents, of which the kernel takes what it can in one call.
                    end - offset
                } else {
                    (end - offset).min(room)
                };
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                batch.push(Piece { node, offset, bytes, block });
                blocks += bytes.div_ceil(BLOCK_BYTES);
                next = block + bytes.div_ceil(BLOCK_BYTES) as u64;
                offset += bytes as u64;
            }
        }
    }
    if !batch.is_empty() {
        // Nobody listens any more only if a worker failed, which says why.
        let _ = sender.send(batch);
    }
    Ok(())
}

struct Work<'a> {
    tree: &'a Tree,
    image: &'a File,
    target: ContentFile<&'a File>,
    watch: &'a dyn Watch,
    /// The image's file system, if it can share blocks.
    device: Option<u64>,
    failed: AtomicBool,
    read: AtomicU64,
    shared: AtomicU64,
}

impl Work<'_> {
    fn is_over(&self) -> bool {
        self.failed.load(Ordering::Relaxed) || self.watch.is_cancelled()
    }

    fn run(&self, receiver: &Mutex<Receiver<Vec<Piece>>>) -> Result<()> {
        // Made when there is something to put in it: a work disk of few files needs one.
        let mut buffer = None;
        loop {
            // The lock is held only while waiting for the next batch.
            let batch = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(batch) = batch else { return Ok(()) };
            if self.watch.is_cancelled() {
                return Err(Error::cancelled());
            }
            if self.failed.load(Ordering::Relaxed) {
                continue;
            }
            let buffer = buffer.get_or_insert_with(|| Buffer::new(BATCH_BYTES_MAX));
            if let Err(error) = self.batch(&batch, buffer) {
                self.failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
    }

    fn batch(&self, batch: &[Piece], buffer: &mut Buffer) -> Result<()> {
        buffer.clear();
        let mut first = batch.first().map_or(0, |piece| piece.block);
        let mut open: Option<(NodeId, Opened)> = None;
        for piece in batch {
            let opened = match &open {
                Some((node, opened)) if *node == piece.node => opened,
                _ => &open.insert((piece.node, open_content(self.tree, piece.node)?)).1,
            };
            let mut piece = *piece;
            let shared = self.share(opened, piece)?;
            if shared > 0 {
                self.write(buffer, first)?;
                piece.offset += shared as u64;
                piece.bytes -= shared;
                piece.block += (shared / BLOCK_BYTES) as u64;
                first = piece.block;
            }
            while piece.bytes > 0 {
                if buffer.room() == 0 {
                    let written = buffer.len() / BLOCK_BYTES;
                    self.write(buffer, first)?;
                    first += written as u64;
                }
                let bytes = piece.bytes.min(buffer.room());
                read(self.tree, opened, piece, buffer.grow(bytes))?;
                buffer.complete_block();
                piece.offset += bytes as u64;
                piece.bytes -= bytes;
                piece.block += (bytes / BLOCK_BYTES) as u64;
            }
        }
        self.write(buffer, first)
    }

    /// Shares the whole blocks of a piece with its file, as many as the kernel takes.
    fn share(&self, opened: &Opened, piece: Piece) -> Result<usize> {
        let (Some(device), Opened::File { file, offset }) = (self.device, opened) else {
            return Ok(0);
        };
        let wanted = piece.bytes / BLOCK_BYTES * BLOCK_BYTES;
        let mut from = offset + piece.offset;
        if (wanted as u64) < SHARE_BYTES_MIN || !from.is_multiple_of(BLOCK) {
            return Ok(0);
        }
        if file.metadata().is_ok_and(|metadata| metadata.dev() != device) {
            return Ok(0);
        }
        let mut to = piece.block * BLOCK;
        let mut done = 0;
        while done < wanted {
            let copied = rustix::fs::copy_file_range(
                &**file,
                Some(&mut from),
                self.image,
                Some(&mut to),
                wanted - done,
            );
            match copied {
                Ok(0) => break,
                Ok(copied) => done += copied,
                Err(rustix::io::Errno::INTR) => {}
                // What cannot be shared is read.
                Err(_) => break,
            }
        }
        let done = done / BLOCK_BYTES * BLOCK_BYTES;
        self.shared.fetch_add(done as u64, Ordering::Relaxed);
        self.watch.bytes(done as u64);
        Ok(done)
    }

    /// Writes a buffer's blocks from block `first` on, but not those that are zero, and empties it.
    fn write(&self, buffer: &mut Buffer, first: u64) -> Result<()> {
        if buffer.len() == 0 {
            return Ok(());
        }
        self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.watch.bytes(buffer.len() as u64);
        let written = self.target.write_nonzero(buffer.filled(), first * BLOCK);
        buffer.clear();
        written.context(|| format!("cannot write the image's block {first}"))
    }
}

/// Opens a file's content.
pub(crate) fn open_content(tree: &Tree, node: NodeId) -> Result<Opened> {
    let content = tree.node(node).content();
    let what = || format!("cannot read {}", tree.path_of(node));
    let source = tree.source(content.source).ok_or(io::ErrorKind::NotFound);
    source.map_err(io::Error::from).and_then(|source| source.open(content.key)).context(what)
}

fn read(tree: &Tree, opened: &Opened, piece: Piece, buffer: &mut [u8]) -> Result<()> {
    opened.read_exact_at(buffer, piece.offset).map_err(|error| {
        let path = tree.path_of(piece.node);
        if error.kind() == io::ErrorKind::UnexpectedEof {
            let what = format!("{path} became shorter while it was read");
            return Error::new(ErrorKind::Changed, what);
        }
        Error::io(format!("cannot read {path} at byte {}", piece.offset), error)
    })
}

fn sharing_device(image: &File) -> Option<u64> {
    let kind = rustix::fs::fstatfs(image).ok()?.f_type;
    let kind = u64::try_from(kind).ok()?;
    SHARING_FILE_SYSTEMS.contains(&kind).then(|| image.metadata().ok())?.map(|file| file.dev())
}
