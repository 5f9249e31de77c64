//! A disk that a guest writes to and checks: it knows what it wrote last to each of some blocks.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::sim_disk::random::SplitMix64;

const BLOCK_BYTES: usize = 4096;
/// Blocks that are written, at most: the first ones.
const BLOCKS_MAX: u64 = 64;
/// Writes between two syncs.
const SYNC_EVERY: u64 = 32;

/// A disk as the VMM's configuration and state have it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct DiskState {
    pub(super) id: String,
    pub(super) path: PathBuf,
    pub(super) is_read_only: bool,
    /// Writes are finished some time after they were begun.
    #[serde(default)]
    pub(super) is_async: bool,
    /// The number of the last write to each block; 0 for none.
    #[serde(default)]
    pub(super) written: Vec<u64>,
}

/// A disk that is open.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) state: DiskState,
    seed: u64,
    file: File,
    random: SplitMix64,
    writes: u64,
    /// A write that was begun.
    pending: Option<u64>,
}

impl Disk {
    pub(super) fn open(mut state: DiskState, seed: u64, variation: u64) -> Result<Disk> {
        let file = open(&state.path, state.is_read_only)?;
        let blocks = (file.metadata()?.len() / BLOCK_BYTES as u64).min(BLOCKS_MAX);
        state.written.resize(usize::try_from(blocks)?, 0);
        let random = SplitMix64::new(seed ^ variation);
        Ok(Disk { state, seed, file, random, writes: 0, pending: None })
    }

    /// Gives it another file, which has what the last one had.
    pub(super) fn replace(&mut self, path: &Path) -> Result<()> {
        self.file = open(path, self.state.is_read_only)?;
        path.clone_into(&mut self.state.path);
        Ok(())
    }

    /// Reads a block and checks it, and writes another one.
    pub(super) fn step(&mut self) -> Result<()> {
        if self.state.written.is_empty() {
            return Ok(());
        }
        self.drain()?;
        let blocks = self.state.written.len() - 1;
        let read = self.random.up_to(blocks);
        self.check(read)?;
        if self.state.is_read_only {
            return Ok(());
        }
        let block = self.random.up_to(blocks) as u64;
        self.pending = Some(block);
        if !self.state.is_async {
            self.drain()?;
        }
        self.writes += 1;
        if self.writes.is_multiple_of(SYNC_EVERY) {
            self.file.sync_data().context("a disk cannot be synced")?;
        }
        Ok(())
    }

    /// Finishes what was begun, as a VMM does while it makes its state.
    pub(super) fn drain(&mut self) -> Result<()> {
        let Some(block) = self.pending.take() else { return Ok(()) };
        let number = &mut self.state.written[usize::try_from(block)?];
        *number += 1;
        let bytes = content(self.seed, &self.state.id, block, *number);
        self.file
            .write_all_at(&bytes, block * BLOCK_BYTES as u64)
            .with_context(|| format!("disk {} cannot be written", self.state.id))
    }

    /// Checks all blocks.
    pub(super) fn verify(&mut self) -> Result<()> {
        (0..self.state.written.len()).try_for_each(|block| self.check(block))
    }

    fn check(&self, block: usize) -> Result<()> {
        let number = self.state.written[block];
        if number == 0 {
            return Ok(());
        }
        let mut bytes = [0; BLOCK_BYTES];
        self.file
            .read_exact_at(&mut bytes, (block * BLOCK_BYTES) as u64)
            .with_context(|| format!("disk {} cannot be read", self.state.id))?;
        if bytes != content(self.seed, &self.state.id, block as u64, number) {
            bail!(
                "disk {} ({}) has not in block {block} what was written there as number {number}",
                self.state.id,
                self.state.path.display()
            );
        }
        Ok(())
    }
}

fn open(path: &Path, is_read_only: bool) -> Result<File> {
    let file = File::options().read(true).write(!is_read_only).open(path);
    file.with_context(|| format!("no disk {}", path.display()))
}

fn content(seed: u64, id: &str, block: u64, number: u64) -> [u8; BLOCK_BYTES] {
    let name = id.bytes().fold(7, |hash: u64, byte| hash.wrapping_mul(31) ^ u64::from(byte));
    let mut random = SplitMix64::new(seed ^ name.rotate_left(17) ^ block << 48 ^ number);
    let mut bytes = [0; BLOCK_BYTES];
    for word in bytes.as_chunks_mut::<8>().0 {
        *word = random.next().to_le_bytes();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_disk_and_a_flipped_bit_are_seen() {
        let folder = std::env::temp_dir().join(format!("double-disk-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("disk");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let state = DiskState {
            id: "root".to_owned(),
            path: path.clone(),
            is_read_only: false,
            is_async: true,
            written: Vec::new(),
        };
        let mut disk = Disk::open(state, 1, 2).unwrap();
        for _ in 0..200 {
            disk.step().unwrap();
        }
        disk.drain().unwrap();
        disk.verify().unwrap();
        let older = std::fs::read(&path).unwrap();
        for _ in 0..50 {
            disk.step().unwrap();
        }
        disk.drain().unwrap();
        let newer = std::fs::read(&path).unwrap();
        std::fs::write(folder.join("older"), &older).unwrap();
        disk.replace(&folder.join("older")).unwrap();
        assert!(disk.verify().is_err(), "the disk moved on");
        std::fs::write(folder.join("newer"), &newer).unwrap();
        disk.replace(&folder.join("newer")).unwrap();
        disk.verify().unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
