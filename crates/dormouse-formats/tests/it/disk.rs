//! Disks through qemu-img, with qemu-img as the judge.

use std::fs;
use std::path::Path;
use std::process::Command;

use dormouse_formats::error::ErrorKind;
use dormouse_formats::export::ExportRequest;
use dormouse_formats::format::Format;
use dormouse_testkit::foreign::random::Random;

use crate::world::{World, assert_same, chain};

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img")
        .args(arguments)
        .output()
        .expect("qemu-img of the package qemu-utils");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {said}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn disks_of_many_formats_come_in() {
    for (format, options) in [
        ("qcow2", &["-c", "-o", "compression_type=zstd"][..]),
        ("qcow2", &["-o", "cluster_size=512"]),
        ("vmdk", &[]),
        ("vhdx", &[]),
        ("vpc", &["-o", "force_size=on"]),
        ("vdi", &[]),
    ] {
        let world = World::new();
        // What is zero now must not be as in the snapshot before.
        world.commit(&[("root", &Random::new(9).device(3000))]);
        let disk = Random::new(1).device(3000);
        fs::write(world.path("raw"), &disk).unwrap();
        let path = world.path("disk");
        let mut arguments = vec!["convert", "-f", "raw", "-O", format];
        arguments.extend(options);
        let raw = world.path("raw");
        arguments.extend([text(&raw), text(&path)]);
        qemu_img(&arguments);
        let report = world.import(Format::Qcow2, &path).unwrap();
        let mut got = world.bytes("vm", "root");
        // A vhdx has whole MiB.
        assert!(got.len() >= disk.len() && got.len() - disk.len() < 1 << 20, "{format}");
        got.truncate(disk.len());
        assert_same(&got, &disk, format);
        assert_eq!(report.version, format);
        // The others allocate MiB at once, or do not tell.
        if matches!(format, "qcow2" | "vmdk") {
            let figures = report.snapshots[0].commit.manifest.figures;
            assert!(figures.skipped_bytes > 0, "{format}: zeros are not read");
        }
    }
}

#[test]
fn a_backing_chain_becomes_generations() {
    let world = World::new();
    let mut random = Random::new(2);
    let mut disk = random.device(1000);
    fs::write(world.path("base.raw"), &disk).unwrap();
    let mut kept = vec![disk.clone()];
    let mut lower = ("base.raw".to_owned(), "raw");
    for number in 1..4 {
        let name = format!("layer{number}.qcow2");
        let path = world.path(&name);
        let mut arguments = vec!["create", "-f", "qcow2", "-F", lower.1, "-b", &lower.0];
        arguments.push(text(&path));
        qemu_img(&arguments);
        // Single pages, so that clusters are copied up, and a zeroed stretch.
        for _ in 0..20 {
            let at = random.below(1000) * 4096;
            let byte = 1 + random.below(250) as u8;
            disk[at..at + 4096].fill(byte);
            let write = format!("write -P {byte} {at} 4096");
            qemu_io(&path, &write);
        }
        let at = random.below(900) * 4096;
        disk[at..at + 200_000].fill(0);
        qemu_io(&path, &format!("write -z {at} 200000"));
        kept.push(disk.clone());
        lower = (name, "qcow2");
    }
    let report = world.import(Format::Qcow2, &world.path("layer3.qcow2")).unwrap();
    assert_eq!(report.snapshots.len(), 4);
    for (number, disk) in kept.iter().enumerate() {
        assert_same(&world.bytes(&format!("vm@{}", number + 1), "root"), disk, "layer");
    }
    let figures = report.snapshots[3].commit.manifest.figures;
    assert!(figures.skipped_bytes > figures.raw_bytes / 2, "what a layer has not is not read");
}

fn qemu_io(path: &Path, command: &str) {
    let output = Command::new("qemu-io").args(["-f", "qcow2", "-c", command]).arg(path).output();
    let output = output.expect("qemu-io of the package qemu-utils");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// An image may name any file of the host as what it lies over.
#[test]
fn what_an_image_names_outside_of_its_folder_is_not_opened() {
    let world = World::new();
    fs::create_dir(world.path("tenant")).unwrap();
    fs::write(world.path("secret"), vec![7; 1 << 20]).unwrap();
    let path = world.path("tenant").join("disk.qcow2");
    let secret = world.path("secret");
    qemu_img(&["create", "-f", "qcow2", "-F", "raw", "-b", text(&secret), text(&path)]);
    let error = world.import(Format::Qcow2, &path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(chain(&error).contains("outside of"), "{}", chain(&error));
    let (path, data) = (world.path("tenant").join("split.qcow2"), world.path("secret"));
    let options = format!("data_file={},data_file_raw=on", text(&data));
    qemu_img(&["create", "-f", "qcow2", "-o", &options, text(&path), "1M"]);
    let error = world.import(Format::Qcow2, &path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(world.store.list(None).unwrap().snapshots.is_empty());
}

#[test]
fn a_disk_goes_out_as_a_qcow2_that_qemu_img_finds_right() {
    for (seed, pages, cut) in [(3, 3000, 0), (4, 20_000, 512), (5, 1, 1000), (6, 17, 0)] {
        let world = World::new();
        let mut random = Random::new(seed);
        let mut disk = random.device(pages);
        // Some clusters that cannot be compressed.
        for byte in disk.iter_mut().take(pages * 400) {
            *byte = (random.number() >> 20) as u8;
        }
        disk.truncate(disk.len() - cut);
        world.commit(&[("root", &disk)]);
        let path = world.path("out.qcow2");
        world.export("vm", &path, Format::Qcow2, &ExportRequest::default()).unwrap();
        qemu_img(&["check", "-f", "qcow2", text(&path)]);
        disk.resize(disk.len().next_multiple_of(512), 0);
        fs::write(world.path("raw"), &disk).unwrap();
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw", text(&path), text(&world.path("raw"))]);
        let info = Command::new("qemu-img").args(["info", text(&path)]).output().unwrap();
        assert!(String::from_utf8_lossy(&info.stdout).contains("compression type: zstd"));
    }
}

/// They were skipped without a word.
#[test]
fn internal_snapshots_are_told_and_skipped() {
    let world = World::new();
    let path = world.path("disk");
    qemu_img(&["create", "-f", "qcow2", text(&path), "1M"]);
    qemu_img(&["snapshot", "-c", "before", text(&path)]);
    let report = world.import(Format::Qcow2, &path).unwrap();
    assert_eq!(report.snapshots.len(), 1);
    let told = report.notes.iter().any(|note| note.contains("before") && note.contains("skipped"));
    assert!(told, "{:?}", report.notes);
}
