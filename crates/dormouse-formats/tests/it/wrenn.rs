//! wrenn's folders.

use std::fs;

use dormouse_formats::detect::{detect, look};
use dormouse_formats::error::ErrorKind;
use dormouse_formats::export::ExportRequest;
use dormouse_formats::format::Format;
use dormouse_formats::import::{ImportRequest, LookOptions, import};
use dormouse_image::codec::Codec;
use dormouse_store::commit::Parent;
use dormouse_store::progress::Job;
use dormouse_testkit::foreign::dm_snapshot;
use dormouse_testkit::foreign::random::{PAGE, Random};
use dormouse_testkit::foreign::wrenn::{Generation, Head, header, write};

use crate::world::{World, assert_same, chain, distinct_blocks};

/// Generations of a guest, each a little work after the one before.
pub(crate) fn guest(seed: u64, count: u8) -> Vec<Generation> {
    let mut random = Random::new(seed);
    let mut memory = random.device(600);
    (1..=count)
        .map(|number| {
            let generation = Generation { build: [number; 16], memory: memory.clone() };
            random.work(&mut memory, 60);
            generation
        })
        .collect()
}

#[test]
fn a_chain_of_folders_becomes_as_many_snapshots_and_no_block_is_stored_twice() {
    let world = World::new();
    let generations = guest(1, 5);
    for count in 1..=5 {
        write(&world.path("chain").join(format!("pause-{count}")), &generations[..count]).unwrap();
    }
    let report = world.import(Format::Wrenn, &world.path("chain")).unwrap();
    assert_eq!(report.snapshots.len(), 5);
    for (number, generation) in generations.iter().enumerate() {
        let snap = format!("vm@{}", number + 1);
        assert_same(&world.bytes(&snap, "memory"), &generation.memory, &snap);
        let imported = &report.snapshots[number];
        assert_eq!(imported.commit.manifest.display_name(), snap);
        assert_eq!(imported.verified_bytes, Some((generation.memory.len() + 15) as u64));
        if number > 0 {
            let figures = &imported.commit.images[0].1;
            assert!(
                figures.skipped_bytes > figures.raw_bytes / 2,
                "what did not change is not read"
            );
        }
    }
    let devices: Vec<&[u8]> = generations.iter().map(|one| &one.memory[..]).collect();
    let state: &[u8] = b"the VMM's state";
    let all = [&devices[..], &[state]].concat();
    assert_eq!(World::stored_blocks(&report), distinct_blocks(&all));
}

#[test]
fn the_newest_folder_alone_is_one_snapshot_with_its_ancestors_data() {
    let world = World::new();
    let generations = guest(2, 4);
    write(&world.path("one"), &generations).unwrap();
    let report = world.import(Format::Wrenn, &world.path("one")).unwrap();
    assert_eq!(report.snapshots.len(), 1);
    assert_same(&world.bytes("vm", "memory"), &generations[3].memory, "memory");
    fs::remove_file(world.path("one").join("memfile.02020202-0202-0202-0202-020202020202"))
        .unwrap();
    let error = world.import(Format::Wrenn, &world.path("one")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(chain(&error).contains("the data of build 02020202-0202"), "{}", chain(&error));
}

/// Files that a process holds open below a folder.
fn open_below(folder: &std::path::Path) -> usize {
    fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|target| target.starts_with(folder))
        .count()
}

/// N folders have N·(N + 1)/2 data files: 45 were more than the 1,024 descriptors that a process has
/// by default.
#[test]
fn a_long_chain_that_was_looked_at_holds_no_descriptors() {
    let world = World::new();
    let generations = guest(20, 12);
    let folder = world.path("chain").canonicalize().unwrap_or_else(|_| world.path("chain"));
    for count in 1..=12 {
        write(&folder.join(format!("pause-{count}")), &generations[..count]).unwrap();
    }
    let found = look(Format::Wrenn, &folder, &LookOptions::default()).unwrap();
    assert_eq!(found.generations.len(), 12);
    assert_eq!(open_below(&folder), 0);
    world.import(Format::Wrenn, &folder).unwrap();
    assert_same(&world.bytes("vm@12", "memory"), &generations[11].memory, "memory");
}

/// What is opened again is what was looked at, or it is refused.
#[test]
fn a_data_file_that_is_another_one_when_it_is_read_is_refused() {
    let world = World::new();
    let generations = guest(21, 1);
    let dir = world.path("swapped");
    write(&dir, &generations).unwrap();
    let found = look(Format::Wrenn, &dir, &LookOptions::default()).unwrap();
    let mut data = fs::read(dir.join("memfile")).unwrap();
    data[0] ^= 1;
    fs::write(dir.join("other"), data).unwrap();
    fs::rename(dir.join("other"), dir.join("memfile")).unwrap();
    let request = ImportRequest {
        name: "vm".parse().unwrap(),
        parent: Parent::None,
        codec: Codec::Lz4,
        verify: false,
    };
    let error = import(&world.store, found, &request, Job::quiet()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{}", chain(&error));
    assert!(chain(&error).contains("is another file now"), "{}", chain(&error));
    assert!(world.store.names().unwrap().is_empty(), "nothing was published");
}

/// The folder of a wrenn snapshot may be named by a UUID, as builds of E2B are.
#[test]
fn a_folder_named_by_a_uuid_is_told_from_a_build() {
    let world = World::new();
    let generations = guest(22, 2);
    let dir = world.path("0ed1f7a6-3c1b-4d0e-8f4e-2b8a6c1d9e75");
    write(&dir, &generations).unwrap();
    let found = detect(&dir, &LookOptions::default()).unwrap();
    assert_eq!(found.format, Format::Wrenn);
    assert!(found.problem.is_none(), "{:?}", found.problem);
}

/// wrenn took a page that its guest had zeroed for one that had not changed, because both were zeros
/// in the diff, and gave the guest the old page back. Months of crashes of the guest's agent later
/// it gave incremental memory up.
#[test]
fn a_page_zeroed_by_the_guest_does_not_come_back() {
    let world = World::new();
    let mut generations = guest(3, 1);
    let zeroed = (0..600).find(|page| generations[0].memory[page * PAGE] != 0).unwrap();
    let mut memory = generations[0].memory.clone();
    memory[zeroed * PAGE..][..PAGE].fill(0);
    generations.push(Generation { build: [2; 16], memory });
    for count in 1..=2 {
        write(&world.path("chain").join(format!("{count}")), &generations[..count]).unwrap();
    }
    world.import(Format::Wrenn, &world.path("chain")).unwrap();
    assert!(world.bytes("vm@1", "memory")[zeroed * PAGE..][..PAGE].iter().any(|&byte| byte != 0));
    assert!(world.bytes("vm@2", "memory")[zeroed * PAGE..][..PAGE].iter().all(|&byte| byte == 0));
    assert_same(&world.bytes("vm@2", "memory"), &generations[1].memory, "memory");
}

/// E2B joined neighbours of one build without looking whether their storage runs on (#2848), and
/// wrenn has the same code: the second run was read from behind the first one's pages.
#[test]
fn neighbours_of_one_build_keep_their_storage_gap() {
    let world = World::new();
    let dir = world.path("gap");
    fs::create_dir_all(&dir).unwrap();
    let build = [7; 16];
    let mut random = Random::new(4);
    let data: Vec<Vec<u8>> = (0..6).map(|_| random.page()).collect();
    fs::write(dir.join("memfile"), data.concat()).unwrap();
    // Two runs of one build beside each other in memory, with pages 2 and 3 of the file unused.
    let places: Vec<_> = [0, 1, 4, 5].map(|page| Some((build, page))).into();
    let head = Head { version: 1, size: 4 * PAGE as u64, generation: 0, build, base: build };
    fs::write(dir.join("memfile.header"), header(&head, &places)).unwrap();
    world.import(Format::Wrenn, &dir).unwrap();
    let expected = [0, 1, 4, 5].map(|page| data[page].clone()).concat();
    assert_same(&world.bytes("vm", "memory"), &expected, "memory");
    world.export("vm", &world.path("out"), Format::Wrenn, &ExportRequest::default()).unwrap();
    let other = World::new();
    other.import(Format::Wrenn, &world.path("out")).unwrap();
    assert_same(&other.bytes("vm", "memory"), &expected, "memory that went out and in again");
}

#[test]
fn an_empty_record_list_means_identity() {
    let world = World::new();
    let dir = world.path("identity");
    fs::create_dir_all(&dir).unwrap();
    let memory = Random::new(5).device(100);
    fs::write(dir.join("memfile"), &memory).unwrap();
    let head = Head {
        version: 1,
        size: memory.len() as u64,
        generation: 0,
        build: [1; 16],
        base: [1; 16],
    };
    fs::write(dir.join("memfile.header"), header(&head, &[])).unwrap();
    world.import(Format::Wrenn, &dir).unwrap();
    assert_same(&world.bytes("vm", "memory"), &memory, "memory");
}

#[test]
fn what_is_wrong_with_a_header_is_said_with_position_got_and_expected() {
    let world = World::new();
    let generations = guest(6, 1);
    let dir = world.path("bad");
    write(&dir, &generations).unwrap();
    let good = fs::read(dir.join("memfile.header")).unwrap();
    let memory_bytes = generations[0].memory.len();
    let last = good.len() - 40;
    let patched = |at: usize, value: u64| {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        bytes
    };
    let cases: Vec<(Vec<u8>, String)> = vec![
        (good[..60].to_vec(), "at byte 48: it ends after 12 more bytes; expected 16".into()),
        (good[..last].to_vec(), format!("expected {memory_bytes}, the device's")),
        (good[..last + 13].to_vec(), format!("the record at byte {last} ends after 13 bytes")),
        (patched(0, 9), "version 9; expected 1".into()),
        (patched(8, 0), "at byte 8: block size 0; expected".into()),
        (patched(16, 1 << 50), "expected at most 16 TiB".into()),
        (patched(64, 4096), "offset 4096 leaves a gap after the record before; expected 0".into()),
        (patched(72, 0), "an empty record".into()),
        (patched(72, 1 << 40), "pass the end of the device".into()),
    ];
    for (bytes, why) in cases {
        fs::write(dir.join("memfile.header"), bytes).unwrap();
        let error = world.import(Format::Wrenn, &dir).unwrap_err();
        assert!(chain(&error).contains(&why), "got: {}\nexpected: {why}", chain(&error));
    }
    fs::write(dir.join("memfile.header"), &good).unwrap();
    let data = fs::metadata(dir.join("memfile")).unwrap().len();
    let file = fs::File::options().write(true).open(dir.join("memfile")).unwrap();
    file.set_len(data - PAGE as u64).unwrap();
    let error = world.import(Format::Wrenn, &dir).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(chain(&error).contains(&format!("which has {}", data - 4096)), "{}", chain(&error));
    assert!(world.store.names().unwrap().is_empty(), "nothing was published");
}

#[test]
fn a_disk_of_a_cow_store_is_read_over_its_template() {
    let world = World::new();
    let generations = guest(7, 1);
    let dir = world.path("with-disk");
    write(&dir, &generations).unwrap();
    let mut random = Random::new(8);
    let origin = random.device(300);
    let mut disk = origin.clone();
    random.work(&mut disk, 40);
    fs::write(world.path("template.ext4"), &origin).unwrap();
    dm_snapshot::write(&dir.join("rootfs.cow"), &origin, &disk, 8, 9).unwrap();
    let meta = format!(
        r#"{{"base_template":{:?},"template_id":"x"}}"#,
        world.path("template.ext4").display().to_string()
    );
    fs::write(dir.join("rootfs.meta"), meta).unwrap();
    let beside = LookOptions { builds: Some(world.path("")), ..LookOptions::default() };
    world.import_over(Format::Wrenn, &dir, &beside, Parent::Auto).unwrap();
    assert_same(&world.bytes("vm", "root"), &disk, "disk");
    fs::remove_file(dir.join("rootfs.meta")).unwrap();
    let error = world.import(Format::Wrenn, &dir).unwrap_err();
    assert!(chain(&error).contains("--origin"), "{}", chain(&error));
    let options = LookOptions { origin: Some(world.path("template.ext4")), ..Default::default() };
    world.import_over(Format::Wrenn, &dir, &options, Parent::None).unwrap();
    assert_same(&world.bytes("vm@2", "root"), &disk, "disk");
}

/// What we write is what a writer of wrenn's format would have written of the same guest.
#[test]
fn an_export_is_byte_for_byte_what_wrenn_writes() {
    let world = World::new();
    let generations = guest(10, 4);
    for generation in &generations {
        world.commit(&[("memory", &generation.memory), ("state/vmstate", b"the VMM's state")]);
    }
    for (base, first) in [(None, 3), (Some("vm@1"), 0), (Some("vm@3"), 2)] {
        let request = ExportRequest {
            base: base.map(|base| base.parse().unwrap()),
            ..ExportRequest::default()
        };
        let out = world.path(&format!("out-{first}"));
        world.export("vm@4", &out, Format::Wrenn, &request).unwrap();
        let with_ids: Vec<Generation> = (first..4)
            .map(|number| {
                let snap = format!("vm@{}", number + 1).parse().unwrap();
                let build = world.store.manifest(&snap).unwrap().uuid.into_bytes();
                Generation { build, memory: generations[number].memory.clone() }
            })
            .collect();
        let expected = world.path(&format!("expected-{first}"));
        write(&expected, &with_ids).unwrap();
        let files = |dir: &std::path::Path| {
            let mut files: Vec<_> = fs::read_dir(dir)
                .unwrap()
                .map(|entry| entry.unwrap())
                .map(|entry| (entry.file_name(), fs::read(entry.path()).unwrap()))
                .collect();
            files.sort();
            files
        };
        let (got, expected) = (files(&out), files(&expected));
        let names = |files: &[(std::ffi::OsString, Vec<u8>)]| {
            files.iter().map(|file| file.0.clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(&got), names(&expected));
        for (got, expected) in got.iter().zip(&expected) {
            assert!(got.1 == expected.1, "{:?} differs", got.0);
        }
        let other = World::new();
        other.import(Format::Wrenn, &out).unwrap();
        assert_same(&other.bytes("vm", "memory"), &generations[3].memory, "memory");
    }
}

/// wrenn copies the data of all ancestors into every later folder, and one copy was taken for all.
#[test]
fn copies_of_a_generation_that_differ_are_told() {
    let world = World::new();
    let generations = guest(40, 3);
    let folder = world.path("chain");
    for count in 1..=3 {
        write(&folder.join(format!("pause-{count}")), &generations[..count]).unwrap();
    }
    let name = "memfile.01010101-0101-0101-0101-010101010101";
    let copy = folder.join("pause-3").join(name);
    let good = fs::read(&copy).unwrap();
    let mut bad = good.clone();
    bad[5000] ^= 0x40;
    fs::write(&copy, &bad).unwrap();
    let options = LookOptions::default();
    let error =
        world.import_with(Format::Wrenn, &folder, &options, Parent::Auto, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let text = chain(&error);
    assert!(text.contains(&copy.display().to_string()), "{text}");
    assert!(text.contains(&folder.join("pause-1").join("memfile").display().to_string()), "{text}");
    let (got, expected) = (bad[5000], good[5000]);
    let why = format!("at byte 5000: got {got:#04x}; expected {expected:#04x}");
    assert!(text.contains(&why), "{text}");
    // Another length is told before anything is read.
    fs::write(&copy, [&good[..], &[0; PAGE]].concat()).unwrap();
    let error = look(Format::Wrenn, &folder, &options).unwrap_err();
    let why = format!("has {} bytes and its copy", good.len() + PAGE);
    assert!(chain(&error).contains(&why), "{}", chain(&error));
    fs::write(&copy, &good).unwrap();
    let mut again = World::new();
    again.import(Format::Wrenn, &folder).unwrap();
    // Links to one file are one file.
    fs::remove_file(&copy).unwrap();
    fs::hard_link(folder.join("pause-2").join(name), &copy).unwrap();
    again = World::new();
    again.import(Format::Wrenn, &folder).unwrap();
    assert_same(&again.bytes("vm@3", "memory"), &generations[2].memory, "memory");
}

/// The disks of a chain were read whole for each of its generations.
#[test]
fn of_the_disks_of_a_chain_no_more_is_read_than_may_differ() {
    let world = World::new();
    let generations = guest(41, 3);
    let mut random = Random::new(42);
    let origin = random.device(3000);
    fs::create_dir_all(world.path("images")).unwrap();
    fs::write(world.path("images").join("base"), &origin).unwrap();
    let meta = format!(r#"{{"base_template":{:?}}}"#, world.path("images").join("base"));
    let mut disk = origin.clone();
    let mut disks = Vec::new();
    for count in 1..=3 {
        let dir = world.path("cows").join(count.to_string());
        write(&dir, &generations[..count]).unwrap();
        random.work(&mut disk, 20);
        if count == 3 {
            // One that was written to has the origin's bytes again.
            disk[..PAGE * 100].copy_from_slice(&origin[..PAGE * 100]);
        }
        dm_snapshot::write(&dir.join("rootfs.cow"), &origin, &disk, 8, count as u64).unwrap();
        fs::write(dir.join("rootfs.meta"), &meta).unwrap();
        disks.push(disk.clone());
    }
    let options =
        LookOptions { origin: Some(world.path("images").join("base")), ..Default::default() };
    let report =
        world.import_over(Format::Wrenn, &world.path("cows"), &options, Parent::Auto).unwrap();
    for (number, disk) in disks.iter().enumerate() {
        assert_same(&world.bytes(&format!("vm@{}", number + 1), "root"), disk, "disk");
    }
    let root = "root".parse().unwrap();
    let read = |report: &dormouse_formats::import::ImportReport, number: usize| {
        let images = &report.snapshots[number].commit.images;
        let figures = &images.iter().find(|(image, _)| *image == root).unwrap().1;
        figures.raw_bytes - figures.skipped_bytes
    };
    assert_eq!(read(&report, 0), origin.len() as u64);
    for number in [1, 2] {
        assert!(read(&report, number) < origin.len() as u64 / 4, "{}", read(&report, number));
    }
    // A disk that is the same file in several folders is read once.
    for count in 1..=2 {
        let dir = world.path("links").join(count.to_string());
        write(&dir, &generations[..count]).unwrap();
        if count == 1 {
            fs::write(dir.join("rootfs.ext4"), &origin).unwrap();
        } else {
            let first = world.path("links").join("1").join("rootfs.ext4");
            fs::hard_link(first, dir.join("rootfs.ext4")).unwrap();
        }
    }
    let other = World::new();
    let report = other.import(Format::Wrenn, &world.path("links")).unwrap();
    assert_eq!((read(&report, 0), read(&report, 1)), (origin.len() as u64, 0));
    assert_same(&other.bytes("vm@2", "root"), &origin, "disk");
}
