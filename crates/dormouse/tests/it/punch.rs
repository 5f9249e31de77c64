//! `punch`, and `du` of folders that are no stores.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use crate::fixture::{Home, code, noise};

/// A dense file: data, 1 MiB of zeros, data.
fn dense() -> Vec<u8> {
    let mut bytes = noise(1, 16);
    bytes.resize(bytes.len() + (1 << 20), 0);
    bytes.extend(noise(2, 16));
    bytes
}

fn allocated(path: &std::path::Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_folder_stands_for_its_memory_files() {
    let home = Home::new();
    fs::create_dir(home.path("vm")).unwrap();
    let memory = home.file("vm/memory-ranges", &dense());
    let other = home.file("vm/other", &dense());
    let before = home.json(&["du", "./vm"]);
    assert_eq!(before["files"], 2);
    assert_eq!(before["apparent_bytes"], 2 * dense().len() as u64);

    let trial = home.json(&["punch", "vm", "--dry-run"]);
    assert_eq!(trial["files"].as_array().unwrap().len(), 1);
    assert!(allocated(&memory) >= 1 << 20);

    let table = home.ok(&["punch", "vm"]);
    assert!(table.contains("memory-ranges"), "{table}");
    assert!(allocated(&memory) < 1 << 20, "{}", allocated(&memory));
    assert_eq!(fs::read(&memory).unwrap(), dense());
    assert!(allocated(&other) >= 1 << 20);
    let after = home.json(&["du", "./vm"]);
    let freed = |key: &str| before[key].as_u64().unwrap() - after[key].as_u64().unwrap();
    assert!(freed("allocated_bytes") >= 1 << 20);
    assert_eq!(freed("apparent_bytes"), 0);

    home.ok(&["punch", "vm", "--all", "--holes", "zero"]);
    assert!(allocated(&other) < 1 << 20);
}

#[test]
fn a_file_that_fails_keeps_no_other_from_being_punched() {
    let home = Home::new();
    let sparse = home.path("memory.diff");
    File::create(&sparse).unwrap().set_len(1 << 20).unwrap();
    let whole = home.file("memory.bin", &dense());
    let output = home.run(&["punch", "memory.diff", "memory.bin", "--json"]);
    assert_eq!(output.status.code(), Some(code::REFUSED));
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["failed"], 1);
    assert_eq!(object["files"][0]["error"]["kind"], "refused");
    assert!(object["files"][1]["reclaimed_bytes"].as_u64().unwrap() >= 1 << 20);
    assert!(allocated(&whole) < 1 << 20);

    let errors = home.fails(code::REFUSED, &["punch", "memory.diff"]);
    assert!(errors.contains("--holes zero"), "{errors}");
    home.fails(code::NOT_FOUND, &["punch", "missing"]);
    // Two failures of different kinds are neither's code.
    home.fails(1, &["punch", "missing", "memory.diff"]);
}

#[test]
fn du_of_what_is_not_there_says_so() {
    let home = Home::new();
    let errors = home.fails(code::NOT_FOUND, &["du", "./missing"]);
    assert!(errors.contains("missing"), "{errors}");
    home.file("one", &[1; 5000]);
    assert_eq!(home.json(&["du", "./one"])["apparent_bytes"], 5000);
}
