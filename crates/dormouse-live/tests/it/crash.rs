//! Power cuts at every single operation of short histories.

use std::io;

use dormouse_live::overlay::ZeroBlocks;
use dormouse_testkit::sim_disk::LastStep;
use dormouse_testkit::sim_files::SimFolder;

use crate::model::Bench;
use crate::model::Op::{self, Commit, FailCommit, Flush, Seal, Trim, Write, WriteMixed, Zero};

const B: usize = 4096;

fn write(block: usize, blocks: usize) -> Op {
    Write { at: block * B, len: blocks * B }
}

fn small(at: usize) -> Op {
    Write { at, len: 700 }
}

#[test]
fn cuts_of_flushes() {
    let history = [write(0, 3), small(9000), Flush, write(1, 1), small(9100), Flush, small(9100)];
    cut_everywhere(&history, 8);
}

#[test]
fn cuts_of_zeros_over_data_over_zeros() {
    let history = [
        write(0, 8),
        Flush,
        Trim { at: 100, len: 3 * B },
        Flush,
        small(2 * B),
        WriteMixed { at: 0, len: 8 * B },
        Flush,
        Zero { at: B, len: 2 * B, keep: true },
        Zero { at: 4 * B, len: 2 * B, keep: false },
        small(5 * B + 300),
        Flush,
    ];
    cut_everywhere(&history, 25);
}

#[test]
fn cuts_of_a_commit() {
    let history = [
        write(0, 4),
        Flush,
        write(2, 4),
        Seal,
        write(3, 1),
        small(0),
        Trim { at: 5 * B, len: B },
        Flush,
        Commit,
        small(3 * B),
        Flush,
        Seal,
        Commit,
    ];
    cut_everywhere(&history, 40);
}

#[test]
fn cuts_of_failed_commits() {
    let history = [
        write(0, 4),
        Seal,
        FailCommit,
        write(2, 4),
        Flush,
        Seal,
        Trim { at: 2 * B, len: B },
        FailCommit,
        small(3 * B),
        Seal,
        Commit,
        Flush,
    ];
    cut_everywhere(&history, 40);
}

#[test]
fn cuts_of_a_log_that_is_written_anew() {
    let there_and_back = |n: usize| [write(n % 3, 2), Flush, Trim { at: B, len: 2 * B }, Flush];
    let history: Vec<Op> = (0..8).flat_map(there_and_back).collect();
    // Seven operations each, and six for a log in between.
    cut_everywhere(&history, 8 * 7 + 6);
}

/// The layers that are too many are folded into older ones.
#[test]
fn cuts_of_more_seals_than_layers() {
    let zero = |n: usize| Trim { at: (n + 1) * B, len: B };
    let seals = (0..9).flat_map(|n| [write(n, 2), zero(n), small(n * 9000), Seal, FailCommit]);
    let history: Vec<Op> = seals.chain([Flush, Seal, write(1, 1), Commit]).collect();
    cut_everywhere(&history, 100);
}

/// A process is killed at each operation of the medium in turn; another one opens the disk, flushes
/// a write and says so; then the power is cut.
///
/// The description that a seal had renamed, or a log that had been written anew, was seen by the
/// second process, but its name was not on the medium: nobody had synced the folder. The power cut
/// brought the old file back, and with it the disk without what had been flushed since.
#[test]
fn names_that_a_killed_process_left_are_made_durable() {
    let there_and_back = |n: usize| [write(n % 3, 2), Flush, Trim { at: B, len: 2 * B }, Flush];
    let compacted: Vec<Op> = (0..4).flat_map(there_and_back).collect();
    let committed = vec![write(0, 4), Flush, write(2, 4), Seal, small(3 * B), Commit, Flush];
    let folded = (0..9).flat_map(|n| [write(n, 2), Seal, FailCommit]).chain([Seal]).collect();
    for history in [compacted, committed, folded] {
        for n in 1.. {
            let folder = SimFolder::new(n);
            let mut bench = Bench::new(folder.clone(), ZeroBlocks::Found).unwrap();
            folder.fail_from(n, io::ErrorKind::Other);
            let is_killed = history.iter().any(|op| bench.run(op).is_err());
            folder.clear_faults();
            bench.run(&Op::Reopen).unwrap();
            bench.run(&write(7, 1)).unwrap();
            bench.run(&small(B)).unwrap();
            bench.run(&Flush).unwrap();
            bench.run(&Op::Cut { survive: 0 }).unwrap();
            bench.check();
            if !is_killed {
                assert!(n > 20, "{n} operations");
                break;
            }
        }
    }
}

/// The process is killed at each operation of its files in turn. What was answered is there, flushed or
/// not; of the request under way each sector is old or new. It is killed once more after some writes,
/// and then the power is cut: what was flushed is there.
#[test]
fn a_killed_process_loses_nothing_that_it_answered() {
    let there_and_back = |n: usize| [write(n % 3, 2), small(n * 900), Trim { at: B, len: 2 * B }];
    let compacted: Vec<Op> = (0..4).flat_map(there_and_back).chain([Flush, small(7)]).collect();
    let committed = vec![
        write(0, 4),
        WriteMixed { at: 0, len: 12 * B },
        Seal,
        small(3 * B),
        Trim { at: B, len: 2 * B },
        Commit,
        Zero { at: 0, len: 3 * B, keep: true },
        Flush,
        write(1, 2),
        Seal,
        write(2, 2),
        FailCommit,
        Trim { at: 0, len: 5 * B },
        small(B + 9),
    ];
    let folded =
        (0..9).flat_map(|n| [write(n, 2), Trim { at: (n + 1) * B, len: B }, Seal, FailCommit]);
    let folded: Vec<Op> = folded.chain([Flush, write(2, 1), Trim { at: B, len: B }]).collect();
    for history in [compacted, committed, folded] {
        for last in [LastStep::Undone, LastStep::Torn, LastStep::Done] {
            for n in 1.. {
                let folder = SimFolder::new(n);
                let mut bench = Bench::new(folder.clone(), ZeroBlocks::Found).unwrap();
                folder.kill_after_with(n, last);
                let mut before = bench.model.now.clone();
                let mut is_killed = false;
                for op in &history {
                    before.clone_from(&bench.model.now);
                    is_killed = bench.run(op).is_err();
                    if is_killed {
                        break;
                    }
                }
                if !is_killed {
                    before.clone_from(&bench.model.now);
                }
                bench.die(&before);
                bench.run(&write(7, 1)).unwrap();
                bench.run(&Trim { at: 0, len: 2 * B }).unwrap();
                bench.run(&Op::Reopen).unwrap();
                bench.run(&small(B)).unwrap();
                bench.run(&Op::Reopen).unwrap();
                bench.run(&Flush).unwrap();
                bench.run(&write(3, 1)).unwrap();
                bench.run(&Op::Cut { survive: n * 8 + n % 2 }).unwrap();
                bench.check();
                if !is_killed {
                    assert!(n > 20, "{n} operations");
                    break;
                }
            }
        }
    }
}

/// Cuts the power at each operation of the medium in turn, of which there are at least `least`.
fn cut_everywhere(history: &[Op], least: u64) {
    for last in [LastStep::Undone, LastStep::Torn, LastStep::Done] {
        let mut n = 1;
        loop {
            let folder = SimFolder::new(n);
            let mut bench = Bench::new(folder.clone(), ZeroBlocks::Found).unwrap();
            folder.cut_after_with(n, last);
            let stopped = history.iter().position(|op| bench.run(op).is_err());
            if !folder.is_off() {
                assert_eq!(stopped, None);
                bench.check();
                break;
            }
            for survive in [0, 1, n * 8 + 4, n * 8 + 5] {
                let mut left = Bench::new(SimFolder::new(0), ZeroBlocks::Found).unwrap();
                left.model = bench.model.clone();
                left.take_medium(&bench);
                left.cut(survive);
                // It works on, and what is flushed from here on stays.
                left.run(&Write { at: 3 * B + 5, len: 2 * B }).unwrap();
                left.run(&Flush).unwrap();
                left.run(&Op::Cut { survive: survive + 8 }).unwrap();
                left.check();
            }
            n += 1;
        }
        assert!(n > least, "{n} operations");
    }
}

/// A disk is there whole or not at all, whenever its making is cut.
#[test]
fn a_cut_while_it_is_made() {
    for n in 1.. {
        let folder = SimFolder::new(n);
        folder.cut_after_with(n, LastStep::Torn);
        let made = Bench::new(folder.clone(), ZeroBlocks::Found);
        let is_whole = made.is_ok();
        drop(made);
        for survive in 0..20 {
            let left = folder.after_power_cut(dormouse_testkit::sim_disk::Survive::Random(survive));
            match dormouse_live::overlay::Overlay::describe(&left) {
                Ok(_) => {
                    let mut bench = Bench::new(SimFolder::new(0), ZeroBlocks::Found).unwrap();
                    bench.folder = left;
                    bench.overlay = None;
                    bench.open().unwrap();
                    bench.check();
                }
                Err(error) => {
                    assert!(!is_whole, "{error}");
                    Bench::new(left, ZeroBlocks::Found).unwrap().check();
                }
            }
        }
        if is_whole {
            return;
        }
    }
}
