//! Golden files: a store that was once written is read for ever, and written the same today.
//!
//! `testdata/store-1` is a whole store of format version 1, made once and left as it is. It has
//! two of the four snapshots that were committed, a bundle of rewritten packs, an index run and a
//! remembered number. `manifest.json`, `index.run` and `dormouse.json` are compared byte for byte.
//!
//! `DORMOUSE_BLESS=1 cargo test -p dormouse-store golden` writes the files and the fuzzers' seeds,
//! and the store if there is none.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use dormouse_image::block::BLOCK_BYTES;
use dormouse_image::codec::Codec;
use dormouse_image::digest::{Digest, checksum};
use dormouse_image::pack::PackId;
use dormouse_store::commit::CommitRequest;
use dormouse_store::disk::Disk;
use dormouse_store::gc::{CompactOptions, GcOptions};
use dormouse_store::index::{IndexHit, IndexRun, RunWriter};
use dormouse_store::manifest::{
    Figures, ImageEntry, Manifest, MemoryRegion, OwnPack, ParentRef, RootRef, Vmm,
};
use dormouse_store::name::{ImageName, SnapRef};
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::Store;
use dormouse_store::verify::VerifyOptions;
use dormouse_testkit::sim_disk::SimDisk;

use crate::commit::name;
use crate::model::{Chance, EAGER, Images, check_snapshot, small_config};

const STORE: &str = "store-1";

/// The folders that git does not keep, as there is nothing in them.
const EMPTY_FOLDERS: [&str; 2] = ["pins", "tmp"];

fn at(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

fn blessing() -> bool {
    std::env::var_os("DORMOUSE_BLESS").is_some_and(|value| value == "1")
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// The file `name`, which must be `made` byte for byte.
fn golden(name: &str, made: &[u8]) -> Vec<u8> {
    let path = at(name);
    if blessing() {
        write(&path, made);
    }
    let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let differ = bytes.iter().zip(made).position(|(a, b)| a != b);
    assert!(bytes == made, "{name} would be written otherwise, first at byte {differ:?}");
    bytes
}

/// One of each field.
fn manifest() -> Manifest {
    let uuid = |last: char| format!("0199f0a0-0000-7000-8000-00000000000{last}").parse().unwrap();
    let pack = |byte: &str| byte.repeat(16);
    let figures = Figures {
        raw_bytes: 65_536,
        skipped_bytes: 4096,
        zero_bytes: 8192,
        nonzero_bytes: 57_344,
        changed_bytes: 53_248,
        unchanged_bytes: 4096,
        elsewhere_bytes: 8192,
        self_bytes: 4096,
        from_disks_bytes: 4096,
        new_bytes: 40_960,
        stored_bytes: 20_000,
        map_bytes: 300,
        extents: 9,
    };
    let image = |image: &str, root, figures| ImageEntry {
        image: image.parse().unwrap(),
        size_bytes: 65_536,
        root,
        figures,
    };
    let region = |image_offset, guest_address, block: &str| MemoryRegion {
        block: block.to_owned(),
        image_offset,
        guest_address,
        length: 32_768,
        page_size: 4096,
        plugged: guest_address.is_some(),
    };
    Manifest {
        uuid: uuid('2'),
        name: name("vm"),
        number: 7,
        parent: Some(ParentRef { uuid: uuid('1'), name: name("base"), number: 3 }),
        created: "2026-01-02T03:04:05.000000006Z".parse().unwrap(),
        key_id: "cd822ba5909b1a1092a7410fadb2a0ed".to_owned(),
        pack: Some(OwnPack { id: pack("a1"), bytes: 23_456, slots: 10, disk_slots: 4 }),
        images: vec![
            image("disk/root", Some(RootRef { pack: pack("b2"), node: 5 }), None),
            image("memory", Some(RootRef { pack: pack("a1"), node: 1 }), Some(figures)),
            image("state/vmstate", None, None),
        ],
        memory_layout: vec![region(0, Some(0), "pc.ram"), region(32_768, None, "")],
        vmm: Vmm {
            kind: Some("qemu".to_owned()),
            version: Some("10.0".to_owned()),
            cpu_model: Some("EPYC".to_owned()),
            host_kernel: Some("6.12.0".to_owned()),
            arch: Some("x86_64".to_owned()),
            vcpus: Some(2),
        },
        labels: BTreeMap::from([("note".to_owned(), "a \"b\" ü".to_owned())]),
        figures,
    }
}

#[test]
fn manifests() {
    let made = manifest();
    let bytes = golden("manifest.json", &made.encode().unwrap());
    assert_eq!(Manifest::decode(&bytes).unwrap(), made);
}

/// Prefixes that fall into two buckets, two of them alike.
const ENTRIES: [(u64, u8, u32); 4] =
    [(3, 0xa0, 7), (0x4000_0000_0000_0001, 0xb0, 0), (1 << 63, 0xa0, 9), (1 << 63, 0xb0, 1)];

fn pack(first: u8) -> PackId {
    PackId(std::array::from_fn(|at| first + at as u8))
}

fn digest(prefix: u64) -> Digest {
    let mut digest = Digest([0; 16]);
    digest.0[..8].copy_from_slice(&prefix.to_be_bytes());
    assert_eq!(digest.prefix(), prefix);
    digest
}

/// A run of room for 65 entries, so that it has two buckets and four filter blocks.
fn run() -> Vec<u8> {
    let disk = SimDisk::new(1);
    let mut writer = RunWriter::create(&disk, "run", 65, &[pack(0xa0), pack(0xc0)]).unwrap();
    for (prefix, first, slot) in ENTRIES {
        writer.push(prefix, IndexHit { pack: pack(first), slot }).unwrap();
    }
    writer.finish().unwrap();
    disk.read("run").unwrap()
}

#[test]
fn index_runs() {
    let bytes = golden("index.run", &run());
    let disk = SimDisk::new(1);
    disk.write_raw("run", &bytes).unwrap();
    for filter_bytes in [0, 1 << 20] {
        let run = IndexRun::open(&disk, "run", filter_bytes).unwrap();
        assert_eq!(run.packs(), [pack(0xa0), pack(0xc0), pack(0xb0)]);
        assert_eq!(run.entries(), 4);
        for asked in [3, 4, 0x4000_0000_0000_0001, 1 << 63, u64::MAX] {
            let mut hits = Vec::new();
            run.lookup(&digest(asked), &mut |hit| hits.push(hit)).unwrap();
            let expected: Vec<_> = ENTRIES
                .iter()
                .filter(|(prefix, ..)| *prefix == asked)
                .map(|&(_, first, slot)| IndexHit { pack: pack(first), slot })
                .collect();
            assert_eq!(hits, expected, "{asked:x}");
        }
    }
}

/// The value of a field with a text, from its first digit to its last.
fn field<'a>(json: &'a str, key: &str) -> &'a str {
    let (_, rest) = json.split_once(&format!("\"{key}\":\"")).unwrap();
    rest.split_once('"').unwrap().0
}

/// A store's parameters are random, so today's are given the values of the golden file; length
/// and checksum are made here as `docs/format.md` says.
#[test]
fn parameters() {
    let disk = SimDisk::new(1);
    Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
    let made = String::from_utf8(disk.read("dormouse.json").unwrap()).unwrap();
    if blessing() && !at("dormouse.json").exists() {
        write(&at("dormouse.json"), made.as_bytes());
    }
    let golden = fs::read_to_string(at("dormouse.json")).unwrap();
    let (_, body) = made.split_once("\"store\":").unwrap();
    let mut body = body.strip_suffix("}\n").unwrap().to_owned();
    for key in ["id", "created", "key_id"] {
        body = body.replacen(field(&body, key), field(&golden, key), 1);
    }
    let sum = checksum(&[body.as_bytes()]);
    let expected = format!(
        "{{\"format\":\"dormouse-store\",\"version\":1,\"length\":{},\
         \"checksum\":\"xxh3:{sum:016x}\",\"store\":{body}}}\n",
        body.len()
    );
    assert_eq!(golden, expected);
    disk.write_raw("dormouse.json", golden.as_bytes()).unwrap();
    let store = Store::open_on(Arc::new(disk), small_config()).unwrap();
    assert_eq!(store.id().to_string(), field(&golden, "id"));
}

/// Blocks by number: 0 is zeros, odd ones are noise, even ones compress.
fn image(numbers: &[u64], tail: usize) -> Vec<u8> {
    let mut bytes = vec![0; numbers.len() * BLOCK_BYTES];
    for (block, &number) in bytes.chunks_mut(BLOCK_BYTES).zip(numbers) {
        let mut chance = Chance::new(number);
        match number {
            0 => {}
            _ if number % 2 == 1 => block.iter_mut().for_each(|b| *b = chance.below(256) as u8),
            _ => block.fill(number as u8),
        }
    }
    bytes.truncate(bytes.len() - tail);
    bytes
}

/// What was committed as `vm@1` to `vm@4`.
fn images(number: u64) -> Images {
    let (disk, memory): (&[u64], &[u64]) = match number {
        1 => (&[1, 2, 3, 4, 5, 0], &[2, 0, 0, 6, 8, 10, 3]),
        2 => (&[1, 2, 3, 12, 5, 0], &[2, 14, 0, 6, 0, 16, 3, 18]),
        3 => (&[20, 2, 3, 12], &[2, 14, 22, 6, 0, 16, 12]),
        _ => (&[7, 9, 11], &[13]),
    };
    Images::from([
        (ImageName::Disk(name("root")), image(disk, 100)),
        (ImageName::Memory, image(memory, 0)),
        (ImageName::State(name("vmstate")), image(&[30 + number], 4000)),
    ])
}

fn request(number: u64) -> CommitRequest {
    images(number).into_iter().fold(
        CommitRequest {
            codec: Codec::Raw,
            labels: BTreeMap::from([("step".to_owned(), number.to_string())]),
            ..CommitRequest::new(name("vm"))
        },
        |request, (image, bytes)| request.image(image, Source::Bytes(bytes.into())),
    )
}

/// Four commits, of which the first and the last are removed; everything compacted and collected.
fn make_store() -> SimDisk {
    let disk = SimDisk::new(1);
    let store = Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
    for number in 1..=4 {
        store.commit(request(number), Job::quiet()).unwrap();
    }
    for number in [1, 4] {
        store.remove(&SnapRef { name: name("vm"), number: Some(number) }).unwrap();
    }
    let options = CompactOptions { bundle_bytes: 1 << 20, ..EAGER };
    store.compact(&options, Job::quiet()).unwrap();
    store.gc(&GcOptions::default(), Job::quiet()).unwrap();
    drop(store);
    disk
}

/// The golden store on a disk of its own.
pub(crate) fn golden_store() -> SimDisk {
    /// Tests run side by side; one of them makes the store.
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().unwrap();
    let root = at(STORE);
    if blessing() && !root.exists() {
        let disk = make_store();
        for path in disk.paths() {
            write(&root.join(&path), &disk.read(&path).unwrap());
        }
    }
    let disk = SimDisk::new(1);
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let inside = path.strip_prefix(&root).unwrap().to_str().unwrap();
            disk.write_raw(inside, &fs::read(&path).unwrap()).unwrap();
        }
    }
    EMPTY_FOLDERS.iter().for_each(|folder| disk.create_dir_all(folder).unwrap());
    disk
}

pub(crate) fn check_golden(store: &Store) {
    for number in [2, 3] {
        check_snapshot(store, &name("vm"), number, &images(number));
    }
}

#[test]
fn stores() {
    let disk = golden_store();
    let count = |end: &str| disk.paths().iter().filter(|path| path.ends_with(end)).count();
    assert_eq!((count(".json"), count(".bundle"), count(".run")), (3, 1, 1));
    assert_eq!((count(".pack"), count("/next")), (0, 1));
    let store = Store::open_on(Arc::new(disk.clone()), small_config()).unwrap();
    let listing = store.list(None).unwrap();
    assert!(listing.damaged.is_empty(), "{:?}", listing.damaged);
    let listed: Vec<_> = listing.snapshots.iter().map(Manifest::display_name).collect();
    assert_eq!(listed, ["vm@2", "vm@3"]);
    assert_eq!(listing.snapshots[1].labels["step"], "3");
    check_golden(&store);
    let options = VerifyOptions { deep: true, ..VerifyOptions::default() };
    let report = store.verify(&options, Job::quiet()).unwrap();
    assert_eq!((report.snapshots, report.packs), (2, 3));
    assert!(report.problems.is_empty() && report.notes.is_empty(), "{report:?}");
    let report = store.gc(&GcOptions::default(), Job::quiet()).unwrap();
    assert_eq!((report.deleted_files, report.swept, report.dead_bytes), (0, 0, 0));
    // The index knows every block, and the number of the snapshot that was removed stays used.
    let report = store.commit(request(3), Job::quiet()).unwrap();
    assert_eq!((report.manifest.number, report.manifest.figures.new_bytes), (5, 0));
    let other = CommitRequest { name: name("other"), ..request(2) };
    assert_eq!(store.commit(other, Job::quiet()).unwrap().manifest.figures.new_bytes, 0);
    check_golden(&store);
}

/// A store made today has files of the same kinds and reads the same.
#[test]
fn stores_are_made_as_ever() {
    let kinds = |disk: &SimDisk| {
        let mut kinds: Vec<String> = disk
            .paths()
            .iter()
            .map(|path| {
                let name = path.rsplit('/').next().unwrap();
                let random = name.len() >= 32;
                let folder = &path[..path.len() - name.len()];
                match name.rsplit_once('.') {
                    Some((_, end)) if random => format!("{folder}*.{end}"),
                    _ if random => format!("{folder}*"),
                    _ => path.clone(),
                }
            })
            .collect();
        kinds.sort();
        kinds
    };
    let disk = make_store();
    assert_eq!(kinds(&disk), kinds(&golden_store()));
    check_golden(&Store::open_on(Arc::new(disk), small_config()).unwrap());
}

/// The fuzzers start from the golden files.
#[test]
fn seeds() {
    let disk = golden_store();
    let of = |end: &str| {
        let paths = disk.paths();
        disk.read(paths.iter().find(|path| path.ends_with(end)).unwrap()).unwrap()
    };
    let mut small = manifest();
    small.memory_layout.clear();
    small.labels.clear();
    small.vmm = Vmm::default();
    small.images.truncate(1);
    let seeds: [(&str, Vec<u8>); 8] = [
        ("manifest/full", manifest().encode().unwrap()),
        ("manifest/small", small.encode().unwrap()),
        ("manifest/store", of("/3.json")),
        ("index_run/golden", run()),
        ("index_run/store", of(".run")),
        ("names/snapshot", b"vm-1.2_x@12:state/vmstate".to_vec()),
        ("names/keep", b"last=5,hourly=24,daily=7,weekly=4,monthly=12,yearly=3".to_vec()),
        ("names/codec", b"zstd:-7".to_vec()),
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    for (name, bytes) in seeds {
        if blessing() {
            write(&folder.join(name), &bytes);
        }
        assert!(folder.join(name).exists(), "{name}: bless it");
    }
}
