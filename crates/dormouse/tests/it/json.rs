//! The fields of every object, as `docs/cli.md` promises them. A field that goes breaks a script.

use serde_json::Value;

use crate::fixture::{Home, noise};

fn fields(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
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
