//! How a folder's entries are divided over blocks: one block, or a hash index with leaves.

use crate::disk::hash::{NameHash, name_hash};
use crate::disk::{BLOCK_BYTES, NAME_BYTES_MAX};
use crate::error::{Error, ErrorKind, Result};
use crate::tree::{Entry, NodeId, Tree};

/// What every hash begins with. Any would do; this one never changes, so that the order of a
/// folder's entries does not either.
pub(crate) const HASH_SEED: [u32; 4] = [0x646f_726d, 0x6f75_7365, 0x2d65_7874, 0x3421_0001];

/// Bytes of an entry without its name.
pub(crate) const ENTRY_BYTES: usize = 8;

/// The checksum at the end of a block of entries.
pub(crate) const TAIL_BYTES: usize = 12;

/// Bytes for entries in a block.
pub(crate) const LEAF_BYTES: usize = BLOCK_BYTES - TAIL_BYTES;

/// `.` and `..`.
const DOTS_BYTES: usize = 24;

/// Where the root's index begins: after `.`, `..` and 8 bytes about the index.
pub(crate) const ROOT_INDEX_AT: usize = 32;

/// Where an inner node's index begins: after an entry without a name.
pub(crate) const NODE_INDEX_AT: usize = 8;

/// The checksum at the end of an index block.
const INDEX_TAIL_BYTES: usize = 8;

/// Index entries in the root.
pub(crate) const ROOT_ENTRIES: usize = (BLOCK_BYTES - ROOT_INDEX_AT - INDEX_TAIL_BYTES) / 8;

/// Index entries in an inner node.
pub(crate) const NODE_ENTRIES: usize = (BLOCK_BYTES - NODE_INDEX_AT - INDEX_TAIL_BYTES) / 8;

/// Entries of one leaf.
#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    pub(crate) entries: std::ops::Range<usize>,
    /// The smallest hash, with its lowest bit set if the leaf before ends with the same one.
    pub(crate) hash: u32,
}

/// A folder's blocks.
#[derive(Debug)]
pub(crate) enum FolderPlan<'a> {
    /// One block.
    Linear(Vec<Entry<'a>>),

    /// An index over leaves. The root is block 0, inner nodes follow, then the leaves.
    Indexed { entries: Vec<(NameHash, Entry<'a>)>, leaves: Vec<Leaf>, inner_nodes: usize },
}

impl<'a> FolderPlan<'a> {
    /// Divides the entries of a folder.
    pub(crate) fn of(tree: &'a Tree, folder: NodeId) -> Result<FolderPlan<'a>> {
        let bytes: usize = tree.entries(folder).map(|entry| entry_bytes(entry.name.len())).sum();
        if DOTS_BYTES + bytes <= LEAF_BYTES {
            return Ok(FolderPlan::Linear(tree.entries(folder).collect()));
        }
        let mut entries: Vec<(NameHash, Entry<'_>)> =
            tree.entries(folder).map(|entry| (name_hash(HASH_SEED, entry.name), entry)).collect();
        entries
            .sort_unstable_by(|(a_hash, a), (b_hash, b)| (a_hash, a.name).cmp(&(b_hash, b.name)));
        let leaves = divide(&entries);
        let inner_nodes =
            if leaves.len() <= ROOT_ENTRIES { 0 } else { leaves.len().div_ceil(NODE_ENTRIES) };
        if inner_nodes > ROOT_ENTRIES {
            let path = tree.path_of(folder);
            let what = format!("{path} has {} entries, more than an index holds", entries.len());
            return Err(Error::new(ErrorKind::DoesNotFit, what));
        }
        Ok(FolderPlan::Indexed { entries, leaves, inner_nodes })
    }

    /// How many blocks it takes.
    pub(crate) fn blocks(&self) -> u64 {
        match self {
            FolderPlan::Linear(_) => 1,
            FolderPlan::Indexed { leaves, inner_nodes, .. } => {
                1 + (inner_nodes + leaves.len()) as u64
            }
        }
    }
}

fn divide(entries: &[(NameHash, Entry<'_>)]) -> Vec<Leaf> {
    let mut leaves: Vec<Leaf> = Vec::new();
    let mut begin = 0;
    let mut bytes = 0;
    let mut finish = |begin: usize, end: usize| {
        let first = entries[begin].0.major;
        // The first leaf stands for all hashes from zero on.
        let hash = match begin.checked_sub(1) {
            None => 0,
            Some(before) => first | u32::from(entries[before].0.major == first),
        };
        leaves.push(Leaf { entries: begin..end, hash });
    };
    for (index, (_, entry)) in entries.iter().enumerate() {
        let len = entry_bytes(entry.name.len());
        if bytes + len > LEAF_BYTES {
            finish(begin, index);
            (begin, bytes) = (index, 0);
        }
        bytes += len;
    }
    if begin < entries.len() {
        finish(begin, entries.len());
    }
    leaves
}

/// Bytes of an entry with a name of `len` bytes.
pub(crate) fn entry_bytes(len: usize) -> usize {
    debug_assert!(len <= NAME_BYTES_MAX, "names are checked when they come into the tree");
    (ENTRY_BYTES + len).next_multiple_of(4)
}
