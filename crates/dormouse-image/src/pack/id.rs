//! A pack's name: the hash of what it holds.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::PackParams;
use crate::digest::{parse_hex_16, structure_hash, write_hex};

/// The id of a pack.
///
/// 128 bits are enough: the hash covers keyed digests, so nobody without the domain's key can
/// prepare two packs with one id, and a block's digest is no longer either.
#[derive(
    Clone,
    Copy,
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
pub struct PackId(pub [u8; 16]);

impl PackId {
    /// The pack that is being written: it has no name before its last byte is known.
    pub const SELF: PackId = PackId([0; 16]);

    /// This id, or `own` if it is [`PackId::SELF`].
    #[must_use]
    pub fn resolve(self, own: PackId) -> PackId {
        if self == PackId::SELF { own } else { self }
    }

    /// The first eight bytes as one number, so that its digits are the first sixteen of the id.
    /// Its upper half is neither 0 nor all ones, which mean other sources: there the last bit of the
    /// half is turned around.
    pub fn source(self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        let source = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        match source >> 32 {
            0 | 0xffff_ffff => source ^ (1 << 32),
            _ => source,
        }
    }

    /// Reads 32 hexadecimal digits.
    pub fn parse(text: &str) -> Option<PackId> {
        parse_hex_16(text).map(PackId).filter(|&id| id != PackId::SELF)
    }
}

impl fmt::Debug for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

/// What a pack's id is the hash of.
#[derive(Clone, Copy, Debug)]
pub struct PackIdParts<'a> {
    /// Algorithms and keys; the salt is physical and left out.
    pub params: &'a PackParams,

    /// How many slots there are.
    pub slots: u32,

    /// The hash of each segment's digests.
    pub segments: &'a [[u8; 16]],

    /// The digest of each node.
    pub nodes: &'a [[u8; 16]],
}

impl PackIdParts<'_> {
    /// The id.
    pub fn id(&self) -> PackId {
        let counts = [
            self.slots,
            u32::try_from(self.segments.len()).expect("at most 2^22 segments"),
            u32::try_from(self.nodes.len()).expect("node numbers have 32 bits"),
        ];
        let head = [
            b"dormouse pack\x01".as_slice(),
            &self.params.digest_algorithm.to_le_bytes(),
            &self.params.key_id.0,
            &self.params.cipher.to_le_bytes(),
        ];
        let counts = counts.as_bytes();
        let hash = structure_hash(head.into_iter().chain([
            counts,
            self.segments.as_bytes(),
            self.nodes.as_bytes(),
        ]));
        PackId(hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_covers_every_part_but_the_salt() {
        let params = PackParams::new(crate::digest::KeyId([1; 16]), 1);
        let id = |params: &PackParams, slots, segments: &[[u8; 16]], nodes: &[[u8; 16]]| {
            PackIdParts { params, slots, segments, nodes }.id()
        };
        let base = id(&params, 5, &[[1; 16]], &[[2; 16]]);
        let salted = PackParams { salt: 2, ..params };
        assert_eq!(id(&salted, 5, &[[1; 16]], &[[2; 16]]), base);
        let keyed = PackParams { key_id: crate::digest::KeyId([2; 16]), ..params };
        let others = [
            id(&keyed, 5, &[[1; 16]], &[[2; 16]]),
            id(&params, 6, &[[1; 16]], &[[2; 16]]),
            id(&params, 5, &[[3; 16]], &[[2; 16]]),
            id(&params, 5, &[[1; 16]], &[[3; 16]]),
            id(&params, 5, &[[1; 16], [2; 16]], &[]),
        ];
        assert!(others.iter().all(|other| *other != base));
    }
}
