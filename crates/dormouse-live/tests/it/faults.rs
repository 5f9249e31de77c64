//! Errors of the medium: who gets them, and when they are over.

use std::io;
use std::sync::Arc;

use dormouse_live::error::{Error, ErrorKind};
use dormouse_live::overlay::{Overlay, OverlayConfig, ZeroBlocks, Zeroing};
use dormouse_testkit::sim_disk::LastStep;
use dormouse_testkit::sim_files::SimFolder;

use crate::model::{Bench, BytesBase, Op, first_base, pattern};

const B: u64 = 4096;

fn bench() -> (SimFolder, Bench) {
    let folder = SimFolder::new(5);
    let bench = Bench::new(folder.clone(), ZeroBlocks::Found).unwrap();
    (folder, bench)
}

fn kind<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorKind {
    result.unwrap_err().kind()
}

fn read(overlay: &Overlay, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    overlay.read_at(&mut bytes, offset).unwrap();
    bytes
}

/// A failed write is told to its request, to every flush and seal after it, and to nobody else;
/// writing all of it again ends that.
#[test]
fn a_failed_write_lasts_until_it_is_written() {
    for error in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        let (folder, bench) = bench();
        let disk = bench.overlay();
        disk.write_at(&pattern(0, 3 * 4096, 1), 0).unwrap();
        disk.flush().unwrap();
        folder.fail_at(1, error);
        let failed = disk.write_at(&pattern(4096, 2 * 4096, 2), B);
        let expected = match error {
            io::ErrorKind::StorageFull => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        assert_eq!(kind(failed), expected);

        disk.write_at(b"elsewhere", 9 * B).unwrap();
        assert_eq!(read(disk, 9 * B, 9), b"elsewhere");
        assert_eq!(kind(disk.flush()), ErrorKind::Unresolved);
        assert_eq!(kind(disk.seal()), ErrorKind::Unresolved);
        assert_eq!(kind(disk.seal()), ErrorKind::Unresolved, "not busy");
        assert_eq!(disk.status().unwrap().failed_ranges, 1);

        disk.write_at(&pattern(0, 4096, 3), 2 * B).unwrap();
        assert_eq!(kind(disk.flush()), ErrorKind::Unresolved, "one block is missing");
        disk.trim(B, B).unwrap();
        disk.flush().unwrap();
        disk.seal().unwrap();
        assert_eq!(read(disk, 0, 4096), pattern(0, 4096, 1));
    }
}

/// Work that was done in spite of a failure is durable: the flush that reports it does its work.
#[test]
fn a_flush_that_reports_a_failure_flushes_all_else() {
    let (folder, mut bench) = bench();
    let disk = bench.overlay();
    folder.fail_at(1, io::ErrorKind::Other);
    disk.write_at(&[1; 4096], 0).unwrap_err();
    disk.write_at(b"kept", 9 * B).unwrap();
    assert_eq!(kind(disk.flush()), ErrorKind::Unresolved);
    bench.overlay = None;
    bench.folder = folder.after_power_cut(dormouse_testkit::sim_disk::Survive::Nothing);
    bench.open().unwrap();
    assert_eq!(read(bench.overlay(), 9 * B, 4), b"kept");
    assert_eq!(read(bench.overlay(), 0, 4096), first_base()[..4096]);
}

/// A full file system: overwriting goes on, new blocks fail, discarding makes it whole again.
#[test]
fn a_full_file_system() {
    let (folder, bench) = bench();
    let disk = bench.overlay();
    disk.write_at(&pattern(0, 8 * 4096, 1), 0).unwrap();
    folder.fail_from(1, io::ErrorKind::StorageFull);
    assert_eq!(kind(disk.write_at(&pattern(0, 4096, 1), 20 * B)), ErrorKind::NoSpace);
    assert_eq!(kind(disk.flush()), ErrorKind::NoSpace, "the states cannot be written");
    assert_eq!(kind(disk.seal()), ErrorKind::Unresolved);
    disk.trim(0, 8 * B).unwrap();
    disk.trim(20 * B, B).unwrap();
    folder.clear_faults();
    disk.flush().unwrap();
    assert_eq!(read(disk, 0, 4096), [0; 4096]);
    let sealed = disk.seal().unwrap();
    drop(sealed);
}

/// A seal that finds no room leaves the disk as it was, and the next one works.
#[test]
fn a_seal_without_room() {
    for n in 1..12 {
        let (folder, mut bench) = bench();
        bench.run(&Op::Write { at: 100, len: 9000 }).unwrap();
        folder.fail_at(n, io::ErrorKind::StorageFull);
        let failed = bench.run(&Op::Seal);
        folder.clear_faults();
        bench.check();
        bench.run(&Op::Write { at: 4000, len: 9000 }).unwrap();
        if failed.is_err() {
            bench.run(&Op::Seal).unwrap();
        }
        bench.run(&Op::Commit).unwrap();
        bench.check();
        bench.run(&Op::Flush).unwrap();
        bench.run(&Op::Cut { survive: 0 }).unwrap();
        bench.check();
    }
}

/// After a failed sync nothing but reading works until the disk is opened again, and then it
/// shows what really is there.
#[test]
fn a_failed_sync_poisons() {
    // After the file of notes that is begun: the data, and the states.
    for n in [2, 4] {
        let (folder, mut bench) = bench();
        bench.run(&Op::Write { at: 0, len: 9000 }).unwrap();
        bench.run(&Op::Flush).unwrap();
        bench.run(&Op::Write { at: 4096, len: 20_000 }).unwrap();
        folder.fail_at(n, io::ErrorKind::Other);
        bench.run(&Op::Flush).unwrap_err();
        let disk = bench.overlay();
        assert_eq!(kind(disk.flush()), ErrorKind::Poisoned);
        assert_eq!(kind(disk.seal()), ErrorKind::Poisoned);
        assert_eq!(kind(disk.write_at(b"x", 0)), ErrorKind::Poisoned);
        assert_eq!(kind(disk.write_zeroes(0, B, Zeroing::Free)), ErrorKind::Poisoned);
        assert!(disk.status().unwrap().is_poisoned);
        bench.check();
        bench.run(&Op::Reopen).unwrap();
        bench.run(&Op::Flush).unwrap();
        for survive in 0..8 {
            bench.run(&Op::Cut { survive }).unwrap();
        }
        bench.check();
    }
}

/// Bytes of a layer that cannot be read hold up flushes until they can, or are replaced.
#[test]
fn a_failed_read_of_a_layer() {
    let (folder, bench) = bench();
    let disk = bench.overlay();
    disk.write_at(&pattern(0, 4 * 4096, 1), 0).unwrap();
    disk.flush().unwrap();
    folder.break_range("1.data", 4096..4097).unwrap();
    let mut buf = vec![0; 4096];
    assert_eq!(kind(disk.read_at(&mut buf, B)), ErrorKind::Io);
    disk.read_at(&mut buf, 0).unwrap();
    assert_eq!(kind(disk.flush()), ErrorKind::Unresolved);
    folder.mend();
    disk.read_at(&mut buf, B).unwrap();
    disk.flush().unwrap();

    folder.break_range("1.data", 4096..4097).unwrap();
    disk.read_at(&mut buf, B).unwrap_err();
    disk.write_at(&buf, B).unwrap();
    disk.flush().unwrap();
}

/// A base that cannot be read fails reads and copies of it; only the latter are remembered.
#[test]
fn a_failed_read_of_the_base() {
    #[derive(Debug)]
    struct Broken;
    impl dormouse_live::base::Base for Broken {
        fn size_bytes(&self) -> u64 {
            8 * B
        }
        fn read_at(&self, _: &mut [u8], _: u64) -> Result<(), Error> {
            Err(Error::io("cannot read the base", io::Error::other("gone")))
        }
        fn for_each_run(
            &self,
            _: std::ops::Range<u64>,
            _: &mut dyn FnMut(
                std::ops::Range<u64>,
                dormouse_live::base::RunKind,
            ) -> Result<(), Error>,
        ) -> Result<(), Error> {
            Ok(())
        }
    }
    let new = dormouse_live::overlay::NewOverlay {
        size_bytes: 16 * B,
        base: Arc::new(Broken),
        base_label: String::new(),
    };
    let folder = Arc::new(SimFolder::new(1));
    let disk = Overlay::create(folder, new, OverlayConfig::STANDARD).unwrap();
    assert_eq!(kind(disk.read_at(&mut [0; 10], 0)), ErrorKind::Io);
    disk.read_at(&mut [0; 10], 8 * B).unwrap();
    disk.write_at(&[1; 8192], 0).unwrap();
    disk.flush().unwrap();
    assert_eq!(kind(disk.write_at(b"part", 2 * B)), ErrorKind::Io);
    assert_eq!(kind(disk.flush()), ErrorKind::Unresolved);
    disk.write_at(&[1; 4096], 2 * B).unwrap();
    disk.flush().unwrap();
}

/// Somebody cuts the file: reads of lost bytes fail, and the next flush and seal do, although
/// later writes make the file longer again. Until that flush what was lost read as zeros, and a
/// part of a lost block could be written, which made zeros of the rest.
#[test]
fn a_file_cut_short() {
    let (folder, mut bench) = bench();
    let disk = bench.overlay();
    disk.write_at(&pattern(0, 4 * 4096, 1), 0).unwrap();
    disk.flush().unwrap();
    folder.truncate("1.data", B).unwrap();
    assert_eq!(read(disk, 0, 4096), pattern(0, 4096, 1));
    assert_eq!(kind(disk.write_at(&[1; 4096], 40 * B)), ErrorKind::Corrupt);
    for lost in [B, 3 * B] {
        assert_eq!(kind(disk.read_at(&mut [0; 10], lost)), ErrorKind::Corrupt);
    }
    assert_eq!(kind(disk.flush()), ErrorKind::Poisoned);
    assert_eq!(kind(disk.seal()), ErrorKind::Poisoned);

    let (folder, third) = self::bench();
    let disk = third.overlay();
    disk.write_at(&pattern(0, 4 * 4096, 1), 0).unwrap();
    folder.truncate("1.data", B).unwrap();
    assert_eq!(kind(disk.write_at(b"part", 2 * B)), ErrorKind::Corrupt);
    assert_eq!(kind(disk.flush()), ErrorKind::Corrupt);
    assert_eq!(kind(disk.flush()), ErrorKind::Poisoned);

    let (folder, other) = self::bench();
    let disk = other.overlay();
    disk.write_at(&pattern(0, 4 * 4096, 1), 0).unwrap();
    folder.truncate("1.data", B).unwrap();
    assert_eq!(kind(disk.read_at(&mut [0; 10], 2 * B)), ErrorKind::Corrupt);
    assert_eq!(kind(disk.seal()), ErrorKind::Poisoned);

    bench.overlay = None;
    assert_eq!(kind(bench.open()), ErrorKind::Corrupt, "a cut file is not opened");
}

/// Every operation of the medium fails once: the disk reads as before or after, and what is
/// flushed at the end is there.
#[test]
fn any_operation_may_fail_once() {
    let history = [
        Op::Write { at: 3000, len: 9000 },
        Op::WriteMixed { at: 0, len: 9 * 4096 },
        Op::Flush,
        Op::Trim { at: 4096, len: 4096 },
        Op::Seal,
        Op::Write { at: 5000, len: 100 },
        Op::Flush,
    ];
    for n in 1..40 {
        let (folder, mut bench) = bench();
        folder.fail_at(n, io::ErrorKind::Other);
        let mut failed = false;
        for op in &history {
            failed |= bench.run(op).is_err();
        }
        folder.clear_faults();
        // Whatever failed is written again; a poisoned disk is opened again.
        if bench.overlay().status().unwrap().is_poisoned {
            bench.run(&Op::Reopen).unwrap();
        }
        bench.run(&Op::Write { at: 0, len: 10 * 4096 }).unwrap();
        bench.run(&Op::Flush).unwrap();
        bench.check();
        bench.run(&Op::Cut { survive: n }).unwrap();
        bench.check();
        assert!(failed || n > 10);
    }
}

#[test]
fn what_is_refused() {
    let (folder, bench) = bench();
    let disk = bench.overlay();
    let size = disk.size_bytes();
    for (offset, len) in [(size, 1), (size - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 2)] {
        let mut buf = vec![0; usize::try_from(len).unwrap()];
        assert_eq!(kind(disk.read_at(&mut buf, offset)), ErrorKind::InvalidInput);
        assert_eq!(kind(disk.write_at(&buf, offset)), ErrorKind::InvalidInput);
        assert_eq!(kind(disk.trim(offset, len)), ErrorKind::InvalidInput);
    }
    disk.flush().unwrap();
    let again = Overlay::open(Arc::new(folder.clone()), OverlayConfig::STANDARD, |_| {
        Ok(Arc::new(BytesBase(Vec::new())))
    });
    assert_eq!(kind(again), ErrorKind::Busy);
    let sealed = disk.seal().unwrap();
    assert_eq!(kind(disk.seal()), ErrorKind::Busy);
    let larger = Arc::new(BytesBase(vec![0; usize::try_from(size).unwrap() + 1]));
    assert_eq!(kind(disk.rebase(sealed, larger, "x")), ErrorKind::InvalidInput);
    disk.seal().unwrap();
    drop(bench);
    let again = Bench::new(folder.clone(), ZeroBlocks::Found);
    assert_eq!(again.err().map(|error| error.kind()), Some(ErrorKind::AlreadyExists));
    folder.cut_after_with(0, LastStep::Undone);
}
