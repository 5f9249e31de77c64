//! What a power cut and the other faults leave.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use dormouse_store::disk::{Disk, DiskLock, DiskWriter, LockKind, LockWait};

use super::inode::SECTOR_BYTES;
use super::{LastStep, SimDisk, Survive};

const SEEDS: u64 = 400;

fn write(disk: &SimDisk, path: &str, bytes: &[u8]) -> Box<dyn DiskWriter> {
    let mut file = disk.create(path).unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// The states that `look` sees over many power cuts.
fn outcomes<T: Ord>(disk: &SimDisk, look: impl Fn(&SimDisk) -> T) -> BTreeSet<T> {
    (0..SEEDS).map(|seed| look(&disk.after_power_cut(Survive::Random(seed)))).collect()
}

fn paths(disk: &SimDisk) -> String {
    disk.paths().join(" ")
}

/// Each row: the steps, and every set of names that a power cut may leave.
#[test]
fn names_survive_as_promised() {
    type Steps = fn(&SimDisk) -> io::Result<()>;
    let rows: &[(&str, Steps, &[&str])] = &[
        ("nothing happens", |_| Ok(()), &["a d/b"]),
        ("create", |disk| disk.create("x").map(drop), &["a d/b", "a d/b x"]),
        (
            "create, synced",
            |disk| {
                disk.create("x")?;
                disk.sync_dir("")
            },
            &["a d/b x"],
        ),
        (
            "another folder's sync does not help",
            |disk| {
                disk.create("x")?;
                disk.sync_dir("d")
            },
            &["a d/b", "a d/b x"],
        ),
        (
            "syncing the file does not sync its name",
            |disk| disk.create("x")?.sync(),
            &["a d/b", "a d/b x"],
        ),
        (
            "a later name survives without an earlier one",
            |disk| {
                disk.create("x")?;
                disk.create("y").map(drop)
            },
            &["a d/b", "a d/b x", "a d/b y", "a d/b x y"],
        ),
        (
            "an unsynced create vanishes, a later synced one stays",
            |disk| {
                disk.create("x")?;
                disk.create("d/y")?;
                disk.sync_dir("d")
            },
            &["a d/b d/y", "a d/b d/y x"],
        ),
        ("link", |disk| disk.link("a", "x"), &["a d/b", "a d/b x"]),
        ("remove", |disk| disk.remove("a"), &["a d/b", "d/b"]),
        (
            "remove, synced",
            |disk| {
                disk.remove("a")?;
                disk.sync_dir("")
            },
            &["d/b"],
        ),
        ("rename within a folder", |disk| disk.rename("a", "x"), &["a d/b", "d/b x"]),
        (
            "rename across folders",
            |disk| disk.rename("a", "d/x"),
            &["a d/b", "a d/b d/x", "d/b", "d/b d/x"],
        ),
        (
            "rename across folders, target synced",
            |disk| {
                disk.rename("a", "d/x")?;
                disk.sync_dir("d")
            },
            &["a d/b d/x", "d/b d/x"],
        ),
        (
            "rename across folders, source synced",
            |disk| {
                disk.rename("a", "d/x")?;
                disk.sync_dir("")
            },
            &["d/b", "d/b d/x"],
        ),
        (
            "rename across folders, both synced",
            |disk| {
                disk.rename("a", "d/x")?;
                disk.sync_dir("d")?;
                disk.sync_dir("")
            },
            &["d/b d/x"],
        ),
        (
            "a new folder is durable, and nothing else with it",
            |disk| {
                disk.remove("a")?;
                disk.create_dir_all("e/f")?;
                disk.create("e/f/x")?;
                disk.sync_dir("e/f")
            },
            &["a d/b e/f/x", "d/b e/f/x"],
        ),
        (
            "a removed folder is made again, empty",
            |disk| {
                disk.remove("d/b")?;
                disk.remove_dir("d")?;
                disk.create_dir_all("d")
            },
            &["a"],
        ),
        (
            "an empty folder is removed",
            |disk| {
                disk.remove("d/b")?;
                disk.sync_dir("d")?;
                disk.remove_dir("d")
            },
            &["a"],
        ),
    ];
    for (what, steps, expected) in rows {
        let disk = SimDisk::new(0);
        disk.write_raw("a", b"a").unwrap();
        disk.write_raw("d/b", b"b").unwrap();
        steps(&disk).unwrap();
        let expected: BTreeSet<String> = expected.iter().map(|row| (*row).to_owned()).collect();
        assert_eq!(outcomes(&disk, paths), expected, "{what}");
        assert_eq!(paths(&disk.after_power_cut(Survive::Everything)), paths(&disk), "{what}");
        let nothing = paths(&disk.after_power_cut(Survive::Nothing));
        assert!(expected.contains(&nothing), "{what}: {nothing}");
    }
}

#[test]
fn a_removed_folder_may_come_back() {
    let disk = SimDisk::new(0);
    disk.create_dir_all("d").unwrap();
    disk.remove_dir("d").unwrap();
    assert_eq!(outcomes(&disk, |left| left.list("").unwrap().len()), BTreeSet::from([0, 1]));
    disk.create_dir_all("d").unwrap();
    assert_eq!(outcomes(&disk, |left| left.list("").unwrap().len()), BTreeSet::from([1]));
    disk.remove_dir("d").unwrap();
    disk.sync_dir("").unwrap();
    assert_eq!(outcomes(&disk, |left| left.list("").unwrap().len()), BTreeSet::from([0]));
}

#[test]
fn a_replacing_rename_leaves_one_of_the_two_whole() {
    let disk = SimDisk::new(0);
    disk.write_raw("to", b"old").unwrap();
    write(&disk, "from", b"new").sync().unwrap();
    disk.sync_dir("").unwrap();
    disk.rename("from", "to").unwrap();
    let seen = outcomes(&disk, |left| (paths(left), left.read("to").unwrap()));
    let expected = [("from to", b"old"), ("to", b"new")];
    assert_eq!(seen, expected.map(|(names, bytes)| (names.to_owned(), bytes.to_vec())).into());
}

#[test]
fn a_name_may_be_durable_before_its_content() {
    let disk = SimDisk::new(0);
    write(&disk, "x", b"content");
    disk.sync_dir("").unwrap();
    assert_eq!(disk.after_power_cut(Survive::Nothing).read("x").unwrap(), b"");
    let seen = outcomes(&disk, |left| left.read("x").unwrap());
    assert_eq!(seen, BTreeSet::from([vec![], vec![0; 7], b"content".to_vec()]));
}

#[test]
fn both_names_of_a_file_show_the_same_content() {
    let disk = SimDisk::new(0);
    write(&disk, "x", &[1; 4 * SECTOR_BYTES]);
    disk.link("x", "y").unwrap();
    disk.sync_dir("").unwrap();
    assert_eq!(outcomes(&disk, |left| left.read("x").unwrap() == left.read("y").unwrap()).len(), 1);
}

#[test]
fn unsynced_sectors_are_torn_and_reordered() {
    let disk = SimDisk::new(0);
    let mut file = write(&disk, "x", &[1; SECTOR_BYTES + 100]);
    disk.sync_dir("").unwrap();
    file.sync().unwrap();
    file.write_all(&[2; 100]).unwrap();
    file.write_all(&[3; 3 * SECTOR_BYTES]).unwrap();
    let full = disk.read("x").unwrap();
    let synced = SECTOR_BYTES + 100;

    assert_eq!(disk.after_power_cut(Survive::Nothing).read("x").unwrap(), full[..synced]);
    assert_eq!(disk.after_power_cut(Survive::Everything).read("x").unwrap(), full);

    let (mut lengths, mut patterns, mut second) =
        (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for seed in 0..SEEDS {
        let left = disk.after_power_cut(Survive::Random(seed)).read("x").unwrap();
        assert_eq!(left[..synced], full[..synced], "what was synced is whole");
        let mut pattern = Vec::new();
        for start in (0..left.len()).step_by(SECTOR_BYTES) {
            let end = left.len().min(start + SECTOR_BYTES);
            let kept = left[start..end].iter().take_while(|byte| **byte != 0).count();
            assert_eq!(left[start..start + kept], full[start..start + kept]);
            assert!(left[start + kept..end].iter().all(|byte| *byte == 0), "zeroes elsewhere");
            pattern.push(kept);
        }
        if left.len() == full.len() {
            second.insert(pattern[1]);
            patterns.insert(pattern[2..].iter().map(|kept| *kept > 0).collect::<Vec<_>>());
        }
        lengths.insert(left.len());
    }
    assert!(lengths.contains(&synced) && lengths.contains(&(synced + 100)), "{lengths:?}");
    assert!(lengths.contains(&(2 * SECTOR_BYTES)) && lengths.contains(&full.len()), "{lengths:?}");
    assert_eq!(second, BTreeSet::from([100, 200, 512]), "as each of the writes left the sector");
    assert_eq!(patterns.len(), 8, "each of the three new sectors by itself: {patterns:?}");
}

#[test]
fn the_same_seed_leaves_the_same_state() {
    let disk = SimDisk::new(0);
    for name in ["x", "y", "z"] {
        write(&disk, name, &[1; 5000]);
    }
    let look = |left: SimDisk| {
        left.paths().into_iter().map(|path| (left.read(&path).unwrap(), path)).collect::<Vec<_>>()
    };
    for seed in 0..SEEDS {
        let survive = Survive::Random(seed);
        assert_eq!(look(disk.after_power_cut(survive)), look(disk.after_power_cut(survive)));
    }
}

#[test]
fn what_survived_survives_the_next_cut() {
    let disk = SimDisk::new(0);
    write(&disk, "x", &[1; 5000]);
    for seed in 0..SEEDS {
        let once = disk.after_power_cut(Survive::Random(seed));
        let twice = once.after_power_cut(Survive::Nothing);
        assert_eq!(once.paths(), twice.paths());
        assert_eq!(once.read("x").ok(), twice.read("x").ok());
    }
}

/// Cuts a fixed run at each of its steps: what came before is pending or durable, what comes
/// after fails, and nothing of it is ever seen.
#[test]
fn the_power_goes_at_every_step() {
    fn run(disk: &SimDisk) -> io::Result<()> {
        disk.create_dir_all("d")?;
        let mut file = disk.create("d/tmp")?;
        file.write_all(&[1; 1000])?;
        file.sync()?;
        disk.rename("d/tmp", "d/x")?;
        disk.sync_dir("d")?;
        disk.link("d/x", "d/y")?;
        disk.remove("d/x")?;
        disk.sync_dir("d")
    }
    let whole = SimDisk::new(0);
    run(&whole).unwrap();
    assert_eq!(whole.operations(), 9);
    for last in [LastStep::Undone, LastStep::Torn, LastStep::Done] {
        for n in 1..=9 {
            let disk = SimDisk::new(n);
            disk.cut_after_with(n, last);
            run(&disk).unwrap_err();
            assert!(disk.is_off());
            assert_eq!(disk.operations(), n);
            assert!(disk.list("").is_err() && disk.open("d/x").is_err(), "reads fail as well");
            assert!(disk.create("late").is_err());
            assert_eq!(disk.operations(), n, "nothing is counted without power");

            let left = disk.after_power_cut(Survive::Nothing);
            let is_synced = n > 6 || (n == 6 && last == LastStep::Done);
            let is_moved = n == 9 && last == LastStep::Done;
            if is_moved {
                assert_eq!(paths(&left), "d/y");
            } else if is_synced && !(n == 9 && last == LastStep::Torn) {
                assert_eq!(paths(&left), "d/x");
            } else if n < 6 {
                assert_eq!(paths(&left), "");
            }
            for path in left.paths() {
                assert_eq!(left.read(&path).unwrap(), [1; 1000]);
            }
            left.create_dir_all("after").unwrap();
        }
    }
    whole.cut_after(0);
    assert!(whole.is_off() && whole.list("d").is_err());
}

#[test]
fn the_last_write_is_torn() {
    let mut lengths = BTreeSet::new();
    for seed in 0..50 {
        let disk = SimDisk::new(seed);
        let mut file = disk.create("x").unwrap();
        disk.cut_after_with(1, LastStep::Torn);
        file.write_all(&[1; 2000]).unwrap_err();
        file.sync().unwrap_err();
        lengths.insert(disk.after_power_cut(Survive::Everything).read("x").unwrap().len());
    }
    assert!(lengths.len() > 20 && lengths.iter().all(|len| *len <= 2000), "{lengths:?}");
}

#[test]
fn one_operation_fails() {
    let disk = SimDisk::new(0);
    disk.fail_at(2, ErrorKind::StorageFull);
    disk.create("x").unwrap();
    assert_eq!(disk.create("y").unwrap_err().kind(), ErrorKind::StorageFull);
    assert_eq!(paths(&disk), "x");
    disk.create("y").unwrap();
    assert_eq!(disk.operations(), 3);
}

#[test]
fn a_full_disk_still_removes() {
    let disk = SimDisk::new(0);
    let mut file = write(&disk, "x", b"1");
    disk.fail_from(1, ErrorKind::StorageFull);
    assert_eq!(file.write_all(b"2").unwrap_err().kind(), ErrorKind::StorageFull);
    assert_eq!(disk.create("y").unwrap_err().kind(), ErrorKind::StorageFull);
    assert_eq!(disk.create_dir_all("d").unwrap_err().kind(), ErrorKind::StorageFull);
    file.sync().unwrap();
    disk.remove("x").unwrap();
    disk.sync_dir("").unwrap();
    disk.clear_faults();
    disk.create("y").unwrap();

    disk.fail_from(2, ErrorKind::PermissionDenied);
    disk.create("z").unwrap();
    for _ in 0..2 {
        assert_eq!(disk.sync_dir("").unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
}

#[test]
fn a_failed_write_may_have_written_a_part() {
    let lengths: BTreeSet<usize> = (0..50)
        .map(|seed| {
            let disk = SimDisk::new(seed);
            let mut file = disk.create("x").unwrap();
            disk.fail_at(1, ErrorKind::StorageFull);
            file.write_all(&[1; 2000]).unwrap_err();
            disk.read("x").unwrap().len()
        })
        .collect();
    assert!(lengths.len() > 20, "{lengths:?}");
}

/// The story of fsync and PostgreSQL in 2018: a second sync that succeeds says nothing about the
/// pages that the first one failed to write.
#[test]
fn a_failed_sync_loses_its_pages() {
    let disk = SimDisk::new(0);
    let mut file = write(&disk, "x", &[1; 2 * SECTOR_BYTES]);
    disk.sync_dir("").unwrap();
    disk.fail_at(1, ErrorKind::Other);
    file.sync().unwrap_err();
    file.write_all(&[2; SECTOR_BYTES]).unwrap();
    file.sync().unwrap();
    let left = disk.after_power_cut(Survive::Nothing).read("x").unwrap();
    assert_eq!(left, [[0; SECTOR_BYTES], [0; SECTOR_BYTES], [2; SECTOR_BYTES]].concat());
}

#[test]
fn broken_ranges_fail_reads_that_touch_them() {
    let disk = SimDisk::new(0);
    disk.write_raw("x", &[1; 100]).unwrap();
    disk.break_range("x", 10..20).unwrap();
    disk.rename("x", "y").unwrap();
    for disk in [disk.clone(), disk.after_power_cut(Survive::Everything)] {
        let file = disk.open("y").unwrap();
        for (offset, len, is_good) in
            [(0, 10, true), (0, 11, false), (15, 1, false), (19, 5, false), (20, 80, true)]
        {
            let result = file.read_exact_at(&mut vec![0; len], offset);
            assert_eq!(result.is_ok(), is_good, "{len} bytes at {offset}");
        }
    }
    disk.write_raw("y", b"new").unwrap();
    disk.open("y").unwrap().read_exact_at(&mut [0; 3], 0).unwrap();
}

#[test]
fn tampering_is_on_the_medium() {
    let disk = SimDisk::new(0);
    disk.write_raw("d/x", &[0; 1000]).unwrap();
    disk.flip_bit("d/x", 8 * 600 + 3).unwrap();
    disk.truncate("d/x", 601).unwrap();
    let mut expected = vec![0; 601];
    expected[600] = 8;
    assert_eq!(disk.after_power_cut(Survive::Nothing).read("d/x").unwrap(), expected);
    assert_eq!(disk.flip_bit("d/x", 8 * 601).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(disk.truncate("d/x", 602).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(disk.read("none").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(disk.open("d/../x").unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(disk.operations(), 0);
}

/// A sync of bytes that were then cut off must not make a later pending write durable.
#[test]
fn appending_after_truncation_is_pending() {
    let disk = SimDisk::new(0);
    let mut file = write(&disk, "x", &[1; 1500]);
    disk.sync_dir("").unwrap();
    file.sync().unwrap();
    disk.truncate("x", 700).unwrap();
    file.write_all(&[2; 700]).unwrap();
    assert_eq!(disk.after_power_cut(Survive::Nothing).read("x").unwrap(), [1; 700]);
    file.sync().unwrap();
    let left = disk.after_power_cut(Survive::Nothing).read("x").unwrap();
    assert_eq!(left, [[1; 700], [2; 700]].concat());
}

#[test]
fn locks_do_not_survive_a_power_cut() {
    let disk = SimDisk::new(0);
    let _held = disk.lock("lock", LockKind::Exclusive, LockWait::Try, true).unwrap().unwrap();
    assert_eq!(disk.operations(), 1, "making the file counts");
    assert!(disk.lock("lock", LockKind::Shared, LockWait::Try, true).unwrap().is_none());
    assert_eq!(disk.operations(), 1, "taking the lock does not");
    assert_eq!(outcomes(&disk, paths), BTreeSet::from([String::new(), "lock".to_owned()]));
    let left = disk.after_power_cut(Survive::Everything);
    assert!(left.lock("lock", LockKind::Exclusive, LockWait::Try, false).unwrap().is_some());
}

/// Each row: what ends the wait, and whether the waiter has the lock then. A lock that `end` hands
/// back is held until the wait is over.
#[test]
fn waiting_for_a_lock_ends() {
    type End = fn(&SimDisk, Box<dyn DiskLock>) -> Option<Box<dyn DiskLock>>;
    let rows: &[(&str, End, bool)] = &[
        (
            "release",
            |_, held| {
                drop(held);
                None
            },
            true,
        ),
        (
            "release of a removed file",
            |disk, held| {
                disk.remove("lock").unwrap();
                drop(held);
                None
            },
            true,
        ),
        (
            "power cut",
            |disk, held| {
                disk.cut_after(0);
                Some(held)
            },
            false,
        ),
        (
            "power cut by a step",
            |disk, held| {
                disk.cut_after(1);
                disk.remove("lock").unwrap_err();
                Some(held)
            },
            false,
        ),
    ];
    for (what, end, has_lock) in rows {
        let disk = SimDisk::new(0);
        let held = disk.lock("lock", LockKind::Exclusive, LockWait::Try, true).unwrap().unwrap();
        let (sender, receiver) = mpsc::channel();
        let waiter = disk.clone();
        let thread = thread::spawn(move || {
            let result = waiter.lock("lock", LockKind::Exclusive, LockWait::Wait, true);
            sender.send(matches!(result, Ok(Some(_)))).unwrap();
        });
        let early = receiver.recv_timeout(Duration::from_millis(20));
        assert!(early.is_err(), "{what}: it waits");
        let still_held = end(&disk, held);
        let seen = receiver.recv_timeout(Duration::from_secs(30));
        assert_eq!(seen, Ok(*has_lock), "{what}");
        drop(still_held);
        thread.join().unwrap();
    }
}
