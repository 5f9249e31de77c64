//! nbdcopy and qemu-img between raw files, qcow2 and live disks, in both directions.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};

use super::{BASE_BYTES, DISK_BYTES, MIB, Trial, same};
use crate::fixture::noise;

/// Bytes of a file on its file system.
fn allocated(trial: &Trial, file: &str) -> u64 {
    fs::metadata(trial.home.path(file)).unwrap().blocks() * 512
}

/// A raw file of the disk's length: a hole, data, zeros that take space, data up to the last byte.
fn new_content(trial: &Trial) {
    let file = File::create(trial.home.path("model")).unwrap();
    file.set_len(DISK_BYTES as u64).unwrap();
    file.write_all_at(&noise(5, 300), (3 * MIB + 512) as u64).unwrap();
    file.write_all_at(&vec![0; MIB], (6 * MIB) as u64).unwrap();
    file.write_all_at(&noise(6, 256)[..MIB - 512], (DISK_BYTES - MIB + 512) as u64).unwrap();
}

#[test]
fn nbdcopy_reads_and_writes_whole_disks() {
    let mut trial = Trial::over_an_image();
    trial.run("nbdcopy", &["--connections=4", &trial.uri(), "out"]);
    same(&fs::read(trial.home.path("out")).unwrap(), &trial.model(), "a copy of the disk");
    let data = BASE_BYTES - 8 * MIB;
    assert!(allocated(&trial, "out") <= data as u64, "the copy has not the disk's holes");

    new_content(&trial);
    trial.commit_during(|trial| {
        let uri = &trial.uri();
        trial.run("nbdcopy", &["--connections=4", "--requests=32", "--flush", "model", uri]);
    });
    trial.agree();
    trial.run("nbdcopy", &["--synchronous", &trial.uri(), "out"]);
    assert!(allocated(&trial, "out") <= 3 * MIB as u64, "the copy has not the disk's holes");
    let image = trial.home.json(&["show", "vm"]);
    let image = &image["manifest"]["images"][0];
    assert_eq!(image["size_bytes"], DISK_BYTES);
}

/// What is equal to the base again costs the disk, but not the commit.
#[test]
fn nbdcopy_of_the_same_again_stores_nothing() {
    let mut trial = Trial::over_an_image();
    trial.run("nbdcopy", &["--allocated", "--flush", "model", &trial.uri()]);
    let status = trial.home.json(&["disk", "status", "box"]);
    assert!(status["disks"][0]["dirty_bytes"].as_u64().unwrap() >= 10 * MIB as u64, "{status}");
    let committed = trial.home.json(&["disk", "commit", "box", "vm"]);
    assert_eq!(committed["figures"]["new_bytes"], 0, "{committed}");
    trial.agree();
}

#[test]
fn qemu_img_converts_and_compares() {
    let mut trial = Trial::over_an_image();
    let uri = trial.uri();
    let about = trial.run("qemu-img", &["info", "--output=json", "-f", "raw", &uri]);
    let about: serde_json::Value = serde_json::from_str(&about).unwrap();
    assert_eq!(about["virtual-size"], DISK_BYTES);
    // The snapshot below is the disk's beginning.
    let shorter = ["compare", "-f", "raw", "-F", "raw", &trial.uri_of("vm@1:root"), &uri];
    trial.run("qemu-img", &shorter);

    trial.run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-c", &uri, "disk.qcow2"]);
    trial.run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, "disk.qcow2"]);
    trial.run("qemu-img", &["convert", "-f", "raw", "-O", "raw", "-S", "4k", &uri, "out"]);
    same(&fs::read(trial.home.path("out")).unwrap(), &trial.model(), "a raw copy");
    let data = BASE_BYTES - 8 * MIB;
    assert!(allocated(&trial, "out") <= data as u64, "the copy has not the disk's holes");

    new_content(&trial);
    trial.run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "model", "new.qcow2"]);
    trial.commit_during(|trial| {
        let onto = ["convert", "-n", "-W", "-m", "8", "-f", "qcow2", "-O", "raw", "new.qcow2"];
        trial.run("qemu-img", &[&onto[..], &[&uri]].concat());
    });
    let other = ["compare", "-f", "raw", "-F", "qcow2", &uri, "disk.qcow2"];
    let differs = std::process::Command::new("qemu-img")
        .current_dir(trial.home.path("."))
        .args(other)
        .output()
        .unwrap();
    assert_eq!(differs.status.code(), Some(1), "the old content is not the new: {differs:?}");
    trial.agree();
}
