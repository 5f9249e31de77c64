//! dm-snapshot's persistent store, written chunk by chunk as the kernel does.

use std::fs;
use std::io;
use std::path::Path;

/// Writes a store over `origin` that makes `device` of it, with chunks of `sectors`, and returns how
/// many chunks differ. Chunks are stored in the order of `order`, a seed, as a guest's writes come.
///
/// # Errors
/// When the file cannot be written.
pub fn write(
    path: &Path,
    origin: &[u8],
    device: &[u8],
    sectors: u32,
    order: u64,
) -> io::Result<usize> {
    let chunk = sectors as usize * 512;
    let per_area = chunk / 16;
    let mut changed: Vec<usize> = (0..origin.len().div_ceil(chunk))
        .filter(|number| {
            let range = number * chunk..((number + 1) * chunk).min(origin.len());
            origin[range.clone()] != device[range]
        })
        .collect();
    let mut random = super::random::Random::new(order);
    for at in (1..changed.len()).rev() {
        changed.swap(at, random.below(at + 1));
    }
    let mut store = vec![0; chunk];
    store[..4].copy_from_slice(b"SnAp");
    store[4..8].copy_from_slice(&1_u32.to_le_bytes());
    store[8..12].copy_from_slice(&1_u32.to_le_bytes());
    store[12..16].copy_from_slice(&sectors.to_le_bytes());
    // An area that is full is followed by one that is empty.
    let mut areas: Vec<&[usize]> = changed.chunks(per_area).collect();
    if areas.last().is_none_or(|last| last.len() == per_area) {
        areas.push(&[]);
    }
    for area in areas {
        let first = store.len() / chunk;
        let mut table = vec![0; chunk];
        for (number, old) in area.iter().enumerate() {
            table[number * 16..][..8].copy_from_slice(&(*old as u64).to_le_bytes());
            let new = (first + 1 + number) as u64;
            table[number * 16 + 8..][..8].copy_from_slice(&new.to_le_bytes());
        }
        store.extend(table);
        for old in area {
            let end = ((old + 1) * chunk).min(device.len());
            let mut bytes = device[old * chunk..end].to_vec();
            bytes.resize(chunk, 0);
            store.extend(bytes);
        }
    }
    fs::write(path, store)?;
    Ok(changed.len())
}
