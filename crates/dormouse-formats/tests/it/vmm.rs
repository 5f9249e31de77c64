//! Firecracker's, Cloud Hypervisor's and QEMU's files.

use std::fs;
use std::os::unix::fs::FileExt;

use dormouse_formats::detect::{detect, look};
use dormouse_formats::error::{Error, ErrorKind};
use dormouse_formats::export::ExportRequest;
use dormouse_formats::firecracker::vmstate::VmState;
use dormouse_formats::format::Format;
use dormouse_formats::import::{GuestLayout, ImportReport, LookOptions};
use dormouse_store::commit::Parent;
use dormouse_testkit::foreign::cloud_hypervisor::{self, Zone};
use dormouse_testkit::foreign::firecracker::{diff, vmstate};
use dormouse_testkit::foreign::qemu::{Block, ignore_shared, mapped_ram};
use dormouse_testkit::foreign::random::{PAGE, Random};

use crate::world::{World, assert_same, chain};

/// Two MiB of a guest.
fn memory(seed: u64) -> Vec<u8> {
    Random::new(seed).device(512)
}

fn firecracker_folder(world: &World, name: &str, format: (u64, u64, u64), memory: &[u8]) {
    fs::create_dir_all(world.path(name)).unwrap();
    fs::write(world.path(name).join("mem"), memory).unwrap();
    fs::write(world.path(name).join("state"), vmstate(format, b"devices")).unwrap();
}

/// Of a guest without memory that is plugged in.
fn import_standard(world: &World, name: &str) -> Result<ImportReport, Error> {
    let options = LookOptions { layout: Some(GuestLayout::Standard), ..LookOptions::default() };
    world.import_over(Format::Firecracker, &world.path(name), &options, Parent::Auto)
}

#[test]
fn a_full_snapshot_comes_in_with_its_layout() {
    let world = World::new();
    let memory = memory(1);
    firecracker_folder(&world, "full", (6, 0, 0), &memory);
    let report = import_standard(&world, "full").unwrap();
    assert_same(&world.bytes("vm", "memory"), &memory, "memory");
    assert_eq!(world.bytes("vm", "state/vmstate"), vmstate((6, 0, 0), b"devices"));
    let manifest = &report.snapshots[0].commit.manifest;
    assert_eq!(manifest.vmm.version.as_deref(), Some("1.12"));
    assert_eq!(manifest.memory_layout.len(), 1);
    assert_eq!(manifest.memory_layout[0].guest_address, Some(0));
    assert_eq!(
        detect(&world.path("full"), &LookOptions::default()).unwrap().format,
        Format::Firecracker
    );
}

#[test]
fn the_gap_below_4_gib_is_that_of_the_release() {
    let world = World::new();
    fs::create_dir_all(world.path("big")).unwrap();
    let file = fs::File::create(world.path("big").join("mem")).unwrap();
    file.set_len(4 << 30).unwrap();
    file.write_all_at(&[7; 4096], 3 << 30).unwrap();
    let gib = 1 << 30_u64;
    let cases = [
        // The others are told to be standard, as they may have memory that is plugged in.
        ((6, 0, 0), None, None, 3 * gib + 256 * (1 << 20)),
        ((8, 0, 0), None, None, 3 * gib),
        ((77, 0, 0), Some("v1.12.1"), None, 3 * gib + 256 * (1 << 20)),
        ((77, 0, 0), None, None, 3 * gib),
        ((8, 0, 0), None, Some(gib), gib),
    ];
    for (format, version, low, first) in cases {
        fs::write(world.path("big").join("state"), vmstate(format, b"")).unwrap();
        let options = LookOptions {
            vmm_version: version.map(str::to_owned),
            low_memory_bytes: low,
            layout: (format.0 > 6 && low.is_none()).then_some(GuestLayout::Standard),
            ..LookOptions::default()
        };
        // Reading 4 GiB of holes to compare them is not what this is about.
        let report = world
            .import_with(Format::Firecracker, &world.path("big"), &options, Parent::None, false)
            .unwrap();
        let layout = &report.snapshots[0].commit.manifest.memory_layout;
        let rows: Vec<_> = layout.iter().map(|row| (row.guest_address, row.length)).collect();
        assert_eq!(rows, [(Some(0), first), (Some(4 * gib), 4 * gib - first)], "{format:?}");
    }
}

/// The story of wrenn's months of crashes, in Firecracker's own file: in a diff a page of zeros that
/// is there was zeroed by the guest, and a hole is what it did not touch.
#[test]
fn a_hole_of_a_diff_is_the_parents_page_and_a_zero_of_it_is_zero() {
    let world = World::new();
    let base = memory(2);
    firecracker_folder(&world, "full", (9, 0, 0), &base);
    import_standard(&world, "full").unwrap();
    let mut now = base.clone();
    let data: Vec<usize> =
        (0..512).filter(|page| base[page * PAGE..][..PAGE].iter().any(|&byte| byte != 0)).collect();
    let (zeroed, written) = (data[3], data[9]);
    now[zeroed * PAGE..][..PAGE].fill(0);
    now[written * PAGE..][..PAGE].fill(0x55);
    fs::create_dir_all(world.path("diff")).unwrap();
    diff(&world.path("diff").join("mem"), &now, &[zeroed, written]).unwrap();
    fs::write(world.path("diff").join("state"), vmstate((9, 0, 0), b"later")).unwrap();
    let options = LookOptions {
        is_diff: true,
        layout: Some(GuestLayout::Standard),
        ..LookOptions::default()
    };
    let refused =
        world.import_over(Format::Firecracker, &world.path("diff"), &options, Parent::Auto);
    assert!(chain(&refused.unwrap_err()).contains("--parent"));
    let parent = || Parent::Snapshot("vm@1".parse().unwrap());
    let done = world.import_over(Format::Firecracker, &world.path("diff"), &options, parent());
    assert!(done.unwrap().notes.is_empty());
    assert_same(&world.bytes("vm@2", "memory"), &now, "memory");
    // And out again, against its ancestor, as Firecracker would have written it.
    let request = ExportRequest { base: Some("vm@1".parse().unwrap()), ..ExportRequest::default() };
    world.export("vm@2", &world.path("out"), Format::Firecracker, &request).unwrap();
    let file = fs::File::open(world.path("out").join("memory")).unwrap();
    let extents: Vec<_> = dormouse_sys::sparse::data_extents(&file, 0..base.len() as u64)
        .map(|extent| extent.unwrap())
        .flat_map(|extent| extent.start / 4096..extent.end.div_ceil(4096))
        .collect();
    let mut expected = vec![zeroed as u64, written as u64];
    expected.sort_unstable();
    assert_eq!(extents, expected, "data in the diff, by page");
    let other = World::new();
    let options_full = LookOptions { layout: Some(GuestLayout::Standard), ..Default::default() };
    let full = world.path("full");
    other.import_over(Format::Firecracker, &full, &options_full, Parent::Auto).unwrap();
    other.import_over(Format::Firecracker, &world.path("out"), &options, parent()).unwrap();
    assert_same(&other.bytes("vm@2", "memory"), &now, "memory that went out and in again");
}

/// A guest that memory can be plugged into has a region behind the others, all of it in the file, and
/// was laid out as if the file were memory from address 0 on.
#[test]
fn where_memory_lies_is_not_guessed_where_it_may_be_plugged() {
    let world = World::new();
    firecracker_folder(&world, "fc", (8, 0, 0), &memory(5));
    let look_with = |format: u64, options: LookOptions| {
        fs::write(world.path("fc").join("state"), vmstate((format, 0, 0), b"devices")).unwrap();
        look(Format::Firecracker, &world.path("fc"), &options).map(|found| {
            let rows = &found.generations[0].memory_layout;
            rows.iter().map(|row| (row.guest_address.unwrap(), row.length)).collect::<Vec<_>>()
        })
    };
    let version = |version: &str| LookOptions {
        vmm_version: Some(version.to_owned()),
        ..LookOptions::default()
    };
    let layout = |layout| LookOptions { layout: Some(layout), ..LookOptions::default() };
    let regions = |regions: &[(u64, u64)]| layout(GuestLayout::Regions(regions.to_vec()));
    let mib = 1 << 20_u64;
    for (format, options) in
        [(8, LookOptions::default()), (10, LookOptions::default()), (8, version("1.14.2"))]
    {
        let error = look_with(format, options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("--layout"), "{error}");
    }
    for options in [version("1.13.1"), layout(GuestLayout::Standard)] {
        assert_eq!(look_with(8, options).unwrap(), [(0, 2 * mib)]);
    }
    let plugged = [(0, mib), (512 << 30, mib)];
    assert_eq!(look_with(8, regions(&plugged)).unwrap(), plugged);
    for (wrong, why) in [
        (&[(0, mib)][..], "has 1048576 bytes; expected 2097152"),
        (&[(0, mib), (4096, mib)], "whole pages from 0x100000 on"),
        (&[(0, mib), (mib + 1, mib)], "whole pages"),
        (&[(0, 0), (mib, 2 * mib)], "whole pages"),
    ] {
        let error = look_with(8, regions(wrong)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains(why), "got: {error}\nexpected: {why}");
    }
}

/// Nothing in a memory file tells a diff from a full one, so what is likely to be the other is said.
#[test]
fn holes_in_a_full_file_and_none_in_a_diff_are_remarked_on() {
    let world = World::new();
    let memory = vec![7; 2 << 20];
    firecracker_folder(&world, "dense", (9, 0, 0), &memory);
    firecracker_folder(&world, "sparse", (9, 0, 0), &memory);
    diff(&world.path("sparse").join("mem"), &memory, &[3]).unwrap();
    let notes = |name: &str, is_diff: bool| {
        let options =
            LookOptions { is_diff, layout: Some(GuestLayout::Standard), ..LookOptions::default() };
        look(Format::Firecracker, &world.path(name), &options).unwrap().notes.join("\n")
    };
    assert!(notes("sparse", false).contains("are taken for zeros; if it is a diff"));
    assert!(notes("dense", true).contains("has no hole"));
    assert_eq!(notes("sparse", true) + &notes("dense", false), "");
}

#[test]
fn diffs_that_may_be_of_the_broken_releases_are_refused() {
    let world = World::new();
    let base = memory(3);
    firecracker_folder(&world, "full", (8, 0, 0), &base);
    import_standard(&world, "full").unwrap();
    let cases = [
        (None, Some("--vmm-version")),
        (Some("1.14.0"), Some("#5705")),
        (Some("v1.14.1"), Some("#5705")),
        (Some("1.14"), Some("expected one such as")),
        (Some("1.14.2"), None),
        (Some("1.13.0"), None),
        (Some("1.12.0"), Some("the vmstate is of 1.13 or 1.14")),
        (Some("1.15.0"), Some("the vmstate is of 1.13 or 1.14")),
    ];
    for (version, why) in cases {
        let options = LookOptions {
            is_diff: true,
            layout: Some(GuestLayout::Standard),
            vmm_version: version.map(str::to_owned),
            ..LookOptions::default()
        };
        let parent = Parent::Snapshot("vm@1".parse().unwrap());
        let done = world.import_over(Format::Firecracker, &world.path("full"), &options, parent);
        match why {
            None => drop(done.unwrap()),
            Some(why) => assert!(chain(&done.unwrap_err()).contains(why), "{version:?}"),
        }
    }
}

/// Since 1.15 a state begins with how it is packed, and was called damaged; and no version was ever read, as
/// it is text.
#[test]
fn vmstates_of_both_encodings_are_read() {
    let fixed = [&[0, 0, 0x64, 0x86, 0x84, 0x19, 0x10, 7, 5, 0, 0, 0, 0, 0, 0, 0], &b"8.0.0"[..]];
    let packed = [&[0, 0, 0, 0x64, 0x86, 0x84, 0x19, 0x10, 7, 6], &b"11.0.0"[..]];
    for (head, format, releases) in
        [(fixed, (8, 0, 0), Some("1.13 or 1.14")), (packed, (11, 0, 0), None)]
    {
        let bytes = vmstate(format, b"devices");
        assert!(bytes.starts_with(&head.concat()), "{bytes:?}");
        let state = VmState::parse(&bytes).unwrap();
        assert_eq!((state.arch, state.format), ("x86_64", Some(format)));
        assert!(state.checksum_matches);
        assert_eq!(state.releases(), releases);
        let world = World::new();
        firecracker_folder(&world, "fc", format, &memory(1));
        let found = detect(&world.path("fc"), &LookOptions::default()).unwrap();
        assert_eq!(found.format, Format::Firecracker);
        import_standard(&world, "fc").unwrap();
        assert_eq!(world.bytes("vm", "state/vmstate"), bytes);
    }
}

#[test]
fn a_vmstate_that_was_cut_or_changed_is_refused() {
    let world = World::new();
    let memory = memory(4);
    let good = vmstate((9, 0, 0), b"devices");
    assert!(VmState::parse(&good).unwrap().checksum_matches);
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert!(!VmState::parse(&bad).is_ok_and(|state| state.checksum_matches), "byte {at}");
        assert!(!VmState::parse(&good[..at]).is_ok_and(|state| state.checksum_matches));
    }
    firecracker_folder(&world, "cut", (9, 0, 0), &memory);
    fs::write(world.path("cut").join("state"), &good[..good.len() - 1]).unwrap();
    let error = world.import(Format::Firecracker, &world.path("cut")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    fs::write(world.path("cut").join("state"), &good).unwrap();
    fs::write(world.path("cut").join("mem"), &memory[..memory.len() - 4096]).unwrap();
    let options =
        LookOptions { state: Some(world.path("cut").join("state")), ..LookOptions::default() };
    let done = world.import_over(
        Format::Firecracker,
        &world.path("cut").join("mem"),
        &options,
        Parent::Auto,
    );
    assert!(chain(&done.unwrap_err()).contains("expected whole MiB"));
}

fn zones() -> Vec<Zone> {
    let zone = |id: &str, gpa: u64, seed: u64, saved: bool| Zone {
        id: id.to_owned(),
        gpa,
        memory: Random::new(seed).device(200),
        saved,
    };
    // As a hash table gives them: not by address.
    vec![zone("high", 1 << 32, 5, true), zone("shm", 2 << 32, 6, false), zone("low", 0, 7, true)]
}

#[test]
fn cloud_hypervisors_ranges_keep_their_order_and_persisted_zones_are_absent() {
    let world = World::new();
    let zones = zones();
    cloud_hypervisor::write(&world.path("ch"), &zones, "/srv/disks/root.raw").unwrap();
    let report = world.import(Format::CloudHypervisor, &world.path("ch")).unwrap();
    let expected = [zones[0].memory.clone(), zones[2].memory.clone()].concat();
    assert_same(&world.bytes("vm", "memory"), &expected, "memory");
    let manifest = &report.snapshots[0].commit.manifest;
    let rows: Vec<_> = manifest
        .memory_layout
        .iter()
        .map(|row| (row.block.as_str(), row.guest_address, row.image_offset))
        .collect();
    let bytes = zones[0].memory.len() as u64;
    assert_eq!(rows, [("high", Some(1 << 32), 0), ("low", Some(0), bytes)]);
    assert_eq!(manifest.vmm.vcpus, Some(2));
    assert!(report.notes.iter().any(|note| note.contains("zone shm")), "{:?}", report.notes);
}

#[test]
fn cloud_hypervisors_folder_goes_out_ready_for_a_restore() {
    let world = World::new();
    cloud_hypervisor::write(&world.path("ch"), &zones(), "/srv/disks/root.raw").unwrap();
    world.import(Format::CloudHypervisor, &world.path("ch")).unwrap();
    let disk = Random::new(8).device(100);
    let mut request = dormouse_store::commit::CommitRequest::new("vm".parse().unwrap());
    request = request
        .image("root".parse().unwrap(), dormouse_store::source::Source::Bytes(disk.clone().into()));
    world.store.commit(request, dormouse_store::progress::Job::quiet()).unwrap();
    let request = ExportRequest {
        rewrite: vec![("tap0".to_owned(), "tap7".to_owned())],
        ..ExportRequest::default()
    };
    let out = world.path("out");
    let wrong = ExportRequest {
        rewrite: vec![("tap9".to_owned(), "tap7".to_owned())],
        ..ExportRequest::default()
    };
    let error = world.export("vm@2", &out, Format::CloudHypervisor, &wrong).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(chain(&error).contains("tap9"), "{}", chain(&error));
    world.export("vm@2", &out, Format::CloudHypervisor, &request).unwrap();
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    let path = config["disks"][0]["path"].as_str().unwrap();
    assert_eq!(path, out.join("root.img").to_str().unwrap());
    assert_same(&fs::read(path).unwrap(), &disk, "disk");
    assert_eq!(config["net"][0]["tap"], "tap7");
    for name in ["state.json", "memory-ranges"] {
        let [got, expected] =
            ["out", "ch"].map(|dir| fs::read(world.path(dir).join(name)).unwrap());
        assert_same(&got, &expected, name);
    }
}

/// The states that we add and the disks that the configuration does not have were left out without a word.
#[test]
fn nothing_of_a_cloud_hypervisors_snapshot_is_left_out_silently() {
    let world = World::new();
    cloud_hypervisor::write(&world.path("ch"), &zones(), "/srv/disks/root.raw").unwrap();
    world.import(Format::CloudHypervisor, &world.path("ch")).unwrap();
    let mut request = dormouse_store::commit::CommitRequest::new("vm".parse().unwrap());
    let bytes = |seed| Random::new(seed).device(100);
    let manifest = world.store.manifest(&"vm".parse().unwrap()).unwrap();
    for entry in &manifest.images {
        let content = world.bytes("vm", &entry.image.to_string());
        let source = dormouse_store::source::Source::Bytes(content.into());
        request = request.image(entry.image.clone(), source);
    }
    for (image, seed) in [("root", 8), ("data", 9), ("state/dormouse-guest.json", 10)] {
        let source = dormouse_store::source::Source::Bytes(bytes(seed).into());
        request = request.image(image.parse().unwrap(), source);
    }
    world.store.commit(request, dormouse_store::progress::Job::quiet()).unwrap();
    let out = world.path("out");
    let report =
        world.export("vm", &out, Format::CloudHypervisor, &ExportRequest::default()).unwrap();
    let told = report.notes.join("\n");
    assert!(told.contains("state/dormouse-guest.json of vm@2 skipped"), "{told}");
    for (image, seed) in [("root", 8), ("data", 9)] {
        let file = format!("{image}.img");
        assert_same(&fs::read(out.join(&file)).unwrap(), &bytes(seed), image);
        assert!(
            told.contains(&format!("disk/{image} of vm@2 is no disk of config.json")),
            "{told}"
        );
        assert!(report.files.iter().any(|(name, _)| *name == file), "{report:?}");
    }
}

/// As later versions of wrenn lay their folders out; of any kind of disk but ext4 nothing was taken.
#[test]
fn the_disk_beside_a_folder_of_cloud_hypervisors_is_its_disk() {
    for (name, path) in [
        ("rootfs.ext4", "/srv/disks/root.raw"),
        ("rootfs.raw", "/srv/disks/root.raw"),
        ("rootfs.raw", "/srv/vm/rootfs.raw"),
    ] {
        let world = World::new();
        cloud_hypervisor::write(&world.path("ch"), &zones(), path).unwrap();
        let disk = Random::new(9).device(50);
        fs::write(world.path("ch").join(name), &disk).unwrap();
        let report = world.import(Format::CloudHypervisor, &world.path("ch")).unwrap();
        assert!(report.notes.iter().all(|note| !note.contains("not in the folder")), "{report:?}");
        assert_same(&world.bytes("vm@1", "root"), &disk, name);
        let out = world.path("out");
        world.export("vm@1", &out, Format::CloudHypervisor, &ExportRequest::default()).unwrap();
        assert_same(&fs::read(out.join("root.img")).unwrap(), &disk, name);
        fs::write(world.path("ch").join("rootfs.img"), &disk).unwrap();
        let error = world.import(Format::CloudHypervisor, &world.path("ch")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(chain(&error).contains("which of them is the disk"), "{}", chain(&error));
    }
}

/// What an export wrote beside the state comes in again, wherever the folder is by then.
#[test]
fn configured_disks_in_a_folder_of_cloud_hypervisors_come_in() {
    let world = World::new();
    cloud_hypervisor::write(&world.path("ch"), &zones(), "/was/out/disk0.img").unwrap();
    let disk = Random::new(9).device(50);
    fs::write(world.path("ch").join("disk0.img"), &disk).unwrap();
    let report = world.import(Format::CloudHypervisor, &world.path("ch")).unwrap();
    assert!(report.notes.iter().all(|note| !note.contains("not in the folder")), "{report:?}");
    assert_same(&world.bytes("vm@1", "disk/disk0"), &disk, "disk");
}

/// Stores have states by the names that imports gave them once.
#[test]
fn states_by_their_older_names_go_out() {
    let world = World::new();
    let zones = zones();
    cloud_hypervisor::write(&world.path("ch"), &zones, "/srv/disks/root.raw").unwrap();
    let memory = [zones[0].memory.clone(), zones[2].memory.clone()].concat();
    let [config, state] =
        ["config.json", "state.json"].map(|name| fs::read(world.path("ch").join(name)).unwrap());
    world.commit(&[("memory", &memory), ("state/config", &config), ("state/state", &state)]);
    let out = world.path("out");
    world.export("vm@1", &out, Format::CloudHypervisor, &ExportRequest::default()).unwrap();
    assert_eq!(fs::read(out.join("state.json")).unwrap(), state);
}

#[test]
fn cloud_hypervisors_short_writes_and_lies_are_refused() {
    let world = World::new();
    let dir = world.path("ch");
    let write = || cloud_hypervisor::write(&dir, &zones(), "/x").unwrap();
    let refused = |why: &str| {
        let error = world.import(Format::CloudHypervisor, &dir).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{why}");
        assert!(chain(&error).contains(why), "got: {}\nexpected: {why}", chain(&error));
    };
    for name in ["config.json", "state.json"] {
        write();
        let bytes = fs::read(dir.join(name)).unwrap();
        fs::write(dir.join(name), &bytes[..bytes.len() - 5]).unwrap();
        refused("was it written short?");
    }
    write();
    let file = fs::File::options().write(true).open(dir.join("memory-ranges")).unwrap();
    file.set_len(4096).unwrap();
    refused("has 4096 bytes; state.json lists 2 ranges");
    for (from, to, why) in [
        (r#"\"gpa\":4294967296,\"length\""#, r#"\"gpa\":4096,\"length\""#, "overlaps another"),
        (
            r#"\"gpa\":4294967296,\"length\""#,
            r#"\"gpa\":4294967297,\"length\""#,
            "expected whole pages",
        ),
        (
            r#"\"gpa\":4294967296,\"length\":819200"#,
            r#"\"gpa\":4294967296,\"length\":0"#,
            "has 0 bytes",
        ),
        ("memory_ranges", "memory_strange", "missing field"),
        ("memory-manager", "memory-mangler", "no text at snapshots.memory-manager"),
    ] {
        write();
        let text = fs::read_to_string(dir.join("state.json")).unwrap();
        assert!(text.contains(from), "{from} in {text}");
        fs::write(dir.join("state.json"), text.replace(from, to)).unwrap();
        refused(why);
    }
}

#[test]
fn a_mapped_ram_file_comes_in_and_goes_out_as_it_was() {
    let world = World::new();
    let mut random = Random::new(9);
    let blocks = vec![
        Block { name: "pc.ram".to_owned(), memory: random.device(1000) },
        Block { name: "pc.rom".to_owned(), memory: random.device(3) },
        Block { name: "/rom@etc/acpi/tables".to_owned(), memory: vec![0; 2 * PAGE] },
    ];
    let clean = mapped_ram(&blocks, 0);
    fs::write(world.path("stale"), mapped_ram(&blocks, 50)).unwrap();
    let report = world.import(Format::MappedRam, &world.path("stale")).unwrap();
    let expected: Vec<u8> = blocks.iter().flat_map(|block| block.memory.iter().copied()).collect();
    assert_same(&world.bytes("vm", "memory"), &expected, "memory");
    let layout = &report.snapshots[0].commit.manifest.memory_layout;
    assert_eq!(layout[2].block, "/rom@etc/acpi/tables");
    assert_eq!(layout[1].image_offset, 1000 * PAGE as u64);
    world.export("vm", &world.path("out"), Format::MappedRam, &ExportRequest::default()).unwrap();
    assert_same(&fs::read(world.path("out")).unwrap(), &clean, "file without what nobody reads");
    assert_eq!(
        detect(&world.path("out"), &LookOptions::default()).unwrap().format,
        Format::MappedRam
    );
}

#[test]
fn a_memory_backend_file_is_matched_with_its_stream() {
    let world = World::new();
    let memory = memory(10);
    fs::create_dir_all(world.path("q")).unwrap();
    fs::write(world.path("q").join("mem.bin"), &memory).unwrap();
    let stream = ignore_shared(("mem0", memory.len()), &[("pc.bios", 262_144), ("vga", 16 << 20)]);
    fs::write(world.path("q").join("state"), &stream).unwrap();
    let report = world.import(Format::Qemu, &world.path("q")).unwrap();
    let manifest = &report.snapshots[0].commit.manifest;
    assert_eq!(manifest.memory_layout[0].block, "mem0");
    assert_eq!(manifest.labels["qemu.machine"], "pc-q35-10.0");
    world.export("vm", &world.path("out"), Format::Qemu, &ExportRequest::default()).unwrap();
    assert_same(&fs::read(world.path("out").join("memory")).unwrap(), &memory, "memory");
    assert_eq!(fs::read(world.path("out").join("stream")).unwrap(), stream);
    fs::write(world.path("q").join("mem.bin"), &memory[..4096]).unwrap();
    let error = world.import(Format::Qemu, &world.path("q")).unwrap_err();
    assert!(chain(&error).contains("has 4096 bytes, and 0 RAM blocks"), "{}", chain(&error));
}

#[test]
fn streams_that_lie_are_refused() {
    let world = World::new();
    let blocks = [Block { name: "pc.ram".to_owned(), memory: Random::new(11).device(100) }];
    let good = mapped_ram(&blocks, 0);
    let name = good.windows(6).position(|window| window == b"pc.ram").unwrap();
    let header = name + 6 + 8;
    let patched = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        bad
    };
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (patched(0, b"X"), "magic"),
        (patched(7, &[9]), "version 9; expected 3"),
        (patched(name + 6, &u64::MAX.to_be_bytes()), "are left of"),
        (patched(name + 6, &0_u64.to_be_bytes()), "has 0 bytes"),
        (patched(header, &7_u32.to_be_bytes()), "mapped-ram version 7"),
        (patched(header + 4, &5000_u64.to_be_bytes()), "pages of 5000 bytes"),
        (patched(header + 12, &1_u64.to_be_bytes()), "bitmap at 1 and"),
        (patched(header + 12, &u64::MAX.to_be_bytes()), "bitmap at 18446744073709551615"),
        (patched(header + 20, &4096_u64.to_be_bytes()), ""),
        (patched(header + 20, &(1_u64 << 40).to_be_bytes()), "which has"),
        (good[..header + 3].to_vec(), "it ends after 3 more bytes"),
        (good[..good.len() - 600_000].to_vec(), ""),
    ];
    for (bytes, why) in cases {
        fs::write(world.path("bad"), bytes).unwrap();
        match world.import(Format::MappedRam, &world.path("bad")) {
            Err(error) => {
                assert!(chain(&error).contains(why), "got: {}\nexpected: {why}", chain(&error));
            }
            // What is past the header is taken as it lies; then the comparison agrees with it.
            Ok(_) => assert!(why.is_empty(), "taken; expected: {why}"),
        }
    }
}
