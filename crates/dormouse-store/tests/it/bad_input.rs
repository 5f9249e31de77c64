//! Sources, requests, manifests and folders that are not what they should be: a typed error, and
//! the store as it was before.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dormouse_image::block::HoleMeaning;
use dormouse_image::digest::checksum;
use dormouse_store::commit::{CommitReport, CommitRequest, NewImage, Parent};
use dormouse_store::error::{Error, ErrorKind};
use dormouse_store::gc::{CompactOptions, GcOptions, KeepRules};
use dormouse_store::name::{ImageName, SnapRef};
use dormouse_store::progress::{Job, Progress, Quiet};
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};
use dormouse_store::verify::VerifyOptions;
use dormouse_testkit::sim_disk::SimDisk;

use crate::commit::{blocks, name};
use crate::usage::noise;
use crate::verify::ReadOnly;

const CONFIG: Config = Config { threads: 2, ..Config::STANDARD };

/// A store with `vm@1`: 64 blocks of memory, a disk of 8 blocks.
fn store() -> (SimDisk, Store) {
    let disk = SimDisk::new(1);
    let store = Store::init_on(Arc::new(disk.clone()), CONFIG).unwrap();
    let request = CommitRequest::new(name("vm"))
        .image(ImageName::Memory, Source::Bytes(blocks(&[7; 64]).into()))
        .image(root(), Source::Bytes(blocks(&[1, 2, 3, 4, 5, 6, 7, 8]).into()));
    store.commit(request, Job::quiet()).unwrap();
    (disk, store)
}

fn root() -> ImageName {
    ImageName::Disk(name("root"))
}

fn snap(text: &str) -> SnapRef {
    text.parse().unwrap()
}

fn disk_from(path: &Path) -> CommitRequest {
    CommitRequest::new(name("vm")).image(root(), Source::File(path.to_owned()))
}

/// A request for a diff over `vm@1`.
fn diff(image: ImageName, source: Source) -> CommitRequest {
    CommitRequest {
        parent: Parent::Snapshot(snap("vm@1")),
        images: vec![NewImage { image, source, holes: HoleMeaning::Parent }],
        ..CommitRequest::new(name("vm"))
    }
}

/// The store's files but for locks, which are made when first taken, and the pins of readers.
fn left(disk: &SimDisk) -> Vec<String> {
    let passes = |path: &String| path.ends_with(".lock") || path.starts_with("pins/");
    disk.paths().into_iter().filter(|path| !passes(path)).collect()
}

fn refused(disk: &SimDisk, store: &Store, request: CommitRequest) -> Error {
    let before = left(disk);
    let error = store.commit(request, Job::quiet()).unwrap_err();
    assert_eq!(left(disk), before, "{error}");
    error
}

/// Does something once, when the first bytes were captured.
struct Meanwhile<F: Fn() + Sync>(F, AtomicBool);

impl<F: Fn() + Sync> Progress for Meanwhile<F> {
    fn begin(&self, _stage: &str, _total_bytes: Option<u64>) {}

    fn advance(&self, _bytes: u64) {
        if !self.1.swap(true, Ordering::Relaxed) {
            (self.0)();
        }
    }
}

/// A file that is written to while it is read holds no moment of the guest, whichever part of it
/// was read before.
#[test]
fn a_source_that_changes_while_it_is_read_is_refused() {
    type Change = fn(&Path);
    let grow: Change = |path| {
        File::options().append(true).open(path).unwrap().write_all(b"more").unwrap();
    };
    let shrink: Change =
        |path| File::options().write(true).open(path).unwrap().set_len(4096).unwrap();
    let overwrite: Change =
        |path| File::options().write(true).open(path).unwrap().write_all_at(b"new", 9000).unwrap();
    for (what, change) in [("grow", grow), ("shrink", shrink), ("overwrite", overwrite)] {
        for megabytes in [1, 40] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("source");
            let numbers: Vec<u32> = (1..=256 * megabytes).collect();
            fs::write(&path, blocks(&numbers)).unwrap();
            // File times advance in steps of the kernel's clock.
            std::thread::sleep(Duration::from_millis(20));
            let (disk, store) = store();
            let before = left(&disk);
            let watch = Meanwhile(|| change(&path), AtomicBool::new(false));
            let job = Job { progress: &watch, cancel: &AtomicBool::new(false) };
            let error = store.commit(disk_from(&path), job).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused, "{what}, {megabytes} MiB: {error}");
            assert!(error.to_string().contains("while it was read"), "{error}");
            assert_eq!(left(&disk), before, "{what}");
            assert_eq!(store.list(None).unwrap().snapshots.len(), 1);
        }
    }
}

#[test]
fn sources_without_bytes_are_told() {
    let (disk, store) = store();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (path, kind, told) in [
        (folder.path().join("missing"), ErrorKind::NotFound, "missing"),
        (folder.path().to_owned(), ErrorKind::InvalidInput, "a folder"),
        (socket, ErrorKind::InvalidInput, "a socket"),
        // Unreadable for everybody, root too: nothing is mapped at address 0.
        ("/proc/self/mem".into(), ErrorKind::Io, "cannot read /proc/self/mem"),
    ] {
        let error = refused(&disk, &store, disk_from(&path));
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(told), "{error}");
    }
}

/// A file of procfs says that it has 0 bytes. Taken at its word it was stored as nothing.
#[test]
fn a_file_that_hides_its_length_is_read_to_its_end() {
    let (_, store) = store();
    store.commit(disk_from(Path::new("/proc/version")), Job::quiet()).unwrap();
    let image = store.snapshot(&snap("vm")).unwrap().image(&root()).unwrap();
    let mut bytes = Vec::new();
    image.write_to(&mut bytes, Job::quiet()).unwrap();
    assert_eq!(bytes, fs::read("/proc/version").unwrap());
}

/// A block device given as a diff was read as one without holes: what the guest had not touched
/// became zeros. Only a regular file can say "unchanged".
#[test]
fn a_diff_that_can_have_no_holes_is_refused() {
    let (disk, store) = store();
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty");
    File::create(&empty).unwrap();
    let image = store.snapshot(&snap("vm")).unwrap().image(&ImageName::Memory).unwrap();
    for source in [
        Source::Bytes(blocks(&[1; 64]).into()),
        Source::Image(image),
        Source::File("/dev/zero".into()),
        Source::File(empty),
    ] {
        let error = refused(&disk, &store, diff(ImageName::Memory, source));
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(error.to_string().contains("only a regular file has holes"), "{error}");
    }
}

#[test]
fn a_diff_wants_a_parent_that_fits() {
    let (disk, store) = store();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("diff");
    let sparse = |bytes| {
        File::create(&path).unwrap().set_len(bytes).unwrap();
        Source::File(path.clone())
    };
    let memory = |bytes| diff(ImageName::Memory, sparse(bytes));
    for (request, told) in [
        (CommitRequest { parent: Parent::None, ..memory(64 * 4096) }, "--parent"),
        (CommitRequest { parent: Parent::Auto, ..memory(64 * 4096) }, "--parent"),
        (diff(ImageName::Disk(name("data")), sparse(4096)), "no such image"),
        (memory(63 * 4096), "parent's memory 262144"),
        (memory(65 * 4096), "parent's memory 262144"),
    ] {
        let error = refused(&disk, &store, request);
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(error.to_string().contains(told), "{error}");
    }
    let missing = CommitRequest { parent: Parent::Snapshot(snap("vm@2")), ..memory(64 * 4096) };
    assert_eq!(refused(&disk, &store, missing).kind(), ErrorKind::NotFound);
    // Nothing but holes is the parent again; a disk may grow and shrink.
    store.commit(memory(64 * 4096), Job::quiet()).unwrap();
    for (bytes, rest) in [(4 * 4096, &[][..]), (10 * 4096, &[5, 6, 7, 8, 0, 0][..])] {
        store.commit(diff(root(), sparse(bytes)), Job::quiet()).unwrap();
        let image = store.snapshot(&snap("vm")).unwrap().image(&root()).unwrap();
        let mut read = Vec::new();
        image.write_to(&mut read, Job::quiet()).unwrap();
        assert!(read == blocks(&[&[1, 2, 3, 4], rest].concat()), "{bytes}");
    }
}

#[test]
fn a_store_that_cannot_be_written_to_is_read_and_left_alone() {
    let (disk, writable) = store();
    let again = CommitRequest::new(name("vm")).image(root(), Source::Bytes(blocks(&[9]).into()));
    writable.commit(again, Job::quiet()).unwrap();
    drop(writable);
    let before = disk.paths();
    let store = Store::open_on(Arc::new(ReadOnly(disk.clone())), CONFIG).unwrap();
    let keep: KeepRules = "last=1".parse().unwrap();
    let request =
        || CommitRequest::new(name("vm")).image(root(), Source::Bytes(noise(&[1, 2]).into()));
    for (what, result) in [
        ("commit", store.commit(request(), Job::quiet()).map(drop)),
        ("remove", store.remove(&snap("vm@1"))),
        ("prune", store.prune(&name("vm"), &keep, false).map(drop)),
        ("gc", store.gc(&GcOptions::default(), Job::quiet()).map(drop)),
        ("compact", store.compact(&CompactOptions::STANDARD, Job::quiet()).map(drop)),
    ] {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io, "{what}: {error}");
    }
    assert_eq!(disk.paths(), before);
    let image = store.snapshot(&snap("vm@1")).unwrap().image(&root()).unwrap();
    assert!(!image.is_pinned());
    let mut block = [0; 4096];
    image.read_at(&mut block, 4096).unwrap();
    assert_eq!(block[..], blocks(&[2]));
}

/// A disk in the place of the one that memory remembers leaves memory and its states out; one beside it,
/// or memory of the same time, does not.
#[test]
fn memory_does_not_go_with_a_disk_of_another_time() {
    let (_, store) = store();
    let state = ImageName::State(name("vmstate"));
    let bytes = |block| Source::Bytes(blocks(&[block]).into());
    let names = |report: &CommitReport| {
        report.manifest.images.iter().map(|entry| entry.image.to_string()).collect::<Vec<_>>()
    };
    let request = CommitRequest::new(name("vm"))
        .image(ImageName::Memory, bytes(7))
        .image(state, bytes(8))
        .image(root(), bytes(9));
    store.commit(request, Job::quiet()).unwrap();
    let beside = CommitRequest::new(name("vm")).image(ImageName::Disk(name("data")), bytes(1));
    let report = store.commit(beside, Job::quiet()).unwrap();
    assert_eq!(names(&report), ["disk/data", "disk/root", "memory", "state/vmstate"]);
    assert!(report.left_out.is_empty());
    let replaced = CommitRequest::new(name("vm")).image(root(), bytes(2));
    let report = store.commit(replaced, Job::quiet()).unwrap();
    assert_eq!(names(&report), ["disk/data", "disk/root"]);
    let left_out: Vec<_> = report.left_out.iter().map(ToString::to_string).collect();
    assert_eq!(left_out, ["memory", "state/vmstate"]);
}

/// A manifest that somebody wrote on purpose, its checksum right: whatever it says, an error or
/// blocks that are checked, and other snapshots stay as they are.
#[test]
fn forged_manifests_are_refused() {
    let (disk, store) = store();
    let again = CommitRequest::new(name("vm"))
        .image(root(), Source::Bytes(blocks(&[9]).into()))
        .image(ImageName::Disk(name("tail")), Source::Bytes(blocks(&[5]).into()));
    store.commit(again, Job::quiet()).unwrap();
    let path = "snapshots/vm/2.json";
    let genuine = disk.read(path).unwrap();
    type Forgery = fn(&mut serde_json::Value);
    let forgeries: [(&str, Forgery); 10] = [
        ("name", |manifest| manifest["name"] = "../../vm".into()),
        ("another name", |manifest| manifest["name"] = "other".into()),
        ("number", |manifest| manifest["number"] = 1.into()),
        ("image", |manifest| manifest["images"][0]["image"] = "disk/../x".into()),
        ("twice", |manifest| manifest["images"][1] = manifest["images"][0].clone()),
        ("huge", |manifest| manifest["images"][0]["size_bytes"] = u64::MAX.into()),
        ("longer", |manifest| manifest["images"][0]["size_bytes"] = (1_u64 << 40).into()),
        ("pack", |manifest| manifest["images"][0]["root"]["pack"] = "../x".into()),
        ("lost pack", |manifest| {
            manifest["images"][0]["root"]["pack"] = "00000000000000000000000000000001".into();
        }),
        ("node", |manifest| manifest["images"][0]["root"]["node"] = u32::MAX.into()),
    ];
    for (what, forge) in forgeries {
        let mut envelope: serde_json::Value = serde_json::from_slice(&genuine).unwrap();
        forge(&mut envelope["manifest"]);
        let body = envelope["manifest"].to_string();
        let sum = checksum(&[body.as_bytes()]);
        let text = format!(
            r#"{{"format":{},"version":{},"length":{},"checksum":"xxh3:{sum:016x}","manifest":{body}}}"#,
            envelope["format"],
            envelope["version"],
            body.len()
        );
        disk.write_raw(path, text.as_bytes()).unwrap();
        let store = Store::open_on(Arc::new(disk.clone()), CONFIG).unwrap();
        let read = store.snapshot(&snap("vm@2")).and_then(|snapshot| {
            let mut block = [0; 4096];
            snapshot.image(&root())?.read_at(&mut block, 0)
        });
        let kind = read.map_err(|error| error.kind());
        assert!(matches!(kind, Err(ErrorKind::Corrupt | ErrorKind::NotFound)), "{what}: {kind:?}");
        let report = store.verify(&VerifyOptions::default(), Job::quiet()).unwrap();
        assert!(!report.problems.is_empty(), "{what}");
        store.snapshot(&snap("vm@1")).unwrap().image(&root()).unwrap();
    }
}

#[test]
fn a_later_version_of_a_manifest_is_told() {
    let (disk, store) = store();
    let path = "snapshots/vm/1.json";
    let text = String::from_utf8(disk.read(path).unwrap()).unwrap();
    let later = text.replacen("\"version\":1", "\"version\":2", 1);
    assert_ne!(text, later);
    disk.write_raw(path, later.as_bytes()).unwrap();
    let error = store.snapshot(&snap("vm")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(store.list(None).unwrap().damaged.len(), 1);
}

#[test]
fn a_snapshot_is_exported_whole_or_not_at_all() {
    let (_, store) = store();
    let snapshot = store.snapshot(&snap("vm")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let names = || fs::read_dir(folder.path()).unwrap().count();
    let dir = folder.path().join("out");

    let stopped = AtomicBool::new(true);
    let error = snapshot.export(&dir, Job { progress: &Quiet, cancel: &stopped }).unwrap_err();
    assert_eq!((error.kind(), names()), (ErrorKind::Cancelled, 0));

    let reports = snapshot.export(&dir, Job::quiet()).unwrap();
    let images: Vec<String> = reports.iter().map(|(image, _)| image.to_string()).collect();
    assert_eq!(images, ["disk/root", "memory"]);
    assert_eq!(fs::read(dir.join("memory")).unwrap(), blocks(&[7; 64]));
    assert_eq!(fs::read(dir.join("disk/root")).unwrap(), blocks(&[1, 2, 3, 4, 5, 6, 7, 8]));
    assert_eq!(fs::read(dir.join("manifest.json")).unwrap(), snapshot.manifest().encode().unwrap());
    assert_eq!(names(), 1);

    for (taken, kind) in [
        (dir.clone(), ErrorKind::AlreadyExists),
        (dir.join("memory"), ErrorKind::AlreadyExists),
        (folder.path().join("no/such"), ErrorKind::NotFound),
        ("/".into(), ErrorKind::AlreadyExists),
        (folder.path().join("x/.."), ErrorKind::InvalidInput),
    ] {
        let error = snapshot.export(&taken, Job::quiet()).unwrap_err();
        assert_eq!(error.kind(), kind, "{}: {error}", taken.display());
    }
    assert_eq!(names(), 1);
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    snapshot.export(&empty, Job::quiet()).unwrap();
    assert_eq!(names(), 2);
}
