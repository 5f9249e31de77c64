//! The blocks that this very commit stored: found again by digest, in bounded memory.
//!
//! The newest [`OWN_BLOCKS_IN_MEMORY`] are in a table; older ones are spilled to temporary files as
//! index runs, beside a file of all digests in the order of their slots, by which a hit is checked.

use std::sync::Arc;

use dormouse_image::digest::Digest;
use dormouse_image::pack::PackId;
use hashbrown::HashTable;

use crate::disk::{Disk, DiskWriter};
use crate::error::{Context, Result};
use crate::index::{IndexHit, IndexRun, RunWriter};
use crate::pin::Pin;

/// New blocks whose digests are kept in memory: 3.5 GiB of new blocks take 19 MiB, and 4 MiB more while
/// they are put in order. One more, and the table would be twice as large.
pub(crate) const OWN_BLOCKS_IN_MEMORY: usize = (1 << 20) / 8 * 7;

/// Digests that are written at once.
const DIGESTS_AT_ONCE: usize = 4096;

/// The digests of a commit's own blocks.
pub(crate) struct OwnBlocks<'a> {
    disk: &'a dyn Disk,
    pin: &'a Pin,
    /// Those in memory, in the order of their slots.
    newest: Vec<Digest>,
    /// The slot of the first of them.
    first_slot: u32,
    /// Their places there, found by digest, which is spread evenly as it is.
    table: HashTable<u32>,
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
            newest: Vec::new(),
            first_slot: 0,
            table: HashTable::new(),
            spilled: Vec::new(),
            digests: None,
            limit: OWN_BLOCKS_IN_MEMORY,
        }
    }

    /// The slot of a block with this digest.
    pub(crate) fn find(&self, digest: &Digest) -> Result<Option<u32>> {
        let newest = &self.newest;
        if let Some(at) = self.table.find(digest.prefix(), |&at| newest[at as usize] == *digest) {
            return Ok(Some(self.first_slot + at));
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
        let at = slot - self.first_slot;
        debug_assert_eq!(at as usize, self.newest.len(), "every block gets the next slot");
        self.newest.push(digest);
        let newest = &self.newest;
        self.table.insert_unique(digest.prefix(), at, |&at| newest[at as usize].prefix());
        if self.newest.len() >= self.limit { self.spill() } else { Ok(()) }
    }

    /// Writes everything as an index run of `pack` and returns its bytes. With nothing to write
    /// the run still says that the pack is covered.
    pub(crate) fn write_run(&mut self, path: &str, pack: PackId) -> Result<u64> {
        let places = self.sorted();
        let spilled: u64 = self.spilled.iter().map(|spill| spill.run.entries()).sum();
        let entries = places.len() as u64 + spilled;
        let mut writer = RunWriter::create(self.disk, path, entries, &[pack])?;
        let runs: Vec<_> = self.spilled.iter().map(|spill| Arc::clone(&spill.run)).collect();
        let mut rows = places.into_iter().map(|at| self.row(at)).peekable();
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
        if let Some(file) = &mut self.digests {
            for digests in self.newest.chunks(DIGESTS_AT_ONCE) {
                let bytes: Vec<u8> = digests.iter().flat_map(|digest| digest.0).collect();
                file.write_all(&bytes).context(|| format!("cannot write {digests_path}"))?;
            }
        }
        let path = self.pin.tmp_path(&format!("own{}", self.spilled.len()));
        let mut writer =
            RunWriter::create(self.disk, &path, self.newest.len() as u64, &[PackId::SELF])?;
        for (prefix, slot) in self.sorted().into_iter().map(|at| self.row(at)) {
            writer.push(prefix, IndexHit { pack: PackId::SELF, slot })?;
        }
        writer.finish()?;
        let run = Arc::new(IndexRun::open(self.disk, &path, u64::MAX)?);
        self.spilled.push(Spill { run, path });
        self.first_slot += u32::try_from(self.newest.len()).expect("slots have 32 bits");
        self.newest.clear();
        self.table.clear();
        Ok(())
    }

    /// Places of those in memory, in the order of an index run.
    fn sorted(&self) -> Vec<u32> {
        let mut places: Vec<u32> = self.table.iter().copied().collect();
        places.sort_unstable_by_key(|&at| (self.newest[at as usize].prefix(), at));
        places
    }

    fn row(&self, at: u32) -> (u64, u32) {
        (self.newest[at as usize].prefix(), self.first_slot + at)
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

#[cfg(test)]
mod tests {
    use dormouse_image::digest::DomainKey;

    use super::*;
    use crate::disk::RealDisk;
    use crate::layout::TMP;

    /// In memory, spilled, and in the run at last: each digest leads to its slot.
    #[test]
    fn blocks_are_found_wherever_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(dir.path()));
        for folder in [TMP, "pins"] {
            disk.create_dir_all(folder).unwrap();
        }
        let pin = Pin::new(&disk, "a test").unwrap();
        let key = DomainKey::new([7; 32]);
        let digest = |number: u32| key.digest(&[number.to_le_bytes(); 1024].concat());
        let mut own = OwnBlocks::new(&*disk, &pin);
        own.limit = 10;
        for slot in 0..37 {
            assert_eq!(own.find(&digest(slot)).unwrap(), None);
            own.insert(digest(slot), slot).unwrap();
            for earlier in 0..=slot {
                assert_eq!(own.find(&digest(earlier)).unwrap(), Some(earlier), "of {slot}");
            }
        }
        assert_eq!((own.spilled.len(), own.newest.len()), (3, 7));
        let pack = PackId::SELF;
        own.write_run("tmp/run", pack).unwrap();
        let run = IndexRun::open(&*disk, "tmp/run", u64::MAX).unwrap();
        assert_eq!(run.entries(), 37);
        for slot in 0..37 {
            let mut hits = Vec::new();
            run.lookup(&digest(slot), &mut |hit| hits.push(hit)).unwrap();
            assert_eq!(hits, [IndexHit { pack, slot }]);
        }
        drop(own);
        let left = std::fs::read_dir(dir.path().join(TMP)).unwrap().count();
        assert_eq!(left, 1, "the run alone is left");
    }
}
