//! Inodes of an image.

use zerocopy::FromBytes;

use crate::disk::inode::{
    FIXED_BYTES, FLAG_EA_INODE, FLAG_ENCRYPTED, FLAG_INLINE, Inode as DiskInode, decode_time,
    inode_seed, inode_sum,
};
use crate::disk::superblock::{join, low_half};
use crate::disk::{self, FAST_SYMLINK_BYTES, SYMLINK_BYTES_MAX, decode_device};
use crate::error::{Error, ErrorKind, Result, corrupt};
use crate::read::Ext4;
use crate::tree::{Attributes, Time};

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symlink.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl FileKind {
    pub(crate) fn of_mode(mode: u16) -> Option<FileKind> {
        Some(match mode & disk::TYPE_MASK {
            disk::TYPE_FILE => FileKind::File,
            disk::TYPE_FOLDER => FileKind::Folder,
            disk::TYPE_SYMLINK => FileKind::Symlink,
            disk::TYPE_CHAR => FileKind::CharDevice,
            disk::TYPE_BLOCK => FileKind::BlockDevice,
            disk::TYPE_FIFO => FileKind::Fifo,
            disk::TYPE_SOCKET => FileKind::Socket,
            _ => return None,
        })
    }

    /// The letter of `ls -l`.
    pub fn letter(self) -> char {
        match self {
            FileKind::File => '-',
            FileKind::Folder => 'd',
            FileKind::Symlink => 'l',
            FileKind::CharDevice => 'c',
            FileKind::BlockDevice => 'b',
            FileKind::Fifo => 'p',
            FileKind::Socket => 's',
        }
    }
}

/// An inode.
#[derive(Clone, Debug)]
pub struct Inode {
    /// Its number.
    pub number: u32,

    /// What it is.
    pub kind: FileKind,

    /// Mode, owner and time.
    pub attributes: Attributes,

    /// How many names it has.
    pub links: u16,

    /// Its length.
    pub bytes: u64,

    /// A device's major and minor number.
    pub device: (u32, u32),

    pub(crate) flags: u32,
    pub(crate) block: [u8; 60],
    pub(crate) xattr_block: u64,
    /// All bytes, with the attributes in them.
    pub(crate) whole: Vec<u8>,
    pub(crate) seed: u32,
    pub(crate) extra_bytes: usize,
}

impl Inode {
    pub(crate) fn is_inline(&self) -> bool {
        self.flags & FLAG_INLINE != 0
    }

    pub(crate) fn check_readable(&self) -> Result<()> {
        if self.flags & FLAG_ENCRYPTED != 0 {
            let what = format!("inode {} is encrypted", self.number);
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        Ok(())
    }
}

impl Ext4 {
    /// The inode of a number.
    pub fn inode(&self, number: u32) -> Result<Inode> {
        let per_group = self.superblock.inodes_per_group.get();
        let index = number.checked_sub(1).filter(|_| number <= self.superblock.inodes.get());
        let index = index.ok_or_else(|| corrupt(format!("a reference to inode {number}")))?;
        let group = usize::try_from(index / per_group).unwrap_or(usize::MAX);
        let descriptor = self.descriptors.get(group);
        let descriptor =
            descriptor.ok_or_else(|| corrupt(format!("inode {number} in no group")))?;
        let table = join(descriptor.inode_table_low, descriptor.inode_table_high);
        let at = u64::from(index % per_group) * self.inode_bytes();
        let mut whole = vec![0; usize::try_from(self.inode_bytes()).unwrap_or(0)];
        let block = table.checked_add(at / self.block_bytes);
        let block = block.ok_or_else(|| corrupt(format!("group {group}'s table is nowhere")))?;
        self.read_block(block, &mut whole, at % self.block_bytes)?;

        let mut fixed = [0; FIXED_BYTES];
        let known = whole.len().min(FIXED_BYTES);
        fixed[..known].copy_from_slice(&whole[..known]);
        let disk = DiskInode::read_from_bytes(&fixed)
            .map_err(|_| corrupt(format!("inode {number} of no length")))?;
        let seed = inode_seed(self.seed, number, disk.generation.get());
        // Images of the time before had inodes without room for more than the first 128 bytes.
        let extra_bytes = if whole.len() > 128 { usize::from(disk.extra_bytes.get()) } else { 0 };
        if extra_bytes > whole.len() - 128.min(whole.len()) {
            return Err(corrupt(format!("inode {number} has {extra_bytes} bytes too many")));
        }
        if self.has_sums() {
            let sum = inode_sum(seed, &whole);
            let mut wrong = low_half(sum) != disk.checksum_low.get();
            if extra_bytes >= 4 {
                wrong |= sum.to_le_bytes()[2..] != disk.checksum_high.get().to_le_bytes();
            }
            if wrong {
                return Err(corrupt(format!("inode {number} has a wrong sum")));
            }
        }
        let mode = disk.mode.get();
        let flags = disk.flags.get();
        let Some(kind) = FileKind::of_mode(mode) else {
            return Err(corrupt(format!("inode {number} is of no kind: mode {mode:#o}")));
        };
        if flags & FLAG_EA_INODE != 0 && kind != FileKind::File {
            return Err(corrupt(format!("inode {number} holds a value and is no file")));
        }
        let word = |at: usize| {
            u32::from_le_bytes([
                disk.block[at],
                disk.block[at + 1],
                disk.block[at + 2],
                disk.block[at + 3],
            ])
        };
        let (seconds, nanoseconds) = if extra_bytes >= 12 {
            decode_time(disk.mtime.get(), disk.mtime_extra.get())
        } else {
            decode_time(disk.mtime.get(), 0)
        };
        let id = |low: u16, high: u16| u32::from(high) << 16 | u32::from(low);
        let attributes = Attributes {
            mode: mode & 0o7777,
            uid: id(disk.uid_low.get(), disk.uid_high.get()),
            gid: id(disk.gid_low.get(), disk.gid_high.get()),
            mtime: Time { seconds, nanoseconds: nanoseconds.min(999_999_999) },
        };
        Ok(Inode {
            number,
            kind,
            attributes,
            links: disk.links.get(),
            bytes: join(disk.size_low, disk.size_high),
            device: decode_device([word(0), word(4)]),
            flags,
            block: disk.block,
            xattr_block: u64::from(disk.xattr_block_high.get()) << 32
                | u64::from(disk.xattr_block_low.get()),
            whole,
            seed,
            extra_bytes,
        })
    }

    /// The target of a symlink.
    pub fn target(&self, inode: &Inode) -> Result<Vec<u8>> {
        inode.check_readable()?;
        let len = usize::try_from(inode.bytes).unwrap_or(usize::MAX);
        if len > SYMLINK_BYTES_MAX + 1 {
            return Err(corrupt(format!("inode {} is a symlink to {len} bytes", inode.number)));
        }
        if len < FAST_SYMLINK_BYTES && !inode.is_inline() {
            return Ok(inode.block[..len].to_vec());
        }
        let mut target = vec![0; len];
        self.read(inode, &mut target, 0)?;
        Ok(target)
    }
}
