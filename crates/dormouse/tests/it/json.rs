//! The fields of every object, as `docs/cli.md` promises them. A field that goes breaks a script.

use serde_json::Value;

use dormouse_testkit::double::Program;

use crate::fixture::{Home, code, noise};
use crate::vm_fixture::Vms;

fn fields(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The fields of an object as they stand in its text: parsers take the last of two with one name.
fn written_fields(text: &str) -> Vec<String> {
    let mut fields = Vec::new();
    let (mut depth, mut rest) = (0, text);
    while let Some(at) = rest.find(['{', '[', '}', ']', '"']) {
        let (mark, behind) = (rest.as_bytes()[at], &rest[at + 1..]);
        rest = behind;
        match mark {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth -= 1,
            _ => {
                let (string, behind) = behind.split_once('"').unwrap();
                assert!(!string.contains('\\'), "{text}");
                if depth == 1 && behind.starts_with(':') {
                    fields.push(string.to_owned());
                }
                rest = behind;
            }
        }
    }
    fields
}

/// `inspect` and `kill` were documented nowhere. A VM's disks are those that it was made with: one that was
/// made beside them was in its next snapshot, and its guest never saw it.
#[test]
fn what_is_told_of_a_vm_and_no_disk_is_made_beside_its_own() {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    let inspect = home.json(&["inspect", "box"]);
    let all = [
        "api",
        "disks",
        "guest",
        "log",
        "name",
        "over",
        "pid",
        "problem",
        "since",
        "state",
        "version",
        "vmm",
        "vmm_version",
    ];
    assert_eq!(fields(&inspect), all);
    assert_eq!(fields(&inspect["disks"][0]), ["base", "id"]);
    let told: Value = serde_json::from_str(&home.ok(&["inspect", "box"])).unwrap();
    assert_eq!(told["guest"], inspect["guest"], "an object without --json, too");
    for create in [&["box/data", "--size", "1MiB"][..], &["box", "--size", "1MiB"]] {
        let refused = home.fails(code::BUSY, &[&["disk", "create"], create].concat());
        assert!(refused.contains("box is a VM; `dormouse kill box`"), "{refused}");
    }
    assert_eq!(home.json(&["inspect", "box"])["disks"].as_array().unwrap().len(), 1);
    let slept = home.json(&["sleep", "box", "--as", "vm", "--keep-running"]);
    assert_eq!(slept["snapshot"], "vm@1");
    let label = &home.json(&["ls"])["snapshots"][0]["labels"]["dormouse.sleep"];
    assert!(label.is_string(), "{label}");
    home.file("disk", &noise(1, 8));
    home.ok(&["commit", "plain", "--disk", "disk", "--label", "why=test"]);
    let ls = home.ok(&["ls"]);
    assert!(!ls.contains("dormouse.sleep") && ls.contains("why=\"test\""), "{ls}");
    assert!(home.ok(&["show", "vm"]).contains("dormouse.sleep="));
    let killed = home.json(&["kill", "box"]);
    assert_eq!(fields(&killed), ["killed", "name", "version"]);
    let docs = include_str!("../../../../docs/cli.md");
    for name in ["{name}", "{folder}", "{api}", "{disk:ID}", "{memory}", "{vsock}"] {
        assert!(docs.contains(&format!("| `{name}` |")), "{name}");
    }
}

/// `version` was there twice, as the objects' and as the format's.
#[test]
fn objects_of_foreign_formats_have_each_field_once() {
    let home = Home::with_store();
    home.file("disk", &noise(1, 8));
    let import = home.ok(&["import", "raw", "disk", "vm", "--json"]);
    let export = home.ok(&["export", "vm", "out", "--as", "qcow2", "--json"]);
    let detect = home.ok(&["detect", "out", "--json"]);
    for (text, fields) in [
        (import, &["version", "format", "format_version", "snapshots", "notes"][..]),
        (export, &["version", "snapshot", "format", "format_version", "path", "files", "notes"]),
        (detect, &["version", "path", "format", "format_version", "facts", "problem"]),
    ] {
        assert_eq!(written_fields(&text), fields, "{text}");
    }
}

#[test]
fn objects_have_the_promised_fields() {
    let home = Home::new();
    assert_eq!(fields(&home.json(&["init"])), ["store", "version"]);
    home.file("disk", &noise(1, 8));
    let commit = home.json(&["commit", "vm", "--disk", "disk"]);
    assert_eq!(
        fields(&commit),
        [
            "figures",
            "images",
            "left_out",
            "number",
            "parent",
            "seconds",
            "snapshot",
            "uuid",
            "version",
            "written_bytes"
        ]
    );
    let figures = [
        "changed_bytes",
        "elsewhere_bytes",
        "extents",
        "from_disks_bytes",
        "map_bytes",
        "new_bytes",
        "nonzero_bytes",
        "raw_bytes",
        "self_bytes",
        "skipped_bytes",
        "stored_bytes",
        "unchanged_bytes",
        "zero_bytes",
    ];
    assert_eq!(fields(&commit["figures"]), figures);
    assert_eq!(fields(&commit["images"]["disk/root"]), figures);
    assert_eq!(fields(&commit["seconds"]), ["capture", "fsync", "publish", "total"]);
    assert_eq!(commit["parent"], Value::Null);

    let ls = home.json(&["ls"]);
    assert_eq!(fields(&ls), ["damaged", "snapshots", "version"]);
    assert_eq!(
        fields(&ls["snapshots"][0]),
        [
            "created",
            "images",
            "labels",
            "name",
            "number",
            "parent",
            "raw_bytes",
            "snapshot",
            "stored_bytes",
            "uuid"
        ]
    );
    let show = home.json(&["show", "vm"]);
    assert_eq!(fields(&show), ["manifest", "packs", "snapshot", "version"]);
    assert_eq!(
        fields(&show["packs"][0]),
        [
            "file_bytes",
            "is_lost",
            "pack",
            "slots",
            "source",
            "used_bytes",
            "used_slots",
            "written_by"
        ]
    );
    let log = home.json(&["log", "vm"]);
    assert_eq!(fields(&log), ["lineage", "snapshot", "version"]);
    assert_eq!(
        fields(&log["lineage"][0]),
        ["created", "is_ancestor", "is_removed", "parent", "snapshot", "stored_bytes", "uuid"]
    );
    let diff = home.json(&["diff", "vm@1", "vm"]);
    assert_eq!(fields(&diff), ["images", "new", "old", "version"]);
    assert_eq!(
        fields(&home.json(&["du"])),
        [
            "damaged",
            "index_bytes",
            "live_bytes",
            "pack_bytes",
            "pack_files",
            "reclaimable_bytes",
            "snapshots",
            "version"
        ]
    );
    let usage = ["raw_bytes", "shared_bytes", "snapshot", "unique_bytes", "version"];
    assert_eq!(fields(&home.json(&["du", "vm"])), usage);
    assert_eq!(
        fields(&home.json(&["map", "vm:root"])),
        ["cell_bytes", "cells", "image", "size_bytes", "totals", "version"]
    );
    let export = home.json(&["export", "vm", "out"]);
    let whole =
        ["diff_from", "images", "path", "size_bytes", "snapshot", "version", "written_bytes"];
    assert_eq!(fields(&export), whole);
    assert_eq!(fields(&export["images"][0]), ["image", "path", "size_bytes", "written_bytes"]);
    assert_eq!(
        fields(&home.json(&["verify"])),
        ["frames", "notes", "packs", "problems", "read_bytes", "snapshots", "sound", "version"]
    );
    assert_eq!(
        fields(&home.json(&["prune", "vm", "--keep", "last=1"])),
        ["dry_run", "kept", "removed", "version"]
    );
    assert_eq!(
        fields(&home.json(&["compact"])),
        [
            "bytes_after",
            "bytes_before",
            "dry_run",
            "files_after",
            "files_before",
            "rewritten_packs",
            "version"
        ]
    );
    assert_eq!(fields(&home.json(&["rm", "vm"])), ["removed", "version"]);
    assert_eq!(
        fields(&home.json(&["gc"])),
        [
            "dead_bytes",
            "deleted_bytes",
            "deleted_files",
            "dry_run",
            "index_runs_after",
            "index_runs_before",
            "live_packs",
            "swept",
            "version"
        ]
    );
}
