//! Ordinary behaviour, which the simulated disk shares with the real one.

use std::io::{self, ErrorKind};

use dormouse_store::disk::{DirEntry, Disk, LockKind, LockWait, RealDisk};

use super::SimDisk;

/// Runs a test on an empty simulated disk and on an empty folder of this machine.
fn on_both(test: impl Fn(&dyn Disk)) {
    test(&SimDisk::new(0));
    let folder = tempfile::tempdir().unwrap();
    test(&RealDisk::new(folder.path()));
}

fn write(disk: &dyn Disk, path: &str, bytes: &[u8]) {
    let mut file = disk.create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync().unwrap();
}

fn read(disk: &dyn Disk, path: &str) -> Vec<u8> {
    let file = disk.open(path).unwrap();
    let mut bytes = vec![0; usize::try_from(file.len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn list(disk: &dyn Disk, path: &str) -> Vec<DirEntry> {
    let mut entries = disk.list(path).unwrap();
    entries.sort();
    entries
}

fn try_lock(disk: &dyn Disk, kind: LockKind) -> Option<Box<dyn dormouse_store::disk::DiskLock>> {
    disk.lock("lock", kind, LockWait::Try, true).unwrap()
}

#[test]
fn folders_list_their_entries() {
    on_both(|disk| {
        disk.create_dir_all("a/b/c").unwrap();
        disk.create_dir_all("a/b").unwrap();
        write(disk, "a/file", b"");
        let entry = |name: &str, is_dir| DirEntry { name: name.to_owned(), is_dir };
        assert_eq!(list(disk, "a"), [entry("b", true), entry("file", false)]);
        assert_eq!(list(disk, ""), [entry("a", true)]);
        assert_eq!(list(disk, "a/b/c"), []);
        disk.sync_dir("a").unwrap();
        disk.sync_dir("").unwrap();
    });
}

#[test]
fn errors_have_the_same_kinds() {
    type Call = fn(&dyn Disk) -> io::Result<()>;
    let calls: &[(&str, Call, ErrorKind)] = &[
        ("open", |disk| disk.open("none").map(drop), ErrorKind::NotFound),
        ("open through a file", |disk| disk.open("file/x").map(drop), ErrorKind::NotADirectory),
        ("create twice", |disk| disk.create("file").map(drop), ErrorKind::AlreadyExists),
        ("create on a folder", |disk| disk.create("full").map(drop), ErrorKind::AlreadyExists),
        ("create nowhere", |disk| disk.create("none/x").map(drop), ErrorKind::NotFound),
        ("list", |disk| disk.list("none").map(drop), ErrorKind::NotFound),
        ("list a file", |disk| disk.list("file").map(drop), ErrorKind::NotADirectory),
        ("make below a file", |disk| disk.create_dir_all("file/x"), ErrorKind::NotADirectory),
        ("link nothing", |disk| disk.link("none", "x"), ErrorKind::NotFound),
        ("link onto a file", |disk| disk.link("file", "full/x"), ErrorKind::AlreadyExists),
        ("link onto itself", |disk| disk.link("file", "file"), ErrorKind::AlreadyExists),
        ("rename nothing", |disk| disk.rename("none", "x"), ErrorKind::NotFound),
        ("rename nowhere", |disk| disk.rename("file", "none/x"), ErrorKind::NotFound),
        ("rename onto a folder", |disk| disk.rename("file", "full"), ErrorKind::IsADirectory),
        ("remove nothing", |disk| disk.remove("none"), ErrorKind::NotFound),
        ("remove a folder", |disk| disk.remove("full"), ErrorKind::IsADirectory),
        ("remove a full folder", |disk| disk.remove_dir("full"), ErrorKind::DirectoryNotEmpty),
        ("remove a missing folder", |disk| disk.remove_dir("none"), ErrorKind::NotFound),
        ("remove a file as folder", |disk| disk.remove_dir("file"), ErrorKind::NotADirectory),
        ("sync nothing", |disk| disk.sync_dir("none"), ErrorKind::NotFound),
        ("size of nothing", |disk| disk.allocated_bytes("none").map(drop), ErrorKind::NotFound),
        (
            "lock nothing",
            |disk| disk.lock("none", LockKind::Shared, LockWait::Try, false).map(drop),
            ErrorKind::NotFound,
        ),
        (
            "lock nowhere",
            |disk| disk.lock("none/x", LockKind::Shared, LockWait::Try, true).map(drop),
            ErrorKind::NotFound,
        ),
    ];
    on_both(|disk| {
        disk.create_dir_all("full").unwrap();
        write(disk, "full/x", b"x");
        write(disk, "file", b"y");
        for (what, call, kind) in calls {
            assert_eq!(call(disk).unwrap_err().kind(), *kind, "{what} on {disk:?}");
        }
        assert_eq!(read(disk, "full/x"), b"x");
        assert_eq!(read(disk, "file"), b"y");
        assert_eq!(list(disk, "").len(), 2);
    });
}

#[test]
fn reads_stop_at_the_end() {
    on_both(|disk| {
        write(disk, "file", b"abcdef");
        let file = disk.open("file").unwrap();
        assert_eq!((file.len(), file.is_empty()), (6, false));
        let mut two = [0; 2];
        file.read_exact_at(&mut two, 4).unwrap();
        assert_eq!(&two, b"ef");
        for offset in [5, 6, 600] {
            let error = file.read_exact_at(&mut two, offset).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "at {offset}");
        }
        file.read_exact_at(&mut [], 6).unwrap();
    });
}

#[test]
fn an_open_file_outlives_its_name() {
    on_both(|disk| {
        write(disk, "file", b"old");
        let file = disk.open("file").unwrap();
        disk.remove("file").unwrap();
        write(disk, "file", b"new");
        let mut bytes = [0; 3];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"old");
        assert_eq!(read(disk, "file"), b"new");
    });
}

#[test]
fn rename_replaces_and_links_share() {
    on_both(|disk| {
        disk.create_dir_all("a").unwrap();
        write(disk, "one", b"1");
        write(disk, "a/two", b"2");
        disk.rename("one", "a/two").unwrap();
        assert_eq!(read(disk, "a/two"), b"1");
        assert_eq!(disk.open("one").unwrap_err().kind(), ErrorKind::NotFound);

        disk.link("a/two", "three").unwrap();
        disk.rename("three", "a/two").unwrap();
        assert_eq!(read(disk, "three"), b"1", "two names of one file both stay");
        disk.remove("a/two").unwrap();
        assert_eq!(read(disk, "three"), b"1");
        disk.remove_dir("a").unwrap();
        assert_eq!(list(disk, "").len(), 1);
    });
}

#[test]
fn locks_exclude_as_flock_does() {
    use LockKind::{Exclusive, Shared};
    for (held, wanted, is_free) in [
        (Shared, Shared, true),
        (Shared, Exclusive, false),
        (Exclusive, Shared, false),
        (Exclusive, Exclusive, false),
    ] {
        on_both(|disk| {
            let first = try_lock(disk, held).unwrap();
            assert_eq!(try_lock(disk, wanted).is_some(), is_free, "{held:?} then {wanted:?}");
            drop(first);
            assert!(try_lock(disk, Exclusive).is_some(), "released");
        });
    }
}

#[test]
fn a_lock_stays_with_a_removed_file() {
    on_both(|disk| {
        let old = try_lock(disk, LockKind::Exclusive).unwrap();
        disk.remove("lock").unwrap();
        let missing = disk.lock("lock", LockKind::Shared, LockWait::Try, false);
        assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
        let new = try_lock(disk, LockKind::Exclusive).unwrap();
        drop(old);
        assert!(try_lock(disk, LockKind::Shared).is_none(), "the new file is still locked");
        drop(new);
        assert!(try_lock(disk, LockKind::Shared).is_some());
    });
}

#[test]
fn a_lock_moves_with_its_file() {
    on_both(|disk| {
        let _held = try_lock(disk, LockKind::Exclusive).unwrap();
        disk.rename("lock", "moved").unwrap();
        let moved = disk.lock("moved", LockKind::Shared, LockWait::Try, false).unwrap();
        assert!(moved.is_none());
        assert!(try_lock(disk, LockKind::Shared).is_some());
    });
}

#[test]
fn files_take_room() {
    on_both(|disk| {
        write(disk, "empty", b"");
        write(disk, "full", &[7; 10_000]);
        assert_eq!(disk.allocated_bytes("empty").unwrap(), 0);
        let allocated = disk.allocated_bytes("full").unwrap();
        assert!((10_000..1 << 20).contains(&allocated), "{allocated}");
    });
}
