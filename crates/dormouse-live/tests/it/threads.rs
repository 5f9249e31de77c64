//! Writers, readers, flushes, seals and rebases at once.
//!
//! Each writer owns every eighth block and writes its number and a version that only rises. A
//! reader may therefore see any version that is at least what it saw before, and a seal has
//! for each block a version between those acknowledged before it and those begun before its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dormouse_live::base::BlankBase;
use dormouse_live::files::RealFolder;
use dormouse_live::overlay::{NewOverlay, Overlay, OverlayConfig, Sealed, SealedRun};

use crate::model::BytesBase;

const WRITERS: usize = 8;
const BLOCKS: usize = 1024;
const HALF: usize = 2048;

/// Half a block, so that two writes make a block and the other half has to be kept.
fn half(block: usize, version: u64) -> [u8; HALF] {
    let mut bytes = [0; HALF];
    if version > 0 {
        bytes.as_chunks_mut::<16>().0.iter_mut().for_each(|chunk| {
            chunk[..8].copy_from_slice(&(block as u64 + 1).to_le_bytes());
            chunk[8..].copy_from_slice(&version.to_le_bytes());
        });
    }
    bytes
}

/// The lowest versions of both halves, as two may meet in one while it is written; panics if a
/// byte is somebody else's.
fn versions(block: usize, bytes: &[u8]) -> [u64; 2] {
    [0, 1].map(|index| {
        let part = &bytes[index * HALF..(index + 1) * HALF];
        let version = |chunk: &[u8; 16]| {
            let number = u64::from_le_bytes(*chunk.first_chunk().unwrap());
            let version = u64::from_le_bytes(*chunk.last_chunk().unwrap());
            let expected = if version == 0 { 0 } else { block as u64 + 1 };
            assert_eq!(number, expected, "another block's bytes in block {block}");
            version
        };
        part.as_chunks::<16>().0.iter().map(version).min().unwrap()
    })
}

/// Ends the others when a thread ends, by a panic above all.
struct StopAll<'a>(&'a AtomicBool);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn content(sealed: &Sealed, below: &[u8]) -> Vec<u8> {
    let mut content = below.to_vec();
    sealed
        .for_each_run(&mut |range, run| {
            let bytes = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            match run {
                SealedRun::Zero => content[bytes].fill(0),
                SealedRun::Dirty => sealed.read_at(&mut content[bytes], range.start)?,
            }
            Ok(())
        })
        .unwrap();
    content
}

#[test]
fn seals_are_of_one_moment_and_lose_nothing() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let new = NewOverlay {
        size_bytes: (BLOCKS * 4096) as u64,
        base: Arc::new(BlankBase),
        base_label: "0".to_owned(),
    };
    let disk =
        Overlay::create(Arc::new(RealFolder::new(folder.path())), new, OverlayConfig::STANDARD)
            .unwrap();
    let slots = || (0..2 * BLOCKS).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
    let (begun, done) = (slots(), slots());
    let stop = AtomicBool::new(false);
    let mut last_base = vec![0; BLOCKS * 4096];
    let mut commits = 0;
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (disk, begun, done, stop) = (&disk, &begun, &done, &stop);
            scope.spawn(move || {
                let _stop = StopAll(stop);
                let mut seed = writer as u64;
                let mut version = 0;
                while !stop.load(Ordering::Relaxed) {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
                    let slot = (seed >> 33) as usize % (2 * BLOCKS / WRITERS) * WRITERS + writer;
                    let block = slot / 2;
                    version += 1;
                    begun[slot].store(version, Ordering::SeqCst);
                    disk.write_at(&half(block, version), (slot * HALF) as u64).unwrap();
                    done[slot].store(version, Ordering::SeqCst);
                    if version % 64 == 0 {
                        disk.flush().unwrap();
                    }
                }
            });
        }
        for _ in 0..2 {
            let (disk, begun, done, stop) = (&disk, &begun, &done, &stop);
            scope.spawn(move || {
                let _stop = StopAll(stop);
                let mut bytes = vec![0; 64 * 4096];
                let mut at = 0;
                while !stop.load(Ordering::Relaxed) {
                    at = (at + 37) % (BLOCKS - 64);
                    let load = |all: &[AtomicU64]| -> Vec<u64> {
                        all[2 * at..2 * at + 128]
                            .iter()
                            .map(|slot| slot.load(Ordering::SeqCst))
                            .collect()
                    };
                    let low = load(done);
                    disk.read_at(&mut bytes, (at * 4096) as u64).unwrap();
                    let high = load(begun);
                    for (index, block) in bytes.chunks(4096).enumerate() {
                        for (half, seen) in versions(at + index, block).into_iter().enumerate() {
                            let slot = 2 * index + half;
                            assert!((low[slot]..=high[slot]).contains(&seen), "read of {at}");
                        }
                    }
                }
            });
        }
        let _stop = StopAll(&stop);
        let end = Instant::now() + Duration::from_secs(4);
        while Instant::now() < end {
            let low: Vec<u64> = done.iter().map(|slot| slot.load(Ordering::SeqCst)).collect();
            let sealed = disk.seal().unwrap();
            let high: Vec<u64> = begun.iter().map(|slot| slot.load(Ordering::SeqCst)).collect();
            std::thread::sleep(Duration::from_millis(commits % 5));
            let first = content(&sealed, &last_base);
            for (block, bytes) in first.chunks(4096).enumerate() {
                for (half, seen) in versions(block, bytes).into_iter().enumerate() {
                    let slot = 2 * block + half;
                    assert!((low[slot]..=high[slot]).contains(&seen), "seal of block {block}");
                }
            }
            assert!(content(&sealed, &last_base) == first, "a sealed layer changed");
            commits += 1;
            if commits % 3 == 0 {
                continue;
            }
            last_base.clone_from(&first);
            disk.rebase(sealed, Arc::new(BytesBase(first)), &commits.to_string()).unwrap();
        }
    });
    assert!(commits > 10, "{commits} commits");
    let mut all = vec![0; BLOCKS * 4096];
    disk.read_at(&mut all, 0).unwrap();
    for (block, bytes) in all.chunks(4096).enumerate() {
        let expected = [0, 1].map(|half| done[2 * block + half].load(Ordering::SeqCst));
        assert_eq!(versions(block, bytes), expected, "block {block}");
    }
}

/// Disks of one VM were sealed one after the other: a database on the second could be newer than its
/// log on the first. A writer that puts each version on the first before the second never finds the
/// second ahead in what is sealed.
#[test]
fn overlays_sealed_together_are_of_one_moment() {
    const SEALS: usize = 40;
    let dir = tempfile::tempdir().unwrap();
    let disk = |name: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir(&path).unwrap();
        let new = NewOverlay {
            size_bytes: 1 << 20,
            base: Arc::new(BlankBase),
            base_label: String::new(),
        };
        Overlay::create(Arc::new(RealFolder::new(path)), new, OverlayConfig::STANDARD).unwrap()
    };
    let (log, tables) = (disk("log"), disk("tables"));
    let is_over = AtomicBool::new(false);
    let version_of = |sealed: &Sealed| {
        let mut bytes = [0; 8];
        sealed.read_at(&mut bytes, 0).unwrap();
        u64::from_le_bytes(bytes)
    };
    std::thread::scope(|scope| {
        let _stop = StopAll(&is_over);
        scope.spawn(|| {
            let _stop = StopAll(&is_over);
            for version in 1_u64.. {
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
                log.write_at(&version.to_le_bytes(), 0).unwrap();
                tables.write_at(&version.to_le_bytes(), 0).unwrap();
            }
        });
        let mut last = 0;
        for _ in 0..SEALS {
            let sealed = Overlay::seal_together(&[&log, &tables]).unwrap();
            let (logged, stored) = (version_of(&sealed[0]), version_of(&sealed[1]));
            assert!(stored <= logged && logged <= stored + 1, "{stored} of {logged}");
            assert!(logged >= last);
            last = logged;
        }
        assert!(last > 0);
    });
    // One that is being committed keeps all from being sealed, and none is left half sealed.
    let held = tables.seal().unwrap();
    assert!(Overlay::seal_together(&[&log, &tables]).is_err());
    log.write_at(&[7; 4096], 4096).unwrap();
    drop(held);
    let sealed = Overlay::seal_together(&[&log, &tables]).unwrap();
    let mut bytes = [0; 4096];
    sealed[0].read_at(&mut bytes, 4096).unwrap();
    assert_eq!(bytes, [7; 4096]);
}
