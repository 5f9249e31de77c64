//! Extended attributes of an image, and contents that lie in them.

use crate::disk::inode::{FLAG_EA_INODE, XATTR_MAGIC};
use crate::error::{Error, ErrorKind, Result};
use crate::read::Ext4;
use crate::read::inode::{FileKind, Inode};
use crate::tree::Xattr;
use crate::tree::xattr::{acl_from_disk, is_acl, join_name};
use crate::write::xattr::block_sum;

const ENTRY_BYTES: usize = 16;
const BLOCK_HEADER_BYTES: usize = 32;

/// The namespace and name of the attribute that continues a content in the inode.
const INLINE_DATA: (u8, &[u8]) = (7, b"data");

/// The longest value (`xattr(7)`).
const VALUE_BYTES_MAX: usize = 64 << 10;

/// An attribute as it is stored.
struct Stored {
    namespace: u8,
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Ext4 {
    /// The extended attributes of an inode, by name. Those of namespaces that no system call shows
    /// are left out.
    pub fn xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>> {
        let mut found = Vec::new();
        for stored in self.stored(inode)? {
            if (stored.namespace, stored.name.as_slice()) == INLINE_DATA {
                continue;
            }
            let Some(name) = join_name(stored.namespace, &stored.name) else { continue };
            let value = if is_acl(stored.namespace) {
                acl_from_disk(&stored.value)
                    .ok_or_else(|| wrong(inode, "an access control list that is none"))?
            } else {
                stored.value
            };
            found.push(Xattr { name, value });
        }
        found.sort();
        Ok(found)
    }

    /// A content that lies in the inode: in place of its blocks, and in an attribute.
    pub(crate) fn inline(&self, inode: &Inode) -> Result<Vec<u8>> {
        let mut content = inode.block.to_vec();
        for stored in self.stored(inode)? {
            if (stored.namespace, stored.name.as_slice()) == INLINE_DATA {
                content.extend_from_slice(&stored.value);
            }
        }
        let bytes = usize::try_from(inode.bytes).unwrap_or(usize::MAX);
        if content.len() < bytes {
            return Err(wrong(inode, "less content in it than its length says"));
        }
        content.truncate(bytes);
        Ok(content)
    }

    fn stored(&self, inode: &Inode) -> Result<Vec<Stored>> {
        let mut found = Vec::new();
        let begin = 128 + inode.extra_bytes;
        if inode.whole.len() > begin + 8 && inode.extra_bytes > 0 {
            let (magic, entries) = inode.whole[begin..].split_at(4);
            if magic == XATTR_MAGIC.to_le_bytes() {
                self.entries_of(inode, entries, 0, &mut found)?;
            }
        }
        if inode.xattr_block != 0 {
            let block = self.block(inode.xattr_block)?;
            if block[..4] != XATTR_MAGIC.to_le_bytes() {
                return Err(wrong(inode, "a block of attributes that is none"));
            }
            let sum = block_sum(self.seed, inode.xattr_block, &block);
            if self.has_sums() && block[16..20] != sum.to_le_bytes() {
                return Err(wrong(inode, "a block of attributes with a wrong sum"));
            }
            self.entries_of(inode, &block, BLOCK_HEADER_BYTES, &mut found)?;
        }
        Ok(found)
    }

    /// Reads the entries of `bytes` from `at` on; values' places count from the front.
    fn entries_of(
        &self,
        inode: &Inode,
        bytes: &[u8],
        mut at: usize,
        found: &mut Vec<Stored>,
    ) -> Result<()> {
        let broken = || wrong(inode, "an attribute out of bounds");
        while at + 4 <= bytes.len() && bytes[at..at + 4] != [0; 4] {
            let entry = bytes.get(at..at + ENTRY_BYTES).ok_or_else(broken)?;
            let word = |at: usize| {
                u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]])
            };
            let name_len = usize::from(entry[0]);
            let offset = usize::from(u16::from_le_bytes([entry[2], entry[3]]));
            let value_inode = word(4);
            let len = usize::try_from(word(8)).unwrap_or(usize::MAX);
            let name_at = at + ENTRY_BYTES;
            let name = bytes.get(name_at..name_at + name_len).ok_or_else(broken)?;
            if len > VALUE_BYTES_MAX {
                return Err(broken());
            }
            let value = if value_inode != 0 {
                self.value_of(value_inode, len)?
            } else {
                bytes.get(offset..offset + len).ok_or_else(broken)?.to_vec()
            };
            found.push(Stored { namespace: entry[1], name: name.to_vec(), value });
            at += (ENTRY_BYTES + name_len).next_multiple_of(4);
        }
        Ok(())
    }

    /// A value that has an inode of its own.
    fn value_of(&self, number: u32, len: usize) -> Result<Vec<u8>> {
        let inode = self.inode(number)?;
        let is_value = inode.kind == FileKind::File && inode.flags & FLAG_EA_INODE != 0;
        if !is_value || inode.is_inline() || inode.bytes != len as u64 {
            return Err(wrong(&inode, "no value of an attribute"));
        }
        let mut value = vec![0; len];
        self.read(&inode, &mut value, 0)?;
        Ok(value)
    }
}

fn wrong(inode: &Inode, what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("inode {}: {what}", inode.number))
}
