//! Digests, keys and checksums: what a block is called and how damage is found.
//!
//! A block's [`Digest`] is keyed, so that nobody who writes inside a guest can prepare two blocks
//! that collide, and so that nothing is shared between domains with different keys. Checksums are
//! unkeyed, so that physical damage is found without the key.

mod batch;

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::BLOCK_BYTES;

/// Context strings of BLAKE3's key derivation; each use of the hash has one of its own.
const KEY_ID_CONTEXT: &str = "dormouse 2026 domain key id";
const HASH_CONTEXT: &str = "dormouse 2026 unkeyed structure hash";

/// The digest of a 4 KiB block: the first 16 bytes of its keyed BLAKE3.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Digest(pub [u8; 16]);

impl Digest {
    /// The first eight bytes as a number; digests are evenly spread over it.
    pub fn prefix(&self) -> u64 {
        let [high, _] = self.halves();
        high
    }

    /// Both halves as big-endian numbers, so that comparing them compares the bytes.
    pub fn halves(&self) -> [u64; 2] {
        let (halves, _) = self.0.as_chunks::<8>();
        [u64::from_be_bytes(halves[0]), u64::from_be_bytes(halves[1])]
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

/// The name of a key: derived from it one way, so it may stand in files.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct KeyId(pub [u8; 16]);

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

/// The secret of a dedup domain.
#[derive(Clone)]
pub struct DomainKey {
    key: [u8; 32],
    id: KeyId,
}

impl DomainKey {
    /// A key from 32 random bytes.
    pub fn new(key: [u8; 32]) -> DomainKey {
        let derived = blake3::derive_key(KEY_ID_CONTEXT, &key);
        DomainKey { key, id: KeyId(first_16(&derived)) }
    }

    /// The key's name.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// The digest of a block. A short last block is padded with zeros by the caller.
    pub fn digest(&self, block: &[u8]) -> Digest {
        Digest(first_16(blake3::keyed_hash(&self.key, block).as_bytes()))
    }

    /// The digests of whole blocks, each given to `each` with what came with the block, in order.
    /// Many blocks are hashed at once, which takes half the time of one after the other.
    pub fn digest_each<'a, T>(
        &self,
        blocks: impl IntoIterator<Item = (&'a [u8; BLOCK_BYTES], T)>,
        mut each: impl FnMut(T, Digest),
    ) {
        let mut blocks = blocks.into_iter();
        loop {
            let mut batch = batch::Batch::new();
            let mut notes = [const { None }; batch::BLOCKS_MAX];
            for note in &mut notes {
                let Some((block, with)) = blocks.next() else { break };
                batch.push(block);
                *note = Some(with);
            }
            let count = batch.len();
            let hashes = batch.keyed_hashes(&self.key);
            for (note, hash) in notes.into_iter().flatten().zip(&hashes) {
                each(note, Digest(first_16(hash)));
            }
            if count < batch::BLOCKS_MAX {
                return;
            }
        }
    }
}

impl fmt::Debug for DomainKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DomainKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// An unkeyed 128-bit hash over the parts of a structure, each as given.
pub fn structure_hash<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_derive_key(HASH_CONTEXT);
    for part in parts {
        hasher.update(part);
    }
    first_16(hasher.finalize().as_bytes())
}

/// The checksum of on-disk structures: XXH3 with 64 bits.
pub fn checksum(parts: &[&[u8]]) -> u64 {
    use std::hash::Hasher;
    match parts {
        [one] => twox_hash::XxHash3_64::oneshot(one),
        _ => {
            let mut hasher = twox_hash::XxHash3_64::new();
            for part in parts {
                hasher.write(part);
            }
            hasher.finish()
        }
    }
}

/// Reads `text` as 32 hexadecimal digits.
pub fn parse_hex_16(text: &str) -> Option<[u8; 16]> {
    let digits = text.as_bytes();
    if digits.len() != 32 || !digits.iter().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let value = u128::from_str_radix(text, 16).ok()?;
    Some(value.to_be_bytes())
}

pub(crate) fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn first_16(bytes: &[u8; 32]) -> [u8; 16] {
    let mut first = [0; 16];
    first.copy_from_slice(&bytes[..16]);
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_changes_every_digest_and_its_id() {
        let (a, b) = (DomainKey::new([1; 32]), DomainKey::new([2; 32]));
        assert_ne!(a.id(), b.id());
        assert_ne!(a.digest(&[0; 4096]), b.digest(&[0; 4096]));
        assert_eq!(a.digest(&[7; 4096]), a.digest(&[7; 4096]));
    }

    #[test]
    fn each_block_gets_its_digest_with_what_came_with_it() {
        let key = DomainKey::new([5; 32]);
        for count in [0, 1, 15, 16, 17, 70] {
            let blocks: Vec<[u8; BLOCK_BYTES]> =
                (0..count).map(|number| [u8::try_from(number).unwrap(); BLOCK_BYTES]).collect();
            let mut told = Vec::new();
            key.digest_each(blocks.iter().zip(0..), |number, digest| told.push((number, digest)));
            let expected: Vec<_> =
                (0..).zip(blocks.iter().map(|block| key.digest(block))).collect();
            assert_eq!(told, expected, "{count} blocks");
        }
    }

    #[test]
    fn a_key_does_not_print_itself() {
        let printed = format!("{:?}", DomainKey::new([0xab; 32]));
        assert!(!printed.contains("abab") && !printed.contains("171, 171"), "{printed}");
    }

    #[test]
    fn hex_round_trips_and_refuses() {
        let digest = Digest([0x0f; 16]);
        assert_eq!(parse_hex_16(&digest.to_string()), Some(digest.0));
        for bad in
            ["", "0f", "+f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f", "zz0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f"]
        {
            assert_eq!(parse_hex_16(bad), None, "{bad:?}");
        }
    }
}
