//! Golden files: a live disk that was once written is opened for ever, and written the same today.
//!
//! `testdata/overlay` and `testdata/7.states` are the examples of `docs/format.md`; `disk-1` is a
//! whole disk of two layers, as a process that was killed left it after a failed commit.
//!
//! `DORMOUSE_BLESS=1 cargo test -p dormouse-live golden` writes what is not there.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_live::description::Description;
use dormouse_live::files::RealFolder;
use dormouse_live::overlay::{DiskRun, NewOverlay, Overlay, OverlayConfig, Zeroing};
use dormouse_live::state_log::{BatchWriter, KnownStates, LogEnd, LogHeader, replay};
use dormouse_live::states::BlockState;

use crate::model::{BytesBase, pattern};

/// The disk's bytes: six blocks, the last of which is short.
const SIZE: usize = 5 * 4096 + 512;

/// Files of `disk-1`; the lock is an empty file beside them.
const DISK_FILES: [&str; 5] = ["overlay", "1.data", "1.states", "2.data", "2.states"];

fn at(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

/// The file `name`, which must be `made` byte for byte.
fn golden(name: &str, made: &[u8]) -> Vec<u8> {
    let path = at(name);
    if std::env::var_os("DORMOUSE_BLESS").is_some_and(|value| value == "1") && !path.exists() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, made).unwrap();
    }
    let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let differ = bytes.iter().zip(made).position(|(a, b)| a != b);
    assert!(bytes == made, "{name} would be written otherwise, first at byte {differ:?}");
    bytes
}

#[test]
fn descriptions() {
    let description = Description {
        size_bytes: SIZE as u64,
        base_label: "vm@1:disk/root".to_owned(),
        layers: vec![7, 4],
        next_layer: 9,
    };
    let bytes = golden("overlay", &description.encode().unwrap());
    let parsed = Description::parse(&bytes).unwrap();
    assert_eq!(parsed, description);
    assert_eq!(parsed.encode().unwrap(), bytes);
}

/// The full form of a log and a flush after it, as runs.
#[test]
fn state_logs() {
    let mut full = KnownStates::default();
    full.set(0..2, BlockState::Dirty);
    full.set(3..4, BlockState::Zero);
    let mut writer = BatchWriter::default();
    writer.begin(7, 1);
    writer.push_full(&full, 6).unwrap();
    let first = writer.finish().to_vec();
    writer.begin(7, 2);
    writer.push(1..3, BlockState::Zero);
    writer.push(3..4, BlockState::Dirty);
    writer.push(5..6, BlockState::Dirty);
    let second = writer.finish();
    let header = LogHeader { layer: 7, blocks: 6, settled_bytes: 48 + first.len() as u64 };
    let bytes = golden("7.states", &[&header.encode()[..], &first, second].concat());

    let read = |buf: &mut [u8], offset: u64| {
        let offset = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&bytes[offset..offset + buf.len()]);
        Ok(())
    };
    let (parsed, states, end) = replay(&read, bytes.len() as u64).unwrap();
    assert_eq!(parsed, header);
    assert_eq!(end, LogEnd { offset: bytes.len() as u64, next_flush: 3 });
    let mut runs = Vec::new();
    states.for_each_run(&mut |run, state| runs.push((run, state)));
    let (dirty, zero) = (BlockState::Dirty, BlockState::Zero);
    assert_eq!(runs, [(0..1, dirty), (3..4, dirty), (5..6, dirty), (1..3, zero)]);
    // As it was before the second flush.
    let (_, states, end) = replay(&read, parsed.settled_bytes).unwrap();
    assert_eq!((states, end.next_flush), (full, 2));
}

fn base() -> Arc<BytesBase> {
    Arc::new(BytesBase(pattern(0, 3 * 4096 + 100, 9)))
}

/// Makes the disk: what it has in each of its blocks, with its files in `folder`.
fn make_disk(folder: &Path) -> Vec<u8> {
    let mut model = base().0.clone();
    model.resize(SIZE, 0);
    let new = NewOverlay {
        size_bytes: SIZE as u64,
        base: base(),
        base_label: "vm@1:disk/root".to_owned(),
    };
    let disk =
        Overlay::create(Arc::new(RealFolder::new(folder)), new, OverlayConfig::STANDARD).unwrap();
    let mut write = |at: usize, bytes: &[u8]| {
        disk.write_at(bytes, at as u64).unwrap();
        model[at..at + bytes.len()].copy_from_slice(bytes);
    };
    write(100, b"a part of a block of the base");
    write(4096, &[0; 4096]);
    write(4 * 4096, &[0x44; 4096 + 512]);
    disk.flush().unwrap();
    drop(disk.seal().unwrap());
    write(4096 + 7, b"a part of a zero block");
    write(SIZE - 3, b"end");
    disk.write_zeroes(4 * 4096, 4096, Zeroing::Free).unwrap();
    disk.flush().unwrap();
    model[4 * 4096..5 * 4096].fill(0);
    model
}

#[test]
fn whole_disks() {
    let folder = tempfile::tempdir().unwrap();
    let model = make_disk(folder.path());
    for name in DISK_FILES {
        golden(&format!("disk-1/{name}"), &fs::read(folder.path().join(name)).unwrap());
    }
    let mut names: Vec<String> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["1.data", "1.states", "2.data", "2.states", "notes.0", "notes.1", "overlay", "owner.lock"]
    );

    // A clone of the repository has the files, with holes or without.
    let folder = tempfile::tempdir().unwrap();
    for name in DISK_FILES {
        fs::write(folder.path().join(name), fs::read(at("disk-1").join(name)).unwrap()).unwrap();
    }
    let files = Arc::new(RealFolder::new(folder.path()));
    let disk = Overlay::open(files, OverlayConfig::STANDARD, |description| {
        assert_eq!(description.base_label, "vm@1:disk/root");
        assert_eq!(description.layers, [2, 1]);
        Ok(base())
    })
    .unwrap();
    let mut bytes = vec![0xee; SIZE];
    disk.read_at(&mut bytes, 0).unwrap();
    assert!(bytes == model);
    let mut runs = Vec::new();
    disk.for_each_run(0..SIZE as u64, &mut |run, kind| {
        match kind {
            DiskRun::Dirty => runs.push((run, 'd')),
            DiskRun::Zero => runs.push((run, 'z')),
            DiskRun::Base(_) => {}
        }
        Ok(())
    })
    .unwrap();
    runs.dedup_by(|next, last| {
        let is_one = last.1 == next.1 && last.0.end == next.0.start;
        if is_one {
            last.0.end = next.0.end;
        }
        is_one
    });
    assert_eq!(runs, [(0..8192, 'd'), (16384..20480, 'z'), (20480..SIZE as u64, 'd')]);
    disk.write_at(b"on", 0).unwrap();
    disk.flush().unwrap();
}
