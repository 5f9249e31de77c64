//! Reads ext2, ext3 and ext4 images, whoever made them, without changing a byte.
//!
//! A journal that was not replayed is replayed in memory: what its committed transactions wrote is
//! read in place of what is on disk. Checksums of superblock, descriptors, inodes, extents, folders,
//! bitmaps and attributes are checked where the image has them; structures from an image are
//! bounded before they are believed.

pub(crate) mod folder;
pub(crate) mod inode;
pub(crate) mod journal;
pub(crate) mod map;
pub(crate) mod xattr;

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;

use zerocopy::FromBytes;

use crate::crc32c::{START, crc32c};
use crate::disk::superblock::{
    DESCRIPTOR_BYTES, DESCRIPTOR_BYTES_OLD, Descriptor, MAGIC, SUPERBLOCK_OFFSET, Superblock,
    compat, incompat, join, ro_compat,
};
use crate::disk::{INODE_JOURNAL, INODE_ROOT, has_superblock};
use crate::error::{Context, Error, ErrorKind, Result, corrupt};

pub use crate::tree::content::ReadAt;
pub use folder::FolderEntry;
pub use inode::{FileKind, Inode};
pub use map::Run;

/// Symlinks followed in one path, as the kernel counts them.
const SYMLINKS_MAX: u32 = 40;

const KNOWN: u32 = incompat::FILETYPE
    | incompat::RECOVER
    | incompat::META_BG
    | incompat::EXTENTS
    | incompat::BITS_64
    | 0x100 // Multiple mount protection: a block that is only written.
    | incompat::FLEX_BG
    | incompat::EA_INODE
    | incompat::CSUM_SEED
    | incompat::LARGE_DIR
    | incompat::INLINE_DATA
    | 0x1_0000 // Encryption: names and contents are, what is not can be read.
    | incompat::CASEFOLD;

/// An open image.
pub struct Ext4 {
    input: Arc<dyn ReadAt>,
    /// The same, if the kernel can copy from it.
    file: Option<Arc<File>>,
    size_bytes: u64,
    pub(crate) superblock: Superblock,
    pub(crate) block_bytes: u64,
    pub(crate) blocks: u64,
    pub(crate) descriptors: Vec<Descriptor>,
    pub(crate) seed: u32,
    /// Blocks that the journal has newer: where there, and whether the first word was taken out.
    replayed: HashMap<u64, journal::Copy>,
}

impl fmt::Debug for Ext4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ext4")
            .field("size_bytes", &self.size_bytes)
            .field("block_bytes", &self.block_bytes)
            .field("blocks", &self.blocks)
            .field("replayed", &self.replayed.len())
            .finish_non_exhaustive()
    }
}

impl Ext4 {
    /// Opens an image in a file or on a block device.
    pub fn open_file(file: File) -> Result<Ext4> {
        let size = dormouse_sys::file_size::file_size(&file);
        let size = size.context(|| "cannot look at the image".to_owned())?;
        let bytes = size.bytes.ok_or_else(|| {
            let what = format!("{}; expected a file or a disk", size.kind.describe());
            Error::new(ErrorKind::InvalidInput, what)
        })?;
        let file = Arc::new(file);
        let input: Arc<dyn ReadAt> = Arc::<File>::clone(&file);
        let mut image = Ext4::open(input, bytes)?;
        image.file = Some(file);
        Ok(image)
    }

    /// Opens an image of so many bytes.
    pub fn open(input: Arc<dyn ReadAt>, size_bytes: u64) -> Result<Ext4> {
        let mut image = Ext4::begin(input, size_bytes)?;
        if image.superblock.incompat.get() & incompat::RECOVER != 0 {
            let inode = image.superblock.journal_inode.get();
            if image.superblock.compat.get() & compat::HAS_JOURNAL == 0 || inode == 0 {
                let what = "a journal to replay that lies on another device";
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            let replayed = journal::replay(&image, inode)?;
            image.replayed = replayed;
            // Superblock and descriptors may be newer there, too.
            image.read_again()?;
        }
        Ok(image)
    }

    fn begin(input: Arc<dyn ReadAt>, size_bytes: u64) -> Result<Ext4> {
        let mut bytes = [0; 1024];
        if size_bytes < SUPERBLOCK_OFFSET + 1024 {
            return Err(not_ext4());
        }
        input
            .read_exact_at(&mut bytes, SUPERBLOCK_OFFSET)
            .context(|| "cannot read the superblock".to_owned())?;
        let superblock = Superblock::read_from_bytes(&bytes).map_err(|_| not_ext4())?;
        let mut image = Ext4 {
            input,
            file: None,
            size_bytes,
            block_bytes: 0,
            blocks: 0,
            descriptors: Vec::new(),
            seed: START,
            replayed: HashMap::new(),
            superblock,
        };
        image.check_superblock()?;
        image.read_descriptors()?;
        Ok(image)
    }

    fn read_again(&mut self) -> Result<()> {
        let (block, at) = match self.block_bytes {
            1024 => (1, 0),
            _ => (0, 1024),
        };
        let bytes = self.block(block)?;
        let bytes = &bytes[at..at + 1024];
        self.superblock = Superblock::read_from_bytes(bytes).map_err(|_| not_ext4())?;
        self.check_superblock()?;
        self.read_descriptors()
    }

    fn check_superblock(&mut self) -> Result<()> {
        let sb = &self.superblock;
        if sb.magic.get() != MAGIC {
            return Err(not_ext4());
        }
        let features = sb.incompat.get();
        if features & incompat::JOURNAL_DEV != 0 {
            return Err(Error::new(ErrorKind::Unsupported, "a journal, not a file system"));
        }
        if features & !KNOWN != 0 {
            let what = format!("ext4 with unknown features {:#x}", features & !KNOWN);
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        if sb.ro_compat.get() & ro_compat::METADATA_CSUM != 0 {
            let (got, expected) = (sb.checksum.get(), sb.sum());
            if got != expected {
                let what =
                    format!("the superblock's sum is {got:#010x}, expected {expected:#010x}");
                return Err(corrupt(what));
            }
        }
        let log = sb.log_block.get();
        if log > 6 {
            return Err(corrupt(format!("blocks of 2^{log} KiB")));
        }
        self.block_bytes = 1024 << log;
        let high = if features & incompat::BITS_64 != 0 { sb.blocks_high } else { 0.into() };
        self.blocks = join(sb.blocks_low, high);
        let first = u64::from(sb.first_data_block.get());
        let per_group = u64::from(sb.blocks_per_group.get());
        let inodes_per_group = u64::from(sb.inodes_per_group.get());
        let bits = 8 * self.block_bytes;
        let inode_bytes = self.inode_bytes();
        let sane = self.blocks > first
            && (1..=bits * 16).contains(&per_group)
            && (1..=bits).contains(&inodes_per_group)
            && inode_bytes.is_power_of_two()
            && (128..=self.block_bytes).contains(&inode_bytes)
            && first <= 1;
        if !sane {
            return Err(corrupt("the superblock's numbers make no sense"));
        }
        if self.blocks.checked_mul(self.block_bytes).is_none_or(|bytes| bytes > self.size_bytes) {
            let what = format!(
                "the file system has {} blocks of {} bytes, and the image only {} bytes",
                self.blocks, self.block_bytes, self.size_bytes
            );
            return Err(corrupt(what));
        }
        self.seed = if features & incompat::CSUM_SEED != 0 {
            sb.checksum_seed.get()
        } else {
            crc32c(START, &sb.uuid)
        };
        Ok(())
    }

    fn read_descriptors(&mut self) -> Result<()> {
        let len = self.descriptor_bytes()?;
        let per_block = self.block_bytes / len as u64;
        let groups = self.groups();
        if groups > u64::from(u32::MAX) {
            return Err(corrupt(format!("{groups} groups")));
        }
        let mut descriptors = Vec::new();
        for index in 0..groups.div_ceil(per_block) {
            let block = self.block(self.descriptor_block(index, per_block))?;
            let left = groups - index * per_block;
            let count = usize::try_from(left.min(per_block)).unwrap_or(usize::MAX);
            for bytes in block.chunks_exact(len).take(count) {
                let mut whole = [0; DESCRIPTOR_BYTES];
                let known = len.min(DESCRIPTOR_BYTES);
                whole[..known].copy_from_slice(&bytes[..known]);
                let descriptor = Descriptor::read_from_bytes(&whole)
                    .map_err(|_| corrupt("a descriptor of no length"))?;
                let group = u32::try_from(descriptors.len()).unwrap_or(u32::MAX);
                if self.has_sums() {
                    let (got, expected) =
                        (descriptor.checksum.get(), descriptor.sum(self.seed, group, known));
                    if got != expected {
                        let what =
                            format!("group {group}'s descriptor has a wrong sum: {got:#06x}");
                        return Err(corrupt(format!("{what}, expected {expected:#06x}")));
                    }
                }
                descriptors.push(descriptor);
            }
        }
        self.descriptors = descriptors;
        Ok(())
    }

    fn descriptor_bytes(&self) -> Result<usize> {
        if self.superblock.incompat.get() & incompat::BITS_64 == 0 {
            return Ok(DESCRIPTOR_BYTES_OLD);
        }
        let len = usize::from(self.superblock.descriptor_bytes.get());
        if !len.is_power_of_two() || !(DESCRIPTOR_BYTES..=1024).contains(&len) {
            return Err(corrupt(format!("descriptors of {len} bytes")));
        }
        Ok(len)
    }

    /// Where a block of descriptors lies.
    fn descriptor_block(&self, index: u64, per_block: u64) -> u64 {
        let first = u64::from(self.superblock.first_data_block.get());
        let is_meta = self.superblock.incompat.get() & incompat::META_BG != 0
            && index >= u64::from(self.superblock.first_meta_group.get());
        if !is_meta {
            return first + 1 + index;
        }
        let group = index * per_block;
        self.group_first(group) + u64::from(self.group_has_superblock(group))
    }

    pub(crate) fn group_has_superblock(&self, group: u64) -> bool {
        if self.superblock.compat.get() & 0x200 != 0 {
            let copies = self.superblock.sparse_super2_groups;
            return group == 0 || copies.iter().any(|copy| u64::from(copy.get()) == group);
        }
        let is_sparse = self.superblock.ro_compat.get() & ro_compat::SPARSE_SUPER != 0;
        !is_sparse || has_superblock(group)
    }

    pub(crate) fn group_first(&self, group: u64) -> u64 {
        u64::from(self.superblock.first_data_block.get())
            + group * u64::from(self.superblock.blocks_per_group.get())
    }

    pub(crate) fn groups(&self) -> u64 {
        let first = u64::from(self.superblock.first_data_block.get());
        (self.blocks - first).div_ceil(u64::from(self.superblock.blocks_per_group.get()))
    }

    pub(crate) fn has_sums(&self) -> bool {
        self.superblock.ro_compat.get() & ro_compat::METADATA_CSUM != 0
    }

    /// The size of an inode: one of 128 bytes has whole seconds only.
    pub fn inode_bytes(&self) -> u64 {
        match self.superblock.revision.get() {
            0 => 128,
            _ => u64::from(self.superblock.inode_size.get()),
        }
    }

    /// The length of the file system in bytes, which may be less than the image's.
    pub fn used_bytes(&self) -> u64 {
        self.blocks * self.block_bytes
    }

    /// The size of a block.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// The file system's UUID.
    pub fn uuid(&self) -> [u8; 16] {
        self.superblock.uuid
    }

    /// The file system's label.
    pub fn label(&self) -> String {
        let label = self.superblock.label;
        let end = label.iter().position(|&byte| byte == 0).unwrap_or(label.len());
        String::from_utf8_lossy(&label[..end]).into_owned()
    }

    /// Whether the journal had to be replayed.
    pub fn was_replayed(&self) -> bool {
        !self.replayed.is_empty()
    }

    /// A block as it is after the journal was replayed.
    pub(crate) fn block(&self, number: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.block_bytes).unwrap_or(0)];
        self.read_block(number, &mut bytes, 0)?;
        Ok(bytes)
    }

    /// Fills `buf` with bytes of a block from `at` on.
    pub(crate) fn read_block(&self, number: u64, buf: &mut [u8], at: u64) -> Result<()> {
        if number >= self.blocks {
            return Err(corrupt(format!("a reference to block {number} of {}", self.blocks)));
        }
        let copy = self.replayed.get(&number);
        let source = copy.map_or(number, |copy| copy.block);
        let what = || format!("cannot read block {source}");
        self.input.read_exact_at(buf, source * self.block_bytes + at).context(what)?;
        if copy.is_some_and(|copy| copy.is_escaped) && at < 4 {
            let from = usize::try_from(at).unwrap_or(0);
            let magic = crate::disk::journal::JOURNAL_MAGIC.to_be_bytes();
            let count = (4 - from).min(buf.len());
            buf[..count].copy_from_slice(&magic[from..from + count]);
        }
        Ok(())
    }

    /// Whether blocks are the same on disk as after the replay.
    pub(crate) fn is_on_disk(&self) -> bool {
        self.replayed.is_empty()
    }

    pub(crate) fn file(&self) -> Option<&Arc<File>> {
        self.file.as_ref()
    }

    /// The root folder.
    pub fn root(&self) -> Result<Inode> {
        let root = self.inode(INODE_ROOT)?;
        if root.kind != FileKind::Folder {
            return Err(corrupt("the root is no folder"));
        }
        Ok(root)
    }

    /// What lies at a path. Symlinks on the way are followed, within the image; one at the end only
    /// where a slash follows it.
    pub fn lookup(&self, path: &[u8]) -> Result<Inode> {
        let not_found = || {
            Error::new(ErrorKind::NotFound, format!("{} is not in the image", path.escape_ascii()))
        };
        let ends_in_folder = path.ends_with(b"/");
        let mut stack = vec![self.root()?];
        let mut rest: Vec<Vec<u8>> = components(path);
        rest.reverse();
        let mut symlinks = 0;
        while let Some(part) = rest.pop() {
            if part == b".." {
                if stack.len() > 1 {
                    stack.pop();
                }
                continue;
            }
            let Some(folder) = stack.last().filter(|inode| inode.kind == FileKind::Folder) else {
                return Err(not_found());
            };
            let found = self.find(folder, &part)?.ok_or_else(not_found)?;
            let inode = self.inode(found)?;
            // The last one is what was asked for.
            if inode.kind == FileKind::Symlink && (ends_in_folder || !rest.is_empty()) {
                symlinks += 1;
                if symlinks > SYMLINKS_MAX {
                    let what = format!("{}: too many symlinks", path.escape_ascii());
                    return Err(Error::new(ErrorKind::InvalidInput, what));
                }
                let target = self.target(&inode)?;
                if target.starts_with(b"/") {
                    stack.truncate(1);
                }
                rest.extend(components(&target).into_iter().rev());
                continue;
            }
            stack.push(inode);
        }
        stack.pop().ok_or_else(not_found)
    }

    /// The journal's inode, for tests of its state.
    pub fn has_journal(&self) -> bool {
        self.superblock.compat.get() & compat::HAS_JOURNAL != 0
            && self.superblock.journal_inode.get() == INODE_JOURNAL
    }
}

fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(<[u8]>::to_vec)
        .collect()
}

fn not_ext4() -> Error {
    corrupt("not an ext4 image: no superblock")
}

/// The content of a file of an image.
pub(crate) struct FileContent {
    image: Arc<Ext4>,
    inode: Inode,
    runs: Vec<Run>,
}

impl FileContent {
    pub(crate) fn new(image: &Arc<Ext4>, inode: Inode) -> Result<FileContent> {
        let runs = image.runs(&inode)?;
        Ok(FileContent { image: Arc::clone(image), inode, runs })
    }
}

impl ReadAt for FileContent {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        Ok(self.image.read_with(&self.inode, &self.runs, buf, offset)?)
    }
}
