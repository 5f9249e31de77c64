//! What goes in comes out: commits, listings, exports and diffs.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::fixture::{Home, code, noise, set_block};

/// A store with `vm@1`: memory of 64 blocks, half of them zero, a disk and a state.
fn with_one() -> (Home, Vec<u8>) {
    let home = Home::with_store();
    let mut memory = noise(1, 32);
    memory.resize(64 * 4096, 0);
    home.file("mem", &memory);
    home.file("disk", &noise(2, 40));
    home.file("state", b"registers");
    let printed = home.ok(&[
        "commit",
        "vm",
        "--memory",
        "mem",
        "--disk",
        "disk",
        "--state",
        "state",
        "--label",
        "a=b",
        "--vmm",
        "qemu",
        "--vmm-version",
        "9.1",
        "--vcpus",
        "2",
    ]);
    assert_eq!(printed, "vm@1\n");
    (home, memory)
}

#[test]
fn every_image_comes_out_as_it_went_in() {
    let (home, memory) = with_one();
    home.ok(&["export", "vm:memory", "out"]);
    assert_eq!(fs::read(home.path("out")).unwrap(), memory);
    let metadata = fs::metadata(home.path("out")).unwrap();
    assert!(metadata.blocks() * 512 < metadata.len(), "zeros are holes");
    for (image, bytes) in [
        ("vm@1:root", noise(2, 40)),
        ("vm:disk/root", noise(2, 40)),
        ("vm:memory", memory),
        ("vm:state/vmstate", b"registers".to_vec()),
    ] {
        assert_eq!(home.run(&["cat", image]).stdout, bytes, "{image}");
    }
    let errors = home.fails(code::ALREADY_EXISTS, &["export", "vm:memory", "out"]);
    assert!(errors.contains("out") && errors.contains("--force"), "{errors}");
    home.ok(&["export", "vm:state/vmstate", "out", "--force"]);
    assert_eq!(fs::read(home.path("out")).unwrap(), b"registers");
    home.ok(&["export", "vm:state/vmstate", "new", "--force"]);
}

#[test]
fn a_folder_gets_everything_and_feeds_a_commit() {
    let (home, memory) = with_one();
    home.ok(&["export", "vm", "all/"]);
    let mut files = Vec::new();
    crate::fixture::walk(&home.path("all"), &mut files);
    let mut names: Vec<String> = files
        .iter()
        .map(|(path, _)| path.strip_prefix(home.path("all")).unwrap().display().to_string())
        .collect();
    names.sort();
    assert_eq!(names, ["disk/root", "manifest.json", "memory", "state/vmstate"]);
    assert_eq!(fs::read(home.path("all/memory")).unwrap(), memory);
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(home.path("all/manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["manifest"]["name"], "vm");

    home.fails(code::ALREADY_EXISTS, &["export", "vm", "all"]);
    home.fails(code::ALREADY_EXISTS, &["export", "vm", "mem"]);
    fs::create_dir(home.path("empty")).unwrap();
    home.ok(&["export", "vm", "empty"]);
    home.fails(code::NOT_FOUND, &["export", "vm", "no/such/place"]);
    let left = fs::read_dir(home.path("")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with('.')), "{left:?}");

    let object = home.json(&[
        "commit",
        "copy",
        "--memory",
        "all/memory",
        "--disk",
        "root=all/disk/root",
        "--state",
        "vmstate=all/state/vmstate",
    ]);
    assert_eq!(object["figures"]["new_bytes"], 0, "every block is there already");
}

#[test]
fn a_second_commit_stores_what_changed_and_inherits_disks() {
    let (home, mut memory) = with_one();
    set_block(&mut memory, 3, &noise(9, 1));
    set_block(&mut memory, 5, &[0; 4096]);
    home.file("mem2", &memory);
    let object = home.json(&["commit", "vm", "--memory", "mem2", "--state", "state"]);
    assert_eq!(object["snapshot"], "vm@2");
    assert_eq!(object["number"], 2);
    assert_eq!(object["parent"], "vm@1");
    assert_eq!(object["images"]["memory"]["changed_bytes"], 2 * 4096);
    assert_eq!(object["images"]["memory"]["new_bytes"], 4096);
    assert!(object["images"].get("disk/root").is_none(), "inherited");
    assert!(object["seconds"]["fsync"].is_number());
    assert_eq!(home.run(&["cat", "vm@2:root"]).stdout, noise(2, 40));
    assert_eq!(home.run(&["cat", "vm@2:memory"]).stdout, memory);

    let diff = home.json(&["diff", "vm@1", "vm@2"]);
    let images = diff["images"].as_array().unwrap();
    let changed = images.iter().find(|image| image["image"] == "memory").unwrap();
    assert_eq!(changed["changed_bytes"], 2 * 4096);
    assert_eq!(changed["now_zero_bytes"], 4096);
    assert_eq!(changed["regions"], serde_json::json!([[3 * 4096, 4096], [5 * 4096, 4096]]));
    let text = home.ok(&["diff", "vm@1", "vm@2", "--regions"]);
    assert!(text.contains("0x000000003000 + 4.0 KiB"), "{text}");
}

/// A zero that was data must be written as data: taken for "unchanged" it would bring back the
/// old block.
#[test]
fn a_diff_is_exported_and_committed_again() {
    let (home, mut memory) = with_one();
    set_block(&mut memory, 3, &noise(9, 1));
    set_block(&mut memory, 5, &[0; 4096]);
    home.file("mem2", &memory);
    home.ok(&["commit", "vm", "--memory", "mem2", "--state", "state"]);
    home.ok(&["export", "vm@2:memory", "diff", "--diff-from", "vm@1"]);
    let metadata = fs::metadata(home.path("diff")).unwrap();
    assert_eq!(metadata.len(), memory.len() as u64);
    assert!(metadata.blocks() * 512 < metadata.len() / 2);

    let errors =
        home.fails(code::REFUSED, &["commit", "vm", "--memory-diff", "diff", "--state", "state"]);
    assert!(errors.contains("parent"), "{errors}");
    home.ok(&["commit", "again", "--parent", "vm@1", "--memory-diff", "diff", "--state", "state"]);
    assert_eq!(home.run(&["cat", "again:memory"]).stdout, memory);
}

#[test]
fn a_diff_of_another_size_is_refused() {
    let (home, _) = with_one();
    let file = File::create(home.path("diff")).unwrap();
    file.set_len(65 * 4096).unwrap();
    file.write_all_at(&noise(3, 1), 0).unwrap();
    let arguments =
        ["commit", "vm", "--parent", "vm@1", "--memory-diff", "diff", "--state", "state"];
    let output = home.run(&arguments);
    assert!([2, 6].contains(&output.status.code().unwrap()), "{output:?}");
    assert_eq!(home.snapshots(), ["vm@1"]);
}

#[test]
fn memory_without_state_is_refused() {
    let (home, _) = with_one();
    home.fails(code::REFUSED, &["commit", "vm", "--memory", "mem"]);
    home.fails(code::REFUSED, &["commit", "vm", "--state", "state"]);
    assert_eq!(home.snapshots(), ["vm@1"]);
}

#[test]
fn ls_show_log_and_du_tell_about_snapshots() {
    let (home, _) = with_one();
    home.ok(&["commit", "fork", "--parent", "vm@1", "--disk", "data=disk"]);
    let table = home.ok(&["ls"]);
    assert!(table.lines().next().unwrap().starts_with("SNAPSHOT"), "{table}");
    assert!(table.contains("a=\"b\""), "{table}");
    assert_eq!(table.lines().count(), 3);
    assert_eq!(home.ok(&["ls", "fork"]).lines().count(), 2);
    home.fails(code::NOT_FOUND, &["ls", "nobody"]);

    let shown = home.ok(&["show", "vm"]);
    for told in ["vm@1", "qemu 9.1", "disk/root", "state/vmstate", "WRITTEN BY"] {
        assert!(shown.contains(told), "{told}: {shown}");
    }
    let tree = home.ok(&["log", "fork"]);
    assert!(tree.contains("● vm@1") && tree.contains("└─◉ fork@1"), "{tree}");

    let usage = home.ok(&["du"]);
    assert!(usage.contains("reclaimable"), "{usage}");
    assert!(home.ok(&["du", "vm@1"]).contains("vm@1"));
    home.fails(code::NOT_FOUND, &["du", "vm@9"]);
}

#[test]
fn a_map_tells_blocks_of_disks_from_others() {
    let home = Home::with_store();
    let disk = noise(2, 16);
    let mut memory = disk.clone();
    memory.extend(noise(3, 8));
    memory.resize(64 * 4096, 0);
    home.file("disk", &disk);
    home.file("mem", &memory);
    home.file("state", b"s");
    home.ok(&["commit", "vm", "--memory", "mem", "--disk", "disk", "--state", "state"]);
    let map = home.json(&["map", "vm:memory"]);
    assert_eq!(map["totals"]["disk_bytes"], 16 * 4096);
    assert_eq!(map["totals"]["own_bytes"], 8 * 4096);
    assert_eq!(map["totals"]["ancestor_bytes"], 0);
    assert_eq!(map["totals"]["zero_bytes"], 40 * 4096);
    assert_eq!(map["cells"].as_array().unwrap().len(), 64);
    let disk = home.json(&["map", "vm:root"]);
    assert_eq!(disk["totals"]["own_bytes"], 16 * 4096);

    set_block(&mut memory, 20, &noise(4, 1));
    home.file("mem", &memory);
    home.ok(&["commit", "vm", "--memory", "mem", "--state", "state"]);
    let map = home.json(&["map", "vm:memory"]);
    assert_eq!(map["totals"]["own_bytes"], 4096);
    assert_eq!(map["totals"]["ancestor_bytes"], 7 * 4096);

    // The snapshot that stored the blocks goes; what is on the disk stays known.
    home.ok(&["rm", "vm@1"]);
    let text = home.ok(&["map", "vm:memory"]);
    let row = format!("{}AAAAOAAA{}", "D".repeat(16), ".".repeat(40));
    assert!(text.contains(&row), "{text}");
    home.ok(&["map", "vm:memory", "--svg", "map.svg"]);
    let picture = fs::read_to_string(home.path("map.svg")).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("vm@2:memory"));
}

#[test]
fn a_memory_layout_is_kept() {
    let home = Home::with_store();
    home.file("mem", &noise(1, 4));
    home.file("state", b"s");
    home.file(
        "layout",
        br#"[{"image_offset": 0, "guest_address": 1048576, "length": 8192},
             {"block": "high", "image_offset": 8192, "length": 8192, "plugged": false}]"#,
    );
    let common = ["--memory", "mem", "--state", "state", "--memory-layout", "layout"];
    home.ok(&[&["commit", "vm"][..], &common].concat());
    let layout = &home.json(&["show", "vm"])["manifest"]["memory_layout"];
    assert_eq!(layout[0]["guest_address"], 1_048_576);
    assert_eq!(layout[0]["page_size"], 4096);
    assert_eq!(layout[1]["plugged"], false);
    home.file("layout", br#"[{"image_offset": 0, "length": 999999}]"#);
    home.fails(code::USAGE, &[&["commit", "vm"][..], &common].concat());
}

#[test]
fn images_can_be_dropped() {
    let (home, _) = with_one();
    home.ok(&["commit", "vm", "--drop", "root", "--disk", "data=disk"]);
    let images = &home.json(&["ls"])["snapshots"][1]["images"];
    assert_eq!(*images, serde_json::json!(["disk/data", "memory", "state/vmstate"]));
}
