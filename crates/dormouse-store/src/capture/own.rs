//! The blocks that this very commit stored: found again by digest, in bounded memory.
//!
//! The newest [`OWN_BLOCKS_IN_MEMORY`] are in a table; older ones are spilled to temporary files as
//! index runs, beside a file of all digests in the order of their slots, by which a hit is checked.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use dormouse_image::digest::Digest;
use dormouse_image::pack::PackId;

use crate::disk::{Disk, DiskWriter};
use crate::error::{Context, Result};
use crate::index::{IndexHit, IndexRun, RunWriter};
use crate::pin::Pin;

/// New blocks whose digests are kept in memory: 4 GiB of new blocks take 48 MiB.
pub(crate) const OWN_BLOCKS_IN_MEMORY: usize = 1 << 20;

/// Digests are evenly spread already; their first bytes are their hash.
#[derive(Default)]
pub(crate) struct DigestHasher(u64);

impl Hasher for DigestHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some((head, _)) = bytes.split_first_chunk::<8>() {
            self.0 = u64::from_le_bytes(*head);
        }
    }
}

type DigestMap = HashMap<Digest, u32, BuildHasherDefault<DigestHasher>>;

/// The digests of a commit's own blocks.
pub(crate) struct OwnBlocks<'a> {
    disk: &'a dyn Disk,
    pin: &'a Pin,
    table: DigestMap,
    spilled: Vec<Spill>,
    digests: Option<Box<dyn DiskWriter>>,
    limit: usize,
}

struct Spill {
    run: Arc<IndexRun>,
    path: String,
}

impl<'a> OwnBlocks<'a> {
    pub(crate) fn new(disk: &'a dyn Disk, pin: &'a Pin) -> OwnBlocks<'a> {
        OwnBlocks {
            disk,
            pin,
            table: DigestMap::default(),
            spilled: Vec::new(),
            digests: None,
            limit: OWN_BLOCKS_IN_MEMORY,
        }
    }

    /// The slot of a block with this digest.
    pub(crate) fn find(&self, digest: &Digest) -> Result<Option<u32>> {
        if let Some(&slot) = self.table.get(digest) {
            return Ok(Some(slot));
        }
        if self.spilled.is_empty() {
            return Ok(None);
        }
        let mut slots = Vec::new();
        for spill in &self.spilled {
            spill.run.lookup(digest, &mut |hit| slots.push(hit.slot))?;
        }
        if slots.is_empty() {
            return Ok(None);
        }
        let path = self.digests_path();
        let file = self.disk.open(&path).context(|| format!("cannot read {path}"))?;
        for slot in slots {
            let mut found = [0; 16];
            file.read_exact_at(&mut found, u64::from(slot) * 16)
                .context(|| format!("cannot read {path}"))?;
            if found == digest.0 {
                return Ok(Some(slot));
            }
        }
        Ok(None)
    }

    /// Adds the next block.
    pub(crate) fn insert(&mut self, digest: Digest, slot: u32) -> Result<()> {
        self.table.insert(digest, slot);
        if self.table.len() >= self.limit { self.spill() } else { Ok(()) }
    }

    /// Writes everything as an index run of `pack` and returns its bytes. With nothing to write
    /// the run still says that the pack is covered.
    pub(crate) fn write_run(&mut self, path: &str, pack: PackId) -> Result<u64> {
        let rows = sorted(&self.table);
        let spilled: u64 = self.spilled.iter().map(|spill| spill.run.entries()).sum();
        let entries = rows.len() as u64 + spilled;
        let mut writer = RunWriter::create(self.disk, path, entries, &[pack])?;
        let runs: Vec<_> = self.spilled.iter().map(|spill| Arc::clone(&spill.run)).collect();
        let mut rows = rows.into_iter().peekable();
        crate::index::for_each_merged(&runs, &mut |prefix, hit| {
            while let Some((own, slot)) = rows.next_if(|&(own, _)| own <= prefix) {
                writer.push(own, IndexHit { pack, slot })?;
            }
            writer.push(prefix, IndexHit { pack, slot: hit.slot })
        })?;
        for (prefix, slot) in rows {
            writer.push(prefix, IndexHit { pack, slot })?;
        }
        writer.finish()
    }

    fn spill(&mut self) -> Result<()> {
        let digests_path = self.digests_path();
        if self.digests.is_none() {
            let file = self.disk.create(&digests_path);
            self.digests = Some(file.context(|| format!("cannot make {digests_path}"))?);
        }
        let mut by_slot: Vec<(u32, Digest)> =
            self.table.iter().map(|(&digest, &slot)| (slot, digest)).collect();
        by_slot.sort_unstable();
        // Every block that is stored gets the next slot, so these run on from the last spill.
        let bytes: Vec<u8> = by_slot.iter().flat_map(|(_, digest)| digest.0).collect();
        if let Some(file) = &mut self.digests {
            file.write_all(&bytes).context(|| format!("cannot write {digests_path}"))?;
        }
        let path = self.pin.tmp_path(&format!("own{}", self.spilled.len()));
        let mut writer =
            RunWriter::create(self.disk, &path, self.table.len() as u64, &[PackId::SELF])?;
        for (prefix, slot) in sorted(&self.table) {
            writer.push(prefix, IndexHit { pack: PackId::SELF, slot })?;
        }
        writer.finish()?;
        let run = Arc::new(IndexRun::open(self.disk, &path, u64::MAX)?);
        self.spilled.push(Spill { run, path });
        self.table.clear();
        Ok(())
    }

    fn digests_path(&self) -> String {
        self.pin.tmp_path("digests")
    }
}

impl Drop for OwnBlocks<'_> {
    fn drop(&mut self) {
        let digests = self.digests.is_some().then(|| self.digests_path());
        let paths = self.spilled.iter().map(|spill| spill.path.clone()).chain(digests);
        for path in paths {
            // What cannot be removed now is swept by the next collection.
            if let Err(error) = self.disk.remove(&path) {
                tracing::debug!(path, %error, "temporary file left");
            }
        }
    }
}

fn sorted(table: &DigestMap) -> Vec<(u64, u32)> {
    let mut rows: Vec<(u64, u32)> =
        table.iter().map(|(digest, &slot)| (digest.prefix(), slot)).collect();
    rows.sort_unstable();
    rows
}
