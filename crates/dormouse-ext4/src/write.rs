//! Turns a tree and its layout into the blocks of an image.

pub(crate) mod blocks;
pub(crate) mod buffer;
pub(crate) mod content_file;
pub(crate) mod data;
pub(crate) mod extent;
pub(crate) mod folder;
pub(crate) mod group;
pub(crate) mod inode;
pub(crate) mod lazy;
pub(crate) mod xattr;

use std::fs::File;

use sha2::{Digest, Sha256};
use zerocopy::{FromZeros, IntoBytes};

use crate::disk::inode::{INODE_BYTES, inode_seed};
use crate::disk::journal::{BlockHeader, JOURNAL_MAGIC, JournalSuperblock, KIND_SUPERBLOCK};
use crate::disk::superblock::low_word;
use crate::disk::{BLOCK_BYTES, INODE_BAD, INODE_JOURNAL, INODE_RESIZE};
use crate::error::{Context, Error, Result};
use crate::layout::folder::FolderPlan;
use crate::layout::{Layout, Uuid, is_slow};
use crate::tree::{ROOT, Tree};
use crate::write::blocks::Blocks;
use crate::write::group::{Identity, checksum_seed, inode_place, reserved_blocks};
use crate::write::xattr::XattrPlan;

pub use lazy::{LazyImage, Run};

/// Is told what is done, and says whether to go on.
pub trait Watch: Sync {
    /// So many more files were taken up.
    fn entries(&self, count: u64) {
        let _ = count;
    }

    /// So many more bytes of contents were moved.
    fn bytes(&self, count: u64) {
        let _ = count;
    }

    /// Whether to stop with [`crate::error::ErrorKind::Cancelled`].
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Nobody watches.
#[derive(Clone, Copy, Debug)]
pub struct Unwatched;

impl Watch for Unwatched {}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The image's length.
    pub size_bytes: u64,

    /// Inodes of the tree.
    pub entries: u64,

    /// Bytes of contents that were read and written.
    pub copied_bytes: u64,

    /// Bytes of contents that the file system shares with their source.
    pub shared_bytes: u64,

    /// Bytes of everything else.
    pub metadata_bytes: u64,

    /// What the image is known by.
    pub uuid: [u8; 16],
}

/// Writes a whole image into an empty file; contents that were staged are in it already.
///
/// The file is not synced. After an error it holds nothing of use.
pub fn write(tree: &Tree, layout: &Layout, image: &File, watch: &dyn Watch) -> Result<Report> {
    image.set_len(layout.size_bytes()).context(|| "cannot give the image its length".to_owned())?;
    let (report, copied) = std::thread::scope(|scope| {
        let copying = scope.spawn(|| data::copy(tree, layout, image, watch));
        let report = metadata(tree, layout, image, watch);
        let copied = copying.join().unwrap_or_else(|_| {
            Err(Error::new(crate::error::ErrorKind::Io, "the thread that copies contents panicked"))
        });
        (report, copied)
    });
    let (mut report, copied) = (report?, copied?);
    report.copied_bytes = copied.read_bytes;
    report.shared_bytes = copied.shared_bytes;
    Ok(report)
}

/// Writes everything but the contents of files.
pub(crate) fn metadata(
    tree: &Tree,
    layout: &Layout,
    image: &File,
    watch: &dyn Watch,
) -> Result<Report> {
    let seed = checksum_seed();
    let mut out = Blocks::new(image);
    let mut identity = Sha256::new();
    identity.update(layout.size_bytes().to_le_bytes());
    identity.update(layout.options.label.as_bytes());
    let journal_blocks = own_inodes(&mut out, layout, seed)?;
    let mut folders = vec![0; layout.geometry.tables.len()];
    let mut table = Table::new(layout)?;
    for &node in &layout.order {
        if watch.is_cancelled() {
            return Err(Error::cancelled());
        }
        let inode = &tree.node(node);
        let number = layout.number(node);
        let own_seed = inode_seed(seed, number, 0);
        let mut subfolders = 0;
        if inode.is_folder() {
            subfolders =
                tree.entries(node).filter(|entry| tree.node(entry.node).is_folder()).count();
            folders[inode_place(layout, number).0] += 1;
            let plan = FolderPlan::of(tree, node)?;
            let bytes = folder::folder(tree, layout, node, &plan, own_seed);
            identity.update(&bytes);
            put_content(&mut out, tree, layout, node, &bytes)?;
        } else if inode.is_symlink() && is_slow(tree, node) {
            let mut block = vec![0; BLOCK_BYTES];
            let target = tree.target(node);
            block[..target.len()].copy_from_slice(target);
            identity.update(&block);
            put_content(&mut out, tree, layout, node, &block)?;
        }
        if let Some(&block) = layout.xattr_blocks.get(&node) {
            let bytes = XattrPlan::of(tree.xattrs(node)).block(seed, block);
            identity.update(&bytes);
            out.put(block, &bytes)?;
        }
        let subfolders = u32::try_from(subfolders).unwrap_or(u32::MAX - 2);
        let written = inode::inode(tree, layout, node, subfolders, seed);
        for (block, bytes) in &written.blocks {
            out.put(*block, bytes)?;
        }
        identity.update(written.bytes);
        table.put(&mut out, number, &written.bytes)?;
        if !inode.is_file() {
            watch.entries(1);
        }
    }
    table.flush(&mut out)?;
    let uuid = match layout.options.uuid {
        Uuid::Given(uuid) => uuid,
        Uuid::Derived => derived(&identity.finalize()),
    };
    group::groups(&mut out, layout, &folders, &Identity { uuid, journal_blocks })?;
    out.flush()?;
    Ok(Report {
        size_bytes: layout.size_bytes(),
        entries: tree.len(),
        copied_bytes: 0,
        shared_bytes: 0,
        metadata_bytes: out.written(),
        uuid,
    })
}

/// A UUID of version 8, whose bits mean what who made them says (RFC 9562).
fn derived(hash: &[u8]) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&hash[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

fn put_content(
    out: &mut Blocks<'_>,
    tree: &Tree,
    layout: &Layout,
    node: crate::tree::NodeId,
    bytes: &[u8],
) -> Result<()> {
    for extent in layout.extents(tree, node) {
        let from = usize::try_from(extent.logical).unwrap_or(usize::MAX) * BLOCK_BYTES;
        let len = usize::from(extent.blocks) * BLOCK_BYTES;
        out.put(extent.start, &bytes[from..from + len])?;
    }
    Ok(())
}

/// Writes the inodes of the file system's own, and what they own. Returns what the superblock
/// repeats of the journal's.
fn own_inodes(out: &mut Blocks<'_>, layout: &Layout, seed: u32) -> Result<Option<[u32; 17]>> {
    // They are all in the first block of the first table, which the tree's inodes complete.
    let Some(journal) = inode::journal(layout, INODE_JOURNAL, seed) else { return Ok(None) };
    for (block, bytes) in &journal.blocks {
        out.put(*block, bytes)?;
    }
    let (start, blocks, _) = layout.journal.unwrap_or_default();
    let mut block = vec![0; BLOCK_BYTES];
    let superblock = journal_superblock(blocks);
    block[..1024].copy_from_slice(superblock.as_bytes());
    out.put(start, &block)?;
    let mut words = [0; 17];
    let word = |at: usize| {
        let bytes = &journal.bytes[at..at + 4];
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    };
    for (index, place) in words[..15].iter_mut().enumerate() {
        *place = word(0x28 + 4 * index);
    }
    words[15] = word(0x6c);
    words[16] = word(0x4);
    Ok(Some(words))
}

/// An empty journal: nothing but its first block is ever read of it.
fn journal_superblock(blocks: u64) -> JournalSuperblock {
    let mut superblock = JournalSuperblock::new_zeroed();
    superblock.header = BlockHeader {
        magic: JOURNAL_MAGIC.into(),
        kind: KIND_SUPERBLOCK.into(),
        sequence: 0.into(),
    };
    superblock.block_bytes = low_word(BLOCK_BYTES as u64).into();
    superblock.blocks = low_word(blocks).into();
    superblock.first = 1.into();
    superblock.sequence = 1.into();
    superblock.users = 1.into();
    superblock
}

/// The block of an inode table that is being filled.
struct Table<'a> {
    layout: &'a Layout,
    block: u64,
    bytes: Vec<u8>,
}

impl<'a> Table<'a> {
    /// Begins with the inodes of the file system's own.
    fn new(layout: &'a Layout) -> Result<Table<'a>> {
        let seed = checksum_seed();
        let (_, block, _) = inode_place(layout, INODE_BAD);
        let mut table = Table { layout, block, bytes: vec![0; BLOCK_BYTES] };
        let resize = inode::resize(layout, INODE_RESIZE, reserved_blocks(layout), seed);
        table.set(INODE_RESIZE, &resize);
        if let Some(journal) = inode::journal(layout, INODE_JOURNAL, seed) {
            table.set(INODE_JOURNAL, &journal.bytes);
        }
        Ok(table)
    }

    fn set(&mut self, number: u32, bytes: &[u8; INODE_BYTES]) {
        let (_, _, at) = inode_place(self.layout, number);
        self.bytes[at..at + INODE_BYTES].copy_from_slice(bytes);
    }

    fn put(&mut self, out: &mut Blocks<'_>, number: u32, bytes: &[u8; INODE_BYTES]) -> Result<()> {
        let (_, block, _) = inode_place(self.layout, number);
        if block != self.block {
            self.flush(out)?;
            self.block = block;
        }
        self.set(number, bytes);
        Ok(())
    }

    fn flush(&mut self, out: &mut Blocks<'_>) -> Result<()> {
        out.put(self.block, &self.bytes)?;
        self.bytes.fill(0);
        Ok(())
    }
}

const _: () = assert!(ROOT.0 == 0, "the order of inodes begins with the root");
