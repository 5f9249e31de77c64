//! QEMU's migration streams, up to the end of their RAM: mapped-ram files, and streams that left
//! shared RAM out.

use super::random::PAGE;

/// A RAM block.
#[derive(Clone, Debug)]
pub struct Block {
    /// Its name.
    pub name: String,
    /// Its bytes.
    pub memory: Vec<u8>,
}

fn head(capability: &str, total: usize) -> Vec<u8> {
    let mut bytes = b"QEVM\0\0\0\x03\x07".to_vec();
    short32("pc-q35-10.0", &mut bytes);
    bytes.push(5);
    short("configuration/capabilities", &mut bytes);
    bytes.extend(1_u32.to_be_bytes());
    bytes.extend(1_u32.to_be_bytes());
    short(capability, &mut bytes);
    bytes.push(1);
    bytes.extend(2_u32.to_be_bytes());
    short("ram", &mut bytes);
    bytes.extend(0_u32.to_be_bytes());
    bytes.extend(4_u32.to_be_bytes());
    bytes.extend((total as u64 | 4).to_be_bytes());
    bytes
}

fn short(text: &str, bytes: &mut Vec<u8>) {
    bytes.push(text.len() as u8);
    bytes.extend(text.as_bytes());
}

fn short32(text: &str, bytes: &mut Vec<u8>) {
    bytes.extend((text.len() as u32).to_be_bytes());
    bytes.extend(text.as_bytes());
}

/// What comes behind the RAM.
const TAIL: &[u8] =
    b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02and then the devices, which are nobody's business\0";

/// A mapped-ram file. Pages that are zero have no bit; `stale` of them have bytes all the same.
#[must_use]
pub fn mapped_ram(blocks: &[Block], stale: usize) -> Vec<u8> {
    let mut bytes = head("mapped-ram", blocks.iter().map(|block| block.memory.len()).sum());
    let mut stale = stale;
    for block in blocks {
        short(&block.name, &mut bytes);
        bytes.extend((block.memory.len() as u64).to_be_bytes());
        let pages = block.memory.len() / PAGE;
        let bitmap_len = pages.div_ceil(64) * 8;
        let bitmap_at = bytes.len() + 28;
        let pages_at = (bitmap_at + bitmap_len).next_multiple_of(1 << 20);
        bytes.extend(1_u32.to_be_bytes());
        for number in [PAGE, bitmap_at, pages_at] {
            bytes.extend((number as u64).to_be_bytes());
        }
        let mut bitmap = vec![0_u64; pages.div_ceil(64)];
        let mut area = block.memory.clone();
        for (number, page) in area.chunks_mut(PAGE).enumerate() {
            if page.iter().any(|&byte| byte != 0) {
                bitmap[number / 64] |= 1 << (number % 64);
            } else if stale > 0 {
                stale -= 1;
                page.fill(0xdd);
            }
        }
        bitmap.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        bytes.resize(pages_at, 0);
        bytes.extend(area);
    }
    bytes.extend(TAIL);
    bytes
}

/// A stream whose RAM is in a file, but for some small blocks.
#[must_use]
pub fn ignore_shared(shared: (&str, usize), others: &[(&str, usize)]) -> Vec<u8> {
    let all = || [shared].into_iter().chain(others.iter().copied());
    let mut bytes = head("x-ignore-shared", all().map(|block| block.1).sum());
    for (name, len) in all() {
        short(name, &mut bytes);
        bytes.extend((len as u64).to_be_bytes());
        bytes.extend(0xfee0_0000_u64.to_be_bytes());
    }
    bytes.extend(TAIL);
    bytes
}
