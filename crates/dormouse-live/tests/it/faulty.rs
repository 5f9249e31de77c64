//! Random histories on a medium whose operations fail at times, and whose files are cut short.
//!
//! Each failure must reach the request that met it. Of that request's bytes each sector is old or
//! new, all others are what they were; flushes and seals fail until it is made good by writing
//! again, or by opening the disk again where nothing else helps.

use std::io;

use dormouse_live::error::ErrorKind;
use dormouse_live::overlay::{Overlay, ZeroBlocks};
use dormouse_testkit::sim_files::SimFolder;
use proptest::prelude::*;

use crate::model::{Bench, Op, SIZE, op};

const SECTOR: usize = 512;

#[derive(Clone, Copy, Debug)]
struct Fault {
    /// Which of the medium's operations fails, counted from the beginning of the request.
    after: u64,
    kind: io::ErrorKind,
    /// Whether all that follow fail, too, until the request has ended.
    lasts: bool,
}

fn fault() -> impl Strategy<Value = Option<Fault>> {
    let kind = prop_oneof![Just(io::ErrorKind::Other), Just(io::ErrorKind::StorageFull)];
    let fault = (1..20_u64, kind, prop::bool::weighted(0.3));
    prop::option::weighted(0.4, fault.prop_map(|(after, kind, lasts)| Fault { after, kind, lasts }))
}

/// The bytes that a request writes, if it writes any.
fn range(op: &Op) -> Option<(usize, usize)> {
    match *op {
        Op::Write { at, len }
        | Op::WriteZeroBytes { at, len }
        | Op::WriteMixed { at, len }
        | Op::Zero { at, len, .. }
        | Op::Trim { at, len }
        | Op::Durably { at, len } => Some((at, len)),
        Op::Flush | Op::Seal | Op::Commit | Op::FailCommit | Op::Reopen | Op::Cut { .. } => None,
    }
}

/// Checks a disk on which `op` failed, and makes the failure good.
fn recover(bench: &mut Bench, op: &Op, before: &[u8]) {
    if bench.overlay.is_none() {
        // It could not be opened, which a second try can.
        bench.open().unwrap();
        let left = bench.read_all();
        return bench.adopt(&left, "a second opening");
    }
    let left = bench.read_all();
    let written = range(op).map_or(0..0, |(at, len)| at..at + len);
    for (sector, bytes) in left.chunks(SECTOR).enumerate() {
        let at = sector * SECTOR;
        let is_touched = written.start < at + bytes.len() && at < written.end;
        let is_old = *bytes == before[at..at + bytes.len()];
        let is_new = *bytes == bench.model.now[at..at + bytes.len()];
        assert!(is_new || is_touched && is_old, "sector {sector} after a failed {op:?}");
    }
    bench.adopt(&left, "a failed request");
    if bench.overlay().status().unwrap().is_poisoned {
        let refused = [bench.overlay().flush(), bench.overlay().write_at(b"x", 0)];
        for refused in refused {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Poisoned);
        }
        return bench.run(&Op::Reopen).unwrap();
    }
    let (Op::Write { .. } | Op::WriteZeroBytes { .. } | Op::WriteMixed { .. }, Some((at, len))) =
        (op, range(op))
    else {
        // Whatever it was works now; writing everything makes good what zeroing may have left.
        if range(op).is_some() {
            bench.run(&Op::Write { at: 0, len: SIZE }).unwrap();
        }
        return bench.run(&Op::Flush).unwrap();
    };
    assert_eq!(bench.overlay().flush().unwrap_err().kind(), ErrorKind::Unresolved, "{op:?}");
    if !bench.overlay().status().unwrap().is_committing {
        assert_eq!(bench.overlay().seal().unwrap_err().kind(), ErrorKind::Unresolved);
    }
    bench.run(&Op::Write { at, len }).unwrap();
    bench.run(&Op::Flush).unwrap();
}

/// Somebody cuts a layer's file: no other bytes than the model's are ever read, and nothing that
/// promises durability succeeds any more.
fn cut_short(bench: &mut Bench, which: usize, at: u64) {
    // A failed seal may have described a layer that the open disk does not have.
    bench.run(&Op::Reopen).unwrap();
    let layers = Overlay::describe(&bench.folder).unwrap().layers;
    let number = layers[which % layers.len()];
    let len = (SIZE.div_ceil(4096) + 1) as u64 * 4096;
    bench.folder.truncate(&format!("{number}.data"), at % len).unwrap();
    let mut bytes = [0; 4096];
    for (block, expected) in bench.model.now.chunks(4096).enumerate() {
        let bytes = &mut bytes[..expected.len()];
        match bench.overlay().read_at(bytes, block as u64 * 4096) {
            Ok(()) => assert!(bytes == expected, "block {block} of a cut file"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt),
        }
    }
    // A write fails that is to that file; it makes the file longer and nothing of it zeros.
    let block = bench.model.now.len() / 4096 / 2;
    let _ = bench.overlay().write_at(&[7; 4096], block as u64 * 4096);
    for (at, expected) in bench.model.now.chunks(4096).enumerate() {
        let bytes = &mut bytes[..expected.len()];
        if at != block && bench.overlay().read_at(bytes, at as u64 * 4096).is_ok() {
            assert!(bytes == expected, "block {at} of a file that was cut and grew");
        }
    }
    assert!(bench.overlay().flush().is_err());
    assert!(bench.overlay().seal().is_err());
    assert_eq!(bench.overlay().write_at(&bytes, 0).unwrap_err().kind(), ErrorKind::Poisoned);
    bench.forget();
    assert_eq!(bench.open().unwrap_err().kind(), ErrorKind::Corrupt);
}

/// After a sync that failed notes are void, and those of the next life begin anew, with the same first
/// number: what is left of the first ones must not be read as theirs.
#[test]
fn forgotten_notes_do_not_come_back() {
    let mut bench = Bench::new(SimFolder::new(3), ZeroBlocks::Written).unwrap();
    for block in [3, 5, 7] {
        bench.run(&Op::Write { at: block * 4096, len: 4096 }).unwrap();
    }
    // The other file of notes is begun first.
    bench.folder.fail_at(2, io::ErrorKind::Other);
    assert!(bench.run(&Op::Flush).is_err());
    bench.folder.clear_faults();
    assert!(bench.overlay().status().unwrap().is_poisoned);
    bench.run(&Op::Reopen).unwrap();
    bench.run(&Op::Write { at: 20 * 4096, len: 4096 }).unwrap();
    // It looks at all of the disk.
    bench.run(&Op::Reopen).unwrap();
    bench.check();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_history_with_failures_loses_nothing(
        ops in prop::collection::vec((op(), fault()), 1..50),
        found in any::<bool>(),
        seed in any::<u64>(),
        cut in prop::option::weighted(0.5, (any::<usize>(), any::<u64>())),
    ) {
        let zero_blocks = if found { ZeroBlocks::Found } else { ZeroBlocks::Written };
        let mut bench = Bench::new(SimFolder::new(seed), zero_blocks).unwrap();
        for (op, fault) in &ops {
            let before = bench.model.now.clone();
            match *fault {
                // A power cut is a failure of its own.
                Some(_) if matches!(op, Op::Cut { .. }) => {}
                Some(Fault { after, kind, lasts: true }) => bench.folder.fail_from(after, kind),
                Some(Fault { after, kind, lasts: false }) => bench.folder.fail_at(after, kind),
                None => {}
            }
            let result = bench.run(op);
            bench.folder.clear_faults();
            match result {
                Ok(()) => {}
                Err(error) => {
                    prop_assert!(fault.is_some(), "{op:?}: {error}");
                    recover(&mut bench, op, &before);
                }
            }
            bench.check();
        }
        bench.run(&Op::Flush).unwrap();
        match cut {
            Some((which, at)) => cut_short(&mut bench, which, at),
            None => {
                bench.run(&Op::Cut { survive: seed }).unwrap();
                bench.check();
            }
        }
    }
}
