//! The journal, replayed in memory: which blocks its committed transactions have newer.
//!
//! Source: the kernel's `Documentation/filesystems/ext4/journal.rst`.

use std::collections::HashMap;

use zerocopy::FromBytes;

use crate::crc32c::{START, crc32c};
use crate::disk::journal::{
    BlockHeader, INCOMPAT_64BIT, INCOMPAT_ASYNC_COMMIT, INCOMPAT_CSUM_V2, INCOMPAT_CSUM_V3,
    INCOMPAT_FAST_COMMIT, INCOMPAT_REVOKE, JOURNAL_MAGIC, JournalSuperblock, KIND_COMMIT,
    KIND_DESCRIPTOR, KIND_REVOKE, KIND_SUPERBLOCK, KIND_SUPERBLOCK_V1, TAG_ESCAPED, TAG_LAST,
    TAG_SAME_UUID, Tag, Tag3,
};
use crate::disk::superblock::low_half;
use crate::error::{Error, ErrorKind, Result, corrupt};
use crate::read::{Ext4, Run};

/// Where the newest copy of a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    /// The block of the image that holds it.
    pub(crate) block: u64,

    /// Whether its first word was the journal's magic number and was taken out.
    pub(crate) is_escaped: bool,
}

const KNOWN: u32 = INCOMPAT_REVOKE
    | INCOMPAT_64BIT
    | INCOMPAT_ASYNC_COMMIT
    | INCOMPAT_CSUM_V2
    | INCOMPAT_CSUM_V3
    | INCOMPAT_FAST_COMMIT;

/// Blocks of fast commits where the superblock does not say.
const FAST_COMMIT_BLOCKS: u32 = 256;

/// Offset of a commit block's sum.
const COMMIT_SUM_AT: usize = 16;

struct Log<'a> {
    image: &'a Ext4,
    runs: Vec<Run>,
    first: u32,
    end: u32,
    features: u32,
    seed: u32,
}

/// A block of a transaction that belongs elsewhere.
struct Logged {
    sequence: u32,
    block: u64,
    copy: Copy,
}

/// Finds the newest copies that committed transactions have of blocks.
pub(crate) fn replay(image: &Ext4, inode: u32) -> Result<HashMap<u64, Copy>> {
    let inode = image.inode(inode)?;
    let runs = image.runs(&inode)?;
    let bytes = image.block(block_of(&runs, 0)?)?;
    let (head, _) = JournalSuperblock::read_from_prefix(&bytes)
        .map_err(|_| corrupt("a journal of no length"))?;
    let version = head.header.kind.get();
    let is_journal = head.header.magic.get() == JOURNAL_MAGIC
        && matches!(version, KIND_SUPERBLOCK | KIND_SUPERBLOCK_V1)
        && u64::from(head.block_bytes.get()) == image.block_bytes;
    if !is_journal {
        return Err(corrupt("the journal's first block is none of a journal"));
    }
    let features = if version == KIND_SUPERBLOCK { head.incompat.get() } else { 0 };
    if features & !KNOWN != 0 {
        let what = format!("a journal with unknown features {:#x}", features & !KNOWN);
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    let mut end = head.blocks.get();
    let covered = runs.last().map_or(0, |run| run.logical + run.blocks);
    if head.first.get() == 0 || head.first.get() >= end || u64::from(end) > covered {
        return Err(corrupt("a journal whose numbers make no sense"));
    }
    let fast_from = if features & INCOMPAT_FAST_COMMIT != 0 {
        let fast = head.fast_commit_blocks.get();
        let fast = if fast == 0 { FAST_COMMIT_BLOCKS } else { fast };
        end = end
            .checked_sub(fast)
            .filter(|&end| end > head.first.get())
            .ok_or_else(|| corrupt("a journal without room beside its fast commits"))?;
        Some(end)
    } else {
        None
    };
    let seed = crc32c(START, &head.uuid);
    let log = Log { image, runs, first: head.first.get(), end, features, seed };
    if head.start.get() == 0 {
        return Ok(HashMap::new());
    }
    let (logged, revoked, next) = log.scan(head.start.get(), head.sequence.get())?;
    if let Some(block) = fast_from {
        log.refuse_fast_commits(block, next)?;
    }
    let mut newest = HashMap::new();
    for Logged { sequence, block, copy } in logged {
        // Sequence numbers wrap around.
        let is_revoked = revoked.get(&block).is_some_and(|&by: &u32| is_at_or_after(by, sequence));
        if is_revoked {
            newest.remove(&block);
        } else {
            newest.insert(block, copy);
        }
    }
    Ok(newest)
}

fn is_at_or_after(sequence: u32, other: u32) -> bool {
    sequence.wrapping_sub(other).cast_signed() >= 0
}

fn block_of(runs: &[Run], logical: u32) -> Result<u64> {
    let logical = u64::from(logical);
    let index = runs.partition_point(|run| run.logical + run.blocks <= logical);
    let run = runs.get(index).filter(|run| run.logical <= logical);
    let run = run.ok_or_else(|| corrupt(format!("the journal has a hole at {logical}")))?;
    Ok(run.start + (logical - run.logical))
}

type Scanned = (Vec<Logged>, HashMap<u64, u32>, u32);

impl Log<'_> {
    fn next(&self, block: u32) -> u32 {
        if block + 1 >= self.end { self.first } else { block + 1 }
    }

    fn has_sums(&self) -> bool {
        self.features & (INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3) != 0
    }

    /// Reads transactions until one is not whole. What was read of that one is dropped.
    fn scan(&self, start: u32, mut sequence: u32) -> Result<Scanned> {
        let (mut logged, mut revoked) = (Vec::new(), HashMap::new());
        let (mut pending, mut pending_revoked) = (Vec::new(), Vec::new());
        let mut at = start;
        if start < self.first || start >= self.end {
            return Err(corrupt(format!("a journal that begins at its block {start}")));
        }
        // Every block is passed once at most.
        let mut left = self.end - self.first + 1;
        while left > 0 {
            let number = block_of(&self.runs, at)?;
            let bytes = self.image.block(number)?;
            let Ok((header, _)) = BlockHeader::read_from_prefix(&bytes) else { break };
            if header.magic.get() != JOURNAL_MAGIC || header.sequence.get() != sequence {
                break;
            }
            left -= 1;
            at = self.next(at);
            match header.kind.get() {
                KIND_DESCRIPTOR => {
                    if !self.tail_is_right(&bytes) {
                        break;
                    }
                    for tag in self.tags(&bytes)? {
                        if left == 0 {
                            break;
                        }
                        let block = block_of(&self.runs, at)?;
                        pending.push((tag, block));
                        left -= 1;
                        at = self.next(at);
                    }
                }
                KIND_REVOKE => {
                    if !self.tail_is_right(&bytes) {
                        break;
                    }
                    self.revokes(&bytes, &mut pending_revoked)?;
                }
                KIND_COMMIT => {
                    if !self.commit_is_right(&bytes) {
                        break;
                    }
                    for (tag, block) in pending.drain(..) {
                        self.check_data(&tag, block, sequence)?;
                        let copy = Copy { block, is_escaped: tag.is_escaped };
                        logged.push(Logged { sequence, block: tag.block, copy });
                    }
                    for block in pending_revoked.drain(..) {
                        revoked.insert(block, sequence);
                    }
                    sequence = sequence.wrapping_add(1);
                }
                _ => break,
            }
        }
        Ok((logged, revoked, sequence))
    }

    fn tags(&self, bytes: &[u8]) -> Result<Vec<TagFields>> {
        let header = size_of::<BlockHeader>();
        let end = bytes.len() - if self.has_sums() { 4 } else { 0 };
        let mut rest = &bytes[header..end];
        let mut tags = Vec::new();
        let is_wide = self.features & INCOMPAT_64BIT != 0;
        let too_short = |_| corrupt("a journal's tag that is cut off");
        loop {
            let flags;
            if self.features & INCOMPAT_CSUM_V3 != 0 {
                let (tag, after) =
                    Tag3::read_from_prefix(rest).map_err(|_| ()).map_err(too_short)?;
                rest = after;
                flags = tag.flags.get();
                let high = if is_wide { tag.block_high.get() } else { 0 };
                tags.push(TagFields {
                    block: u64::from(high) << 32 | u64::from(tag.block_low.get()),
                    sum: tag.checksum.get(),
                    is_escaped: flags & TAG_ESCAPED != 0,
                });
            } else {
                let len = if is_wide { 12 } else { 8 };
                let mut whole = [0; 12];
                let (own, after) = rest.split_at_checked(len).ok_or(()).map_err(too_short)?;
                whole[..len].copy_from_slice(own);
                rest = after;
                let tag = Tag::read_from_bytes(&whole).map_err(|_| ()).map_err(too_short)?;
                flags = u32::from(tag.flags.get());
                tags.push(TagFields {
                    block: u64::from(tag.block_high.get()) << 32 | u64::from(tag.block_low.get()),
                    sum: u32::from(tag.checksum.get()),
                    is_escaped: flags & TAG_ESCAPED != 0,
                });
            }
            if flags & TAG_SAME_UUID == 0 {
                rest = rest.get(16..).ok_or(()).map_err(too_short)?;
            }
            if flags & TAG_LAST != 0 {
                return Ok(tags);
            }
        }
    }

    fn revokes(&self, bytes: &[u8], revoked: &mut Vec<u64>) -> Result<()> {
        let used = u32::from_be_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        let used = usize::try_from(used).unwrap_or(usize::MAX);
        let list = bytes.get(16..used).ok_or_else(|| corrupt("a revoke block of no length"))?;
        if self.features & INCOMPAT_64BIT != 0 {
            revoked.extend(list.as_chunks::<8>().0.iter().map(|&block| u64::from_be_bytes(block)));
        } else {
            let blocks = list.as_chunks::<4>().0.iter();
            revoked.extend(blocks.map(|&block| u64::from(u32::from_be_bytes(block))));
        }
        Ok(())
    }

    fn tail_is_right(&self, bytes: &[u8]) -> bool {
        if !self.has_sums() {
            return true;
        }
        let (content, tail) = bytes.split_at(bytes.len() - 4);
        let sum = crc32c(crc32c(self.seed, content), &[0; 4]);
        tail == sum.to_be_bytes()
    }

    fn commit_is_right(&self, bytes: &[u8]) -> bool {
        if !self.has_sums() {
            return true;
        }
        let sum = crc32c(self.seed, &bytes[..COMMIT_SUM_AT]);
        let sum = crc32c(sum, &[0; 4]);
        let sum = crc32c(sum, &bytes[COMMIT_SUM_AT + 4..]);
        bytes[COMMIT_SUM_AT..COMMIT_SUM_AT + 4] == sum.to_be_bytes()
    }

    fn check_data(&self, tag: &TagFields, block: u64, sequence: u32) -> Result<()> {
        if !self.has_sums() {
            return Ok(());
        }
        let bytes = self.image.block(block)?;
        let sum = crc32c(crc32c(self.seed, &sequence.to_be_bytes()), &bytes);
        let is_right = if self.features & INCOMPAT_CSUM_V3 != 0 {
            sum == tag.sum
        } else {
            u32::from(low_half(sum)) == tag.sum
        };
        if !is_right {
            let what = format!("the journal's copy of block {} has a wrong sum", tag.block);
            return Err(corrupt(what));
        }
        Ok(())
    }

    /// Fails if there are changes after the last transaction that only a kernel can apply.
    fn refuse_fast_commits(&self, from: u32, sequence: u32) -> Result<()> {
        /// The tag that begins fast commits; the transaction that they follow comes 8 bytes on.
        const HEAD: u16 = 9;
        let bytes = self.image.block(block_of(&self.runs, from)?)?;
        let tag = u16::from_le_bytes([bytes[0], bytes[1]]);
        let after = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if tag == HEAD && after == sequence {
            let what = "a journal with fast commits; let a kernel mount the image once";
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        Ok(())
    }
}

struct TagFields {
    block: u64,
    sum: u32,
    is_escaped: bool,
}
