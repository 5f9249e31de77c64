//! `rm`, `prune`, `gc`, `compact` and `verify`.

use std::fs;

use crate::fixture::{Home, code, noise, walk};

fn with_three() -> Home {
    let home = Home::with_store();
    for seed in 1..=3 {
        home.file("disk", &noise(seed, 64));
        home.ok(&["commit", "vm", "--disk", "disk"]);
    }
    home
}

#[test]
fn removed_snapshots_go_and_their_numbers_stay_taken() {
    let home = with_three();
    assert_eq!(home.json(&["rm", "vm@2", "vm"])["removed"], serde_json::json!(["vm@2", "vm@3"]));
    assert_eq!(home.snapshots(), ["vm@1"]);
    home.fails(code::NOT_FOUND, &["rm", "vm@2"]);
    home.fails(code::NOT_FOUND, &["cat", "vm@3:root"]);
    assert_eq!(home.ok(&["commit", "vm", "--disk", "disk"]), "vm@4\n");
}

#[test]
fn one_snapshot_named_twice_is_one() {
    let home = with_three();
    assert_eq!(home.ok(&["rm", "vm", "vm@3", "vm", "-q"]), "vm@3\n");
    home.fails(code::NOT_FOUND, &["rm", "vm@1", "vm@9"]);
    assert_eq!(home.snapshots(), ["vm@1", "vm@2"]);
}

#[test]
fn gc_frees_what_nobody_needs() {
    let home = with_three();
    home.ok(&["rm", "vm@2"]);
    let before = home.published();
    let trial = home.json(&["gc", "--dry-run"]);
    assert_eq!(trial["dry_run"], true);
    assert_eq!(trial["deleted_files"], 1);
    assert_eq!(home.published(), before);
    let report = home.json(&["gc"]);
    assert_eq!(report["deleted_files"], 1);
    assert!(report["deleted_bytes"].as_u64().unwrap() >= 64 * 4096);
    assert_eq!(home.json(&["gc"])["deleted_files"], 0);
    assert_eq!(home.run(&["cat", "vm@1:root"]).stdout, noise(1, 64));
    assert_eq!(home.run(&["cat", "vm@3:root"]).stdout, noise(3, 64));
}

#[test]
fn prune_keeps_what_a_rule_keeps() {
    let home = with_three();
    let trial = home.json(&["prune", "vm", "--keep", "last=2", "--dry-run"]);
    assert_eq!(trial["removed"], serde_json::json!(["vm@1"]));
    assert_eq!(home.snapshots().len(), 3);
    let report = home.json(&["prune", "vm", "--keep", "last=2"]);
    assert_eq!(report["removed"], serde_json::json!(["vm@1"]));
    assert_eq!(report["kept"][1]["snapshot"], "vm@3");
    assert!(report["kept"][1]["rules"].as_array().unwrap().contains(&"last".into()), "{report}");
    assert_eq!(home.snapshots(), ["vm@2", "vm@3"]);
    let table = home.ok(&["prune", "vm", "--keep", "last=1"]);
    assert!(table.contains("removed") && table.contains("kept"), "{table}");
}

#[test]
fn compact_gathers_small_packs() {
    let home = with_three();
    let report = home.json(&["compact"]);
    assert_eq!(report["files_before"], 3);
    assert!(report["files_after"].as_u64().unwrap() < 3, "{report}");
    for seed in 1..=3 {
        assert_eq!(home.run(&["cat", &format!("vm@{seed}:root")]).stdout, noise(seed, 64));
    }
    home.ok(&["verify", "--deep"]);
}

#[test]
fn verify_names_what_a_damaged_frame_touches() {
    let home = with_three();
    assert_eq!(home.json(&["verify", "--deep"])["sound"], true);
    home.ok(&["verify", "vm@1"]);
    let newest =
        home.json(&["show", "vm@3"])["manifest"]["pack"]["id"].as_str().unwrap().to_owned();
    let mut packs = Vec::new();
    walk(&home.store().join("packs"), &mut packs);
    let (path, _) =
        packs.into_iter().find(|(path, _)| path.to_string_lossy().contains(&newest)).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[100_000] ^= 1;
    fs::write(&path, &bytes).unwrap();

    let output = home.run(&["verify", "--deep", "--json"]);
    assert_eq!(output.status.code(), Some(code::CORRUPT));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["sound"], false);
    let touches = &report["problems"][0]["touches"];
    assert_eq!(touches[0]["snapshot"], "vm@3");
    assert_eq!(touches[0]["image"], "disk/root");
    assert!(touches[0]["length"].as_u64().unwrap() >= 4096);
    let printed = home.run(&["verify", "--deep"]);
    assert!(String::from_utf8_lossy(&printed.stdout).contains("vm@3:disk/root at 0x"));

    let errors = home.fails(code::CORRUPT, &["export", "vm@3:root", "out"]);
    assert!(errors.contains("what to do"), "{errors}");
    assert!(!home.path("out").exists());
    home.fails(code::CORRUPT, &["export", "vm@3", "folder"]);
    assert!(!home.path("folder").exists());
    assert_eq!(home.run(&["cat", "vm@1:root"]).stdout, noise(1, 64));
}
