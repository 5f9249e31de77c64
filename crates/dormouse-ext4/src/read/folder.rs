//! Entries of folders. An index is passed over: its blocks look like empty ones.

use crate::crc32c::crc32c;
use crate::disk::inode::FLAG_INDEX;
use crate::error::{Error, ErrorKind, Result, corrupt};
use crate::read::Ext4;
use crate::read::inode::{FileKind, Inode};

/// The longest folder that is read: more than any index holds.
const FOLDER_BYTES_MAX: u64 = 64 << 30;

/// An entry of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderEntry {
    /// The name.
    pub name: Vec<u8>,

    /// The inode's number.
    pub inode: u32,
}

impl Ext4 {
    /// Calls `visit` with the entries of a folder, without `.` and `..`; it says whether to go on.
    pub fn for_each_entry(
        &self,
        folder: &Inode,
        visit: &mut dyn FnMut(FolderEntry) -> Result<bool>,
    ) -> Result<()> {
        if folder.kind != FileKind::Folder {
            let what = format!("inode {} is no folder", folder.number);
            return Err(Error::new(ErrorKind::InvalidInput, what));
        }
        folder.check_readable()?;
        if folder.is_inline() {
            let content = self.inline(folder)?;
            // The parent's number comes first; the rest lies in the inode and after it.
            let (first, rest) = content.split_at(content.len().min(60));
            let begun = entries(folder, first.get(4..).unwrap_or_default(), 0, visit)?;
            if begun {
                entries(folder, rest, 0, visit)?;
            }
            return Ok(());
        }
        if folder.bytes > FOLDER_BYTES_MAX {
            return Err(corrupt(format!("inode {} is a folder of no end", folder.number)));
        }
        for run in self.runs(folder)? {
            for block in run.start..run.start + run.blocks {
                let bytes = self.block(block)?;
                let logical = run.logical + (block - run.start);
                self.check_folder_block(folder, logical, &bytes)?;
                if !entries(folder, &bytes, self.block_bytes, visit)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// All entries of a folder, without `.` and `..`.
    pub fn entries(&self, folder: &Inode) -> Result<Vec<FolderEntry>> {
        let mut found = Vec::new();
        self.for_each_entry(folder, &mut |entry| {
            found.push(entry);
            Ok(true)
        })?;
        Ok(found)
    }

    /// The inode's number of an entry.
    pub(crate) fn find(&self, folder: &Inode, name: &[u8]) -> Result<Option<u32>> {
        let mut found = None;
        self.for_each_entry(folder, &mut |entry| {
            if entry.name == name {
                found = Some(entry.inode);
            }
            Ok(found.is_none())
        })?;
        Ok(found)
    }

    fn check_folder_block(&self, folder: &Inode, logical: u64, bytes: &[u8]) -> Result<()> {
        if !self.has_sums() {
            return Ok(());
        }
        // Blocks of an index have their sums elsewhere, and nothing of them is used. They are the
        // first block, and those that are one empty entry from front to end.
        let len = usize::from(u16::from_le_bytes([bytes[4], bytes[5]]));
        let is_empty = bytes[..4] == [0; 4] && len == bytes.len();
        if folder.flags & FLAG_INDEX != 0 && (logical == 0 || is_empty) {
            return Ok(());
        }
        let (content, tail) = bytes.split_at(bytes.len() - 12);
        let sum = crc32c(folder.seed, content).to_le_bytes();
        if tail[..8] != [0, 0, 0, 0, 12, 0, 0, 0xde] || tail[8..] != sum {
            let what = format!("inode {}: folder block {logical} has a wrong sum", folder.number);
            return Err(corrupt(what));
        }
        Ok(())
    }
}

/// Visits the entries of a block; says whether to go on.
fn entries(
    folder: &Inode,
    bytes: &[u8],
    block_bytes: u64,
    visit: &mut dyn FnMut(FolderEntry) -> Result<bool>,
) -> Result<bool> {
    let mut at = 0;
    while at + 8 <= bytes.len() {
        let inode = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut len = usize::from(u16::from_le_bytes([bytes[at + 4], bytes[at + 5]]));
        // A length of 64 KiB does not fit into 16 bits.
        if block_bytes == 65_536 && (len == 0 || len == 65_535) {
            len = 65_536;
        }
        let name_len = usize::from(bytes[at + 6]);
        if len < 8 || !len.is_multiple_of(4) || len > bytes.len() - at || 8 + name_len > len {
            let what = format!("inode {}: an entry of a wrong length", folder.number);
            return Err(corrupt(what));
        }
        let name = &bytes[at + 8..at + 8 + name_len];
        at += len;
        if inode == 0 || name_len == 0 || name == b"." || name == b".." {
            continue;
        }
        if name.contains(&b'/') || name.contains(&0) {
            return Err(corrupt(format!("inode {}: an entry whose name is none", folder.number)));
        }
        if !visit(FolderEntry { name: name.to_vec(), inode })? {
            return Ok(false);
        }
    }
    Ok(true)
}
