//! E2B's builds.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use dormouse_formats::detect::detect;
use dormouse_formats::e2b::header::Header;
use dormouse_formats::error::ErrorKind;
use dormouse_formats::export::ExportRequest;
use dormouse_formats::format::Format;
use dormouse_formats::import::LookOptions;
use dormouse_formats::replay::DataCodec;
use dormouse_testkit::foreign::e2b::{
    Build, Codec, Device, Head, Id, Style, columns, header, read,
};
use dormouse_testkit::foreign::random::{PAGE, Random};
use dormouse_testkit::foreign::wrenn::dashed;
use uuid::Uuid;

use crate::world::{World, assert_same, chain, distinct_blocks};

const A: Id = [0xaa; 16];
const B: Id = [0xbb; 16];

/// The worked example of the format's description: ten pages, `aa[0,2) bb[2,4)@0 nil[4,7) bb[7,8)@2
/// aa[8,10)@8`, build bb in two zstd frames of 700 and 300 bytes.
fn worked_example(version: u64) -> Vec<u8> {
    let head = Head { version, block: 4096, size: 10 * 4096, generation: 1, build: B, base: A };
    let frames = vec![(0, 8192, 0, 700), (8192, 4096, 700, 300)];
    let builds = BTreeMap::from([
        (A, Build { size: 40960, codec: Codec::Plain, frames: Vec::new() }),
        (B, Build { size: 12288, codec: Codec::Zstd, frames }),
    ]);
    let mappings = [(0, 2, A, 0), (2, 2, B, 0), (4, 3, [0; 16], 0), (7, 1, B, 2), (8, 2, A, 8)];
    header(&head, &builds, &mappings)
}

#[test]
fn the_worked_example_is_read_in_every_version() {
    let mut golden = Vec::new();
    columns(
        &[(0, 2, A, 0), (2, 2, B, 0), (4, 3, [0; 16], 0), (7, 1, B, 2), (8, 2, A, 8)],
        &mut golden,
    );
    let expected = [
        &[2, 0, 0, 0][..],
        &A,
        &B,
        &[4, 0, 0, 0],
        &[0, 2, 5, 1],
        &[2, 2, 1, 2],
        &[0x00, 0x00, 0x04, 0x0c],
        &[0, 1, 1, 0],
    ]
    .concat();
    assert_eq!(golden, expected, "the mapping section as it is printed there");
    let mut maps = Vec::new();
    for (version, block) in [(1, 0), (2, 0), (3, 0), (4, 384_u32), (5, 236)] {
        let bytes = worked_example(version);
        if version <= 3 {
            assert_eq!(bytes.len(), 264);
        } else {
            assert_eq!(bytes[65..69], block.to_le_bytes(), "length of the block of V{version}");
            assert_eq!(bytes[69..76], [0x04, 0x22, 0x4d, 0x18, 0x74, 0x70, 0x8e]);
        }
        let parsed = Header::parse(&bytes).unwrap();
        assert_eq!(parsed.metadata.version, version);
        assert_eq!(parsed.trailing_bytes, 0);
        assert_eq!(parsed.builds.len(), if version <= 3 { 0 } else { 2 });
        maps.push(parsed.map);
    }
    for map in &maps {
        assert_eq!(map, &maps[0], "all versions say the same");
        assert_eq!(map.len(), 5);
        let place = map.lookup(9).unwrap().place.unwrap();
        assert_eq!((map.builds()[place.build as usize], place.page), (Uuid::from_bytes(A), 9));
        assert_eq!(map.lookup(5).unwrap().place, None);
    }
    let frames = &Header::parse(&worked_example(5)).unwrap().builds[&Uuid::from_bytes(B)].frames;
    assert_eq!(frames[1].encoded_at, 700);
}

/// The same header, written by us: the block must be the same bytes, whatever LZ4 makes of it.
#[test]
fn the_worked_example_is_written_as_it_is_printed() {
    let parsed = Header::parse(&worked_example(5)).unwrap();
    let ours = parsed.encode().unwrap();
    assert_eq!(ours[..76], worked_example(5)[..76]);
    assert_eq!(Header::parse(&ours).unwrap(), parsed);
    let mut v3 = parsed.clone();
    v3.metadata.version = 3;
    assert_eq!(v3.encode().unwrap(), worked_example(3));
}

#[test]
fn no_mapping_is_identity_up_to_version_4_and_zeros_in_version_5() {
    for version in 1..=5 {
        let head = Head { version, block: 4096, size: 9000, generation: 1, build: B, base: A };
        let parsed = Header::parse(&header(&head, &BTreeMap::new(), &[])).unwrap();
        let first = parsed.map.lookup(0).unwrap();
        assert_eq!(first.pages, 3);
        assert_eq!(first.place.is_some(), version <= 4, "version {version}");
    }
}

/// A lineage of builds with memory and disk, each of a version and codec of its own.
struct Lineage {
    memory: Vec<Vec<u8>>,
    disk: Vec<Vec<u8>>,
    ids: Vec<Id>,
}

fn lineage(root: &Path, seed: u64, styles: &[(u64, Codec)]) -> Lineage {
    let mut random = Random::new(seed);
    let mut made = Lineage { memory: Vec::new(), disk: Vec::new(), ids: Vec::new() };
    let mut devices = [Device::default(), Device::default()];
    let mut memory = random.device(700);
    let mut disk = random.device(500);
    // Not whole pages, as a disk need not be.
    disk.truncate(disk.len() - 1000);
    for (number, &(version, codec)) in styles.iter().enumerate() {
        let id = [0x10 + number as u8; 16];
        let dir = root.join(dashed(&id));
        fs::create_dir_all(&dir).unwrap();
        let style = Style {
            version,
            codec,
            frame_bytes: [8 * PAGE, 64 * PAGE, 512 * PAGE][number % 3],
            generation: number as u64,
            base: [0x10; 16],
        };
        devices[0].next(&dir, "memfile", id, &memory, &style).unwrap();
        devices[1].next(&dir, "rootfs.ext4", id, &disk, &style).unwrap();
        fs::write(dir.join("snapfile"), format!("state of {number}")).unwrap();
        let json = format!(
            r#"{{"version":2,"template":{{"build_id":"{}","kernel_version":"6.1","firecracker_version":"1.12"}}}}"#,
            dashed(&id)
        );
        fs::write(dir.join("metadata.json"), json).unwrap();
        made.memory.push(memory.clone());
        made.disk.push(disk.clone());
        made.ids.push(id);
        random.work(&mut memory, 50);
        let whole = disk.len() / PAGE * PAGE;
        random.work(&mut disk[..whole], 20);
    }
    made
}

const MIXED: [(u64, Codec); 7] = [
    (1, Codec::Plain),
    (2, Codec::Plain),
    (3, Codec::Plain),
    (4, Codec::Lz4),
    (5, Codec::Zstd),
    (4, Codec::Zstd),
    (5, Codec::Lz4),
];

#[test]
fn a_lineage_of_all_versions_and_codecs_comes_in_whole() {
    let world = World::new();
    let made = lineage(&world.path("builds"), 1, &MIXED);
    let newest = world.path("builds").join(dashed(&made.ids[6]));
    let report = world.import(Format::E2b, &newest).unwrap();
    assert_eq!(report.snapshots.len(), 7, "{:?}", report.notes);
    let mut devices: Vec<&[u8]> = Vec::new();
    for number in 0..7 {
        let snap = format!("vm@{}", number + 1);
        assert_same(&world.bytes(&snap, "memory"), &made.memory[number], &snap);
        assert_same(&world.bytes(&snap, "root"), &made.disk[number], &snap);
        assert_eq!(world.bytes(&snap, "state/vmstate"), format!("state of {number}").into_bytes());
        let labels = &report.snapshots[number].commit.manifest.labels;
        assert_eq!(labels["e2b.build-id"], dashed(&made.ids[number]));
        assert_eq!(labels["e2b.generation"], number.to_string());
        devices.push(&made.memory[number]);
        devices.push(&made.disk[number]);
    }
    let states: Vec<Vec<u8>> = (0..7)
        .flat_map(|number| {
            let snap = format!("vm@{}", number + 1);
            [world.bytes(&snap, "state/vmstate"), world.bytes(&snap, "state/metadata")]
        })
        .collect();
    devices.extend(states.iter().map(|state| &state[..]));
    assert_eq!(World::stored_blocks(&report), distinct_blocks(&devices));
    assert_eq!(report.snapshots[6].commit.manifest.vmm.version.as_deref(), Some("1.12"));
}

#[test]
fn other_builds_are_looked_for_where_the_user_says() {
    let world = World::new();
    let made = lineage(&world.path("builds"), 2, &MIXED[..3]);
    let newest = world.path("builds").join(dashed(&made.ids[2]));
    fs::rename(&newest, world.path("apart")).unwrap();
    let error = world.import(Format::E2b, &world.path("apart")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let said = chain(&error);
    assert!(said.contains(&dashed(&made.ids[1])) || said.contains(&dashed(&made.ids[0])), "{said}");
    assert!(said.contains("is missing; expected it beside the build or in --builds"), "{said}");
    let options = LookOptions { builds: Some(world.path("builds")), ..LookOptions::default() };
    let parent = dormouse_store::commit::Parent::Auto;
    let report = world.import_over(Format::E2b, &world.path("apart"), &options, parent).unwrap();
    assert_eq!(report.snapshots.len(), 3);
    assert_same(&world.bytes("vm@3", "memory"), &made.memory[2], "memory");
}

/// E2B's uploader of version 3 wrote children of version 5 without an entry of themselves; and a
/// header that lost an ancestor's entry made readers look for an object that was never there.
#[test]
fn missing_entries_are_understood_as_e2b_means_them() {
    let world = World::new();
    let made = lineage(&world.path("builds"), 3, &[(5, Codec::Zstd), (5, Codec::Plain)]);
    let [parent, child] = [0, 1].map(|number| world.path("builds").join(dashed(&made.ids[number])));
    let path = child.join("memfile.header");
    // Neither the child's own entry, whose data is plain, nor that of its parent, whose is zstd.
    let head = Head {
        version: 5,
        block: 4096,
        size: made.memory[1].len() as u64,
        generation: 1,
        build: made.ids[1],
        base: made.ids[0],
    };
    let parsed = Header::parse(&fs::read(&path).unwrap()).unwrap();
    let mappings: Vec<_> = parsed
        .map
        .runs()
        .map(|run| {
            let place = run.place.map(|place| {
                (parsed.map.builds()[place.build as usize].into_bytes(), u64::from(place.page))
            });
            let (build, storage) = place.unwrap_or_default();
            (run.start, run.pages, build, storage)
        })
        .collect();
    fs::write(&path, header(&head, &BTreeMap::new(), &mappings)).unwrap();
    let report = world.import(Format::E2b, &child).unwrap();
    assert_eq!(report.snapshots.len(), 2);
    assert_same(&world.bytes("vm@2", "memory"), &made.memory[1], "memory");
    // Without the parent's header nobody knows how its data is stored.
    fs::remove_file(parent.join("memfile.header")).unwrap();
    let error = world.import(Format::E2b, &child).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let said = chain(&error);
    assert!(said.contains(&format!("refers to build {}", dashed(&made.ids[0]))), "{said}");
    assert!(said.contains("does not say how its data is stored"), "{said}");
}

#[test]
fn a_build_may_have_memory_only_or_a_disk_only() {
    for (kept, gone) in [("memfile", "rootfs.ext4"), ("rootfs.ext4", "memfile")] {
        let world = World::new();
        let made = lineage(&world.path("builds"), 4, &MIXED[2..5]);
        for id in &made.ids {
            for entry in fs::read_dir(world.path("builds").join(dashed(id))).unwrap() {
                let path = entry.unwrap().path();
                if path.file_name().unwrap().to_str().unwrap().starts_with(gone) {
                    fs::remove_file(path).unwrap();
                }
            }
        }
        let newest = world.path("builds").join(dashed(&made.ids[2]));
        world.import(Format::E2b, &newest).unwrap();
        let snap = world.store.snapshot(&"vm@3".parse().unwrap()).unwrap();
        let has = |image: &str| snap.manifest().image(&image.parse().unwrap()).is_some();
        assert_eq!((has("memory"), has("root")), (kept == "memfile", kept != "memfile"));
    }
}

#[test]
fn builds_that_refer_to_each_other_in_a_circle_are_refused() {
    let world = World::new();
    let data = Random::new(5).page();
    for (own, other) in [(A, B), (B, A)] {
        let dir = world.path("builds").join(dashed(&own));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("memfile"), &data).unwrap();
        let head = Head { version: 3, block: 4096, size: 8192, generation: 1, build: own, base: A };
        let mappings = [(0, 1, own, 0), (1, 1, other, 0)];
        fs::write(dir.join("memfile.header"), header(&head, &BTreeMap::new(), &mappings)).unwrap();
    }
    let error = world.import(Format::E2b, &world.path("builds").join(dashed(&A))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(chain(&error).contains("in a circle"), "{}", chain(&error));
}

#[test]
fn an_object_without_a_header_is_taken_as_it_is() {
    let world = World::new();
    let dir = world.path("builds").join(dashed(&A));
    fs::create_dir_all(&dir).unwrap();
    let disk = Random::new(6).device(50);
    fs::write(dir.join("rootfs.ext4"), &disk).unwrap();
    world.import(Format::E2b, &dir).unwrap();
    assert_same(&world.bytes("vm", "root"), &disk, "disk");
}

#[test]
fn damage_in_frames_is_found_before_anything_is_published() {
    let world = World::new();
    let made = lineage(&world.path("builds"), 7, &[(5, Codec::Zstd)]);
    let dir = world.path("builds").join(dashed(&made.ids[0]));
    let path = dir.join("memfile.zstd");
    let good = fs::read(&path).unwrap();
    for at in [0, good.len() / 2, good.len() - 9] {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        fs::write(&path, bad).unwrap();
        let error = world.import(Format::E2b, &dir).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{at}: {}", chain(&error));
        assert!(world.store.names().unwrap().is_empty(), "{at}: nothing was published");
    }
    fs::write(&path, &good[..good.len() - 1]).unwrap();
    let error = world.import(Format::E2b, &dir).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(chain(&error).contains(&format!("has {}", good.len() - 1)), "{}", chain(&error));
}

/// What we write, a reader that is not ours reads.
#[test]
fn exports_are_read_by_another_reader() {
    let world = World::new();
    let mut random = Random::new(8);
    let (mut memory, mut disk) = (random.device(900), random.device(400));
    let mut kept = Vec::new();
    for _ in 0..3 {
        world.commit(&[("memory", &memory), ("root", &disk), ("state/vmstate", b"state")]);
        kept.push((memory.clone(), disk.clone()));
        random.work(&mut memory, 80);
        random.work(&mut disk, 30);
    }
    let cases = [
        ("3", DataCodec::Plain),
        ("5", DataCodec::Plain),
        ("5", DataCodec::Zstd),
        ("5", DataCodec::Lz4),
    ];
    for (number, (version, codec)) in cases.into_iter().enumerate() {
        let request = ExportRequest {
            version: Some(version.to_owned()),
            data_codec: Some(codec),
            base: Some("vm@1".parse().unwrap()),
            ..ExportRequest::default()
        };
        let out = world.path(&format!("out-{number}"));
        world.export("vm@3", &out, Format::E2b, &request).unwrap();
        for (number, (memory, disk)) in kept.iter().enumerate() {
            let snap = format!("vm@{}", number + 1).parse().unwrap();
            let id = world.store.manifest(&snap).unwrap().uuid.into_bytes();
            assert_same(&read(&out, id, "memfile").unwrap(), memory, "memory");
            assert_same(&read(&out, id, "rootfs.ext4").unwrap(), disk, "disk");
        }
        let newest = world.store.manifest(&"vm@3".parse().unwrap()).unwrap().uuid;
        let other = World::new();
        let dir = out.join(newest.to_string());
        let report = other.import(Format::E2b, &dir).unwrap();
        assert_eq!(report.snapshots.len(), 3);
        assert_same(&other.bytes("vm@2", "memory"), &kept[1].0, "memory");
        let json: serde_json::Value =
            serde_json::from_slice(&fs::read(dir.join("metadata.json")).unwrap()).unwrap();
        assert_eq!(json["template"]["build_id"], newest.to_string());
        assert_eq!(json["version"], 2);
    }
    let wrong = ExportRequest {
        version: Some("3".to_owned()),
        data_codec: Some(DataCodec::Zstd),
        ..ExportRequest::default()
    };
    let error = world.export("vm", &world.path("no"), Format::E2b, &wrong).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[test]
fn detection_says_what_is_there_and_what_is_wrong() {
    let world = World::new();
    let made = lineage(&world.path("builds"), 9, &MIXED[..2]);
    let dir = world.path("builds").join(dashed(&made.ids[1]));
    let found = detect(&dir, &LookOptions::default()).unwrap();
    assert_eq!((found.format, found.version.as_deref()), (Format::E2b, Some("2")));
    assert!(found.problem.is_none());
    fs::remove_dir_all(world.path("builds").join(dashed(&made.ids[0]))).unwrap();
    let found = detect(&dir, &LookOptions::default()).unwrap();
    let problem = found.problem.unwrap();
    assert!(chain(&problem).contains(&dashed(&made.ids[0])), "{}", chain(&problem));
}

/// A build under an id that other builds refer to would be taken for that one, with its places in
/// others.
#[test]
fn a_build_is_not_exported_under_an_id_that_is_taken() {
    let world = World::new();
    let made = lineage(&world.path("builds"), 9, &MIXED[..2]);
    world.import(Format::E2b, &world.path("builds").join(dashed(&made.ids[1]))).unwrap();
    let ids =
        ["vm@1", "vm@2"].map(|snap| world.store.manifest(&snap.parse().unwrap()).unwrap().uuid);
    let with = |id: uuid::Uuid, format: Format, out: &str| {
        let request = ExportRequest { build_id: Some(id), ..ExportRequest::default() };
        world.export("vm@2", &world.path(out), format, &request)
    };
    for format in [Format::E2b, Format::Wrenn] {
        for (id, told) in [
            (dashed(&made.ids[0]).parse().unwrap(), "vm@1 was imported with"),
            (dashed(&made.ids[1]).parse().unwrap(), "vm@2 was imported with"),
            (ids[0], "that of vm@1"),
        ] {
            let error = with(id, format, "no").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(chain(&error).contains(told), "{}", chain(&error));
            assert!(!world.path("no").exists());
        }
    }
    with(ids[1], Format::E2b, "own").unwrap();
    with(uuid::Uuid::from_bytes([7; 16]), Format::E2b, "new").unwrap();
}

/// It was taken for a lineage of wrenn's.
#[test]
fn a_folder_of_builds_is_told_as_such() {
    let world = World::new();
    lineage(&world.path("builds"), 9, &MIXED[..2]);
    let found = detect(&world.path("builds"), &LookOptions::default()).unwrap();
    let problem = found.problem.unwrap();
    assert_eq!((found.format, problem.kind()), (Format::E2b, ErrorKind::InvalidInput));
    assert!(chain(&problem).contains("folder of 2 builds"), "{}", chain(&problem));
}
