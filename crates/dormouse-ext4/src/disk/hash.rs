//! The hash by which indexed folders are ordered: half of MD4, over names taken as signed bytes.

/// A name's place in an indexed folder: by `major`, which is even, then by `minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NameHash {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// The number of this hash in superblocks and index roots.
pub(crate) const HALF_MD4: u8 = 1;

/// The superblock's flag for hashes over signed bytes.
pub(crate) const FLAG_SIGNED: u32 = 1;

/// The largest hash is a mark for "past the end" and never a name's.
const PAST_THE_END: u32 = 0xffff_fffe;

const ROUND_2: u32 = 0x5a82_7999;
const ROUND_3: u32 = 0x6ed9_eba1;

/// The hash of a name with the file system's seed.
pub(crate) fn name_hash(seed: [u32; 4], name: &[u8]) -> NameHash {
    let mut state = seed;
    if name.is_empty() {
        mix(&mut state, words(name));
    }
    let mut rest = name;
    while !rest.is_empty() {
        mix(&mut state, words(rest));
        rest = &rest[rest.len().min(32)..];
    }
    let major = state[1] & !1;
    let major = if major == PAST_THE_END { PAST_THE_END - 2 } else { major };
    NameHash { major, minor: state[2] }
}

/// The next 32 bytes as words, padded with the length of all that is left.
fn words(rest: &[u8]) -> [u32; 8] {
    // A name has 255 bytes at most.
    let length = u32::try_from(rest.len()).unwrap_or(u32::MAX);
    let pad = length | length << 8;
    let pad = pad | pad << 16;
    let mut words = [pad; 8];
    for (word, bytes) in words.iter_mut().zip(rest.chunks(4)) {
        for &byte in bytes {
            let signed = i32::from(byte.cast_signed()).cast_unsigned();
            *word = signed.wrapping_add(*word << 8);
        }
    }
    words
}

fn mix(state: &mut [u32; 4], words: [u32; 8]) {
    let [mut a, mut b, mut c, mut d] = *state;
    let mut step = |function: fn(u32, u32, u32) -> u32, word: u32, shift: u32| {
        let sum = a.wrapping_add(function(b, c, d)).wrapping_add(word);
        (a, d, c, b) = (d, c, b, sum.rotate_left(shift));
    };
    for (index, word) in words.into_iter().enumerate() {
        step(|x, y, z| z ^ (x & (y ^ z)), word, [3, 7, 11, 19][index % 4]);
    }
    for (index, from) in [1, 3, 5, 7, 0, 2, 4, 6].into_iter().enumerate() {
        let word = words[from].wrapping_add(ROUND_2);
        step(|x, y, z| (x & y).wrapping_add((x ^ y) & z), word, [3, 5, 9, 13][index % 4]);
    }
    for (index, from) in [3, 7, 2, 6, 1, 5, 0, 4].into_iter().enumerate() {
        let word = words[from].wrapping_add(ROUND_3);
        step(|x, y, z| x ^ y ^ z, word, [3, 9, 11, 15][index % 4]);
    }
    for (old, new) in state.iter_mut().zip([a, b, c, d]) {
        *old = old.wrapping_add(new);
    }
}
