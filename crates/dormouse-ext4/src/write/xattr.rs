//! Extended attributes: in the inode where they fit, else in a block.

use std::borrow::Cow;

use crate::crc32c::crc32c;
use crate::disk::BLOCK_BYTES;
use crate::disk::inode::{FIXED_BYTES, INODE_BYTES, XATTR_MAGIC};
use crate::error::{Error, ErrorKind, Result};
use crate::tree::Xattr;
use crate::tree::xattr::{acl_to_disk, is_acl, split_name};

/// Bytes of an entry before its name.
const ENTRY_BYTES: usize = 16;

/// The four zero bytes that end the entries.
const END_BYTES: usize = 4;

/// The magic number before an inode's attributes.
const INODE_HEADER_BYTES: usize = 4;

/// The header of a block of attributes.
const BLOCK_HEADER_BYTES: usize = 32;

const INODE_ROOM: usize = INODE_BYTES - FIXED_BYTES - INODE_HEADER_BYTES;
const BLOCK_ROOM: usize = BLOCK_BYTES - BLOCK_HEADER_BYTES;

#[derive(Debug)]
struct Attribute<'a> {
    namespace: u8,
    name: &'a [u8],
    value: Cow<'a, [u8]>,
}

/// Where a node's attributes go.
#[derive(Debug, Default)]
pub(crate) struct XattrPlan<'a> {
    in_inode: Vec<Attribute<'a>>,
    in_block: Vec<Attribute<'a>>,
    wrong: Option<Error>,
}

impl<'a> XattrPlan<'a> {
    pub(crate) fn of(xattrs: &'a [Xattr]) -> XattrPlan<'a> {
        let mut plan = XattrPlan::default();
        if xattrs.is_empty() {
            return plan;
        }
        let mut all = Vec::with_capacity(xattrs.len());
        for xattr in xattrs {
            match Attribute::of(xattr) {
                Ok(attribute) => all.push(attribute),
                Err(error) => plan.wrong = Some(error),
            }
        }
        // The order in which a block has to have them.
        all.sort_by(|a, b| {
            (a.namespace, a.name.len(), a.name).cmp(&(b.namespace, b.name.len(), b.name))
        });
        let (mut inode, mut block) = (END_BYTES, END_BYTES);
        for attribute in all {
            let bytes = attribute.bytes();
            if inode + bytes <= INODE_ROOM {
                inode += bytes;
                plan.in_inode.push(attribute);
            } else {
                block += bytes;
                plan.in_block.push(attribute);
            }
        }
        if block > BLOCK_ROOM {
            let what = format!("extended attributes of {block} bytes; ext4 has room for 4 KiB");
            plan.wrong = Some(Error::new(ErrorKind::DoesNotFit, what));
        }
        plan
    }

    /// Fails if an attribute cannot be stored.
    pub(crate) fn check(self) -> Result<()> {
        self.wrong.map_or(Ok(()), Err)
    }

    /// Whether a block is needed beside the inode.
    pub(crate) fn needs_block(&self) -> bool {
        !self.in_block.is_empty()
    }

    /// Puts what lies in the inode into its 256 bytes.
    pub(crate) fn put_in_inode(&self, inode: &mut [u8]) {
        if self.in_inode.is_empty() {
            return;
        }
        let (header, room) = inode[FIXED_BYTES..].split_at_mut(INODE_HEADER_BYTES);
        header.copy_from_slice(&XATTR_MAGIC.to_le_bytes());
        put(&self.in_inode, room, 0, 0);
    }

    /// The block that is to be block `number`.
    pub(crate) fn block(&self, seed: u32, number: u64) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        let hashes = put(&self.in_block, &mut block, BLOCK_HEADER_BYTES, 0);
        let hash = hashes.iter().fold(0u32, |sum, hash| sum.rotate_left(16) ^ hash);
        block[..4].copy_from_slice(&XATTR_MAGIC.to_le_bytes());
        // One inode refers to it, and it is one block long.
        block[4..8].copy_from_slice(&1u32.to_le_bytes());
        block[8..12].copy_from_slice(&1u32.to_le_bytes());
        block[12..16].copy_from_slice(&hash.to_le_bytes());
        let sum = block_sum(seed, number, &block);
        block[16..20].copy_from_slice(&sum.to_le_bytes());
        block
    }
}

/// The sum of a block of attributes, whose own field is taken as zero.
pub(crate) fn block_sum(seed: u32, number: u64, block: &[u8]) -> u32 {
    let sum = crc32c(seed, &number.to_le_bytes());
    let sum = crc32c(sum, &block[..16]);
    let sum = crc32c(sum, &[0; 4]);
    crc32c(sum, &block[20..])
}

impl Xattr {
    /// What it takes of a file's room for extended attributes, or why ext4 cannot hold it.
    pub fn stored_bytes(&self) -> Result<usize> {
        Ok(Attribute::of(self)?.bytes())
    }
}

impl<'a> Attribute<'a> {
    fn of(xattr: &'a Xattr) -> Result<Attribute<'a>> {
        let shown = || xattr.name.escape_ascii();
        let Some((namespace, name)) = split_name(&xattr.name) else {
            let what = format!("extended attribute {} of a namespace unknown to ext4", shown());
            return Err(Error::new(ErrorKind::Unsupported, what));
        };
        if name.len() > usize::from(u8::MAX) {
            let what = format!("extended attribute {:.300} has a name over 255 bytes", shown());
            return Err(Error::new(ErrorKind::DoesNotFit, what));
        }
        let value = if is_acl(namespace) {
            let disk = acl_to_disk(&xattr.value).ok_or_else(|| {
                let what = format!("extended attribute {} is not an access control list", shown());
                Error::new(ErrorKind::InvalidInput, what)
            })?;
            Cow::Owned(disk)
        } else {
            Cow::Borrowed(xattr.value.as_slice())
        };
        Ok(Attribute { namespace, name, value })
    }

    fn bytes(&self) -> usize {
        (ENTRY_BYTES + self.name.len()).next_multiple_of(4) + self.value.len().next_multiple_of(4)
    }

    fn hash(&self) -> u32 {
        let hash = self.name.iter().fold(0u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
        let mut words = self.value.chunks(4).map(|chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(word)
        });
        words.by_ref().fold(hash, |hash, word| hash.rotate_left(16) ^ word)
    }
}

/// Puts entries from `begin` on and values from the end on; their places count from `origin`.
/// Returns the entries' hashes.
fn put(attributes: &[Attribute<'_>], room: &mut [u8], begin: usize, origin: usize) -> Vec<u32> {
    let (mut at, mut value_at) = (begin, room.len());
    let mut hashes = Vec::with_capacity(attributes.len());
    for attribute in attributes {
        let value = &attribute.value;
        value_at -= value.len().next_multiple_of(4);
        room[value_at..value_at + value.len()].copy_from_slice(value);
        let hash = attribute.hash();
        let entry = &mut room[at..at + (ENTRY_BYTES + attribute.name.len()).next_multiple_of(4)];
        at += entry.len();
        let offset = if value.is_empty() { 0 } else { value_at - origin };
        // Below 4 KiB all of them, as the plan's check ensures.
        let small = |number: usize| u16::try_from(number).unwrap_or(u16::MAX).to_le_bytes();
        entry[0] = small(attribute.name.len())[0];
        entry[1] = attribute.namespace;
        entry[2..4].copy_from_slice(&small(offset));
        entry[8..10].copy_from_slice(&small(value.len()));
        entry[12..16].copy_from_slice(&hash.to_le_bytes());
        entry[ENTRY_BYTES..ENTRY_BYTES + attribute.name.len()].copy_from_slice(attribute.name);
        hashes.push(hash);
    }
    hashes
}
